//! Images that we make: cryptsetup and QEMU open them.

use serde_json::{Value, json};

use crate::bench::with;
use crate::peer::{
    Place, SIZE, WORD, by_qemu, contents, create, described, detached, node, noise, opens, output, run, scribble,
};

fn options(more: &Value) -> Value {
    let plain = json!({ "driver": "luks", "size": SIZE, "key-secret": "s0", "iter-time": 10 });
    with(plain, more)
}

fn in_file(place: &Place, name: &str) -> (String, Value) {
    let path = place.with(name, b"what was there before");
    let file = json!({ "driver": "file", "filename": path });
    (path, file)
}

#[test]
fn others_open_what_we_make() {
    let place = Place::new();
    let key = place.with("word.key", WORD.as_bytes());
    let wrong = place.with("wrong.key", b"wrong horse");
    for (more, words) in [
        (json!({}), ["aes", "xts-plain64", "sha256", "512"]),
        (json!({ "cipher-alg": "aes-128", "hash-alg": "sha512" }), ["aes", "xts-plain64", "sha512", "256"]),
        (
            json!({ "cipher-mode": "cbc", "ivgen-alg": "essiv", "hash-alg": "sha1" }),
            ["aes", "cbc-essiv:sha256", "sha1", "256"],
        ),
        (json!({ "cipher-alg": "aes-192", "cipher-mode": "cbc" }), ["aes", "cbc-plain64", "sha256", "192"]),
        (
            json!({ "cipher-alg": "serpent-256", "ivgen-alg": "plain", "hash-alg": "ripemd160" }),
            ["serpent", "xts-plain", "ripemd160", "512"],
        ),
        (
            json!({ "cipher-alg": "twofish-256", "preallocation": "falloc" }),
            ["twofish", "xts-plain64", "sha256", "512"],
        ),
        (json!({ "preallocation": "full" }), ["aes", "xts-plain64", "sha256", "512"]),
    ] {
        let (path, file) = in_file(&place, "image.luks");
        create(&with(options(&json!({ "file": file })), &more), &[WORD]).unwrap();
        let dump = run("cryptsetup", &["luksDump", &path]);
        for (label, word) in ["Cipher name:", "Cipher mode:", "Hash spec:", "MK bits:"].into_iter().zip(words) {
            let line = dump.lines().find(|line| line.starts_with(label)).unwrap();
            assert_eq!(line.trim_start_matches(label).trim(), word, "{more}: {label}");
        }
        // Other ciphers cryptsetup has from the kernel, whose modules not every machine has.
        let is_aes = words[0] == "aes";
        if is_aes {
            run("cryptsetup", &["open", "--test-passphrase", "--key-file", &key, &path]);
            let refused = output("cryptsetup", &["open", "--test-passphrase", "--key-file", &wrong, &path]);
            assert_eq!(refused.status.code(), Some(2), "{more}: another passphrase opens it");
        }
        let disk = node(&path, "s0");
        let mut model = contents(&disk, &[WORD]).unwrap();
        assert_eq!(model.len(), SIZE);
        scribble(&disk, &[WORD], &mut model, 3);
        // QEMU 10.0 aborts at keys of 24 bytes.
        if words[3] != "192" {
            assert!(by_qemu(&place, &format!("file.filename={path}")) == model, "{more}: QEMU reads something else");
        }
        // Others add a key, and we open the disk with it.
        if is_aes {
            let quick = ["--pbkdf-force-iterations", "1000"];
            run("cryptsetup", &[&["luksAddKey"], &quick[..], &["--key-file", &key, &path, &wrong]].concat());
            assert!(contents(&disk, &["wrong horse"]).unwrap() == model);
        }
    }
}

#[test]
fn a_header_can_be_elsewhere() {
    let place = Place::new();
    let ((path, file), (header, header_file)) = (in_file(&place, "image"), in_file(&place, "header"));
    create(&options(&json!({ "file": file, "header": header_file })), &[WORD]).unwrap();
    let disk = detached(&path, &header, "s0");
    let mut model = contents(&disk, &[WORD]).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE as u64, "the file is the disk");
    scribble(&disk, &[WORD], &mut model, 5);
    assert_eq!(described(&disk, &[WORD])["data"]["detached-header"], true);
    let key = place.with("word.key", WORD.as_bytes());
    run("cryptsetup", &["open", "--test-passphrase", "--key-file", &key, "--header", &header, &path]);
    let image_opts = format!("file.filename={path},header.driver=file,header.filename={header}");
    assert!(by_qemu(&place, &image_opts) == model);
    // The header alone.
    create(&options(&json!({ "header": header_file })), &[WORD]).unwrap();
    assert!(contents(&disk, &[WORD]).unwrap() != model, "there is a new key");
}

