//! Images as the tools open them: guessed, followed, locked, refused. `qemu-img` makes them and holds them.

#![expect(clippy::unwrap_used, reason = "a test stops where its machine fails it")]

use std::path::Path;
use std::process::Command;

use block_core::base::{ByteRange, IoError};
use block_core::graph::{Findings, Preallocation, WriteFlags};
use block_core::pipeline::Content;
use block_core::rt::IoBuf;
use tempfile::TempDir;
use trellis_image::{FileName, Given, Session, words};

fn qemu(program: &str, words: &[&str], folder: &Path) {
    let done = Command::new(program).args(words).current_dir(folder).output().unwrap();
    assert!(done.status.success(), "{program} {words:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A chain of three, with a sector of its own in each layer.
fn chain() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    qemu("qemu-img", &["create", "-q", "-f", "raw", "base.raw", "1M"], at);
    qemu("qemu-io", &["-f", "raw", "-c", "write -P 1 0 512", "base.raw"], at);
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.qcow2"], at);
    qemu("qemu-io", &["-c", "write -P 2 64k 512", "mid.qcow2"], at);
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2"], at);
    qemu("qemu-io", &["-c", "write -P 3 128k 512", "top.qcow2"], at);
    folder
}

fn path(folder: &TempDir, name: &str) -> String {
    folder.path().join(name).to_str().unwrap().to_owned()
}

fn refused(given: Given) -> String {
    Session::run("t", async |session| match session.open(&given).await {
        Ok(image) => {
            image.close().await.unwrap();
            panic!("it was opened")
        }
        Err(error) => words(&error),
    })
}

/// The byte that a sector is full of.
fn sector(given: Given, at: u64) -> u8 {
    Session::run("t", async |session| {
        let image = session.open(&given).await.unwrap();
        let bytes = image.disk().read_vec(ByteRange::new(at, 512).unwrap()).await.unwrap();
        image.close().await.unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]));
        bytes[0]
    })
}

#[test]
fn a_chain_is_followed_whatever_the_way_it_is_named() {
    let folder = chain();
    let top = path(&folder, "top.qcow2");
    let json = format!("json:{{\"driver\":\"qcow2\",\"file\":{{\"driver\":\"file\",\"filename\":\"{top}\"}}}}");
    let flat = format!("json:{{\"file.filename\":\"{top}\"}}");
    let options = |text: String| Given::of(FileName::Options(text));
    let with_format = Given { format: Some("qcow2".to_owned()), ..Given::named(&top) };
    let ways = [
        Given::named(&top),
        with_format,
        Given::named(json),
        Given::named(flat),
        options(format!("driver=qcow2,file.filename={top}")),
        options(format!("file.filename={top}")),
        Given::named(format!("file:{top}")),
    ];
    for given in ways {
        for (at, byte) in [(0, 1), (64 << 10, 2), (128 << 10, 3), (192 << 10, 0)] {
            assert_eq!(sector(given.clone(), at), byte, "{given:?}");
        }
    }
    let alone = Given { no_backing: true, ..Given::named(&top) };
    assert_eq!((sector(alone.clone(), 0), sector(alone, 128 << 10)), (0, 3));
    let raw = Given { format: Some("raw".to_owned()), ..Given::named(&top) };
    Session::run("t", async |session| {
        let image = session.open(&raw).await.unwrap();
        assert_eq!(image.disk().read_vec(ByteRange::whole(4)).await.unwrap(), b"QFI\xfb");
        image.close().await.unwrap();
    });
}

#[test]
fn what_cannot_be_opened_is_said_in_qemus_words() {
    let folder = chain();
    let at = |name: &str| path(&folder, name);
    let missing = at("none");
    assert_eq!(refused(Given::named(&missing)), format!("Could not open '{missing}': No such file or directory"));
    let unknown = Given { format: Some("nosuch".to_owned()), ..Given::named(at("top.qcow2")) };
    assert_eq!(refused(unknown), "Unknown driver 'nosuch'");
    assert_eq!(refused(Given::named("nbd:localhost")), "Unknown protocol 'nbd'");
    let other = Given { format: Some("qcow2".to_owned()), ..Given::named(at("base.raw")) };
    assert_eq!(refused(other), "Image is not in qcow2 format");
    std::fs::remove_file(at("base.raw")).unwrap();
    let lost = format!(
        "Could not open backing file: Could not open backing file: Could not open '{}': No such file or directory",
        at("base.raw")
    );
    assert_eq!(refused(Given::named(at("top.qcow2"))), lost);
    std::fs::write(at("x.vmdk"), [&b"KDMV\x01\0\0\0"[..], &[0; 512]].concat()).unwrap();
    assert_eq!(
        refused(Given::named(at("x.vmdk"))),
        "The image seems to be in the format 'vmdk', which is not supported"
    );
}

#[test]
fn a_chain_without_an_end_is_refused() {
    let folder = chain();
    let rebase = ["rebase", "-u", "-b", "top.qcow2", "-F", "qcow2", "mid.qcow2"];
    qemu("qemu-img", &rebase, folder.path());
    let text = refused(Given::named(path(&folder, "top.qcow2")));
    assert!(text.ends_with("creates an infinite loop."), "{text}");
}

