//! Where `trellis-io` is meant to differ from `qemu-io`: the rows of docs/trellis-io.md that can be shown.
use super::support::Bench;

fn ours(image: &str, format: &str, commands: &[&str]) -> (String, String, i32) {
    let bench = Bench::new();
    let mut arguments = vec!["-f", format];
    arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
    arguments.push(image);
    let ran = bench.run_ours(&arguments, "");
    let differences = bench.differences_of_check();
    assert!(differences.is_empty(), "{differences:?}");
    let masked = ran.masked();
    (masked.out, masked.err, masked.code.unwrap())
}

#[test]
fn signals_are_refused() {
    let (_, err, code) = ours("a.raw", "raw", &["sigraise 9", "read -q 0 1"]);
    assert_eq!((err.as_str(), code), ("qemu-io: sigraise: this program sends no signals to itself\n", 1));
}

#[test]
fn nobody_waits_for_a_request_that_cannot_come() {
    let (_, err, code) = ours("a.raw", "raw", &["wait_break A"]);
    assert_eq!((err.as_str(), code), ("qemu-io: Could not wait for 'A': Operation not supported\n", 1));
    let bench = Bench::new();
    let options = "driver=blkdebug,image.driver=raw,image.file.driver=file,image.file.filename=a.raw";
    let ran = bench.run_ours(&["--image-opts", "-c", "break pwritev A", "-c", "wait_break A", options], "");
    assert_eq!(ran.err, "qemu-io: Could not wait for 'A': no request is under way\n");
}

#[test]
fn a_request_that_waits_does_not_keep_an_image_open() {
    let bench = Bench::new();
    let options = "driver=blkdebug,image.driver=raw,image.file.driver=file,image.file.filename=a.raw";
    let ran = bench.run_ours(
        &["--image-opts", "-c", "break pwritev A", "-c", "aio_write 0 4k", "-c", "wait_break A", options],
        "",
    );
    let out = "blkdebug: Suspended request 'A'\nwrote 4096/4096 bytes at offset 0\n4 KiB, 1 ops; *\n";
    assert_eq!((ran.masked().out.as_str(), ran.code), (out, Some(0)));
}

#[test]
fn compressed_clusters_are_written_again() {
    let twice = ["write -P 1 -c 0 64k", "write -P 2 -c 0 64k", "read -P 2 0 64k", "write -c 128k 64k"];
    let (out, err, code) = ours("b.qcow2", "qcow2", &twice);
    assert_eq!((err.as_str(), code), ("", 0), "{out}");
}

#[test]
fn what_was_discarded_over_nothing_is_not_there() {
    let (out, _, code) =
        ours("b.qcow2", "qcow2", &["write -q 0 128k", "discard -q 0 64k", "alloc 0 64k", "read -qP 0 0 64k"]);
    assert_eq!((out.as_str(), code), ("0/65536 bytes allocated at offset 0 bytes\n", 0));
}

#[test]
fn there_is_no_room_for_a_machines_state() {
    let (out, _, code) = ours("b.qcow2", "qcow2", &["write -b 0 512", "read -b 0 512"]);
    assert_eq!(
        (out.as_str(), code),
        ("write failed: Operation not supported\nread failed: Operation not supported\n", 1)
    );
}

#[test]
fn registered_buffers_are_buffers() {
    let (out, err, code) =
        ours("a.raw", "raw", &["aio_write -r 0 512", "aio_flush", "aio_read -r -P 0xcd 0 512", "aio_flush"]);
    assert_eq!((err.as_str(), code, out.lines().count()), ("", 0, 4), "{out}");
}

#[test]
fn a_crash_leaves_an_image_that_can_be_repaired() {
    let bench = Bench::new();
    let ran = bench.run_ours(&["-f", "qcow2", "-c", "write -P 9 0 1M", "-c", "flush", "-c", "abort", "b.qcow2"], "");
    assert_eq!(ran.code, None, "it ends by a signal");
    let ran = bench.run_ours(&["-f", "qcow2", "-c", "read -P 9 0 1M", "-c", "write 1M 64k", "b.qcow2"], "");
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(bench.differences_of_check().is_empty());
}

#[test]
fn what_there_is_no_driver_for_is_named() {
    let bench = Bench::new();
    let ran = bench.run_ours(&["-c", "length", "blkdebug::a.raw"], "");
    assert_eq!(
        (ran.err.as_str(), ran.code),
        ("qemu-io: can't open device blkdebug::a.raw: Unknown protocol 'blkdebug'\n", Some(1))
    );
    let ran = bench.run_ours(&["-T", "x", "a.raw"], "");
    assert!(ran.err.contains("invalid option -- 'T'") && ran.code == Some(1), "{ran:?}");
}
