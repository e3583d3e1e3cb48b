//! Secrets that stand on the command line: everybody sees it, for as long as the process lives. So the process starts
//! itself anew with files in their place, which are nowhere but in memory, and which it empties once they are read.
//!
//! Starting anew also leaves none of the copies that reading a command line makes.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::process::Command;

use block_core::codec::SecretBytes;
use qmp::keyval::parse_option;
use qmp::schema::{Qapi, Value};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::json;

use crate::cli::{Plan, StepOption};
use crate::log;
use crate::object::{ObjectKind, ObjectOptions};

/// Starts the program anew if its arguments have secrets in them, and returns if there are none, or if that cannot be done.
pub(crate) fn hide_secrets(arguments: &[OsString], plan: &Plan) {
    let (mut arguments, mut files) = (arguments.to_vec(), Vec::new());
    for step in plan.steps.iter().filter(|step| step.option == StepOption::Object) {
        let Some((id, secret, mut options)) = with_secret(&step.text) else { continue };
        log::complain(&format!(
            "the secret '{id}' stands on the command line, where whoever looked has seen it: use `file`"
        ));
        let Ok(number) = in_file(&secret) else { return };
        options["file"] = format!("{OWN_FILES}/{number}").into();
        let hidden = options.to_string();
        arguments.iter_mut().for_each(|argument| replace(argument, &step.text, &hidden));
        files.push(number.to_string());
    }
    let (Some(name), false) = (arguments.first(), files.is_empty()) else { return };
    let mut command = Command::new("/proc/self/exe");
    command.arg0(name).args(&arguments[1..]).env(MARK, files.join(","));
    let error = command.exec();
    log::complain(&format!("the command line could not be hidden: {error}"));
}

/// What was hidden has been read, and is not needed any more.
pub(crate) fn forget_secrets() {
    let files = std::env::var(MARK).unwrap_or_default();
    for number in files.split(',').filter_map(|number| number.parse::<RawFd>().ok()) {
        let emptied = OpenOptions::new().write(true).open(format!("{OWN_FILES}/{number}"));
        if let Err(error) = emptied.and_then(|file| file.set_len(0)) {
            tracing::warn!(%error, "a secret of the command line is still in its file");
        }
    }
}

/// An object that is a secret that stands there: its id, what it is, and the other options.
fn with_secret(text: &str) -> Option<(String, SecretBytes, Value)> {
    let parsed = parse_option(text, Some("qom-type")).ok()?;
    let ObjectOptions { id, kind: ObjectKind::Secret(mut own) } = parsed.into_typed().ok()? else { return None };
    if own.file.is_some() {
        return None;
    }
    let secret = own.take_plain()?;
    let mut options = json!({ "qom-type": "secret", "id": id });
    if let Some(format) = own.format {
        options["format"] = format.to_value();
    }
    Some((id, secret, options))
}

/// A file in memory that the program which is started anew has as well.
fn in_file(secret: &SecretBytes) -> io::Result<RawFd> {
    let mut file = File::from(memfd_create("secret", MemfdFlags::empty())?);
    file.write_all(secret.expose())?;
    debug_assert!(file.as_raw_fd() > 2);
    Ok(file.into_raw_fd())
}

/// In `--object TEXT` and in `--object=TEXT`.
fn replace(argument: &mut OsString, text: &str, hidden: &str) {
    let bytes = argument.as_bytes();
    let before = match bytes.strip_suffix(text.as_bytes()) {
        Some(before) if before.is_empty() || (before.starts_with(b"--") && before.ends_with(b"=")) => before.to_vec(),
        _ => return,
    };
    let mut new = OsString::from_vec(before);
    new.push(OsStr::new(hidden));
    *argument = new;
}

const OWN_FILES: &str = "/proc/self/fd";
/// Set in the environment of the program that was started anew: the numbers of its files.
const MARK: &str = "TRELLISD_HIDDEN";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_secrets_in_the_open_are_hidden() {
        let (id, secret, options) = with_secret("secret,id=a,data=x,,y,format=base64").unwrap();
        assert!(id == "a" && secret.is(b"x,y"));
        assert_eq!(options, json!({ "qom-type": "secret", "id": "a", "format": "base64" }));
        assert!(with_secret(r#"{"qom-type":"secret","id":"a","data":"x"}"#).unwrap().1.is(b"x"));
        for other in
            ["secret,id=a,file=x", "secret,id=a,data=x,keyid=b,iv=c", "iothread,id=a", "secret,id=a,data=x,z=1"]
        {
            assert!(with_secret(other).is_none(), "{other}");
        }
    }

    #[test]
    fn the_argument_is_found_in_either_form() {
        for (before, after) in [("text", "new"), ("--object=text", "--object=new"), ("x=text", "x=text"), ("y", "y")] {
            let mut argument = OsString::from(before);
            replace(&mut argument, "text", "new");
            assert_eq!(argument, after);
        }
    }
}
