//! `read`, `readv`, `write`, `writev` and their asynchronous twins.

use super::getopt::Getopt;
use super::{Command, MOST_BYTES, Refusal, Report, SECTOR, Spec, number};

/// Bytes that are fetched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Read {
    pub(crate) at: u64,
    pub(crate) len: u64,
    pub(crate) verify: Option<Verify>,
    /// The machine's state, rather than the disk.
    pub(crate) vm_state: bool,
    /// Show the bytes.
    pub(crate) dump: bool,
    pub(crate) report: Report,
    /// How it is called where it fails.
    pub(crate) name: &'static str,
}

/// What of a buffer has to be which byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Verify {
    pub(crate) pattern: u8,
    /// In the buffer.
    pub(crate) start: u64,
    pub(crate) len: u64,
}

/// Bytes that are stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Write {
    pub(crate) at: u64,
    pub(crate) len: u64,
    pub(crate) fill: Fill,
    /// The machine's state, rather than the disk.
    pub(crate) vm_state: bool,
    pub(crate) compressed: bool,
    /// Stable before it is over.
    pub(crate) fua: bool,
    pub(crate) report: Report,
    /// How it is called where it fails.
    pub(crate) name: &'static str,
}

/// What is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    Pattern(u8),
    /// The bytes of a file, again and again.
    File(String),
    Zeroes {
        unmap: bool,
        no_fallback: bool,
    },
}

impl Default for Fill {
    fn default() -> Self {
        Self::Pattern(0xcd)
    }
}

pub(super) fn read(spec: &'static Spec, words: &[&str]) -> Result<Read, Refusal> {
    let mut read = Read { name: "read", ..Read::default() };
    let (mut quiet, mut numbers) = (false, false);
    let (mut pattern, mut start, mut len) = (None, None, None);
    let mut options = Getopt::new("bCl:pP:qrs:v", words);
    while let Some((letter, argument)) = options.next(spec)? {
        match letter {
            'b' => read.vm_state = true,
            'C' => numbers = true,
            'l' => len = Some(number::bytes(argument)?),
            'P' => pattern = Some(number::pattern(argument)?),
            'q' => quiet = true,
            's' => start = Some(number::bytes(argument)?),
            'v' => read.dump = true,
            // Registered or not, the buffer is the same; and one letter is of old.
            _ => {}
        }
    }
    let [at, count] = options.operands()[..] else { return Err(Refusal::Usage(spec)) };
    (read.at, read.len) = (number::bytes(at)?, number::bytes(count)?);
    if read.len > MOST_BYTES {
        return Err(Refusal::Said(format!("length cannot exceed {MOST_BYTES}, given {count}")));
    }
    if pattern.is_none() && (start.is_some() || len.is_some()) {
        return Err(Refusal::Usage(spec));
    }
    let start = start.unwrap_or(0);
    let len = len.unwrap_or_else(|| read.len.saturating_sub(start));
    if start.checked_add(len).is_none_or(|end| end > read.len) {
        return Err(Refusal::Said("pattern verification range exceeds end of read data".to_owned()));
    }
    read.verify = pattern.map(|pattern| Verify { pattern, start, len });
    if read.vm_state {
        check_sectors(read.at, read.len)?;
    }
    read.report = Report::new(quiet, numbers);
    Ok(read)
}

pub(super) fn readv(spec: &'static Spec, words: &[&str]) -> Result<Read, Refusal> {
    match vector_read(spec, "CP:qrv", words)? {
        Some(read) => Ok(read),
        None => Err(Refusal::Usage(spec)),
    }
}

pub(super) fn aio_read(spec: &'static Spec, words: &[&str]) -> Result<Command, Refusal> {
    Ok(vector_read(spec, "CP:iqrv", words)?.map_or(Command::AioInvalid { write: false }, Command::AioRead))
}

/// A read into several buffers, which are one; `None`: it is one of those that make no sense.
fn vector_read(spec: &'static Spec, letters: &'static str, words: &[&str]) -> Result<Option<Read>, Refusal> {
    let mut read = Read { name: "readv", ..Read::default() };
    let (mut quiet, mut numbers, mut pattern) = (false, false, None);
    let mut options = Getopt::new(letters, words);
    while let Some((letter, argument)) = options.next(spec)? {
        match letter {
            'C' => numbers = true,
            'i' => return Ok(None),
            'P' => pattern = Some(number::pattern(argument)?),
            'q' => quiet = true,
            'v' => read.dump = true,
            _ => {}
        }
    }
    let [at, counts @ ..] = options.operands() else { return Err(Refusal::Usage(spec)) };
    if counts.is_empty() {
        return Err(Refusal::Usage(spec));
    }
    (read.at, read.len) = (number::bytes(at)?, total(counts)?);
    read.verify = pattern.map(|pattern| Verify { pattern, start: 0, len: read.len });
    read.report = Report::new(quiet, numbers);
    Ok(Some(read))
}

