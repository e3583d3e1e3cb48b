//! The JSON of a LUKS2 header, in a copy whose checksum is right; and the same bytes as a copy. What is let through costs no
//! more than it may.
#![no_main]

use block_core::codec::SecretBytes;
use block_core::codec::hash::Hash;
use block_core::codec::luks::v2::{self, Copy, Whole};
use block_core::codec::luks::{Budget, Header, MAGIC};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for copy in [Copy::First, Copy::Second] {
        let _ = v2::extent(copy, bytes, 0x4000);
    }
    let _ = Whole::check(bytes.to_vec());
    let copy = Whole::check(around(bytes)).expect("the sum is right");
    let end = 32 << 20;
    let Ok(parsed) = v2::Header::parse(&copy, end, false) else { return };
    let header = Header::V2(parsed);
    let _ = header.described();
    let active = header.active();
    assert!(active.iter().all(|slot| slot.material.end() <= end && slot.material.start() >= 2 * SIZE as u64));
    assert!([512, 1024, 2048, 4096].contains(&header.payload().unit));
    let little = Budget { pbkdf2_iterations: 5000, argon2_memory_kib: 64, argon2_work_kib: 256, tries: 2 };
    if header.check_payload(end).is_ok() {
        let material = active.iter().map(|slot| SecretBytes::zeroed(slot.material.len() as usize)).collect();
        let _ = header.unlock(&SecretBytes::new(b"word".to_vec()), material, &little);
    }
});

/// A header with this JSON.
fn around(json: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, &MAGIC);
    put(6, &2u16.to_be_bytes());
    put(8, &(SIZE as u64).to_be_bytes());
    put(72, b"sha256");
    put(4096, &json[..json.len().min(SIZE - 4096)]);
    let sum = Hash::Sha256.digest(&[&bytes]);
    bytes[448..448 + 32].copy_from_slice(sum.expose());
    bytes
}

const SIZE: usize = 0x4000;
