//! What the command line of `convert` says. What contradicts itself is found here, in the order in which `qemu-img` finds it.

use trellis_image::args::Args;
use trellis_image::pairs::Pairs;
use trellis_image::{Cache, Creation, Failure, FileName, Given, Image, size, words};

use super::super::common::{cache_of, file_name, shows_progress, source_cache};
use super::super::snapshot::Wish;

/// What is to be copied into what, and how.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) sources: Vec<FileName>,
    pub(super) format: Option<String>,
    pub(super) source_cache: Cache,
    pub(super) force_share: bool,
    pub(super) snapshot: Option<Wish>,
    pub(super) target: FileName,
    /// `None` where the target's options say it.
    pub(super) target_format: Option<String>,
    target_cache: Cache,
    pub(super) creates: bool,
    options: Pairs,
    backing: Option<String>,
    backing_format: Option<String>,
    pub(super) compressed: bool,
    pub(super) copy_range: bool,
    pub(super) parallel: usize,
    pub(super) out_of_order: bool,
    /// `None`: zeroes are written like everything else.
    pub(super) sparse: Option<u64>,
    pub(super) rate: Option<u64>,
    pub(super) target_is_zero: bool,
    pub(super) bitmaps: bool,
    pub(super) skips_broken_bitmaps: bool,
    pub(super) salvages: bool,
    pub(super) shows_progress: bool,
}

impl Wanted {
    pub(super) fn read(args: &Args) -> Result<Self, Failure> {
        let text = |id: &str| args.get(id).map(str::to_owned);
        let snapshot = args.get("snapshot").map(Wish::read).transpose()?;
        let sparse = args.get("sparse-size").map(sparse_size).transpose()?;
        let parallel = args.get("parallel").map(|word| size::parse_count("number of coroutines", word, 1, 16));
        let rate = args.get("rate-limit").map(|word| size::parse_named("rate limit", word)).transpose()?;
        let parallel = usize::try_from(parallel.transpose()?.unwrap_or(8)).unwrap_or(1);
        let options: Vec<_> = args.all("options").collect();
        let options = if options.is_empty() { Pairs::default() } else { Pairs::read(options)? };
        let creates = !args.has("skip-create");
        let refused = [
            (args.has("image-opts") && args.has("format"), "--image-opts and --format are mutually exclusive"),
            (args.has("target-image-opts") && creates, "--target-image-opts requires use of -n flag"),
            (args.has("target-is-zero") && creates, "--target-is-zero requires use of -n flag"),
            (
                args.has("skip-broken-bitmaps") && !args.has("bitmaps"),
                "Use of --skip-broken-bitmaps requires --bitmaps",
            ),
            (
                args.has("copy-range-offloading") && args.has("compress"),
                "Cannot enable copy offloading when -c is used",
            ),
            (
                args.has("copy-range-offloading") && args.has("sparse-size"),
                "Cannot enable copy offloading when -S is used",
            ),
            (
                args.has("target-image-opts") && args.has("target-format"),
                "--image-opts and --format are mutually exclusive",
            ),
        ];
        refuse(&refused)?;
        let ([sources @ .., target], true) = (&args.words[..], args.words.len() > 1) else {
            return Err(Failure::new("Must specify image file name"));
        };
        let backing = text("backing").or_else(|| options.get("backing_file").map(str::to_owned));
        let wanted = Self {
            sources: sources.iter().map(|word| file_name(args, word)).collect(),
            format: text("format"),
            source_cache: source_cache(args, "source-cache")?,
            force_share: args.has("force-share"),
            snapshot,
            target: match args.has("target-image-opts") {
                true => FileName::Options(target.clone()),
                false => FileName::Name(target.clone()),
            },
            target_format: match args.has("target-image-opts") {
                true => None,
                false => Some(text("target-format").unwrap_or_else(|| "raw".to_owned())),
            },
            target_cache: cache_of(args.get("target-cache").unwrap_or("unsafe"), "cache")?,
            creates,
            options,
            backing,
            backing_format: text("backing-format"),
            compressed: args.has("compress"),
            copy_range: args.has("copy-range-offloading"),
            parallel,
            out_of_order: args.has("oob-writes"),
            sparse: sparse.unwrap_or(Some(4096)),
            rate: rate.filter(|rate| *rate > 0),
            target_is_zero: args.has("target-is-zero"),
            bitmaps: args.has("bitmaps"),
            skips_broken_bitmaps: args.has("skip-broken-bitmaps"),
            salvages: args.has("salvage"),
            shows_progress: shows_progress(args),
        };
        wanted.check()?;
        Ok(wanted)
    }

