//! House rules that the compiler does not know: which room may use which, where `unsafe` may live, that every file
//! says what lives in it and belongs to a module. The rules are data; each failure is a sentence.
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Rooms of block-core, and the rooms that each may use. `catalog → {drivers, job} → port → pipeline → graph → rt →
/// base`, as in ARCHITECTURE.md.
const ROOMS: &[(&str, &[&str])] = &[
    ("base", &[]),
    ("rt", &["base"]),
    ("bitmap", &["base"]),
    ("codec", &["base", "rt"]),
    ("graph", &["base", "rt", "bitmap"]),
    ("pipeline", &["base", "codec", "rt", "bitmap", "graph"]),
    ("port", &["base", "rt", "graph", "pipeline"]),
    ("job", &["base", "rt"]),
    ("drivers/protocol", &["base", "rt", "bitmap", "graph", "pipeline", "port"]),
    ("drivers/format", &["base", "codec", "rt", "bitmap", "graph", "pipeline", "port"]),
    ("drivers/filter", &["base", "rt", "bitmap", "graph", "pipeline", "port"]),
    ("drivers", &["base", "codec", "rt", "bitmap", "graph", "pipeline", "port"]),
    (
        "catalog",
        &[
            "base",
            "codec",
            "rt",
            "graph",
            "pipeline",
            "port",
            "drivers",
            "drivers/protocol",
            "drivers/format",
            "drivers/filter",
        ],
    ),
];

/// Packages, and which of ours each may name.
const PACKAGES: &[(&str, &[&str])] = &[
    ("qmp/derive/src", &[]),
    ("qmp/src", &["qmp_derive"]),
    ("block-core/src", &["qmp"]),
    ("daemon/src", &["qmp", "block_core"]),
    ("tools/image/src", &["qmp", "block_core"]),
    ("tools/img/src", &["block_core", "trellis_image"]),
    ("tools/io/src", &["qmp", "block_core", "trellis_image"]),
];

/// Where `unsafe` may be opened.
const UNSAFE_ROOMS: &[&str] = &[
    "block-core/src/rt/",
    "daemon/src/export/vhost_user/memory",
    "daemon/src/export/vhost_user/ring",
    "block-core/tests/",               // the models: loom's cells
    "block-core/examples/rt_bench.rs", // the bare ring that the runtime is compared with
    "tests/src/vhost_user/memory.rs",
    "tests/src/vhost_user/wire.rs",
    "tools/bench/src/sys.rs",
    "tools/image/src/clock.rs",
];

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every Rust file below `folder`, as a path from the top of the project, with its text.
fn sources(folder: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![top().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(top()).unwrap().to_str().unwrap().to_owned();
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(!found.is_empty(), "there is nothing to look at in {folder}");
    found
}

fn all_sources() -> Vec<(String, String)> {
    ["qmp", "block-core", "daemon", "tests", "tools"].iter().flat_map(|folder| sources(folder)).collect()
}

fn none(broken: &[String]) {
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

/// The room of a path inside block-core; the longest name that fits.
fn room_of(path: &str) -> Option<&'static str> {
    let inside = |room: &str| path.strip_prefix(room).is_some_and(|rest| rest.is_empty() || "/.:".contains(&rest[..1]));
    ROOMS.iter().map(|(room, _)| *room).filter(|room| inside(room)).max_by_key(|room| room.len())
}

/// What a line names of this crate: `crate::graph::x` gives `graph/x`.
fn named_in(line: &str) -> Vec<String> {
    let code = line.split("//").next().unwrap();
    code.match_indices("crate::")
        .filter(|(at, _)| !code[..*at].ends_with('$'))
        .map(|(at, _)| {
            let rest = &code[at + "crate::".len()..];
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':').unwrap_or(rest.len());
            rest[..end].trim_end_matches(':').replace("::", "/")
        })
        .collect()
}

