//! House rule: `docs/graph-lock-cases.md` has a row for each of QEMU's cases of draining and of iothreads and for each
//! invariant of the graph lock, and names only tests that exist.
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]

use std::path::Path;

use trellis_tests::tables::{document, named, test_names};

/// QEMU's names; where one has a test, the test is called so too.
const CASES: [&str; 52] = [
    "driver-cb/drain_all",
    "driver-cb/drain",
    "driver-cb/co/drain_all",
    "driver-cb/co/drain",
    "quiesce/drain_all",
    "quiesce/drain",
    "quiesce/co/drain_all",
    "quiesce/co/drain",
    "nested",
    "graph-change/drain_all",
    "iothread/drain_all",
    "iothread/drain",
    "blockjob/drain_all",
    "blockjob/drain",
    "blockjob/error/drain_all",
    "blockjob/error/drain",
    "blockjob/iothread/drain_all",
    "blockjob/iothread/drain",
    "blockjob/iothread/error/drain_all",
    "blockjob/iothread/error/drain",
    "deletion/drain",
    "detach/drain_all",
    "detach/drain",
    "detach/parent_cb",
    "detach/driver_cb",
    "attach/drain",
    "set_aio_context",
    "blockjob/commit_by_drained_end",
    "bdrv_drop_intermediate/poll",
    "replace_child/mid-drain",
    "sync-op/pread",
    "sync-op/pwrite",
    "sync-op/preadv",
    "sync-op/pwritev",
    "sync-op/preadv_part",
    "sync-op/pwritev_part",
    "sync-op/pwrite_compressed",
    "sync-op/pwrite_zeroes",
    "sync-op/load_vmstate",
    "sync-op/save_vmstate",
    "sync-op/pdiscard",
    "sync-op/truncate",
    "sync-op/block_status",
    "sync-op/flush",
    "sync-op/check",
    "sync-op/activate",
    "attach/blockjob",
    "attach/second_node",
    "attach/preserve_blk_ctx",
    "propagate/basic",
    "propagate/diamond",
    "propagate/mirror",
];

/// Operations that do not exist here.
const WITHOUT_TEST: [&str; 2] = ["sync-op/load_vmstate", "sync-op/save_vmstate"];

fn row<'d>(document: &'d str, name: &str) -> &'d str {
    let start = format!("| {name} | ");
    document.lines().find(|line| line.starts_with(&start)).unwrap_or_else(|| panic!("no row for {name}"))
}

fn last_cell(row: &str) -> &str {
    row.trim_end_matches([' ', '|']).rsplit(" | ").next().unwrap()
}

#[test]
fn every_case_has_a_row_and_its_test() {
    let (document, tests) = (document("graph-lock-cases.md"), test_names());
    for case in CASES {
        let answer = last_cell(row(&document, case));
        let expected = case.replace(['/', '-'], "_");
        if WITHOUT_TEST.contains(&case) {
            assert_eq!(answer, "–", "{case}");
        } else {
            assert_eq!(answer, format!("`{expected}`"), "{case}");
            assert!(tests.contains(&expected), "nobody wrote {expected}");
        }
    }
}

#[test]
fn every_invariant_names_tests_that_exist() {
    let (document, tests) = (document("graph-lock-cases.md"), test_names());
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../block-core");
    let is_file = |name: &str| ["tests", "src"].iter().any(|folder| sources.join(folder).join(name).is_file());
    for number in 1..=11 {
        let names: Vec<_> = named(last_cell(row(&document, &number.to_string()))).collect();
        assert!(names.iter().any(|name| tests.contains(*name)), "invariant {number} has no test");
        let unknown: Vec<_> = names.iter().filter(|name| !tests.contains(**name) && !is_file(name)).collect();
        assert!(unknown.is_empty(), "invariant {number} names {unknown:?}");
    }
}

#[test]
fn what_is_missing_is_noticed() {
    assert!(!test_names().contains("a_test_that_nobody_wrote"));
    assert_eq!(last_cell("| 1 | words | `a`, `b` |"), "`a`, `b`");
    assert_eq!(named("x `a`, `b`").collect::<Vec<_>>(), ["a", "b"]);
}
