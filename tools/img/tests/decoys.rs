//! Images that lie about what they stand on, opened by every sub-command as a user without rights: nothing hangs, takes much
//! memory or ends in a signal, and no file changes that is not the image's own.
//!
//! Everything lies in a folder of the test's own; what looks like the system's files are decoys.

#![expect(clippy::unwrap_used, reason = "a test stops where its machine fails it")]

use std::fmt::Write;
use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Files that no image may change, with their contents.
const DECOYS: &[(&str, &str)] = &[("passwd", "root:SECRET:0:0"), ("log", "SECRET log"), ("below.raw", "SECRET below")];

struct Scene {
    folder: TempDir,
    program: PathBuf,
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
        let program = folder.path().join("trellis-img");
        std::fs::copy(env!("CARGO_BIN_EXE_trellis-img"), &program).unwrap();
        let scene = Self { folder, program };
        scene.put_decoys();
        scene.make("mkfifo", &["fifo"]);
        scene.make("mknod", &["zero", "c", "1", "5"]);
        scene.make("mkdir", &["folder"]);
        symlink("loop", scene.path("loop")).unwrap();
        std::os::unix::net::UnixListener::bind(scene.path("socket")).unwrap();
        for name in ["fifo", "zero", "socket"] {
            scene.open_to_all(name);
        }
        scene
    }

    fn put_decoys(&self) {
        for (name, contents) in DECOYS {
            let mut bytes = contents.as_bytes().to_vec();
            bytes.resize(4096, b'.');
            std::fs::write(self.path(name), bytes).unwrap();
            self.open_to_all(name);
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn open_to_all(&self, name: &str) {
        std::fs::set_permissions(self.path(name), Permissions::from_mode(0o666)).unwrap();
    }

    fn make(&self, program: &str, words: &[&str]) {
        let done = Command::new(program).args(words).current_dir(self.folder.path()).output().unwrap();
        assert!(done.status.success(), "{program} {words:?}: {}", String::from_utf8_lossy(&done.stderr));
    }

    /// An image that says that it stands on `name`; in a format, if one is given.
    fn over(&self, image: &str, name: &str, format: Option<&str>) {
        self.make("qemu-img", &["create", "-q", "-f", "qcow2", image, "1M"]);
        let tool = self.program.to_str().unwrap();
        self.make(tool, &["rebase", "-u", "-b", name, "-F", format.unwrap_or("raw"), image]);
        if format.is_none() {
            // The extension that names the format becomes one that nobody knows.
            let mut bytes = std::fs::read(self.path(image)).unwrap();
            let at = bytes.windows(4).position(|kind| kind == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
            bytes[at + 3] = 0xcb;
            std::fs::write(self.path(image), bytes).unwrap();
        }
        self.open_to_all(image);
    }

    /// Identities and contents of the decoys.
    fn decoys(&self) -> Vec<(u64, i64, Vec<u8>)> {
        let one = |(name, _): &(&str, &str)| {
            let found = std::fs::metadata(self.path(name)).unwrap();
            (found.ino(), found.mtime_nsec(), std::fs::read(self.path(name)).unwrap())
        };
        DECOYS.iter().map(one).collect()
    }

    /// Runs the tool as nobody, in the folder, with no more than 4 GiB of addresses; gives what is wrong.
    fn run(&self, line: &str, wrong: &mut String) -> String {
        let begun = Instant::now();
        let limited = format!("ulimit -c 0; ulimit -v 4194304; exec timeout 20 {} {line}", self.program.display());
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "bash", "-c", &limited]);
        let done = command.current_dir(self.folder.path()).output().unwrap();
        let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
        let took = begun.elapsed();
        // 63: there is nothing to check.
        if !matches!(done.status.code(), Some(0..=4 | 63))
            || said.contains("panicked")
            || took > Duration::from_secs(15)
        {
            let end: String = said.chars().take(600).collect();
            let _ = writeln!(wrong, "$ {line}\n{:?} after {took:?}: {end}", done.status);
        }
        said
    }
}

/// What is done with each image; `@` is the image. What is changed is a copy.
const LINES: &[&str] = &[
    "info @",
    "info -U --backing-chain --output=json @",
    "check @",
    "map @",
    "map --output=json @",
    "compare @ @",
    "measure -O qcow2 @",
    "convert -O raw @ out",
    "convert -O qcow2 -o compat=1.1 @ out",
    "dd bs=512 count=1 if=@ of=out",
    "bench -c 1 @",
    "snapshot -l @",
    "create -f qcow2 -F qcow2 -b @ out",
    "check -r all copy",
    "snapshot -c x copy",
    "bitmap --add copy b",
    "resize copy 2M",
    "amend -o lazy_refcounts=on copy",
    "bench -w -c 1 copy",
    "commit copy",
    "rebase -b '' copy",
    "rebase -u -b '' copy",
    "convert -n -f raw -O qcow2 below.raw copy",
];

