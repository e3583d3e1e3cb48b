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

#[cfg(test)]
mod tests {
    use super::*;

    /// A key in this process's keyring, which ends with the process.
    fn add(payload: &[u8]) -> i32 {
        let (kind, name) = (c"user".as_ptr(), c"trellis-test".as_ptr());
        // SAFETY: add_key reads both texts up to their ends, and as many bytes of the payload as there are.
        let serial = unsafe {
            libc::syscall(libc::SYS_add_key, kind, name, payload.as_ptr(), payload.len(), KEY_SPEC_PROCESS_KEYRING)
        };
        i32::try_from(serial).ok().filter(|serial| *serial > 0).expect("the kernel keeps keys for this process")
    }

    #[test]
    fn a_key_is_read_as_it_was_given() {
        let serial = add(b"marker");
        let mut room = [0xff; 64];
        assert_eq!((read(serial, &mut room).unwrap(), &room[..7]), (6, &b"marker\xff"[..]));
        // One that does not fit is none, whatever of it has been written.
        assert_eq!(read(serial, &mut [0; 3]).unwrap_err().raw_os_error(), Some(libc::EFBIG));
        assert_eq!(read(i32::MAX, &mut room).unwrap_err().raw_os_error(), Some(libc::ENOKEY));
    }

    /// linux/keyctl.h.
    const KEY_SPEC_PROCESS_KEYRING: libc::c_long = -2;
}
