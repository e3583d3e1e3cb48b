//! New images: what `-o` may say of each format, and how they are made. The catalog makes them, from the options that QMP
//! has; here are the older names of `qemu-img` for the same.

use std::os::unix::fs::MetadataExt;

use block_core::base::{Error, Result, SECTOR};
use block_core::catalog::{self, BlockdevCreateOptions};
use qmp::schema::from_keyval;
use serde_json::{Map, Value, json};

use crate::failure::words;
use crate::pairs::Pairs;
use crate::session::Session;
use crate::size::{self, NoSize};
use crate::source::{beside, plain};

/// What an option is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    Text,
    /// `on` or `off`.
    Switch,
    /// A whole number.
    Number,
    /// A number of bytes.
    Size,
}

/// An option of a format.
#[derive(Clone, Copy, Debug)]
pub struct Described {
    /// What `-o` calls it.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// What it is where nobody says it, if that is worth saying.
    pub default: Option<&'static str>,
    /// What it is for, in a line.
    pub help: &'static str,
}

/// What a new image is to be like.
#[derive(Clone, Debug)]
pub struct Creation {
    format: &'static Format,
    /// Normal forms of values, by the options' names.
    values: Vec<(&'static str, String)>,
}

/// A format that images can be made in.
#[derive(Debug)]
struct Format {
    name: &'static str,
    options: &'static [Described],
    /// Images can stand on others.
    stands: bool,
}

impl Creation {
    /// What `-o` says, for a format. In QEMU's words.
    pub fn new(format: &str, pairs: &Pairs) -> Result<Self> {
        let mut creation = Self { format: Self::format(format)?, values: Vec::new() };
        for (name, value) in pairs.iter() {
            creation.set(name, value)?;
        }
        Ok(creation)
    }

    fn format(name: &str) -> Result<&'static Format> {
        let found = FORMATS.iter().find(|format| format.name == name);
        found.ok_or_else(|| Error::new(format!("Unknown file format '{name}'")))
    }

