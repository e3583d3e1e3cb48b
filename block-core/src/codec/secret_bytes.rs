//! Bytes that nobody may see: keys, passphrases, and what leads to them.

use subtle::ConstantTimeEq;
use zeroize::Zeroize;

use crate::rt::KeptBytes;

/// Wiped when dropped. `Debug` says how many there are and no more; there is no `Clone`, so that every copy is one that
/// somebody made on purpose.
pub struct SecretBytes(Store);

enum Store {
    Heap(Vec<u8>),
    Kept(KeptBytes),
}

impl SecretBytes {
    /// Takes the bytes over.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Store::Heap(bytes))
    }

    /// As many zeroes, to be filled.
    pub fn zeroed(len: usize) -> Self {
        Self(Store::Heap(vec![0; len]))
    }

    /// The same for what stays for long: locked memory of its own, if that can be had.
    #[must_use]
    pub fn kept(self) -> Self {
        match KeptBytes::copied(self.expose()) {
            Ok(kept) => Self(Store::Kept(kept)),
            Err(_) => self,
        }
    }

    /// The bytes. Whoever copies them wipes the copy.
    pub fn expose(&self) -> &[u8] {
        match &self.0 {
            Store::Heap(bytes) => bytes,
            Store::Kept(bytes) => bytes,
        }
    }

    /// The bytes, to be filled.
    pub fn expose_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Store::Heap(bytes) => bytes,
            Store::Kept(bytes) => bytes,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.expose().len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.expose().is_empty()
    }

    /// A second one, on purpose.
    pub fn duplicate(&self) -> Self {
        Self::new(self.expose().to_vec())
    }

    /// The same bytes. Takes as long wherever they differ.
    pub fn is(&self, other: &[u8]) -> bool {
        self.expose().ct_eq(other).into()
    }
}

impl Drop for SecretBytes {
    fn drop(&mut self) {
        match &mut self.0 {
            Store::Heap(bytes) => bytes.zeroize(),
            // Its pages are wiped when they go.
            Store::Kept(_) => {}
        }
    }
}

impl std::fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SecretBytes({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_not_printed() {
        let secret = SecretBytes::new(b"marker".to_vec());
        assert_eq!(format!("{secret:?}"), "SecretBytes(6 bytes)");
        assert!(secret.is(b"marker") && !secret.is(b"Marker") && !secret.is(b"marke"));
        assert!(secret.duplicate().is(secret.expose()));
        let mut kept = secret.kept();
        assert!(kept.is(b"marker") && kept.duplicate().is(b"marker"));
        kept.expose_mut()[0] = b'M';
        assert!(kept.is(b"Marker"));
    }
}
