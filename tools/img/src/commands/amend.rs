//! `amend`: changes what an image is like.

use block_core::catalog::{AmendOptions, BlockdevAmendOptions};
use block_core::graph::{DriverInfo, Preallocation};
use trellis_image::args::{Args, Definition, long_flag, option};
use trellis_image::pairs::Pairs;
use trellis_image::{Creation, Described, Failure, Given, Kind, Outcome, Progress, Session, key_change, read_option};

use super::common::{
    CACHE, FORMAT, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, cache, closed, given, objects, open, shows_progress,
};
use super::create;

pub(super) const DEFINITION: Definition = Definition {
    name: "amend",
    about: "Changes options of an image's format",
    options: &[
        option('o', "options", "FMT_OPTS", "what is to change, as a=b,c=d (`help` lists the options)"),
        FORMAT,
        IMAGE_OPTS,
        CACHE,
        long_flag("force", "also what makes data unreadable for good: erasing all key slots, or one that is in use"),
        PROGRESS,
        QUIET,
        OBJECT,
    ],
    words: "FILENAME",
};

pub(super) async fn run(session: &Session, args: Args) -> Outcome {
    if !args.has("options") {
        return Err(Failure::usage("Must specify options (-o)"));
    }
    let asks_for_help = args.all("options").any(Pairs::ask_for_help);
    if let (true, Some(format)) = (asks_for_help, args.get("format")) {
        return help(format);
    }
    let pairs = if asks_for_help { Pairs::default() } else { Pairs::read(args.all("options"))? };
    let [word] = &args.words[..] else { return Err(Failure::new("Expecting one image file name")) };
    let given = Given { writable: true, resizes: true, cache: cache(&args)?, ..given(&args, word)? };
    objects(session, &args).await?;
    let image = open(session, &given).await?;
    let (driver, info) = (image.driver.clone(), image.info().await);
    closed(image, Ok(())).await?;
    if asks_for_help {
        return help(&driver);
    }
    let wanted = Wanted::of(&driver, &info, &pairs)?;
    let progress = Progress::begin(session, shows_progress(&args));
    wanted.make(session, &given, args.has("force")).await?;
    progress.at(1, 1);
    Ok(0)
}

/// What an image is to be like.
#[derive(Debug, Default)]
struct Wanted {
    options: AmendOptions,
    size: Option<u64>,
    keys: Option<BlockdevAmendOptions>,
}

impl Wanted {
    fn of(driver: &str, info: &DriverInfo, pairs: &Pairs) -> Result<Self, Failure> {
        let known = options(driver)?;
        let mut wanted = Self::default();
        let (mut backing_file, mut backing_format, mut keys) = (None, None, Pairs::default());
        for (name, value) in pairs.iter() {
            let described = known.iter().find(|described| described.name == name);
            let Some(described) = described else { return Err(not_amended(driver, name)) };
            let value = read_option(described, value)?;
            let options = &mut wanted.options;
            match name {
                "backing_file" => backing_file = Some(value),
                "backing_fmt" => backing_format = Some(value),
                "compat" => options.version = Some(version(&value)?),
                "data_file" => options.data_file = Some(value),
                "data_file_raw" => options.data_file_raw = Some(value == "on"),
                "lazy_refcounts" => options.lazy_refcounts = Some(value == "on"),
                "refcount_bits" => options.refcount_bits = Some(value.parse().unwrap_or(0)),
                "size" => wanted.size = value.parse().ok(),
                key => keys.push(key.trim_start_matches("encrypt."), value),
            }
        }
        if backing_file.is_some() || backing_format.is_some() {
            let now = info.backing.clone();
            let (file, format) = now.map_or((None, None), |(file, format)| (Some(file), format));
            if (backing_file, backing_format) != (file, format) {
                return Err(Failure::new("Cannot amend the backing file\nYou can use 'qemu-img rebase' instead."));
            }
        }
        wanted.keys = if keys.is_empty() { None } else { Some(key_change(driver, &keys)?) };
        Ok(wanted)
    }

    async fn make(&self, session: &Session, given: &Given, force: bool) -> Result<(), Failure> {
        // The newer version can hold more: it comes before the size, and goes behind it.
        let downgrades = self.options.version == Some(2);
        if !downgrades && self.options != AmendOptions::default() {
            session.amend(given, &self.options).await?;
        }
        if let Some(wanted) = self.size {
            let image = open(session, &Given { quiet: true, ..given.clone() }).await?;
            let is_done = image.size() == wanted;
            let resized = if is_done { Ok(()) } else { image.resize(wanted, Preallocation::Off).await };
            closed(image, resized.map_err(Failure::from)).await?;
        }
        if downgrades {
            session.amend(given, &self.options).await?;
        }
        // A slot that is erased does not come back: whatever else could be refused comes before, and is opened with it.
        if let Some(keys) = &self.keys {
            let image = open(session, &Given { quiet: true, ..given.clone() }).await?;
            let changed = image.amend(keys.clone(), force).await;
            closed(image, changed.map_err(Failure::from)).await?;
        }
        Ok(())
    }
}

fn not_amended(driver: &str, name: &str) -> Failure {
    let is_known = Creation::options(driver).is_ok_and(|mut all| all.any(|described| described.name == name));
    let more = if is_known { "\nThis option is only supported for image creation" } else { "" };
    Failure::new(format!("Invalid parameter '{name}'{more}"))
}

fn version(compat: &str) -> Result<u8, Failure> {
    match compat {
        "0.10" | "v2" => Ok(2),
        "1.1" | "v3" => Ok(3),
        other => Err(Failure::new(format!("Unknown compatibility level {other}"))),
    }
}

/// Those that can be changed.
fn options(driver: &str) -> Result<Vec<Described>, Failure> {
    match driver {
        "luks" => Ok(KEYS.iter().map(|(name, _, kind, help)| described(name, *kind, help)).collect()),
        "qcow2" => {
            let all = Creation::options("qcow2").into_iter().flatten();
            let own = all.filter(|described| AMENDED.contains(&described.name)).copied();
            Ok(own.chain(KEYS.iter().map(|(_, name, kind, help)| described(name, *kind, help))).collect())
        }
        _ => Err(Failure::new(format!("Format driver '{driver}' does not support option amendment"))),
    }
}

fn described(name: &'static str, kind: Kind, help: &'static str) -> Described {
    Described { name, kind, default: None, help }
}

fn help(format: &str) -> Outcome {
    if !trellis_image::is_driver(format) {
        return Err(Failure::new(format!("Unknown file format '{format}'")));
    }
    create::list(&format!("Amend options for '{format}':"), options(format)?);
    Ok(0)
}

const AMENDED: &[&str] =
    &["backing_file", "backing_fmt", "compat", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits", "size"];

/// What can be said of key slots, of luks and of qcow2.
const KEYS: &[(&str, &str, Kind, &str)] = &[
    ("state", "encrypt.state", Kind::Text, "What becomes of key slots: active, inactive"),
    ("new-secret", "encrypt.new-secret", Kind::Text, "Id of the secret that will open the image too"),
    ("old-secret", "encrypt.old-secret", Kind::Text, "Id of a secret: the slots that it opens are erased"),
    ("keyslot", "encrypt.keyslot", Kind::Number, "The slot, 0 to 7"),
    ("iter-time", "encrypt.iter-time", Kind::Number, "Milliseconds that one try of the passphrase takes"),
];
