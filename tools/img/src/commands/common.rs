//! What several sub-commands take, and how they open images.

use block_core::base::Error;
use trellis_image::args::{Args, Opt, flag, long_flag, long_option, option};
use trellis_image::{Cache, Failure, FileName, Given, Image, Session, add_object, words};

pub(super) const FORMAT: Opt = option('f', "format", "FMT", "the image's format; it is guessed otherwise");
pub(super) const IMAGE_OPTS: Opt = long_flag("image-opts", "images are named by lists of options, not by files");
pub(super) const OBJECT: Opt = long_option("object", "OBJDEF", "make an object that images may refer to");
pub(super) const OUTPUT: Opt = long_option("output", "human|json", "for people or for programs (default: human)");
pub(super) const FORCE_SHARE: Opt = flag('U', "force-share", "open the image even if somebody writes to it");
pub(super) const QUIET: Opt = flag('q', "quiet", "print errors only");
pub(super) const PROGRESS: Opt = flag('p', "progress", "show how far the work has come");
pub(super) const CACHE: Opt = option('t', "cache", "CACHE", "how the host caches the image (default: writeback)");
pub(super) const SOURCE_CACHE: Opt =
    option('T', "cache", "CACHE", "how the host caches the image (default: writeback)");

/// How a command shows what it has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    Human,
    Json,
}

/// `--output`.
pub(super) fn output(args: &Args) -> Result<Output, Failure> {
    match args.get("output") {
        None | Some("human") => Ok(Output::Human),
        Some("json") => Ok(Output::Json),
        Some(other) => Err(Failure::usage(format!("--output expects 'human' or 'json' not '{other}'"))),
    }
}

/// Makes the objects.
pub(super) async fn objects(session: &Session, args: &Args) -> Result<(), Failure> {
    for text in args.all("object") {
        add_object(session, text).await?;
    }
    Ok(())
}

/// `-p`, unless `-q` is there too.
pub(super) fn shows_progress(args: &Args) -> bool {
    args.has("progress") && !args.has("quiet")
}

/// The only word.
pub(super) fn one_image(args: &Args) -> Result<&str, Failure> {
    match &args.words[..] {
        [only] => Ok(only),
        _ => Err(Failure::usage("Expecting one image file name")),
    }
}

/// `--image-opts` says how words are meant.
pub(super) fn file_name(args: &Args, word: &str) -> FileName {
    if args.has("image-opts") { FileName::Options(word.to_owned()) } else { FileName::Name(word.to_owned()) }
}

/// An image that is only read, as `-f`, `--image-opts` and `-U` have it.
pub(super) fn given(args: &Args, word: &str) -> Result<Given, Failure> {
    if args.has("image-opts") && args.has("format") {
        return Err(Failure::new("--image-opts and --format are mutually exclusive"));
    }
    let format = args.get("format").map(str::to_owned);
    Ok(Given { format, force_share: args.has("force-share"), ..Given::of(file_name(args, word)) })
}

/// `-T`, or `-t` where an image is only read.
pub(super) fn source_cache(args: &Args, id: &str) -> Result<Cache, Failure> {
    cache_of(args.get(id).unwrap_or("writeback"), "source cache")
}

/// `-t`.
pub(super) fn cache(args: &Args) -> Result<Cache, Failure> {
    cache_of(args.get("cache").unwrap_or("writeback"), "cache")
}

/// The mode that a word names; `what` an error calls it.
pub(super) fn cache_of(word: &str, what: &str) -> Result<Cache, Failure> {
    Cache::named(word).ok_or_else(|| Failure::new(format!("Invalid {what} option: {word}")))
}

/// Opens an image; what goes wrong is said as QEMU says it.
pub(super) async fn open(session: &Session, given: &Given) -> Result<Image, Failure> {
    session.open(given).await.map_err(|error| not_opened(given.name.text(), &error))
}

/// An image cannot be opened.
pub(super) fn not_opened(name: &str, error: &Error) -> Failure {
    Failure::new(format!("Could not open '{name}': {}", words(error)))
}

/// Closes an image behind what has been done with it: the first thing that went wrong is what is said.
pub(super) async fn closed<T>(image: Image, result: Result<T, Failure>) -> Result<T, Failure> {
    let closed = image.close().await;
    let value = result?;
    closed?;
    Ok(value)
}