/// Runs all lines on an image.
fn all_lines(scene: &Scene, image: &str, wrong: &mut String) {
    lines_on(scene, image, false, wrong);
}

fn lines_on(scene: &Scene, image: &str, may_commit: bool, wrong: &mut String) {
    for line in LINES {
        let out = scene.path("out");
        let _ = std::fs::remove_file(&out);
        if line.contains("copy") {
            std::fs::copy(scene.path(image), scene.path("copy")).unwrap();
            scene.open_to_all("copy");
        }
        let line = line.replace('@', image);
        let before = scene.decoys();
        scene.run(&line, wrong);
        if scene.decoys() != before {
            // Whoever commits writes what the image stands on, and says so.
            let info = scene.run("info image", &mut String::new());
            assert!(may_commit && line == "commit copy", "{image}: '{line}' has changed a decoy: {info}");
            scene.put_decoys();
        }
    }
}

fn is_right(wrong: &str) {
    assert!(wrong.is_empty(), "\n{wrong}");
}

#[test]
fn names_of_things_that_are_no_images() {
    let scene = Scene::new();
    let mut wrong = String::new();
    let folder = scene.folder.path().display().to_string();
    let long = "x".repeat(1023);
    let names = [
        "fifo",
        "zero",
        "folder",
        "loop",
        "socket",
        "none",
        "nbd:127.0.0.1:1",
        "nbd://127.0.0.1:1/x",
        "http://127.0.0.1:1/x",
        "ssh://127.0.0.1/x",
        "fat:folder",
        "blkdebug:conf:passwd",
        "/proc/self/mem",
        "/proc/self/fd/0",
        "/dev/stdin",
        ".",
        "file:",
        "file:file:passwd",
        "json:",
        "json:{",
        "json:[]",
        "json:{}",
        "json:{\"driver\":\"nosuch\"}",
        &long,
    ];
    for name in names {
        for format in [None, Some("raw"), Some("qcow2")] {
            scene.over("image", name, format);
            all_lines(&scene, "image", &mut wrong);
        }
    }
    // Not even those that only read it have to be able to.
    std::fs::set_permissions(scene.path("passwd"), Permissions::from_mode(0o600)).unwrap();
    scene.over("image", &format!("{folder}/passwd"), Some("raw"));
    let said = scene.run("convert -O raw image out", &mut wrong);
    assert!(said.contains("Permission denied") && !scene.path("out").exists(), "{said}");
    is_right(&wrong);
}

