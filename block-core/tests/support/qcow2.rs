//! A judge of qcow2 images that is quick enough for every state that a crash may leave: references are counted and
//! compared with refcounts. It knows nothing of the driver; QEMU's judge is asked from time to time.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test file uses a part")]

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Output};

/// What is wrong with the image. What nobody refers to and has a refcount is a leak, and nothing wrong.
pub fn corrupt(image: &[u8]) -> Result<Judged, String> {
    let image = Image(image);
    let bits = image.u32(20)?;
    let (cluster, size) = (1u64 << bits, image.0.len() as u64);
    let is_old = image.u32(4)? == 2;
    let extended = !is_old && image.u64(72)? & 16 != 0;
    let external = !is_old && image.u64(72)? & 4 != 0;
    let order = if is_old { 4 } else { image.u32(96)? };
    let mut references: HashMap<u64, u64> = HashMap::new();
    let mut refer = |start: u64, len: u64| {
        (start >> bits..=(start + len - 1) >> bits).for_each(|one| *references.entry(one).or_default() += 1);
    };
    refer(0, cluster);
    let (l1, entries) = (image.u64(40)?, u64::from(image.u32(36)?));
    refer(l1, entries * 8);
    let (table, clusters) = (image.u64(48)?, u64::from(image.u32(56)?));
    refer(table, clusters << bits);
    if let Some((start, len)) = keys(&image)? {
        refer(start, len);
    }
    let mut blocks = Vec::new();
    for entry in 0..(clusters << bits) / 8 {
        let block = image.u64(table + entry * 8)?;
        if block != 0 {
            refer(block, cluster);
        }
        blocks.push(block);
    }
    let mut tables = vec![(l1, entries, true)];
    tables.extend(snapshots(&image, &mut refer)?.into_iter().map(|(l1, entries)| (l1, entries, false)));
    let mut copied = Vec::new();
    let step = if extended { 16 } else { 8 };
    for (l1, entry, is_active) in
        tables.into_iter().flat_map(|(l1, entries, is_active)| (0..entries).map(move |entry| (l1, entry, is_active)))
    {
        let l1_index = entry;
        let word = image.u64(l1 + entry * 8)?;
        let l2 = word & OFFSET;
        if l2 == 0 {
            continue;
        }
        refer(l2, cluster);
        copied.extend(is_active.then_some((l2, word, "an L2 table")));
        for entry in 0..cluster / step {
            let word = image.u64(l2 + entry * step)?;
            if external {
                let guest = (l1_index * cluster / step + entry) << bits;
                if word & (1 << 62) != 0 || word & OFFSET != 0 && word & OFFSET != guest {
                    return Err(format!("{word:#x} leads elsewhere than to {guest:#x} of the data file"));
                }
            } else if word & (1 << 62) != 0 {
                let split = 62 - (bits - 8);
                let start = word & ((1 << split) - 1);
                let sectors = (word & !(3 << 62)) >> split;
                refer(start, (sectors + 1) * 512 - start % 512);
            } else if word & OFFSET != 0 {
                refer(word & OFFSET, cluster);
                copied.extend(is_active.then_some((word & OFFSET, word, "guest data")));
            }
        }
    }
    let count = |number: u64| -> Result<u64, String> {
        let per_block = (cluster * 8) >> order;
        let block = blocks.get((number / per_block) as usize).copied().unwrap_or(0);
        if block == 0 { Ok(0) } else { image.refcount(block, number % per_block, order) }
    };
    let mut judged = Judged::default();
    for (number, references) in &references {
        let count = count(*number)?;
        if count < *references {
            return Err(format!("cluster {number} has {references} references and refcount {count}"));
        }
    }
    for (start, word, what) in copied {
        let count = count(start >> bits)?;
        if (word >> 63 == 1) != (count == 1) && (word >> 63 == 1) {
            return Err(format!("{what} at {start:#x} says that it is alone, and has refcount {count}"));
        }
    }
    for number in 0..size.div_ceil(cluster) {
        judged.clusters += 1;
        judged.leaks += usize::from(count(number)? > references.get(&number).copied().unwrap_or(0));
    }
    Ok(judged)
}

/// Where an encrypted image has its LUKS header, and how long that is.
fn keys(image: &Image<'_>) -> Result<Option<(u64, u64)>, String> {
    if image.u32(32)? != 2 {
        return Ok(None);
    }
    let mut at = if image.u32(4)? == 2 { 72 } else { u64::from(image.u32(100)?) };
    loop {
        match image.u32(at)? {
            0 => return Err("the image does not say where its keys are".into()),
            0x0537_be77 => return Ok(Some((image.u64(at + 8)?, image.u64(at + 16)?))),
            _ => at += 8 + u64::from(image.u32(at + 4)?).next_multiple_of(8),
        }
    }
}

