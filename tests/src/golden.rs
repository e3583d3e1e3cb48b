//! Golden files: what the server said once, reviewed and kept, against what it says now.
//!
//! With `TRELLIS_BLESS=1` a check writes what it finds into the file, and the review is the diff.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::lines::Lines;

/// Replays a transcript over a fresh control connection.
///
/// A line `-> …` is sent as it stands; a line `<- …` is what has to come next, byte for byte. In both, `$FOLDER`
/// stands for `folder`; in answers, `$NUMBER` for the two numbers of a timestamp and `$PACKAGE` for a version's
/// package string. Other lines are for people. Blessing rewrites what stands behind `<-` and nothing else: whoever
/// adds a command writes a bare `<-` for each line that it brings.
///
/// # Panics
/// Where the server says something else, or nothing, or more.
pub fn replay(name: &str, lines: &mut Lines, folder: &str) {
    let golden = read(name);
    let mut found = String::new();
    for line in golden.lines() {
        if let Some(request) = line.strip_prefix("-> ") {
            lines.send(&request.replace("$FOLDER", folder)).expect("the control socket takes a line");
        }
        if !line.starts_with("<-") {
            found += &format!("{line}\n");
            continue;
        }
        let answer = lines.next(Instant::now() + ANSWER_LIMIT);
        let answer = answer.unwrap_or_else(|error| panic!("{error:?} instead of the line {line}\nafter\n{found}"));
        found += &format!("<- {}\n", plain(&answer, folder));
    }
    let more = lines.next(Instant::now() + Duration::from_millis(100));
    assert!(more.is_err(), "after the transcript's end came {more:?}");
    compare(name, &found);
}

/// Compares `value`, printed for people, with a golden file.
///
/// # Panics
/// Where they differ.
pub fn same(name: &str, value: &Value) {
    let mut text = serde_json::to_string_pretty(value).expect("a value prints");
    text.push('\n');
    compare(name, &text);
}

/// The line with what no two runs share covered.
fn plain(line: &str, folder: &str) -> String {
    let line = line.replace(folder, "$FOLDER");
    let line = cover(&line, "\"seconds\": ", |next| !next.is_ascii_digit(), "$NUMBER");
    let line = cover(&line, "\"microseconds\": ", |next| !next.is_ascii_digit(), "$NUMBER");
    cover(&line, "\"package\": \"", |next| next == '"', "$PACKAGE")
}

/// Puts `cover` for what stands behind the first `key`, up to where `end` says.
fn cover(line: &str, key: &str, end: impl Fn(char) -> bool, cover: &str) -> String {
    let Some((before, rest)) = line.split_once(key) else { return line.to_owned() };
    let after = rest.find(end).map_or("", |at| &rest[at..]);
    format!("{before}{key}{cover}{after}")
}

fn compare(name: &str, found: &str) {
    let path = path(name);
    if std::env::var_os("TRELLIS_BLESS").is_some_and(|bless| bless == "1") {
        fs::write(&path, found).unwrap_or_else(|error| panic!("writing {}: {error}", path.display()));
        return;
    }
    let golden = read(name);
    let lines = golden.lines().zip(found.lines()).enumerate();
    for (number, (golden, found)) in lines {
        assert_eq!(
            golden,
            found,
            "{name}:{}: left is the file, right the server (TRELLIS_BLESS=1 accepts)",
            number + 1
        );
    }
    assert_eq!(golden.lines().count(), found.lines().count(), "{name} and the server go on differently");
}

fn read(name: &str) -> String {
    let path = path(name);
    fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("reading {}: {error} (TRELLIS_BLESS=1 makes a missing schema)", path.display()))
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

const ANSWER_LIMIT: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn what_no_two_runs_share_is_covered_and_nothing_else() {
        let event =
            r#"{"timestamp": {"seconds": 17, "microseconds": 250}, "event": "A", "data": {"file": "/tmp/x/a"}}"#;
        let covered = r#"{"timestamp": {"seconds": $NUMBER, "microseconds": $NUMBER}, "event": "A", "data": {"file": "$FOLDER/a"}}"#;
        assert_eq!(plain(event, "/tmp/x"), covered);
        assert_eq!(plain(r#"{"package": "trellis 1", "n": 1}"#, "/tmp/x"), r#"{"package": "$PACKAGE", "n": 1}"#);
        assert_eq!(plain(r#"{"error": {"desc": "17"}}"#, "/tmp/x"), r#"{"error": {"desc": "17"}}"#);
    }
}
