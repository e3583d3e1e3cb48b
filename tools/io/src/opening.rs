//! From what was asked for to an open image: options of the prompt beside a name, an overlay that is thrown away,
//! copy-on-read.

use std::fs::File;
use std::os::fd::AsRawFd;

use block_core::base::{Error, Result, ResultExt};
use block_core::catalog::{self, BlockdevCreateOptions};
use qmp::schema::from_value;
use serde_json::{Map, Value, json};
use trellis_image::pairs::Pairs;
use trellis_image::{Cache, FileName, GUESSED, Given, Image, Session, warn_of_guess};

use crate::command::{Manner, Open, Reopen};

/// What was asked for. It can be asked for again, with changes.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// The name that was given, for messages.
    pub(crate) label: Option<String>,
    pub(crate) name: FileName,
    pub(crate) format: Option<String>,
    pub(crate) manner: Manner,
}

/// An open image, and what it was asked for as.
pub(crate) struct Opened {
    pub(crate) image: Image,
    pub(crate) wanted: Wanted,
    /// The overlay's file, which has no name any more.
    _overlay: Option<File>,
}

impl Wanted {
    /// What the prompt's `open` asks for.
    pub(crate) fn of(open: Open) -> Result<Self> {
        let label = open.name.clone();
        let name = match (open.name, open.options) {
            (Some(name), None) => FileName::Name(name),
            (Some(name), Some(options)) => FileName::Options(with_name(&options, &name)?),
            (None, options) => FileName::Options(options.unwrap_or_default()),
        };
        Ok(Self { label, name, format: None, manner: open.manner })
    }

    /// Opens it.
    pub(crate) async fn open(self, session: &Session) -> Result<Opened> {
        let manner = &self.manner;
        if manner.native_aio && !manner.cache.is_some_and(|cache| cache.direct) {
            let text = "aio=native was specified, but it requires cache.direct=on, which was not specified.";
            return Err(Error::new(text));
        }
        if manner.copy_on_read && manner.read_only {
            return Err(Error::new("Can't use copy-on-read on read-only device"));
        }
        if !manner.snapshot && !manner.copy_on_read {
            let image = session.open(&self.given()).await?;
            return Ok(Opened { image, wanted: self, _overlay: None });
        }
        // A first look says how large it is, and which format a guess comes to.
        let below = session.open(&Given { writable: false, resizes: false, ..self.given() }).await?;
        let (size, driver, is_guess) = (below.size(), below.driver.clone(), below.is_guess);
        below.close().await?;
        let mut tree = self.tree(&driver)?;
        if is_guess {
            tree[GUESSED] = true.into();
            if !manner.snapshot {
                warn_of_guess(self.name.text());
            }
        }
        let mut overlay = None;
        if manner.snapshot {
            let (file, over) =
                overlay_of(session, tree, size).await.doing(|| "Could not create a temporary overlay")?;
            (overlay, tree) = (Some(file), over);
        }
        if manner.copy_on_read {
            tree = json!({ "driver": "copy-on-read", "file": tree });
        }
        let name = FileName::Name(format!("json:{tree}"));
        let image = session.open(&Given { name, format: None, ..self.given() }).await?;
        Ok(Opened { image, wanted: self, _overlay: overlay })
    }

    fn given(&self) -> Given {
        let manner = &self.manner;
        Given {
            format: self.format.clone(),
            cache: manner.cache.unwrap_or(Cache::WRITEBACK),
            writable: !manner.read_only,
            force_share: manner.force_share,
            unmap: manner.unmap.unwrap_or(true),
            ..Given::of(self.name.clone())
        }
    }

    /// The definition of the image, to be put into another one.
    fn tree(&self, driver: &str) -> Result<Value> {
        let mut tree = match &self.name {
            FileName::Name(name) if name.starts_with("json:") => json_of(name)?,
            FileName::Name(name) if is_protocol(driver) => Map::from_iter([("filename".into(), name.as_str().into())]),
            FileName::Name(name) => Map::from_iter([("file.filename".into(), name.as_str().into())]),
            FileName::Options(text) => {
                let pairs = Pairs::read([text.as_str()])?;
                pairs.iter().map(|(name, value)| (name.to_owned(), value.into())).collect()
            }
        };
        tree.entry("driver").or_insert_with(|| driver.into());
        Ok(Value::Object(tree))
    }

    /// The same with changes.
    pub(crate) fn changed(&self, reopen: &Reopen) -> Result<Self> {
        let mut wanted = self.clone();
        wanted.manner.read_only = reopen.read_only.unwrap_or(wanted.manner.read_only);
        wanted.manner.cache = reopen.cache.or(wanted.manner.cache);
        let driver = |wanted: &Self| wanted.format.clone();
        for (name, value) in reopen.options.iter() {
            let stays = name == "driver" && driver(&wanted).is_none_or(|driver| driver == value);
            if !stays && !is_changeable(name) {
                let name = name.rsplit('.').next().unwrap_or_default();
                return Err(Error::new(format!("Cannot change the option '{name}'")));
            }
        }
        if reopen.options.is_empty() && reopen.read_only.is_none() {
            return Ok(wanted);
        }
        let changes: Vec<(&str, &str)> = reopen.options.iter().filter(|(name, _)| *name != "driver").collect();
        let old =
            |name: &str| reopen.options.get(name).is_none() && !(reopen.read_only.is_some() && name == "read-only");
        wanted.name = match &self.name {
            FileName::Name(name) if name.starts_with("json:") => {
                let mut tree = json_of(name)?;
                tree.retain(|name, _| old(name));
                tree.extend(changes.into_iter().map(|(name, value)| (name.to_owned(), value.into())));
                FileName::Name(format!("json:{}", Value::Object(tree)))
            }
            FileName::Name(name) if reopen.options.is_empty() => FileName::Name(name.clone()),
            FileName::Name(name) => FileName::Options(with_name(&text_of(changes.into_iter()), name)?),
            FileName::Options(text) => {
                let pairs = Pairs::read([text.as_str()])?;
                let kept = pairs.iter().filter(|(name, _)| old(name));
                FileName::Options(text_of(kept.chain(changes.iter().copied())))
            }
        };
        Ok(wanted)
    }
}

