//! The valid images: QEMU makes them, each with everything that its kind can have.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use block_core::base::ByteRange;

use crate::bench::range;
use crate::fields::Fields;
use crate::random::Random;

/// A valid image, and the files that it stands on.
pub(crate) struct Sample {
    pub(crate) name: &'static str,
    pub(crate) image: Arc<[u8]>,
    pub(crate) data: Option<Arc<[u8]>>,
    pub(crate) base: Option<Arc<[u8]>>,
    /// [`WORD`] opens it.
    pub(crate) encrypted: bool,
    pub(crate) fields: Fields,
    /// Bytes in a cluster.
    cluster: u64,
}

struct Recipe {
    name: &'static str,
    cluster: u64,
    backed: bool,
    external: bool,
    snapshots: bool,
    bitmaps: bool,
    encrypted: bool,
}

const PLAIN: Recipe = Recipe {
    name: "",
    cluster: 4096,
    backed: false,
    external: false,
    snapshots: false,
    bitmaps: false,
    encrypted: false,
};

const RECIPES: &[Recipe] = &[
    Recipe { name: "cluster_size=4096", snapshots: true, backed: true, ..PLAIN },
    Recipe { name: "cluster_size=512,compat=0.10", cluster: 512, snapshots: true, ..PLAIN },
    Recipe { name: "cluster_size=65536", cluster: 65536, ..PLAIN },
    Recipe { name: "cluster_size=16K,extended_l2=on", cluster: 16384, backed: true, ..PLAIN },
    Recipe { name: "cluster_size=4096,compression_type=zstd,refcount_bits=1", ..PLAIN },
    Recipe { name: "cluster_size=512,refcount_bits=64,lazy_refcounts=on", cluster: 512, snapshots: true, ..PLAIN },
    Recipe { name: "cluster_size=4096,data_file_raw=on", external: true, ..PLAIN },
    Recipe { name: "cluster_size=4096,", bitmaps: true, snapshots: true, ..PLAIN },
    Recipe { name: ENCRYPTED, encrypted: true, snapshots: true, backed: true, ..PLAIN },
];

const ENCRYPTED: &str =
    "cluster_size=4096,encrypt.format=luks,encrypt.key-secret=word,encrypt.iter-time=1,encrypt.cipher-alg=aes-128";
/// The passphrase of encrypted images.
pub(crate) const WORD: &str = "open sesame";

pub(crate) fn all() -> Vec<Sample> {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    RECIPES.iter().map(|recipe| recipe.make(dir.path())).collect()
}

/// Of each disk, in bytes.
const SIZE: u64 = 2 << 20;

impl Recipe {
    fn make(&self, dir: &Path) -> Sample {
        let name = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        let (path, data, base) = (name("image"), name("data"), name("base"));
        std::fs::write(&base, vec![3; 1 << 20]).unwrap();
        let mut options = self.name.trim_end_matches(',').to_owned();
        if self.external {
            std::fs::write(&data, []).unwrap();
            options += &format!(",data_file={data}");
        }
        let (size, object) = (SIZE.to_string(), format!("secret,id=word,data={WORD}"));
        let mut create = vec!["create", "-q", "--object", &object, "-f", "qcow2", "-o", &options];
        if self.backed {
            create.extend(["-b", &base, "-F", "raw"]);
        }
        create.extend([path.as_str(), &size]);
        run("qemu-img", &create);
        let key = if self.encrypted { "encrypt.key-secret=word," } else { "" };
        let opts = format!("driver=qcow2,{key}file.filename={path}");
        let write = |what: &str| run("qemu-io", &["--object", &object, "-c", what, "--image-opts", &opts]);
        write(&format!("write -P 5 0 {}", 3 * self.cluster));
        if self.snapshots {
            for name in ["first", "a second one with a longer name"] {
                run("qemu-img", &["snapshot", "--object", &object, "--image-opts", "-c", name, &opts]);
            }
        }
        if self.bitmaps {
            run("qemu-img", &["bitmap", "--add", &path, "bitmap0"]);
            run("qemu-img", &["bitmap", "--add", "-g", "65536", &path, "another"]);
        }
        write(&format!("write -P 6 {} {}", self.cluster, self.cluster));
        write("write -z 1M 64k");
        if !self.external && !self.encrypted {
            write(&format!("write -c -P 9 {} {}", 8 * self.cluster, self.cluster));
        }
        let read = |path: &str| Arc::<[u8]>::from(std::fs::read(path).unwrap());
        let image = read(&path);
        Sample {
            name: self.name,
            fields: Fields::of(&image),
            data: self.external.then(|| read(&data)),
            base: self.backed.then(|| read(&base)),
            encrypted: self.encrypted,
            cluster: self.cluster,
            image,
        }
    }
}

impl Sample {
    /// Somewhere on a disk of `size` bytes, mostly where something is. `None`: the disk is too small.
    pub(crate) fn place(&self, size: u64, random: &mut Random) -> Option<ByteRange> {
        let cluster = self.cluster;
        let start = match random.below(8) {
            0..5 => random.below(12) * cluster,
            5 => (1 << 20) + random.below(4) * cluster,
            6 => size.saturating_sub((1 + random.below(16)) * 512),
            _ => random.below(size.max(1)) / 512 * 512,
        };
        let len = [512, cluster, 3 * cluster, 1000][random.below(4) as usize];
        let start = start + [0, 0, 512, 7][random.below(4) as usize];
        let len = len.min(size.saturating_sub(start));
        (len > 0).then(|| range(start, len))
    }
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new("timeout").arg("60").arg(program).args(arguments).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
}
