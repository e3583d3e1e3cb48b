//! Documents with tables of tests, and the names that such a table may use.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A document of `docs/`.
pub fn document(name: &str) -> String {
    fs::read_to_string(top().join("docs").join(name)).expect("the document is there")
}

/// What stands between backticks.
pub fn named(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Every test of this package and of block-core, unit tests and models included.
pub fn test_names() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut folders = ["tests/tests", "block-core/tests", "block-core/src"].map(|folder| top().join(folder)).to_vec();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("the folder is there") {
            let path = entry.expect("the folder can be read").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                names.extend(tests_in(&fs::read_to_string(&path).expect("the source can be read")));
            }
        }
    }
    names
}

fn tests_in(source: &str) -> Vec<String> {
    let mut lines = source.lines().map(str::trim);
    let mut names = Vec::new();
    while lines.by_ref().any(|line| line == "#[test]") {
        let function = lines.by_ref().find_map(|line| line.strip_prefix("fn "));
        names.extend(function.and_then(|rest| rest.split('(').next()).map(str::to_owned));
    }
    names
}