/// On a device nothing can be cut off: the second copy of an older image of LUKS2 must not be found when the new header is gone.
#[test]
fn no_older_header_is_left_on_a_device() {
    let place = Place::new();
    let key = place.with("word.key", WORD.as_bytes());
    let quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", &key];
    for size in ["16k", "256k", "4m"] {
        let len = 24 << 20;
        let path = place.empty("device", len);
        let format = ["-q", "luksFormat", "--type", "luks2", "--luks2-metadata-size", size];
        run("cryptsetup", &[&format[..], &quick, &[&path]].concat());
        let file = json!({ "driver": "raw", "size": len, "file": { "driver": "file", "filename": path } });
        create(&options(&json!({ "file": file, "cipher-alg": "aes-128" })), &[WORD]).unwrap();
        opens(&node(&path, "s0"), &[WORD]).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[..6].fill(0);
        std::fs::write(&path, bytes).unwrap();
        let refused = opens(&node(&path, "s0"), &[WORD]).unwrap_err();
        assert!(refused.contains("not in LUKS format"), "{size}: {refused}");
    }
}

/// A device that is too small keeps what it has.
#[test]
fn a_device_without_room_is_left_alone() {
    let place = Place::new();
    let before = noise(5, 3 << 20);
    let (path, small) = (place.with("device", &before), place.with("small", &before));
    let device = |path: &str, size: u64| json!({ "driver": "raw", "size": size, "file": { "driver": "file", "filename": path } });
    let (file, few) = (device(&path, 3 << 20), device(&small, 1 << 20));
    let encrypt = json!({ "format": "luks", "key-secret": "s0", "iter-time": 1 });
    let qcow2 = json!({ "driver": "qcow2", "size": SIZE, "file": few });
    for new in [
        options(&json!({ "file": file, "size": 2 << 20 })),
        options(&json!({ "file": file, "header": few, "size": SIZE })),
        options(&json!({ "file": few, "header": file, "size": 2 << 20 })),
        options(&json!({ "header": few })),
        with(qcow2.clone(), &json!({ "encrypt": encrypt })),
        with(qcow2.clone(), &json!({ "preallocation": "full" })),
        with(qcow2, &json!({ "file": file, "data-file": few, "size": 2 << 20, "preallocation": "metadata" })),
    ] {
        let refused = create(&new, &[WORD]).unwrap_err();
        assert!(refused.ends_with("no space left"), "{refused}");
        for path in [&path, &small] {
            assert!(std::fs::read(path).unwrap() == before, "{new}: something was written");
        }
    }
}

#[test]
fn what_cannot_be_made_is_refused() {
    let place = Place::new();
    let (path, file) = in_file(&place, "image.luks");
    let refused = |more: Value| create(&options(&more), &[WORD]).unwrap_err();
    let of = |more: Value| refused(with(json!({ "file": file }), &more));
    assert_eq!(refused(json!({})), "Parameter 'file' is missing");
    assert_eq!(of(json!({ "key-secret": "s1" })), "No secret with id 's1'");
    assert_eq!(of(json!({ "iter-time": 0 })), "'iter-time' must not be 0");
    assert!(of(json!({ "iter-time": u64::MAX })).starts_with("'iter-time' is at most 20000 ms"));
    assert!(of(json!({ "iter-time": 100_000_000 })).starts_with("'iter-time' is at most 20000 ms"));
    assert_eq!(of(json!({ "size": 100 })), "Image size must be a multiple of 512 bytes, and at most 8 EiB");
    assert!(of(json!({ "size": i64::MAX - 511 })).starts_with("The disk is too large"));
    assert_eq!(of(json!({ "preallocation": "metadata" })), "Unsupported preallocation mode 'metadata'");
    assert!(of(json!({ "cipher-alg": "cast5-128" })).starts_with("XTS needs blocks of 16 bytes"));
    assert!(of(json!({ "cipher-alg": "des" })).contains("does not accept value 'des'"));
    assert!(of(json!({ "cipher-mode": "cbc", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha1" })).starts_with("ESSIV"));
    let missing = json!({ "driver": "luks", "size": SIZE, "file": file });
    assert_eq!(create(&missing, &[WORD]).unwrap_err(), "Parameter 'key-secret' is required for cipher");
    assert_eq!(std::fs::read(&path).unwrap(), b"what was there before", "a refusal changes nothing");
    assert!(opens(&node(&path, "s0"), &[WORD]).unwrap_err().contains("not in LUKS format"));
}
