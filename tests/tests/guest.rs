//! The main job on real input: a Linux guest, in a real QEMU, on disks that the server exports.
//!
//! Each test boots a guest of its own, which takes about five seconds of one CPU. Images are in memory.

#![expect(clippy::unwrap_used, reason = "a test stops where its machine fails it")]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;
use trellis_tests::guest::Guest;
use trellis_tests::process::wait_for;
use trellis_tests::qmp::Qmp;
use trellis_tests::server::Server;

#[test]
fn a_file_system_that_the_guest_makes_is_clean_and_whole_on_the_host() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk");
    let server = scratch.serve(&[&disk.writable("")]);
    let mut guest = scratch.boot(&["disk"]);

    guest.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt");
    guest.run("for i in 1 2 3 4 5 6 7 8; do dd if=/dev/urandom of=/mnt/$i bs=100k count=$i || exit; done");
    let sums = guest.run("cd /mnt && sha256sum 1 2 3 4 5 6 7 8 | tee /tmp/sums");
    // The second mount reads everything from the disk again.
    guest.run("umount /mnt && mount /dev/vda /mnt && cd /mnt && sha256sum -c /tmp/sums");
    guest.run("umount /mnt");
    guest.power_off();
    server.quit();

    disk.assert_clean_ext4();
    for line in sums.lines() {
        let (sum, name) = line.split_once("  ").unwrap();
        assert_eq!(disk.sha256_of_file(name), sum, "file {name}, as the host reads it");
    }
}

#[test]
fn random_writes_over_two_queues_read_back_as_written() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk").writable(",iothread=thread0");
    let server = scratch.serve_with(&["--object", "iothread,id=thread0"], &[&disk]);
    let mut guest = scratch.boot(&["disk"]);

    assert_eq!(guest.run("ls /sys/block/vda/mq"), "0\n1");
    guest.start(
        "fio --name=job --filename=/dev/vda --direct=1 --ioengine=libaio --iodepth=16 --rw=randrw --bsrange=512-64k \
         --fsync=64 --size=24m --numjobs=2 --offset_increment=32m --cpus_allowed=0,1 --cpus_allowed_policy=split \
         --verify=crc32c --verify_fatal=1 --minimal",
    );
    guest.finish(Duration::from_secs(90));

    for queue in ["req.0", "req.1"] {
        let interrupts = guest.run(&format!("awk '/{queue}$/ {{ print $2 + $3 }}' /proc/interrupts"));
        assert_ne!(interrupts, "0", "{queue} never completed anything");
    }
    guest.power_off();
    server.quit();
}

#[test]
fn discard_gives_blocks_back_and_write_zeroes_writes_zeroes() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk");
    let server = scratch.serve(&[&disk.writable("")]);
    let mut guest = scratch.boot(&["disk"]);
    let sum_of = |guest: &mut Guest, skip: u32, count: u32| {
        guest.run(&format!("dd if=/dev/vda iflag=direct bs=1M skip={skip} count={count} 2>/dev/null | sha256sum"))
    };

    guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=32 conv=fsync");
    let before = [sum_of(&mut guest, 0, 8), sum_of(&mut guest, 24, 8)];
    assert_eq!(disk.allocated_mib(), 32);

    guest.run("blkdiscard -o 8M -l 8M /dev/vda");
    assert_eq!(disk.allocated_mib(), 24);
    guest.run("/usr/sbin/blkdiscard -z -o 16M -l 8M /dev/vda && sync");
    let zeroes = guest.run("dd if=/dev/zero bs=1M count=8 2>/dev/null | sha256sum");
    assert_eq!(sum_of(&mut guest, 16, 8), zeroes);

    assert_eq!([sum_of(&mut guest, 0, 8), sum_of(&mut guest, 24, 8)], before, "data beside the discarded range");
    guest.power_off();
    server.quit();
}

#[test]
fn the_guest_sees_the_disks_that_the_exports_describe() {
    let scratch = Scratch::new();
    let [disk, sealed] = ["disk", "sealed"].map(|name| scratch.image(name));
    // The stand-in has no `serial=` and always says the same.
    let (serial_option, serial) = if Server::is_trellisd() {
        (",serial=TR-0123456789abcdefg", "TR-0123456789abcdefg")
    } else {
        ("", "vhost_user_blk")
    };
    let server = scratch.serve(&[&disk.writable(serial_option), &sealed.read_only(",logical-block-size=4096")]);
    let mut guest = scratch.boot(&["disk", "sealed"]);
    let mut shows = |what: &str, value: &str| assert_eq!(guest.run(&format!("cat /sys/block/{what}")), value, "{what}");

    shows("vda/serial", serial);
    shows("vda/ro", "0");
    shows("vda/size", &(IMAGE_SIZE / 512).to_string());
    shows("vda/queue/logical_block_size", "512");
    shows("vdb/ro", "1");
    shows("vdb/size", &(IMAGE_SIZE / 512).to_string());
    shows("vdb/queue/logical_block_size", "4096");

    guest.run_failing("dd if=/dev/urandom of=/dev/vdb bs=4k count=1 conv=fsync");
    assert_eq!(sealed.allocated_mib(), 0);
    guest.power_off();
    server.quit();
}

