//! Bytes to bytes, no I/O and no threads (the memory that secrets are kept in is `rt`'s): ciphers and hashes as disks use them, the headers of LUKS, secrets.
//!
//! - `secret_bytes` is how anything secret is held: wiped when dropped, never shown, never copied by accident.
//! - `hash` and `cipher` name what the crates offer by the words of LUKS and of QMP; `modes` and `xts` are the loops over
//!   sectors, `iv` what a sector begins with.
//! - `split` is the anti-forensic splitter, `luks` the two versions of the header, `secret` what an operator hands over.
//!
//! Header bytes are hostile. Whoever opens one asks [`luks::Budget`] before anything is derived.

pub mod base64;
pub mod cipher;
mod fields;
pub mod hash;
mod iv;
pub mod luks;
mod modes;
pub mod secret;
mod secret_bytes;
mod split;
mod xts;

pub use secret_bytes::SecretBytes;
