//! Every number that a sub-command takes, at its ends and beyond; words that no option or format has.

use super::info::CHAIN;
use super::scene::Scene;

/// What people write for numbers.
const NUMBERS: &[&str] = &[
    "-1",
    "0",
    "1",
    "511",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9223372036854775295",
    "9223372036854775296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e3",
    "0x",
    "1.5",
    "-0",
    "''",
    "8E",
    "1.5E",
    "nan",
];

/// Lines with each number in the place of `@`.
fn with_numbers(lines: &[&str]) -> Vec<String> {
    lines.iter().flat_map(|line| NUMBERS.iter().map(|number| line.replace('@', number))).collect()
}

fn all_the_same(scene: &mut Scene, lines: &[&str]) {
    let lines = with_numbers(lines);
    scene.same(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn of_commands_that_change_nothing() {
    let mut scene = Scene::new(CHAIN);
    all_the_same(
        &mut scene,
        &[
            "convert -m @ none x",
            "convert -S @ none x",
            "convert -r @ none x",
            "commit -r @ none",
            "bench -c @ none",
            "bench -d @ none",
            "bench -s @ none",
            "bench -S @ none",
            "bench -o @ none",
            "bench -w --pattern @ none",
            "bench -w --flush-interval @ none",
            "map --start-offset @ none",
            "map --max-length @ none",
            "measure --size @",
            "measure --size @ -O qcow2",
            "bitmap --add -g @ none b",
            "dd bs=@ if=none of=x",
            "dd count=@ if=none of=x",
            "dd skip=@ if=none of=x",
        ],
    );
}

#[test]
fn of_commands_on_images() {
    let mut scene = Scene::new(CHAIN);
    all_the_same(
        &mut scene,
        &[
            "map --start-offset=@ a.qcow2",
            "map --start-offset=@ --output=json r.raw",
            "map --max-length=@ a.qcow2",
            "dd -f raw skip=@ if=r.raw of=1.raw",
            "dd -f raw count=@ if=r.raw of=2.raw",
            "dd -f raw bs=@ count=1 if=a.qcow2 of=3.raw",
            "convert -r @ -f raw -O raw r.raw 4.raw",
        ],
    );
    scene.same_images(&["1.raw", "2.raw"]);
}

#[test]
fn of_new_sizes() {
    for line in
        ["resize -f raw r.raw @", "resize a.qcow2 @", "resize --shrink -f raw r.raw @", "amend -o size=@ a.qcow2"]
    {
        for number in NUMBERS {
            let mut scene = Scene::new(&CHAIN[..8]);
            let line = line.replace('@', number);
            scene.same_code_at_least(&line);
        }
    }
}

#[test]
fn of_new_images() {
    let mut scene = Scene::new(CHAIN);
    for line in [
        "create -q -f raw x @",
        "create -q -f qcow2 x @",
        "create -q -f qcow2 -o size=@ x",
        "create -q -f qcow2 -o cluster_size=@ x 1M",
        "create -q -f qcow2 -o refcount_bits=@ x 1M",
        "create -q -f raw -o extent_size_hint=@ x 1M",
    ] {
        for number in NUMBERS {
            let line = line.replace('@', number);
            scene.same_code_at_least(&line);
            let made = |side: std::path::PathBuf| std::fs::metadata(side.join("x")).is_ok();
            let (theirs, ours) = (made(scene.theirs()), made(scene.ours()));
            assert!(ours <= theirs, "{line}: half of it is there");
            for side in [scene.theirs(), scene.ours()] {
                let _ = std::fs::remove_file(side.join("x"));
            }
        }
    }
}

#[test]
fn of_amended_options() {
    let mut scene = Scene::new(CHAIN);
    for number in NUMBERS {
        scene.same_code_at_least(&format!("amend -o refcount_bits={number} a.qcow2"));
    }
    scene.same_images(&["a.qcow2"]);
}

/// Every sub-command, with options and formats that there are not.
#[test]
fn words_that_nobody_knows() {
    let mut scene = Scene::new(CHAIN);
    for command in [
        "amend", "bench", "bitmap", "check", "commit", "compare", "convert", "create", "dd", "info", "map", "measure",
        "rebase", "resize", "snapshot",
    ] {
        scene.same(&[
            &format!("{command} --nosuch"),
            &format!("{command} --nosuch=1 a.qcow2"),
            &format!("{command} -%"),
            command,
        ]);
        scene.same_code_at_least(&format!("{command} --object"));
        scene.same_code_at_least(&format!("{command} --object nosuch,id=x a.qcow2 b.qcow2"));
        scene.same_code_at_least(&format!("{command} --object id=x a.qcow2 b.qcow2"));
        scene.same_code_at_least(&format!("{command} -f nosuch a.qcow2"));
        scene.same_code_at_least(&format!("{command} a b c d e"));
    }
    scene.same(&[
        "info -f nosuch a.qcow2",
        "check -f nosuch a.qcow2",
        "map -f nosuch a.qcow2",
        "compare -f nosuch a.qcow2 b.qcow2",
        "compare -F nosuch a.qcow2 b.qcow2",
        "convert -f nosuch a.qcow2 x",
        "convert -O nosuch a.qcow2 x",
        "create -f nosuch x 1M",
        "dd -f nosuch if=a.qcow2 of=x",
        "dd -O nosuch if=a.qcow2 of=x",
        "measure -O nosuch a.qcow2",
        "measure -f nosuch a.qcow2",
        "resize -f nosuch a.qcow2 8M",
        "snapshot -f nosuch -l a.qcow2",
        "bitmap -f nosuch --add a.qcow2 b",
        "rebase -f nosuch -b '' a.qcow2",
        "commit -f nosuch b.qcow2",
        "bench -f nosuch a.qcow2",
    ]);
    assert!(!scene.ours().join("x").exists());
}
