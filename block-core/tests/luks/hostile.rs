//! Headers with one thing wrong (IMG-111 to IMG-116): none is opened, none costs more than it may, none ends the process.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::peer::{Place, SIZE, WORD, create, node, opens, run};
use crate::random::Random;

fn luks1(place: &Place) -> String {
    let path = place.with("image.luks", b"");
    let file = json!({ "driver": "file", "filename": path });
    let options = json!({ "driver": "luks", "size": SIZE, "key-secret": "s0", "iter-time": 1, "file": file });
    create(&options, &[WORD]).unwrap();
    path
}

/// The image with some bytes changed is refused at once, with a sentence that has `expected` in it.
fn refused(path: &str, good: &[u8], changes: &[(usize, &[u8])], expected: &str) {
    let mut bytes = good.to_vec();
    for (at, field) in changes {
        bytes[*at..at + field.len()].copy_from_slice(field);
    }
    refused_as(path, &bytes, expected);
}

fn refused_as(path: &str, bytes: &[u8], expected: &str) {
    std::fs::write(path, bytes).unwrap();
    let begun = Instant::now();
    let refused = opens(&node(path, "s0"), &[WORD]).unwrap_err();
    assert!(refused.contains(expected), "{refused:?} instead of {expected:?}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{expected}: that was too much work");
}

/// An image with some bytes changed, each row in turn: at, the bytes, and what is said. Each field by itself is tested at the
/// header's parser.
fn each_refused(rows: &[(usize, &[u8], &str)]) {
    let place = Place::new();
    let path = luks1(&place);
    let good = std::fs::read(&path).unwrap();
    for (at, field, expected) in rows {
        refused(&path, &good, &[(*at, field)], expected);
    }
}

const MOST: &[u8] = &u32::MAX.to_be_bytes();
const SLOT_0: usize = 208;
const SLOT_LEN: usize = 48;

#[test]
fn img_111_a_version_that_there_is_not() {
    each_refused(&[
        (6, &[0, 0], "LUKS version 0 is not supported"),
        (6, &[0, 3], "LUKS version 3 is not supported"),
        (6, MOST, "LUKS version 65535 is not supported"),
    ]);
}

#[test]
fn img_112_a_payload_behind_the_end() {
    each_refused(&[(104, MOST, "behind the end of the file"), (104, &[0; 4], "lies over the payload")]);
    let place = Place::new();
    let path = luks1(&place);
    let good = std::fs::read(&path).unwrap();
    for len in [0, 6, 8, 591, 592, 4096, 200_000, 2_000_000] {
        std::fs::write(&path, &good[..len]).unwrap();
        opens(&node(&path, "s0"), &[WORD]).unwrap_err();
    }
}

#[test]
fn img_113_key_slots_that_overlap() {
    each_refused(&[
        (SLOT_0 + SLOT_LEN + 40, &9u32.to_be_bytes(), "key slots 0 and 1 overlaps"),
        (SLOT_0 + 7 * SLOT_LEN + 40, &8u32.to_be_bytes(), "key slots 0 and 7 overlaps"),
        (SLOT_0 + 40, &[0; 4], "lies over the header"),
        (SLOT_0 + 2 * SLOT_LEN + 40, MOST, "lies over the payload"),
    ]);
}

#[test]
fn img_114_no_active_slot() {
    each_refused(&[
        (SLOT_0, &0xdeadu32.to_be_bytes(), "No key slot of the image is in use"),
        (SLOT_0, &7u32.to_be_bytes(), "neither active nor inactive"),
    ]);
}

#[test]
fn img_115_iterations_without_number() {
    each_refused(&[
        (SLOT_0 + 4, MOST, "4294967295 iterations of PBKDF2"),
        (164, MOST, "4294967295 iterations of PBKDF2"),
        (SLOT_0 + 4, &[0; 4], "no iterations of PBKDF2"),
    ]);
    // A slot and the digest, each of which is within the budget alone.
    let place = Place::new();
    let path = luks1(&place);
    let good = std::fs::read(&path).unwrap();
    let dear = 101_000_000u32.to_be_bytes();
    refused(&path, &good, &[(164, &dear), (SLOT_0 + 4, &dear)], "101000000 iterations of PBKDF2");
}

