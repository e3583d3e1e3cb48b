//! A frontend that speaks the protocol byte by byte, over shared memory that a [`Driver`] uses too.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::driver::Driver;
use crate::export::vhost_user::config_space::{F_EVENT_IDX, F_INDIRECT, F_PROTOCOL_FEATURES, F_VERSION_1};
use crate::export::vhost_user::descriptors::Received;
use crate::export::vhost_user::message::{Kind, u64_at};
use crate::export::vhost_user::wire::{Message, receive_reply, send};

pub(super) const MEMORY: u64 = 4 << 20;
pub(super) const DATA: u64 = 1 << 20;
const USER: u64 = 0x7f00_0000_0000;

/// A frontend whose queues have 64 entries each.
pub(super) struct Frontend {
    pub(super) stream: UnixStream,
    pub(super) memory: GuestMemoryMmap<()>,
    pub(super) file: OwnedFd,
    pub(super) queues: Vec<Queue>,
}

/// One queue with its two descriptors.
pub(super) struct Queue {
    pub(super) driver: Driver,
    kick: OwnedFd,
    pub(super) call: OwnedFd,
    pub(super) err: OwnedFd,
}

impl Frontend {
    /// Connects and negotiates; no memory yet.
    pub(super) fn connect(path: &Path, features: u64) -> Self {
        let frontend = Self::greet(path);
        frontend.take_features(features | F_PROTOCOL_FEATURES);
        frontend
    }