/// The L1 tables of the snapshots, and their entries.
fn snapshots(image: &Image<'_>, refer: &mut impl FnMut(u64, u64)) -> Result<Vec<(u64, u64)>, String> {
    let (count, start) = (image.u32(60)?, image.u64(64)?);
    let (mut at, mut tables) = (start, Vec::new());
    for _ in 0..count {
        let (l1, entries) = (image.u64(at)?, u64::from(image.u32(at + 8)?));
        let names = image.u32(at + 12)?;
        let len = 40 + u64::from(image.u32(at + 36)?) + u64::from(names >> 16) + u64::from(names & 0xffff);
        refer(l1, entries * 8);
        tables.push((l1, entries));
        at += len.next_multiple_of(8);
    }
    if count > 0 {
        refer(start, at - start);
    }
    Ok(tables)
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Judged {
    pub clusters: usize,
    pub leaks: usize,
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

struct Image<'a>(&'a [u8]);

impl Image<'_> {
    fn u64(&self, at: u64) -> Result<u64, String> {
        let bytes = usize::try_from(at).ok().and_then(|at| self.0.get(at..at + 8));
        let bytes = bytes.ok_or_else(|| format!("the image ends before {at:#x}"))?;
        Ok(u64::from_be_bytes(bytes.try_into().unwrap()))
    }

    fn u32(&self, at: u64) -> Result<u32, String> {
        Ok((self.u64(at)? >> 32) as u32)
    }

    fn refcount(&self, block: u64, index: u64, order: u32) -> Result<u64, String> {
        let bits = 1u64 << order;
        let at = block + index * bits / 8;
        let byte = |at: u64| usize::try_from(at).ok().and_then(|at| self.0.get(at)).copied().unwrap_or(0);
        if bits < 8 {
            return Ok(u64::from(byte(at)) >> (index * bits % 8) & ((1 << bits) - 1));
        }
        Ok((0..bits / 8).fold(0, |value, number| value << 8 | u64::from(byte(at + number))))
    }
}

/// What QEMU's judge says: `Ok(true)` where it finds leaks.
pub fn qemu_check(image: &[u8]) -> Result<bool, String> {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    std::fs::write(file.path(), image).unwrap();
    let output = judge(file.path(), image, &[]);
    match output.status.code() {
        Some(0) => Ok(false),
        Some(3) => Ok(true),
        _ => Err(format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))),
    }
}

fn judge(path: &Path, image: &[u8], more: &[&str]) -> Output {
    let encrypt = if image[35] == 2 { ",encrypt.format=luks,encrypt.key-secret=word" } else { "" };
    let source = format!("driver=qcow2,file.filename={}{encrypt}", path.display());
    let arguments = ["60", "qemu-img", "check", "--object", WORD, "--image-opts", &source];
    Command::new("timeout").args(arguments).args(more).output().unwrap()
}

/// What opens an image that [`fresh`] makes, for QEMU's programs.
const WORD: &str = "secret,id=word,data=word";

/// Options for an encrypted image that is opened quickly, by the secret `word`.
pub const ENCRYPTED: &str = "encrypt.format=luks,encrypt.key-secret=word,encrypt.iter-time=1,encrypt.cipher-alg=aes-128,\
                             encrypt.cipher-mode=cbc,encrypt.ivgen-alg=plain64";

/// QEMU repairs it, as far as only leaks and entries that do not say that they are alone are wrong with it; gives the
/// image.
pub fn qemu_repaired(image: &[u8]) -> Result<Vec<u8>, String> {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    std::fs::write(file.path(), image).unwrap();
    for more in [&["-r", "leaks"][..], &[]] {
        let output = judge(file.path(), image, more);
        if !output.status.success() {
            let said = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            return Err(format!("{more:?}: {}{}", said.0, said.1));
        }
    }
    Ok(std::fs::read(file.path()).unwrap())
}

/// QEMU repairs whatever it finds; gives the image.
pub fn qemu_mended(image: &[u8]) -> Result<Vec<u8>, String> {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    std::fs::write(file.path(), image).unwrap();
    let path = file.path().to_str().unwrap();
    let mut command = Command::new("timeout");
    let output = command.args(["60", "qemu-img", "check", "-f", "qcow2", "-r", "all", path]).output().unwrap();
    match output.status.success() {
        true => Ok(std::fs::read(path).unwrap()),
        false => Err(format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))),
    }
}

/// A fresh image that QEMU makes.
pub fn fresh(options: &str, size: u64) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    let path = file.path().to_str().unwrap();
    let status = Command::new("timeout")
        .args(["60", "qemu-img", "create", "-q", "--object", WORD, "-f", "qcow2", "-o", options, path])
        .arg(size.to_string())
        .status();
    assert!(status.unwrap().success());
    std::fs::read(path).unwrap()
}

/// The image says that it was not closed in good order.
pub fn is_dirty(image: &[u8]) -> bool {
    image[7] == 3 && image[79] & 1 != 0
}

/// An image that was not closed in good order: of the clusters that its first refcount block describes, some have no
/// refcount, and others one that is too high.
pub fn spoil(image: &mut [u8]) {
    let word = |image: &[u8], at: u64| Image(image).u64(at).unwrap();
    let (bits, order) = (Image(image).u32(20).unwrap(), Image(image).u32(96).unwrap());
    assert_eq!(order, 4, "refcounts of two bytes");
    let block = word(image, word(image, 48)) as usize;
    for (number, count) in image[block..block + (1 << bits)].chunks_exact_mut(2).enumerate() {
        match number % 5 {
            1 => count.copy_from_slice(&[0, 0]),
            3 => count.copy_from_slice(&[0, 2]),
            _ => {}
        }
    }
    image[79] |= 1;
}