pub(super) fn write(spec: &'static Spec, words: &[&str]) -> Result<Write, Refusal> {
    let mut write = Write { name: "write", ..Write::default() };
    let (mut quiet, mut numbers) = (false, false);
    let (mut zeroes, mut unmap, mut no_fallback, mut registered) = (false, false, false, false);
    let (mut pattern, mut file) = (None, None);
    let mut options = Getopt::new("bcCfnpP:qrs:uz", words);
    while let Some((letter, argument)) = options.next(spec)? {
        match letter {
            'b' => write.vm_state = true,
            'c' => write.compressed = true,
            'C' => numbers = true,
            'f' => write.fua = true,
            'n' => no_fallback = true,
            'P' => pattern = Some(number::pattern(argument)?),
            'q' => quiet = true,
            'r' => registered = true,
            's' => file = Some(argument.to_owned()),
            'u' => unmap = true,
            'z' => zeroes = true,
            _ => {}
        }
    }
    let [at, count] = options.operands()[..] else { return Err(Refusal::Usage(spec)) };
    let sources = [zeroes, pattern.is_some(), file.is_some()].into_iter().filter(|given| *given).count();
    let contradictions = [
        (write.vm_state && zeroes, "-b and -z cannot be specified at the same time"),
        (write.fua && (write.vm_state || write.compressed), "-f and -b or -c cannot be specified at the same time"),
        (no_fallback && !zeroes, "-n requires -z to be specified"),
        (unmap && !zeroes, "-u requires -z to be specified"),
        (sources > 1, "Only one of -z, -P, and -s can be specified at the same time"),
    ];
    refuse(contradictions)?;
    (write.at, write.len) = (number::bytes(at)?, number::bytes(count)?);
    if write.len > MOST_BYTES && !no_fallback {
        return Err(Refusal::Said(format!("length cannot exceed {MOST_BYTES} without -n, given {count}")));
    }
    if write.vm_state || write.compressed {
        check_sectors(write.at, write.len)?;
    }
    refuse([(zeroes && registered, "cannot combine zero write with registered I/O buffer")])?;
    write.fill = match (zeroes, file) {
        (true, _) => Fill::Zeroes { unmap, no_fallback },
        (false, Some(file)) => Fill::File(file),
        (false, None) => pattern.map_or_else(Fill::default, Fill::Pattern),
    };
    write.report = Report::new(quiet, numbers);
    Ok(write)
}

pub(super) fn writev(spec: &'static Spec, words: &[&str]) -> Result<Write, Refusal> {
    let mut write = Write { name: "writev", ..Write::default() };
    let (mut quiet, mut numbers) = (false, false);
    let mut options = Getopt::new("CfqrP:", words);
    while let Some((letter, argument)) = options.next(spec)? {
        match letter {
            'C' => numbers = true,
            'f' => write.fua = true,
            'P' => write.fill = Fill::Pattern(number::pattern(argument)?),
            'q' => quiet = true,
            _ => {}
        }
    }
    let [at, counts @ ..] = options.operands() else { return Err(Refusal::Usage(spec)) };
    if counts.is_empty() {
        return Err(Refusal::Usage(spec));
    }
    (write.at, write.len) = (number::bytes(at)?, total(counts)?);
    write.report = Report::new(quiet, numbers);
    Ok(write)
}

pub(super) fn aio_write(spec: &'static Spec, words: &[&str]) -> Result<Command, Refusal> {
    let mut write = Write { name: "aio_write", ..Write::default() };
    let (mut quiet, mut numbers) = (false, false);
    let (mut zeroes, mut unmap, mut registered) = (false, false, false);
    let mut options = Getopt::new("CfiP:qruz", words);
    while let Some((letter, argument)) = options.next(spec)? {
        match letter {
            'C' => numbers = true,
            'f' => write.fua = true,
            'i' => return Ok(Command::AioInvalid { write: true }),
            'P' => write.fill = Fill::Pattern(number::pattern(argument)?),
            'q' => quiet = true,
            'r' => registered = true,
            'u' => unmap = true,
            'z' => zeroes = true,
            _ => {}
        }
    }
    let [at, counts @ ..] = options.operands() else { return Err(Refusal::Usage(spec)) };
    if counts.is_empty() {
        return Err(Refusal::Usage(spec));
    }
    refuse([
        (zeroes && counts.len() > 1, "-z supports only a single length parameter"),
        (unmap && !zeroes, "-u requires -z to be specified"),
        (zeroes && registered, "cannot combine zero write with registered I/O buffer"),
    ])?;
    write.at = number::bytes(at)?;
    write.len = if zeroes { number::bytes(counts[0])? } else { total(counts)? };
    if zeroes {
        write.fill = Fill::Zeroes { unmap, no_fallback: false };
    }
    write.report = Report::new(quiet, numbers);
    Ok(Command::AioWrite(write))
}

fn refuse<const N: usize>(contradictions: [(bool, &str); N]) -> Result<(), Refusal> {
    let first = contradictions.into_iter().find(|(is_there, _)| *is_there);
    first.map_or(Ok(()), |(_, text)| Err(Refusal::Said(text.to_owned())))
}

