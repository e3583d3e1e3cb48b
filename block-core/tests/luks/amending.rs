//! Key slots are changed while the disk is in use; cryptsetup and QEMU see the same slots.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use block_core::catalog;
use block_core::rt::run_control;
use serde_json::{Value, json};

use crate::bench::{add, with};
use crate::peer::{Place, SIZE, WORD, contents, create, detached, graph, node, opens, output, run, scribble};

const WORDS: [&str; 4] = [WORD, "battery", "staple", "donkey"];

fn made(place: &Place) -> String {
    let path = place.with("image.luks", b"");
    let file = json!({ "driver": "file", "filename": path });
    create(&json!({ "driver": "luks", "size": SIZE, "key-secret": "s0", "iter-time": 1, "file": file }), &WORDS)
        .unwrap();
    path
}

/// `x-blockdev-amend` of a node that was opened with the secret `s0`, by default.
fn amend(path: &str, opened_with: &str, change: &Value, force: bool) -> Result<(), String> {
    amend_node(node(path, opened_with), change, force)
}

fn amend_node(disk: Value, change: &Value, force: bool) -> Result<(), String> {
    run_control(async |_| {
        let graph = graph(&WORDS);
        let node = add(&graph, disk).await.unwrap();
        let options = with(json!({ "driver": "luks" }), change);
        let options = qmp::schema::from_value(options).map_err(|error: qmp::Error| error.desc)?;
        let amended = catalog::amend(&graph, node, options, force).await.map_err(|error| error.full());
        graph.permit().remove(node).await.unwrap();
        amended
    })
}

/// The words that open the disk, as we see it; cryptsetup has to see the same.
fn open_it(place: &Place, path: &str) -> BTreeSet<&'static str> {
    let opening = WORDS.into_iter().filter(|word| {
        let ours = opens(&node(path, "s0"), &[word]).is_ok();
        let key = place.with("one.key", word.as_bytes());
        let theirs = output("cryptsetup", &["open", "--test-passphrase", "--key-file", &key, path]).status.success();
        assert_eq!(ours, theirs, "{word}");
        ours
    });
    opening.collect()
}

fn active(path: &str) -> usize {
    run("cryptsetup", &["luksDump", path]).lines().filter(|line| line.ends_with(": ENABLED")).count()
}

