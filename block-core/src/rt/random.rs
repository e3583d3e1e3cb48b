//! Random bytes of the kernel, good enough for keys.

use rustix::rand::{GetRandomFlags, getrandom};

use super::fault::system_call;
use crate::base::IoError;

/// Fills `out`. Waits only on a machine that has just begun to run.
pub fn random(out: &mut [u8]) -> Result<(), IoError> {
    let mut done = 0;
    while done < out.len() {
        let got = system_call(|| getrandom(&mut out[done..], GetRandomFlags::empty()));
        done += got.map_err(|error| IoError::from_errno(error.raw_os_error()))?;
    }
    Ok(())
}
