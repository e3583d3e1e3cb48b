//! Bad input and bad surroundings: nobody panics, nothing is lost that was not given up, no half-made image stays.

use std::fs::{File, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::locked::Writer;
use super::scene::Scene;

fn ours(folder: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_trellis-img")).args(words).current_dir(folder).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn nobody_has_to_hear_what_is_said() {
    let scene = Scene::new(&["create -q -f raw a.raw 1M"]);
    for (words, code) in [(&["info", "none"][..], 1), (&["nosuch"], 1), (&["info", "a.raw"], 0)] {
        let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
        let mut command = Command::new(env!("CARGO_BIN_EXE_trellis-img"));
        let status = command.args(words).current_dir(scene.ours()).stdout(full()).stderr(full()).status().unwrap();
        assert_eq!(status.code(), Some(code), "{words:?}");
        // A pipe that nobody reads.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let other = writer.try_clone().unwrap();
        let status = command.stdout(writer).stderr(other).status().unwrap();
        assert_eq!(status.code(), Some(code), "{words:?}");
    }
}

#[test]
fn names_of_what_is_made_are_read_as_those_of_what_is_opened() {
    let mut scene = Scene::new(&["create -q -f raw a.raw 1M", "create -q -f raw ./a:b 1M"]);
    scene.same(&[
        "create -f raw foo:bar 1M",
        "create -f qcow2 'json:{\"driver\":\"file\",\"filename\":\"zz\"}' 1M",
        "create -q -f raw file:new:name 1M",
        "create -q -f raw ./with:colon 1M",
        "create -q -f raw file::x 1M",
        "convert -f raw -O raw a.raw file:-",
        "info file:new:name",
        "info file::x",
        "info ./a:b",
        "info -",
        "info a:b",
        "info ''",
    ]);
    scene.same_code("the format is named", &["convert -f raw -O raw a.raw foo:bar"]);
    scene.same_code("the kernel's words", &["info ."]);
    scene.codes("a disk is a regular file or a block device", 0, 1, &["info /dev/null"]);
    for name in ["new:name", "with:colon", ":x", "-"] {
        assert!(scene.ours().join(name).exists(), "{name}");
    }
    for name in ["foo:bar", "json:{\"driver\":\"file\",\"filename\":\"zz\"}", "zz"] {
        assert!(!scene.ours().join(name).exists(), "{name}");
    }
}

#[test]
fn numbers_beyond_all_measure_are_refused() {
    let scene = Scene::new(&["create -q -f raw a.raw 1M"]);
    let huge = "driver=null-co,size=9223372035781033984";
    let done = ours(&scene.ours(), &["convert", "--image-opts", huge, huge, huge, "x.raw"]);
    assert_eq!(done.status.code(), Some(1), "{}", text(&done.stderr));
    let dashes = format!("+{}", "-".repeat(100_000));
    let done = ours(&scene.ours(), &["resize", "a.raw", &dashes]);
    assert_eq!(done.status.code(), Some(1));
    assert!(!scene.ours().join("x.raw").exists());
}

#[test]
fn an_image_is_not_made_over_what_it_stands_on() {
    const CHAIN: &[&str] = &[
        "create -q -f qcow2 base.qcow2 1M",
        "qemu-io -c 'write -P 7 0 64k' base.qcow2",
        "create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2",
        "create -q -f raw a.raw 1M",
    ];
    for (theirs, line) in [
        (0, "create -f qcow2 -b ./base.qcow2 -F qcow2 base.qcow2"),
        (0, "create -f qcow2 -u -b ./base.qcow2 -F qcow2 base.qcow2 1M"),
        (0, "create -f qcow2 -b base.qcow2 -F qcow2 link.qcow2"),
        (0, "create -f qcow2 -b mid.qcow2 -F qcow2 base.qcow2"),
        (1, "convert -f raw -B ./base.qcow2 -F qcow2 -O qcow2 a.raw base.qcow2"),
        (1, "convert -f raw -B mid.qcow2 -F qcow2 -O qcow2 a.raw base.qcow2"),
        (1, "convert -f raw -B mid.qcow2 -F qcow2 -O qcow2 -o data_file=base.qcow2 a.raw new.qcow2"),
        (0, "create -f qcow2 -b mid.qcow2 -F qcow2 -o data_file=base.qcow2 new.qcow2"),
        (0, "create -f qcow2 -u -b mid.qcow2 -F qcow2 base.qcow2 1M"),
        (1, "create -f qcow2 -o data_file=file:base.qcow2 file:./base.qcow2 1M"),
    ] {
        let mut scene = Scene::new(CHAIN);
        let before = scene.contents("base.qcow2");
        for side in [scene.ours(), scene.theirs()] {
            symlink("base.qcow2", side.join("link.qcow2")).unwrap();
        }
        scene.codes("qemu-img destroys the base", theirs, 1, &[line]);
        assert!(scene.contents("base.qcow2") == before, "{line}");
    }
    let scene = Scene::new(CHAIN);
    let before = scene.contents("base.qcow2");
    // Options that no image can have are found before its place is made free.
    for options in ["cluster_size=3", "refcount_bits=3", "compat=0.10,refcount_bits=1", "data_file=base.qcow2"] {
        let done = ours(&scene.ours(), &["create", "-f", "qcow2", "-o", options, "base.qcow2", "1M"]);
        assert_eq!(done.status.code(), Some(1), "{options}");
        assert!(scene.contents("base.qcow2") == before, "{options}");
    }
}

#[test]
fn what_was_begun_is_taken_away_with_all_its_files() {
    let scene = Scene::new(&["create -q -f raw a.raw 4M", "qemu-io -f raw -c 'write -P 1 0 4M' a.raw"]);
    let folder = scene.ours();
    let broken = "driver=blkdebug,image.driver=raw,image.file.filename=a.raw,inject-error.0.event=none,\
                  inject-error.0.sector=6000,inject-error.0.iotype=read";
    for name in ["file:t.qcow2", "t.qcow2"] {
        let line = ["convert", "--image-opts", "-O", "qcow2", "-o", "data_file=t.data", broken, name];
        assert_eq!(ours(&folder, &line).status.code(), Some(1));
        assert!(!folder.join("t.qcow2").exists() && !folder.join("t.data").exists(), "{name}");
    }
    let line = ["convert", "--image-opts", "-O", "raw", broken, "link.raw"];
    std::fs::write(folder.join("real.raw"), b"old").unwrap();
    symlink("real.raw", folder.join("link.raw")).unwrap();
    assert_eq!(ours(&folder, &line).status.code(), Some(1));
    assert_eq!(std::fs::metadata(folder.join("real.raw")).unwrap().len(), 0, "half of it looks whole");
    // dd does as convert does.
    let quoted = format!("if={broken}");
    assert_eq!(ours(&folder, &["dd", "--image-opts", &quoted, "of=d.raw"]).status.code(), Some(1));
    assert!(!folder.join("d.raw").exists());
}

#[test]
fn a_source_and_what_it_stands_on_are_no_targets() {
    let mut scene = Scene::new(&[
        "create -q -f raw b.raw 1M",
        "qemu-io -f raw -c 'write -P 7 0 1M' b.raw",
        "create -q -f qcow2 -b b.raw -F raw mid.qcow2",
        "create -q -f qcow2 -b mid.qcow2 -F qcow2 t.qcow2",
    ]);
    scene.same(&[
        "convert -O raw t.qcow2 b.raw",
        "convert -O qcow2 t.qcow2 mid.qcow2",
        "convert -O qcow2 -o data_file=b.raw t.qcow2 new.qcow2",
    ]);
    for line in ["dd if=t.qcow2 of=b.raw", "dd -f raw if=b.raw of=b.raw"] {
        let done = scene.ours_says(line);
        let text = "b.raw: error while creating output image: Failed to get \"write\" lock\nIs another process using the image";
        assert!(done.code == Some(1) && done.err.contains(text), "{}", done.err);
    }
    assert!(scene.contents("t.qcow2") == vec![7; 1 << 20]);
}

/// qemu-img knows no limit. What is refused is told in one sentence, however long the way was.
#[test]
fn long_chains_are_opened_up_to_the_graphs_depth() {
    let over = |number: usize| format!("create -q -f qcow2 -u -b {}.qcow2 -F qcow2 {number}.qcow2 1M", number - 1);
    let lines: Vec<_> = (1..64).map(over).collect();
    let mut setup = vec!["create -q -f qcow2 0.qcow2 1M"];
    setup.extend(lines.iter().map(String::as_str));
    let mut scene = Scene::new(&setup);
    scene.same_reads(&["map 62.qcow2", "info --backing-chain 62.qcow2", "info 63.qcow2"]);
    scene.codes("no graph is deeper", 0, 1, &["map 63.qcow2"]);
    let said = scene.ours_says("map 63.qcow2").err;
    assert_eq!(said, "qemu-img: Could not open '63.qcow2': Not more than 63 images may stand on each other\n");
}

/// A guest may write what it likes to its disk, and so decide what is opened in the next guess: not by a commit.
#[test]
fn a_guessed_base_does_not_become_an_image() {
    for (setup, names) in [
        (&["create -q -f qcow2 -b base.raw -F raw top.qcow2"][..], &["top.qcow2"][..]),
        (
            &["create -q -f qcow2 -b base.raw -F raw mid.qcow2", "create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2"],
            &["mid.qcow2"],
        ),
    ] {
        let setup: Vec<_> = ["create -q -f raw base.raw 1M"].into_iter().chain(setup.iter().copied()).collect();
        let mut scene = Scene::new(&setup);
        for side in [scene.theirs(), scene.ours()] {
            let mut start = b"QFI\xfb\0\0\0\x03".to_vec();
            start.resize(512, 0);
            std::fs::write(side.join("start"), start).unwrap();
            let words = ["-f", "qcow2", "-c", "write -s start 0 512", "top.qcow2"];
            assert!(
                Command::new("qemu-io")
                    .args(words)
                    .current_dir(&side)
                    .stdout(Stdio::null())
                    .status()
                    .unwrap()
                    .success()
            );
            for name in names {
                forget_format(&side.join(name));
            }
        }
        scene.same(&["commit -b base.raw top.qcow2", "commit -d top.qcow2", "commit top.qcow2", "info base.raw"]);
        let base = std::fs::read(scene.ours().join("base.raw")).unwrap();
        assert!(base.iter().all(|byte| *byte == 0), "the base is an image now");
    }
}

/// The extension that names the backing format becomes one that nobody knows.
fn forget_format(image: &Path) {
    let mut bytes = std::fs::read(image).unwrap();
    let at = bytes.windows(4).position(|kind| kind == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    bytes[at + 3] = 0xcb;
    std::fs::write(image, bytes).unwrap();
}

/// What could not be emptied is not taken away either: it is somebody else's.
#[test]
fn a_data_file_that_is_not_given_up_stays() {
    let scene = Scene::new(&[
        "create -q -f raw a.raw 1M",
        "qemu-io -f raw -c 'write -P 7 0 1M' a.raw",
        "create -q -f raw b.raw 1M",
        "qemu-io -f raw -c 'write -P 8 0 1M' b.raw",
        "create -q -f qcow2 -b b.raw -F raw top.qcow2",
    ]);
    let folder = scene.ours();
    let used = Writer::of(&scene, false, "-f raw a.raw");
    for (words, data) in [
        (&["create", "-f", "qcow2", "-o", "data_file=a.raw", "new.qcow2", "1M"][..], "a.raw"),
        (&["convert", "-f", "raw", "-O", "qcow2", "-o", "data_file=b.raw", "b.raw", "new.qcow2"], "b.raw"),
        (&["convert", "-O", "qcow2", "-o", "data_file=b.raw", "top.qcow2", "new.qcow2"], "b.raw"),
    ] {
        let before = std::fs::read(folder.join(data)).unwrap();
        let done = ours(&folder, words);
        assert_eq!(done.status.code(), Some(1), "{words:?}: {}", text(&done.stderr));
        assert!(std::fs::read(folder.join(data)).ok() == Some(before), "{words:?}: '{data}' is another one");
        assert!(!folder.join("new.qcow2").exists(), "{words:?}");
    }
    drop(used);
    std::fs::set_permissions(&folder, Permissions::from_mode(0o777)).unwrap();
    std::fs::set_permissions(folder.join("b.raw"), Permissions::from_mode(0o444)).unwrap();
    let line = "create -f qcow2 -o data_file=b.raw new.qcow2 1M";
    let mut nobody = Command::new("setpriv");
    nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups", env!("CARGO_BIN_EXE_trellis-img")]);
    let done = nobody.args(line.split(' ')).current_dir(&folder).output().unwrap();
    assert!(text(&done.stderr).contains("Permission denied"), "{}", text(&done.stderr));
    assert!(folder.join("b.raw").exists() && !folder.join("new.qcow2").exists());
}

#[test]
fn a_file_that_may_not_grow_fails_the_copy() {
    let scene = Scene::new(&["create -q -f raw a.raw 4M", "qemu-io -f raw -c 'write -P 1 0 4M' a.raw"]);
    for target in ["raw", "qcow2"] {
        let line = format!("ulimit -f 1024; exec \"$0\" convert -f raw -O {target} a.raw t");
        let mut command = Command::new("bash");
        let done =
            command.args(["-c", &line, env!("CARGO_BIN_EXE_trellis-img")]).current_dir(scene.ours()).output().unwrap();
        assert_eq!(done.status.code(), Some(1), "{}", text(&done.stderr));
        assert!(text(&done.stderr).contains("too large"), "{}", text(&done.stderr));
        assert!(!scene.ours().join("t").exists());
    }
}

/// Starts a program, asks it to end once `begun` says that it is at work, and gives its exit code.
fn interrupted(folder: &Path, words: &[&str], name: &str, begun: impl Fn() -> bool) -> Option<i32> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_trellis-img")).args(words).current_dir(folder).spawn().unwrap();
    let start = Instant::now();
    while !begun() {
        assert!(start.elapsed() < Duration::from_secs(30), "{words:?} does not begin");
        std::thread::yield_now();
    }
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
    let asked = Instant::now();
    let code = child.wait().unwrap().code();
    assert!(asked.elapsed() < Duration::from_secs(10), "{words:?} takes its time: {:?}", asked.elapsed());
    code
}

#[test]
fn the_making_of_room_can_be_interrupted() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let target = folder.path().join("t");
    let nothing = "driver=null-co,size=1099511627776";
    let is_there = || std::fs::metadata(&target).is_ok_and(|found| found.len() > 1 << 20);
    for (signal, code) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
        for words in [
            &["create", "-q", "-f", "raw", "-o", "preallocation=full", "t", "1T"][..],
            &["create", "-q", "-f", "qcow2", "-o", "preallocation=full", "t", "1T"],
            &["convert", "-O", "raw", "-o", "preallocation=full", "--image-opts", nothing, "t"],
        ] {
            assert_eq!(interrupted(folder.path(), words, signal, is_there), Some(code), "{words:?}");
            assert!(!target.exists(), "{words:?}");
        }
    }
}

/// However slow it is told to be.
#[test]
fn a_slow_copy_can_be_interrupted() {
    let scene = Scene::new(&["create -q -f raw a.raw 4M", "qemu-io -f raw -c 'write -P 1 0 4M' a.raw"]);
    let target = scene.ours().join("t");
    let words = ["convert", "-r", "1", "-f", "raw", "-O", "raw", "a.raw", "t"];
    let is_there = || {
        let _ = std::sync::mpsc::channel::<()>().1.recv_timeout(Duration::from_millis(300));
        target.exists()
    };
    assert_eq!(interrupted(&scene.ours(), &words, "-TERM", is_there), Some(143));
    assert!(!target.exists());
}
