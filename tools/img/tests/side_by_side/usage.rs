//! Command lines that say nothing sensible.

use trellis_img::commands::COMMANDS;

use super::info::CHAIN;
use super::scene::Scene;

#[test]
fn nonsense_is_refused_in_the_same_words() {
    Scene::new(CHAIN).same(&[
        "",
        "nosuch",
        "--nope",
        "info",
        "info a.qcow2 b.qcow2",
        "info --zzz a.qcow2",
        "info -f",
        "info -Z a.qcow2",
        "info --fo raw a.qcow2",
        "info --form qcow2 a.qcow2",
        "info -fqcow2 a.qcow2",
        "info a.qcow2 -f qcow2",
        "info --image-opts=x a.qcow2",
        "info --format",
        "info --image-opts -f raw a.qcow2",
        "info --output xml a.qcow2",
        "check",
        "check -r foo a.qcow2",
        "check -T foo a.qcow2",
        "map",
        "map --output=xml a.qcow2",
        "compare",
        "compare a.qcow2",
        "compare a.qcow2 b.qcow2 c.qcow2",
        "create",
        "resize",
        "resize a.qcow2",
        "snapshot",
        "snapshot -c x -d y a.qcow2",
        "snapshot -l -c y a.qcow2",
        "measure",
        "measure --size 1G a.qcow2",
        "measure --size 1G -f qcow2",
        "measure a.qcow2 b.qcow2",
    ]);
}

/// What `qemu-img` calls its options, by what it says of names that are cut too short.
fn long_names(said: &str) -> impl Iterator<Item = &str> {
    said.split('\'').filter_map(|part| part.strip_prefix("--")).filter(|name| !name.contains('='))
}

/// Scripts write long options, and cut them short. We may have more of them.
#[test]
fn every_long_option_is_known_here() {
    let scene = Scene::new(&[]);
    let (mut names, mut missing) = (0, Vec::new());
    for command in COMMANDS {
        let command = command.definition.name;
        for letter in 'a'..='z' {
            let is_known = |name: &str| {
                let ours = scene.ours_says(&format!("{command} --{name}=zz"));
                let is_unclear = name.len() > 1 && ours.err.contains("ambiguous");
                !is_unclear && !ours.err.contains("unrecognized option")
            };
            // One that takes an argument is called by its whole name where there is none.
            let said = ["=zz", ""].map(|value| scene.theirs_says(&format!("{command} --{letter}{value}")).err);
            if !said[0].contains("unrecognized option") && !is_known(&letter.to_string()) {
                missing.push(format!("{command} --{letter}"));
            }
            for name in said.iter().filter(|said| !said.contains("unrecognized")).flat_map(|said| long_names(said)) {
                names += 1;
                if !is_known(name) {
                    missing.push(format!("{command} --{name}"));
                }
            }
        }
    }
    assert!(names > 80 && missing.is_empty(), "of {names} names these are missing: {missing:?}");
}

#[test]
fn long_options_do_the_same() {
    let mut scene = Scene::new(CHAIN);
    scene.same(&[
        "convert --source-format=raw --output-format qcow2 r.raw 1.qcow2",
        "convert --copy-range --source-f raw r.raw 2.raw",
        "convert --copy-range-offloading -f raw r.raw 3.raw",
        "convert --oob-writes -f raw r.raw 4.raw",
        "convert --source-image-opts driver=raw,file.filename=r.raw 5.raw",
        "convert --output-cache none --rate 1G -f raw r.raw 6.raw",
        "dd --output-format=qcow2 -f raw if=r.raw of=7.qcow2",
        "map -s 64k -l 128k a.qcow2",
        "map --output=json -s 64k -l 128k a.qcow2",
        "convert --output-c=x r.raw 8.raw",
        "compare --left-format=qcow2 --right qcow2 a.qcow2 a.qcow2",
    ]);
    scene.same_images(&["1.qcow2", "2.raw", "3.raw", "4.raw", "5.raw", "6.raw", "7.qcow2"]);
}

#[test]
fn what_stands_before_the_command_is_read_in_the_same_way() {
    Scene::new(CHAIN)
        .same(&[
            "-Z",
            "--zz",
            "-ZV",
            "-T",
            "--trace",
            "--trace=",
            "--version=x",
            "--help=x",
            "-- info none",
            "--",
            "-",
            "--tracex info",
        ])
        .same_code(
            "nothing is traced, and there is no warning of that",
            &["--trace=foo info none", "-Tfoo info none", "--trace foo info none", "--tr foo info none", "-TV"],
        )
        .same_code("our own words", &["--vers", "--he", "-hV", "-Vh", "-VZ"]);
}

#[test]
fn help_is_in_our_words() {
    Scene::new(&[]).same_code("help texts are our own", &["--help", "-h", "info --help", "create -h", "--version"]);
}