#[test]
fn img_116_stripes_ciphers_hashes_and_keys_that_there_are_not() {
    each_refused(&[
        (SLOT_0 + 44, MOST, "4294967295 stripes"),
        (SLOT_0 + 44, &[0; 4], "0 stripes"),
        (8, b"rot\0", "The cipher 'rot' is not supported"),
        (40, b"xts-plain65\0", "The cipher mode 'xts-plain65' is not supported"),
        (72, b"crc32\0\0", "The hash 'crc32' is not supported"),
        (108, &1u32.to_be_bytes(), "A key of 1 bytes does not fit"),
        (108, &[0; 4], "A key of 0 bytes does not fit"),
        (108, MOST, "Keys have at most 64 bytes"),
    ]);
}

/// A LUKS2 header whose JSON has been changed, with sums that are right.
struct Json {
    path: String,
    image: Vec<u8>,
    tree: Value,
}

impl Json {
    fn new(place: &Place) -> Self {
        let path = place.empty("image2.luks", (16 << 20) + SIZE as u64);
        let key = place.with("word.key", WORD.as_bytes());
        let quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", &key];
        run("cryptsetup", &[&["-q", "luksFormat", "--type", "luks2"], &quick[..], &[&path]].concat());
        let image = std::fs::read(&path).unwrap();
        let text = image[4096..0x4000].split(|byte| *byte == 0).next().unwrap();
        let tree = serde_json::from_slice(text).unwrap();
        Self { path, image, tree }
    }

    /// Both copies with another text.
    fn with_text(&self, text: &[u8]) -> Vec<u8> {
        let mut image = self.image.clone();
        for start in COPIES {
            put(&mut image, start, text, 3);
        }
        image
    }

    fn refused(&self, place: &str, value: Value, expected: &str) {
        let mut tree = self.tree.clone();
        *tree.pointer_mut(place).unwrap() = value;
        refused_as(&self.path, &self.with_text(tree.to_string().as_bytes()), expected);
    }
}

/// Another text and another sequence in the copy that begins at `start`.
fn put(image: &mut [u8], start: usize, text: &[u8], sequence: u64) {
    let area = &mut image[start + 4096..start + 0x4000];
    area.fill(0);
    area[..text.len()].copy_from_slice(text);
    image[start + 16..start + 24].copy_from_slice(&sequence.to_be_bytes());
    image[start + 448..start + 512].fill(0);
    let sum = block_core::codec::hash::Hash::Sha256.digest(&[&image[start..start + 0x4000]]);
    image[start + 448..start + 480].copy_from_slice(sum.expose());
}

const COPIES: [usize; 2] = [0, 0x4000];

/// The younger copy says what is to be done with the disk, even if it says something that we do not know.
#[test]
fn the_older_copy_is_not_asked_behind_the_youngers_back() {
    let place = Place::new();
    let json = Json::new(&place);
    let good = json.tree.to_string();
    let changed = |place: &str, value: Value| {
        let mut tree = json.tree.clone();
        *tree.pointer_mut(place).unwrap() = value;
        tree.to_string()
    };
    let two = json!({ "0": json.tree["segments"]["0"], "1": json.tree["segments"]["0"] });
    let mut with_integrity = json.tree["segments"]["0"].clone();
    with_integrity["integrity"] = json!({ "type": "hmac(sha256)" });
    for (text, expected) in [
        (
            changed("/config", json!({ "requirements": { "mandatory": ["online-reencrypt"] } })),
            "needs 'online-reencrypt'",
        ),
        (changed("/config", json!({ "requirements": 7 })), "no valid 'requirements'"),
        (changed("/segments", two), "several segments"),
        (changed("/segments/0", with_integrity), "integrity protection"),
        (changed("/keyslots/0/type", json!("reencrypt")), "type 'reencrypt'"),
    ] {
        for (younger, older) in [(0, 1), (1, 0)] {
            let mut image = json.image.clone();
            put(&mut image, COPIES[younger], text.as_bytes(), 8);
            put(&mut image, COPIES[older], good.as_bytes(), 7);
            refused_as(&json.path, &image, expected);
            // Of the same age: the first one.
            put(&mut image, COPIES[older], good.as_bytes(), 8);
            std::fs::write(&json.path, &image).unwrap();
            let opened = opens(&node(&json.path, "s0"), &[WORD]);
            assert_eq!(opened.is_err(), younger == 0, "{expected}: {opened:?}");
            // The younger one is not whole: the older one is what there is.
            image[COPIES[younger] + 5000] ^= 1;
            std::fs::write(&json.path, &image).unwrap();
            opens(&node(&json.path, "s0"), &[WORD]).unwrap();
        }
        // The first magic is gone.
        let mut image = json.image.clone();
        put(&mut image, COPIES[1], text.as_bytes(), 8);
        image[0] = b'X';
        refused_as(&json.path, &image, expected);
    }
}

