//! The rules that the compiler keeps (design, section 2): each broken program gives the error code that its first
//! line names, and its twin, which differs in the broken place only, compiles.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

use std::path::{Path, PathBuf};

const CASES: &str = "tests/compile_fail";

#[test]
fn broken_programs_are_refused_and_their_twins_are_not() {
    let programs = trybuild::TestCases::new();
    for case in cases() {
        programs.compile_fail(&case);
        programs.pass(twin(&case));
    }
}

/// trybuild compares whole messages; this says which part of them is the rule.
#[test]
fn each_case_gives_the_code_that_it_names() {
    for case in cases() {
        let source = std::fs::read_to_string(&case).unwrap();
        let code = source.trim_start_matches("//! ").split(':').next().unwrap();
        let told = std::fs::read_to_string(case.with_extension("stderr")).unwrap();
        let wanted = if code.starts_with('E') { format!("error[{code}]") } else { code.to_owned() };
        assert!(told.contains(&wanted), "{} does not give {wanted}:\n{told}", case.display());
    }
}

#[test]
fn each_case_has_a_twin() {
    for case in cases() {
        assert!(twin(&case).exists(), "{} has no twin", case.display());
    }
}

fn twin(case: &Path) -> PathBuf {
    case.with_file_name(format!("{}_twin.rs", case.file_stem().unwrap().to_str().unwrap()))
}

/// Relative to the package, as trybuild wants them.
fn cases() -> Vec<PathBuf> {
    let files = std::fs::read_dir(CASES).unwrap().map(|entry| entry.unwrap().path());
    let sources = files.filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    sources.filter(|path| !path.to_str().unwrap().ends_with("_twin.rs")).collect()
}
