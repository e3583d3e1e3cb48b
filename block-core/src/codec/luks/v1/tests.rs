//! A header that we made, as we read it; and headers of others with one thing wrong (IMG-111 to IMG-116).

use super::super::{Header as Either, version};
use super::*;

fn counting(bytes: &mut [u8]) -> Result<()> {
    bytes.iter_mut().zip(0usize..).for_each(|(byte, at)| *byte = (at * 13 + at / 253 + 1) as u8);
    Ok(())
}

fn word(text: &str) -> SecretBytes {
    SecretBytes::new(text.as_bytes().to_vec())
}

fn new(spec: &str, key_len: usize) -> New {
    let time = Duration::from_micros(1);
    New { spec: Spec::parse_whole(spec).unwrap(), key_len, hash: Hash::Sha256, time, detached: false }
}

fn made(new: &New) -> (Header, SecretBytes, SecretBytes) {
    Header::create(new, &word("open"), &mut counting).unwrap()
}

const END: u64 = 4 << 20;

#[test]
fn a_header_comes_back_as_it_was_written() {
    for (spec, len, payload) in [
        ("aes-xts-plain64", 64, 4040),
        ("aes-xts-plain64", 32, 2056),
        ("aes-cbc-essiv:sha256", 24, 1544),
        ("cast5-cbc-plain64", 16, 1032),
    ] {
        let (header, key, material) = made(&new(spec, len));
        let bytes = header.to_bytes();
        assert_eq!(version(&bytes).unwrap(), 1);
        assert_eq!(Header::parse(&bytes, END, false).unwrap(), header);
        assert_eq!(header.payload().offset, payload * 512, "{spec}: qemu-img makes it there");
        assert_eq!(material.len() as u64, header.material(0).len());
        let opened = header.try_slot(0, &word("open"), material.duplicate()).unwrap();
        assert!(opened.is_some_and(|opened| opened.is(key.expose())));
        assert!(header.try_slot(0, &word("Open"), material).unwrap().is_none());
    }
}

#[test]
fn every_slot_can_hold_the_key() {
    let (mut header, key, _) = made(&new("aes-xts-plain64", 64));
    for index in 1..SLOTS {
        let passphrase = word(&format!("word {index}"));
        let material = header.fill(index, &passphrase, &key, Duration::ZERO, &mut counting).unwrap();
        assert!(header.try_slot(index, &passphrase, material).unwrap().is_some());
    }
    assert_eq!(header.active().len(), SLOTS);
    header.clear(3);
    assert_eq!(header.active().len(), SLOTS - 1);
    assert!(!header.slots()[3].is_active);
    assert_eq!(Header::parse(&header.to_bytes(), END, false).unwrap(), header);
}

#[test]
fn without_a_slot_nothing_opens() {
    let (mut header, ..) = made(&new("aes-xts-plain64", 64));
    header.clear(0);
    let header = Either::V1(header);
    let refused = header.unlock(&word("open"), Vec::new(), &Budget::default()).unwrap_err().full();
    assert_eq!(refused, "No key slot of the image is in use: nothing can open it");
}

/// One field is changed; opening is refused with this sentence, before anything is derived.
#[test]
fn hostile_headers_are_refused() {
    let (header, ..) = made(&new("aes-xts-plain64", 64));
    let good = header.to_bytes();
    let slot = |index: usize, field: usize| AT_SLOTS + SLOT_LEN * index + field;
    let be = u32::to_be_bytes;
    let cases: &[(usize, &[u8], &str)] = &[
        (8, b"aesx", "The cipher 'aesx' is not supported"),
        (8, b"\xff", "The cipher's name is no name"),
        (40, b"gcm-plain64", "The cipher mode 'gcm-plain64' is not supported"),
        (72, b"md5\0\0\0", "The hash 'md5' is not supported"),
        (108, &be(1), "A key of 1 bytes does not fit the cipher 'aes-xts-plain64'"),
        (108, &be(0), "A key of 0 bytes does not fit the cipher 'aes-xts-plain64'"),
        (108, &be(u32::MAX), "Keys have at most 64 bytes"),
        (104, &be(8), "The material of key slot 0 lies over the payload"),
        (104, &be(u32::MAX), "The payload begins at 2199023255040, behind the end of the file (4194304)"),
        (
            164,
            &be(u32::MAX),
            "The key's digest asks for 4294967295 iterations of PBKDF2; a try of one slot may ask for 200000000 in all",
        ),
        (164, &be(0), "The key's digest asks for no iterations of PBKDF2"),
        (
            slot(0, 4),
            &be(u32::MAX),
            "Key slot 0 asks for 4294967295 iterations of PBKDF2; a try of one slot may ask for 200000000 in all",
        ),
        (slot(0, 4), &be(0), "Key slot 0 asks for no iterations of PBKDF2"),
        (slot(0, 0), &be(7), "Key slot 0 is neither active nor inactive (0x7)"),
        (slot(0, 44), &be(u32::MAX), "Key slot 0 has 4294967295 stripes; LUKS has 4000"),
        (slot(7, 44), &be(1), "Key slot 7 has 1 stripes; LUKS has 4000"),
        (slot(0, 40), &be(0), "The material of key slot 0 lies over the header"),
        (slot(1, 40), &be(9), "The material of key slots 0 and 1 overlaps"),
        (slot(2, 40), &be(u32::MAX), "The material of key slot 2 lies over the payload"),
    ];
    let opened = |bytes: &[u8]| {
        let header = Header::parse(bytes, END, false)?;
        Either::V1(header.clone()).check_payload(END)?;
        header.check_costs(&Budget::default())
    };
    opened(&good).unwrap();
    for (at, field, expected) in cases {
        let mut bytes = good.clone();
        bytes[*at..at + field.len()].copy_from_slice(field);
        assert_eq!(opened(&bytes).unwrap_err().full(), *expected);
    }
    for len in [0, 5, 6, 100, LEN - 1] {
        Header::parse(&good[..len], END, false).unwrap_err();
    }
}