    fn check(&self) -> Result<(), Failure> {
        let several = self.sources.len() > 1;
        let has_format = self.backing_format.is_some() || self.options.get("backing_fmt").is_some();
        refuse(&[
            (!self.creates && !self.options.is_empty(), "-o has no effect when skipping image creation"),
            (several && self.snapshot.is_some(), "No support for concatenating multiple snapshot"),
            (
                several && self.backing.is_some(),
                "Having a backing file for the target makes no sense when concatenating multiple input images",
            ),
            (several && self.bitmaps, "Copying bitmaps only possible with single source"),
            (
                self.backing.is_some() && !has_format && self.creates && self.target_format.as_deref() == Some("qcow2"),
                "Use of backing file requires explicit backing format",
            ),
        ])
    }

    /// The target stands on another image, which has what is not copied.
    pub(super) fn stands(&self) -> bool {
        self.backing.is_some()
    }

    /// What the target is made like; `None`: it is there.
    pub(super) fn creation(&self, size: u64, sources: &[Image]) -> Result<Option<Creation>, Failure> {
        let format = self.target_format.as_deref().filter(|_| self.creates);
        let Some(format) = format else { return self.check_bitmaps(sources).map(|()| None) };
        let mut creation = Creation::new(format, &self.options)?;
        // Whatever is said of it.
        creation.set("size", &size.to_string())?;
        for (name, value) in [("backing_file", &self.backing), ("backing_fmt", &self.backing_format)] {
            let Some(value) = value else { continue };
            if !creation.can_stand() {
                return Err(Failure::new(format!("Backing file not supported for file format '{format}'")));
            }
            creation.set(name, value)?;
        }
        let preallocates = creation.get("preallocation").is_some_and(|mode| mode != "off");
        refuse(&[
            (creation.is_header(), "Parameter 'detached-header' is unexpected"),
            (self.compressed && format != "qcow2", "Compression not supported for this file format"),
            (self.compressed && creation.is_encrypted(), "Compression and encryption not supported at the same time"),
            (self.compressed && preallocates, "Compression and preallocation not supported at the same time"),
        ])?;
        self.check_bitmaps(sources)?;
        if creation.get("backing_fmt").is_some() && creation.get("backing_file").is_none() {
            let text = "Backing format cannot be used without backing file";
            return Err(Failure::new(format!("{}: error while converting {format}: {text}", self.target.text())));
        }
        Ok(Some(creation))
    }

    fn check_bitmaps(&self, sources: &[Image]) -> Result<(), Failure> {
        if !self.bitmaps {
            return Ok(());
        }
        let source = sources.first().map(|source| source.driver.as_str()).unwrap_or_default();
        if source != "qcow2" {
            return Err(Failure::new("Source lacks bitmap support"));
        }
        match self.target_format.as_deref().filter(|format| *format != "qcow2") {
            Some(format) => Err(Failure::new(format!("Format driver '{format}' does not support bitmaps"))),
            None => Ok(()),
        }
    }

    /// How the target is opened.
    pub(super) fn target(&self) -> Given {
        Given {
            format: self.target_format.clone(),
            cache: self.target_cache,
            writable: true,
            ..Given::of(self.target.clone())
        }
    }

    /// How the target's format is called in messages.
    pub(super) fn converting(&self, error: &block_core::base::Error) -> Failure {
        let format = self.target_format.as_deref().unwrap_or_default();
        Failure::new(format!("{}: error while converting {format}: {}", self.target.text(), words(error)))
    }
}

fn refuse(contradictions: &[(bool, &str)]) -> Result<(), Failure> {
    let first = contradictions.iter().find(|(is_there, _)| *is_there);
    first.map_or(Ok(()), |(_, text)| Err(Failure::new(*text)))
}

/// `-S`: zeroes of so many bytes are left out; `None`: none are.
fn sparse_size(word: &str) -> Result<Option<u64>, Failure> {
    let bytes = size::parse_named("buffer size for sparse output", word)?;
    if !bytes.is_multiple_of(512) || bytes > MOST_SPARSE {
        return Err(Failure::new(format!(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to {MOST_SPARSE}. Select \
             0 to disable sparse detection (fully allocates output)."
        )));
    }
    Ok((bytes > 0).then_some(bytes))
}

const MOST_SPARSE: u64 = 16 << 20;
