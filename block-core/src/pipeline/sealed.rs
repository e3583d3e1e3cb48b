//! Guest data that stands encrypted in its place.
//!
//! Guest memory is never encrypted nor decrypted in place: the guest would see ciphertext in what it is reading into, and
//! change what it is writing while it is being encrypted.

use crate::base::{IoError, SECTOR};
use crate::codec::cipher::SectorCipher;
use crate::rt::{IoBuf, Kept};

/// What stands between a format's guest data and their places, which are whole sectors.
#[derive(Debug)]
pub struct Seal {
    /// The cipher; `None`: nobody has said what opens the image, and nothing encrypted can be read or written.
    pub cipher: Option<Kept<SectorCipher>>,
    /// Sectors are numbered as the guest sees them, else by their places.
    pub by_guest: bool,
}

impl Seal {
    fn cipher(&self) -> Result<&SectorCipher, IoError> {
        self.cipher.as_deref().ok_or(IoError::Unsupported)
    }

    fn number(&self, guest: u64, place: u64) -> u64 {
        if self.by_guest { guest / SECTOR } else { place / SECTOR }
    }

    /// What is written at `place` for the guest's bytes from `guest` on.
    pub fn sealed(&self, guest: u64, place: u64, plain: &IoBuf) -> Result<IoBuf, IoError> {
        let sealed = IoBuf::private(plain.len())?;
        encrypt(self.cipher()?, self.number(guest, place), plain, &sealed);
        Ok(sealed)
    }

    /// What was read there, as the guest sees it.
    pub fn open(&self, guest: u64, place: u64, sealed: &IoBuf, plain: &IoBuf) -> Result<(), IoError> {
        decrypt(self.cipher()?, self.number(guest, place), sealed, plain);
        Ok(())
    }
}

/// Encrypts from one buffer into another one; `first` is the number of the first sector.
pub fn encrypt(cipher: &SectorCipher, first: u64, from: &IoBuf, to: &IoBuf) {
    pass(first, from, to, |number, chunk| cipher.encrypt(number, chunk));
}

/// Decrypts.
pub fn decrypt(cipher: &SectorCipher, first: u64, from: &IoBuf, to: &IoBuf) {
    pass(first, from, to, |number, chunk| cipher.decrypt(number, chunk));
}

fn pass(first: u64, from: &IoBuf, to: &IoBuf, turn: impl Fn(u64, &mut [u8])) {
    if from.len() <= SMALL as u64 {
        pass_by::<SMALL>(first, from, to, turn);
    } else {
        pass_by::<LARGE>(first, from, to, turn);
    }
}

fn pass_by<const CHUNK: usize>(first: u64, from: &IoBuf, to: &IoBuf, turn: impl Fn(u64, &mut [u8])) {
    let (mut chunk, mut at) = ([0; CHUNK], 0);
    while at < from.len() {
        let len = usize::try_from(from.len() - at).unwrap_or(CHUNK).min(CHUNK);
        let chunk = &mut chunk[..len];
        from.read_at(at, chunk);
        turn(first.wrapping_add(at / SECTOR), chunk);
        to.write_at(at, chunk);
        at += len as u64;
    }
}

/// What goes through the cipher at once: multiples of the largest unit. Chains of many sectors are encrypted side by side.
const SMALL: usize = 4096;
const LARGE: usize = 32 << 10;
