//! House rule: `docs/conformance.md` answers every row that is owed, and names only tests that exist.

use trellis_tests::tables::{document, named, test_names};

#[test]
fn every_row_is_answered() {
    let table = table();
    let owed = (1..=41).chain(43..=59).chain(65..=84).chain([90, 92, 93, 98, 99, 100]);
    let missing: Vec<u32> = owed.filter(|row| !table.contains(&format!("\n| {row} | "))).collect();
    assert_eq!(missing, [0; 0], "rows without a line");
}

#[test]
fn every_named_test_exists() {
    let tests = test_names();
    let table = table();
    let named = named(&table).filter(|name| is_row_test(name) || is_sentence(name));
    let unknown: Vec<&str> = named.filter(|name| !tests.contains(*name)).collect();
    assert_eq!(unknown, [""; 0], "tests that the table names and nobody wrote");
}

#[test]
fn every_conformance_test_is_in_the_table() {
    let table = table();
    let tests = test_names();
    let unlisted: Vec<&String> = tests
        .iter()
        .filter(|name| name.starts_with('c') && is_row_test(name) && !name.starts_with("cfg_"))
        .filter(|name| !table.contains(&format!("`{name}`")))
        .collect();
    assert!(unlisted.is_empty(), "tests that the table does not name: {unlisted:?}");
}

/// `vq_18_…`, `c021_…`: a short group, a number, and words.
fn is_row_test(name: &str) -> bool {
    let number_in = |part: &str| part.trim_start_matches('c').parse::<u32>().is_ok();
    !name.contains('.') && name.split('_').count() > 2 && name.split('_').take(2).any(number_in)
}

/// `a_guest_that_reboots_under_load_finds_its_disk_again`: how tests without a row are called.
fn is_sentence(name: &str) -> bool {
    name.split('_').count() > 4 && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

fn table() -> String {
    document("conformance.md")
}
