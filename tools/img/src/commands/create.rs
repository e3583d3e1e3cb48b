//! `create`: makes an image, which may stand on another one.

use block_core::base::Error;
use trellis_image::args::{Args, Definition, flag, option};
use trellis_image::pairs::Pairs;
use trellis_image::{
    Creation, Described, Failure, Given, Interrupt, NewImage, Outcome, Session, complain, option_help, plain, say,
    size, words,
};

use super::common::{OBJECT, QUIET, objects};

pub(super) const DEFINITION: Definition = Definition {
    name: "create",
    about: "Makes an image",
    options: &[
        QUIET,
        option('f', "format", "FMT", "the format of the new image (default: raw)"),
        option('o', "options", "FMT_OPTS", "options of the format, as a=b,c=d (`help` lists them)"),
        option('b', "backing", "BACKING", "the new image stands on this one"),
        option('F', "backing-format", "FMT", "the format of that"),
        flag('u', "backing-unsafe", "that one is not looked at"),
        OBJECT,
    ],
    words: "FILENAME [SIZE]",
};

pub(super) async fn run(session: &Session, args: Args) -> Outcome {
    Interrupt::block()?;
    let interrupt = Interrupt::watch(session)?;
    let format = args.get("format").unwrap_or("raw");
    if args.all("options").any(Pairs::ask_for_help) {
        return help(format);
    }
    let pairs = Pairs::read(args.all("options"))?;
    let (filename, size) = match &args.words[..] {
        [] => return Err(Failure::usage("Expecting image file name")),
        [filename] => (filename, None),
        [filename, word, more @ ..] => {
            let size = size::parse_named("image size", word)?;
            if let Some(word) = more.first() {
                return Err(Failure::usage(format!("Unexpected argument: {word}")));
            }
            (filename, Some(size))
        }
    };
    objects(session, &args).await?;
    let named = |text: String| Failure::new(format!("{filename}: {text}"));
    let creation = planned(session, &args, format, pairs, filename, size).await.map_err(named)?;
    if !args.has("quiet") {
        say(&format!("{}\n", creation.formatted(filename)));
    }
    let said = |error: Error| named(words(&error));
    let new = creation.begin(session, filename).await.map_err(said)?;
    interrupt.undo_first(undo(session, &new));
    new.make(session).await.map_err(said)?;
    Ok(0)
}

/// What is done before the program ends in the middle of the making.
pub(super) fn undo(session: &Session, new: &NewImage) -> impl FnOnce() + use<> {
    let (program, new) = (session.program.clone(), new.clone());
    move || {
        if let Err(error) = new.remove() {
            complain(&format!("{program}: {}\n", words(&error)));
        }
    }
}

/// What is to be made, with the size of what it stands on where none is given.
async fn planned(
    session: &Session,
    args: &Args,
    format: &str,
    pairs: Pairs,
    filename: &str,
    size: Option<u64>,
) -> Result<Creation, String> {
    let said = |error: Error| words(&error);
    let mut creation = Creation::new(format, &pairs).map_err(said)?;
    plain(filename).map_err(said)?;
    if size.is_some() && creation.get("size").is_some() {
        return Err("The image size must be specified only once".to_owned());
    }
    if let Some(size) = size {
        creation.set("size", &size.to_string()).map_err(said)?;
    }
    let given = [("backing", "backing_file", "file"), ("backing-format", "backing_fmt", "file format")];
    for (id, name, what) in given {
        if let Some(value) = args.get(id) {
            if !creation.can_stand() {
                return Err(format!("Backing {what} not supported for file format '{format}'"));
            }
            creation.set(name, value).map_err(said)?;
        }
    }
    let backing = creation.get("backing_file").map(str::to_owned);
    if let Some(name) = &backing {
        if name.is_empty() {
            return Err("Expected backing file name, got empty string".to_owned());
        }
        if name == filename {
            return Err(OWN_BACKING.to_owned());
        }
    }
    if let Some(name) = backing {
        stand_on(session, args, &mut creation, filename, &name).await?;
    }
    if creation.get("size").is_none() && !creation.is_header() {
        return Err("Image creation needs a size parameter".to_owned());
    }
    Ok(creation)
}

/// Looks at what the image is going to stand on.
async fn stand_on(
    session: &Session,
    args: &Args,
    creation: &mut Creation,
    filename: &str,
    name: &str,
) -> Result<(), String> {
    let format = creation.get("backing_fmt").map(str::to_owned);
    let no_format = "Backing file specified without backing format";
    if args.has("backing-unsafe") {
        return if format.is_none() { Err(no_format.to_owned()) } else { Ok(()) };
    }
    let beside = trellis_image::beside(filename, name).map_err(|error| words(&error))?;
    // Its size is all that is asked of it.
    let given = Given { format: format.clone(), locked: true, ..Given::named(beside) };
    let image = session.open(&given).await;
    let image = image.map_err(|error| format!("{}\nCould not open backing image.", words(&error)))?;
    let (size, driver) = (image.size(), image.driver.clone());
    image.close().await.map_err(|error| words(&error))?;
    if format.is_none() {
        return Err(format!("{no_format}\nDetected format of {driver}."));
    }
    if creation.get("size").is_none() {
        creation.set("size", &size.to_string()).map_err(|error| words(&error))?;
    }
    Ok(())
}

/// `-o help`.
pub(super) fn help(format: &str) -> Outcome {
    list(&format!("Supported {format} options:"), Creation::options(format)?.copied().collect());
    Ok(0)
}

/// Prints options with what they are for.
pub(super) fn list(title: &str, mut options: Vec<Described>) {
    options.sort_by_key(|described| described.name);
    say(&format!("{title}\n{}", options.iter().map(option_help).collect::<String>()));
}

const OWN_BACKING: &str = "Error: Trying to create an image with the same filename as the backing file";
