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

/// Each callback of QEMU's series has a row in one of the tables, and the page speaks of no other.
#[test]
fn every_callback_of_qemus_has_a_row() {
    let page = page();
    let asked = rows(&page, "## What drivers are asked");
    let others = rows(&page, "## Operations of QEMU's series that are none of a driver's here");
    let cells = asked.iter().filter(|row| row.len() == 4).map(|row| row[2]).chain(others.iter().map(|row| row[1]));
    let named: BTreeSet<_> = cells.flat_map(quoted).filter(|name| is_callback(name)).collect();
    let all: BTreeSet<_> = CALLBACKS.split_whitespace().collect();
    assert_eq!(all.len(), 96);
    let missing: Vec<_> = all.difference(&named).collect();
    assert!(missing.is_empty(), "docs/graph-lock.md has no row for QEMU's {missing:?}");
    let strange: Vec<_> = named.iter().filter(|name| !all.contains(*name) && !GENERIC.contains(name)).collect();
    assert!(strange.is_empty(), "QEMU has no callbacks {strange:?}");
}

/// What the second table says to be no driver's is none, and what it says to stand for it here exists.
#[test]
fn what_is_no_drivers_is_not_in_the_trait() {
    let page = page();
    let functions = functions();
    for row in rows(&page, "## Operations of QEMU's series that are none of a driver's here").into_iter().skip(1) {
        let [operation, callbacks, here] = row[..] else { panic!("{row:?} has not three cells") };
        for callback in quoted(callbacks) {
            let plain = callback.trim_start_matches("bdrv_").trim_start_matches("co_").trim_start_matches("aio_");
            assert!(!functions.contains(plain), "{operation}: drivers are asked for `{plain}`");
        }
        for name in quoted(here) {
            assert!(exists(name), "{operation}: there is no `{name}`");
        }
        let says = ["(reader)", "(writer)", "(none", "none:", "none.", "come with", "comes with", "(none)"];
        assert!(says.iter().any(|side| here.contains(side)), "{operation}: on which side, or why not at all?");
    }
}

/// A function, a word of the sources, a file, or a command.
fn exists(name: &str) -> bool {
    if name.ends_with(".rs") {
        return top().join("block-core/src").join(name).exists();
    }
    let word = name.rsplit("::").next().unwrap();
    let all = sources(&top().join("block-core/src")).chain(sources(&top().join("daemon/src")));
    let declared = [format!("fn {word}("), format!("fn {word}<"), format!("{word}:"), format!("\"{word}\"")];
    all.into_iter().any(|text| declared.iter().any(|one| text.contains(one)))
}

fn sources(directory: &Path) -> Box<dyn Iterator<Item = String>> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    Box::new(entries.flat_map(|path| {
        if path.is_dir() { sources(&path) } else { Box::new(std::iter::once(fs::read_to_string(&path).unwrap())) }
    }))
}

fn is_callback(name: &str) -> bool {
    name.chars().all(|letter| letter.is_ascii_lowercase() || letter == '_') && !BESIDES.contains(&name)
}

/// A flag and a driver that cells speak of.
const BESIDES: [&str; 2] = ["compressed", "preallocate"];

/// What rows mention besides: callbacks of edges (`BdrvChildClass`), and functions of the block layer itself.
const GENERIC: [&str; 5] = ["attach", "detach", "change_aio_ctx", "bdrv_co_pwrite_sync", "bdrv_refresh_total_sectors"];

/// The members of QEMU's `struct BlockDriver` (10.0.2) that are functions, without their prefix `bdrv_`.
const CALLBACKS: &str = "
    amend_pre_run amend_clean recurse_can_replace probe_device parse_filename reopen_prepare reopen_commit
    reopen_commit_post reopen_abort join_options open close co_create co_create_opts amend_options make_empty
    refresh_filename gather_child_options dirname cancel_in_flight inactivate snapshot_create snapshot_goto
    snapshot_delete snapshot_list snapshot_load_tmp co_change_backing_file debug_breakpoint debug_remove_breakpoint
    debug_resume debug_is_suspended refresh_limits has_zero_init detach_aio_context attach_aio_context drain_begin
    drain_end probe_blocksizes probe_geometry add_child del_child check_perm set_perm abort_perm_update child_perm
    register_buf unregister_buf probe co_amend aio_preadv aio_pwritev aio_flush aio_pdiscard co_readv co_preadv
    co_preadv_part co_writev co_pwritev co_pwritev_part co_pwrite_zeroes co_pdiscard co_copy_range_from
    co_copy_range_to co_block_status co_preadv_snapshot co_snapshot_block_status co_pdiscard_snapshot
    co_invalidate_cache co_flush co_delete_file co_flush_to_disk co_flush_to_os co_truncate co_getlength
    co_get_allocated_file_size measure co_pwritev_compressed co_pwritev_compressed_part co_get_info
    get_specific_info get_specific_stats co_save_vmstate co_load_vmstate co_zone_report co_zone_mgmt co_zone_append
    co_is_inserted co_eject co_lock_medium aio_ioctl co_ioctl co_check co_debug_event
    supports_persistent_dirty_bitmap co_can_store_new_dirty_bitmap co_remove_persistent_dirty_bitmap
";
