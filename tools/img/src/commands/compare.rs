//! `compare`: whether two images have the same contents.

use block_core::base::{ByteRange, IoError};
use block_core::pipeline::{Content, Status};
use block_core::rt::IoBuf;
use trellis_image::args::{Args, Definition, flag, option};
use trellis_image::{Disk, Failure, Given, Image, Outcome, Progress, Session, both, say, strerror};

use super::common::{
    FORCE_SHARE, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, SOURCE_CACHE, file_name, objects, open, shows_progress,
    source_cache,
};

pub(super) const DEFINITION: Definition = Definition {
    name: "compare",
    about: "Compares the contents of two images",
    options: &[
        QUIET,
        PROGRESS,
        option('f', "a-format", "FMT", "the first image's format; it is guessed otherwise").also(&["left-format"]),
        option('F', "b-format", "FMT", "the second image's format; it is guessed otherwise").also(&["right-format"]),
        IMAGE_OPTS,
        flag('s', "strict", "sizes, and what is allocated, have to be the same too"),
        SOURCE_CACHE,
        FORCE_SHARE,
        OBJECT,
    ],
    words: "FILENAME1 FILENAME2",
};

/// Exit codes of this command alone.
const NOT_OPENED: u8 = 2;
const NO_STATUS: u8 = 3;
const NOT_READ: u8 = 4;

pub(super) async fn run(session: &Session, args: Args) -> Outcome {
    let [first, second] = &args.words[..] else { return Err(Failure::usage("Expecting two image file names")) };
    let with_code = |failure: Failure| Failure { code: NOT_OPENED, ..failure };
    if args.has("image-opts") && (args.has("a-format") || args.has("b-format")) {
        return Err(with_code(Failure::new("--image-opts and --format are mutually exclusive")));
    }
    let cache = source_cache(&args, "cache").map_err(with_code)?;
    objects(session, &args).await.map_err(with_code)?;
    let given = |word: &String, format: &str| Given {
        format: args.get(format).map(str::to_owned),
        cache,
        force_share: args.has("force-share"),
        ..Given::of(file_name(&args, word))
    };
    let first = open(session, &given(first, "a-format")).await.map_err(with_code)?;
    let second = match open(session, &given(second, "b-format")).await {
        Ok(second) => second,
        Err(failure) => {
            first.close().await?;
            return Err(with_code(failure));
        }
    };
    let progress = Progress::begin(session, shows_progress(&args));
    let comparison = Comparison {
        progress,
        strict: args.has("strict"),
        disks: [first.disk(), second.disk()],
        sizes: [first.size(), second.size()],
    };
    let result = comparison.run().await;
    let outcome = match &result {
        Ok(said) => {
            if !args.has("quiet") {
                say(&said.text);
            }
            Ok(said.code)
        }
        Err(_) => Ok(0),
    };
    drop(comparison);
    closed(first).await?;
    closed(second).await?;
    result.map(drop).and(outcome)
}

async fn closed(image: Image) -> Result<(), Failure> {
    Ok(image.close().await?)
}

struct Comparison {
    progress: Progress,
    strict: bool,
    disks: [Disk; 2],
    sizes: [u64; 2],
}

/// What has come of it.
struct Said {
    code: u8,
    text: String,
}

impl Said {
    fn differs(text: String) -> Self {
        Self { code: 1, text }
    }
}

