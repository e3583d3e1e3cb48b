//! `dd`: copies a part of a disk, counted in blocks, with the operands of the program of that name.

use block_core::base::{ByteRange, Error, IoError};
use block_core::graph::WriteFlags;
use block_core::rt::{IoBuf, blocking};
use trellis_image::args::{Args, Definition, option};
use trellis_image::pairs::Pairs;
use trellis_image::{Creation, Disk, Failure, Given, Image, Interrupt, Outcome, Session, size, strerror, words};

use super::common::{FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, closed, given, objects, open};
use super::create::undo;

pub(super) const DEFINITION: Definition = Definition {
    name: "dd",
    about: "Copies a part of an image into a new one",
    options: &[
        FORMAT,
        option('O', "target-format", "FMT", "the format of the new image (default: raw)").also(&["output-format"]),
        IMAGE_OPTS,
        FORCE_SHARE,
        OBJECT,
    ],
    words: "[bs=BLOCK_SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT",
};

pub(super) async fn run(session: &Session, args: Args) -> Outcome {
    Interrupt::block()?;
    let interrupt = Interrupt::watch(session)?;
    let operands = Operands::read(&args.words)?;
    let given = given(&args, &operands.input)?;
    objects(session, &args).await?;
    let source = open(session, &given).await?;
    let result = copied(session, &args, &operands, &source, &interrupt).await;
    closed(source, result).await
}

async fn copied(session: &Session, args: &Args, operands: &Operands, source: &Image, interrupt: &Interrupt) -> Outcome {
    let format = args.get("target-format").unwrap_or("raw");
    let range = operands.range(source.size());
    let mut creation = Creation::new(format, &Pairs::default()).map_err(|_| Failure::new("Unknown file format"))?;
    creation.set("size", &range.map_or(0, ByteRange::len).to_string())?;
    let output = &operands.output;
    let not_made =
        |error: Error| Failure::new(format!("{output}: error while creating output image: {}", words(&error)));
    let new = creation.begin(session, output).await.map_err(not_made)?;
    interrupt.undo_first(undo(session, &new));
    new.make(session).await.map_err(not_made)?;
    let target = Given { format: Some(format.to_owned()), writable: true, ..Given::named(output) };
    let result = into_target(session, operands, source, range, &target).await;
    if result.is_err() {
        blocking(undo(session, &new)).await;
    }
    result
}

async fn into_target(
    session: &Session,
    operands: &Operands,
    source: &Image,
    range: Option<ByteRange>,
    target: &Given,
) -> Outcome {
    let target = open(session, target).await?;
    let result = match range {
        Some(range) => copy(&source.disk(), &target.disk(), range, operands.block).await.map(|()| 0),
        None => {
            // As qemu-img has it, this is no failure.
            session.complain(&format!("{}: cannot skip to specified offset", operands.input));
            Ok(0)
        }
    };
    closed(target, result).await
}

/// All of a range, as it is, to the beginning of another disk.
async fn copy(source: &Disk, target: &Disk, range: ByteRange, block: u64) -> Result<(), Failure> {
    let reading =
        |error: IoError| Failure::new(format!("error while reading from input image file: {}", strerror(error)));
    let writing =
        |error: IoError| Failure::new(format!("error while writing to output image file: {}", strerror(error)));
    // Small blocks come to the same when several are copied at once.
    let step = if block < STEP { STEP / block * block } else { block };
    let buf = IoBuf::private(step.min(range.len())).map_err(reading)?;
    for piece in range.pieces(step) {
        let part = buf.slice(0, piece.len());
        source.read(piece, part.clone()).await.map_err(reading)?;
        let to = ByteRange::new(piece.start() - range.start(), piece.len()).expect("it is not behind where it was");
        target.write(to, part, WriteFlags::default()).await.map_err(writing)?;
    }
    Ok(())
}

/// What the words say. The last one of a kind is meant.
#[derive(Debug, PartialEq, Eq)]
struct Operands {
    input: String,
    output: String,
    /// Bytes of a block, at least 1.
    block: u64,
    /// Blocks of the input up to where it is copied.
    count: Option<u64>,
    /// Blocks of those that are left out at the beginning.
    skip: u64,
}

impl Operands {
    fn read(words: &[String]) -> Result<Self, Failure> {
        let (mut input, mut output) = (None, None);
        let (mut block, mut count, mut skip) = (512, None, 0);
        for word in words {
            let (name, value) = word.split_once('=').map_or((word.as_str(), None), |(name, value)| (name, Some(value)));
            match (name, value) {
                ("if", Some(value)) => input = Some(value.to_owned()),
                ("of", Some(value)) => output = Some(value.to_owned()),
                ("bs", Some(value)) => block = size::parse_between("bs", value, 1, i32::MAX as u64)?,
                ("count", Some(value)) => count = Some(size::parse_count("count", value, 0, MOST)?),
                ("skip", Some(value)) => skip = size::parse_count("skip", value, 0, MOST)?,
                _ => return Err(Failure::new(format!("unrecognized operand {name}"))),
            }
        }
        let (Some(input), Some(output)) = (input, output) else {
            return Err(Failure::new("Must specify both input and output files"));
        };
        Ok(Self { input, output, block, count, skip })
    }

    /// What is copied of a disk of `size` bytes; `None`: what is left out is more than there is.
    fn range(&self, size: u64) -> Option<ByteRange> {
        let end = self.count.map_or(size, |count| count.saturating_mul(self.block).min(size));
        let start = self.skip.saturating_mul(self.block);
        ByteRange::between(start, end)
    }
}

const MOST: u64 = i64::MAX as u64;
/// Bytes that are copied at once, about.
const STEP: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn operands(line: &str) -> Result<Operands, String> {
        let words: Vec<_> = line.split(' ').map(str::to_owned).collect();
        Operands::read(&words).map_err(|failure| failure.text)
    }

    #[test]
    fn operands_stand_in_any_order_and_the_last_counts() {
        let read = operands("bs=1k of=b if=x count=3 if=a skip=1 bs=2k").unwrap();
        let expected = Operands { input: "a".into(), output: "b".into(), block: 2048, count: Some(3), skip: 1 };
        assert_eq!(read, expected);
        assert_eq!(operands("if=a").unwrap_err(), "Must specify both input and output files");
        assert_eq!(operands("if=a of=b bs").unwrap_err(), "unrecognized operand bs");
        assert_eq!(operands("if=a of=b seek=1").unwrap_err(), "unrecognized operand seek");
        assert_eq!(operands("bs=0 if=a of=b").unwrap_err(), "Invalid bs specified. Must be between 1 and 2147483647.");
    }

    #[test]
    fn the_count_includes_what_is_left_out() {
        let range = |line: &str, size| operands(&format!("if=a of=b {line}")).unwrap().range(size);
        let between = |start, end| ByteRange::between(start, end);
        assert_eq!(range("bs=1000 count=3 skip=1", 1 << 20), between(1000, 3000));
        assert_eq!(range("bs=1000", 4096), between(0, 4096));
        assert_eq!(range("bs=1000 count=3 skip=3", 1 << 20), between(3000, 3000));
        assert_eq!(range("bs=1000 count=3 skip=4", 1 << 20), None);
        assert_eq!(range("bs=1M skip=9", 4 << 20), None);
        assert_eq!(range("bs=1M count=9223372036854775807", 4 << 20), between(0, 4 << 20));
    }
}
