//! Key slots inside qcow2 images are changed by us and by QEMU in turn, in use and not; both see the same slots.

use std::collections::BTreeSet;
use std::rc::Rc;

use block_core::catalog::{self, AmendOptions, BlockdevRef, QCryptoBlockAmendOptionsLuks};
use block_core::graph::WriteFlags;
use block_core::rt::run_control;
use serde_json::{Value, json};

use crate::bench::{add, attach, flush, io_thread, started, with, write, writer};
use crate::in_qcow2::{check_with, image, keys};
use crate::peer::{Place, SIZE, WORD, contents, create, graph, noise, opens, output, run, scribble};

const WORDS: [&str; 4] = [WORD, "battery", "staple", "donkey"];

fn made(place: &Place, more: &Value) -> String {
    let path = place.with("image.qcow2", b"");
    let file = json!({ "driver": "file", "filename": path });
    let encrypt = json!({ "format": "luks", "key-secret": "s0", "iter-time": 1 });
    let options = json!({ "driver": "qcow2", "size": SIZE, "file": file, "encrypt": encrypt });
    create(&with(options, more), &WORDS).unwrap();
    path
}

fn disk(path: &str, secret: &str) -> Value {
    let mut disk = image(path, "luks");
    disk["encrypt"]["key-secret"] = secret.into();
    disk
}

/// `x-blockdev-amend` of a node that was opened with this secret.
fn amend(path: &str, opened_with: &str, change: &Value, force: bool) -> Result<(), String> {
    run_control(async |_| {
        let graph = graph(&WORDS);
        let node = add(&graph, disk(path, opened_with)).await.unwrap();
        let encrypt = with(json!({ "format": "luks" }), change);
        let options = qmp::schema::from_value(json!({ "driver": "qcow2", "encrypt": encrypt }));
        let options = options.map_err(|error: qmp::Error| error.desc)?;
        let amended = catalog::amend(&graph, node, options, force).await.map_err(|error| error.full());
        graph.permit().remove(node).await.unwrap();
        amended
    })
}

/// What `amend` of the image tool does.
fn amend_unused(path: &str, options: &AmendOptions, keys: Option<&Value>, force: bool) -> Result<(), String> {
    run_control(async |_| {
        let graph = graph(&WORDS);
        let keys: Option<QCryptoBlockAmendOptionsLuks> =
            keys.map(|keys| qmp::schema::from_value(keys.clone()).unwrap());
        let file = qmp::schema::from_value(json!({ "driver": "file", "filename": path })).unwrap();
        let file = BlockdevRef::Definition(Box::new(file));
        let amended = catalog::amend_image(&graph, &file, options, keys.as_ref(), force).await;
        amended.map_err(|error| error.full())
    })
}

/// The same by QEMU; `opened_with` is a number in [`WORDS`], `change` says `s1` of the second.
fn amend_by_qemu(path: &str, opened_with: usize, change: &str) {
    let objects = WORDS
        .iter()
        .enumerate()
        .flat_map(|(number, word)| ["--object".to_owned(), format!("secret,id=s{number},data={word}")]);
    let source = format!("driver=qcow2,encrypt.format=luks,encrypt.key-secret=s{opened_with},file.filename={path}");
    let rest = ["--force", "--image-opts", &source, "-o", change].map(str::to_owned);
    let arguments: Vec<String> = ["amend".to_owned()].into_iter().chain(objects).chain(rest).collect();
    run("qemu-img", &arguments.iter().map(String::as_str).collect::<Vec<_>>());
}

/// The words that open the disk, as we see it and as QEMU does.
fn open_it(path: &str) -> BTreeSet<&'static str> {
    let opening = WORDS.into_iter().filter(|word| {
        let ours = opens(&disk(path, "s0"), &[word]).is_ok();
        let object = format!("secret,id=word,data={word}");
        let source = format!("driver=qcow2,encrypt.format=luks,encrypt.key-secret=word,file.filename={path}");
        let read = ["--object", &object, "-c", "read 0 4k", "--image-opts", &source];
        assert_eq!(ours, output("qemu-io", &read).status.success(), "{word}");
        ours
    });
    opening.collect()
}