    /// Connects; no features yet, and no memory.
    pub(super) fn greet(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, MEMORY).unwrap();
        let shared = FileOffset::new(std::fs::File::from(file.try_clone().unwrap()), 0);
        let range = (GuestAddress(0), usize::try_from(MEMORY).unwrap(), Some(shared));
        let memory = GuestMemoryMmap::from_ranges_with_files(&[range]).unwrap();
        let frontend = Self { stream, memory, file, queues: Vec::new() };
        frontend.ask(Kind::GET_FEATURES, Vec::new());
        let protocol = u64_at(&frontend.ask(Kind::GET_PROTOCOL_FEATURES, Vec::new()), 0);
        frontend.tell(Kind::SET_PROTOCOL_FEATURES, protocol.to_ne_bytes().to_vec());
        frontend.tell(Kind::SET_OWNER, Vec::new());
        frontend
    }

    pub(super) fn take_features(&self, features: u64) {
        self.tell(Kind::SET_FEATURES, (features | F_VERSION_1).to_ne_bytes().to_vec());
    }

    /// ADD_MEM_REG or REM_MEM_REG of all memory.
    pub(super) fn tell_region(&self, kind: Kind) {
        let region = [0u64, MEMORY, USER, 0].map(u64::to_ne_bytes).concat();
        let fds = if matches!(kind, Kind::ADD_MEM_REG) { vec![self.file.try_clone().unwrap()] } else { Vec::new() };
        assert_eq!(self.try_tell(kind, [vec![0; 8], region].concat(), fds), 0);
    }

    /// Connects with memory and `queues` queues that run.
    pub(super) fn running(path: &Path, features: u64, queues: u32) -> Self {
        let mut frontend = Self::connect(path, features | F_EVENT_IDX | F_INDIRECT);
        frontend.share_memory();
        (0..queues).for_each(|index| frontend.start_queue(index, 0));
        frontend
    }

    pub(super) fn share_memory(&self) {
        let words = [0u64, MEMORY, USER, 0];
        let body = [&[1, 0, 0, 0, 0, 0, 0, 0][..], &words.map(u64::to_ne_bytes).concat()].concat();
        assert_eq!(self.tell_with(Kind::SET_MEM_TABLE, body, &self.file), 0);
    }

    /// Sets a queue up from scratch and starts it.
    pub(super) fn start_queue(&mut self, index: u32, base: u16) {
        self.make_queue(index);
        self.restart_queue(index, base);
    }

    /// Makes a queue of which the device knows nothing.
    pub(super) fn make_queue(&mut self, index: u32) {
        let fd = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let driver = Driver::new(&self.memory, 64, 0x1_0000 * (u64::from(index) + 1));
        self.queues.push(Queue { driver, kick: fd(), call: fd(), err: fd() });
    }

    /// Tells the device about a queue that was stopped.
    pub(super) fn restart_queue(&self, index: u32, base: u16) {
        self.announce_queue(index, base);
        self.tell(Kind::SET_VRING_ENABLE, [index, 1].map(u32::to_ne_bytes).concat());
    }

    /// The same, without enabling it.
    pub(super) fn announce_queue(&self, index: u32, base: u16) {
        let queue = &self.queues[index as usize];
        let state = |value: u32| [index, value].map(u32::to_ne_bytes).concat();
        let at = queue.driver.at;
        let parts = [USER + at.desc, USER + at.used, USER + at.avail, 0].map(u64::to_ne_bytes).concat();
        self.tell(Kind::SET_VRING_NUM, state(64));
        self.tell(Kind::SET_VRING_BASE, state(base.into()));
        self.tell(Kind::SET_VRING_ADDR, [state(0), parts].concat());
        let word = u64::from(index).to_ne_bytes().to_vec();
        assert_eq!(self.tell_with(Kind::SET_VRING_ERR, word.clone(), &queue.err), 0);
        assert_eq!(self.tell_with(Kind::SET_VRING_CALL, word.clone(), &queue.call), 0);
        assert_eq!(self.tell_with(Kind::SET_VRING_KICK, word, &queue.kick), 0);
    }

    /// Stops a queue and gives its base.
    pub(super) fn stop_queue(&self, index: u32) -> u32 {
        let answer = self.ask(Kind::GET_VRING_BASE, [index, 0].map(u32::to_ne_bytes).concat());
        u32::from_ne_bytes(answer[4..8].try_into().unwrap())
    }

    /// A message that has an answer of its own.
    pub(super) fn ask(&self, kind: Kind, body: Vec<u8>) -> Vec<u8> {
        send(&self.stream, &[Message { request: kind as u32, need_reply: false, body, fds: Vec::new() }]).unwrap();
        receive_reply(&self.stream).unwrap().unwrap().body
    }

    /// A message that has to succeed.
    pub(super) fn tell(&self, kind: Kind, body: Vec<u8>) {
        assert_eq!(self.try_tell(kind, body, Vec::new()), 0, "{kind:?}");
    }

    pub(super) fn try_tell(&self, kind: Kind, body: Vec<u8>, fds: Vec<OwnedFd>) -> u64 {
        let fds = fds.into_iter().map(|fd| Received::new(fd, &Arc::default())).collect();
        send(&self.stream, &[Message { request: kind as u32, need_reply: true, body, fds }]).unwrap();
        u64_at(&receive_reply(&self.stream).unwrap().unwrap().body, 0)
    }

    fn tell_with(&self, kind: Kind, body: Vec<u8>, fd: &OwnedFd) -> u64 {
        self.try_tell(kind, body, vec![fd.as_fd().try_clone_to_owned().unwrap()])
    }

    pub(super) fn config(&self) -> Vec<u8> {
        let body = [&[0, 0, 0, 0, 96, 0, 0, 0, 0, 0, 0, 0][..], &[0; 96]].concat();
        self.ask(Kind::GET_CONFIG, body)[12..].to_vec()
    }

    /// One request; gives status and used length. Its data lies at `DATA`.
    pub(super) fn request(&mut self, queue: usize, kind: u32, sector: u64, data: Option<(u32, bool)>) -> (u8, u32) {
        self.offer(queue, kind, sector, data);
        self.kick(queue);
        self.finish(queue)
    }

    pub(super) fn offer(&mut self, queue: usize, kind: u32, sector: u64, data: Option<(u32, bool)>) {
        let driver = &mut self.queues[queue].driver;
        let header = 0x8_0000 + 64 * queue as u64;
        let words = u128::from(kind) | u128::from(sector) << 64;
        driver.put(header, words.to_le_bytes());
        driver.put(header + 32, [0xee]);
        let data = data.map(|(len, writable)| (DATA, len, writable));
        let chain: Vec<_> =
            [Some((header, 16, false)), data, Some((header + 32, 1, true))].into_iter().flatten().collect();
        driver.offer(&chain);
    }

    pub(super) fn kick(&self, queue: usize) {
        rustix::io::write(&self.queues[queue].kick, &1u64.to_ne_bytes()).unwrap();
    }

    pub(super) fn finish(&mut self, queue: usize) -> (u8, u32) {
        let (_, written) = self.used(queue).expect("the request comes back");
        let [status] = self.queues[queue].driver.get(0x8_0020 + 64 * queue as u64);
        (status, written)
    }

    /// Waits for a used entry, sleeping on the call descriptor like a guest.
    pub(super) fn used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let end = Instant::now() + Duration::from_secs(10);
        let queue = &mut self.queues[queue];
        loop {
            queue.driver.set_used_event(queue.driver.seen);
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            if let Some(used) = queue.driver.take_used() {
                return Some(used);
            }
            let left = end.checked_duration_since(Instant::now())?;
            wait(&queue.call, left);
        }
    }
}

/// True where the descriptor became readable in time; takes what is in it.
pub(super) fn wait(fd: &OwnedFd, time: Duration) -> bool {
    let mut fds = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN)];
    let ready = rustix::event::poll(&mut fds, Some(&time.try_into().unwrap())) == Ok(1);
    let _ = rustix::io::read(fd, &mut [0u8; 8]);
    ready
}
