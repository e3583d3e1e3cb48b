//! Images that somebody else has open.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::info::CHAIN;
use super::scene::Scene;

/// A `qemu-io` that writes to an image until it is dropped.
pub(crate) struct Writer(Child);

impl Writer {
    /// `words`: the image's name, behind options.
    pub(crate) fn of(scene: &Scene, theirs: bool, words: &str) -> Self {
        let folder = if theirs { scene.theirs() } else { scene.ours() };
        let mut command = Command::new("qemu-io");
        command.args(["-c", "sleep 60000"]).args(words.split(' ')).current_dir(&folder).stdout(Stdio::null());
        let writer = Self(command.spawn().unwrap());
        let image = words.rsplit(' ').next().unwrap();
        // Asking a program would take a lock itself, and keep the writer out.
        let end = Instant::now() + Duration::from_secs(30);
        while is_free(&folder.join(image)) {
            assert!(Instant::now() < end, "qemu-io does not lock the image");
        }
        writer
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Nobody has a lock on a file.
pub(crate) fn is_free(path: &Path) -> bool {
    let inode = std::fs::metadata(path).unwrap().ino();
    !std::fs::read_to_string("/proc/locks").unwrap().contains(&format!(":{inode} "))
}

#[test]
fn an_image_in_use_is_refused_with_the_same_words_and_code() {
    let mut scene = Scene::new(CHAIN);
    let _writers = [Writer::of(&scene, true, "a.qcow2"), Writer::of(&scene, false, "a.qcow2")];
    scene.same(&[
        "info a.qcow2",
        "check a.qcow2",
        "check -r all a.qcow2",
        "map a.qcow2",
        "compare a.qcow2 r.raw",
        "compare r.raw a.qcow2",
        "resize a.qcow2 8M",
        "snapshot -l a.qcow2",
        "snapshot -c x a.qcow2",
        "measure a.qcow2",
        "create -f qcow2 a.qcow2 1M",
        "create -f raw a.qcow2 1M",
        "info -U a.qcow2",
        "check -U a.qcow2",
        "map -U a.qcow2",
        "compare -U a.qcow2 a.qcow2",
        "snapshot -l -U a.qcow2",
        "info -b b.qcow2",
    ]);
}
