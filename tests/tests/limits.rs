//! House rule: `docs/limits.md` says of each limit what its constant says.
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]

use std::fs;
use std::path::{Path, PathBuf};

#[test]
fn every_number_is_that_of_its_constant() {
    let page = fs::read_to_string(top().join("docs/limits.md")).unwrap();
    let rows: Vec<Row<'_>> = page.lines().filter_map(row).collect();
    assert!(rows.len() > 30, "the table has only {} rows with a constant", rows.len());
    let wrong: Vec<String> = rows.iter().filter_map(difference).collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// Every name that begins with `MAX_` is a limit, and belongs into the table unless it is named here.
#[test]
fn every_maximum_is_in_the_table() {
    let page = fs::read_to_string(top().join("docs/limits.md")).unwrap();
    let mut missing = Vec::new();
    for folder in ["qmp/src", "block-core/src", "daemon/src"] {
        for file in sources(&top().join(folder)) {
            let name = file.strip_prefix(top()).unwrap().to_str().unwrap().to_owned();
            for constant in constants(&fs::read_to_string(&file).unwrap()) {
                let row = format!("`{constant}` in `{name}`");
                if constant.starts_with("MAX_") && !page.contains(&row) && !NO_LIMITS_OF_OURS.contains(&row.as_str()) {
                    missing.push(row);
                }
            }
        }
    }
    assert_eq!(missing, [""; 0], "maxima without a row");
}

/// What the kernel can take, and how bits are dealt out.
const NO_LIMITS_OF_OURS: &[&str] = &[
    "`MAX_TRANSFER` in `block-core/src/graph/geometry.rs`",
    "`MAX_IOVECS` in `block-core/src/rt/op.rs`",
    "`MAX_RW` in `block-core/src/rt/uring.rs`",
    "`MAX_SOURCES` in `block-core/src/rt/token.rs`",
];

/// A line of a table that names a constant.
struct Row<'a> {
    limit: &'a str,
    constant: &'a str,
    file: &'a str,
}

fn row(line: &str) -> Option<Row<'_>> {
    let cells: Vec<&str> = line.split('|').map(str::trim).collect();
    let (constant, file) = cells.get(4)?.split_once(" in ")?;
    Some(Row { limit: cells[2], constant: constant.trim_matches('`'), file: file.trim_matches('`') })
}

/// What is wrong with a row, as a sentence.
fn difference(row: &Row<'_>) -> Option<String> {
    let Row { limit, constant, file } = row;
    let text = fs::read_to_string(top().join(file)).unwrap_or_default();
    let Some(value) = value_of(&text, constant) else { return Some(format!("{file} has no constant {constant}")) };
    (said(limit) != evaluated(value))
        .then(|| format!("{constant} in {file} is {value}, and docs/limits.md says {limit}"))
}

/// The right side of a constant's definition.
fn value_of<'a>(text: &'a str, constant: &str) -> Option<&'a str> {
    let definition = format!("const {constant}: ");
    let line = text.lines().find(|line| line.contains(&definition))?;
    Some(line.split_once(" = ")?.1.trim_end_matches(';'))
}

/// `64 MiB`, `2 Mi`, `10 s`, `256`: the number, units multiplied in.
fn said(limit: &str) -> Option<u64> {
    let mut words = limit.split(' ');
    let number: u64 = words.next()?.parse().ok()?;
    let shift = match words.next() {
        Some("KiB" | "Ki") => 10,
        Some("MiB" | "Mi") => 20,
        Some("GiB" | "Gi") => 30,
        Some("s" | "bytes") | None => 0,
        Some(_) => return None,
    };
    Some(number << shift)
}

/// `64 << 20`, `65_536`, `Duration::from_secs(60)`: the number.
fn evaluated(value: &str) -> Option<u64> {
    let value = value.trim_start_matches("Duration::from_secs(").trim_end_matches(')').replace('_', "");
    match value.split_once(" << ") {
        Some((number, shift)) => number.parse::<u64>().ok()?.checked_shl(shift.parse().ok()?),
        None => value.parse().ok(),
    }
}

/// The names of all constants of a file.
fn constants(text: &str) -> Vec<&str> {
    let names = text.lines().filter_map(|line| line.split_once("const ")?.1.split_once(": "));
    names.map(|(name, _)| name).collect()
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    files.into_iter().chain(folders.iter().flat_map(|folder| sources(folder))).collect()
}

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

#[test]
fn a_wrong_number_is_noticed() {
    let line = "| regions | 510 | refused | `MAX_SLOTS` in `daemon/src/export/vhost_user/regions.rs` |";
    assert!(difference(&row(line).unwrap()).unwrap().contains("says 510"));
    assert!(difference(&row(&line.replace("MAX_SLOTS", "MAX_NONE")).unwrap()).unwrap().contains("has no constant"));
    assert_eq!((said("64 MiB"), evaluated("64 << 20")), (Some(64 << 20), Some(64 << 20)));
    assert_eq!((said("10 s"), evaluated("Duration::from_secs(10)")), (Some(10), Some(10)));
    assert_eq!((said("many"), evaluated("65_536")), (None, Some(65_536)));
    assert_eq!(constants("pub(super) const MAX_FDS: usize = 32;\n    let x = 1;"), ["MAX_FDS"]);
}
