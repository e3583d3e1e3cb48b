//! `map`: where an image's bytes are: in which layer, which file, and at what place of it.

use std::collections::HashMap;
use std::fmt::Write;

use block_core::base::{ByteRange, Error, IoError};
use block_core::graph::{Child, Extent, Place};
use trellis_image::args::{Args, Definition, option};
use trellis_image::{Disk, Failure, Image, Outcome, Session, say, size, strerror, top};

use super::common::{
    FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, Output, closed, given, objects, one_image, open, output,
};

pub(super) const DEFINITION: Definition = Definition {
    name: "map",
    about: "Shows where the bytes of an image are",
    options: &[
        FORMAT,
        IMAGE_OPTS,
        OBJECT,
        OUTPUT,
        option('s', "start-offset", "OFFSET", "the first byte that is looked at (default: 0)"),
        option('l', "max-length", "LENGTH", "how many bytes are looked at (default: all)"),
        FORCE_SHARE,
    ],
    words: "FILENAME",
};

pub(super) async fn run(session: &Session, args: Args) -> Outcome {
    let output = output(&args)?;
    let start = args.get("start-offset").map(|word| size::parse_named("start offset", word)).transpose()?.unwrap_or(0);
    let length = args.get("max-length").map(|word| size::parse_named("max length", word)).transpose()?;
    let word = one_image(&args)?;
    let given = given(&args, word)?;
    objects(session, &args).await?;
    let image = open(session, &given).await?;
    let result = shown(&image, output, start, length).await;
    closed(image, result).await
}

async fn shown(image: &Image, output: Output, start: u64, length: Option<u64>) -> Outcome {
    let (names, disk) = (Names::of(image).await, image.disk());
    let end = image.size().min(length.map_or(u64::MAX, |length| start.saturating_add(length)));
    let mut page = match output {
        Output::Human => format!("{:<16}{:<16}{:<16}{}\n", "Offset", "Length", "Mapped to", "File"),
        Output::Json => "[".to_owned(),
    };
    let mut current = Entry { start, ..Entry::default() };
    let mut result = Ok(0);
    while current.end() < end && result.is_ok() {
        let rest = ByteRange::between(current.end(), end).expect("it has been compared above");
        let failed =
            |error: IoError| Failure::from(Error::new(format!("Failed to read image metadata: {}", strerror(error))));
        let next = match found(&disk, rest, &names).await {
            Ok(next) => next,
            Err(error) => {
                say(&page);
                return Err(failed(error));
            }
        };
        if current.goes_on_with(&next) {
            current.len += next.len;
            continue;
        }
        if current.len > 0 {
            result = current.show(output, true, &mut page);
        }
        if page.len() > PAGE {
            say(&std::mem::take(&mut page));
        }
        current = next;
    }
    if result.is_ok() {
        result = current.show(output, false, &mut page);
    }
    if output == Output::Json {
        page.push_str("]\n");
    }
    say(&page);
    result
}

/// A run of bytes of the same kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Entry {
    start: u64,
    len: u64,
    /// How many layers down they are.
    depth: u32,
    /// A layer has something to say of them.
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    /// Where they are, in which file.
    place: Option<(u64, String)>,
}

impl Entry {
    fn end(&self) -> u64 {
        self.start + self.len
    }

    fn goes_on_with(&self, next: &Self) -> bool {
        let place = self.place.clone().map(|(offset, file)| (offset + self.len, file));
        let same = Self { start: next.start, len: next.len, place, ..self.clone() };
        self.len > 0 && same == *next
    }

    fn show(&self, output: Output, more: bool, page: &mut String) -> Outcome {
        let Self { start, len, depth, present, zero, data, compressed, place } = self;
        match (output, place) {
            (Output::Human, None) if *data => {
                return Err(Failure::new("File contains external, encrypted or compressed clusters."));
            }
            (Output::Human, Some((offset, file))) if *data && !zero => {
                let _ = writeln!(page, "{:<16}{:<16}{:<16}{file}", hex(*start), hex(*len), hex(*offset));
            }
            (Output::Human, _) => {}
            (Output::Json, _) => {
                let offset = place.as_ref().map(|(offset, _)| format!(", \"offset\": {offset}")).unwrap_or_default();
                let _ = write!(
                    page,
                    "{{ \"start\": {start}, \"length\": {len}, \"depth\": {depth}, \"present\": {present}, \
                     \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}{offset}}}"
                );
                page.push_str(if more { ",\n" } else { "" });
            }
        }
        Ok(0)
    }
}