#[test]
fn rooms_use_only_what_is_below_them() {
    let mut broken = Vec::new();
    for (file, text) in sources("block-core/src") {
        let inside = file.strip_prefix("block-core/src/").unwrap();
        let Some(room) = room_of(inside) else { continue };
        let allowed = ROOMS.iter().find(|(name, _)| *name == room).unwrap().1;
        for (number, line) in text.lines().enumerate() {
            for named in named_in(line) {
                let Some(other) = room_of(&named) else { continue };
                let family = room.starts_with(other) && room != other && other == "drivers";
                if other != room && !family && !allowed.contains(&other) {
                    broken.push(format!("{file}:{}: {room} may not use {other}", number + 1));
                }
            }
        }
    }
    none(&broken);
}

#[test]
fn packages_use_only_what_is_below_them() {
    let ours: BTreeSet<&str> = ["qmp", "qmp_derive", "block_core", "daemon", "trellis_image"].into();
    let mut broken = Vec::new();
    for (folder, allowed) in PACKAGES {
        for (file, text) in sources(folder) {
            for (number, line) in text.lines().enumerate().filter(|(_, line)| line.trim_start().starts_with("use ")) {
                let name = line.trim_start().trim_start_matches("use ").split("::").next().unwrap();
                if ours.contains(name) && !allowed.contains(&name) && !file.starts_with("qmp/derive/tests") {
                    broken.push(format!("{file}:{}: {folder} may not use {name}", number + 1));
                }
            }
        }
    }
    none(&broken);
}

#[test]
fn drivers_never_name_each_other() {
    let mut broken = Vec::new();
    for (file, text) in sources("block-core/src/drivers") {
        let own = file.strip_prefix("block-core/src/").unwrap().trim_end_matches(".rs").trim_end_matches("/mod");
        for (number, line) in text.lines().enumerate() {
            let rooms = ["drivers/protocol/", "drivers/format/", "drivers/filter/"];
            let is_driver = |named: &&String| rooms.iter().any(|room| named.starts_with(room));
            for named in named_in(line).iter().filter(is_driver) {
                let driver: Vec<_> = named.split('/').take(3).collect();
                if driver.len() == 3 && !own.starts_with(&driver.join("/")) {
                    broken.push(format!("{file}:{}: a driver names another one, {named}", number + 1));
                }
            }
        }
    }
    none(&broken);
}

/// The lock's words belong to the graph and to `port`; a driver that says them has been let in on it.
#[test]
fn drivers_do_not_know_that_there_is_a_graph_lock() {
    let mut broken = Vec::new();
    for (file, text) in sources("block-core/src/drivers") {
        for (number, line) in text.lines().enumerate() {
            let words = ["Drained", "Permit", "GraphEdit", "ViewPin", "Lane", "graph lock", "rdlock", "wrlock"];
            let code = line.split("//").next().unwrap();
            if let Some(word) = words.iter().find(|word| code.contains(**word)) {
                broken.push(format!("{file}:{}: a driver says '{word}'", number + 1));
            }
        }
    }
    none(&broken);
}

/// What a driver asks of the kernel goes through `system_call`, where signals are survived and tests have it fail.
#[test]
fn system_calls_of_drivers_can_fail() {
    let mut broken = Vec::new();
    for (file, text) in sources("block-core/src/drivers/protocol") {
        let text = text.split("#[cfg(test)]").next().unwrap();
        let calls = called_of_the_kernel(text);
        let mut before = "";
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap();
            let bare = !code.contains("system_call(") && !before.contains("system_call(");
            if let Some(call) = calls.iter().find(|call| bare && calls_it(code, call)) {
                broken.push(format!("{file}:{}: {call}() is not in a `system_call`", number + 1));
            }
            before = code;
        }
    }
    none(&broken);
}

/// The functions that a file imports from the crates for system calls, or names with their path.
fn called_of_the_kernel(text: &str) -> BTreeSet<String> {
    let mut calls = BTreeSet::new();
    for (at, found) in ["rustix::", "nix::"].iter().flat_map(|name| text.match_indices(name)) {
        let rest = &text[at + found.len()..];
        let end = rest.find([';', '(', '|']).unwrap_or(rest.len());
        let names = rest[..end].split(|c: char| !c.is_alphanumeric() && c != '_');
        calls.extend(names.filter(|name| name.starts_with(char::is_lowercase)).map(str::to_owned));
    }
    calls
}

