//! Numbers and payload layouts of the vhost-user and virtio-blk specifications, and nothing that acts on them.

/// Front-end request codes.
#[expect(missing_docs, reason = "the names are those of the vhost-user specification, without their prefix")]
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SEND_RARP: u32 = 19;
    pub const NET_SET_MTU: u32 = 20;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const IOTLB_MSG: u32 = 22;
    pub const SET_VRING_ENDIAN: u32 = 23;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const CREATE_CRYPTO_SESSION: u32 = 26;
    pub const CLOSE_CRYPTO_SESSION: u32 = 27;
    pub const POSTCOPY_ADVISE: u32 = 28;
    pub const POSTCOPY_LISTEN: u32 = 29;
    pub const POSTCOPY_END: u32 = 30;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const GPU_SET_SOCKET: u32 = 33;
    pub const RESET_DEVICE: u32 = 34;
    pub const VRING_KICK: u32 = 35;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
    pub const GET_SHARED_OBJECT: u32 = 41;
}

/// The one message that a block back-end sends on its own channel: the configuration space changed.
pub const BACKEND_CONFIG_CHANGE: u32 = 2;

/// Bits of the header's flags word.
pub mod flags {
    /// The protocol version that every message carries.
    pub const VERSION: u32 = 1;
    /// Set in replies only.
    pub const REPLY: u32 = 1 << 2;
    /// Asks for an acknowledgement of a message that has no reply of its own.
    pub const NEED_REPLY: u32 = 1 << 3;
}

