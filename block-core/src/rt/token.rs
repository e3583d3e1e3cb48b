//! What a completion is for, in the 64 bits that travel through the kernel: kind (8), source (24), slot (32).

/// Sources of one thread at most, so that an index fits its bits.
pub(super) const MAX_SOURCES: usize = 1 << 24;

/// Whom a completion is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// A direct operation of a source.
    Direct { source: u32, slot: u32 },
    /// An operation that a future waits for, by its slot.
    Op(u32),
    /// A descriptor that is watched, by its slot.
    Poll(u32),
    /// The mailbox's eventfd.
    Mail,
    /// The answer to a cancellation: of no interest.
    Cancel,
}

impl Token {
    #[inline]
    pub(super) fn pack(self) -> u64 {
        let (kind, source, slot) = match self {
            Self::Direct { source, slot } => (DIRECT, source, slot),
            Self::Op(slot) => (OP, 0, slot),
            Self::Poll(slot) => (POLL, 0, slot),
            Self::Mail => (MAIL, 0, 0),
            Self::Cancel => (CANCEL, 0, 0),
        };
        debug_assert!((source as usize) < MAX_SOURCES);
        (kind << 56) | (u64::from(source) << 32) | u64::from(slot)
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "taking the fields of a packed word apart")]
    pub(super) fn unpack(word: u64) -> Self {
        let slot = word as u32;
        match word >> 56 {
            DIRECT => Self::Direct { source: (word >> 32) as u32, slot },
            OP => Self::Op(slot),
            POLL => Self::Poll(slot),
            MAIL => Self::Mail,
            CANCEL => Self::Cancel,
            kind => unreachable!("a completion of kind {kind}, which nobody submitted"),
        }
    }
}

const DIRECT: u64 = 0;
const OP: u64 = 1;
const POLL: u64 = 2;
const MAIL: u64 = 3;
const CANCEL: u64 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_survives_the_kernel() {
        let all = [
            Token::Direct { source: 0, slot: u32::MAX },
            Token::Direct { source: (1 << 24) - 1, slot: 0 },
            Token::Op(u32::MAX),
            Token::Poll(7),
            Token::Mail,
            Token::Cancel,
        ];
        for token in all {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }
}
