//! The pid file: locked as long as we live, written last, removed at the end. Scripts take its existence for readiness.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use block_core::base::{Error, Result, ResultExt};
use rustix::fs::{FlockOperation, fcntl_lock};

/// Our pid file. Dropping it removes it.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    /// Keeps the lock.
    file: File,
}

impl PidFile {
    /// Writes our process id, unless another process that lives holds the file.
    pub fn write(path: &Path) -> Result<Self> {
        // The directory we start in is left when we go to the background, and the file is removed from elsewhere.
        let path = std::path::absolute(path).doing(|| format!("Cannot find the pid file '{}'", path.display()))?;
        let mut file = locked(&path)?;
        file.set_len(0)
            .and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes()))
            .doing(|| format!("Cannot write the pid file '{}'", path.display()))?;
        Ok(Self { path, file })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if !is_at(&self.file, &self.path).unwrap_or(false) {
            // Somebody removed it, and what may stand there now is another's.
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!("could not remove the pid file '{}': {error}", self.path.display());
        }
    }
}

/// Opens and locks what stands at `path`, and not what stood there a moment before: a process that ends removes it.
fn locked(path: &Path) -> Result<File> {
    loop {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o644).open(path);
        let file = file.doing(|| format!("Cannot open pid file '{}'", path.display()))?;
        fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| Error::new(format!("Cannot lock pid file '{}': another process holds it", path.display())))?;
        if is_at(&file, path).doing(|| format!("Cannot look at pid file '{}'", path.display()))? {
            return Ok(file);
        }
    }
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_who_we_are_and_goes_with_us() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.pid");
        std::fs::write(&path, "99999999 left by one that was killed\n").unwrap();
        let pidfile = PidFile::write(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        drop(pidfile);
        assert!(!path.exists());
    }

    #[test]
    fn another_s_file_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.pid");
        let pidfile = PidFile::write(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        drop(PidFile::write(&path).unwrap());
        std::fs::write(&path, "another\n").unwrap();
        drop(pidfile);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "another\n");
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let error = PidFile::write(Path::new("/nonexistent/x.pid")).unwrap_err();
        assert_eq!(error.to_string(), "Cannot open pid file '/nonexistent/x.pid'");
    }
}