#[test]
fn passphrases_come_and_go_while_the_image_is_in_use() {
    let place = Place::new();
    for more in [json!({}), json!({ "cluster-size": 512, "version": "v2" })] {
        let path = made(&place, &more);
        let mut model = contents(&disk(&path, "s0"), &WORDS).unwrap();
        scribble(&disk(&path, "s0"), &WORDS, &mut model, 9);
        let on = |more: Value| with(json!({ "state": "active", "iter-time": 1 }), &more);
        let off = |more: Value| with(json!({ "state": "inactive" }), &more);
        amend(&path, "s0", &on(json!({ "new-secret": "s1" })), false).unwrap();
        amend(&path, "s0", &on(json!({ "new-secret": "s2", "keyslot": 7, "secret": "s1" })), false).unwrap();
        assert_eq!(open_it(&path), [WORDS[0], WORDS[1], WORDS[2]].into());
        let refused = |change: Value| amend(&path, "s0", &change, false).unwrap_err();
        let used = refused(on(json!({ "new-secret": "s3", "keyslot": 7 })));
        assert_eq!(used, "Keyslot 7 is in use: it has to be erased first");
        assert!(refused(on(json!({ "new-secret": "s3", "secret": "s3" }))).starts_with("Invalid password"));
        assert!(refused(off(json!({ "old-secret": "s3" }))).starts_with("The old secret opens no keyslot"));
        amend(&path, "s2", &off(json!({ "keyslot": 0 })), false).unwrap();
        amend(&path, "s2", &off(json!({ "old-secret": "s1" })), false).unwrap();
        assert_eq!(open_it(&path), [WORDS[2]].into());
        let last = amend(&path, "s2", &off(json!({ "keyslot": 7 })), false).unwrap_err();
        assert_eq!(last, "No keyslot would be left, and the disk would be lost for good: this needs 'force'");
        let only = amend(&path, "s2", &on(json!({ "new-secret": "s3", "keyslot": 7 })), true).unwrap_err();
        assert!(only.starts_with("Keyslot 7 is the only one in use"), "{only}");
        assert!(contents(&disk(&path, "s2"), &WORDS).unwrap() == model, "{more}: the disk is what it was");
        check(&path, 2);
        amend(&path, "s2", &off(json!({ "keyslot": 7 })), true).unwrap();
        assert!(opens(&disk(&path, "s2"), &WORDS).unwrap_err().contains("No key slot of the image is in use"));
    }
}

/// A slot that is not in use may say that its material is anywhere: it is not filled there, nor overwritten.
#[test]
fn a_slot_without_room_stays_as_it_is() {
    let place = Place::new();
    let path = made(&place, &json!({}));
    let mut model = vec![0; SIZE];
    scribble(&disk(&path, "s0"), &WORDS, &mut model, 4);
    let (mut bytes, keys) = (std::fs::read(&path).unwrap(), keys(&path));
    for slot in [1, 5] {
        // Behind the last byte of the place that the keys have; two slots do not overlap.
        let sector = (keys.len() as u32).div_ceil(512) - 1 + slot * 1024;
        let at = keys.start + 208 + slot as usize * 48 + 40;
        bytes[at..at + 4].copy_from_slice(&sector.to_be_bytes());
    }
    std::fs::write(&path, &bytes).unwrap();
    for change in [
        json!({ "state": "active", "new-secret": "s1", "iter-time": 1, "keyslot": 5 }),
        json!({ "state": "active", "new-secret": "s1", "iter-time": 1, "keyslot": 1 }),
        json!({ "state": "inactive", "keyslot": 5 }),
    ] {
        let refused = amend(&path, "s0", &change, true).unwrap_err();
        assert!(refused.ends_with("has no room in the header"), "{change}: {refused}");
        assert!(std::fs::read(&path).unwrap() == bytes, "{change}: something was written");
    }
    // The first free one that has room. QEMU does not open the image: it asks the slots that are not in use as well.
    amend(&path, "s0", &json!({ "state": "active", "new-secret": "s1", "iter-time": 1 }), false).unwrap();
    assert!(contents(&disk(&path, "s1"), &WORDS).unwrap() == model);
    amend(&path, "s0", &json!({ "state": "inactive", "keyslot": 2 }), false).unwrap();
    assert!(opens(&disk(&path, "s1"), &WORDS).is_err(), "it was slot 2");
    assert!(contents(&disk(&path, "s0"), &WORDS).unwrap() == model);
}

/// QEMU finds the image in order.
fn check(path: &str, opened_with: usize) {
    check_with(path, &format!("secret,id=word,data={}", WORDS[opened_with]));
}