/// A qcow2 image over `below` in a file that is gone when nobody has it open.
async fn overlay_of(session: &Session, below: Value, size: u64) -> Result<(File, Value)> {
    let folder = std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), std::path::PathBuf::from);
    let file = unnamed(&folder).doing(|| format!("Could not make a file in '{}'", folder.display()))?;
    let filename = format!("/proc/self/fd/{}", file.as_raw_fd());
    let place = json!({ "driver": "file", "filename": filename });
    let size = size.next_multiple_of(512);
    let options = json!({ "driver": "qcow2", "file": place, "size": size });
    let options: BlockdevCreateOptions = from_value(options).map_err(|error| Error::new(error.desc))?;
    catalog::create(&session.graph, options).await?;
    Ok((file, json!({ "driver": "qcow2", "file": place, "backing": below })))
}

fn unnamed(folder: &std::path::Path) -> std::io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut number = 0u32;
    loop {
        let path = folder.join(format!("trellis-io.{}.{number}", std::process::id()));
        match File::options().read(true).write(true).create_new(true).mode(0o600).open(&path) {
            Ok(file) => return std::fs::remove_file(&path).map(|()| file),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && number < u32::MAX => number += 1,
            Err(error) => return Err(error),
        }
    }
}

fn json_of(name: &str) -> Result<Map<String, Value>> {
    let text = name.strip_prefix("json:").unwrap_or(name);
    serde_json::from_str(text).doing(|| "Could not parse the JSON options")
}

/// Options of an image, and the name of the file that it is in.
fn with_name(options: &str, name: &str) -> Result<String> {
    let pairs = if options.is_empty() { Pairs::default() } else { Pairs::read([options])? };
    let member = if pairs.get("driver").is_some_and(is_protocol) { "filename" } else { "file.filename" };
    Ok(text_of(pairs.iter().chain([(member, name)])))
}

fn text_of<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let all: Vec<_> = pairs.map(|(name, value)| format!("{name}={}", value.replace(',', ",,"))).collect();
    all.join(",")
}

fn is_protocol(driver: &str) -> bool {
    matches!(driver, "file" | "host_device" | "null-co" | "null-aio")
}

fn is_changeable(name: &str) -> bool {
    CHANGEABLE.contains(&name) || name.starts_with("overlap-check.")
}

/// What an open image may be given anew.
const CHANGEABLE: &[&str] = &[
    "read-only",
    "auto-read-only",
    "force-share",
    "discard",
    "detect-zeroes",
    "cache.direct",
    "cache.no-flush",
    "size",
    "offset",
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
    "overlap-check",
    "cache-size",
    "l2-cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
    "backing",
    "throttle-group",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(name: FileName) -> Wanted {
        Wanted { label: None, name, format: None, manner: Manner::default() }
    }

    fn reopen(options: &str) -> Reopen {
        Reopen { options: Pairs::read([options]).unwrap(), ..Reopen::default() }
    }

    #[test]
    fn a_name_joins_its_options() {
        assert_eq!(with_name("driver=raw,size=512", "a,b").unwrap(), "driver=raw,size=512,file.filename=a,,b");
        assert_eq!(with_name("driver=file", "a").unwrap(), "driver=file,filename=a");
    }

    #[test]
    fn what_changes_takes_the_place_of_what_was() {
        let name = |name: FileName, options| wanted(name).changed(&reopen(options)).unwrap().name;
        let options = FileName::Options("driver=raw,size=1k,file.filename=a".into());
        let expected = FileName::Options("driver=raw,file.filename=a,size=512".into());
        assert_eq!(name(options, "size=512"), expected);
        let expected = FileName::Options("size=512,file.filename=a".into());
        assert_eq!(name(FileName::Name("a".into()), "size=512"), expected);
        let expected = FileName::Name("json:{\"driver\":\"raw\",\"size\":\"512\"}".into());
        assert_eq!(name(FileName::Name("json:{\"size\": 1, \"driver\": \"raw\"}".into()), "size=512"), expected);
    }

    #[test]
    fn what_makes_it_another_image_does_not_change() {
        for (options, name) in [("file.filename=b", "filename"), ("bogus=1", "bogus"), ("filename=b", "filename")] {
            let error = wanted(FileName::Name("a".into())).changed(&reopen(options)).unwrap_err();
            assert_eq!(error.full(), format!("Cannot change the option '{name}'"));
        }
        let raw = Wanted { format: Some("raw".into()), ..wanted(FileName::Name("a".into())) };
        raw.changed(&reopen("driver=qcow2")).unwrap_err();
        raw.changed(&reopen("driver=raw")).unwrap();
    }
}