    /// The options of a format, those for its file behind its own.
    pub fn options(format: &str) -> Result<impl Iterator<Item = &'static Described>> {
        Ok(Self::format(format)?.all())
    }

    /// Says something of an option, in place of what was said before.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let described = self.format.all().find(|described| described.name == name);
        let described = described.ok_or_else(|| Error::new(format!("Invalid parameter '{name}'")))?;
        let value = read_option(described, value)?;
        self.values.retain(|(other, _)| *other != described.name);
        self.values.push((described.name, value));
        Ok(())
    }

    /// What is said of an option, in its normal form.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.iter().find(|(other, _)| *other == name).map(|(_, value)| value.as_str())
    }

    /// Images of this format can stand on others.
    pub fn can_stand(&self) -> bool {
        self.format.stands
    }

    /// What is said before an image is made.
    pub fn formatted(&self, filename: &str) -> String {
        let mut text = format!("Formatting '{filename}', fmt={}", self.format.name);
        for described in self.format.all() {
            if let Some(value) = self.get(described.name).or(described.default) {
                text.push_str(&format!(" {}={}", described.name, shown(described.kind, value)));
            }
        }
        text
    }

    /// The options that the image itself is made with, in the file at `path`.
    pub fn options_for(&self, path: &str) -> Result<BlockdevCreateOptions> {
        let size = self.get("size").and_then(|size| size.parse::<u64>().ok()).unwrap_or(0);
        let size = size.checked_next_multiple_of(SECTOR).ok_or_else(|| self.too_large())?;
        if self.format.name == "qcow2" {
            return typed(&self.qcow2(path, size));
        }
        let mut file = self.file(path, size);
        self.put(&mut file, &[("preallocation", "preallocation")]);
        typed(&file)
    }

    /// Empties the files that the image will be in, or makes them. What was in them is lost, but for what cannot be made at
    /// all: that is said before.
    pub async fn begin(&self, session: &Session, filename: &str) -> Result<NewImage> {
        let path = plain(filename)?.to_owned();
        let new = NewImage { creation: self.clone(), name: filename.to_owned(), path };
        let (image, path) = (new.options()?, &new.path);
        if self.format.name == "qcow2" {
            catalog::measure(&image, 0, None).map_err(|error| self.worded(&error))?;
        }
        if let Some(backing) = self.get("backing_file") {
            let backing = beside(path, backing).unwrap_or_default();
            if is_one_file(&backing, path).await {
                return Err(Error::new("Error: Trying to create an image with the same filename as the backing file"));
            }
        }
        if let Some(data) = self.get("data_file")
            && (data == path || is_one_file(data, path).await)
        {
            return Err(Error::new("An image cannot have itself as its data file"));
        }
        self.create(session, self.empty(path)).await?;
        if let Some(data) = self.get("data_file")
            && let Err(error) = self.create(session, self.empty(data)).await
        {
            new.given_up().await;
            return Err(error);
        }
        Ok(new)
    }

    /// A file with nothing in it.
    fn empty(&self, path: &str) -> Map<String, Value> {
        self.file(path, 0)
    }

    fn file(&self, filename: &str, size: u64) -> Map<String, Value> {
        let mut file = Map::new();
        file.insert("driver".to_owned(), "file".into());
        file.insert("filename".to_owned(), filename.into());
        file.insert("size".to_owned(), size.to_string().into());
        self.put(&mut file, &[("nocow", "nocow"), ("extent_size_hint", "extent-size-hint")]);
        file
    }

    fn qcow2(&self, filename: &str, size: u64) -> Map<String, Value> {
        let mut image = Map::new();
        image.insert("driver".to_owned(), "qcow2".into());
        image.insert("file".to_owned(), json!({ "driver": "file", "filename": filename }));
        image.insert("size".to_owned(), size.to_string().into());
        self.put(&mut image, QCOW2_MEMBERS);
        if let Some(data) = self.get("data_file") {
            image.insert("data-file".to_owned(), json!({ "driver": "file", "filename": data }));
        }
        if let Some(compat) = self.get("compat") {
            let version = match compat {
                "0.10" => "v2",
                "1.1" => "v3",
                other => other,
            };
            image.insert("version".to_owned(), version.into());
        }
        image
    }

    fn put(&self, tree: &mut Map<String, Value>, members: &[(&str, &str)]) {
        for (name, member) in members {
            if let Some(value) = self.get(name) {
                tree.insert((*member).to_owned(), value.into());
            }
        }
    }

    async fn create(&self, session: &Session, tree: Map<String, Value>) -> Result<()> {
        let options = typed(&tree)?;
        catalog::create(&session.graph, options).await.map_err(|error| self.worded(&error))
    }

    fn worded(&self, error: &Error) -> Error {
        let text = words(error);
        if text.contains("File too large") { self.too_large() } else { Error::new(text) }
    }

    fn too_large(&self) -> Error {
        Error::new(format!("The image size is too large for file format '{}'", self.format.name))
    }
}

/// An image that is being made: its files are there, and empty. Half of it may look whole, so whoever does not come to the
/// end with it takes it away.
#[derive(Clone, Debug)]
pub struct NewImage {
    creation: Creation,
    name: String,
    path: String,
}

impl NewImage {
    /// Makes it. If this fails the files are gone.
    pub async fn make(&self, session: &Session) -> Result<()> {
        let made = catalog::create(&session.graph, self.options()?).await;
        if made.is_err() {
            self.given_up().await;
        }
        made.map_err(|error| self.creation.worded(&error))
    }

    /// Takes the files away; one that only a link leads to is emptied. Waits for the file system.
    pub fn remove(&self) -> Result<()> {
        let removed = [Some(&*self.path), self.creation.get("data_file")].into_iter().flatten().map(take_away);
        let failed = removed.filter_map(std::io::Result::err).next();
        let text = |error| Error::new(format!("The unfinished '{}' could not be removed: {error}", self.name));
        failed.map_or(Ok(()), |error| Err(text(error)))
    }

    async fn given_up(&self) {
        let new = self.clone();
        let removed = block_core::rt::blocking(move || new.remove()).await;
        // Why it is not made is the error that is said; whatever is left is no image.
        drop(removed);
    }

    fn options(&self) -> Result<BlockdevCreateOptions> {
        self.creation.options_for(&self.path)
    }
}

