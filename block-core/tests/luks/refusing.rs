//! Who has no key gets nothing, however often it is tried (GR-27).

use std::time::{Duration, Instant};

use serde_json::json;

use crate::bench::add;
use crate::peer::{Place, SIZE, WORD, create, graph, node, opens};
use block_core::rt::run_control;

fn made(place: &Place, iter_time: u64) -> String {
    let path = place.with("image.luks", b"");
    let file = json!({ "driver": "file", "filename": path });
    let options = json!({
        "driver": "luks", "size": SIZE, "key-secret": "s0", "iter-time": iter_time, "file": file
    });
    create(&options, &[WORD]).unwrap();
    path
}

#[test]
fn without_the_secret_nothing_opens() {
    let place = Place::new();
    let path = made(&place, 1);
    let mut disk = node(&path, "s0");
    opens(&disk, &[WORD]).unwrap();
    for wrong in ["", "correct hors", "correct horse ", "Correct horse", "correct horse\n"] {
        let refused = opens(&disk, &[wrong]).unwrap_err();
        let expected = "Could not open the luks image of 'disk': Invalid password, cannot unlock any keyslot";
        assert_eq!(refused, expected, "{wrong:?}");
    }
    disk["key-secret"] = json!("nobody");
    assert_eq!(opens(&disk, &[WORD]).unwrap_err(), "No secret with id 'nobody'");
    disk.as_object_mut().unwrap().remove("key-secret");
    assert_eq!(opens(&disk, &[WORD]).unwrap_err(), "Parameter 'key-secret' is required for cipher");
}

/// A wrong passphrase takes as long as a right one, whichever it is.
#[test]
fn every_wrong_passphrase_takes_as_long() {
    let place = Place::new();
    let path = made(&place, 60);
    let took = |word: &str| {
        let tries = (0..5).map(|_| {
            let begun = Instant::now();
            let _ = opens(&node(&path, "s0"), &[word]);
            begun.elapsed()
        });
        tries.min().unwrap_or(Duration::MAX)
    };
    let times = [WORD, "", "c", "correct horsf", "x"].map(took);
    let (least, most) = (times.iter().min().unwrap(), times.iter().max().unwrap());
    assert!(*most < *least * 2, "{times:?}");
    assert!(*least > Duration::from_millis(15), "deriving takes time: {times:?}");
}

#[test]
fn a_thousand_tries_leave_nothing_behind() {
    let place = Place::new();
    let path = made(&place, 1);
    run_control(async |_| {
        let graph = graph(&["wrong", WORD]);
        for _ in 0..1000 {
            add(&graph, node(&path, "s0")).await.unwrap_err();
        }
        assert!(graph.nodes().is_empty());
        add(&graph, node(&path, "s1")).await.unwrap();
    });
}
