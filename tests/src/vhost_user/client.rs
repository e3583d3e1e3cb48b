//! A front-end that behaves: it negotiates, maps, starts queues and does I/O, and lets a test misbehave at any step.
//!
//! Its steps are public one by one, so that a hostile test can go as far as it likes and then use [`Client::wire`].
//! Requests are laid out in slots (header and status byte) and a data area of the guest's memory.

use super::PATIENCE;
use super::memory::{GuestMemory, RegionSpec};
use super::protocol::{
    Header, VRING_NO_FD, blk_header, blk_segment, config, config_payload, feature, flags, kind, mem_table,
    protocol_feature, request, single_region, status, vring_state,
};
use super::ring::{Desc, Ring, RingPlace, Used, readable, writable};
use super::wire::{Message, Wire, eventfd, readable_within, signal, take_events};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Start of the first region, which holds the rings.
pub const RINGS: u64 = 0x10_0000;
/// Start of the second region: adjacent to the first, in a file of its own that it does not begin.
pub const SECOND: u64 = 0x20_0000;
/// An address where the guest has no memory; the hole reaches from here up to [`SLOTS`].
pub const GAP: u64 = 0x30_0000;
/// Start of the third region: request headers and status bytes.
pub const SLOTS: u64 = 0x40_0000;
/// Start of the data area, in the third region too.
pub const DATA: u64 = 0x50_0000;
/// First address after the third region.
pub const END: u64 = 0xC0_0000;

/// How the guest's memory is announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// One `SET_MEM_TABLE`.
    Table,
    /// An `ADD_MEM_REG` for each region.
    Slots,
}

/// What a client does on its way to running queues.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Queues to start.
    pub queues: u16,
    /// Descriptors in each ring.
    pub queue_size: u16,
    /// Features to accept, out of those offered.
    pub features: u64,
    /// Protocol features to accept, out of those offered.
    pub protocol: u64,
    /// The guest's memory.
    pub memory: Vec<RegionSpec>,
    /// How it is announced.
    pub mapping: Mapping,
    /// Whether `SET_OWNER` is sent.
    pub owner: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 256,
            features: FEATURES,
            protocol: PROTOCOL,
            memory: default_memory(),
            mapping: Mapping::Table,
            owner: true,
        }
    }
}

/// Features of an ordinary driver without event index, so that each completion interrupts.
pub const FEATURES: u64 = feature::VERSION_1
    | feature::PROTOCOL_FEATURES
    | feature::SEG_MAX
    | feature::RO
    | feature::BLK_SIZE
    | feature::FLUSH
    | feature::TOPOLOGY
    | feature::CONFIG_WCE
    | feature::MQ
    | feature::DISCARD
    | feature::WRITE_ZEROES
    | feature::INDIRECT_DESC;

/// Protocol features that the client asks for unless told otherwise.
pub const PROTOCOL: u64 = protocol_feature::MQ
    | protocol_feature::REPLY_ACK
    | protocol_feature::CONFIG
    | protocol_feature::BACKEND_REQ
    | protocol_feature::RESET_DEVICE
    | protocol_feature::LOG_SHMFD;

/// Three regions: two adjacent ones, a gap, and the large one with slots and data.
pub fn default_memory() -> Vec<RegionSpec> {
    vec![
        RegionSpec { gpa: RINGS, size: SECOND - RINGS, mmap_offset: 0 },
        RegionSpec { gpa: SECOND, size: GAP - SECOND, mmap_offset: 0x3000 },
        RegionSpec { gpa: SLOTS, size: END - SLOTS, mmap_offset: 0 },
    ]
}

/// Header and status byte of one request.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// Address of the 16-byte header.
    pub header: u64,
    /// Address of the status byte.
    pub status: u64,
}

/// Slot number `n`; 4096 of them exist, and each has 64 bytes.
pub fn slot(n: u64) -> Slot {
    let header = SLOTS + n * 64;
    Slot { header, status: header + 32 }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// The status byte, [`status::UNTOUCHED`] where the device left it alone.
    pub status: u8,
    /// Bytes that the device says it has written.
    pub used: u32,
}

