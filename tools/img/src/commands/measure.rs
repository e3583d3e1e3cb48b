//! `measure`: how large the file of an image would be.

use block_core::base::ByteRange;
use block_core::catalog::{Measurement, measure};
use block_core::graph::NodeBitmap;
use block_core::pipeline::Content;
use serde_json::json;
use trellis_image::args::{Args, Definition, option};
use trellis_image::pairs::Pairs;
use trellis_image::{Creation, Failure, Image, Outcome, Session, say, size, strerror, words};

use super::common::{FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, Output, closed, given, objects, open, output};
use super::create;
use super::snapshot::{Wish, at_snapshot};
use crate::output::pretty;

pub(super) const DEFINITION: Definition = Definition {
    name: "measure",
    about: "Says how large the file of a new image would be",
    options: &[
        option('O', "target-format", "FMT", "the format of the new image (default: raw)"),
        option('o', "options", "FMT_OPTS", "options of the format, as a=b,c=d"),
        option('s', "size", "SIZE", "for a disk of this size, with nothing in it"),
        FORMAT,
        IMAGE_OPTS,
        option('l', "snapshot", "SNAPSHOT", "for this snapshot of the image"),
        OUTPUT,
        FORCE_SHARE,
        OBJECT,
    ],
    words: "(--size SIZE | FILENAME)",
};

pub(super) async fn run(session: &Session, args: Args) -> Outcome {
    let output = output(&args)?;
    let snapshot = args.get("snapshot").map(Wish::read).transpose()?;
    let size = args.get("size").map(|word| size::parse_named("image size", word)).transpose()?;
    if args.words.len() > 1 {
        return Err(Failure::new("At most one filename argument is allowed."));
    }
    let word = args.words.first();
    match (word, size) {
        (None, None) => return Err(Failure::new("Either --size N or one filename must be specified.")),
        (Some(_), Some(_)) => return Err(Failure::new("--size N cannot be used together with a filename.")),
        (None, Some(_)) if args.has("image-opts") || args.has("format") || args.has("snapshot") => {
            return Err(Failure::new("--image-opts, -f, and -l require a filename argument."));
        }
        _ => {}
    }
    let target = args.get("target-format").unwrap_or("raw");
    if args.all("options").any(Pairs::ask_for_help) {
        return create::help(target);
    }
    objects(session, &args).await?;
    let mut creation = creation(session, target, &args)?;
    let Some(word) = word else {
        creation.set("size", &size.unwrap_or_default().to_string())?;
        let measured = measure(&creation.options_for(session, "a measured image")?, 0, None)?;
        show(output, &measured);
        return Ok(0);
    };
    let plain = given(&args, word)?;
    let image = open(session, &plain).await?;
    let bitmaps = (image.driver == "qcow2").then(|| bitmaps(&image));
    let image = match &snapshot {
        None => image,
        Some(wish) => at_snapshot(session, image, &plain, wish).await?,
    };
    let result = of_image(session, &image, creation, bitmaps.as_deref()).await.map(|measured| {
        show(output, &measured);
        0
    });
    closed(image, result).await
}

fn creation(session: &Session, target: &str, args: &Args) -> Result<Creation, Failure> {
    if target == "file" {
        return Err(Failure::new("Block driver 'file' does not support size measurement"));
    }
    let pairs = Pairs::read(args.all("options"))?;
    Creation::new(target, &Pairs::default())?;
    Creation::new(target, &pairs).map_err(|error| {
        session.complain(&words(&error));
        Failure::new(format!("Invalid options for file format '{target}'"))
    })
}

async fn of_image(
    session: &Session,
    image: &Image,
    mut creation: Creation,
    bitmaps: Option<&[(u64, u64)]>,
) -> Result<Measurement, Failure> {
    let size = image.size();
    creation.set("size", &size.to_string())?;
    let cluster = creation.get("cluster_size").and_then(|text| text.parse().ok()).filter(|size| *size > 0);
    let cluster: u64 = cluster.unwrap_or(65536);
    let disk = image.disk();
    let (mut at, mut data) = (0, 0);
    while at < size {
        let rest = ByteRange::between(at, size).expect("it has been compared above");
        let status = disk.status(rest).await;
        let status =
            status.map_err(|error| Failure::new(format!("Unable to get block status: {}", strerror(error))))?;
        at += status.len;
        if matches!(status.content, Content::Data | Content::Encoded) {
            // All of a cluster is there if some of it is.
            let start = at - status.len;
            at = at.next_multiple_of(cluster);
            data += at - start / cluster * cluster;
        }
    }
    Ok(measure(&creation.options_for(session, "a measured image")?, data, bitmaps)?)
}

/// What an image would bring along: the lengths of names, and how many marks there are.
fn bitmaps(image: &Image) -> Vec<(u64, u64)> {
    let kept = image.report().bitmaps.into_iter().filter(|bitmap| bitmap.persistent);
    // Of those that cannot be used the marks are not read; they take their room as they are.
    let bytes = |one: &NodeBitmap| if one.inconsistent { image.size() } else { one.bits.size() };
    kept.map(|one| (one.name.len() as u64, bytes(&one).div_ceil(u64::from(one.bits.granularity())))).collect()
}

fn show(output: Output, measured: &Measurement) {
    let Measurement { required, fully_allocated, bitmaps } = *measured;
    match output {
        Output::Human => {
            say(&format!("required size: {required}\nfully allocated size: {fully_allocated}\n"));
            if let Some(bytes) = bitmaps {
                say(&format!("bitmaps size: {bytes}\n"));
            }
        }
        Output::Json => {
            let mut object = json!({ "required": required, "fully-allocated": fully_allocated });
            if let Some(bytes) = bitmaps {
                object["bitmaps"] = bytes.into();
            }
            say(&pretty(&object));
        }
    }
}