#[test]
fn another_program_that_writes_keeps_us_out_unless_we_share() {
    let folder = chain();
    let top = path(&folder, "top.qcow2");
    Session::run("t", async |session| {
        let writer = session.open(&Given { writable: true, ..Given::named(&top) }).await.unwrap();
        let other = Command::new("qemu-img").args(["info", &top]).output().unwrap();
        assert!(!other.status.success());
        let ours = Given::named(&top);
        let text = words(&session.open(&ours).await.err().unwrap());
        assert!(text.contains("lock\nIs another process using the image ["), "{text}");
        let shared = session.open(&Given { force_share: true, ..ours }).await.unwrap();
        shared.close().await.unwrap();
        writer.close().await.unwrap();
    });
    qemu("qemu-img", &["check", "-q", &top], folder.path());
}

#[test]
fn a_disk_whose_format_is_a_guess_does_not_become_an_image() {
    let folder = chain();
    let raw = path(&folder, "base.raw");
    let magic = |at: u64| (ByteRange::new(at, 8).unwrap(), IoBuf::from_slice(b"QFI\xfb\0\0\0\x03").unwrap());
    Session::run("t", async |session| {
        let guess = Given { writable: true, quiet: true, ..Given::named(&raw) };
        let image = session.open(&guess).await.unwrap();
        let disk = image.disk();
        let (at, bytes) = magic(0);
        assert_eq!(disk.write(at, bytes, WriteFlags::default()).await, Err(IoError::Os(1)));
        disk.write_zeroes(ByteRange::whole(512), WriteFlags::default()).await.unwrap();
        // One byte is enough to make it one.
        let head = IoBuf::from_slice(b"QFI\xfb\0\0\0").unwrap();
        disk.write(ByteRange::whole(7), head, WriteFlags::default()).await.unwrap();
        let last = ByteRange::new(7, 1).unwrap();
        let version = IoBuf::from_slice(&[3]).unwrap();
        assert_eq!(disk.write(last, version, WriteFlags::default()).await, Err(IoError::Os(1)));
        let (at, bytes) = magic(512);
        disk.write(at, bytes, WriteFlags::default()).await.unwrap();
        image.close().await.unwrap();
        let said = Given { format: Some("raw".to_owned()), ..guess };
        let image = session.open(&said).await.unwrap();
        let (at, bytes) = magic(0);
        image.disk().write(at, bytes, WriteFlags::default()).await.unwrap();
        image.close().await.unwrap();
    });
}

#[test]
fn what_the_image_can_do_can_be_asked_of_it() {
    let folder = chain();
    let top = path(&folder, "top.qcow2");
    Session::run("t", async |session| {
        let image = session.open(&Given { writable: true, resizes: true, ..Given::named(&top) }).await.unwrap();
        assert_eq!((image.size(), image.driver.as_str()), (1 << 20, "qcow2"));
        image.resize(2 << 20, Preallocation::Off).await.unwrap();
        let disk = image.disk();
        let (at, bytes) = (ByteRange::new(1 << 20, 4).unwrap(), IoBuf::from_slice(b"abcd").unwrap());
        disk.write(at, bytes, WriteFlags::default()).await.unwrap();
        disk.write_zeroes(ByteRange::whole(4096), WriteFlags::default()).await.unwrap();
        disk.flush().await.unwrap();
        let status = disk.status(ByteRange::whole(4096)).await.unwrap();
        assert_eq!((disk.read_vec(at).await.unwrap(), status.content), (b"abcd".to_vec(), Content::Data));
        assert_eq!(disk.size().await, 2 << 20);
        let mut findings = Findings::default();
        let report = image.check_listing(block_core::graph::Repair::Nothing, &mut findings).await.unwrap();
        assert!(report.is_consistent() && findings == Findings::default());
        assert_eq!(image.snapshots().unwrap(), []);
        image.close().await.unwrap();
    });
    qemu("qemu-io", &["-r", "-c", "read -P 0 0 4096", "-c", "read -P 0x61 1M 1", &top], folder.path());
    qemu("qemu-img", &["check", "-q", &top], folder.path());
}

/// What an encrypted image says of itself needs no key; its disk does, and stays as it is.
#[test]
fn an_image_without_its_key_tells_of_itself_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (at, secret) = (folder.path(), ["--object", "secret,id=s,data=hello"]);
    let keys = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    for (format, options, name) in [("luks", "key-secret=s,iter-time=10", "a.luks"), ("qcow2", keys, "a.qcow2")] {
        qemu("qemu-img", &[&["create", "-q"][..], &secret, &["-f", format, "-o", options, name, "1M"]].concat(), at);
    }
    let key = ["--image-opts", "-c", "write -P 1 0 64k", "driver=qcow2,encrypt.key-secret=s,file.filename=a.qcow2"];
    qemu("qemu-io", &[&secret[..], &key].concat(), at);
    for name in ["a.luks", "a.qcow2"] {
        Session::run("t", async |session| {
            let given = Given { locked: true, ..Given::named(path(&folder, name)) };
            let image = session.open(&given).await.unwrap();
            let info = image.info().await;
            assert!(info.encrypted && info.specific.unwrap().to_string().contains("\"cipher-alg\":\"aes-256\""));
            let read = image.disk().read_vec(ByteRange::whole(512)).await;
            assert_eq!(read.unwrap_err(), IoError::Unsupported, "{name}");
            image.close().await.unwrap();
            let writable = session.open(&Given { writable: true, ..given }).await;
            let refused = writable.err().unwrap().full();
            assert!(refused.contains("An image that is not opened with a key can only be read"), "{refused}");
        });
    }
    assert!(refused(Given::named(path(&folder, "a.luks"))).contains("'key-secret' is required"));
}
