//! Keys that the kernel keeps (keyrings(7)). Calls may wait for whoever has the key: make them on a helper thread.
#![expect(unsafe_code, reason = "keyctl has no safe form elsewhere")]

use std::io;

/// The payload of a key, at most `most` bytes of it.
pub fn read(serial: i32, most: usize) -> io::Result<Vec<u8>> {
    let mut payload = vec![0u8; most];
    let (address, len) = (payload.as_mut_ptr(), payload.len());
    // SAFETY: KEYCTL_READ writes at most `len` bytes to `address`, where the vector has as many.
    let has = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_READ, serial, address, len) };
    match usize::try_from(has) {
        Ok(has) if has <= most => {
            payload.truncate(has);
            Ok(payload)
        }
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFBIG)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// linux/keyctl.h.
const KEYCTL_READ: libc::c_long = 11;