fn take_away(path: &str) -> std::io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => std::fs::remove_file(path),
        Ok(found) if found.is_symlink() && std::fs::metadata(path)?.is_file() => {
            std::fs::File::options().write(true).open(path)?.set_len(0)
        }
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Both names lead to the same file, which is there.
async fn is_one_file(one: &str, other: &str) -> bool {
    let names = [one.to_owned(), other.to_owned()];
    let identities = block_core::rt::blocking(move || {
        names.map(|name| std::fs::metadata(name).ok().map(|found| (found.dev(), found.ino())))
    });
    matches!(identities.await, [Some(one), Some(other)] if one == other)
}

fn typed(tree: &Map<String, Value>) -> Result<BlockdevCreateOptions> {
    from_keyval(Value::Object(tree.clone())).map_err(|error| Error::new(error.desc))
}

impl Format {
    fn all(&self) -> impl Iterator<Item = &'static Described> + use<> {
        self.options.iter().chain(if self.name == "file" { &[] } else { FILE }).filter({
            let own = self.options;
            // A format has its own way to make room.
            move |one| own.iter().find(|other| other.name == one.name).is_none_or(|other| std::ptr::eq(*one, other))
        })
    }
}

/// A value of an option in its normal form: `on` or `off`, or a number in decimal. In QEMU's words.
pub fn read_option(described: &Described, value: &str) -> Result<String> {
    let name = described.name;
    match described.kind {
        Kind::Text => Ok(value.to_owned()),
        Kind::Switch if matches!(value, "on" | "yes" | "true" | "y") => Ok("on".to_owned()),
        Kind::Switch if matches!(value, "off" | "no" | "false" | "n") => Ok("off".to_owned()),
        Kind::Switch => Err(Error::new(format!("Parameter '{name}' expects 'on' or 'off'"))),
        Kind::Number => number(name, value),
        Kind::Size => match size::parse(value) {
            Ok(bytes) => Ok(bytes.to_string()),
            Err(NoSize::OutOfRange) => {
                Err(Error::new(format!("Value '{value}' is out of range for parameter '{name}'")))
            }
            Err(NoSize::Invalid) => Err(Error::new(format!(
                "Parameter '{name}' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means \
                 kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
            ))),
        },
    }
}

/// As C reads it: what is below zero is counted from above 2^64, and shown as it was written.
fn number(name: &str, value: &str) -> Result<String> {
    let (sign, digits) =
        value.strip_prefix('-').map_or(("", value.strip_prefix('+').unwrap_or(value)), |rest| ("-", rest));
    let radix = if digits.starts_with("0x") || digits.starts_with("0X") { 16 } else { 10 };
    let plain = if radix == 16 { &digits[2..] } else { digits };
    if plain.is_empty() || !plain.chars().all(|digit| digit.is_digit(radix)) {
        return Err(Error::new(format!("Parameter '{name}' expects a number")));
    }
    let too_large = || Error::new(format!("Value '{value}' is too large for parameter '{name}'"));
    let parsed = u64::from_str_radix(plain, radix).map_err(|_| too_large())?;
    Ok(format!("{sign}{parsed}"))
}

fn shown(kind: Kind, value: &str) -> String {
    let plain = !value.is_empty() && !value.contains([',', ' ', '\'']);
    match kind {
        Kind::Text if !plain => format!("'{}'", value.replace(',', ",,")),
        _ => value.to_owned(),
    }
}

/// A line of help for an option.
pub fn option_help(described: &Described) -> String {
    let kind = match described.kind {
        Kind::Text => "str",
        Kind::Switch => "bool (on/off)",
        Kind::Number => "num",
        Kind::Size => "size",
    };
    let named = format!("{}=<{kind}>", described.name);
    format!("  {named:<22} - {}\n", described.help)
}

const fn text(name: &'static str, help: &'static str) -> Described {
    Described { name, kind: Kind::Text, default: None, help }
}

const SIZE: Described = Described { name: "size", kind: Kind::Size, default: None, help: "Bytes of the disk" };
const PREALLOCATION: Described = text("preallocation", "How much is allocated at once: off, metadata, falloc, full");