/// QEMU's changes and ours, one upon the other; offline ones too.
#[test]
fn slots_are_what_qemu_makes_of_them() {
    let place = Place::new();
    let path = made(&place, &json!({}));
    let none = AmendOptions::default();
    let fill = json!({ "state": "active", "iter-time": 1, "new-secret": "s2", "secret": "s0" });
    amend_by_qemu(&path, 0, "encrypt.state=active,encrypt.new-secret=s1,encrypt.keyslot=3,encrypt.iter-time=10");
    assert_eq!(open_it(&path), [WORDS[0], WORDS[1]].into());
    amend_unused(&path, &none, Some(&fill), false).unwrap();
    assert_eq!(open_it(&path), [WORDS[0], WORDS[1], WORDS[2]].into());
    amend_by_qemu(&path, 2, "encrypt.state=inactive,encrypt.old-secret=s0");
    assert_eq!(open_it(&path), [WORDS[1], WORDS[2]].into());
    // Both at once: another slot, and other features.
    let both = AmendOptions { refcount_bits: Some(64), lazy_refcounts: Some(true), ..none.clone() };
    let filled = json!({ "state": "active", "iter-time": 1, "new-secret": "s3", "secret": "s2", "keyslot": 0 });
    amend_unused(&path, &both, Some(&filled), false).unwrap();
    assert_eq!(open_it(&path), [WORDS[1], WORDS[2], WORDS[3]].into());
    let erased = json!({ "state": "inactive", "keyslot": 3 });
    amend_unused(&path, &none, Some(&erased), false).unwrap();
    amend_unused(&path, &none, Some(&json!({ "state": "inactive", "old-secret": "s2" })), false).unwrap();
    assert_eq!(open_it(&path), [WORDS[3]].into());
    check(&path, 3);
    let last = json!({ "state": "inactive", "old-secret": "s3" });
    let refused = |keys: &Value| amend_unused(&path, &none, Some(keys), false).unwrap_err();
    assert!(refused(&last).contains("No keyslot would be left"));
    let unsaid = json!({ "state": "active", "iter-time": 1, "new-secret": "s2" });
    assert_eq!(refused(&unsaid), "What opens the image now has to be given");
    assert!(refused(&with(unsaid, &json!({ "secret": "s0" }))).starts_with("Invalid password"));
    amend_unused(&path, &none, Some(&last), true).unwrap();
    assert!(opens(&disk(&path, "s3"), &WORDS).unwrap_err().contains("No key slot of the image is in use"));
}

/// All else that can be amended of any image can be of an encrypted one; QEMU makes the same of a copy.
#[test]
fn an_encrypted_image_is_amended_as_others_are() {
    let place = Place::new();
    let path = made(&place, &json!({}));
    let mut model = vec![0; SIZE];
    scribble(&disk(&path, "s0"), &WORDS, &mut model, 4);
    let copy = place.file("copy.qcow2");
    let none = AmendOptions::default();
    for (ours, theirs) in [
        (AmendOptions { refcount_bits: Some(1), ..none.clone() }, "refcount_bits=1"),
        (AmendOptions { lazy_refcounts: Some(true), ..none.clone() }, "lazy_refcounts=on"),
        (AmendOptions { version: Some(2), refcount_bits: Some(16), ..none.clone() }, "compat=0.10,refcount_bits=16"),
        (AmendOptions { version: Some(3), ..none.clone() }, "compat=1.1"),
    ] {
        std::fs::copy(&path, &copy).unwrap();
        amend_by_qemu(&copy, 0, theirs);
        amend_unused(&path, &ours, None, false).unwrap();
        assert_eq!(described(&path), described(&copy), "{theirs}");
        check(&path, 0);
        assert!(contents(&disk(&path, "s0"), &WORDS).unwrap() == model, "{theirs}");
    }
}

fn described(path: &str) -> Value {
    let source = format!("driver=qcow2,encrypt.format=luks,encrypt.key-secret=s0,file.filename={path}");
    let object = format!("secret,id=s0,data={WORD}");
    let info = run("qemu-img", &["info", "--output=json", "--object", &object, "--image-opts", &source]);
    serde_json::from_str::<Value>(&info).unwrap()["format-specific"].clone()
}

