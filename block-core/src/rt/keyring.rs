//! Keys that the kernel keeps (keyrings(7)). Calls may wait for whoever has the key: make them on a helper thread.
#![expect(unsafe_code, reason = "keyctl has no safe form elsewhere")]

use std::io;

/// Puts the payload of a key at the beginning of `into`, and gives its bytes. Whoever asks wipes it.
pub fn read(serial: i32, into: &mut [u8]) -> io::Result<usize> {
    let (address, len) = (into.as_mut_ptr(), into.len());
    // SAFETY: KEYCTL_READ writes at most `len` bytes to `address`, where the slice has as many.
    let has = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_READ, serial, address, len) };
    match usize::try_from(has) {
        Ok(has) if has <= len => Ok(has),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFBIG)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// linux/keyctl.h.
const KEYCTL_READ: libc::c_long = 11;
