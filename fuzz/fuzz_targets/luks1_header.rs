//! A LUKS1 header; the first byte says whether the payload is elsewhere. What is let through is what would be written, and
//! costs no more than it may.
#![no_main]

use block_core::codec::SecretBytes;
use block_core::codec::luks::{Budget, Header, v1};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((detached, bytes)) = bytes.split_first() else { return };
    let (detached, end) = (detached % 2 == 1, 4 << 20);
    let Ok(parsed) = v1::Header::parse(bytes, end, detached) else { return };
    assert_eq!(v1::Header::parse(&parsed.to_bytes(), end, detached).expect("it is what we write"), parsed);
    let header = Header::V1(parsed);
    let _ = header.described();
    let active = header.active();
    assert!(active.iter().all(|slot| slot.material.end() <= end && slot.material.start() >= v1::LEN as u64));
    let little = Budget { pbkdf2_iterations: 5000, argon2_memory_kib: 0, argon2_work_kib: 0, tries: 2 };
    if header.check_payload(end).is_ok() {
        let material = active.iter().map(|slot| SecretBytes::zeroed(slot.material.len() as usize)).collect();
        let _ = header.unlock(&SecretBytes::new(b"word".to_vec()), material, &little);
    }
});