/// The stand-in fails here: it says "write through" while it does not flush, so that a guest never asks it to.
#[test]
fn the_guest_flushes_a_write_back_cache_and_need_not_flush_the_other() {
    let scratch = Scratch::new();
    let server =
        scratch.serve(&[&scratch.image("cached").writable(""), &scratch.image("stable").writable(",writethrough=on")]);
    let mut guest = scratch.boot(&["cached", "stable"]);

    for (disk, cache, flushed) in [("vda", "write back", true), ("vdb", "write through", false)] {
        assert_eq!(guest.run(&format!("cat /sys/block/{disk}/queue/write_cache")), cache, "{disk}");
        guest.run(&format!("dd if=/dev/urandom of=/dev/{disk} bs=4k count=1 conv=fsync"));
        // Field 16 counts the flushes that have completed.
        let flushes = guest.run(&format!("awk '{{ print $16 }}' /sys/block/{disk}/stat"));
        assert_eq!(flushes != "0", flushed, "{disk} completed {flushes} flushes");
    }
    guest.power_off();
    server.quit();
}

#[test]
fn a_guest_that_reboots_under_load_finds_its_disk_again() {
    let scratch = Scratch::new();
    let server = scratch.serve(&[&scratch.image("disk").writable("")]);
    let mut guest = scratch.boot(&["disk"]);
    guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=8 conv=fsync");
    let sum_of_marker = "dd if=/dev/vda iflag=direct bs=1M count=8 2>/dev/null | sha256sum";
    let marker = guest.run(sum_of_marker);

    for reboot in 1..=2 {
        guest.run(
            "fio --name=load --filename=/dev/vda --offset=16m --size=32m --direct=1 --ioengine=libaio --iodepth=32 \
             --rw=randwrite --bs=4k --time_based --runtime=60 >/dev/null 2>&1 & \
             until [ $(awk '{ print $5 }' /sys/block/vda/stat) -gt 500 ]; do usleep 50000; done",
        );
        guest.reboot();
        assert_eq!(guest.run(sum_of_marker), marker, "after reboot {reboot}");
    }
    guest.power_off();
    server.quit();
}

#[test]
fn a_running_guest_sees_its_disk_grow() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk");
    let server = scratch.serve(&[&disk.writable("")]);
    let mut guest = scratch.boot(&["disk"]);
    let grown = 2 * IMAGE_SIZE;

    server.qmp().execute("block_resize", &json!({ "node-name": "disk", "size": grown }));
    let sees_it = format!("[ $(cat /sys/block/vda/size) = {} ]", grown / 512);
    guest.wait_until(&sees_it, Duration::from_secs(10));
    guest.run(&format!("echo last block | dd of=/dev/vda bs=512 seek={} conv=sync,fsync", grown / 512 - 1));
    guest.power_off();
    server.quit();

    assert_eq!(fs::metadata(&disk.image).unwrap().len(), grown);
    let mut end = [0; 10];
    File::open(&disk.image).unwrap().read_exact_at(&mut end, grown - 512).unwrap();
    assert_eq!(&end, b"last block");
}

#[test]
fn graph_changes_do_not_disturb_a_guest_that_works() {
    let scratch = Scratch::new();
    let disk = scratch.image("disk");
    let other = scratch.image("other");
    let server = scratch.serve(&[&disk.writable("")]);
    let mut guest = scratch.boot(&["disk"]);
    guest.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt");

    let mut qmp = server.qmp();
    let runtime = Duration::from_secs(10);
    guest.start(&format!(
        "fio --name=job --directory=/mnt --direct=1 --ioengine=libaio --iodepth=8 --rw=randrw --bs=4k --size=8m \
         --fsync=32 --numjobs=2 --verify=crc32c --verify_fatal=1 --time_based --runtime={} --minimal && umount /mnt",
        runtime.as_secs()
    ));
    let started = Instant::now();
    let mut rounds = 0;
    // It ends before fio does, so that every change meets a working guest.
    while started.elapsed() < runtime - Duration::from_secs(2) {
        change_the_graph_beside(&mut qmp, &other);
        rounds += 1;
    }
    guest.finish(Duration::from_secs(90));
    guest.power_off();
    drop(qmp);
    server.quit();

    assert!(rounds >= 5, "only {rounds} rounds of changes");
    disk.assert_clean_ext4();
}

