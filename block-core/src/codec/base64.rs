//! Base64 with the alphabet of RFC 4648, section 4, and padding.

use zeroize::Zeroizing;

/// The bytes that the text stands for; white space between its letters is passed over. `None`: it is not base64.
pub fn decode(text: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    // Asked for at once: a vector that grows leaves copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len() / 4 * 3 + 3));
    let (mut group, mut letters, mut padding) = (0u32, 0u8, 0u8);
    for letter in text.iter().copied().filter(|letter| !letter.is_ascii_whitespace()) {
        if letter == b'=' {
            padding += 1;
            if letters + padding > 4 || letters < 2 {
                return None;
            }
            continue;
        }
        if padding > 0 {
            return None;
        }
        group = group << 6 | value(letter)?;
        letters += 1;
        if letters == 4 {
            bytes.extend(group.to_be_bytes().into_iter().skip(1));
            (group, letters) = (0, 0);
        }
    }
    let [_, first, second, _] = (group << (6 * (4 - u32::from(letters)))).to_be_bytes();
    match (letters, padding) {
        (0, 0) => {}
        (2, 2) if second == 0 => bytes.push(first),
        (3, 1) => bytes.extend([first, second]),
        _ => return None,
    }
    Some(bytes)
}

/// The text that stands for the bytes.
pub fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let of = |at: usize| u32::from(group.get(at).copied().unwrap_or(0));
        let bits = of(0) << 16 | of(1) << 8 | of(2);
        for letter in 0..4u8 {
            let index = usize::from((bits >> (18 - 6 * u32::from(letter)) & 63).to_le_bytes()[0]);
            text.push(if usize::from(letter) <= group.len() { char::from(ALPHABET[index]) } else { '=' });
        }
    }
    text
}

fn value(letter: u8) -> Option<u32> {
    Some(match letter {
        b'A'..=b'Z' => u32::from(letter - b'A'),
        b'a'..=b'z' => u32::from(letter - b'a') + 26,
        b'0'..=b'9' => u32::from(letter - b'0') + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    })
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 4648, section 10.
    #[test]
    fn the_vectors_of_the_rfc() {
        let vectors =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE=")];
        for (bytes, text) in vectors {
            assert_eq!(encode(bytes.as_bytes()), text);
            assert_eq!(decode(text.as_bytes()).unwrap().as_slice(), bytes.as_bytes());
        }
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(decode(encode(&all).as_bytes()).unwrap().as_slice(), all);
        assert_eq!(decode(b"Zm9v\nYmFy\n").unwrap().as_slice(), b"foobar");
    }

    #[test]
    fn what_is_not_base64_is_refused() {
        for text in ["Z", "Zg", "Zg=", "Zg===", "Z===", "Zm9v=", "=", "Zg==Zg==", "Zm!v", "Zm9vZ", "Z=g="] {
            assert!(decode(text.as_bytes()).is_none(), "{text}");
        }
    }
}