#[test]
fn definitions_in_the_place_of_names() {
    let scene = Scene::new();
    let mut wrong = String::new();
    let passwd = r#"{"driver":"file","filename":"passwd"}"#;
    let below = r#"{"driver":"file","filename":"below.raw"}"#;
    let nested = "{\"driver\":\"raw\",\"file\":".repeat(40) + below + &"}".repeat(40);
    for definition in [
        format!(r#"{{"driver":"blklogwrites","file":{below},"log":{passwd}}}"#),
        format!(r#"{{"driver":"copy-before-write","file":{below},"target":{passwd}}}"#),
        format!(r#"{{"driver":"preallocate","file":{passwd}}}"#),
        format!(r#"{{"driver":"copy-on-read","file":{passwd}}}"#),
        format!(r#"{{"driver":"raw","read-only":false,"file":{passwd}}}"#),
        format!(r#"{{"driver":"raw","file":{below},"offset":1,"size":9223372036854775807}}"#),
        format!(r#"{{"driver":"quorum","vote-threshold":1,"rewrite-corrupted":true,"children":[{below},{passwd}]}}"#),
        format!(r#"{{"driver":"blkdebug","config":"passwd","image":{below}}}"#),
        format!(r#"{{"driver":"blkreplay","image":{below}}}"#),
        format!(r#"{{"driver":"blkverify","raw":{below},"test":{passwd}}}"#),
        format!(r#"{{"driver":"throttle","throttle-group":"none","file":{below}}}"#),
        format!(r#"{{"driver":"compress","file":{passwd}}}"#),
        format!(r#"{{"driver":"luks","key-secret":"none","file":{passwd}}}"#),
        r#"{"driver":"null-co","size":9223372035781033984}"#.to_owned(),
        r#"{"driver":"qcow2","file":"fifo","backing":"fifo"}"#.to_owned(),
        r#"{"driver":"host_device","filename":"zero"}"#.to_owned(),
        r#"{"driver":"file","filename":"fifo"}"#.to_owned(),
        nested,
    ] {
        scene.over("image", &format!("json:{definition}"), None);
        lines_on(&scene, "image", true, &mut wrong);
    }
    is_right(&wrong);
}

/// Twenty layers, each of which names the next one twice.
#[test]
fn images_that_multiply() {
    let scene = Scene::new();
    let mut wrong = String::new();
    scene.make("qemu-img", &["create", "-q", "-f", "qcow2", "m20", "1M"]);
    for layer in 0..20 {
        let below = format!(r#"{{"driver":"qcow2","file":{{"driver":"file","filename":"m{}"}}}}"#, layer + 1);
        let twice = format!(r#"json:{{"driver":"quorum","vote-threshold":1,"children":[{below},{below}]}}"#);
        scene.over(&format!("m{layer}"), &twice, None);
    }
    all_lines(&scene, "m0", &mut wrong);
    is_right(&wrong);
}

#[test]
fn chains_without_an_end() {
    let scene = Scene::new();
    let mut wrong = String::new();
    for (image, name) in [("itself", "itself"), ("one", "two"), ("two", "one"), ("dots", "./folder/../dots")] {
        scene.over(image, name, Some("qcow2"));
    }
    for image in ["itself", "one", "dots"] {
        all_lines(&scene, image, &mut wrong);
    }
    // Ten thousand, in images of a few kilobytes.
    scene.make("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "c00000", "64k"]);
    scene.make("qemu-img", &["rebase", "-u", "-b", "c00001", "-F", "qcow2", "c00000"]);
    let bytes = std::fs::read(scene.path("c00000")).unwrap();
    let at = bytes.windows(6).position(|name| name == b"c00001").unwrap();
    for number in 0..10_000 {
        let mut bytes = bytes.clone();
        bytes[at..at + 6].copy_from_slice(format!("c{:05}", (number + 1) % 10_000).as_bytes());
        std::fs::write(scene.path(&format!("c{number:05}")), bytes).unwrap();
    }
    let before = scene.decoys();
    for line in ["info c00000", "check c00000", "convert -O raw c00000 out", "map c00000", "measure c00000"] {
        scene.run(line, &mut wrong);
    }
    assert!(scene.decoys() == before);
    is_right(&wrong);
}

#[test]
fn data_in_files_of_others() {
    let scene = Scene::new();
    let mut wrong = String::new();
    for name in ["fifo", "zero", "folder", "socket", "none", "nbd:127.0.0.1:1", "image", "/proc/self/mem"] {
        scene.make("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "data_file=data", "image", "1M"]);
        scene.make(scene.program.to_str().unwrap(), &["amend", "-o", &format!("data_file={name}"), "image"]);
        scene.open_to_all("image");
        all_lines(&scene, "image", &mut wrong);
    }
    is_right(&wrong);
}

#[test]
fn sizes_beyond_all_measure() {
    let scene = Scene::new();
    let mut wrong = String::new();
    scene.make("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "huge", "1E"]);
    scene.open_to_all("huge");
    all_lines(&scene, "huge", &mut wrong);
    // A header that says more than there are tables for.
    scene.make("qemu-img", &["create", "-q", "-f", "qcow2", "image", "1M"]);
    let bytes = std::fs::read(scene.path("image")).unwrap();
    for (at, value) in
        [(24, i64::MAX as u64 - 511), (24, u64::MAX), (36, u64::MAX), (8, u64::MAX), (56, u64::MAX), (60, u64::MAX)]
    {
        let mut bytes = bytes.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        std::fs::write(scene.path("image"), bytes).unwrap();
        all_lines(&scene, "image", &mut wrong);
    }
    is_right(&wrong);
}

/// The test sees what it is looking for.
#[test]
fn a_decoy_that_is_written_is_noticed() {
    let scene = Scene::new();
    let before = scene.decoys();
    let mut wrong = String::new();
    scene.run("bench -f raw -w -c 1 --pattern 1 passwd", &mut wrong);
    assert!(scene.decoys() != before);
    scene.run("no-such-command; exec sleep 30", &mut wrong);
    assert!(Path::new(&scene.path("passwd")).exists() && wrong.is_empty(), "{wrong}");
    scene.run("info passwd; exit 9", &mut wrong);
    assert!(wrong.is_empty(), "exec does not come back: {wrong}");
}
