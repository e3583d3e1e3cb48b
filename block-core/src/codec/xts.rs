//! XTS (IEEE 1619) over whole units, many blocks at a time.
//!
//! The `aes` crate is fast when it is given 64 blocks at once, whatever the processor has; a sector has 32. So the masks of
//! a window of several sectors are laid out first, and the window goes through the cipher as a whole.

use cipher::array::Array;
use cipher::consts::U16;
use cipher::{BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};

use super::modes::{Direction, IV, Units};
use crate::base::{Error, Result};

type Block = Array<u8, U16>;

/// Both keys.
pub(super) struct Xts<C> {
    data: C,
    tweak: C,
}

impl<C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + KeyInit> Xts<C> {
    /// From one key of twice the cipher's length.
    pub(super) fn new(key: &[u8]) -> Result<Self> {
        let (data, tweak) = key.split_at(key.len() / 2);
        let keyed =
            |half| C::new_from_slice(half).map_err(|_| Error::new("The key has a length that the cipher has not"));
        if data.len() != tweak.len() {
            return Err(Error::new("The key of XTS has two halves of one length"));
        }
        Ok(Self { data: keyed(data)?, tweak: keyed(tweak)? })
    }

    fn pass(&self, blocks: &mut [Block], direction: Direction) {
        match direction {
            Direction::Encrypt => self.data.encrypt_blocks(blocks),
            Direction::Decrypt => self.data.decrypt_blocks(blocks),
        }
    }

    /// What does not fill a batch would go one block at a time; in a batch with others it costs little.
    fn pass_all(&self, blocks: &mut [Block], direction: Direction) {
        let whole = blocks.len() / BATCH * BATCH;
        let (batches, rest) = blocks.split_at_mut(whole);
        self.pass(batches, direction);
        if rest.len() < BATCH / 4 {
            return self.pass(rest, direction);
        }
        let mut batch = [Block::default(); BATCH];
        batch[..rest.len()].copy_from_slice(rest);
        self.pass(&mut batch, direction);
        rest.copy_from_slice(&batch[..rest.len()]);
    }
}

impl<C> Units for Xts<C>
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + KeyInit + Send + Sync,
{
    fn run(&self, ivs: &mut [[u8; IV]], unit: usize, data: &mut [u8], direction: Direction) {
        let (ivs, _) = Block::slice_as_chunks_mut(ivs.as_flattened_mut());
        self.tweak.encrypt_blocks(ivs);
        let (blocks, _) = Block::slice_as_chunks_mut(data);
        let (unit, mut ivs) = (unit / IV, ivs.iter());
        debug_assert!(WINDOW.is_multiple_of(unit), "a window is whole units");
        let mut masks = [0u128; WINDOW];
        for window in blocks.chunks_mut(WINDOW) {
            for (masks, iv) in masks.chunks_mut(unit).zip(ivs.by_ref().take(window.len() / unit)) {
                let mut mask = u128::from_le_bytes(iv.0);
                for place in masks {
                    *place = mask;
                    mask = doubled(mask);
                }
            }
            veil(window, &masks);
            self.pass_all(window, direction);
            veil(window, &masks);
        }
    }
}

/// By x in the field that IEEE 1619 has.
#[inline]
fn doubled(mask: u128) -> u128 {
    (mask << 1) ^ (0u128.wrapping_sub(mask >> 127) & 0x87)
}

#[inline]
fn veil(blocks: &mut [Block], masks: &[u128]) {
    for (block, mask) in blocks.iter_mut().zip(masks) {
        block.0 = (u128::from_le_bytes(block.0) ^ mask).to_le_bytes();
    }
}

/// Blocks that go through the cipher together; at least one unit, and 4 KiB are the largest.
const WINDOW: usize = 256;
/// The largest number of blocks that the crate takes at once.
const BATCH: usize = 64;

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]
mod tests {
    use aes::{Aes128, Aes256};

    use super::*;