/// What a header has many of, and what nobody needs, takes neither memory nor time; nor does it stop the thread that asks.
#[test]
fn a_header_with_much_in_it() {
    let place = Place::new();
    let json = Json::new(&place);
    // Only the first one counts.
    let rows = |name: &str, count: usize| {
        let mut rows = json.tree[name].clone();
        (1..count).for_each(|number| rows[number.to_string()] = json!({}));
        rows
    };
    for name in ["digests", "keyslots"] {
        std::fs::write(&json.path, json.with_text(replaced(&json.tree, name, rows(name, 32)).as_bytes())).unwrap();
        opens(&node(&json.path, "s0"), &[WORD]).unwrap();
    }
    json.refused("/digests", rows("digests", 33), "more than 32 digests");
    json.refused("/keyslots", rows("keyslots", 33), "more than 32 keyslots");
    let many = |name: &str, count: usize| json!(vec![name; count]);
    json.refused("/digests/0/keyslots", many("0", 33), "no valid 'keyslots'");
    json.refused("/digests/0/segments", many("0", 33), "no digest for its segment");
    json.refused("/config", json!({ "requirements": { "mandatory": many("", 33) } }), "no valid 'requirements'");
    json.refused("/segments", json!({ "0": json.tree["segments"]["0"], "x".repeat(129): {} }), "JSON cannot be read");
    json.refused("/segments/0/offset", json!("0".repeat(128) + "1"), "no valid 'offset'");
    // What is not known does no harm.
    let tokens =
        json!({ "0": { "type": "x", "keyslots": [[[{ "deep": [null, true, -1, 0.5, "text"] }]]] }, "1": 7, "2": null });
    let mut tree = json.tree.clone();
    tree["tokens"] = tokens;
    tree["keyslots"]["7"] = json!("a slot that nobody names");
    tree["keyslots"]["0"]["kdf"]["more"] = json!([1, 2, 3]);
    std::fs::write(&json.path, json.with_text(tree.to_string().as_bytes())).unwrap();
    opens(&node(&json.path, "s0"), &[WORD]).unwrap();
}

fn replaced(tree: &Value, name: &str, value: Value) -> String {
    let mut tree = tree.clone();
    tree[name] = value;
    tree.to_string()
}

