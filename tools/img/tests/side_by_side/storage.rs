//! Storage that is full, too small or broken, with real processes and a real file system.

use std::path::Path;
use std::process::{Command, Output};

use super::scene::Scene;

/// A file system in memory of a few blocks, until dropped.
struct Small(tempfile::TempDir);

impl Small {
    fn new(size: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(folder.path()).status();
        assert!(mounted.unwrap().success(), "this test needs the right to mount");
        Self(folder)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.path()).status();
    }
}

fn ours(folder: &Path, words: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trellis-img"));
    let Output { status, stderr, .. } = command.args(words).current_dir(folder).output().unwrap();
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

/// Whoever finds no room says so, and what was made is gone, which makes room again.
#[test]
fn a_full_file_system_fails_what_is_made() {
    let scene = Scene::new(&["create -q -f raw a.raw 4M", "qemu-io -f raw -c 'write -P 1 0 4M' a.raw"]);
    let small = Small::new("1M");
    let target = small.path().join("t");
    let name = target.to_str().unwrap();
    let of = format!("of={name}");
    for words in [
        &["convert", "-f", "raw", "-O", "raw", "a.raw", name][..],
        &["convert", "-t", "none", "-f", "raw", "-O", "raw", "a.raw", name],
        &["convert", "-f", "raw", "-O", "qcow2", "a.raw", name],
        &["convert", "-S", "0", "-f", "raw", "-O", "qcow2", "a.raw", name],
        &["convert", "-f", "raw", "-O", "qcow2", "-o", "preallocation=falloc", "a.raw", name],
        &["convert", "-f", "raw", "-O", "raw", "-o", "preallocation=full", "a.raw", name],
        &["create", "-q", "-f", "raw", "-o", "preallocation=falloc", name, "4M"],
        &["create", "-q", "-f", "raw", "-o", "preallocation=full", name, "4M"],
        &["create", "-q", "-f", "qcow2", "-o", "preallocation=full", name, "4M"],
        &["dd", "-f", "raw", "if=a.raw", &of],
    ] {
        let (code, said) = ours(&scene.ours(), words);
        assert_eq!(code, Some(1), "{words:?}: {said}");
        assert!(said.contains("No space left on device") || said.contains("no space left"), "{words:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{words:?}: {said}");
        assert!(!target.exists(), "{words:?}");
    }
}

/// Images that are changed where there is no room keep their disks.
#[test]
fn a_full_file_system_loses_nothing() {
    let scene = Scene::new(&[
        "create -q -f qcow2 base.qcow2 4M",
        "qemu-io -c 'write -P 1 0 4M' base.qcow2",
        "create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
        "qemu-io -c 'write -P 2 64k 64k' top.qcow2",
        "create -q -f qcow2 alone.qcow2 4M",
        "qemu-io -c 'write -P 3 0 512k' alone.qcow2",
        "create -q -f qcow2 small.qcow2 4M",
        "create -q -f qcow2 -b small.qcow2 -F qcow2 big.qcow2",
        "qemu-io -c 'write -P 4 1M 2M' big.qcow2",
    ]);
    let base = scene.ours().join("base.qcow2");
    for (files, line, kept) in [
        (&["top.qcow2"][..], "rebase -b '' top.qcow2", "top.qcow2"),
        (&["alone.qcow2"], "resize --preallocation=full alone.qcow2 16M", "alone.qcow2"),
        (&["small.qcow2"], "commit -q ../big.qcow2", "../big.qcow2"),
    ] {
        let folder = scene.ours().join("mounted");
        std::fs::create_dir_all(&folder).unwrap();
        let small = Small::new("1M");
        for file in files {
            std::fs::copy(scene.ours().join(file), small.path().join(file)).unwrap();
        }
        let mut words: Vec<String> = line.split(' ').map(|word| word.trim_matches('\'').to_owned()).collect();
        let (mut image, mut target) = (small.path().join(kept), small.path().join(files[0]));
        match line.split(' ').next().unwrap() {
            "rebase" => {
                let done = Command::new("qemu-img")
                    .args(["rebase", "-u", "-F", "qcow2", "-b", base.to_str().unwrap()])
                    .arg(&image)
                    .status();
                assert!(done.unwrap().success());
            }
            "commit" => {
                image = scene.ours().join("big.qcow2");
                target.clone_from(&image);
                let done = Command::new("qemu-img")
                    .args(["rebase", "-u", "-F", "qcow2", "-b", small.path().join("small.qcow2").to_str().unwrap()])
                    .arg(&image)
                    .status();
                assert!(done.unwrap().success());
            }
            _ => {}
        }
        let last = words.iter().position(|word| word.ends_with(".qcow2")).unwrap();
        words[last] = target.to_str().unwrap().to_owned();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let contents = || {
            let to = scene.ours().join("contents");
            let done = Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(&image).arg(&to).status();
            assert!(done.unwrap().success(), "{line}");
            std::fs::read(to).unwrap()
        };
        let before = contents();
        let (code, said) = ours(&scene.ours(), &words);
        assert_eq!(code, Some(1), "{line}: {said}");
        assert!(said.contains("No space left on device") || said.contains("no space left"), "{line}: {said}");
        assert!(contents() == before, "{line} has lost something");
        for image in [&image, &small.path().join(files[0])] {
            let checked = Command::new("qemu-img").arg("check").arg(image).output().unwrap();
            assert!(matches!(checked.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&checked.stdout));
        }
    }
}

/// A target that is there and is too small is left as it is.
#[test]
fn a_small_target_is_not_written() {
    let mut scene = Scene::new(&[
        "create -q -f raw a.raw 4M",
        "qemu-io -f raw -c 'write -P 1 0 4M' a.raw",
        "create -q -f raw small.raw 1M",
        "create -q -f qcow2 small.qcow2 1M",
    ]);
    scene.same(&["convert -n -f raw -O raw a.raw small.raw", "convert -n -f raw -O qcow2 a.raw small.qcow2"]);
    scene.same_images(&["small.raw", "small.qcow2"]);
}
