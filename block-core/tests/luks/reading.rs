//! Images of others: we read what they wrote, and they read what we write.

use serde_json::Value;

use crate::peer::{
    OBJECT, Place, SIZE, WORD, by_qemu, contents, described, detached, node, noise, opens, run, scribble,
};

/// Every cipher, mode, generator and hash that QEMU has and we have; but QEMU 10.0 aborts at keys of 24 bytes, whose material
/// is no whole number of sectors.
#[test]
fn images_of_qemu() {
    let place = Place::new();
    let plain = noise(1, SIZE);
    let source = place.with("plain.raw", &plain);
    for (number, options) in [
        "",
        "cipher-alg=aes-128,hash-alg=sha512",
        "cipher-alg=aes-192,hash-alg=sha1",
        "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
        "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=plain,hash-alg=sha384",
        "cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=plain64,ivgen-hash-alg=sha1,hash-alg=ripemd160",
        "cipher-alg=aes-256,cipher-mode=ecb,hash-alg=sha224",
        "cipher-alg=serpent-256,ivgen-alg=plain",
        "cipher-alg=serpent-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
        "cipher-alg=twofish-256,hash-alg=sha512",
        "cipher-alg=twofish-128,cipher-mode=cbc",
        "cipher-alg=cast5-128,cipher-mode=cbc,ivgen-alg=plain64",
    ]
    .into_iter()
    .enumerate()
    {
        let image = place.file("image.luks");
        let own = format!("key-secret=word,iter-time=10{}{options}", if options.is_empty() { "" } else { "," });
        let arguments = ["convert", "--object", OBJECT, "-f", "raw", "-O", "luks", "-o", &own, &source, &image];
        run("qemu-img", &arguments);
        let (disk, mut model) = (node(&image, "s0"), plain.clone());
        assert!(contents(&disk, &[WORD]).unwrap() == model, "'{options}': we read something else");
        scribble(&disk, &[WORD], &mut model, number as u64 * 100);
        assert!(by_qemu(&place, &format!("file.filename={image}")) == model, "'{options}': QEMU reads something else");
        assert_eq!(described(&disk, &[WORD])["data"], described_by_qemu(&image), "'{options}'");
    }
}

/// What `qemu-img info` says of an image.
fn described_by_qemu(image: &str) -> Value {
    let source = format!("driver=luks,file.filename={image}");
    let said = run("qemu-img", &["info", "--output=json", "--image-opts", &source]);
    serde_json::from_str::<Value>(&said).unwrap()["format-specific"]["data"].take()
}

/// A label is the operator's, in whatever words: nothing follows from it.
#[test]
fn luks2_with_a_label() {
    let place = Place::new();
    let (path, key) = (place.empty("image.luks", 20 << 20), place.with("word.key", WORD.as_bytes()));
    let quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", &key];
    let format = ["-q", "luksFormat", "--type", "luks2", "--label", "Größe \u{1f511}"];
    run("cryptsetup", &[&format[..], &quick, &[&path]].concat());
    opens(&node(&path, "s0"), &[WORD]).unwrap();
}

/// cryptsetup's LUKS1, with several slots; QEMU says what the disk has. Other ciphers than AES cryptsetup has from the kernel,
/// whose modules not every machine has.
#[test]
fn luks1_of_cryptsetup() {
    let place = Place::new();
    let words = [WORD, "battery", "staple"];
    let files: Vec<String> = words.iter().map(|word| place.with(&format!("{word}.key"), word.as_bytes())).collect();
    for (cipher, bits, hash) in [
        ("aes-xts-plain64", "512", "sha256"),
        ("aes-xts-plain64", "256", "sha1"),
        ("aes-cbc-essiv:sha256", "256", "sha512"),
        ("aes-cbc-essiv:sha256", "192", "ripemd160"),
    ] {
        let image = place.empty("image.luks", (2 << 20) + SIZE as u64);
        let quick = ["--pbkdf-force-iterations", "1000"];
        let format = ["-q", "luksFormat", "--type", "luks1", "--cipher", cipher, "--key-size", bits, "--hash", hash];
        run("cryptsetup", &[&format[..], &quick, &["--key-file", &files[0], &image]].concat());
        for file in &files[1..] {
            run("cryptsetup", &[&["luksAddKey"], &quick[..], &["--key-file", &files[0], &image, file]].concat());
        }
        let disk = node(&image, "s0");
        let mut model = contents(&disk, &[WORD]).unwrap();
        assert!(!model.is_empty());
        for (seed, word) in words.into_iter().enumerate() {
            scribble(&disk, &[word], &mut model, seed as u64);
        }
        if bits != "192" {
            assert!(by_qemu(&place, &format!("file.filename={image}")) == model, "{cipher}: QEMU reads something else");
        }
        assert!(contents(&disk, &[WORD]).unwrap() == model);
        run("cryptsetup", &["-q", "luksKillSlot", &image, "1", "--key-file", &files[0]]);
        let refused = opens(&disk, &[words[1]]).unwrap_err();
        assert!(refused.ends_with("Invalid password, cannot unlock any keyslot"), "{refused}");
        opens(&disk, &[words[2]]).unwrap();
    }
}

