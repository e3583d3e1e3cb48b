//! Unix sockets that we listen on: what stands in the way is looked at before it is removed, and at the end we remove
//! only what is ours.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use block_core::base::{Error, Result, ResultExt};
use block_core::rt::{Local, SharedFd};
use rustix::fs::{FlockOperation, Mode, OFlags, fchmod, flock, open};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};

/// A socket that connections come from.
#[derive(Debug)]
pub struct Listener {
    /// Not blocking.
    pub descriptor: OwnedFd,
    /// Absent where the socket was passed to us: its file belongs to who passed it.
    pub file: Option<SocketFile>,
}

/// A socket's place in the file system. Dropping it removes the file, if it is still ours.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Listener {
    /// Listens at `path`. A socket of ours that nobody listens on any more gives way; anything else is left as it is.
    /// Without `group` the umask says who may connect. With it the group may, unless the umask keeps all from it: the usual
    /// 022 is not meant for sockets, on which who may only read can do nothing.
    pub async fn bind(path: &Path, group: bool) -> Result<Self> {
        let address = address(path)?;
        // From the look at what stands there until we listen: whoever looks meanwhile would take ours for one that was left behind.
        let _turn = turn_in(path).await;
        Self::make(path, &address, group)
    }

    fn make(path: &Path, address: &SocketAddrUnix, group: bool) -> Result<Self> {
        let doing = || format!("Failed to bind socket to {}", path.display());
        let socket = stream_socket().doing(doing)?;
        if group {
            // The file is made with this and the umask, so that nobody else ever sees it open to more.
            fchmod(&socket, Mode::from_raw_mode(GROUP_MODE)).doing(doing)?;
        }
        match bind(&socket, address) {
            Err(Errno::ADDRINUSE) => {
                remove_stale(path, address)?;
                bind(&socket, address).doing(doing)?;
            }
            other => other.doing(doing)?,
        }
        // Before `listen` nobody can connect, so the mode is in force from the first connection on.
        let file = SocketFile::of(path).doing(doing)?;
        if group && std::fs::symlink_metadata(path).doing(doing)?.mode() & GROUP_READS != 0 {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(GROUP_MODE)).doing(doing)?;
        }
        listen(&socket, BACKLOG).doing(|| format!("Failed to listen on {}", path.display()))?;
        Ok(Self { descriptor: socket, file: Some(file) })
    }
}

/// A connection to who listens at `path`.
pub fn connect_to(path: &Path) -> Result<SharedFd> {
    let address = address(path)?;
    let socket = stream_socket().doing(|| "Failed to create socket")?;
    connect(&socket, &address).doing(|| format!("Failed to connect to '{}'", path.display()))?;
    Ok(Arc::new(socket))
}

fn address(path: &Path) -> Result<SocketAddrUnix> {
    let length = path.as_os_str().len();
    if length > MAX_PATH {
        return Err(Error::new(format!(
            "UNIX socket path '{}' is too long: {length} bytes, and {MAX_PATH} is the limit",
            path.display()
        )));
    }
    SocketAddrUnix::new(path).doing(|| format!("'{}' is no socket path", path.display()))
}

fn stream_socket() -> rustix::io::Result<OwnedFd> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
}

/// Of all trellisds one at a time makes sockets in a directory, as long as the value is there. Where the directory cannot be read, or
/// somebody else keeps it locked, they are made all the same: then two that begin at one moment may take a socket from each other.
async fn turn_in(path: &Path) -> Option<OwnedFd> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = open(directory, flags, Mode::empty()).ok()?;
    let local = Local::current();
    for _ in 0..TURNS {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(Errno::WOULDBLOCK | Errno::INTR) => local.sleep(TURN).await,
            Err(_) => return None,
        }
    }
    tracing::warn!(
        "the directory of '{}' stays locked by another process: making the socket without a lock",
        path.display()
    );
    None
}

