//! `resize`: gives an image another size.

use block_core::graph::Preallocation;
use trellis_image::args::{Args, Definition, long_flag, long_option};
use trellis_image::{Described, Failure, Given, Image, Kind, Outcome, Session, read_option, say};

use super::common::{FORMAT, IMAGE_OPTS, OBJECT, QUIET, closed, given, objects, open};

pub(super) const DEFINITION: Definition = Definition {
    name: "resize",
    about: "Gives an image another size",
    options: &[
        QUIET,
        FORMAT,
        IMAGE_OPTS,
        long_flag("shrink", "what lies behind the new end may be lost"),
        long_option("preallocation", "MODE", "how room is made: off, metadata, falloc, full"),
        OBJECT,
    ],
    words: "FILENAME [+-]SIZE",
};

pub(super) async fn run(session: &Session, args: Args) -> Outcome {
    let preallocation = preallocation(&args)?;
    let [filename, word] = &args.words[..] else {
        return Err(Failure::usage("Expecting image file name and size"));
    };
    let (sign, number) = match word.split_at_checked(1) {
        Some((sign @ ("+" | "-"), number)) => (sign, number),
        _ => ("", word.as_str()),
    };
    let described = Described { name: "size", kind: Kind::Size, default: None, help: "" };
    let number = i128::from(read_option(&described, number)?.parse::<u64>().unwrap_or(0));
    let given = Given { writable: true, resizes: true, ..given(&args, filename)? };
    objects(session, &args).await?;
    let image = open(session, &given).await?;
    let current = i128::from(image.size());
    let wanted = match sign {
        "+" => current + number,
        "-" => current - number,
        _ => number,
    };
    let result = resized(session, &args, &image, wanted, preallocation).await;
    closed(image, result).await
}

async fn resized(session: &Session, args: &Args, image: &Image, wanted: i128, how: Preallocation) -> Outcome {
    let wanted = i64::try_from(wanted).ok().and_then(|wanted| u64::try_from(wanted).ok()).filter(|wanted| *wanted > 0);
    let wanted = wanted.ok_or_else(|| Failure::new("New image size must be positive"))?;
    let current = image.size();
    if wanted <= current && how != Preallocation::Off {
        return Err(Failure::new("Preallocation can only be used for growing images"));
    }
    if wanted < current && !args.has("shrink") {
        session.complain("Use the --shrink option to perform a shrink operation.");
        return Err(Failure::new(
            "warning: Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an \
             operation, make sure there is no important data there.",
        ));
    }
    image.resize(wanted, how).await?;
    if !args.has("quiet") {
        say("Image resized.\n");
    }
    Ok(0)
}

/// `--preallocation`.
fn preallocation(args: &Args) -> Result<Preallocation, Failure> {
    Ok(match args.get("preallocation") {
        None | Some("off") => Preallocation::Off,
        Some("metadata") => Preallocation::Metadata,
        Some("falloc") => Preallocation::Falloc,
        Some("full") => Preallocation::Full,
        Some(other) => return Err(Failure::new(format!("Invalid preallocation mode '{other}'"))),
    })
}
