//! `convert`: copies a disk into another image, or several disks one behind the other.
//!
//! `wanted` is what the command line says, `copy` does the copying, `bitmaps` takes dirty bitmaps along. A target that was
//! made here goes again if the copy fails or is broken off: half a disk in a valid image looks whole.

mod bitmaps;
mod copy;
mod wanted;

use std::rc::Rc;

use block_core::base::Error;
use block_core::rt::blocking;
use trellis_image::args::{Args, Definition, flag, long_flag, option};
use trellis_image::pairs::Pairs;
use trellis_image::{Failure, FileName, Given, Image, Interrupt, Outcome, Progress, Session, is_any_of, plain};

use self::copy::{Copy, Manner, Part};
use self::wanted::Wanted;
use super::common::{FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, closed, objects, open};
use super::create;
use super::snapshot::at_snapshot;

pub(super) const DEFINITION: Definition = Definition {
    name: "convert",
    about: "Copies images into another one",
    options: &[
        FORMAT.also(&["source-format"]),
        option('O', "target-format", "FMT", "the format of the new image (default: raw)").also(&["output-format"]),
        option('o', "options", "FMT_OPTS", "options of the new image, as a=b,c=d (`help` lists them)")
            .also(&["target-options"]),
        option('B', "backing", "BACKING", "the new image stands on this one, which has what is not copied"),
        option('F', "backing-format", "FMT", "the format of that"),
        flag('c', "compress", "store the data compressed"),
        flag('C', "copy-range-offloading", "let the kernel copy, where it can"),
        option(
            'l',
            "snapshot",
            "SNAPSHOT",
            "copy an internal snapshot: its name or id, or snapshot.id=…,snapshot.name=…",
        )
        .also(&["source-snapshot"]),
        option('m', "parallel", "NUMBER", "parts that are copied at once, 1 to 16 (default: 8)"),
        flag('n', "skip-create", "the target is there already").also(&["no-create"]),
        option('r', "rate-limit", "RATE", "bytes written in a second at the most").also(&["rate"]),
        option('S', "sparse-size", "SIZE", "zeroes of at least so many bytes are left out (default: 4k; 0: none)"),
        option('t', "target-cache", "CACHE", "how the host caches the target (default: unsafe)")
            .also(&["output-cache"]),
        option('T', "source-cache", "CACHE", "how the host caches the source (default: writeback)"),
        flag('W', "oob-writes", "write in any order"),
        IMAGE_OPTS.also(&["source-image-opts"]),
        long_flag("target-image-opts", "the target is named by a list of options, not by a file"),
        long_flag("target-is-zero", "the target reads as zeroes already"),
        long_flag("bitmaps", "copy persistent dirty bitmaps too"),
        long_flag("skip-broken-bitmaps", "but not those that cannot be used"),
        long_flag("salvage", "what cannot be read is zeroes in the target"),
        FORCE_SHARE,
        OBJECT,
        PROGRESS,
        QUIET,
    ],
    words: "FILENAME [FILENAME…] TARGET",
};

pub(super) async fn run(session: &Session, args: Args) -> Outcome {
    // Before there is any other thread, which would be ended by them.
    Interrupt::block()?;
    if args.all("options").any(Pairs::ask_for_help) {
        return create::help(args.get("target-format").unwrap_or("raw"));
    }
    let interrupt = Interrupt::watch(session)?;
    let wanted = Wanted::read(&args)?;
    objects(session, &args).await?;
    let mut sources = Vec::new();
    let result = converted(session, &wanted, &mut sources, &interrupt).await;
    for source in sources {
        // It was only read.
        let _closed: Result<(), _> = source.close().await;
    }
    result
}

/// Opens all sources, makes the target, copies.
async fn converted(session: &Session, wanted: &Wanted, sources: &mut Vec<Image>, interrupt: &Interrupt) -> Outcome {
    for name in &wanted.sources {
        sources.push(source(session, wanted, name).await?);
    }
    let size = sources.iter().try_fold(0u64, |sum, source| sum.checked_add(source.size()));
    let size = size.ok_or_else(|| Failure::new("The sources are too large together"))?;
    let creation = wanted.creation(size, sources)?;
    check_others(wanted).await?;
    if wanted.bitmaps {
        bitmaps::check(&sources[0], wanted.skips_broken_bitmaps)?;
    }
    let key_secret = creation.as_ref().and_then(|creation| creation.key_secret().map(str::to_owned));
    let target = Given { key_secret, ..wanted.target() };
    let Some(creation) = creation else {
        let there = IsNew { is_new: false, is_zero: false };
        return into_target(session, wanted, sources, &target, there, interrupt).await;
    };
    let not_made = |error: Error| wanted.converting(&error);
    let new = creation.begin(session, wanted.target.text()).await.map_err(not_made)?;
    interrupt.undo_first(create::undo(session, &new));
    let is_zero = new.make(session).await.map_err(not_made)?;
    let result = into_target(session, wanted, sources, &target, IsNew { is_new: true, is_zero }, interrupt).await;
    if !matches!(result, Ok(0)) {
        blocking(create::undo(session, &new)).await;
    }
    result
}