/// The chain grows from two images to ten below a guest that works with both of its queues.
#[test]
fn snapshots_of_a_qcow2_disk_do_not_disturb_a_guest_that_works() {
    let scratch = Scratch::new();
    let chain: Vec<String> = (0..10).map(|number| scratch.qcow2(number)).collect();
    let base = scratch.fill(&chain[0]);
    let threads = ["thread0", "thread1"].map(|id| format!("iothread,id={id}"));
    let mut arguments: Vec<&str> = threads.iter().flat_map(|thread| ["--object", thread]).collect();
    let node = json!({ "driver": "qcow2", "node-name": "layer1", "discard": "unmap", "file": file(&chain[1]),
        "backing": { "driver": "qcow2", "node-name": "layer0", "file": file(&chain[0]) } });
    let mapping = [0, 1].map(|queue| json!({ "iothread": format!("thread{queue}"), "vqs": [queue] }));
    let export = json!({ "type": "vhost-user-blk", "id": "export", "node-name": "layer1", "writable": true, "num-queues": 2,
        "iothread-vq-mapping": mapping, "addr": { "type": "unix", "path": scratch.socket("disk") } });
    let (node, export) = (node.to_string(), export.to_string());
    arguments.extend(["--blockdev", &node, "--export", &export]);
    let server = Server::start(scratch.path(), &arguments);
    let mut guest = scratch.boot(&["disk"]);
    let sum_of_base = "dd if=/dev/vda iflag=direct bs=1M skip=48 2>/dev/null | sha256sum";
    assert_eq!(guest.run(sum_of_base).split(' ').next(), Some(base.as_str()), "what the backing file has");
    guest.run("mkfs.ext4 -q /dev/vda 40M && mount /dev/vda /mnt");

    let mut qmp = server.qmp();
    let runtime = Duration::from_secs(10);
    guest.start(&format!(
        "fio --name=job --directory=/mnt --direct=1 --ioengine=libaio --iodepth=8 --rw=randrw --bs=4k --size=8m \
         --fsync=32 --numjobs=2 --cpus_allowed=0,1 --cpus_allowed_policy=split --verify=crc32c --verify_fatal=1 \
         --time_based --runtime={} --minimal && fstrim /mnt && umount /mnt",
        runtime.as_secs()
    ));
    let started = Instant::now();
    for (number, path) in chain.iter().enumerate().skip(2) {
        let overlay = format!("layer{number}");
        let options = json!({ "driver": "qcow2", "node-name": overlay, "discard": "unmap", "file": file(path),
            "backing": null });
        qmp.execute("blockdev-add", &options);
        let below = format!("layer{}", number - 1);
        // Between one and the next the guest goes on.
        let next = Duration::from_millis(1000 * (number as u64 - 1));
        wait_for("the guest's work", runtime, || (started.elapsed() > next).then_some(()));
        qmp.execute("blockdev-snapshot", &json!({ "node": below, "overlay": overlay }));
    }
    guest.finish(Duration::from_secs(90));
    assert_eq!(guest.run(sum_of_base).split(' ').next(), Some(base.as_str()), "what the backing file has, at the end");
    for queue in ["req.0", "req.1"] {
        let interrupts = guest.run(&format!("awk '/{queue}$/ {{ print $2 + $3 }}' /proc/interrupts"));
        assert_ne!(interrupts, "0", "{queue} never completed anything");
    }
    guest.power_off();
    drop(qmp);
    server.quit();

    chain.iter().for_each(|image| drop(qemu_img(&["check", image])));
    let whole = scratch.image("whole");
    qemu_img(&["convert", "-O", "raw", chain.last().unwrap(), whole.image.to_str().unwrap()]);
    whole.assert_clean_ext4();
}

fn file(path: &str) -> serde_json::Value {
    json!({ "driver": "file", "filename": path, "discard": "unmap" })
}

fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("timeout").args(["60", "qemu-img"]).args(arguments).output().unwrap();
    assert!(output.status.success(), "qemu-img {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Adds and removes nodes, an export and a thread that the guest does not use.
fn change_the_graph_beside(qmp: &mut Qmp, other: &Disk) {
    let file = json!({ "driver": "file", "filename": other.image, "node-name": "other-file" });
    let export = json!({ "type": "vhost-user-blk", "id": "other-export", "node-name": "other", "writable": true,
        "iothread": "other-thread", "addr": { "type": "unix", "path": other.socket } });

    qmp.execute("object-add", &json!({ "qom-type": "iothread", "id": "other-thread" }));
    qmp.execute("blockdev-add", &json!({ "driver": "null-co", "node-name": "nothing", "size": 1 << 20 }));
    qmp.execute("blockdev-add", &file);
    qmp.execute("blockdev-add", &json!({ "driver": "raw", "file": "other-file", "node-name": "other" }));
    qmp.execute("block-export-add", &export);
    qmp.execute("block-export-del", &json!({ "id": "other-export" }));
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED")["id"], "other-export");
    for node in ["other", "other-file", "nothing"] {
        qmp.execute("blockdev-del", &json!({ "node-name": node }));
    }
    qmp.execute("object-del", &json!({ "id": "other-thread" }));
}

/// A folder in memory for one test's images, sockets and logs.
struct Scratch {
    folder: TempDir,
}

impl Scratch {
    fn new() -> Self {
        Self { folder: tempfile::tempdir_in("/dev/shm").unwrap() }
    }

    /// A new image full of holes.
    fn image(&self, name: &'static str) -> Disk {
        let image = self.folder.path().join(format!("{name}.raw"));
        File::create(&image).unwrap().set_len(IMAGE_SIZE).unwrap();
        Disk { name, image, socket: self.socket(name) }
    }

    /// A new qcow2 image that says that it stands on the one before it; gives its path.
    fn qcow2(&self, number: usize) -> String {
        let path = |number: usize| self.path().join(format!("{number}.qcow2")).to_str().unwrap().to_owned();
        let (own, size) = (path(number), IMAGE_SIZE.to_string());
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        let below = number.checked_sub(1).map(path);
        arguments.extend(below.iter().flat_map(|below| ["-u", "-b", below, "-F", "qcow2"]));
        qemu_img(&[&arguments[..], &[&own, &size]].concat());
        own
    }

    /// Random bytes from 48 MiB on; gives their checksum.
    fn fill(&self, image: &str) -> String {
        let script = r#"head -c 16M /dev/urandom > "$2" && qemu-io -f qcow2 -c "write -s $2 48M 16M" "$1" >/dev/null && sha256sum "$2""#;
        let bytes = self.path().join("bytes");
        let output = Command::new("sh").args(["-c", script, "sh", image]).arg(bytes).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.sock"))
    }

    fn serve(&self, disks: &[&[String]]) -> Server {
        self.serve_with(&[], disks)
    }

    fn serve_with(&self, arguments: &[&str], disks: &[&[String]]) -> Server {
        let disks = disks.iter().copied().flatten().map(String::as_str);
        let arguments: Vec<&str> = arguments.iter().copied().chain(disks).collect();
        Server::start(self.path(), &arguments)
    }

    fn boot(&self, disks: &[&str]) -> Guest {
        let sockets: Vec<PathBuf> = disks.iter().map(|name| self.socket(name)).collect();
        let sockets: Vec<&Path> = sockets.iter().map(PathBuf::as_path).collect();
        Guest::boot(self.path(), &sockets)
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// A raw image, and where the server exports it.
struct Disk {
    name: &'static str,
    image: PathBuf,
    socket: PathBuf,
}

impl Disk {
    /// Arguments of a server that exports it for writing, over two queues.
    fn writable(&self, export_options: &str) -> [String; 4] {
        self.arguments("discard=unmap", &format!("writable=on{export_options}"))
    }

    fn read_only(&self, export_options: &str) -> [String; 4] {
        self.arguments("read-only=on", &format!("writable=off{export_options}"))
    }

    fn arguments(&self, node_options: &str, export_options: &str) -> [String; 4] {
        let Self { name, image, socket } = self;
        let (image, socket) = (image.display(), socket.display());
        [
            "--blockdev".to_owned(),
            format!("driver=file,filename={image},node-name={name},{node_options}"),
            "--export".to_owned(),
            format!(
                "type=vhost-user-blk,id={name}-export,node-name={name},addr.type=unix,addr.path={socket},\
                 num-queues=2,{export_options}"
            ),
        ]
    }

    /// What the host has allocated for it, in whole MiB.
    fn allocated_mib(&self) -> u64 {
        fs::metadata(&self.image).unwrap().blocks() * 512 / (1 << 20)
    }

    /// Checks the file system that a guest left on it.
    fn assert_clean_ext4(&self) {
        let output = Command::new("/sbin/e2fsck").arg("-fn").arg(&self.image).output().unwrap();
        assert!(output.status.success(), "e2fsck: {}", String::from_utf8_lossy(&output.stdout));
    }

    /// The checksum of a file in that file system.
    fn sha256_of_file(&self, name: &str) -> String {
        let script = r#"/sbin/debugfs -R "cat $2" "$1" 2>/dev/null | sha256sum"#;
        let output = Command::new("sh").args(["-c", script, "sh"]).arg(&self.image).arg(name).output().unwrap();
        String::from_utf8_lossy(&output.stdout).split(' ').next().unwrap().to_owned()
    }
}

/// In bytes.
const IMAGE_SIZE: u64 = 64 << 20;