impl Comparison {
    async fn run(&self) -> Result<Said, Failure> {
        let [a, b] = self.sizes;
        if self.strict && a != b {
            return Ok(Said::differs("Strict mode: Image size mismatch!\n".to_owned()));
        }
        let mut at = 0;
        while at < a.min(b) {
            self.progress.at(at, a.max(b));
            let rest = ByteRange::between(at, a.min(b)).expect("it has been compared above");
            let statuses = both(self.status(0, rest), self.status(1, rest)).await;
            let (one, other) = (statuses.0?, statuses.1?);
            let part = rest.split(one.len.min(other.len)).0;
            if self.strict && is_different(one, other) {
                return Ok(Said::differs(format!("Strict mode: Offset {at} block status mismatch!\n")));
            }
            let (part, mismatch) = match (has_data(one), has_data(other)) {
                (false, false) => (part, None),
                (true, true) => {
                    let part = part.split(STEP).0;
                    (part, self.first_difference(part).await?)
                }
                (data, _) => self.first_byte(if data { 0 } else { 1 }, part).await?,
            };
            if let Some(offset) = mismatch {
                return Ok(mismatched(offset, ""));
            }
            at = part.end();
        }
        let warning = if a == b { "" } else { "Warning: Image size mismatch!\n" };
        let longer = if a > b { 0 } else { 1 };
        while at < a.max(b) {
            self.progress.at(at, a.max(b));
            let rest = ByteRange::between(at, a.max(b)).expect("it has been compared above");
            let status = self.status(longer, rest).await?;
            let part = rest.split(status.len).0;
            let (part, mismatch) = if has_data(status) { self.first_byte(longer, part).await? } else { (part, None) };
            if let Some(offset) = mismatch {
                return Ok(mismatched(offset, warning));
            }
            at = part.end();
        }
        self.progress.at(1, 1);
        Ok(Said { code: 0, text: format!("{warning}Images are identical.\n") })
    }

    async fn status(&self, which: usize, at: ByteRange) -> Result<Status, Failure> {
        let failed = |error| failed_at(NO_STATUS, "Sector allocation test failed for", which, at, error);
        self.disks[which].status(at).await.map_err(failed)
    }

    async fn bytes(&self, which: usize, at: ByteRange) -> Result<IoBuf, Failure> {
        let failed = |error| failed_at(NOT_READ, "Error while reading offset", which, at, error);
        let buf = IoBuf::private(at.len()).map_err(failed)?;
        self.disks[which].read(at, buf.clone()).await.map_err(failed)?;
        Ok(buf)
    }

    /// Where two parts with data differ.
    async fn first_difference(&self, at: ByteRange) -> Result<Option<u64>, Failure> {
        let bytes = both(self.bytes(0, at), self.bytes(1, at)).await;
        let (one, other) = (bytes.0?, bytes.1?);
        if one.has_bytes_of(&other) {
            return Ok(None);
        }
        let (one, other) = (one.to_vec(), other.to_vec());
        // QEMU's grain is a sector.
        let sectors = one.chunks(SECTOR).zip(other.chunks(SECTOR));
        Ok(sectors.enumerate().find(|(_, (a, b))| a != b).map(|(number, _)| at.start() + (number * SECTOR) as u64))
    }

    /// Where one has something although the other has zeroes. Gives the part that was looked at.
    async fn first_byte(&self, which: usize, at: ByteRange) -> Result<(ByteRange, Option<u64>), Failure> {
        let at = at.split(STEP).0;
        let buf = self.bytes(which, at).await?;
        if buf.is_zero() {
            return Ok((at, None));
        }
        let bytes = buf.to_vec();
        let first = bytes.chunks(SECTOR).position(|sector| sector.iter().any(|byte| *byte != 0)).unwrap_or(0);
        Ok((at, Some(at.start() + (first * SECTOR) as u64)))
    }
}

fn mismatched(offset: u64, warning: &str) -> Said {
    Said::differs(format!("{warning}Content mismatch at offset {offset}!\n"))
}

fn failed_at(code: u8, what: &str, which: usize, at: ByteRange, error: IoError) -> Failure {
    let image = ["first", "second"][which];
    Failure::with_code(code, format!("{what} {} of the {image} image: {}", at.start(), strerror(error)))
}

fn has_data(status: Status) -> bool {
    matches!(status.content, Content::Data | Content::Encoded)
}

/// In strict mode zeroes that somebody has written are not the same as nothing.
fn is_different(one: Status, other: Status) -> bool {
    let kind = |status: Status| (has_data(status), status.content == Content::Absent);
    kind(one) != kind(other)
}

const SECTOR: usize = 512;
/// Bytes that are read at once.
const STEP: u64 = 2 << 20;