    fn unhex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits.chunks(2).map(|two| u8::from_str_radix(str::from_utf8(two).unwrap(), 16).unwrap()).collect()
    }

    fn crypt<C>(key: &[u8], number: u64, data: &mut [u8], direction: Direction)
    where
        C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + KeyInit + Send + Sync,
    {
        let mut iv = [[0; IV]];
        iv[0][..8].copy_from_slice(&number.to_le_bytes());
        let unit = data.len();
        Xts::<C>::new(key).unwrap().run(&mut iv, unit, data, direction);
    }

    /// IEEE 1619-2007, annex B: vectors 1, 2 and 3 (units of 32 bytes, AES-128).
    #[test]
    fn the_short_vectors_of_the_standard() {
        let vectors = [
            ("00", "00", 0, "00", "917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e"),
            ("11", "22", 0x33_3333_3333, "44", "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0"),
        ];
        for (first, second, number, plain, expected) in vectors {
            let key = unhex(&(first.repeat(16) + &second.repeat(16)));
            let plain = unhex(&plain.repeat(32));
            let mut data = plain.clone();
            crypt::<Aes128>(&key, number, &mut data, Direction::Encrypt);
            assert_eq!(data, unhex(expected));
            crypt::<Aes128>(&key, number, &mut data, Direction::Decrypt);
            assert_eq!(data, plain);
        }
        let key = unhex("fffefdfcfbfaf9f8f7f6f5f4f3f2f1f02222222222222222222222222222222222");
        let mut data = [0x44; 32];
        crypt::<Aes128>(&key[..32], 0x33_3333_3333, &mut data, Direction::Encrypt);
        assert_eq!(data, *unhex("af85336b597afc1a900b2eb21ec949d292df4c047e0b21532186a5971a227a89"));
    }

    /// Vectors 4 (AES-128) and 10 (AES-256): a sector of 0, 1, …, 255, 0, …; the first and the last block.
    #[test]
    fn the_sector_vectors_of_the_standard() {
        let plain: Vec<u8> = (0..512u16).map(|at| at.to_le_bytes()[0]).collect();
        let mut data = plain.clone();
        let key = unhex("27182818284590452353602874713526 31415926535897932384626433832795");
        crypt::<Aes128>(&key, 0, &mut data, Direction::Encrypt);
        assert_eq!(data[..16], *unhex("27a7479befa1d476489f308cd4cfa6e2"));
        assert_eq!(data[496..], *unhex("0a282df920147beabe421ee5319d0568"));
        crypt::<Aes128>(&key, 0, &mut data, Direction::Decrypt);
        assert_eq!(data, plain);
        let key = unhex(
            "2718281828459045235360287471352662497757247093699959574966967627
             3141592653589793238462643383279502884197169399375105820974944592",
        );
        crypt::<Aes256>(&key, 0xff, &mut data, Direction::Encrypt);
        assert_eq!(data[..16], *unhex("1c3b3a102f770386e4836c99e370cf9b"));
        assert_eq!(data[496..], *unhex("c4f36ffda9fcea70b9c6e693e148c151"));
    }

    #[test]
    fn a_window_is_its_sectors_one_by_one() {
        let key: Vec<u8> = (0..64).collect();
        let xts = Xts::<Aes256>::new(&key).unwrap();
        for unit in [512usize, 4096] {
            for units in [1, 2, 3, 7, 8, 9, 17] {
                let plain: Vec<u8> = (0..unit * units).map(|at| (at * 31 + at / 509) as u8).collect();
                let iv = |at: usize| std::array::from_fn(|byte| (at * 16 + byte) as u8);
                let (mut whole, mut single) = (plain.clone(), plain.clone());
                let mut ivs: Vec<[u8; IV]> = (0..units).map(iv).collect();
                xts.run(&mut ivs, unit, &mut whole, Direction::Encrypt);
                for (at, data) in single.chunks_mut(unit).enumerate() {
                    xts.run(&mut [iv(at)], unit, data, Direction::Encrypt);
                }
                assert!(whole == single && whole != plain, "{units} units of {unit}");
                let mut ivs: Vec<[u8; IV]> = (0..units).map(iv).collect();
                xts.run(&mut ivs, unit, &mut whole, Direction::Decrypt);
                assert_eq!(whole, plain);
            }
        }
    }
}
