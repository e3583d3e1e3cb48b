//! `rebase`: lets an image stand on another one. What the two differ in is copied into the image first, unless it is said
//! that they do not.

use block_core::base::{ByteRange, Error, IoError, align_down};
use block_core::graph::{BackingName, PermSet, WriteFlags};
use block_core::pipeline::Content;
use block_core::rt::IoBuf;
use trellis_image::args::{Args, Definition, flag, option};
use trellis_image::{
    Below, Cache, Disk, Failure, Given, Image, Outcome, Progress, Session, both, is_driver, strerror, words,
};

use super::common::{
    CACHE, FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, cache, closed, given, objects, one_image, open,
    shows_progress, source_cache,
};

pub(super) const DEFINITION: Definition = Definition {
    name: "rebase",
    about: "Lets an image stand on another one",
    options: &[
        QUIET,
        PROGRESS,
        FORMAT,
        IMAGE_OPTS,
        CACHE,
        option('b', "backing", "BACKING", "what the image shall stand on; empty: nothing"),
        option('F', "backing-format", "FMT", "the format of that"),
        option('T', "backing-cache", "CACHE", "how the host caches that (default: writeback)"),
        flag('u', "backing-unsafe", "only the name changes: nothing is compared or copied"),
        flag('c', "compress", "what is copied is compressed"),
        FORCE_SHARE,
        OBJECT,
    ],
    words: "FILENAME",
};

pub(super) async fn run(session: &Session, args: Args) -> Outcome {
    let word = one_image(&args)?;
    let (is_unsafe, backing) = (args.has("backing-unsafe"), args.get("backing"));
    if !is_unsafe && backing.is_none() {
        return Err(Failure::usage("Must specify backing file (-b) or use unsafe mode (-u)"));
    }
    objects(session, &args).await?;
    let cache = cache(&args)?;
    let source = source_cache(&args, "backing-cache")?;
    // As in qemu-img, `-U` lets nobody else write to what is written here.
    let given = Given { cache, writable: true, no_backing: is_unsafe, force_share: false, ..given(&args, word)? };
    let image = open(session, &given).await?;
    let format = args.get("backing-format");
    if let Some(format) = format.filter(|format| !is_driver(format)) {
        return closed(image, Err(Failure::new(format!("Invalid format name: '{format}'")))).await;
    }
    let wanted = Wanted { named: backing.filter(|name| !name.is_empty()), format, cache: source, is_unsafe };
    let result = rebased(session, &image, &wanted, &args).await;
    closed(image, result).await?;
    Ok(0)
}

/// What the image is to stand on.
struct Wanted<'a> {
    named: Option<&'a str>,
    format: Option<&'a str>,
    cache: Cache,
    /// Nothing is compared or copied.
    is_unsafe: bool,
}

/// Nobody else can come to the image between the copying and the change of the name.
async fn rebased(session: &Session, image: &Image, wanted: &Wanted<'_>, args: &Args) -> Result<(), Failure> {
    let Wanted { named, format, .. } = *wanted;
    checked(image, named, format)?;
    if !wanted.is_unsafe {
        let progress = Progress::begin(session, shows_progress(args));
        let new = NewBacking { name: named, format, cache: wanted.cache, base: &file(image).await };
        copied(session, image, new, args.has("compress"), &progress).await?;
    }
    let backing = named.map(|name| BackingName { name, format: Some(format.unwrap_or_default()) });
    image.name_backing(backing).await.map_err(|error| not_changed(named, &words(&error)))
}

/// What can be said before anything is copied.
fn checked(image: &Image, named: Option<&str>, format: Option<&str>) -> Result<(), Failure> {
    if image.driver != "qcow2" {
        return Err(not_changed(named, "Operation not supported"));
    }
    if named.is_some() && format.is_none() {
        return Err(not_changed(named, "backing format must be specified"));
    }
    Ok(())
}

fn not_changed(named: Option<&str>, why: &str) -> Failure {
    match named {
        Some(name) => Failure::new(format!("Could not change the backing file to '{name}': {why}")),
        None => Failure::new(format!("Could not uncouple the backing file: {why}")),
    }
}

async fn file(image: &Image) -> String {
    block_core::catalog::info(image.graph(), image.node).await.map(|info| info.filename).unwrap_or_default()
}

/// What the image shall stand on.
struct NewBacking<'a> {
    name: Option<&'a str>,
    format: Option<&'a str>,
    cache: Cache,
    /// The image's own file.
    base: &'a str,
}

