//! Free memory of the heap, given back to the kernel. The allocator keeps what a burst needed, for each thread's arena
//! apart; who has ended something large says so here.
#![expect(unsafe_code, reason = "the C library's call has no safe wrapper")]

/// Gives back what the allocator keeps for later. Takes some tens of microseconds; any thread may call it.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it has no precondition, and is safe to call from any thread (malloc_trim(3), "MT-Safe").
    unsafe {
        libc::malloc_trim(0)
    };
}
