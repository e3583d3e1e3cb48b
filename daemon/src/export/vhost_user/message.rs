//! The vhost-user requests that a disk knows, and the shapes of their bodies. Pure bytes.

macro_rules! requests {
    ($($(#[$doc:meta])* $name:ident = $code:literal,)*) => {
        /// A request that a disk knows.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[expect(non_camel_case_types, reason = "the protocol's own names")]
        pub(super) enum Kind { $($(#[$doc])* $name = $code,)* }

        impl Kind {
            /// `None`: this device does not know it.
            pub(super) fn of(code: u32) -> Option<Self> {
                match code { $($code => Some(Self::$name),)* _ => None }
            }
        }
    };
}

requests! {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    RESET_OWNER = 4,
    SET_MEM_TABLE = 5,
    SET_LOG_BASE = 6,
    SET_LOG_FD = 7,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    GET_VRING_BASE = 11,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
    SET_VRING_ERR = 14,
    GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16,
    GET_QUEUE_NUM = 17,
    SET_VRING_ENABLE = 18,
    SET_BACKEND_REQ_FD = 21,
    GET_CONFIG = 24,
    SET_CONFIG = 25,
    RESET_DEVICE = 34,
    GET_MAX_MEM_SLOTS = 36,
    ADD_MEM_REG = 37,
    REM_MEM_REG = 38,
}

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, from us to the frontend.
pub(super) const BACKEND_CONFIG_CHANGE: u32 = 2;

impl Kind {
    /// True where `len` bytes can be its body.
    pub(super) fn takes_len(self, len: usize) -> bool {
        match self {
            Self::GET_FEATURES
            | Self::SET_OWNER
            | Self::RESET_OWNER
            | Self::GET_PROTOCOL_FEATURES
            | Self::GET_QUEUE_NUM
            | Self::SET_BACKEND_REQ_FD
            | Self::RESET_DEVICE
            | Self::GET_MAX_MEM_SLOTS => len == 0,
            // The specification gives it no payload; some frontends send the descriptor number along.
            Self::SET_LOG_FD => len == 0 || len == 8,
            Self::SET_FEATURES
            | Self::SET_VRING_NUM
            | Self::SET_VRING_BASE
            | Self::GET_VRING_BASE
            | Self::SET_VRING_KICK
            | Self::SET_VRING_CALL
            | Self::SET_VRING_ERR
            | Self::SET_PROTOCOL_FEATURES
            | Self::SET_VRING_ENABLE => len == 8,
            Self::SET_LOG_BASE => len == 16,
            Self::SET_VRING_ADDR | Self::ADD_MEM_REG | Self::REM_MEM_REG => len == 40,
            Self::SET_MEM_TABLE => len >= 8,
            Self::GET_CONFIG | Self::SET_CONFIG => len >= 12,
        }
    }

    /// The protocol feature (a bit number) without which it must not be sent.
    pub(super) fn needs(self) -> Option<u32> {
        match self {
            Self::GET_QUEUE_NUM => Some(0),
            Self::SET_LOG_BASE => Some(1),
            Self::SET_BACKEND_REQ_FD => Some(5),
            Self::GET_CONFIG | Self::SET_CONFIG => Some(9),
            Self::RESET_DEVICE => Some(13),
            Self::GET_MAX_MEM_SLOTS | Self::ADD_MEM_REG | Self::REM_MEM_REG => Some(15),
            Self::GET_FEATURES
            | Self::SET_FEATURES
            | Self::SET_OWNER
            | Self::RESET_OWNER
            | Self::SET_MEM_TABLE
            | Self::SET_LOG_FD
            | Self::SET_VRING_NUM
            | Self::SET_VRING_ADDR
            | Self::SET_VRING_BASE
            | Self::GET_VRING_BASE
            | Self::SET_VRING_KICK
            | Self::SET_VRING_CALL
            | Self::SET_VRING_ERR
            | Self::GET_PROTOCOL_FEATURES
            | Self::SET_PROTOCOL_FEATURES
            | Self::SET_VRING_ENABLE => None,
        }
    }
}

/// The 32-bit word at `at`, which is inside `body`.
pub(super) fn u32_at(body: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(std::array::from_fn(|i| body[at + i]))
}

/// The 64-bit word at `at`, which is inside `body`.
pub(super) fn u64_at(body: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(std::array::from_fn(|i| body[at + i]))
}
