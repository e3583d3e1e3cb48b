//! `--daemonize`: the foreground process starts itself again, in a session of its own, and ends when that says that
//! everything is set up.
//!
//! The word passes through the child's stdout, which is a pipe until then; its stderr stays ours, so that an operator
//! sees why a start failed. Starting anew instead of forking keeps this free of unsafe code and of half-copied threads.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use block_core::base::{Error, Result, ResultExt};

/// Whether this process is the one in the background.
pub fn is_background() -> bool {
    std::env::var_os(MARK).is_some()
}

/// In the foreground: starts the background process, waits until it is set up, and says how to end.
pub fn start() -> Result<ExitCode> {
    let program = std::env::current_exe().doing(|| "Cannot find our own program")?;
    let mut arguments = std::env::args_os();
    let mut command = Command::new(program);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    command.args(arguments).env(MARK, "1").stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().doing(|| "Cannot start the background process")?;
    let mut said = Vec::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_end(&mut said).doing(|| "Cannot hear from the background process")?;
    }
    if let Some(before) = said.strip_suffix(READY) {
        print(before)?;
        return Ok(ExitCode::SUCCESS);
    }
    print(&said)?;
    let status = child.wait().doing(|| "Cannot wait for the background process")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    Ok(ExitCode::from(code))
}

/// In the background, first of all: leaves the terminal's session.
pub fn leave_session() -> Result<()> {
    rustix::process::setsid().map(drop).doing(|| "Cannot start a session of our own")
}

/// In the background, when everything is set up: releases the foreground process, its terminal and its directory.
pub fn settle() -> Result<()> {
    std::env::set_current_dir("/").doing(|| "Cannot go to '/'")?;
    print(READY)?;
    let nothing = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null");
    let nothing = nothing.doing(|| "Cannot open '/dev/null'")?;
    let released = rustix::stdio::dup2_stdin(&nothing)
        .and_then(|()| rustix::stdio::dup2_stdout(&nothing))
        .and_then(|()| rustix::stdio::dup2_stderr(&nothing));
    released.map_err(|error| Error::new(format!("Cannot release the terminal: {error}")))
}

fn print(bytes: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).doing(|| "Cannot write to stdout")
}

/// Set in the environment of the background process.
const MARK: &str = "TRELLISD_BACKGROUND";
/// What the background process says once it is set up; nothing that is printed for people ends so.
const READY: &[u8] = b"\0ready\0";
