//! What the guest consists of: `init.sh`, busybox, the host's own fio and e2fsprogs with their libraries, and kernel
//! modules, as a cpio archive that the kernel unpacks into memory.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, iter};

use crate::cloud_kernel::CloudKernel;

/// Writes the archive to `path`.
///
/// # Errors
/// Those of writing it.
///
/// # Panics
/// Where a program is missing on this machine.
pub(super) fn write(path: &Path, kernel: &CloudKernel) -> io::Result<()> {
    let mut archive = Archive::create(path)?;
    for folder in ["dev", "proc", "sys", "tmp", "mnt", "modules"] {
        archive.folder(Path::new(folder))?;
    }
    archive.file(Path::new("init"), include_bytes!("init.sh"))?;
    archive.copy(Path::new("/bin/busybox"))?;
    archive.symlink(Path::new("bin/sh"), "busybox")?;
    archive.copy(Path::new("/etc/mke2fs.conf"))?;
    for program in PROGRAMS.map(Path::new) {
        archive.copy(program)?;
        for library in libraries_of(program) {
            archive.copy(&library)?;
        }
    }
    // The shell sorts what it globs, so that a number in front is the order of loading.
    for (number, (name, bytes)) in kernel.modules(&MODULES).iter().enumerate() {
        archive.file(Path::new(&format!("modules/{number:02}-{name}.ko")), bytes)?;
    }
    archive.finish()
}

/// What busybox does not have, or not as tests need it: its mke2fs makes no ext4, its blkdiscard writes no zeroes
/// (and is what its shell takes, unless the path is given).
const PROGRAMS: [&str; 3] = ["/usr/bin/fio", "/usr/sbin/mkfs.ext4", "/usr/sbin/blkdiscard"];
/// Most of them are built into Debian's cloud kernel today.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "virtio_console", "ext4"];

/// What the dynamic linker would load, by its own account.
fn libraries_of(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().expect("ldd starts");
    assert!(output.status.success(), "no {}: run `.ci/setup`, which installs it", program.display());
    let text = String::from_utf8_lossy(&output.stdout);
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

/// A cpio archive in the "newc" form, which is the one that Linux unpacks
/// (kernel documentation, "initramfs buffer format").
struct Archive {
    out: BufWriter<File>,
    written: BTreeSet<PathBuf>,
}

impl Archive {
    fn create(path: &Path) -> io::Result<Self> {
        Ok(Self { out: BufWriter::new(File::create(path)?), written: BTreeSet::new() })
    }

    /// A file of this machine, at its own place.
    fn copy(&mut self, path: &Path) -> io::Result<()> {
        let bytes =
            fs::read(path).unwrap_or_else(|error| panic!("reading {}: {error}; run `.ci/setup`", path.display()));
        self.file(path.strip_prefix("/").expect("copied by absolute path"), &bytes)
    }

    fn file(&mut self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.entry(path, 0o100_755, bytes)
    }

    fn symlink(&mut self, path: &Path, target: &str) -> io::Result<()> {
        self.entry(path, 0o120_777, target.as_bytes())
    }

    fn folder(&mut self, path: &Path) -> io::Result<()> {
        self.entry(path, 0o040_755, &[])
    }

    fn entry(&mut self, path: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
        if !self.written.insert(path.to_owned()) {
            return Ok(());
        }
        if let Some(parent) = path.parent().filter(|parent| *parent != Path::new("")) {
            self.folder(parent)?;
        }
        self.record(&path.to_string_lossy(), mode, bytes)
    }

    fn record(&mut self, name: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
        let number = self.written.len();
        let size = bytes.len();
        let name_size = name.len() + 1;
        let links = 1;
        // inode, mode, uid, gid, links, mtime, size, device × 2, node's device × 2, name size, checksum
        write!(self.out, "070701{number:08x}{mode:08x}{0:08x}{0:08x}{links:08x}{0:08x}{size:08x}", 0)?;
        write!(self.out, "{0:08x}{0:08x}{0:08x}{0:08x}{name_size:08x}{0:08x}{name}\0", 0)?;
        self.pad(HEADER_SIZE + name_size)?;
        self.out.write_all(bytes)?;
        self.pad(size)
    }

    fn pad(&mut self, written: usize) -> io::Result<()> {
        let padding: Vec<u8> = iter::repeat_n(0, written.next_multiple_of(4) - written).collect();
        self.out.write_all(&padding)
    }

    fn finish(mut self) -> io::Result<()> {
        self.record("TRAILER!!!", 0, &[])?;
        self.out.flush()
    }
}

const HEADER_SIZE: usize = 110;