/// A ring and its three events.
#[derive(Debug)]
pub struct Queue {
    /// The virtqueue.
    pub ring: Ring,
    /// We to the device: there is work.
    pub kick: OwnedFd,
    /// The device to us: something is done.
    pub call: OwnedFd,
    /// The device to us: this queue is broken.
    pub err: OwnedFd,
}

/// A front-end with its connection, memory and queues.
#[derive(Debug)]
pub struct Client {
    wire: Wire,
    memory: Arc<GuestMemory>,
    queues: Vec<Queue>,
    queue_size: u16,
    offered: u64,
    features: u64,
    protocol: u64,
    backend_channel: Option<Wire>,
}

impl Client {
    /// Connects and does all that an ordinary front-end does before its first request.
    pub fn start(socket: &Path, setup: &Setup) -> Self {
        let mut client = Self::mapped(socket, setup);
        for index in 0..setup.queues {
            client.start_queue(index);
        }
        client
    }

    /// Connects, negotiates and announces the memory; no queue exists yet.
    pub fn mapped(socket: &Path, setup: &Setup) -> Self {
        let client = Self::negotiated(socket, setup);
        match setup.mapping {
            Mapping::Table => client.set_mem_table(),
            Mapping::Slots => client.add_regions(),
        }
        client
    }

    /// Connects and negotiates; no memory is announced yet.
    pub fn negotiated(socket: &Path, setup: &Setup) -> Self {
        let wire = Wire::connect(socket).unwrap_or_else(|e| panic!("connecting to {}: {e}", socket.display()));
        let memory = Arc::new(GuestMemory::new(&setup.memory));
        let queue_size = setup.queue_size;
        let (offered, features, protocol) = (0, 0, 0);
        let queues = Vec::new();
        let mut client = Self { wire, memory, queues, queue_size, offered, features, protocol, backend_channel: None };
        client.negotiate(setup);
        client
    }

