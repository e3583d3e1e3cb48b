//! Images on block devices: a loop device each, which needs root.

use std::path::Path;
use std::process::Command;

use super::scene::Scene;

const IMAGES: &[&str] = &[
    "create -q -f raw a.raw 1M",
    "qemu-io -f raw -c 'write -P 1 0 128k' -c 'write -P 2 512k 64k' a.raw",
    "create -q -f raw big.raw 16M",
    "create -q -f raw disk 4M",
    "qemu-io -f raw -c 'write -P 9 0 4M' disk",
];

/// The loop devices of a scene; `dev` in both folders leads to one. They are gone with the value.
struct Devices(Vec<String>);

impl Devices {
    fn of(scene: &Scene) -> Self {
        let mut devices = Self(Vec::new());
        for folder in [scene.theirs(), scene.ours()] {
            let made = Command::new("losetup").args(["-f", "--show"]).arg(folder.join("disk")).output().unwrap();
            let said = String::from_utf8_lossy(&made.stderr);
            // Not skipped in silence: whoever has no loop devices has to know that nothing was proved.
            assert!(made.status.success(), "this test needs root and loop devices: {said}");
            devices.0.push(String::from_utf8(made.stdout).unwrap().trim().to_owned());
            std::os::unix::fs::symlink(devices.0.last().unwrap(), folder.join("dev")).unwrap();
        }
        devices
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        for device in &self.0 {
            let _ = Command::new("losetup").arg("-d").arg(device).status();
        }
    }
}

fn is_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).unwrap().file_type().is_block_device()
}

#[test]
fn images_are_made_on_devices() {
    let mut scene = Scene::new(IMAGES);
    let _devices = Devices::of(&scene);
    scene.same(&[
        "create -f qcow2 dev 1M",
        "info dev",
        "check dev",
        "create -f qcow2 -o preallocation=metadata dev 1M",
        "check dev",
        "create -f qcow2 dev 1G",
        "info --output json dev",
        "create -f raw dev 8M",
        "info -f raw dev",
        "create -f raw dev 1M",
        "info dev",
        "create @s -f luks -o key-secret=s,iter-time=10 dev 1M",
        "create -f raw dev 4M",
        "create -f raw -o preallocation=full dev 1M",
        "create @s -f luks -o key-secret=s,iter-time=10 -q dev 1M",
        "map @s --output json --image-opts driver=luks,key-secret=s,file.driver=host_device,file.filename=dev",
        "create -f raw dev 4M",
        "resize -f raw dev 2M",
    ]);
    let why = "why there is no room is said in our words";
    scene.same_code(
        why,
        &[
            "create -f qcow2 -o preallocation=full dev 4M",
            "create @s -f luks -o key-secret=s,iter-time=10 dev 4M",
            "create -f raw -o nocow=on dev 1M",
        ],
    );
    assert!(is_device(&scene.ours().join("dev")), "what cannot be made leaves the device");
}

#[test]
fn disks_are_copied_to_devices() {
    let mut scene = Scene::new(IMAGES);
    let _devices = Devices::of(&scene);
    let first = "convert -f raw -O raw dev out.raw";
    scene.same(&[
        "convert -f raw -O qcow2 a.raw dev",
        "compare a.raw dev",
        "check dev",
        // What was there is not taken for zeroes of the new disk.
        "convert -f raw -O raw a.raw dev",
        first,
    ]);
    let read = scene.contents("out.raw");
    assert!(read[128 << 10..512 << 10].iter().all(|byte| *byte == 0) && read[0] == 1 && read[512 << 10] == 2);
    scene.same_images(&["out.raw"]);
    scene.same(&[
        "convert -n -f raw -O raw a.raw dev",
        "convert -n -f raw -O raw big.raw dev",
        "convert -f raw -O raw big.raw dev",
        "dd -f raw if=a.raw of=dev bs=64k count=2",
        first,
        "measure -O qcow2 -f raw dev",
        "map -f raw dev",
        "convert @s -f raw -O luks -o key-secret=s,iter-time=10 a.raw dev",
        "compare -f raw -F raw a.raw out.raw",
    ]);
    scene.same_images(&["out.raw"]);
    let luks = "driver=luks,key-secret=s,file.driver=host_device,file.filename=dev";
    scene.same(&[&format!("dd @s --image-opts if={luks} of=plain.raw bs=64k count=16")]);
    scene.same_images(&["plain.raw"]);
}
