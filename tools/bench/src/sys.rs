//! Memory shared with a server, and the few system calls without a safe form: the only unsafe code of this package.
//!
//! The server reads and writes the memory whenever it likes, so no Rust reference to it is ever made: bytes are copied in and
//! out through raw pointers, and requests carry addresses that were checked here.
#![expect(
    unsafe_code,
    reason = "memory that another process writes, and some system calls, cannot be said in safe Rust"
)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::ptr::NonNull;
use std::time::Duration;

use virtio_driver::{VirtioBlkQueue, VirtioBlkTransport};

/// Anonymous memory behind a memfd, mapped for as long as this value lives.
#[derive(Debug)]
pub struct SharedMemory {
    address: NonNull<u8>,
    len: usize,
    file: File,
}

// SAFETY: the mapping belongs to the process, not to a thread, and `address` is only used for raw copies inside it.
unsafe impl Send for SharedMemory {}
// SAFETY: shared use makes no references; racing copies are no worse than the server's own writes, which we expect.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Maps `len` bytes of zeroes (rounded up by the kernel to whole pages).
    ///
    /// # Errors
    /// What memfd_create(2), ftruncate(2) or mmap(2) answer; a length of 0 is `InvalidInput`.
    pub fn new(len: usize) -> io::Result<Self> {
        let file = memfd()?;
        file.set_len(len as u64)?;
        // SAFETY: a fresh shared mapping of a file that we own, at an address that the kernel chooses.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mmap answered address 0"))?;
        Ok(Self { address, len, file })
    }

    /// Tells the server about this memory, so that requests may refer to it.
    ///
    /// # Errors
    /// The transport's answer.
    pub fn announce(&self, transport: &mut VirtioBlkTransport) -> io::Result<()> {
        transport.map_mem_region(self.address.as_ptr() as usize, self.len, self.file.as_raw_fd(), 0).map(|_| ())
    }

    /// Copies `bytes` to `offset`. Panics where they do not fit: that is a fault of the caller.
    pub fn store(&self, offset: usize, bytes: &[u8]) {
        let target = self.pointer(&(offset..offset + bytes.len()));
        // SAFETY: `pointer` checked the range against the mapping, and `bytes` is ordinary memory elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) }
    }

    /// Copies from `offset` until `bytes` is full. Panics where the range leaves the memory.
    pub fn load(&self, offset: usize, bytes: &mut [u8]) {
        let source = self.pointer(&(offset..offset + bytes.len()));
        // SAFETY: `pointer` checked the range against the mapping, and `bytes` is ordinary memory elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Puts a read of `disk_offset` (bytes, a multiple of 512) into the part `buffer` of this memory into the ring.
    ///
    /// # Errors
    /// No free descriptor, or an offset that is not a multiple of 512.
    pub fn queue_read<C>(
        &self,
        queue: &mut VirtioBlkQueue<'_, C>,
        disk_offset: u64,
        buffer: Range<usize>,
        context: C,
    ) -> io::Result<()> {
        let target = self.pointer(&buffer);
        // SAFETY: the server writes through its own mapping of the memfd; the address is inside ours.
        unsafe { queue.read_raw(disk_offset, target, buffer.len(), context) }
    }

    /// Puts a write of the part `buffer` of this memory to `disk_offset` (bytes, a multiple of 512) into the ring.
    ///
    /// # Errors
    /// No free descriptor, or an offset that is not a multiple of 512.
    pub fn queue_write<C>(
        &self,
        queue: &mut VirtioBlkQueue<'_, C>,
        disk_offset: u64,
        buffer: Range<usize>,
        context: C,
    ) -> io::Result<()> {
        let source = self.pointer(&buffer);
        // SAFETY: the server reads through its own mapping of the memfd; the address is inside ours.
        unsafe { queue.write_raw(disk_offset, source, buffer.len(), context) }
    }

    fn pointer(&self, range: &Range<usize>) -> *mut u8 {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} leaves a memory of {} bytes", self.len);
        // SAFETY: the start is inside the mapping, which `self` keeps alive.
        unsafe { self.address.as_ptr().add(range.start) }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: `new` made this mapping, and nobody keeps a pointer into it beyond a borrow of `self`.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.len) };
    }
}

/// Waits until one of `fds` (at most 64) is readable and says which: bit n for the nth. 0 when the time ran out first. A
/// signal starts the wait again.
///
/// # Errors
/// What poll(2) answers.
pub fn wait_readable(fds: &[BorrowedFd<'_>], timeout: Duration) -> io::Result<u64> {
    assert!(fds.len() <= 64, "the answer has a bit for each of 64 fds");
    let mut polled: Vec<libc::pollfd> =
        fds.iter().map(|fd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 }).collect();
    let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    loop {
        // SAFETY: `polled` is a live array of exactly the length that is passed.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout_ms) };
        if ready >= 0 {
            return Ok(polled.iter().rev().fold(0, |bits, fd| bits << 1 | u64::from(fd.revents != 0)));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// The CPU clock of a process: all its threads, the ended ones too.
pub(crate) fn process_cpu(pid: u32) -> io::Result<Duration> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    let mut clock = 0;
    // SAFETY: `clock` is a live place for the answer.
    let error = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a live place for the answer.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let seconds = u64::try_from(time.tv_sec).map_err(io::Error::other)?;
    let nanos = u64::try_from(time.tv_nsec).map_err(io::Error::other)?;
    Ok(Duration::from_secs(seconds) + Duration::from_nanos(nanos))
}

/// Sends SIGKILL to a process. The caller must not have reaped it, or the number may belong to somebody else by now.
pub(crate) fn kill(pid: u32) {
    if let Ok(pid) = i32::try_from(pid) {
        // SAFETY: no memory is involved.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
}

fn memfd() -> io::Result<File> {
    // SAFETY: the name is a constant with its zero at the end.
    let fd = unsafe { libc::memfd_create(c"trellis-bench".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this fd, and nobody else knows it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::SharedMemory;

    #[test]
    fn bytes_come_back_from_where_they_were_put() {
        let memory = SharedMemory::new(8192).unwrap();
        memory.store(4090, b"across pages");
        let mut back = [0; 12];
        memory.load(4090, &mut back);
        assert_eq!(&back, b"across pages");
    }

    #[test]
    #[should_panic(expected = "leaves a memory")]
    fn a_range_beyond_the_mapping_is_refused() {
        SharedMemory::new(4096).unwrap().store(4090, b"across pages");
    }
}