/// Options of the file that an image is in.
const FILE: &[Described] = &[
    PREALLOCATION,
    Described { name: "nocow", kind: Kind::Switch, default: None, help: "No copy-on-write, on btrfs" },
    Described {
        name: "extent_size_hint",
        kind: Kind::Size,
        default: None,
        help: "Bytes that the file system allocates at a time, on XFS; 0: as it likes",
    },
];

/// In the order in which they are shown.
const QCOW2: &[Described] = &[
    Described { name: "cluster_size", kind: Kind::Size, default: Some("65536"), help: "Bytes of a cluster" },
    Described { name: "extended_l2", kind: Kind::Switch, default: Some("off"), help: "Clusters have subclusters" },
    PREALLOCATION,
    Described {
        name: "compression_type",
        kind: Kind::Text,
        default: Some("zlib"),
        help: "How clusters are compressed: zlib, zstd",
    },
    SIZE,
    text("compat", "Version of the format: 0.10 (v2), 1.1 (v3)"),
    text("backing_file", "What the image stands on"),
    text("backing_fmt", "The format of that"),
    text("data_file", "Another file for the data"),
    Described { name: "data_file_raw", kind: Kind::Switch, default: None, help: "That file is a raw disk by itself" },
    Described {
        name: "lazy_refcounts",
        kind: Kind::Switch,
        default: Some("off"),
        help: "Refcounts may be written late",
    },
    Described { name: "refcount_bits", kind: Kind::Number, default: Some("16"), help: "Bits of a refcount" },
];

/// The members of `BlockdevCreateOptionsQcow2` that are said so.
const QCOW2_MEMBERS: &[(&str, &str)] = &[
    ("cluster_size", "cluster-size"),
    ("extended_l2", "extended-l2"),
    ("preallocation", "preallocation"),
    ("compression_type", "compression-type"),
    ("backing_file", "backing-file"),
    ("backing_fmt", "backing-fmt"),
    ("data_file_raw", "data-file-raw"),
    ("lazy_refcounts", "lazy-refcounts"),
    ("refcount_bits", "refcount-bits"),
];

const FORMATS: &[Format] = &[
    Format { name: "raw", options: &[SIZE], stands: false },
    Format { name: "file", options: &[SIZE, FILE[0], FILE[1], FILE[2]], stands: false },
    Format { name: "qcow2", options: QCOW2, stands: true },
];

#[cfg(test)]
mod tests {
    use super::*;

    fn creation(format: &str, text: &str) -> Result<Creation> {
        Creation::new(format, &Pairs::read([text])?)
    }

    #[test]
    fn what_will_be_made_is_said_in_the_order_of_the_formats() {
        let creation = creation("qcow2", "size=1M,compat=1.1,preallocation=metadata,nocow=on").unwrap();
        assert_eq!(
            creation.formatted("x"),
            "Formatting 'x', fmt=qcow2 cluster_size=65536 extended_l2=off preallocation=metadata compression_type=zlib \
             size=1048576 compat=1.1 lazy_refcounts=off refcount_bits=16 nocow=on"
        );
    }

    #[test]
    fn values_are_read_in_qemus_words() {
        let refused = |text: &str| creation("qcow2", text).unwrap_err().full();
        assert_eq!(refused("nosuch=1"), "Invalid parameter 'nosuch'");
        assert_eq!(refused("lazy_refcounts=maybe"), "Parameter 'lazy_refcounts' expects 'on' or 'off'");
        assert_eq!(refused("refcount_bits=abc"), "Parameter 'refcount_bits' expects a number");
        assert_eq!(
            refused("refcount_bits=18446744073709551616"),
            "Value '18446744073709551616' is too large for parameter 'refcount_bits'"
        );
        assert_eq!(refused("cluster_size=-1"), "Value '-1' is out of range for parameter 'cluster_size'");
        assert!(refused("size=x").starts_with("Parameter 'size' expects a non-negative number below 2^64\n"));
        assert_eq!(creation("qcow2", "refcount_bits=-1").unwrap().get("refcount_bits"), Some("-1"));
        assert_eq!(Creation::new("vdi", &Pairs::default()).unwrap_err().full(), "Unknown file format 'vdi'");
    }
}