/// As C's `%#x` has it.
fn hex(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}

/// What is to be known of nodes besides.
struct Names {
    /// Their files, by node-name.
    files: HashMap<String, String>,
    /// Nodes whose bytes are those of their file, so that holes of that are holes.
    plain: Vec<String>,
    /// Nodes whose bytes are encrypted: none of them is compressed.
    encrypted: Vec<String>,
}

impl Names {
    async fn of(image: &Image) -> Self {
        let graph = image.graph();
        let (mut files, mut plain, mut encrypted) = (HashMap::new(), Vec::new(), Vec::new());
        for report in graph.nodes() {
            let Some(info) = block_core::catalog::info(graph, report.id).await else { continue };
            if info.driver == "raw" {
                plain.push(report.name.clone());
            }
            if info.encrypted {
                encrypted.push(report.name.clone());
            }
            files.insert(report.name, info.filename);
        }
        Self { files, plain, encrypted }
    }
}

/// What the first bytes of a range are.
async fn found(disk: &Disk, at: ByteRange, names: &Names) -> Result<Entry, IoError> {
    let pin = disk.enter().await;
    let (mut node, mut rest, mut depth) = (top(&pin), at, 0);
    loop {
        let Extent { len, place } = node.map(rest).await?;
        rest = rest.split(len).0;
        let entry = Entry { start: at.start(), len: rest.len(), depth, present: true, ..Entry::default() };
        let next = match place {
            Place::Here => {
                let place = Some((rest.start(), names.files.get(node.name()).cloned().unwrap_or_default()));
                return Ok(Entry { data: true, place, ..entry });
            }
            Place::Encoded => {
                let compressed = !names.encrypted.iter().any(|encrypted| encrypted == node.name());
                return Ok(Entry { data: true, compressed, ..entry });
            }
            Place::Zero { allocated } => return Ok(Entry { zero: true, present: allocated, ..entry }),
            Place::Data { child, offset } => {
                let is_plain = names.plain.iter().any(|plain| plain == node.name());
                let stored = stored(node.below(child), offset, entry.len, is_plain, names).await?;
                return Ok(Entry { start: at.start(), depth, ..stored });
            }
            Place::Passed(child) => node.below(child),
            Place::Below(child) => {
                depth += 1;
                node.below(child)
            }
        };
        let inside = ByteRange::whole(next.size()).intersection(rest).filter(|part| part.start() == rest.start());
        match inside {
            Some(inside) => (node, rest) = (next, inside),
            // What stands on something shorter has zeroes there, though nobody says so.
            None => return Ok(Entry { zero: true, present: false, ..entry }),
        }
    }
}

/// Bytes that a file holds for a format.
async fn stored(file: Child<'_>, offset: u64, len: u64, holes: bool, names: &Names) -> Result<Entry, IoError> {
    let (mut file, mut at) = (file, ByteRange::new(offset, len).ok_or(IoError::OutOfRange)?);
    loop {
        let inside = ByteRange::whole(file.size()).intersection(at).filter(|part| part.start() == at.start());
        let Some(inside) = inside else {
            let place = Some((at.start(), names.files.get(file.name()).cloned().unwrap_or_default()));
            return Ok(Entry { len: at.len(), present: true, zero: holes, data: !holes, place, ..Entry::default() });
        };
        if !holes {
            // A format says itself what it has; where its file has holes is not asked.
            let place = Some((at.start(), names.files.get(file.name()).cloned().unwrap_or_default()));
            return Ok(Entry { len: at.len(), present: true, data: true, place, ..Entry::default() });
        }
        let Extent { len, place } = file.map(inside).await?;
        let known = inside.split(len).0;
        let name = names.files.get(file.name()).cloned().unwrap_or_default();
        let entry = Entry { len: known.len(), present: true, place: Some((at.start(), name)), ..Entry::default() };
        match place {
            Place::Zero { .. } => return Ok(Entry { zero: true, ..entry }),
            Place::Data { child, offset } => {
                (file, at) = (file.below(child), ByteRange::new(offset, known.len()).ok_or(IoError::OutOfRange)?);
            }
            Place::Passed(child) => (file, at) = (file.below(child), known),
            Place::Here => return Ok(Entry { data: true, ..entry }),
            Place::Encoded | Place::Below(_) => return Ok(Entry { data: true, place: None, ..entry }),
        }
    }
}

/// Bytes that are printed at once.
const PAGE: usize = 64 << 10;