/// Protocol feature bits, as masks.
#[expect(missing_docs, reason = "the names are those of the vhost-user specification, without their prefix")]
pub mod protocol_feature {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const INBAND_NOTIFICATIONS: u64 = 1 << 14;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

/// Virtio feature bits of a block device and its transport, as masks.
#[expect(missing_docs, reason = "the names are those of the virtio specification, without their prefix")]
pub mod feature {
    pub const BARRIER: u64 = 1 << 0;
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const GEOMETRY: u64 = 1 << 4;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const SCSI: u64 = 1 << 7;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const LIFETIME: u64 = 1 << 15;
    pub const SECURE_ERASE: u64 = 1 << 16;
    pub const ZONED: u64 = 1 << 17;
    pub const NOTIFY_ON_EMPTY: u64 = 1 << 24;
    /// `VHOST_F_LOG_ALL`: between front-end and back-end only.
    pub const LOG_ALL: u64 = 1 << 26;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VHOST_USER_F_PROTOCOL_FEATURES`: between front-end and back-end only.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const RING_PACKED: u64 = 1 << 34;
    pub const IN_ORDER: u64 = 1 << 35;
}

/// Types of a virtio-blk request.
#[expect(missing_docs, reason = "the names are those of the virtio specification, without their prefix")]
pub mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const GET_LIFETIME: u32 = 10;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
    pub const SECURE_ERASE: u32 = 14;
}

/// Status bytes of a virtio-blk request.
pub mod status {
    /// Done.
    pub const OK: u8 = 0;
    /// Refused or failed.
    pub const IOERR: u8 = 1;
    /// A request this device does not know.
    pub const UNSUPP: u8 = 2;
    /// What our client puts there before; never a device's answer.
    pub const UNTOUCHED: u8 = 0xEE;
}

/// Byte offsets into `struct virtio_blk_config` (virtio 1.3, 5.2.4).
#[expect(missing_docs, reason = "the names are the members of the structure")]
pub mod config {
    pub const CAPACITY: usize = 0;
    pub const SIZE_MAX: usize = 8;
    pub const SEG_MAX: usize = 12;
    pub const BLK_SIZE: usize = 20;
    pub const WRITEBACK: usize = 32;
    pub const UNUSED0: usize = 33;
    pub const NUM_QUEUES: usize = 34;
    pub const MAX_DISCARD_SECTORS: usize = 36;
    pub const MAX_DISCARD_SEG: usize = 40;
    pub const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub const WRITE_ZEROES_MAY_UNMAP: usize = 56;
    pub const UNUSED1: usize = 57;
    pub const SECURE_ERASE: usize = 60;
    pub const LEN: usize = 96;
}

/// `SET_VRING_KICK`, `CALL` and `ERR`: no descriptor comes with the message.
pub const VRING_NO_FD: u64 = 1 << 8;

/// `SET_VRING_ADDR` flag: mark used-ring writes at the log address.
pub const VRING_F_LOG: u32 = 1;

/// The header of every message: three little-endian words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Request code.
    pub request: u32,
    /// Version and flag bits, see [`flags`].
    pub flags: u32,
    /// Bytes of payload that follow.
    pub size: u32,
}

impl Header {
    /// Bytes on the wire.
    pub const LEN: usize = 12;

    /// The header as it stands on the wire.
    pub fn bytes(self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        out[..4].copy_from_slice(&self.request.to_le_bytes());
        out[4..8].copy_from_slice(&self.flags.to_le_bytes());
        out[8..].copy_from_slice(&self.size.to_le_bytes());
        out
    }

    /// What `bytes` says.
    pub fn parse(bytes: [u8; Self::LEN]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self { request: word(0), flags: word(4), size: word(8) }
    }
}

/// One entry of a memory table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Address in the front-end's own address space; ring addresses are given in it.
    pub uva: u64,
    /// Where the region starts in its file.
    pub mmap_offset: u64,
}

impl MemoryRegion {
    fn put(self, out: &mut Vec<u8>) {
        for word in [self.gpa, self.size, self.uva, self.mmap_offset] {
            out.extend(word.to_le_bytes());
        }
    }
}

/// Payload of `SET_MEM_TABLE`.
pub fn mem_table(regions: &[MemoryRegion]) -> Vec<u8> {
    let mut out = Vec::from((regions.len() as u32).to_le_bytes());
    out.extend([0; 4]);
    regions.iter().for_each(|region| region.put(&mut out));
    out
}

/// Payload of `ADD_MEM_REG` and `REM_MEM_REG`.
pub fn single_region(region: MemoryRegion) -> Vec<u8> {
    let mut out = vec![0; 8];
    region.put(&mut out);
    out
}

/// Payload of the messages that carry a queue index and a number.
pub fn vring_state(index: u32, num: u32) -> Vec<u8> {
    [index.to_le_bytes(), num.to_le_bytes()].concat()
}

/// Payload of `SET_VRING_ADDR`. All addresses but `log` are front-end addresses.
#[derive(Clone, Copy, Debug)]
pub struct VringAddr {
    /// Queue index.
    pub index: u32,
    /// [`VRING_F_LOG`] or 0.
    pub flags: u32,
    /// Descriptor table.
    pub desc: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub avail: u64,
    /// Guest physical address under which writes to the used ring are logged.
    pub log: u64,
}

impl VringAddr {
    /// The payload's bytes.
    pub fn bytes(self) -> Vec<u8> {
        let mut out = [self.index.to_le_bytes(), self.flags.to_le_bytes()].concat();
        for word in [self.desc, self.used, self.avail, self.log] {
            out.extend(word.to_le_bytes());
        }
        out
    }
}

/// Payload of `GET_CONFIG` and `SET_CONFIG`: the header says `size`, whatever `data` really holds.
pub fn config_payload(offset: u32, size: u32, flags: u32, data: &[u8]) -> Vec<u8> {
    [&offset.to_le_bytes()[..], &size.to_le_bytes(), &flags.to_le_bytes(), data].concat()
}

/// Payload of `SET_LOG_BASE` with a shared-memory log.
pub fn log_base(size: u64, offset: u64) -> Vec<u8> {
    [size.to_le_bytes(), offset.to_le_bytes()].concat()
}

/// The 16 bytes at the start of a virtio-blk request.
pub fn blk_header(kind: u32, ioprio: u32, sector: u64) -> [u8; 16] {
    let mut out = [0; 16];
    out[..4].copy_from_slice(&kind.to_le_bytes());
    out[4..8].copy_from_slice(&ioprio.to_le_bytes());
    out[8..].copy_from_slice(&sector.to_le_bytes());
    out
}

/// One 16-byte segment of a discard or write-zeroes request.
pub fn blk_segment(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut out = [0; 16];
    out[..8].copy_from_slice(&sector.to_le_bytes());
    out[8..12].copy_from_slice(&sectors.to_le_bytes());
    out[12..].copy_from_slice(&flags.to_le_bytes());
    out
}