/// The target is none of the sources. In QEMU's words.
async fn check_others(wanted: &Wanted) -> Result<(), Failure> {
    let path = |name: &FileName| match name {
        FileName::Name(name) => plain(name).ok().map(str::to_owned),
        FileName::Options(_) => None,
    };
    let Some(target) = path(&wanted.target) else { return Ok(()) };
    let sources: Vec<_> = wanted.sources.iter().filter_map(path).collect();
    if !is_any_of(&target, &sources).await {
        return Ok(());
    }
    let text = format!("Failed to get \"write\" lock\nIs another process using the image [{target}]?");
    Err(match wanted.creates {
        true => wanted.converting(&Error::new(text)),
        false => Failure::new(format!("Could not open '{target}': {text}")),
    })
}

/// What the target is like before anything is copied.
#[derive(Clone, Copy)]
struct IsNew {
    /// It was made here.
    is_new: bool,
    /// And reads as zeroes, but for what it stands on.
    is_zero: bool,
}

async fn into_target(
    session: &Session,
    wanted: &Wanted,
    sources: &[Image],
    target: &Given,
    is_new: IsNew,
    interrupt: &Interrupt,
) -> Outcome {
    let target = open(session, target).await?;
    let result = copied(session, wanted, sources, &target, is_new, interrupt).await;
    closed(target, result).await
}

async fn copied(
    session: &Session,
    wanted: &Wanted,
    sources: &[Image],
    target: &Image,
    is_new: IsNew,
    interrupt: &Interrupt,
) -> Outcome {
    if target.size() < sources.iter().map(Image::size).sum() {
        return Err(Failure::new("output file is smaller than input file"));
    }
    let manner = manner(wanted, target, is_new)?;
    let parts = sources.iter().map(|source| Part { disk: source.disk(), size: source.size() }).collect();
    let copy = Copy::new(&session.program, parts, target.disk(), manner);
    let stopped = copy.clone();
    interrupt.stop_only(move || stopped.stop());
    let progress = Rc::new(Progress::begin(session, wanted.shows_progress));
    let result = copy.run(session, &progress).await;
    if let Some(code) = interrupt.code() {
        return Ok(code);
    }
    result?;
    if wanted.bitmaps {
        bitmaps::copy(session, &sources[0], target).await?;
    }
    Ok(0)
}

/// Opens a source, or the internal snapshot of it that was asked for.
async fn source(session: &Session, wanted: &Wanted, name: &FileName) -> Result<Image, Failure> {
    let given = Given {
        format: wanted.format.clone(),
        cache: wanted.source_cache,
        force_share: wanted.force_share,
        ..Given::of(name.clone())
    };
    let image = open(session, &given).await?;
    match &wanted.snapshot {
        None => Ok(image),
        Some(wish) => at_snapshot(session, image, &given, wish).await,
    }
}

fn manner(wanted: &Wanted, target: &Image, is_new: IsNew) -> Result<Manner, Failure> {
    let compressed = match (wanted.compressed, target.report().geometry.limits.compressed_cluster) {
        (false, _) => None,
        (true, 0) => return Err(Failure::new("Compression not supported for this file format")),
        (true, cluster) => Some(u64::from(cluster)),
    };
    let below = target.child("backing").and_then(|node| target.graph().node(node));
    Ok(Manner {
        at_once: wanted.parallel,
        in_order: !wanted.out_of_order && compressed.is_none(),
        compressed,
        scan: wanted.sparse.filter(|_| !wanted.copy_range),
        fills: wanted.sparse.is_none(),
        is_zero: wanted.target_is_zero || (is_new.is_zero && below.is_none()),
        is_new: is_new.is_new,
        over: wanted.stands().then(|| below.map_or(0, |below| below.geometry.size)),
        salvages: wanted.salvages,
        rate: wanted.rate,
    })
}
