//! Survives memory that vanishes: a frontend may shrink the file behind a mapping, and the next access is a SIGBUS.
//!
//! One handler for the process. Where the address is in a registered area, its page is replaced by an anonymous one
//! and the area is marked poisoned; whoever reads garbage from there asks [`Guard::is_poisoned`] before acting on it.
//! Any other SIGBUS is a bug of ours and ends the process as if there were no handler.
#![expect(unsafe_code, reason = "installs a signal handler and maps pages from within it")]

use std::io;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Areas at the most, over all exports.
const MAX_AREAS: usize = 16_384;

struct Area {
    start: AtomicUsize,
    /// Bytes; 0: free, or being filled in.
    len: AtomicUsize,
    page: AtomicUsize,
    taken: AtomicBool,
    poisoned: AtomicBool,
}

static AREAS: [Area; MAX_AREAS] = [const {
    Area {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        taken: AtomicBool::new(false),
        poisoned: AtomicBool::new(false),
    }
}; MAX_AREAS];
/// One more than the highest area ever taken: the handler looks no further.
static USED: AtomicUsize = AtomicUsize::new(0);
/// Pages replaced so far: who sees it unchanged need not look at areas.
static PATCHED: AtomicUsize = AtomicUsize::new(0);

/// An area that is watched, until this is dropped. Drop it before the area is unmapped.
#[derive(Debug)]
pub(crate) struct Guard(&'static Area);

impl std::fmt::Debug for Area {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (start, len) = (self.start.load(Ordering::Relaxed), self.len.load(Ordering::Relaxed));
        write!(f, "{start:#x}+{len:#x}")
    }
}

impl Guard {
    /// Watches `len` bytes at `start`, which are mapped in pages of `page` bytes (a power of two).
    /// Fails with ENOMEM where too many areas are watched already.
    pub(crate) fn new(start: usize, len: usize, page: usize) -> io::Result<Self> {
        install()?;
        for (index, area) in AREAS.iter().enumerate() {
            if area.taken.load(Ordering::Relaxed) || area.taken.swap(true, Ordering::AcqRel) {
                continue;
            }
            area.poisoned.store(false, Ordering::Relaxed);
            area.start.store(start, Ordering::Relaxed);
            area.page.store(page, Ordering::Relaxed);
            area.len.store(len, Ordering::Release);
            USED.fetch_max(index + 1, Ordering::AcqRel);
            return Ok(Self(area));
        }
        Err(io::Error::from_raw_os_error(libc::ENOMEM))
    }

    /// A page of the area was lost; what was read from it is not what the guest wrote.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.0.poisoned.load(Ordering::Relaxed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.len.store(0, Ordering::Release);
        self.0.taken.store(false, Ordering::Release);
    }
}

/// Pages replaced so far in the process.
#[inline]
pub(crate) fn patched() -> usize {
    // With `patch`: who sees the count sees also which area it was.
    PATCHED.load(Ordering::Acquire)
}

fn install() -> io::Result<()> {
    static ONCE: Once = Once::new();
    static FAILED: AtomicBool = AtomicBool::new(false);
    ONCE.call_once(|| {
        // SAFETY: an all-zero sigaction is a valid value (no flags, empty mask).
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_bus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler has the signature that SA_SIGINFO demands and does only async-signal-safe work.
        let done = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
        FAILED.store(done != 0, Ordering::Relaxed);
    });
    if FAILED.load(Ordering::Relaxed) { Err(io::Error::other("no SIGBUS handler could be installed")) } else { Ok(()) }
}

extern "C" fn on_bus(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo for SA_SIGINFO.
    let info = unsafe { &*info };
    // SAFETY: SIGBUS carries an address.
    let address = unsafe { info.si_addr() } as usize;
    // SAFETY: the thread's errno is always there.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above; saved, because the interrupted code may be about to read it.
    let saved = unsafe { *errno };
    if !patch(address) {
        // SAFETY: back to the default action: the access is repeated and ends the process, as it should.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
    // SAFETY: as above.
    unsafe { *errno = saved };
}

fn patch(address: usize) -> bool {
    let mut lost = None;
    for area in &AREAS[..USED.load(Ordering::Acquire)] {
        let len = area.len.load(Ordering::Acquire);
        let start = area.start.load(Ordering::Relaxed);
        if address.wrapping_sub(start) < len {
            // Two maps may share an area; each has its own entry.
            area.poisoned.store(true, Ordering::Relaxed);
            lost = Some((area.page.load(Ordering::Relaxed), start + len));
        }
    }
    let Some((page, end)) = lost else { return false };
    PATCHED.fetch_add(1, Ordering::Release);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let base = address & !(page - 1);
    // To the end of the area: page by page, whoever loses many would use up the mappings that a process may have
    // (vm.max_map_count), and the next loss would end it. What is behind the page is not trusted any more either.
    // SAFETY: from the page on all is inside an area whose owner registered it and keeps it mapped meanwhile; nothing but
    // guest memory, which is reached through raw pointers only, is replaced.
    let mapped = unsafe { libc::mmap(base as *mut libc::c_void, end - base, protection, flags, -1, 0) };
    mapped != libc::MAP_FAILED
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    /// Each page that is lost alone must not be a mapping of its own: a process may have 65530.
    #[test]
    fn many_lost_pages_are_few_mappings() {
        const PAGES: usize = 70_000;
        let file = rustix::fs::memfd_create("bus", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(file.as_fd(), PAGES as u64 * 4096).unwrap();
        let protection = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        let flags = rustix::mm::MapFlags::SHARED | rustix::mm::MapFlags::NORESERVE;
        // SAFETY: a fresh mapping of the test's own file; it is leaked.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), PAGES * 4096, protection, flags, &file, 0) }.unwrap();
        let guard = Guard::new(base as usize, PAGES * 4096, 4096).unwrap();
        rustix::fs::ftruncate(file.as_fd(), 0).unwrap();
        let touch = |page: usize| {
            let at = base.cast::<u8>().wrapping_add(page * 4096);
            // SAFETY: inside the mapping; what is lost of it is replaced.
            unsafe { at.write_volatile(1) };
        };
        // The worst order first: none is behind one that was lost before.
        (0..PAGES).rev().step_by(2).for_each(touch);
        (0..PAGES).for_each(touch);
        assert!(guard.is_poisoned());
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(maps.lines().count() < 1000, "{} mappings", maps.lines().count());
    }

    #[test]
    fn a_shrunk_file_poisons_its_area_and_no_other() {
        let file = rustix::fs::memfd_create("bus", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(file.as_fd(), 8192).unwrap();
        let map = |offset| {
            // SAFETY: a fresh mapping of the test's own file; it is leaked.
            unsafe {
                let flags = rustix::mm::MapFlags::SHARED;
                let protection = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
                rustix::mm::mmap(std::ptr::null_mut(), 4096, protection, flags, &file, offset)
            }
            .unwrap()
            .cast::<u8>()
        };
        let (first, second) = (map(0), map(4096));
        let good = Guard::new(first as usize, 4096, 4096).unwrap();
        let lost = Guard::new(second as usize, 4096, 4096).unwrap();
        let twin = Guard::new(second as usize, 4096, 4096).unwrap();
        let before = patched();
        rustix::fs::ftruncate(file.as_fd(), 4096).unwrap();
        // SAFETY: the mapping is there; its page is not, which is the point.
        unsafe { second.write_volatile(1) };
        // SAFETY: as above, patched by now.
        assert_eq!(unsafe { second.read_volatile() }, 1);
        assert!(lost.is_poisoned() && twin.is_poisoned() && !good.is_poisoned());
        assert!(patched() > before);
    }
}
