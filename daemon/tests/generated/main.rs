//! Manual page and shell completions are generated from the command line's definition, and the QMP reference from the
//! types of the commands. They are kept in the tree, since packages are built and pages are read from there. This keeps
//! them as they would be generated now; TRELLIS_BLESS=1 writes them.

#![expect(clippy::unwrap_used, reason = "a test stops where its machine fails it")]

mod reference;

use std::path::Path;

use clap_complete::Shell;
use clap_mangen::Man;

#[test]
fn manual_completions_and_reference_say_what_the_daemon_takes() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for (name, fresh) in generated() {
        let path = top.join(name);
        if std::env::var_os("TRELLIS_BLESS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &fresh).unwrap();
        }
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(kept == fresh, "{name} is not what the definition makes now: run this test with TRELLIS_BLESS=1");
    }
}

fn generated() -> Vec<(&'static str, String)> {
    let mut manual = Vec::new();
    Man::new(daemon::cli::definition()).section("8").render(&mut manual).unwrap();
    let shell = |shell: Shell| {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut daemon::cli::definition(), "trellisd", &mut script);
        String::from_utf8(script).unwrap()
    };
    vec![
        ("packaging/man/trellisd.8", String::from_utf8(manual).unwrap()),
        ("packaging/completions/trellisd.bash", shell(Shell::Bash)),
        ("packaging/completions/_trellisd", shell(Shell::Zsh)),
        ("packaging/completions/trellisd.fish", shell(Shell::Fish)),
        ("docs/qmp-reference.md", reference::page()),
    ]
}
