//! What the servers serve: a null node, or a file of random bytes on the wanted file system.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::client::load::Random;
use crate::server::option;

/// A disk that servers take turns to serve.
#[derive(Debug)]
pub enum Storage {
    /// null-co: no I/O at all.
    Null,
    /// A file of random bytes.
    Image(Image),
}

/// The file, and what it lies on.
#[derive(Debug)]
pub struct Image {
    directory: TempDir,
    direct: bool,
    file_system: String,
    // After `directory`, which lies on it.
    _zram: Option<Zram>,
}

impl Storage {
    /// Makes a file of `size` bytes in a scratch directory under `parent`, served with O_DIRECT where that opens.
    ///
    /// # Errors
    /// The file system's.
    pub fn file(parent: &Path, size: u64) -> io::Result<Self> {
        Image::make(parent, size, None).map(Self::Image)
    }

    /// The same on an ext4 of its own on a new zram device, whose O_DIRECT I/O completes at once. Needs root.
    ///
    /// # Errors
    /// No zram in this kernel, no right to it, or a tool failed.
    pub fn zram(size: u64) -> io::Result<Self> {
        let zram = Zram::mount(size * 3 / 2)?;
        let mount_point = zram.mount_point.path().to_owned();
        Image::make(&mount_point, size, Some(zram)).map(Self::Image)
    }

    /// `--blockdev` arguments that make a node `disk`.
    #[must_use]
    pub fn node(&self) -> Vec<String> {
        match self {
            Self::Null => option("blockdev", &format!("null-co,node-name=disk,size={NULL_SIZE},read-zeroes=off")),
            Self::Image(image) => image.node(),
        }
    }

    /// What it is, for a table.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Null => "null-co".to_owned(),
            Self::Image(image) => {
                format!("{}, {}", image.file_system, if image.direct { "O_DIRECT" } else { "buffered" })
            }
        }
    }
}

impl Image {
    fn make(parent: &Path, size: u64, zram: Option<Zram>) -> io::Result<Self> {
        let directory = tempfile::Builder::new().prefix("trellis-bench-").tempdir_in(parent)?;
        let path = directory.path().join(IMAGE);
        fill(&path, size)?;
        let direct = opens_direct(&path);
        let file_system = file_system(directory.path())?;
        Ok(Self { directory, direct, file_system, _zram: zram })
    }

    fn node(&self) -> Vec<String> {
        let path = self.directory.path().join(IMAGE);
        let direct = if self.direct { "on" } else { "off" };
        let file = format!("file,node-name=file,filename={},aio=io_uring,cache.direct={direct}", path.display());
        let raw = format!("raw,node-name=disk,file=file,cache.direct={direct}");
        [option("blockdev", &file), option("blockdev", &raw)].concat()
    }
}

/// An ext4 on a compressed RAM disk. Unmounted and removed when dropped.
#[derive(Debug)]
struct Zram {
    number: u32,
    mount_point: TempDir,
}

impl Zram {
    fn mount(size: u64) -> io::Result<Self> {
        let number = fs::read_to_string("/sys/class/zram-control/hot_add")?;
        let number = number.trim().parse().map_err(io::Error::other)?;
        // From here on `drop` takes the device away again, however far we come.
        let zram = Self { number, mount_point: tempfile::Builder::new().prefix("trellis-zram-").tempdir()? };
        fs::write(format!("/sys/block/zram{number}/disksize"), size.to_string())?;
        let device = format!("/dev/zram{number}");
        tool("mkfs.ext4", &["-q", "-F", "-m", "0", &device])?;
        tool("mount", &[&device, &zram.mount_point.path().to_string_lossy()])?;
        Ok(zram)
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let undone = tool("umount", &[&self.mount_point.path().to_string_lossy()])
            .and_then(|()| fs::write(format!("/sys/block/zram{}/reset", self.number), "1"))
            .and_then(|()| fs::write("/sys/class/zram-control/hot_remove", self.number.to_string()));
        if let Err(error) = undone {
            eprintln!("/dev/zram{} stays behind: {error}", self.number);
        }
    }
}

fn tool(name: &str, arguments: &[&str]) -> io::Result<()> {
    let output = Command::new(name).args(arguments).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("{name} failed: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

/// Random bytes, so that neither a compressing device nor a zero detector has less to do than with real data.
fn fill(path: &Path, size: u64) -> io::Result<()> {
    let mut file = File::create(path)?;
    let mut random = Random::new(size);
    let mut chunk = Vec::with_capacity(1 << 20);
    let mut written = 0;
    while written < size {
        chunk.clear();
        let len = (size - written).min(1 << 20);
        while (chunk.len() as u64) < len {
            chunk.extend_from_slice(&random.below(u64::MAX).to_le_bytes());
        }
        file.write_all(&chunk)?;
        written += chunk.len() as u64;
    }
    file.sync_all()
}

fn opens_direct(path: &Path) -> bool {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).is_ok()
}

/// Type and source of the mount that `path` lies on.
fn file_system(path: &Path) -> io::Result<String> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let path = fs::canonicalize(path)?;
    let best = mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            Some((words.next()?, words.next()?, words.next()?))
        })
        .filter(|(_, target, _)| path.starts_with(target))
        .max_by_key(|(_, target, _)| target.len());
    Ok(best.map_or_else(|| "unknown".to_owned(), |(source, _, kind)| format!("{kind} on {source}")))
}

/// Bytes of the null node.
const NULL_SIZE: u64 = 1 << 30;

/// Name of the file in its scratch directory.
const IMAGE: &str = "disk.img";
