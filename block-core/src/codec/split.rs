//! The anti-forensic splitter (LUKS1 specification, section 2.4): a key is spread over many stripes, so that losing any
//! part of them loses the key.

use super::SecretBytes;
use super::hash::Hash;
use crate::base::{Error, Result};

/// How many stripes LUKS has. The formats have a field for it, and every program writes and demands this.
pub(super) const STRIPES: u32 = 4000;

/// Spreads a key. `random` has [`STRIPES`] times the key's length, and becomes the stripes.
pub(super) fn split(hash: Hash, key: &SecretBytes, mut random: SecretBytes) -> Result<SecretBytes> {
    let len = key.len();
    let mut sum = SecretBytes::zeroed(len);
    check(random.len(), len)?;
    let (stripes, last) = random.expose_mut().split_at_mut(len * (STRIPES as usize - 1));
    for stripe in stripes.chunks_exact(len) {
        absorb(hash, sum.expose_mut(), stripe);
    }
    for ((last, sum), key) in last.iter_mut().zip(sum.expose()).zip(key.expose()) {
        *last = sum ^ key;
    }
    Ok(random)
}

/// Gets a key of `len` bytes back from its stripes.
pub(super) fn merge(hash: Hash, stripes: &[u8], len: usize) -> Result<SecretBytes> {
    check(stripes.len(), len)?;
    let (all, last) = stripes.split_at(len * (STRIPES as usize - 1));
    let mut key = SecretBytes::zeroed(len);
    for stripe in all.chunks_exact(len) {
        absorb(hash, key.expose_mut(), stripe);
    }
    xor(key.expose_mut(), last);
    Ok(key)
}

fn check(stripes: usize, len: usize) -> Result<()> {
    if len == 0 || len.checked_mul(STRIPES as usize) != Some(stripes) {
        return Err(Error::new("The key material has another size than the key asks"));
    }
    Ok(())
}

fn absorb(hash: Hash, sum: &mut [u8], stripe: &[u8]) {
    xor(sum, stripe);
    for (number, piece) in (0u32..).zip(sum.chunks_mut(hash.size())) {
        let digest = hash.digest(&[&number.to_be_bytes(), piece]);
        piece.copy_from_slice(&digest.expose()[..piece.len()]);
    }
}

fn xor(to: &mut [u8], from: &[u8]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to ^= from);
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "tests use small numbers")]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_whole_only_with_all_its_stripes() {
        // 33 bytes: the last piece is shorter than a digest.
        for (hash, len) in [(Hash::Sha1, 33), (Hash::Sha256, 64), (Hash::Sha512, 16)] {
            let key = SecretBytes::new((0..len).collect());
            let len = usize::from(len);
            let random = SecretBytes::new((0..len * 4000).map(|at| (at * 7 + at / 251) as u8).collect());
            let mut stripes = split(hash, &key, random).unwrap();
            assert!(merge(hash, stripes.expose(), len).unwrap().is(key.expose()));
            for at in [0, len * 2000 + 3, len * 4000 - 1] {
                stripes.expose_mut()[at] ^= 1;
                assert!(!merge(hash, stripes.expose(), len).unwrap().is(key.expose()), "byte {at} does not count");
                stripes.expose_mut()[at] ^= 1;
            }
            merge(hash, stripes.expose(), len - 1).unwrap_err();
            merge(hash, stripes.expose(), 0).unwrap_err();
        }
    }
}
