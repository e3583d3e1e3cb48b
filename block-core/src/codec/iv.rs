//! What a sector begins with: its number, in the ways that dm-crypt has.

use super::modes::{Direction, IV, Units};

/// How vectors are made of sector numbers.
pub(super) enum Ivs {
    /// The low 32 bits, little-endian.
    Plain,
    /// All 64 bits, little-endian.
    Plain64,
    /// All 64 bits, big-endian, at the end of the cipher's block (of this many bytes).
    Plain64Be(usize),
    /// All 64 bits, little-endian, encrypted with a digest of the key; blocks of this many bytes.
    Essiv(Box<dyn Units>, usize),
    /// None: the mode takes no vector.
    Null,
}

impl Ivs {
    /// The vectors of sectors `first`, `first + step`, ….
    pub(super) fn fill(&self, first: u64, step: u64, out: &mut [[u8; IV]]) {
        let mut number = first;
        for iv in out.iter_mut() {
            *iv = [0; IV];
            match self {
                Self::Plain => iv[..4].copy_from_slice(&number.to_le_bytes()[..4]),
                Self::Plain64 | Self::Essiv(..) => iv[..8].copy_from_slice(&number.to_le_bytes()),
                Self::Plain64Be(block) => iv[block - 8..*block].copy_from_slice(&number.to_be_bytes()),
                Self::Null => {}
            }
            number = number.wrapping_add(step);
        }
        if let Self::Essiv(cipher, block) = self {
            for iv in out {
                cipher.run(&mut [], *block, &mut iv[..*block], Direction::Encrypt);
            }
        }
    }
}
