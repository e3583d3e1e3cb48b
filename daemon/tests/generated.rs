//! Manual page and shell completions are generated from the command line's definition and kept in `packaging/`, since
//! packages are built from there. This keeps them as they would be generated now; TRELLIS_BLESS=1 writes them.

#![expect(clippy::unwrap_used, reason = "a test stops where its machine fails it")]

use std::path::Path;

use clap_complete::Shell;
use clap_mangen::Man;

#[test]
fn manual_and_completions_say_what_the_command_line_takes() {
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging");
    for (name, fresh) in generated() {
        let path = packaging.join(name);
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
        ("man/trellisd.8", String::from_utf8(manual).unwrap()),
        ("completions/trellisd.bash", shell(Shell::Bash)),
        ("completions/_trellisd", shell(Shell::Zsh)),
        ("completions/trellisd.fish", shell(Shell::Fish)),
    ]
}