#[test]
fn passphrases_come_and_go() {
    let place = Place::new();
    let path = made(&place);
    let mut model = contents(&node(&path, "s0"), &WORDS).unwrap();
    scribble(&node(&path, "s0"), &WORDS, &mut model, 9);
    let on = |more: Value| with(json!({ "state": "active", "iter-time": 1 }), &more);
    let off = |more: Value| with(json!({ "state": "inactive" }), &more);
    amend(&path, "s0", &on(json!({ "new-secret": "s1" })), false).unwrap();
    amend(&path, "s0", &on(json!({ "new-secret": "s2", "keyslot": 7 })), false).unwrap();
    amend(&path, "s0", &on(json!({ "new-secret": "s2", "keyslot": 4, "secret": "s1" })), false).unwrap();
    assert_eq!(open_it(&place, &path), [WORDS[0], WORDS[1], WORDS[2]].into());
    assert_eq!(active(&path), 4);
    let refused = |change: Value| amend(&path, "s0", &change, false).unwrap_err();
    assert_eq!(
        refused(on(json!({ "new-secret": "s3", "keyslot": 7 }))),
        "Keyslot 7 is in use: it has to be erased first"
    );
    assert_eq!(refused(on(json!({ "new-secret": "s3", "keyslot": 8 }))), "There is no key slot 8: they are 0 to 7");
    assert_eq!(refused(on(json!({ "new-secret": "s3", "keyslot": -1 }))), "There is no key slot -1: they are 0 to 7");
    assert_eq!(refused(on(json!({}))), "'new-secret' is required to activate a keyslot");
    assert_eq!(refused(on(json!({ "new-secret": "s9" }))), "No secret with id 's9'");
    assert!(refused(on(json!({ "new-secret": "s3", "secret": "s3" }))).starts_with("Invalid password"));
    assert!(refused(on(json!({ "new-secret": "s3", "old-secret": "s1" }))).contains("'old-secret' must not"));
    assert!(refused(off(json!({ "new-secret": "s3", "keyslot": 0 }))).contains("'new-secret' must not"));
    assert!(refused(off(json!({ "iter-time": 5, "keyslot": 0 }))).contains("'iter-time' must not"));
    assert!(refused(off(json!({}))).starts_with("Either 'keyslot' or 'old-secret'"));
    assert!(refused(off(json!({ "old-secret": "s3" }))).starts_with("The old secret opens no keyslot"));
    assert_eq!(refused(off(json!({ "keyslot": 5, "old-secret": "s1" }))), "Keyslot 5 is not in use");
    assert_eq!(refused(on(json!({ "new-secret": "s3", "iter-time": 0 }))), "'iter-time' must not be 0");
    let long = refused(on(json!({ "new-secret": "s3", "iter-time": 2_000_000 })));
    assert_eq!(long, "'iter-time' is at most 20000 ms, not 2000000");
    assert_eq!(active(&path), 4, "a refusal changes nothing");
    // All slots with this word.
    amend(&path, "s0", &off(json!({ "old-secret": "s2" })), false).unwrap();
    assert_eq!(open_it(&place, &path), [WORDS[0], WORDS[1]].into());
    amend(&path, "s1", &off(json!({ "keyslot": 0 })), false).unwrap();
    assert_eq!(open_it(&place, &path), [WORDS[1]].into());
    assert!(contents(&node(&path, "s1"), &WORDS).unwrap() == model, "the disk is what it was");
    // While it is being overwritten a slot opens nothing, so it cannot be the only one.
    let only = amend(&path, "s1", &on(json!({ "new-secret": "s3", "keyslot": 1 })), true).unwrap_err();
    assert!(only.starts_with("Keyslot 1 is the only one in use"), "{only}");
    amend(&path, "s1", &on(json!({ "new-secret": "s2", "keyslot": 0 })), false).unwrap();
    amend(&path, "s1", &on(json!({ "new-secret": "s3", "keyslot": 1 })), true).unwrap();
    assert_eq!(open_it(&place, &path), [WORDS[2], WORDS[3]].into());
    amend(&path, "s2", &off(json!({ "keyslot": 0 })), false).unwrap();
    assert_eq!(open_it(&place, &path), [WORDS[3]].into());
    for change in [json!({ "keyslot": 1 }), json!({ "old-secret": "s3" })] {
        let refused = amend(&path, "s3", &off(change), false).unwrap_err();
        assert_eq!(refused, "No keyslot would be left, and the disk would be lost for good: this needs 'force'");
    }
    assert!(contents(&node(&path, "s3"), &WORDS).unwrap() == model);
    amend(&path, "s3", &off(json!({ "keyslot": 1 })), true).unwrap();
    assert_eq!(active(&path), 0);
    assert!(opens(&node(&path, "s3"), &WORDS).unwrap_err().contains("No key slot of the image is in use"));
}

/// The slots are in the file of the header, which has room for as many as it has.
#[test]
fn a_detached_header_is_changed() {
    let place = Place::new();
    let (path, header) = (place.with("image", b""), place.with("header", b""));
    let file = |path: &str| json!({ "driver": "file", "filename": path });
    let options = json!({ "driver": "luks", "size": SIZE, "key-secret": "s0", "iter-time": 1, "file": file(&path),
                          "header": file(&header) });
    create(&options, &WORDS).unwrap();
    let disk = detached(&path, &header, "s0");
    let mut model = contents(&disk, &WORDS).unwrap();
    scribble(&disk, &WORDS, &mut model, 3);
    let before = std::fs::read(&path).unwrap();
    let on = |slot| json!({ "state": "active", "iter-time": 1, "new-secret": "s1", "keyslot": slot });
    let off = |slot| json!({ "state": "inactive", "keyslot": slot });
    amend_node(disk.clone(), &on(7), false).unwrap();
    amend_node(disk.clone(), &off(0), false).unwrap();
    assert!(std::fs::read(&path).unwrap() == before, "the disk's file has no slots");
    for (word, fits) in [(WORDS[0], false), (WORDS[1], true)] {
        let key = place.with("one.key", word.as_bytes());
        let theirs = output("cryptsetup", &["open", "--test-passphrase", "--key-file", &key, &header]).status.success();
        assert_eq!((opens(&disk, &[word]).is_ok(), theirs), (fits, fits), "{word}");
    }
    let disk = detached(&path, &header, "s1");
    assert!(contents(&disk, &WORDS).unwrap() == model);
    amend_node(disk, &json!({ "state": "active", "iter-time": 1, "new-secret": "s2", "keyslot": 0 }), false).unwrap();
    // A file that ends before the last slot.
    let disk = detached(&path, &header, "s2");
    amend_node(disk.clone(), &off(7), false).unwrap();
    let mut short = std::fs::read(&header).unwrap();
    short.truncate(short.len() - 512);
    std::fs::write(&header, &short).unwrap();
    for change in [on(7), off(7)] {
        let refused = amend_node(disk.clone(), &change, true).unwrap_err();
        assert_eq!(refused, "Keyslot 7 has no room in the header");
        assert!(std::fs::read(&header).unwrap() == short, "{change}");
    }
    amend_node(disk, &on(6), false).unwrap();
}

