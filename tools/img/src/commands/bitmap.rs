//! `bitmap`: dirty bitmaps that an image stores are added, changed and removed.

use block_core::graph::{BitmapAction, BitmapChange};
use trellis_image::args::{Args, Definition, long_flag, long_option, option};
use trellis_image::{Failure, Given, Image, Outcome, Session, size, words};

use super::common::{FORMAT, IMAGE_OPTS, OBJECT, closed, given, objects, open};

pub(super) const DEFINITION: Definition = Definition {
    name: "bitmap",
    about: "Changes the dirty bitmaps that an image stores",
    options: &[
        FORMAT,
        IMAGE_OPTS,
        long_flag("add", "make BITMAP; it records from then on"),
        option('g', "granularity", "SIZE", "bytes for a bit of the bitmap that is added"),
        long_flag("remove", "remove BITMAP"),
        long_flag("clear", "take all marks out of BITMAP"),
        long_flag("enable", "let BITMAP record"),
        long_flag("disable", "let BITMAP stay as it is"),
        long_option("merge", "SOURCE", "mark in BITMAP what is marked in the bitmap SOURCE"),
        option('b', "source-file", "FILENAME", "the image that SOURCE is in, if it is another one"),
        option('F', "source-format", "FMT", "the format of that"),
        OBJECT,
    ],
    words: "FILENAME BITMAP",
};

pub(super) async fn run(session: &Session, args: Args) -> Outcome {
    let granularity = args.get("granularity").map(|word| size::parse_between("granularity", word, 0, i64::MAX as u64));
    let granularity = granularity.transpose()?;
    if args.has("image-opts") && args.has("format") {
        return Err(Failure::new("--image-opts and --format are mutually exclusive"));
    }
    let acts: Vec<_> = args.given().filter(|(id, _)| ACTS.contains(id)).collect();
    if acts.is_empty() {
        return Err(Failure::new("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"));
    }
    let [filename, bitmap] = &args.words[..] else { return Err(Failure::new("Expecting filename and bitmap name")) };
    if granularity.is_some_and(|size| size > 0) && !args.has("add") {
        return Err(Failure::new("granularity only supported with --add"));
    }
    if args.has("source-format") && !args.has("source-file") {
        return Err(Failure::new("-F only supported with -b"));
    }
    if args.has("source-file") && !args.has("merge") {
        return Err(Failure::new("Merge bitmap source file only supported with --merge"));
    }
    objects(session, &args).await?;
    let given = Given { writable: true, no_backing: true, ..given(&args, filename)? };
    let image = open(session, &given).await?;
    let source = match args.get("source-file") {
        None => Ok(None),
        Some(name) => {
            let format = args.get("source-format").map(str::to_owned);
            open(session, &Given { format, no_backing: true, ..Given::named(name) }).await.map(Some)
        }
    };
    let source = match source {
        Ok(source) => source,
        Err(failure) => return closed(image, Err(failure)).await,
    };
    let mut result = Ok(0);
    for (act, value) in acts {
        result = change(&image, source.as_ref(), bitmap, act, value, granularity).await;
        if result.is_err() {
            break;
        }
    }
    let result = closed(image, result).await;
    match source {
        Some(source) => closed(source, result).await,
        None => result,
    }
}

async fn change(
    image: &Image,
    source: Option<&Image>,
    bitmap: &str,
    act: &str,
    value: &str,
    granularity: Option<u64>,
) -> Outcome {
    let failed = |error| {
        let text = words(&error);
        let hint = if text.ends_with("is inconsistent and cannot be used") { INCONSISTENT } else { "" };
        Failure::new(format!("Operation {act} on bitmap {bitmap} failed: {text}{hint}"))
    };
    let what = match act {
        "add" => {
            let granularity = granularity.filter(|size| *size > 0);
            // What is too large for a number here is too large for a bitmap.
            let granularity = granularity.map(|size| u32::try_from(size).unwrap_or(1));
            BitmapAction::Add { granularity, recording: true, persistent: true }
        }
        "remove" => BitmapAction::Remove,
        "clear" => BitmapAction::Clear,
        "enable" => BitmapAction::Enable,
        "disable" => BitmapAction::Disable,
        _ => BitmapAction::Merge(vec![(source.map_or(image.node, |source| source.node), value.to_owned())]),
    };
    let step = BitmapChange { node: image.node, name: bitmap.to_owned(), what };
    image.graph().permit().transact(vec![Box::new(step)]).await.map_err(failed)?;
    Ok(0)
}

const ACTS: &[&str] = &["add", "remove", "clear", "enable", "disable", "merge"];
const INCONSISTENT: &str = "\nTry block-dirty-bitmap-remove to delete this bitmap from disk";