fn check_sectors(at: u64, len: u64) -> Result<(), Refusal> {
    let named = [(at, "offset"), (len, "count")];
    let ragged = named.into_iter().find(|(value, _)| !value.is_multiple_of(SECTOR));
    let text = |(value, name)| Refusal::Said(format!("{value} is not a sector-aligned value for '{name}'"));
    ragged.map_or(Ok(()), |ragged| Err(text(ragged)))
}

/// What several buffers have together.
fn total(counts: &[&str]) -> Result<u64, Refusal> {
    let mut total = 0u64;
    for count in counts {
        let bytes = number::bytes(count)?;
        if bytes > MOST_BYTES {
            return Err(Refusal::Said(format!("Argument '{count}' exceeds maximum size {MOST_BYTES}")));
        }
        if total > MOST_BYTES - bytes {
            return Err(Refusal::Said(format!("The total number of bytes exceed the maximum size {MOST_BYTES}")));
        }
        total += bytes;
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, Refusal> {
        let words = super::super::words(line);
        Spec::named(words[0])?.parse(&words)
    }

    fn said(line: &str) -> String {
        match parsed(line).unwrap_err() {
            Refusal::Usage(spec) => format!("usage of {}", spec.name),
            Refusal::Said(text) => text,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn reads_verify_a_part() {
        let Ok(Command::Read(read)) = parsed("read -vC -P 0x41 -s 2 -l 4 1k 10") else { panic!() };
        let verify = Some(Verify { pattern: 65, start: 2, len: 4 });
        let expected =
            Read { at: 1024, len: 10, verify, dump: true, report: Report::Numbers, name: "read", vm_state: false };
        assert_eq!(read, expected);
        let Ok(Command::Read(read)) = parsed("read -P 1 -s 10 0 10") else { panic!() };
        assert_eq!(read.verify, Some(Verify { pattern: 1, start: 10, len: 0 }));
        for line in ["read -P 1 -s 11 0 10", "read -P 1 -l 11 0 10", "read -P 1 -s 8 -l 4 0 10"] {
            assert_eq!(said(line), "pattern verification range exceeds end of read data");
        }
        assert_eq!(said("read -s 1 0 4"), "usage of read");
        assert_eq!(said("read -l 1 0 4"), "usage of read");
        assert_eq!(said("read 0 1 2"), "usage of read");
    }

    #[test]
    fn contradictions_are_found_in_qemus_order() {
        for (line, text) in [
            ("write -bz 0 512", "-b and -z cannot be specified at the same time"),
            ("write -c -f -z 0 512", "-f and -b or -c cannot be specified at the same time"),
            ("write -un 0 512", "-n requires -z to be specified"),
            ("write -u -P 1 -s f 0 512", "-u requires -z to be specified"),
            ("write -z -P 1 0 512", "Only one of -z, -P, and -s can be specified at the same time"),
            ("write -zr 0 9G", "length cannot exceed 2147483136 without -n, given 9G"),
            ("write -c 1 9G", "length cannot exceed 2147483136 without -n, given 9G"),
            ("write -c 1 512", "1 is not a sector-aligned value for 'offset'"),
            ("write -c 0 1", "1 is not a sector-aligned value for 'count'"),
            ("read -b 0 64", "64 is not a sector-aligned value for 'count'"),
            ("write -zr 0 512", "cannot combine zero write with registered I/O buffer"),
            ("aio_write -z 0 1k 1k", "-z supports only a single length parameter"),
            ("aio_write -u 0 1k", "-u requires -z to be specified"),
        ] {
            assert_eq!(said(line), text, "{line}");
        }
    }

    #[test]
    fn zeroes_may_be_many_where_nothing_is_written_for_them() {
        let Ok(Command::Write(write)) = parsed("write -znu 0 3G") else { panic!() };
        assert_eq!((write.len, write.fill), (3 << 30, Fill::Zeroes { unmap: true, no_fallback: true }));
        let Ok(Command::AioWrite(write)) = parsed("aio_write -z -P 1 0 1k") else { panic!() };
        assert_eq!(write.fill, Fill::Zeroes { unmap: false, no_fallback: false });
    }

    #[test]
    fn several_lengths_are_one_request() {
        let Ok(Command::Write(write)) = parsed("writev -P 3 1k 1k 2k") else { panic!() };
        assert_eq!((write.at, write.len, write.fill), (1024, 3072, Fill::Pattern(3)));
        assert_eq!(said("readv 0 2147483647 1"), "Argument '2147483647' exceeds maximum size 2147483136");
        assert_eq!(said("writev 0 1G 1G"), "The total number of bytes exceed the maximum size 2147483136");
        assert_eq!(said("readv -q 0"), "usage of readv");
        assert_eq!(parsed("aio_read -i 0 1k"), Ok(Command::AioInvalid { write: false }));
    }
}
