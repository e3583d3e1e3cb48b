//! Which format the first bytes of a file are those of. For tools, which guess formats, and for disks whose format is such a
//! guess: these must not come to look like another one. It knows what formats begin with, and nothing else of their drivers.

use super::qcow2;
use crate::base::{Error, Result};
use crate::codec::luks;

/// The format that a file seems to be in: `start` is as many of its first 512 bytes as there are. `raw` where they are no
/// format's; one that there is no driver for is refused by its name.
pub fn guessed(start: &[u8]) -> Result<&'static str> {
    if qcow2::is_it(start) {
        return Ok("qcow2");
    }
    if luks::version(start).is_ok() {
        return Ok("luks");
    }
    let has = |(at, magic, _): &&(usize, &[u8], &str)| start.get(*at..).is_some_and(|rest| rest.starts_with(magic));
    match OTHERS.iter().find(has) {
        None => Ok("raw"),
        Some((_, _, name)) => {
            Err(Error::new(format!("The image seems to be in the format '{name}', which is not supported")))
        }
    }
}

/// As many bytes as QEMU looks at where it looks at a disk without trusting it.
pub const PROBED: u64 = 512;

/// Where images of formats that have no driver yet say what they are.
const OTHERS: &[(usize, &[u8], &str)] = &[
    (0, b"QFI\xfb\0\0\0\x01", "qcow"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_known_by_its_first_bytes() {
        assert_eq!(guessed(b"QFI\xfb\0\0\0\x03").unwrap(), "qcow2");
        for version in 1..=2 {
            assert_eq!(guessed(&[b"LUKS\xba\xbe\0", &[version][..]].concat()).unwrap(), "luks");
        }
        for raw in [&b""[..], b"QFI\xfb", b"QFI\xfb\0\0\0\0", &[0; 512]] {
            assert_eq!(guessed(raw).unwrap(), "raw");
        }
        let mut vdi = vec![0; 512];
        vdi[64..68].copy_from_slice(b"\x7f\x10\xda\xbe");
        for (start, name) in [(&b"KDMV\x01\0\0\0"[..], "vmdk"), (&vdi, "vdi")] {
            assert!(guessed(start).unwrap_err().full().contains(&format!("'{name}'")));
        }
    }
}
