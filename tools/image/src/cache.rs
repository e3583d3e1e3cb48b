//! How the host caches an image, as `-t` and `-T` say it.

/// What one of the five words means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cache {
    /// The page cache is bypassed.
    pub direct: bool,
    /// Flushes are ignored: what is written may be lost with the host.
    pub no_flush: bool,
    /// A write is stable when it completes.
    pub writethrough: bool,
}

impl Cache {
    /// `writeback`, which is what images are opened with where nothing else is said.
    pub const WRITEBACK: Self = Self { direct: false, no_flush: false, writethrough: false };
    /// `unsafe`: nothing waits for the host's disk.
    pub const UNSAFE: Self = Self { no_flush: true, ..Self::WRITEBACK };

    /// The mode that a word names; `None`: it names none.
    pub fn named(word: &str) -> Option<Self> {
        let writeback = Self::WRITEBACK;
        Some(match word {
            "none" | "off" => Self { direct: true, ..writeback },
            "directsync" => Self { direct: true, writethrough: true, ..writeback },
            "writeback" => writeback,
            "unsafe" => Self::UNSAFE,
            "writethrough" => Self { writethrough: true, ..writeback },
            _ => return None,
        })
    }
}
