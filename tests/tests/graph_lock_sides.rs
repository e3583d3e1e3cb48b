//! `docs/graph-lock.md` has a row for every function of a driver, and names only compile-fail tests that there are.
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn page() -> String {
    fs::read_to_string(top().join("docs/graph-lock.md")).unwrap()
}

/// The words in backquotes of a cell.
fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// The rows of the table under a heading, as cells.
fn rows<'p>(page: &'p str, heading: &str) -> Vec<Vec<&'p str>> {
    let section = page.split(heading).nth(1).unwrap_or_else(|| panic!("no section {heading}"));
    let section = section.split("\n## ").next().unwrap();
    let lines = section.lines().filter(|line| line.starts_with("| ") && !line.contains("---"));
    lines.map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect()).collect()
}

/// The functions that the trait declares.
fn functions() -> BTreeSet<String> {
    let source = fs::read_to_string(top().join("block-core/src/graph/driver.rs")).unwrap();
    let from = source.split("\npub trait Driver").nth(1).unwrap();
    let body = from.split("\n}\n").next().unwrap();
    let declared = body.lines().filter_map(|line| line.strip_prefix("    fn "));
    declared.map(|rest| rest.split(['(', '<']).next().unwrap().to_owned()).collect()
}

#[test]
fn every_function_of_a_driver_has_a_side() {
    let page = page();
    let rows = rows(&page, "## What drivers are asked");
    let listed: BTreeSet<_> = rows.iter().flat_map(|row| quoted(row[0])).map(str::to_owned).collect();
    let functions = functions();
    assert!(functions.len() > 15, "the trait was not found: {functions:?}");
    let missing: Vec<_> = functions.difference(&listed).collect();
    assert!(missing.is_empty(), "docs/graph-lock.md has no row for {missing:?}");
    let strange: Vec<_> = listed.iter().filter(|name| !functions.contains(*name) && !name.contains("::")).collect();
    assert!(strange.is_empty(), "docs/graph-lock.md has rows for functions that are gone: {strange:?}");
}

#[test]
fn the_tests_that_the_page_names_exist() {
    let page = page();
    let cases = top().join("block-core/tests/compile_fail");
    let rows = rows(&page, "## What drivers are asked");
    let named: BTreeSet<_> = rows.iter().flat_map(|row| quoted(row.last().unwrap())).collect();
    let missing: Vec<_> =
        named.iter().filter(|name| **name != "shown by" && !cases.join(name).with_extension("rs").exists()).collect();
    assert!(missing.is_empty(), "docs/graph-lock.md names tests that do not exist: {missing:?}");
    let all = fs::read_dir(&cases).unwrap().filter_map(|entry| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let case = name.strip_suffix(".rs")?;
        (!case.ends_with("_twin")).then(|| case.to_owned())
    });
    let unnamed: Vec<_> = all.filter(|case| !named.contains(case.as_str())).collect();
    assert!(unnamed.is_empty(), "docs/graph-lock.md does not name {unnamed:?}");
}
