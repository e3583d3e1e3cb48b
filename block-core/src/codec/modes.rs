//! What turns a row of units (sectors) over: CBC and ECB here, XTS next door.

use cipher::array::Array;
use cipher::{BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};

use crate::base::{Error, Result};
use crate::rt::Kept;

/// Bytes of an initial vector; ciphers with shorter blocks take the first of them.
pub(super) const IV: usize = 16;

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Encrypt,
    Decrypt,
}

/// A keyed cipher in a mode.
pub(super) trait Units: Send + Sync {
    /// Turns `data` over, which is `ivs.len()` units of `unit` bytes. The vectors are used up.
    fn run(&self, ivs: &mut [[u8; IV]], unit: usize, data: &mut [u8], direction: Direction);

    /// Where the round keys are.
    #[cfg(test)]
    fn place(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}

/// Round keys stay where secrets may stay.
impl<U: Units> Units for Kept<U> {
    fn run(&self, ivs: &mut [[u8; IV]], unit: usize, data: &mut [u8], direction: Direction) {
        (**self).run(ivs, unit, data, direction);
    }

    #[cfg(test)]
    fn place(&self) -> usize {
        (**self).place()
    }
}

fn keyed<C: KeyInit>(key: &[u8]) -> Result<C> {
    C::new_from_slice(key).map_err(|_| Error::new("The key has a length that the cipher has not"))
}

/// Cipher block chaining within a unit.
pub(super) struct Cbc<C>(C);

/// Each block for itself: no vector. Not for disks, but how vectors are encrypted (ESSIV).
pub(super) struct Ecb<C>(C);

impl<C: KeyInit> Cbc<C> {
    pub(super) fn new(key: &[u8]) -> Result<Self> {
        keyed(key).map(Self)
    }
}

impl<C: KeyInit> Ecb<C> {
    pub(super) fn new(key: &[u8]) -> Result<Self> {
        keyed(key).map(Self)
    }
}

impl<C> Units for Cbc<C>
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser + Send + Sync,
{
    fn run(&self, ivs: &mut [[u8; IV]], unit: usize, data: &mut [u8], direction: Direction) {
        match direction {
            Direction::Encrypt => {
                for (ivs, units) in ivs.chunks(WINDOW).zip(data.chunks_mut(unit * WINDOW)) {
                    self.encrypt(ivs, unit, units);
                }
            }
            Direction::Decrypt => {
                ivs.iter().zip(data.chunks_mut(unit)).for_each(|(iv, unit)| self.decrypt(iv, unit));
            }
        }
    }
}

impl<C> Cbc<C>
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser,
{
    /// A chain goes one block after another, but those of several units go side by side.
    fn encrypt(&self, ivs: &[[u8; IV]], unit: usize, data: &mut [u8]) {
        let mut chains: [Array<u8, C::BlockSize>; WINDOW] = std::array::from_fn(|_| Array::default());
        let chains = &mut chains[..ivs.len()];
        for (chain, iv) in chains.iter_mut().zip(ivs) {
            chain.iter_mut().zip(iv).for_each(|(to, from)| *to = *from);
        }
        for at in (0..unit).step_by(C::block_size()) {
            let place = at..at + C::block_size();
            for (chain, unit) in chains.iter_mut().zip(data.chunks(unit)) {
                veil(chain, &unit[place.clone()]);
            }
            self.0.encrypt_blocks(chains);
            for (chain, unit) in chains.iter().zip(data.chunks_mut(unit)) {
                unit[place.clone()].copy_from_slice(chain);
            }
        }
    }

    fn decrypt(&self, iv: &[u8; IV], unit: &mut [u8]) {
        let (blocks, _) = Array::<u8, C::BlockSize>::slice_as_chunks_mut(unit);
        let mut before = Array::<u8, C::BlockSize>::default();
        before.iter_mut().zip(iv).for_each(|(to, from)| *to = *from);
        let mut kept = [const { [0; IV] }; WINDOW];
        for window in blocks.chunks_mut(WINDOW) {
            kept.iter_mut().zip(&*window).for_each(|(to, block)| to[..block.len()].copy_from_slice(block));
            self.0.decrypt_blocks(window);
            for (block, kept) in window.iter_mut().zip(&kept) {
                veil(block, &before);
                before.iter_mut().zip(kept).for_each(|(to, from)| *to = *from);
            }
        }
    }
}

impl<C> Units for Ecb<C>
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser + Send + Sync,
{
    fn run(&self, _: &mut [[u8; IV]], _: usize, data: &mut [u8], direction: Direction) {
        let (blocks, _) = Array::<u8, C::BlockSize>::slice_as_chunks_mut(data);
        match direction {
            Direction::Encrypt => self.0.encrypt_blocks(blocks),
            Direction::Decrypt => self.0.decrypt_blocks(blocks),
        }
    }
}

fn veil(block: &mut [u8], mask: &[u8]) {
    block.iter_mut().zip(mask).for_each(|(byte, mask)| *byte ^= mask);
}

/// Blocks that go through the cipher together.
const WINDOW: usize = 64;

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]
mod tests {
    use aes::Aes128;

