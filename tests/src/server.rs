//! The server under test as a child process.
//!
//! It is `trellisd` from the build that the test itself comes from. `TRELLIS_SERVER` names another program with the
//! command line of `qemu-storage-daemon`, to see whether a test's claim is true of the peer too.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use serde_json::json;

use crate::process::{OwnedChild, wait_for};
use crate::qmp::Qmp;

/// A running server; killed when dropped. The end of what it said is shown where its test fails.
#[derive(Debug)]
pub struct Server {
    child: OwnedChild,
    control: PathBuf,
    log: PathBuf,
}

impl Server {
    /// Starts the server with `arguments` and a control socket in `folder`.
    ///
    /// # Panics
    /// Where there is no server to start, or it does not answer on its control socket.
    #[must_use]
    pub fn start(folder: &Path, arguments: &[&str]) -> Self {
        Self::start_program(&program(), folder, arguments)
    }

    /// Starts QEMU's storage daemon, to ask it what ours is asked.
    ///
    /// # Panics
    /// Where it is not installed, or does not answer on its control socket.
    #[must_use]
    pub fn start_peer(folder: &Path, arguments: &[&str]) -> Self {
        Self::start_program(Path::new("qemu-storage-daemon"), folder, arguments)
    }

    fn start_program(program: &Path, folder: &Path, arguments: &[&str]) -> Self {
        let control = folder.join("control.sock");
        let log = folder.join("server.log");
        let chardev = format!("socket,id=control,path={},server=on,wait=off", control.display());
        let said = File::create(&log).expect("the scratch folder is writable");
        let mut command = Command::new(program);
        command.args(arguments).args(["--chardev", &chardev, "--monitor", "chardev=control"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
        let mut server = Self { child: OwnedChild::spawn(&mut command), control, log };
        server.wait_until_it_is_there();
        server
    }

    /// A new control connection. A peer may serve one at a time.
    #[must_use]
    pub fn qmp(&self) -> Qmp {
        Qmp::connect(&self.control)
    }

    /// Where the control socket is.
    #[must_use]
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Whether this is trellisd, not a stand-in that lacks its extensions.
    #[must_use]
    pub fn is_trellisd() -> bool {
        program().file_name().is_some_and(|name| name == "trellisd")
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, where it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.ended()
    }

    /// Asks the server to quit, over a new control connection, and waits for its end.
    ///
    /// # Panics
    /// Where it does not end, or ends with a failure.
    pub fn quit(mut self) {
        self.qmp().execute("quit", &json!({}));
        let status = self.wait();
        assert!(status.success(), "the server ended with {status}; it said:\n{}", self.said());
    }

    /// Waits for the end of a server that was told to quit.
    ///
    /// # Panics
    /// Where it does not end.
    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait(LIMIT)
    }

    /// The socket is made last, after what `arguments` ask for. Whether it listens yet is for clients to find out:
    /// probing it would take the place of its one client.
    fn wait_until_it_is_there(&mut self) {
        wait_for("the server's control socket", LIMIT, || {
            if let Some(status) = self.child.ended() {
                panic!("the server ended at once with {status}; it said:\n{}", self.said());
            }
            self.control.exists().then_some(())
        });
    }

    /// What it has printed.
    #[must_use]
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let state =
                self.child.ended().map_or_else(|| "still runs".to_owned(), |status| format!("ended with {status}"));
            let said = self.said();
            let start = said.char_indices().rev().nth(4000).map_or(0, |(at, _)| at);
            eprintln!("the server {state}; the end of what it said:\n{}", &said[start..]);
        }
    }
}

/// The program under test.
fn program() -> PathBuf {
    let program = std::env::var_os("TRELLIS_SERVER").map_or_else(beside_the_test, PathBuf::from);
    assert!(
        program.is_file(),
        "there is no server to test at {}: build it (`cargo build -p trellisd`) or name another in TRELLIS_SERVER",
        program.display()
    );
    program
}

/// `trellisd` in the target directory that this test was built into (the test itself is in its `deps`).
fn beside_the_test() -> PathBuf {
    let test = std::env::current_exe().expect("Linux knows the running program");
    test.ancestors().nth(2).expect("tests run from TARGET/PROFILE/deps").join("trellisd")
}

const LIMIT: Duration = Duration::from_secs(20);
