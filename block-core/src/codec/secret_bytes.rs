//! Bytes that nobody may see: keys, passphrases, and what leads to them.

use subtle::ConstantTimeEq;
use zeroize::Zeroize;

/// Wiped when dropped. `Debug` says how many there are and no more; there is no `Clone`, so that every copy is one that
/// somebody made on purpose.
pub struct SecretBytes(Vec<u8>);

impl SecretBytes {
    /// Takes the bytes over.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// As many zeroes, to be filled.
    pub fn zeroed(len: usize) -> Self {
        Self(vec![0; len])
    }

    /// The bytes. Whoever copies them wipes the copy.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// The bytes, to be filled.
    pub fn expose_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A second one, on purpose.
    pub fn duplicate(&self) -> Self {
        Self(self.0.clone())
    }

    /// The same bytes. Takes as long wherever they differ.
    pub fn is(&self, other: &[u8]) -> bool {
        self.0.ct_eq(other).into()
    }
}

impl Drop for SecretBytes {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl std::fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SecretBytes({} bytes)", self.0.len())
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
    }
}