/// Copies into the image what would be lost.
async fn copied(
    session: &Session,
    image: &Image,
    new: NewBacking<'_>,
    compressed: bool,
    progress: &Progress,
) -> Result<(), Failure> {
    let opened = match new.name {
        None => None,
        Some(name) => {
            let failed =
                |error: Error| Failure::new(format!("Could not open new backing file '{name}': {}", words(&error)));
            let path = trellis_image::beside(new.base, name).map_err(failed)?;
            let format = new.format.map(str::to_owned);
            Some(session.open(&Given { format, cache: new.cache, ..Given::named(path) }).await.map_err(failed)?)
        }
    };
    let old = match image.child("backing") {
        None => Ok(None),
        Some(node) => image.enter(node, PermSet::CONSISTENT_READ).await.map(Some),
    };
    let result = match &old {
        Err(_) => Ok(()),
        Ok(old) => {
            let copy = Copy {
                image: image.disk(),
                old: old.as_ref().map(Below::disk),
                new: opened.as_ref().map(Image::disk),
                size: image.size(),
                cluster: u64::from(image.report().geometry.limits.compressed_cluster).max(SECTOR),
                flags: WriteFlags { compressed, ..WriteFlags::default() },
            };
            copy.run(progress).await
        }
    };
    if let Some(old) = old? {
        old.release().await;
    }
    match opened {
        Some(opened) => closed(opened, result).await,
        None => result,
    }
}

struct Copy {
    image: Disk,
    old: Option<Disk>,
    new: Option<Disk>,
    size: u64,
    cluster: u64,
    flags: WriteFlags,
}

impl Copy {
    async fn run(&self, progress: &Progress) -> Result<(), Failure> {
        let mut at = 0;
        while at < self.size {
            progress.at(at, self.size);
            let rest = ByteRange::between(at, self.size).expect("it has been compared above");
            let failed =
                |error: IoError| Failure::new(format!("error while reading image metadata: {}", strerror(error)));
            let (own, len) = self.image.allocated(rest).await.map_err(failed)?;
            let part = rest.split(len).0;
            let same = if own { Some(part) } else { self.zeroes(part).await? };
            at = match same {
                Some(same) => same.end(),
                None => {
                    let part = part.split(STEP).0;
                    self.part(part).await?;
                    part.end()
                }
            };
        }
        let failed = |error| Failure::new(format!("Could not flush the image: {}", strerror(error)));
        self.image.flush().await.map_err(failed)?;
        progress.at(1, 1);
        Ok(())
    }

    /// The first bytes of a range, if they are known to be zeroes before and after.
    async fn zeroes(&self, at: ByteRange) -> Result<Option<ByteRange>, Failure> {
        let mut part = at;
        for (which, disk) in [("old", &self.old), ("new", &self.new)] {
            let Some(disk) = disk else { continue };
            let inside = ByteRange::whole(disk.size().await).intersection(part);
            let Some(inside) = inside.filter(|inside| inside.start() == part.start()) else { continue };
            let status = disk.status(inside).await.map_err(|error| not_read(which, error))?;
            if !matches!(status.content, Content::Zero | Content::Absent) {
                return Ok(None);
            }
            part = inside.split(status.len).0;
        }
        Ok(Some(part))
    }

    /// Clusters that the image does not have.
    async fn part(&self, part: ByteRange) -> Result<(), Failure> {
        let contents = both(bytes(self.old.as_ref(), part), bytes(self.new.as_ref(), part)).await;
        let (old, new) = (contents.0.map_err(|e| not_read("old", e))?, contents.1.map_err(|e| not_read("new", e))?);
        let mut at = part.start();
        while at < part.end() {
            let end = (align_down(at, self.cluster) + self.cluster).min(part.end());
            let cluster = ByteRange::between(at, end).expect("ends come after beginnings");
            let offset = at - part.start();
            let (was, will) = (old.slice(offset, cluster.len()), new.slice(offset, cluster.len()));
            if !was.has_bytes_of(&will) {
                let written = if was.is_zero() {
                    self.image.write_zeroes(cluster, WriteFlags::default()).await
                } else {
                    self.image.write(cluster, was, self.flags).await
                };
                written
                    .map_err(|error| Failure::new(format!("Error while writing to COW image: {}", strerror(error))))?;
            }
            at = end;
        }
        Ok(())
    }
}

fn not_read(which: &str, error: IoError) -> Failure {
    Failure::new(format!("error while reading from {which} backing file: {}", strerror(error)))
}

/// What a layer has there; zeroes where it ends, or where there is none.
async fn bytes(disk: Option<&Disk>, at: ByteRange) -> Result<IoBuf, IoError> {
    let buf = IoBuf::private(at.len())?;
    let Some(disk) = disk else { return Ok(buf) };
    let inside = ByteRange::whole(disk.size().await).intersection(at).filter(|part| part.start() == at.start());
    if let Some(inside) = inside {
        disk.read(inside, buf.slice(0, inside.len())).await?;
    }
    Ok(buf)
}

const SECTOR: u64 = 512;
/// Bytes that are compared at once.
const STEP: u64 = 2 << 20;
