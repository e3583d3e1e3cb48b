//! What an operator says about a vhost-user-blk export, and which of it makes sense. Names follow QEMU's.

use std::path::PathBuf;

use block_core::base::{Error, Result};

use super::request::ID_LEN;

/// Queues at the most: a vhost-user message has eight bits for the index of a queue that is kicked.
pub const MAX_QUEUES: u16 = 256;
/// Bytes of a logical block at the most (2 MiB), as QEMU has it.
pub const MAX_BLOCK: u32 = 2 << 20;

/// Where frontends connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A socket that is made here (`addr.type=unix`).
    Unix(PathBuf),
    /// A descriptor that was passed to us and listens already (`addr.type=fd`): its number, or the name that systemd
    /// gave it. It stays open and is duplicated.
    Fd(String),
}

/// Options of one export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VhostUserOptions {
    /// The export's id.
    pub id: String,
    /// Where frontends connect.
    pub addr: Address,
    /// Guests may write.
    pub writable: bool,
    /// Every write is stable before it completes, whatever the guest asks for.
    pub writethrough: bool,
    /// 1 to [`MAX_QUEUES`].
    pub num_queues: u16,
    /// In bytes; a power of two, 512 to [`MAX_BLOCK`].
    pub logical_block_size: u32,
    /// What GET_ID tells, at most 20 bytes. Ours: QEMU has a constant.
    pub serial: String,
}

impl VhostUserOptions {
    /// QEMU's defaults.
    pub fn new(id: impl Into<String>, addr: Address) -> Self {
        Self {
            id: id.into(),
            addr,
            writable: false,
            writethrough: false,
            num_queues: 1,
            logical_block_size: 512,
            serial: "vhost_user_blk".to_owned(),
        }
    }

    /// Refuses what cannot be served, with a sentence for the operator.
    pub fn check(&self) -> Result<()> {
        if !(1..=MAX_QUEUES).contains(&self.num_queues) {
            return Err(Error::new(format!("num-queues must be between 1 and {MAX_QUEUES}, not {}", self.num_queues)));
        }
        let block = self.logical_block_size;
        if !block.is_power_of_two() || !(512..=MAX_BLOCK).contains(&block) {
            return Err(Error::new(format!(
                "logical-block-size must be a power of two between 512 and {MAX_BLOCK}, not {block}"
            )));
        }
        if self.serial.len() > ID_LEN || self.serial.contains('\0') {
            return Err(Error::new(format!("serial must have at most {ID_LEN} bytes, none of them zero")));
        }
        Ok(())
    }

    /// The serial as GET_ID gives it: padded with zeroes, without a terminator where it fills all of it.
    pub(super) fn serial_bytes(&self) -> [u8; ID_LEN] {
        let mut bytes = [0; ID_LEN];
        bytes[..self.serial.len()].copy_from_slice(self.serial.as_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> VhostUserOptions {
        VhostUserOptions::new("e0", Address::Unix("/run/e0.sock".into()))
    }

    #[test]
    fn the_defaults_are_good() {
        assert!(options().check().is_ok());
    }

    #[test]
    fn limits_are_told_in_the_refusal() {
        for queues in [0, MAX_QUEUES + 1, u16::MAX] {
            let error = VhostUserOptions { num_queues: queues, ..options() }.check().unwrap_err();
            assert!(error.to_string().contains("between 1 and 256"), "{error}");
        }
        for block in [0, 3, 256, 513, MAX_BLOCK * 2] {
            assert!(VhostUserOptions { logical_block_size: block, ..options() }.check().is_err(), "{block}");
        }
        for block in [512, 4096, MAX_BLOCK] {
            assert!(VhostUserOptions { logical_block_size: block, ..options() }.check().is_ok(), "{block}");
        }
        for serial in ["123456789012345678901", "a\0b"] {
            assert!(VhostUserOptions { serial: serial.into(), ..options() }.check().is_err());
        }
        let full = VhostUserOptions { serial: "12345678901234567890".into(), ..options() };
        assert!(full.check().is_ok() && full.serial_bytes() == *b"12345678901234567890");
    }
}
