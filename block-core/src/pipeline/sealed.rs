//! Guest data that stands encrypted in its place.
//!
//! Guest memory is never encrypted nor decrypted in place: the guest would see ciphertext in what it is reading into, and
//! change what it is writing while it is being encrypted.

use crate::base::{IoError, SECTOR, is_aligned};
use crate::codec::cipher::SectorCipher;
use crate::rt::IoBuf;

/// What stands between a format's guest data and their places, which are whole sectors.
#[derive(Debug)]
pub struct Seal {
    /// The cipher; `None`: nobody has said what opens the image, and nothing encrypted can be read or written.
    pub cipher: Option<SectorCipher>,
    /// Sectors are numbered as the guest sees them, else by their places.
    pub by_guest: bool,
}

impl Seal {
    fn cipher(&self) -> Result<&SectorCipher, IoError> {
        self.cipher.as_ref().ok_or(IoError::Unsupported)
    }

    /// The number of the first sector, of whole ones: where a disk and its parts end is said by bytes that we did not write.
    fn number(&self, guest: u64, place: u64, len: u64) -> Result<u64, IoError> {
        match [guest, place, len].into_iter().all(|bytes| is_aligned(bytes, SECTOR)) {
            true => Ok(if self.by_guest { guest / SECTOR } else { place / SECTOR }),
            false => Err(IoError::Misaligned),
        }
    }

    /// What is written at `place` for the guest's bytes from `guest` on.
    pub fn sealed(&self, guest: u64, place: u64, plain: &IoBuf) -> Result<IoBuf, IoError> {
        let (first, sealed) = (self.number(guest, place, plain.len())?, IoBuf::private(plain.len())?);
        encrypt(self.cipher()?, first, plain, &sealed);
        Ok(sealed)
    }

    /// What was read there, as the guest sees it.
    pub fn open(&self, guest: u64, place: u64, sealed: &IoBuf, plain: &IoBuf) -> Result<(), IoError> {
        let first = self.number(guest, place, sealed.len())?;
        decrypt(self.cipher()?, first, sealed, plain);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::cipher::Spec;

    /// A part of a sector ends the request, not the process.
    #[test]
    fn only_whole_sectors_pass() {
        let spec = Spec::parse_whole("aes-xts-plain64").unwrap();
        let cipher = Some(spec.keyed(&[7; 32], 512).unwrap());
        let (seal, buf) = (Seal { cipher, by_guest: false }, |len| IoBuf::private(len).unwrap());
        for (guest, place, len) in [(0, 0, 1000), (0, 0, 511), (512, 1, 512), (1, 512, 512)] {
            assert_eq!(seal.sealed(guest, place, &buf(len)).unwrap_err(), IoError::Misaligned);
            assert_eq!(seal.open(guest, place, &buf(len), &buf(len)), Err(IoError::Misaligned));
        }
        let plain = buf(1024);
        seal.open(512, 1024, &seal.sealed(512, 1024, &plain).unwrap(), &plain).unwrap();
        assert_eq!(plain.to_vec(), [0; 1024]);
    }
}