#[test]
fn luks2_headers() {
    let place = Place::new();
    let json = Json::new(&place);
    std::fs::write(&json.path, json.with_text(json.tree.to_string().as_bytes())).unwrap();
    opens(&node(&json.path, "s0"), &[WORD]).unwrap();
    let slot = "/keyslots/0";
    let argon2 = |passes: u64, memory: u64, cpus: u64| {
        let salt = json.tree["keyslots"]["0"]["kdf"]["salt"].clone();
        json!({ "type": "argon2id", "time": passes, "memory": memory, "cpus": cpus, "salt": salt })
    };
    let kdf = &format!("{slot}/kdf");
    json.refused(&format!("{kdf}/iterations"), json!(u32::MAX), "4294967295 iterations of PBKDF2");
    json.refused(&format!("{kdf}/iterations"), json!(0), "no iterations");
    json.refused(&format!("{kdf}/iterations"), json!(1u64 << 32), "no valid 'iterations'");
    json.refused(&format!("{kdf}/iterations"), json!(-1), "no valid 'iterations'");
    json.refused(&format!("{kdf}/hash"), json!("whirlpool"), "The hash 'whirlpool' is not supported");
    json.refused(&format!("{kdf}/salt"), json!("%%"), "no valid 'salt'");
    json.refused(&format!("{kdf}/salt"), json!("AAAA".repeat(1000)), "no valid 'salt'");
    json.refused(kdf, argon2(4, u32::MAX.into(), 1), "KiB of memory for Argon2");
    json.refused(kdf, argon2(u32::MAX.into(), 1 << 20, 1), "passes of Argon2");
    json.refused(kdf, argon2(4, 1 << 20, 4_000_000), "no valid 'cpus'");
    json.refused(kdf, argon2(0, 1 << 10, 1), "no valid 'kdf'");
    json.refused(kdf, argon2(1, 1, 4), "no valid 'kdf'");
    json.refused(kdf, json!({ "type": "scrypt", "salt": "AAAA" }), "The key derivation 'scrypt' is not supported");
    json.refused("/digests/0/iterations", json!(u32::MAX), "4294967295 iterations of PBKDF2");
    json.refused("/digests/0/digest", json!("AAAA"), "no valid 'digest'");
    json.refused("/digests/0/keyslots", json!([]), "No key slot of the image leads to its key");
    json.refused("/digests/0/segments", json!(["7"]), "no digest for its segment");
    json.refused(&format!("{slot}/af/stripes"), json!(u32::MAX), "4294967295 stripes");
    json.refused(&format!("{slot}/key_size"), json!(1), "A key of 1 bytes does not fit");
    json.refused(&format!("{slot}/key_size"), json!(1u64 << 40), "no valid 'key_size'");
    json.refused(&format!("{slot}/area/offset"), json!("0"), "lies over the header");
    json.refused(&format!("{slot}/area/offset"), json!("1"), "too short for its key");
    json.refused(&format!("{slot}/area/offset"), json!(u64::MAX.to_string()), "no valid 'area'");
    json.refused(&format!("{slot}/area/offset"), json!("16777216"), "lies over the payload");
    json.refused(&format!("{slot}/area/size"), json!("512"), "too short for its key");
    json.refused(&format!("{slot}/area/encryption"), json!("rot-xts-plain64"), "The cipher 'rot' is not supported");
    json.refused(&format!("{slot}/type"), json!("reencrypt"), "A key slot of type 'reencrypt' is not supported");
    json.refused("/segments/0/offset", json!("9223372036854775808"), "behind the end of the file");
    json.refused("/segments/0/offset", json!("32768"), "lies over the payload");
    json.refused("/segments/0/offset", json!("0"), "The payload lies over the header");
    json.refused("/segments/0/size", json!("1099511627776"), "behind the end of the file");
    json.refused("/segments/0/sector_size", json!(0), "no valid 'sector_size'");
    json.refused("/segments/0/sector_size", json!(65536), "no valid 'sector_size'");
    json.refused("/segments/0/type", json!("linear"), "A segment of type 'linear' is not supported");
    json.refused("/segments/0/encryption", json!("cipher_null-ecb"), "The cipher 'cipher_null' is not supported");
    // Text of others is repeated in part, and cannot end a line of a log.
    let long = format!("rot\u{1b}[2J\n{}", "x".repeat(80));
    let repeated = "rot\\u{1b}[2J\\nxxxxxxxxxxxxxxxxxx' is not supported";
    for (place, value) in [
        ("/segments/0/encryption", long.clone()),
        ("/segments/0/encryption", format!("aes-{long}")),
        ("/segments/0/encryption", format!("aes-cbc-essiv:{long}")),
        ("/segments/0/type", long.clone()),
        ("/digests/0/hash", long.clone()),
        ("/digests/0/type", long.clone()),
        ("/keyslots/0/af/hash", long.clone()),
        ("/keyslots/0/kdf/type", long.clone()),
        ("/keyslots/0/area/encryption", long.clone()),
    ] {
        json.refused(place, json!(value), repeated);
    }
    json.refused("/segments", json!({}), "several segments, or none");
    json.refused(
        "/config",
        json!({ "requirements": { "mandatory": ["online-reencrypt"] } }),
        "needs 'online-reencrypt'",
    );
    let mut with_integrity = json.tree.clone();
    with_integrity["segments"]["0"]["integrity"] = json!({ "type": "hmac(sha256)" });
    let image = json.with_text(with_integrity.to_string().as_bytes());
    refused_as(&json.path, &image, "integrity protection");
    for text in ["", "null", "[", "{}", "{\"a\":", &"[".repeat(10_000)] {
        refused_as(&json.path, &json.with_text(text.as_bytes()), "The header's JSON");
    }
}

/// Bytes of the header and of the JSON at random: opened, or refused with a sentence, and soon.
#[test]
fn random_headers() {
    let place = Place::new();
    let json = Json::new(&place);
    let (path1, mut random) = (luks1(&place), Random(11));
    let good = std::fs::read(&path1).unwrap();
    for round in 0..300 {
        let mut bytes = good.clone();
        for _ in 0..=random.below(3) {
            bytes[random.below(592) as usize] = random.below(256) as u8;
        }
        std::fs::write(&path1, &bytes).unwrap();
        // Iterations that are within the budget may still take a minute: they are another test's.
        let heavy = [164, 212].iter().any(|at| bytes[*at..at + 4] != good[*at..at + 4]);
        if !heavy {
            let _ = opens(&node(&path1, "s0"), &[WORD]);
        }
        if round % 3 == 0 {
            let mut text = json.tree.to_string().into_bytes();
            let at = random.below(text.len() as u64) as usize;
            if !text[at].is_ascii_digit() {
                text[at] = b' ' + random.below(95) as u8;
            }
            std::fs::write(&json.path, json.with_text(&text)).unwrap();
            let _ = opens(&node(&json.path, "s0"), &[WORD]);
        }
    }
}
