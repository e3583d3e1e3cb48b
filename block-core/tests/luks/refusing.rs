//! Who has no key gets nothing, however often it is tried (GR-27).

use std::time::Duration;

use block_core::codec::SecretBytes;
use block_core::codec::luks::{Budget, Header, v1};
use block_core::rt::run_control;
use serde_json::json;

use crate::bench::add;
use crate::peer::{Place, SIZE, WORD, create, graph, node, opens};

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

/// A wrong passphrase takes as much of the processor as any other.
#[test]
fn every_wrong_passphrase_costs_the_same() {
    let place = Place::new();
    let bytes = std::fs::read(made(&place, 60)).unwrap();
    let header = Header::V1(v1::Header::parse(&bytes, bytes.len() as u64, false).unwrap());
    let material = || {
        let areas =
            header.active().into_iter().map(|slot| slot.material.start() as usize..slot.material.end() as usize);
        areas.map(|area| SecretBytes::new(bytes[area].to_vec())).collect()
    };
    let cost = |word: &str| {
        let word = SecretBytes::new(word.as_bytes().to_vec());
        let tries = (0..3).map(|_| {
            let before = on_processor();
            // Many at once, for the kernel counts in ticks.
            (0..10).for_each(|_| drop(header.unlock(&word, material(), &Budget::default()).unwrap()));
            on_processor() - before
        });
        tries.min().unwrap()
    };
    let costs = [WORD, "", "c", "correct horsf", "x"].map(cost);
    let (least, most) = (costs.iter().min().unwrap(), costs.iter().max().unwrap());
    assert!(*most < *least * 2, "{costs:?}");
    assert!(*least > Duration::from_millis(10), "deriving takes time: {costs:?}");
}

/// The same with so few iterations that comparing would show: a thousand words, some of which begin as the right one does.
#[test]
fn a_thousand_wrong_passphrases_cost_the_same() {
    let place = Place::new();
    let bytes = std::fs::read(made(&place, 1)).unwrap();
    let header = Header::V1(v1::Header::parse(&bytes, bytes.len() as u64, false).unwrap());
    let slot = header.active()[0].material;
    let material = &bytes[slot.start() as usize..slot.end() as usize];
    let mut costs = [Duration::MAX; 10];
    for _ in 0..5 {
        // In turn, so that what else the machine does is nobody's; and many at once, for the kernel counts in ticks.
        for (kind, cost) in costs.iter_mut().enumerate() {
            let right = &WORD.as_bytes()[..kind * WORD.len() / 10];
            let before = on_processor();
            for number in 0..20 {
                let word = SecretBytes::new([right, number.to_string().as_bytes()].concat());
                assert!(
                    header
                        .unlock(&word, vec![SecretBytes::new(material.to_vec())], &Budget::default())
                        .unwrap()
                        .is_none()
                );
            }
            *cost = (*cost).min(on_processor() - before);
        }
    }
    let (least, most) = (costs.iter().min().unwrap(), costs.iter().max().unwrap());
    assert!(*most < *least * 2 && *least > Duration::from_millis(10), "{costs:?}");
}

/// What this thread has had of the processor.
fn on_processor() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
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
