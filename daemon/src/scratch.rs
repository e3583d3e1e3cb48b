//! What `trellisd` does when nothing is asked of it: a scratch disk in a private directory, served and gone with us.

use std::fmt;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use block_core::base::{Result, ResultExt};
use serde_json::json;

use crate::cli::{Step, StepOption};

/// The directory with disk and sockets. Dropping it removes it.
pub(crate) struct Scratch {
    directory: PathBuf,
}

impl Scratch {
    /// Makes the directory and the disk.
    pub(crate) fn make() -> Result<Self> {
        let base = ["RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"].iter().find_map(std::env::var_os);
        let base = base.map_or_else(std::env::temp_dir, PathBuf::from);
        let directory =
            private_directory(&base).doing(|| format!("Cannot make a directory in '{}'", base.display()))?;
        let scratch = Self { directory };
        let disk = scratch.path(DISK);
        File::create_new(&disk)
            .and_then(|file| file.set_len(SIZE))
            .doing(|| format!("Cannot make the scratch disk '{}'", disk.display()))?;
        Ok(scratch)
    }

    /// What an operator would have asked for.
    pub(crate) fn steps(&self) -> Vec<Step> {
        let node = json!({
            "driver": "file", "node-name": "scratch", "filename": self.path(DISK), "discard": "unmap",
        });
        let export = json!({
            "type": "vhost-user-blk", "id": "scratch", "node-name": "scratch", "writable": true,
            "addr": { "type": "unix", "path": self.path(DISK_SOCKET) },
        });
        vec![
            Step { option: StepOption::Blockdev, text: node.to_string() },
            Step { option: StepOption::Export, text: export.to_string() },
            Step { option: StepOption::Qmp, text: self.path(QMP_SOCKET).display().to_string() },
        ]
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            tracing::warn!("could not remove '{}': {error}", self.directory.display());
        }
    }
}

impl fmt::Display for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (disk, control) = (self.path(DISK_SOCKET), self.path(QMP_SOCKET));
        writeln!(f, "Serving a scratch disk of 1 GiB, which is gone when trellisd ends.")?;
        writeln!(f, "  disk:    {}", disk.display())?;
        writeln!(f, "  control: {}", control.display())?;
        writeln!(f, "Attach it to a virtual machine:")?;
        writeln!(f, "  qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=mem,size=1G,share=on \\")?;
        writeln!(f, "    -machine q35,memory-backend=mem -chardev socket,id=disk,path={} \\", disk.display())?;
        writeln!(f, "    -device vhost-user-blk-pci,chardev=disk")?;
        writeln!(f, "Press Ctrl-C to end it. Options for disks of your own: trellisd --help")
    }
}

/// A new directory that only we can enter.
fn private_directory(base: &Path) -> io::Result<PathBuf> {
    let mut number = 0;
    loop {
        let path = std::path::absolute(base.join(format!("trellis-{}-{number}", std::process::id())))?;
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
            result => return result.map(|()| path),
        }
    }
}

const DISK: &str = "scratch.img";
const DISK_SOCKET: &str = "trellis.sock";
const QMP_SOCKET: &str = "qmp.sock";
/// Bytes; the file is sparse.
const SIZE: u64 = 1 << 30;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_disk_is_private_and_goes_with_us() {
        let scratch = Scratch::make().unwrap();
        let directory = scratch.directory.clone();
        assert_eq!(std::fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(std::fs::metadata(scratch.path(DISK)).unwrap().len(), SIZE);
        drop(scratch);
        assert!(!directory.exists());
    }
}