#[test]
fn what_has_no_slots_is_refused() {
    let place = Place::new();
    let plain = place.file("plain.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &plain, "1M"]);
    let erase = json!({ "state": "inactive", "keyslot": 0 });
    let refused = amend_unused(&plain, &AmendOptions::default(), Some(&erase), true).unwrap_err();
    assert_eq!(refused, "image is not encrypted, can't amend");
    let path = made(&place, &json!({}));
    let before = std::fs::read(&path).unwrap();
    run_control(async |_| {
        let graph = graph(&WORDS);
        let refused = async |options: Value, change: Value| {
            let node = add(&graph, options).await.unwrap();
            let change = qmp::schema::from_value(change).unwrap();
            let amended = catalog::amend(&graph, node, change, true).await.map_err(|error| error.full());
            graph.permit().remove(node).await.unwrap();
            amended.err().unwrap_or_default()
        };
        let file = json!({ "driver": "file", "filename": plain });
        let plain = json!({ "driver": "qcow2", "node-name": "plain", "file": file });
        let erase = json!({ "driver": "qcow2", "encrypt": with(json!({ "format": "luks" }), &erase) });
        assert_eq!(refused(plain, erase.clone()).await, "image is not encrypted, can't amend");
        let read_only = with(disk(&path, "s0"), &json!({ "read-only": true }));
        assert_eq!(refused(read_only, erase.clone()).await, "The node is read-only");
        let other = json!({ "driver": "luks", "state": "inactive", "keyslot": 0 });
        assert_eq!(refused(disk(&path, "s0"), other).await, "The node's driver is 'qcow2', not 'luks'");
        assert_eq!(refused(disk(&path, "s0"), json!({ "driver": "qcow2" })).await, "", "nothing is to change");
    });
    assert!(std::fs::read(&path).unwrap() == before);
}

/// Guest data keeps coming while slots are filled and erased, and clusters are given out around the header.
#[test]
fn a_guest_writes_beside_a_change() {
    let place = Place::new();
    let path = made(&place, &json!({ "cluster-size": 4096 }));
    let model = run_control(async |_| {
        let graph = graph(&WORDS);
        let node = add(&graph, disk(&path, "s0")).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let thread = io_thread();
        let guest = started(&thread, &port.handle(), async move |lane| {
            let mut model = vec![0; SIZE];
            for round in 0..400usize {
                let (start, bytes) = (round * 37 % 250 * 4096 + round, noise(round as u64, 5000));
                write(&lane, start as u64, &bytes, WriteFlags::default()).await.unwrap();
                model[start..start + 5000].copy_from_slice(&bytes);
                if round % 50 == 0 {
                    flush(&lane).await.unwrap();
                }
            }
            model
        });
        let changes = [
            json!({ "state": "active", "iter-time": 20, "new-secret": "s1" }),
            json!({ "state": "active", "iter-time": 20, "new-secret": "s2" }),
            json!({ "state": "inactive", "old-secret": "s1" }),
            json!({ "state": "inactive", "keyslot": 0 }),
        ];
        for change in changes {
            let encrypt = with(json!({ "format": "luks" }), &change);
            let options = qmp::schema::from_value(json!({ "driver": "qcow2", "encrypt": encrypt })).unwrap();
            // What opened the node opens the image no more, once its slot is erased.
            catalog::amend(&graph, node, options, false).await.unwrap();
        }
        let model = guest.await.unwrap();
        port.detach(&mut graph.permit()).await;
        graph.permit().remove(node).await.unwrap();
        model
    });
    assert_eq!(open_it(&path), [WORDS[2]].into());
    assert!(contents(&disk(&path, "s2"), &WORDS).unwrap() == model);
    check(&path, 2);
}

/// Another program has changed the header: it is not written as we remember it.
#[test]
fn a_header_in_an_image_that_somebody_else_changed_stays() {
    let place = Place::new();
    let path = made(&place, &json!({}));
    let at = std::fs::read(&path).unwrap().windows(6).position(|window| window == b"LUKS\xba\xbe").unwrap();
    run_control(async |_| {
        let graph: Rc<_> = graph(&WORDS);
        let node = add(&graph, disk(&path, "s0")).await.unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        // A salt of slot 7.
        bytes[at + 208 + 7 * 48 + 8] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let encrypt = json!({ "format": "luks", "state": "inactive", "keyslot": 3 });
        let options = qmp::schema::from_value(json!({ "driver": "qcow2", "encrypt": encrypt })).unwrap();
        let refused = catalog::amend(&graph, node, options, false).await.unwrap_err().full();
        assert!(refused.contains("changed by somebody else"), "{refused}");
        assert!(std::fs::read(&path).unwrap() == bytes);
        graph.permit().remove(node).await.unwrap();
    });
}
