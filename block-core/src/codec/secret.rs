//! A secret as an operator hands it over: in some encoding, perhaps encrypted with another one.

use std::sync::Arc;

use zeroize::Zeroizing;

use super::SecretBytes;
use super::base64;
use super::cipher::{Family, Mode, Spec};
use crate::base::{Error, Result};

/// A secret that nodes find by its id. Whoever uses it keeps a share; the last one wipes it.
#[derive(Clone, Debug)]
pub struct Secret(Arc<SecretBytes>);

/// How the bytes that were handed over stand for the secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// They are it.
    Raw,
    /// They are its base64.
    Base64,
}

impl Secret {
    /// From bytes that were handed over.
    pub fn new(given: SecretBytes, encoding: Encoding) -> Result<Self> {
        Ok(Self(Arc::new(decoded(given, encoding)?.kept())))
    }

    /// From bytes that stand for encrypted ones: AES-256 in CBC mode with the padding of PKCS #7. `key` holds 32 bytes, `iv` is the base64
    /// of 16.
    pub fn wrapped(given: SecretBytes, encoding: Encoding, key: &Self, iv: Option<&str>) -> Result<Self> {
        let key = key.bytes();
        if key.len() != KEY {
            return Err(Error::new(format!("Key should be {KEY} bytes in length")));
        }
        let iv = iv.ok_or_else(|| Error::new("IV is required to decrypt secret"))?;
        let iv = base64::decode(iv.as_bytes()).ok_or_else(|| Error::new("The initial vector is not base64"))?;
        let wrong = |_| Error::new(format!("IV should be {IV} bytes in length not {}", iv.len()));
        let iv: [u8; IV] = iv.as_slice().try_into().map_err(wrong)?;
        let mut text = decoded(given, encoding)?;
        if text.is_empty() || !text.len().is_multiple_of(IV) {
            return Err(Error::new("The encrypted secret is not whole blocks"));
        }
        let spec = Spec { family: Family::Aes, mode: Mode::Cbc, iv: None };
        spec.decrypt_chained(key.expose(), iv, text.expose_mut())?;
        let padding = text.expose().last().copied().unwrap_or(0);
        let len = text.len().checked_sub(padding.into()).filter(|_| (1..=16).contains(&padding));
        let is_padded = |len: usize| text.expose().iter().skip(len).all(|byte| *byte == padding);
        let len = len.filter(|len| is_padded(*len));
        let len =
            len.ok_or_else(|| Error::new("The secret cannot be decrypted: its key or its vector is another one"))?;
        Ok(Self(Arc::new(SecretBytes::new(text.expose()[..len].to_vec()).kept())))
    }

    /// The secret.
    pub fn bytes(&self) -> &SecretBytes {
        &self.0
    }
}

fn decoded(given: SecretBytes, encoding: Encoding) -> Result<SecretBytes> {
    match encoding {
        Encoding::Raw => Ok(given),
        Encoding::Base64 => {
            let bytes: Option<Zeroizing<Vec<u8>>> = base64::decode(given.expose());
            let mut bytes = bytes.ok_or_else(|| Error::new("Base64 data is not valid"))?;
            Ok(SecretBytes::new(std::mem::take(&mut *bytes)))
        }
    }
}

const KEY: usize = 32;
const IV: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn given(text: &str) -> SecretBytes {
        SecretBytes::new(text.as_bytes().to_vec())
    }

    #[test]
    fn encodings_are_undone() {
        assert!(Secret::new(given("Zm9v\n"), Encoding::Base64).unwrap().bytes().is(b"foo"));
        assert!(Secret::new(given("Zm9v\n"), Encoding::Raw).unwrap().bytes().is(b"Zm9v\n"));
        let refused = Secret::new(given("%%"), Encoding::Base64).unwrap_err().full();
        assert_eq!(refused, "Base64 data is not valid");
    }

    /// Made with `openssl enc -aes-256-cbc -a -K 30…3966 -iv 00…0f`: the text "hello".
    #[test]
    fn a_wrapped_secret_comes_out() {
        let key = Secret::new(given("0123456789abcdef0123456789abcdef"), Encoding::Raw).unwrap();
        let iv = "AAECAwQFBgcICQoLDA0ODw==";
        let text = WRAPPED;
        assert!(Secret::wrapped(given(text), Encoding::Base64, &key, Some(iv)).unwrap().bytes().is(b"hello"));
        let short = Secret::wrapped(given(text), Encoding::Base64, &key, Some("AAEC")).unwrap_err().full();
        assert_eq!(short, "IV should be 16 bytes in length not 3");
        Secret::wrapped(given("Zm9v"), Encoding::Base64, &key, Some(iv)).unwrap_err();
        let other = Secret::new(given("1123456789abcdef0123456789abcdef"), Encoding::Raw).unwrap();
        Secret::wrapped(given(text), Encoding::Base64, &other, Some(iv)).unwrap_err();
        assert!(!format!("{key:?}").contains("0123"));
    }

    const WRAPPED: &str = "MYNSl5uYV6V9tOH5RSXtDA==";
}
