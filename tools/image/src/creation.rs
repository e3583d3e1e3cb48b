//! New images: what `-o` may say of each format (`table`), and how they are made. The catalog makes them, from the options that
//! QMP has; here are the older names of `qemu-img` for the same.

mod table;

use block_core::base::{ByteRange, Error, Result, SECTOR};
use block_core::catalog::{self, BlockdevCreateOptions};
use block_core::drivers::keys::needed_secret;
use block_core::graph::WriteFlags;
use qmp::schema::from_keyval;
use serde_json::{Map, Value, json};

use self::table::{FORMATS, Format, LUKS_MEMBERS, QCOW2_MEMBERS};
use crate::cache::Cache;
use crate::errno::strerror;
use crate::failure::words;
use crate::given::Given;
use crate::identity::{files_of, is_any_of};
use crate::pairs::Pairs;
use crate::session::Session;
use crate::size::{self, NoSize};
use crate::source::{beside, plain, protocol};

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

/// What the files of an image are: `file` or `host_device`.
#[derive(Clone, Copy, Debug)]
struct Drivers {
    own: &'static str,
    data: &'static str,
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

    /// The size that `-o` or something else has said, in whole sectors.
    fn size(&self) -> Result<u64> {
        let size = self.get("size").and_then(|size| size.parse::<u64>().ok()).unwrap_or(0);
        size.checked_next_multiple_of(SECTOR).ok_or_else(|| self.too_large())
    }

    /// The options that the image itself is made with, in a file.
    pub fn options_for(&self, session: &Session, filename: &str) -> Result<BlockdevCreateOptions> {
        self.check_secret(session)?;
        typed(&self.image(Drivers { own: "file", data: "file" }, filename)?)
    }

    /// The id of the secret that will open the image, if one does.
    pub fn key_secret(&self) -> Option<&str> {
        match self.format.name {
            "luks" => self.get("key-secret"),
            _ => self.get("encrypt.key-secret").filter(|_| self.is_encrypted()),
        }
    }