/// Removes a socket that a killed process left behind.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<()> {
    let refuse = |why: &str| Err(Error::new(format!("Failed to bind socket to {}: {why}", path.display())));
    let there = std::fs::symlink_metadata(path).doing(|| format!("Cannot look at '{}'", path.display()))?;
    if !there.file_type().is_socket() {
        return refuse("what stands there is not a socket");
    }
    if there.uid() != rustix::process::geteuid().as_raw() {
        return refuse("the socket that stands there belongs to somebody else");
    }
    // Where somebody listens and does not look, this does not wait: it is the control thread.
    let probe = stream_socket().doing(|| "Failed to create socket")?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {}
        Ok(()) | Err(Errno::AGAIN) => return refuse("another process listens there"),
        Err(error) => return refuse(&error.to_string()),
    }
    tracing::info!("removing the socket '{}', which nobody listens on", path.display());
    std::fs::remove_file(path).doing(|| format!("Cannot remove the old socket '{}'", path.display()))
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let there = std::fs::symlink_metadata(&path)?;
        Ok(Self { path, identity: (there.dev(), there.ino()) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |there: &std::fs::Metadata| (there.dev(), there.ino()) == self.identity;
        if std::fs::symlink_metadata(&self.path).is_ok_and(|there| ours(&there)) {
            // Nothing is lost if it stays: the next one to bind here finds that nobody listens.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// `sun_path` holds 108 bytes, the last of which is NUL.
const MAX_PATH: usize = 107;
const BACKLOG: i32 = 128;
/// How often it is looked whether another process is done with its socket, and how long after each other: it needs microseconds.
const TURNS: u32 = 250;
const TURN: Duration = Duration::from_millis(2);
/// Owner and group may connect.
const GROUP_MODE: u32 = 0o660;
const GROUP_READS: u32 = 0o040;

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::sync::Barrier;

    use block_core::rt::run_control;

    use super::*;

    fn bound(path: &Path, group: bool) -> Result<Listener> {
        run_control(|_| Listener::bind(path, group))
    }

    #[test]
    fn a_stale_socket_gives_way_and_a_live_one_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("q.sock");
        let other = UnixListener::bind(&path).unwrap();
        let refused = bound(&path, false).unwrap_err().to_string();
        assert!(refused.ends_with("another process listens there"), "{refused}");
        drop(other);
        let ours = bound(&path, true).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        drop(ours);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_is_never_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert!(bound(&path, false).unwrap_err().to_string().contains("not a socket"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
    }

    #[test]
    fn a_successor_s_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("q.sock");
        let ours = bound(&path, false).unwrap();
        std::fs::remove_file(&path).unwrap();
        let successor = UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists());
        drop(successor);
    }

    #[test]
    fn a_listener_that_does_not_look_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let busy = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        bind(&busy, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        listen(&busy, 0).unwrap();
        let _fills_the_backlog = UnixStream::connect(&path).unwrap();
        let (done, waits) = std::sync::mpsc::channel();
        let asked = path.clone();
        std::thread::Builder::new().spawn(move || done.send(bound(&asked, false).is_err())).unwrap();
        assert_eq!(waits.recv_timeout(Duration::from_secs(10)), Ok(true));
        assert!(path.exists());
    }

    #[test]
    fn a_path_that_does_not_fit_is_refused_before_anything_happens() {
        let long = format!("/tmp/{}", "a".repeat(200));
        assert!(bound(Path::new(&long), false).unwrap_err().to_string().contains("too long"));
    }

    /// Whoever lost would believe that it serves, and nobody would ever come.
    #[test]
    fn of_many_that_begin_at_one_moment_one_serves() {
        for round in 0..200 {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("q.sock");
            drop(UnixListener::bind(&path).unwrap());
            let barrier = Barrier::new(8);
            let all: Vec<_> = std::thread::scope(|scope| {
                let begin = || {
                    barrier.wait();
                    bound(&path, false)
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(begin)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let (serving, refused): (Vec<_>, Vec<_>) = all.into_iter().partition(Result::is_ok);
            assert_eq!(serving.len(), 1, "round {round}: they believe that they serve");
            for error in refused.into_iter().filter_map(Result::err) {
                assert!(error.to_string().ends_with("another process listens there"), "{error}");
            }
            UnixStream::connect(&path).unwrap();
            let winner = UnixListener::from(serving.into_iter().flatten().next().unwrap().descriptor);
            winner.accept().expect("who connects is served by the one that serves");
        }
    }

    #[test]
    fn a_directory_that_somebody_keeps_locked_does_not_keep_us_out() {
        let directory = tempfile::tempdir().unwrap();
        let hostile = open(directory.path(), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        flock(&hostile, FlockOperation::LockExclusive).unwrap();
        assert!(bound(&directory.path().join("q.sock"), false).is_ok());
    }
}