/// A plain call: neither a method nor a function of ours that is awaited or told what is remembered.
fn calls_it(code: &str, call: &str) -> bool {
    let begins = |at: usize| !code[..at].ends_with(|c: char| c.is_alphanumeric() || "_.".contains(c));
    let ours = code.contains("fn ") || code.contains(".await") || code.contains("remembered");
    !ours && code.match_indices(&format!("{call}(")).any(|(at, _)| begins(at))
}

#[test]
fn unsafe_has_its_rooms() {
    let mut broken = Vec::new();
    for (file, text) in all_sources() {
        let may = UNSAFE_ROOMS.iter().any(|room| file.starts_with(room));
        let opens = text.lines().any(|line| {
            let code = line.split("//").next().unwrap();
            code.contains("unsafe_code") || opens_unsafe(code)
        });
        if opens && !may && !file.ends_with("tests/tidy.rs") {
            broken.push(format!("{file}: no room for `unsafe`"));
        }
    }
    none(&broken);
}

/// The keyword, and not the cache mode or a word in a sentence of QEMU's.
fn opens_unsafe(code: &str) -> bool {
    let words: Vec<_> = code.split_whitespace().collect();
    let next = |at: usize| words.get(at + 1).copied().unwrap_or("{");
    let keyword = |at: usize| ["{", "fn", "impl", "trait", "extern"].iter().any(|word| next(at).starts_with(word));
    words.iter().enumerate().any(|(at, word)| *word == "unsafe" && keyword(at))
}

#[test]
fn every_file_says_what_lives_in_it() {
    let mut broken = Vec::new();
    for (file, text) in all_sources() {
        if !text.starts_with("//!") && !file.contains("/target/") {
            broken.push(format!("{file}: no door plate (`//!`) at its head"));
        }
    }
    none(&broken);
}

/// A file that no module declares compiles for nobody.
#[test]
fn no_file_is_orphaned() {
    let mut broken = Vec::new();
    for package in ["qmp", "qmp/derive", "block-core", "daemon", "tests", "tools/image", "tools/img", "tools/io"] {
        let files = sources(&format!("{package}/src"));
        let texts: String = files.iter().map(|(_, text)| text.as_str()).collect();
        for (file, _) in &files {
            let path = Path::new(file);
            let stem = path.file_stem().unwrap().to_str().unwrap();
            let name = if stem == "mod" { path.parent().unwrap().file_name().unwrap().to_str().unwrap() } else { stem };
            let root = ["lib", "main"].contains(&name) || file.contains("/src/bin/");
            if !root && !texts.contains(&format!("mod {name};")) {
                broken.push(format!("{file}: no module declares it"));
            }
        }
    }
    none(&broken);
}

#[test]
fn a_broken_rule_is_noticed() {
    assert_eq!(room_of("graph/gate.rs"), Some("graph"));
    assert_eq!(room_of("drivers/format/raw.rs"), Some("drivers/format"));
    assert_eq!(room_of("graphics/x.rs"), None);
    assert_eq!(named_in("use crate::pipeline::Format;"), ["pipeline/Format"]);
    assert_eq!(named_in("    crate::graph::Child::<T>::x(); // crate::port"), ["graph/Child"]);
    assert_eq!(room_of("pipeline/Format"), Some("pipeline"));
    let imports = called_of_the_kernel("use rustix::fs::{Advice, seek, statx};\nlet x = rustix::io::pread(1);");
    assert!(["seek", "statx", "pread"].iter().all(|call| imports.contains(*call)) && !imports.contains("Advice"));
    assert!(opens_unsafe("let x = unsafe { *p };") && opens_unsafe("pub unsafe fn f()") && opens_unsafe("unsafe"));
    assert!(!opens_unsafe("or use unsafe mode (-u)") && !opens_unsafe("commit -t unsafe -r 1M"));
    assert!(calls_it("let end = seek(fd, 0)?;", "seek") && !calls_it("file.seek(0)", "seek"));
}