    /// What is in it will be encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.format.name == "luks" || self.get("encrypt.format").is_some() || self.get("encryption") == Some("on")
    }

    /// The image is the header alone of a disk elsewhere, so that its size is nobody's business.
    pub fn is_header(&self) -> bool {
        self.get("detached-header") == Some("on")
    }

    /// Empties the files that the image will be in, or makes them. What was in them is lost, but for what cannot be made at
    /// all: that is said before. Devices stay as they are.
    pub async fn begin(&self, session: &Session, filename: &str) -> Result<NewImage> {
        self.check_secret(session)?;
        let path = plain(filename)?.to_owned();
        let data = self.data_file()?.unwrap_or_default();
        let drivers = Drivers { own: protocol(&path).await, data: protocol(data).await };
        let mut new =
            NewImage { creation: self.clone(), name: filename.to_owned(), path, drivers, emptied: Vec::new() };
        let (image, path) = (new.options()?, &new.path);
        if !self.is_plain() {
            catalog::measure(&image, 0, None).map_err(|error| self.worded(&error))?;
        }
        let below = self.files_below(session, path).await;
        if is_any_of(path, &below).await {
            return Err(Error::new("Error: Trying to create an image with the same filename as the backing file"));
        }
        if let Some(data) = self.data_file()? {
            if data == path || is_any_of(data, std::slice::from_ref(path)).await {
                return Err(Error::new("An image cannot have itself as its data file"));
            }
            if is_any_of(data, &below).await {
                return Err(Error::new("An image cannot have as its data file what it stands on"));
            }
        }
        let own = Some(path.clone()).filter(|_| drivers.own == "file");
        let data = self.data_file()?.map(str::to_owned).filter(|_| drivers.data == "file");
        for file in own.into_iter().chain(data) {
            if let Err(error) = self.create(session, self.file(&file, 0)).await {
                new.given_up().await;
                return Err(error);
            }
            new.emptied.push(file);
        }
        Ok(new)
    }

    /// Where guest data will be, if that is another file.
    fn data_file(&self) -> Result<Option<&str>> {
        self.get("data_file").map(plain).transpose()
    }

    /// What a new image in `path` is to stand on: the backing file, and what that is made of if it can be looked at.
    async fn files_below(&self, session: &Session, path: &str) -> Vec<String> {
        let Some(Ok(backing)) = self.get("backing_file").map(|name| beside(path, name)) else { return Vec::new() };
        let format = self.get("backing_fmt").map(str::to_owned);
        let look = Given { format, locked: true, force_share: true, ..Given::named(&backing) };
        let mut files = Vec::new();
        // What cannot be opened may still be what is about to be emptied.
        if let Ok(image) = session.open(&look).await {
            files = files_of(&image).await;
            let _: Result<()> = image.close().await;
        }
        files.push(backing);
        files
    }

    /// There is nothing but the disk.
    fn is_plain(&self) -> bool {
        matches!(self.format.name, "raw" | "file")
    }

    /// A raw disk on a device has what was there, but is not taken for an image of a format that was there.
    async fn start_anew(&self, session: &Session, filename: &str) -> Result<()> {
        for name in ["nocow", "extent_size_hint"] {
            if self.get(name).is_some() {
                return Err(Error::new(format!("Invalid parameter '{name}'")));
            }
        }
        if let Some(mode) = self.get("preallocation").filter(|mode| *mode != "off") {
            return Err(Error::new(format!("Unsupported preallocation mode '{mode}'")));
        }
        let format = Some("raw".to_owned());
        let given = Given { format, writable: true, cache: Cache::WRITEBACK, ..Given::named(filename) };
        let device = session.open(&given).await?;
        let (wanted, room) = (self.size()?, device.size());
        let result = match room < wanted {
            true => Err(Error::new("Cannot grow device files")),
            false => {
                let start = ByteRange::whole(SECTOR.min(room));
                let written = device.disk().write_zeroes(start, WriteFlags::default()).await;
                written.map_err(|error| Error::new(strerror(error)))
            }
        };
        device.close().await.and(result)
    }

    /// What opens the image is there before anything is lost.
    fn check_secret(&self, session: &Session) -> Result<()> {
        if self.get("encryption").is_some() && self.get("encrypt.format").is_some() {
            return Err(Error::new("'encrypt.format' and its alias 'encryption' can't be used at the same time"));
        }
        if self.get("encryption") == Some("on") || self.get("encrypt.format") == Some("aes") {
            return Err(Error::new("The old encryption (aes) is not made any more: 'encrypt.format=luks' is"));
        }
        let option = match self.format.name {
            "luks" => "key-secret",
            "qcow2" if self.get("encrypt.format") == Some("luks") => "encrypt.key-secret",
            _ => return Ok(()),
        };
        let required = || Error::new(format!("Parameter '{option}' is required for cipher"));
        needed_secret(session.graph.objects(), Some(self.get(option).ok_or_else(required)?)).map(drop)
    }

    /// The image, in nodes of these drivers.
    fn image(&self, drivers: Drivers, filename: &str) -> Result<Map<String, Value>> {
        let size = self.size()?;
        let mut image = match self.format.name {
            "luks" => self.luks(),
            "qcow2" => self.qcow2(drivers.data),
            _ => {
                let mut file = self.file(filename, size);
                self.put(&mut file, &[("preallocation", "preallocation")]);
                return Ok(file);
            }
        };
        let place = if self.is_header() { "header" } else { "file" };
        image.insert(place.to_owned(), json!({ "driver": drivers.own, "filename": filename }));
        image.insert("size".to_owned(), size.to_string().into());
        Ok(image)
    }

    fn file(&self, filename: &str, size: u64) -> Map<String, Value> {
        let mut file = Map::new();
        file.insert("driver".to_owned(), "file".into());
        file.insert("filename".to_owned(), filename.into());
        file.insert("size".to_owned(), size.to_string().into());
        self.put(&mut file, &[("nocow", "nocow"), ("extent_size_hint", "extent-size-hint")]);
        file
    }

    fn luks(&self) -> Map<String, Value> {
        let mut image = Map::from_iter([("driver".to_owned(), "luks".into())]);
        LUKS_MEMBERS.iter().for_each(|member| self.put(&mut image, &[(member, member)]));
        // The header is always there: all that there is of metadata.
        if self.get("preallocation") != Some("metadata") {
            self.put(&mut image, &[("preallocation", "preallocation")]);
        }
        image
    }

    fn qcow2(&self, data_driver: &str) -> Map<String, Value> {
        let mut image = Map::from_iter([("driver".to_owned(), "qcow2".into())]);
        self.put(&mut image, QCOW2_MEMBERS);
        if let Some(data) = self.get("data_file").map(|name| plain(name).unwrap_or(name)) {
            image.insert("data-file".to_owned(), json!({ "driver": data_driver, "filename": data }));
        }
        if let Some(compat) = self.get("compat") {
            let version = match compat {
                "0.10" => "v2",
                "1.1" => "v3",
                other => other,
            };
            image.insert("version".to_owned(), version.into());
        }
        let mut encrypt = Map::new();
        for (name, value) in &self.values {
            if let Some(member) = name.strip_prefix("encrypt.") {
                encrypt.insert(member.to_owned(), value.as_str().into());
            }
        }
        if !encrypt.is_empty() {
            image.insert("encrypt".to_owned(), Value::Object(encrypt));
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
    drivers: Drivers,
    /// Those of its files that have nothing of their own any more. Whatever else it names is not ours to take away.
    emptied: Vec<String>,
}

impl NewImage {
    /// Makes it. If this fails the files are gone. Gives whether the new disk reads as zeroes.
    pub async fn make(&self, session: &Session) -> Result<bool> {
        let Self { creation, drivers, .. } = self;
        let is_bare_device = creation.is_plain() && drivers.own != "file";
        let made = match is_bare_device {
            true => creation.start_anew(session, &self.path).await,
            false => catalog::create(&session.graph, self.options()?).await,
        };
        if made.is_err() {
            self.given_up().await;
        }
        // What is found in a raw data file is the disk, or the encrypted disk.
        let is_found =
            creation.get("data_file_raw") == Some("on") && (creation.is_encrypted() || drivers.data != "file");
        let is_zero = !is_bare_device && !is_found && creation.format.name != "luks";
        made.map(|()| is_zero).map_err(|error| creation.worded(&error))
    }

    /// Takes the files away; one that only a link leads to is emptied. Waits for the file system.
    pub fn remove(&self) -> Result<()> {
        let removed = self.emptied.iter().map(|path| take_away(path));
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
        typed(&self.creation.image(self.drivers, &self.path)?)
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

fn typed(tree: &Map<String, Value>) -> Result<BlockdevCreateOptions> {
    from_keyval(Value::Object(tree.clone())).map_err(|error| Error::new(error.desc))
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
    if kind == Kind::Text { value.replace(',', ",,") } else { value.to_owned() }
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