/// cryptsetup encrypts a disk in place (LUKS2, its header in a file of its own): we read what was there, and what we write
/// is there when cryptsetup has decrypted it again.
#[test]
fn luks2_of_cryptsetup() {
    let place = Place::new();
    let key = place.with("word.key", WORD.as_bytes());
    for (cipher, bits, sector, kdf) in [
        ("aes-xts-plain64", "512", "4096", &["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"][..]),
        ("aes-xts-plain64", "256", "512", &ARGON2ID),
        ("aes-cbc-essiv:sha256", "256", "2048", &ARGON2I),
        ("aes-xts-plain", "512", "1024", &ARGON2ID),
    ] {
        let plain = noise(2, SIZE);
        let (image, header) = (place.with("image", &plain), place.empty("header", 16 << 20));
        let how = ["--type", "luks2", "--cipher", cipher, "--key-size", bits, "--sector-size", sector];
        let reencrypt = ["-q", "reencrypt", "--resilience", "none", "--header", &header, "--key-file", &key];
        run("cryptsetup", &[&reencrypt[..], &["--encrypt"], &how, kdf, &[&image]].concat());
        let (disk, mut model) = (detached(&image, &header, "s0"), plain);
        assert!(std::fs::read(&image).unwrap() != model, "{cipher}: nothing was encrypted");
        assert!(contents(&disk, &[WORD]).unwrap() == model, "{cipher}, {sector}: we read something else");
        scribble(&disk, &[WORD], &mut model, 7);
        let data = &described(&disk, &[WORD])["data"];
        assert_eq!((&data["version"], &data["detached-header"]), (&2.into(), &true.into()));
        let decrypt = ["--decrypt", "--force-offline-reencrypt", &image];
        run("cryptsetup", &[&reencrypt[..], &decrypt].concat());
        assert!(std::fs::read(&image).unwrap() == model, "{cipher}, {sector}: cryptsetup reads something else");
    }
}

/// The header in the image, several slots with different derivations, and one that is only used where it is named.
#[test]
fn slots_of_luks2() {
    let place = Place::new();
    let words = [WORD, "battery", "staple"];
    let files: Vec<String> = words.iter().map(|word| place.with(&format!("{word}.key"), word.as_bytes())).collect();
    let image = place.empty("image.luks", (16 << 20) + SIZE as u64);
    let pbkdf2 = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    let format = ["-q", "luksFormat", "--type", "luks2", "--sector-size", "4096", "--luks2-metadata-size", "32k"];
    run("cryptsetup", &[&format[..], &ARGON2ID, &["--key-file", &files[0], &image]].concat());
    let more = [&["--hash", "sha512"][..], &pbkdf2].concat();
    for (file, how) in files[1..].iter().zip([&more[..], &ARGON2I]) {
        run("cryptsetup", &[&["luksAddKey"], how, &["--key-file", &files[0], &image, file]].concat());
    }
    let disk = node(&image, "s0");
    let mut model = contents(&disk, &[WORD]).unwrap();
    assert_eq!(model.len(), SIZE);
    for (seed, word) in words.into_iter().enumerate() {
        scribble(&disk, &[word], &mut model, seed as u64);
        assert!(contents(&disk, &[WORD]).unwrap() == model);
    }
    run("cryptsetup", &["config", "--key-slot", "2", "--priority", "ignore", &image]);
    opens(&disk, &[words[1]]).unwrap();
    opens(&disk, &[words[2]]).unwrap_err();
    // The first copy is damaged: the second one opens it, and nothing is repaired.
    let mut bytes = std::fs::read(&image).unwrap();
    for at in [0, 8, 300, 5000] {
        bytes[at] ^= 1;
        std::fs::write(&image, &bytes).unwrap();
        opens(&disk, &[WORD]).unwrap_or_else(|refused| panic!("byte {at}: {refused}"));
        assert!(std::fs::read(&image).unwrap() == bytes);
        bytes[at] ^= 1;
    }
    bytes[5000] ^= 1;
    bytes[0x8000 + 5000] ^= 1;
    std::fs::write(&image, &bytes).unwrap();
    let refused = opens(&disk, &[WORD]).unwrap_err();
    assert!(refused.ends_with("The header's checksum is wrong"), "{refused}");
}

const ARGON2ID: [&str; 8] = argon2("argon2id");
const ARGON2I: [&str; 8] = argon2("argon2i");

const fn argon2(name: &str) -> [&str; 8] {
    ["--pbkdf", name, "--pbkdf-memory", "64", "--pbkdf-force-iterations", "4", "--pbkdf-parallel", "2"]
}