    use super::*;

    fn unhex(text: &str) -> Vec<u8> {
        text.as_bytes().chunks(2).map(|two| u8::from_str_radix(str::from_utf8(two).unwrap(), 16).unwrap()).collect()
    }

    /// NIST SP 800-38A, F.2.1 and F.1.1 (CBC and ECB with AES-128).
    #[test]
    fn the_vectors_of_the_standard() {
        let key = unhex("2b7e151628aed2a6abf7158809cf4f3c");
        let plain = unhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51");
        let iv: [u8; IV] = std::array::from_fn(|at| at as u8);
        let vectors: [(Box<dyn Units>, &str); 2] = [
            (
                Box::new(Cbc::<Aes128>::new(&key).unwrap()),
                "7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b2",
            ),
            (
                Box::new(Ecb::<Aes128>::new(&key).unwrap()),
                "3ad77bb40d7a3660a89ecaf32466ef97f5d3d58503b9699de785895a96fdbaaf",
            ),
        ];
        for (mode, expected) in vectors {
            let mut data = plain.clone();
            mode.run(&mut [iv], 32, &mut data, Direction::Encrypt);
            assert_eq!(data, unhex(expected));
            mode.run(&mut [iv], 32, &mut data, Direction::Decrypt);
            assert_eq!(data, plain);
        }
    }

    #[test]
    fn units_do_not_reach_into_each_other() {
        let cbc = Cbc::<Aes128>::new(&[7; 16]).unwrap();
        let plain: Vec<u8> = (0..2 * 4096usize).map(|at| (at * 5 + at / 300) as u8).collect();
        let mut data = plain.clone();
        cbc.run(&mut [[1; IV], [2; IV]], 4096, &mut data, Direction::Encrypt);
        let mut second = plain[4096..].to_vec();
        cbc.run(&mut [[2; IV]], 4096, &mut second, Direction::Encrypt);
        assert_eq!(data[4096..], second);
        cbc.run(&mut [[1; IV], [2; IV]], 4096, &mut data, Direction::Decrypt);
        assert_eq!(data, plain);
    }

    #[test]
    fn chains_beside_each_other_are_those_alone() {
        let cbc = Cbc::<Aes128>::new(&[9; 16]).unwrap();
        for (unit, units) in [(512, 1), (512, 7), (512, 64), (512, 131), (4096, 3)] {
            let plain: Vec<u8> = (0..unit * units).map(|at| (at * 7 + at / 300) as u8).collect();
            let mut ivs: Vec<[u8; IV]> = (0..units).map(|at| [at as u8; IV]).collect();
            let (mut all, mut single) = (plain.clone(), plain.clone());
            cbc.run(&mut ivs, unit, &mut all, Direction::Encrypt);
            for (at, data) in single.chunks_mut(unit).enumerate() {
                cbc.run(&mut [[at as u8; IV]], unit, data, Direction::Encrypt);
            }
            assert!(all == single && all != plain, "{units} units of {unit}");
            cbc.run(&mut ivs, unit, &mut all, Direction::Decrypt);
            assert!(all == plain, "{units} units of {unit}");
        }
    }

    #[test]
    fn a_key_of_another_length_is_refused() {
        assert!(Cbc::<Aes128>::new(&[0; 15]).is_err() && Ecb::<Aes128>::new(&[0; 17]).is_err());
    }
}