/// With the header as it was before, an erased slot opens nothing: its material is gone.
#[test]
fn an_erased_slot_is_overwritten() {
    let place = Place::new();
    let path = made(&place);
    amend(&path, "s0", &json!({ "state": "active", "iter-time": 1, "new-secret": "s1" }), false).unwrap();
    let before = std::fs::read(&path).unwrap();
    amend(&path, "s0", &json!({ "state": "inactive", "keyslot": 1 }), false).unwrap();
    let mut after = std::fs::read(&path).unwrap();
    after[..592].copy_from_slice(&before[..592]);
    std::fs::write(&path, after).unwrap();
    opens(&node(&path, "s0"), &WORDS).unwrap();
    opens(&node(&path, "s1"), &WORDS).unwrap_err();
}

#[test]
fn all_slots_can_be_filled() {
    let place = Place::new();
    let path = made(&place);
    let more = json!({ "state": "active", "iter-time": 1, "new-secret": "s1" });
    for _ in 1..8 {
        amend(&path, "s0", &more, false).unwrap();
    }
    assert_eq!(amend(&path, "s0", &more, false).unwrap_err(), "All keyslots are in use");
    assert_eq!(active(&path), 8);
}

/// An erased slot whose material could not be overwritten then is erased once more.
#[test]
fn an_erased_slot_can_be_erased_again() {
    let place = Place::new();
    let path = made(&place);
    amend(&path, "s0", &json!({ "state": "active", "iter-time": 1, "new-secret": "s1" }), false).unwrap();
    let before = std::fs::read(&path).unwrap();
    amend(&path, "s0", &json!({ "state": "inactive", "keyslot": 1 }), false).unwrap();
    // As if the noise had not been written.
    let after = std::fs::read(&path).unwrap();
    let half = [&after[..592], &before[592..]].concat();
    std::fs::write(&path, &half).unwrap();
    amend(&path, "s0", &json!({ "state": "inactive", "keyslot": 1 }), false).unwrap();
    let now = std::fs::read(&path).unwrap();
    assert!(now[..592] == half[..592] && now[592..] != half[592..]);
    assert_eq!(open_it(&place, &path), [WORDS[0]].into());
}

/// Another program has changed the header: it is not written as we remember it.
#[test]
fn a_header_that_somebody_else_changed_stays() {
    let place = Place::new();
    let path = made(&place);
    run_control(async |_| {
        let graph = graph(&WORDS);
        let node = add(&graph, node(&path, "s0")).await.unwrap();
        // A salt of slot 7.
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[208 + 7 * 48 + 8] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        for change in [
            json!({ "state": "active", "iter-time": 1, "new-secret": "s1" }),
            json!({ "state": "inactive", "keyslot": 3 }),
        ] {
            let options = qmp::schema::from_value(with(json!({ "driver": "luks" }), &change)).unwrap();
            let refused = catalog::amend(&graph, node, options, false).await.unwrap_err().full();
            assert!(refused.contains("changed by somebody else"), "{refused}");
        }
        graph.permit().remove(node).await.unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes);
    });
}

/// Deriving a key takes long, and nobody who drains the node waits for it.
#[test]
fn a_drain_does_not_wait_for_a_key() {
    let place = Place::new();
    let path = made(&place);
    run_control(async |local| {
        let graph = graph(&WORDS);
        let node = add(&graph, node(&path, "s0")).await.unwrap();
        let change = json!({ "driver": "luks", "state": "active", "iter-time": 3000, "new-secret": "s1" });
        let (done, other) = (Rc::new(Cell::new(false)), graph.clone());
        let told = done.clone();
        local.spawn(async move {
            let options = qmp::schema::from_value(change).unwrap();
            catalog::amend(&other, node, options, false).await.unwrap();
            told.set(true);
        });
        local.sleep(Duration::from_millis(300)).await;
        drop(graph.permit().drain(&[node]).await.unwrap());
        assert!(!done.get(), "it was over before the drain, or the drain waited for it");
        while !done.get() {
            local.sleep(Duration::from_millis(20)).await;
        }
        graph.permit().remove(node).await.unwrap();
    });
    assert_eq!(open_it(&place, &path), [WORDS[0], WORDS[1]].into());
}