    /// The connection.
    pub fn wire(&self) -> &Wire {
        &self.wire
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Queue number `index`, started before.
    pub fn queue(&mut self, index: u16) -> &mut Queue {
        &mut self.queues[usize::from(index)]
    }

    /// What the device offered.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// What was agreed on.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// What was agreed on for the control channel.
    pub fn protocol(&self) -> u64 {
        self.protocol
    }

    /// Opens the back-end's own channel, on which it sends its news.
    pub fn open_backend_channel(&mut self) {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a socket pair can be made");
        self.tell(request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
        self.backend_channel = Some(Wire::from_stream(ours));
    }

    /// The channel that [`Client::open_backend_channel`] has opened.
    pub fn backend_channel(&self) -> &Wire {
        self.backend_channel.as_ref().expect("the back-end's channel was opened before")
    }

    /// Hangs up the channel that [`Client::open_backend_channel`] has opened.
    pub fn close_backend_channel(&mut self) {
        self.backend_channel = None;
    }

    /// Acknowledges a message of the back-end where it asks for that.
    pub fn answer_notice(&self, notice: &Message) {
        if notice.header.flags & flags::NEED_REPLY != 0 {
            let header = Header { request: notice.header.request, flags: flags::VERSION | flags::REPLY, size: 8 };
            self.backend_channel().send_with(header, &[0; 8], &[]).expect("the back-end reads its channel");
        }
    }

    /// Sends a message that must be taken, and waits for the acknowledgement where one was agreed on.
    pub fn tell(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        if self.protocol & protocol_feature::REPLY_ACK == 0 {
            self.wire.send(request, payload, fds).unwrap_or_else(|e| panic!("sending request {request}: {e}"));
            return;
        }
        let ack = self.ask_ack(request, payload, fds);
        assert_eq!(ack, 0, "request {request} was refused");
    }

    /// Sends a message with need_reply; the word that comes back, 0 for "applied".
    pub fn ask_ack(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> u64 {
        self.wire.send_need_reply(request, payload, fds).unwrap_or_else(|e| panic!("sending request {request}: {e}"));
        self.reply_to(request).u64()
    }

    /// Sends a request that has a reply of its own, and waits for it.
    pub fn ask(&self, request: u32, payload: &[u8]) -> Message {
        self.wire.send(request, payload, &[]).unwrap_or_else(|e| panic!("sending request {request}: {e}"));
        self.reply_to(request)
    }

    /// The next message, which must answer `request`.
    pub fn reply_to(&self, request: u32) -> Message {
        let reply = self.wire.recv().unwrap_or_else(|e| panic!("no answer to request {request}: {e}"));
        let reply = reply.unwrap_or_else(|| panic!("the connection was closed instead of an answer to {request}"));
        assert_eq!((reply.header.request, reply.header.flags & 0b111), (request, 0b101), "not a reply to {request}");
        reply
    }

    /// Announces all regions in one table.
    pub fn set_mem_table(&self) {
        self.tell(request::SET_MEM_TABLE, &mem_table(&self.memory.entries()), &self.memory.fds());
    }

    /// Prepares ring `index` at its usual place without telling the device; its events are fresh.
    pub fn add_queue(&mut self, index: u16) {
        let step = RingPlace::packed_len(self.queue_size);
        let place = RingPlace::packed_at(RINGS + u64::from(index) * step, self.queue_size);
        self.add_queue_at(index, place, self.queue_size);
    }

    /// As [`Client::add_queue`], at a place of the test's choice.
    pub fn add_queue_at(&mut self, index: u16, place: RingPlace, size: u16) {
        let ring = Ring::new(Arc::clone(&self.memory), place, size, 0);
        let queue = Queue { ring, kick: eventfd(), call: eventfd(), err: eventfd() };
        assert_eq!(self.queues.len(), usize::from(index), "queues are added in order");
        self.queues.push(queue);
    }

    /// Adds, announces and enables queue `index`.
    pub fn start_queue(&mut self, index: u16) {
        self.add_queue(index);
        self.announce_queue(index);
        self.enable_queue(index, true);
    }

    /// Tells the device all about queue `index` except that it is enabled.
    pub fn announce_queue(&mut self, index: u16) {
        let number = u32::from(index);
        let ring = &self.queues[usize::from(index)].ring;
        let (size, place, base) = (u32::from(ring.size()), ring.place(), u32::from(ring.used_seen()));
        self.tell(request::SET_VRING_NUM, &vring_state(number, size), &[]);
        self.tell(request::SET_VRING_BASE, &vring_state(number, base), &[]);
        self.tell(request::SET_VRING_ADDR, &place.announced(number).bytes(), &[]);
        self.set_events(index);
    }

    /// Hands the three events of queue `index` over.
    pub fn set_events(&self, index: u16) {
        let Queue { kick, call, err, .. } = &self.queues[usize::from(index)];
        let payload = u64::from(index).to_le_bytes();
        self.tell(request::SET_VRING_ERR, &payload, &[err.as_fd()]);
        self.tell(request::SET_VRING_CALL, &payload, &[call.as_fd()]);
        self.tell(request::SET_VRING_KICK, &payload, &[kick.as_fd()]);
    }

    /// Takes the call event of queue `index` away.
    pub fn set_no_call(&self, index: u16) {
        self.tell(request::SET_VRING_CALL, &(u64::from(index) | VRING_NO_FD).to_le_bytes(), &[]);
    }

    /// Enables or disables queue `index`; a session without protocol features has its rings enabled already.
    pub fn enable_queue(&self, index: u16, on: bool) {
        if self.features & feature::PROTOCOL_FEATURES != 0 {
            self.tell(request::SET_VRING_ENABLE, &vring_state(u32::from(index), u32::from(on)), &[]);
        }
    }

    /// Stops queue `index`; the available index from which it would go on.
    pub fn stop_queue(&self, index: u16) -> u32 {
        let reply = self.ask(request::GET_VRING_BASE, &vring_state(u32::from(index), 0));
        assert_eq!(reply.payload.len(), 8, "GET_VRING_BASE answers with index and number");
        assert_eq!(reply.payload[..4], u32::from(index).to_le_bytes(), "the answer names another queue");
        u32::from_le_bytes(reply.payload[4..8].try_into().expect("four bytes"))
    }

    /// Stops queue `index` and starts it afresh with an empty ring, as a driver's reset does.
    pub fn restart_queue(&mut self, index: u16) {
        self.restart_queue_at(index, 0);
    }

    /// As [`Client::restart_queue`], with both indices of the ring at `base`.
    pub fn restart_queue_at(&mut self, index: u16, base: u16) {
        self.stop_queue(index);
        let (place, size) = (self.queue(index).ring.place(), self.queue(index).ring.size());
        let memory = Arc::clone(&self.memory);
        let queue = self.queue(index);
        queue.ring = Ring::new(memory, place, size, base);
        take_events(queue.err.as_fd());
        take_events(queue.kick.as_fd());
        self.announce_queue(index);
        self.enable_queue(index, true);
    }

    /// The first `len` bytes of the configuration space.
    pub fn config_bytes(&self, len: usize) -> Vec<u8> {
        let reply = self.ask(request::GET_CONFIG, &config_payload(0, len as u32, 0, &vec![0; len]));
        assert_eq!(reply.payload.len(), 12 + len, "GET_CONFIG answers with as many bytes as were asked for");
        reply.payload[12..].to_vec()
    }

    /// The whole configuration space.
    pub fn config(&self) -> Vec<u8> {
        self.config_bytes(config::LEN)
    }

    /// A 32-bit member of the configuration space.
    pub fn config_u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.config()[offset..offset + 4].try_into().expect("four bytes"))
    }

    /// Sets the one member that a driver may set.
    pub fn set_writeback(&self, value: u8) -> u64 {
        let payload = config_payload(config::WRITEBACK as u32, 1, 0, &[value]);
        self.ask_ack(request::SET_CONFIG, &payload, &[])
    }

    /// Tells the device that queue `index` has work.
    pub fn kick(&self, index: u16) {
        signal(self.queues[usize::from(index)].kick.as_fd());
    }

    /// The next completion of queue `index`, `None` where none came before `patience` ends.
    pub fn used_within(&mut self, index: u16, patience: Duration) -> Option<Used> {
        let end = Instant::now() + patience;
        let queue = self.queue(index);
        loop {
            if let Some(used) = queue.ring.take_used() {
                return Some(used);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            // A test without a call event must not wait for one, so nothing here waits long.
            readable_within(queue.call.as_fd(), left.min(Duration::from_millis(5)));
            take_events(queue.call.as_fd());
        }
    }

    /// The next completion of queue `index`.
    pub fn used(&mut self, index: u16) -> Used {
        self.used_within(index, PATIENCE).unwrap_or_else(|| panic!("queue {index} completes nothing"))
    }

    /// Publishes `bufs` as one chain whose head is descriptor 0, and kicks.
    pub fn submit(&mut self, index: u16, bufs: &[Desc]) {
        self.submit_at(index, 0, bufs);
    }

    /// Publishes `bufs` as one chain whose head is descriptor `first`, and kicks.
    pub fn submit_at(&mut self, index: u16, first: u16, bufs: &[Desc]) {
        let ring = &mut self.queue(index).ring;
        ring.write_chain(first, bufs);
        ring.publish(first);
        self.kick(index);
    }

    /// Publishes `bufs` as one chain and waits for its end.
    pub fn run(&mut self, index: u16, bufs: &[Desc]) -> Used {
        self.submit(index, bufs);
        let used = self.used(index);
        assert_eq!(used.head, 0, "a chain that was not submitted is said to be done");
        used
    }

    /// Writes the header of slot `n` and clears its status byte.
    pub fn prepare(&self, n: u64, kind: u32, sector: u64) -> Slot {
        let slot = slot(n);
        self.memory.write(slot.header, &blk_header(kind, 0, sector));
        self.memory.write(slot.status, &[status::UNTOUCHED]);
        slot
    }

    /// The chain of an ordinary request in slot `n`: header, `data`, status.
    pub fn chain(&self, n: u64, kind: u32, sector: u64, data: &[Desc]) -> Vec<Desc> {
        let slot = self.prepare(n, kind, sector);
        let mut bufs = vec![readable(slot.header, 16)];
        bufs.extend(data);
        bufs.push(writable(slot.status, 1));
        bufs
    }

    /// One request on queue `index`, with `data` between header and status.
    pub fn request(&mut self, index: u16, kind: u32, sector: u64, data: &[Desc]) -> Done {
        let bufs = self.chain(u64::from(index), kind, sector, data);
        let used = self.run(index, &bufs).len;
        Done { status: self.memory.byte(slot(u64::from(index)).status), used }
    }

    /// Writes `bytes` at `sector` through queue `index`.
    pub fn write(&mut self, index: u16, sector: u64, bytes: &[u8]) -> Done {
        self.memory.write(DATA, bytes);
        self.request(index, kind::OUT, sector, &[readable(DATA, bytes.len() as u32)])
    }

    /// Reads `len` bytes at `sector` through queue `index`. What the device does not write reads as 0x5A.
    pub fn read(&mut self, index: u16, sector: u64, len: usize) -> (Done, Vec<u8>) {
        self.memory.fill(DATA, len, POISON);
        let done = self.request(index, kind::IN, sector, &[writable(DATA, len as u32)]);
        (done, self.memory.read(DATA, len))
    }

    /// Flushes through queue `index`.
    pub fn flush(&mut self, index: u16) -> Done {
        self.request(index, kind::FLUSH, 0, &[])
    }

    /// Discards or zeroes (`kind`) with the 16-byte `segments` given.
    pub fn segments(&mut self, index: u16, kind: u32, segments: &[[u8; 16]]) -> Done {
        let bytes = segments.concat();
        self.memory.write(DATA, &bytes);
        self.request(index, kind, 0, &[readable(DATA, bytes.len() as u32)])
    }

    /// Discards `sectors` from `sector` on.
    pub fn discard(&mut self, index: u16, sector: u64, sectors: u32) -> Done {
        self.segments(index, kind::DISCARD, &[blk_segment(sector, sectors, 0)])
    }

    /// Zeroes `sectors` from `sector` on; `unmap` lets the device deallocate them.
    pub fn write_zeroes(&mut self, index: u16, sector: u64, sectors: u32, unmap: bool) -> Done {
        self.segments(index, kind::WRITE_ZEROES, &[blk_segment(sector, sectors, u32::from(unmap))])
    }

    /// The device's name, read into `len` bytes.
    pub fn device_id(&mut self, index: u16, len: usize) -> (Done, Vec<u8>) {
        self.memory.fill(DATA, len, POISON);
        let done = self.request(index, kind::GET_ID, 0, &[writable(DATA, len as u32)]);
        (done, self.memory.read(DATA, len))
    }

    fn negotiate(&mut self, setup: &Setup) {
        self.offered = self.ask(request::GET_FEATURES, &[]).u64();
        if self.offered & setup.features & feature::PROTOCOL_FEATURES != 0 {
            let offered = self.ask(request::GET_PROTOCOL_FEATURES, &[]).u64();
            let wanted = offered & setup.protocol;
            // Whether acknowledgements are agreed on is only known after this message, so it asks for none.
            self.wire.send(request::SET_PROTOCOL_FEATURES, &wanted.to_le_bytes(), &[]).expect("a fresh connection");
            self.protocol = wanted;
        }
        if setup.owner {
            self.tell(request::SET_OWNER, &[], &[]);
        }
        self.features = self.offered & setup.features;
        self.tell(request::SET_FEATURES, &self.features.to_le_bytes(), &[]);
    }

    fn add_regions(&self) {
        for region in self.memory.regions() {
            self.tell(request::ADD_MEM_REG, &single_region(region.entry()), &[region.file()]);
        }
    }
}

/// What a read buffer holds before the device writes it.
pub const POISON: u8 = 0x5A;
