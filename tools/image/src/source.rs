//! From what stands on a command line to a tree of nodes as the catalog opens it: drivers are found where none is named,
//! formats are guessed, and what images name is put in its place, down to the graph's limit.
//!
//! Trees are those of the command line: all leaves are words. JSON with its numbers is made so too.

use std::collections::HashSet;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::pin::Pin;

use block_core::base::{Error, Result, ResultExt};
use block_core::catalog::probe::{self, References};
use block_core::catalog::{self, BlockdevOptions, DriverOptions, MAX_DEPTH};
use block_core::graph::{PermSet, Perms};
use block_core::port::{PORT, Port, PortOptions};
use block_core::rt::blocking;
use qmp::keyval::parse_option;
use qmp::schema::from_keyval;
use serde_json::{Map, Value};

use crate::encrypted::{encryption, keyed, leave_locked, shown};
use crate::given::{FileName, Given};
use crate::identity::{Identity, identity};
use crate::session::{Session, complain};

/// A tree that is complete.
pub(crate) struct Source {
    pub(crate) options: BlockdevOptions,
    /// The driver of its top node.
    pub(crate) driver: String,
    /// Nobody said that it is raw, and it looks like nothing else.
    pub(crate) is_guess: bool,
    /// What it is called where its file's name does not say it all.
    pub(crate) shown: Option<String>,
}

pub(crate) type Tree = Map<String, Value>;
type Completed<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + 'a>>;

impl Session {
    /// The tree for an image.
    pub(crate) async fn source(&self, given: &Given) -> Result<Source> {
        let mut tree = tree(given)?;
        if let Some(id) = &given.key_secret {
            keyed(&mut tree, id);
        }
        let mut way = Way { given, seen: HashSet::new(), depth: 0, is_too_deep: false, layer: 0, nodes: 0 };
        self.step_into(&tree, &mut way).await?;
        self.complete(&mut tree, &mut way).await?;
        let driver = tree.get("driver").and_then(Value::as_str).unwrap_or_default().to_owned();
        let shown = shown(&tree, &driver);
        common(&mut tree, given);
        let mut options: BlockdevOptions = typed(tree)?;
        if let Some(snapshot) = &given.snapshot {
            let DriverOptions::Qcow2(qcow2) = &mut options.driver else {
                return Err(Error::new(format!("Block format '{driver}' does not support internal snapshots")));
            };
            qcow2.own.snapshot = Some(snapshot.clone());
        }
        if given.locked {
            leave_locked(&mut options);
        }
        let is_guess = matches!(&options.driver, DriverOptions::Raw(raw) if raw.own.is_guess);
        if is_guess && given.writable && !given.quiet {
            warn_of_guess(given.name.text());
        }
        Ok(Source { options, driver, is_guess, shown })
    }

    /// The file of an image, by itself.
    pub(crate) async fn file_of(&self, given: &Given) -> Result<BlockdevOptions> {
        let mut tree = tree(given)?;
        let mut way = Way { given, seen: HashSet::new(), depth: 0, is_too_deep: false, layer: 0, nodes: 0 };
        self.complete(&mut tree, &mut way).await?;
        let Some(Value::Object(mut file)) = tree.remove("file") else {
            return Err(Error::new("The image has no file of its own"));
        };
        common(&mut file, given);
        typed(file)
    }

    /// Puts in what a node's definition leaves out.
    fn complete<'a>(&'a self, tree: &'a mut Tree, way: &'a mut Way<'_>) -> Completed<'a, ()> {
        Box::pin(async move {
            way.descend()?;
            way.count()?;
            if !tree.contains_key("driver") {
                self.guess(tree, way).await?;
            }
            for name in PROTOCOLS {
                if let Some(Value::Object(child)) = tree.get_mut(*name) {
                    self.complete_protocol(child, way).await?;
                }
            }
            if let Some(Value::Object(below)) = tree.get_mut("backing") {
                way.layer += 1;
                self.complete(below, way).await?;
                if way.given.writable_layer == Some(way.layer) {
                    below.entry("read-only").or_insert_with(|| "off".into());
                }
                way.layer -= 1;
            }
            for name in LAYERS {
                match tree.get_mut(*name) {
                    Some(Value::Object(child)) => self.complete(child, way).await?,
                    Some(Value::Array(children)) => {
                        for child in children.iter_mut().filter_map(Value::as_object_mut) {
                            self.complete(child, way).await?;
                        }
                    }
                    _ => {}
                }
            }
            self.follow(tree, way).await?;
            through_ring(tree);
            way.depth -= 1;
            Ok(())
        })
    }

    /// Which format a definition is about that does not say it.
    async fn guess(&self, tree: &mut Tree, way: &mut Way<'_>) -> Result<()> {
        if !tree.contains_key("file") {
            let Some(filename) = tree.remove("filename") else {
                return Err(Error::new("Must specify either driver or file"));
            };
            let mut file = Tree::from_iter([("filename".to_owned(), filename)]);
            for (name, value) in std::mem::take(tree) {
                // What is no common option is the file's.
                let place = if COMMON.contains(&name.as_str()) { &mut *tree } else { &mut file };
                place.insert(name, value);
            }
            tree.insert("file".to_owned(), Value::Object(file));
        }
        let Some(Value::Object(file)) = tree.get_mut("file") else {
            return Err(Error::new("Must specify either driver or file"));
        };
        self.complete_protocol(file, way).await?;
        let format = self.look(file, way.given, async |file| probe::probe(file).await).await?;
        tree.insert("driver".to_owned(), format.into());
        if format == "raw" {
            tree.insert(GUESSED.to_owned(), "on".into());
        }
        Ok(())
    }

    /// A child that is no image of a format unless it says so: a file, or a device.
    async fn complete_protocol(&self, tree: &mut Tree, way: &mut Way<'_>) -> Result<()> {
        if tree.contains_key("driver") {
            return self.complete(tree, way).await;
        }
        way.count()?;
        let Some(name) = tree.get("filename").and_then(Value::as_str).map(str::to_owned) else {
            return Err(Error::new("A 'file' needs a 'driver' or a 'filename'"));
        };
        let name = match plain(&name)? {
            "" => return Err(Error::new("The 'file' block driver requires a file name")),
            name => as_file(name),
        };
        tree.insert("driver".to_owned(), protocol(&name).await.into());
        tree.insert("filename".to_owned(), name.into());
        through_ring(tree);
        Ok(())
    }

    /// Puts in what the image of a node names.
    async fn follow(&self, tree: &mut Tree, way: &mut Way<'_>) -> Result<()> {
        let driver = tree.get("driver").and_then(Value::as_str).unwrap_or_default().to_owned();
        if driver == "luks" && !tree.contains_key("key-secret") && !way.given.locked {
            return Err(Error::new("Parameter 'key-secret' is required for cipher"));
        }
        let Some(Value::Object(file)) = tree.get("file") else { return Ok(()) };
        let lacks_encryption = encryption(tree).is_some_and(|encrypt| !encrypt.contains_key("format"));
        let is_followed = tree.contains_key("backing") && tree.contains_key("data-file") && !lacks_encryption;
        if driver != "qcow2" || is_followed {
            return Ok(());
        }
        let file = file.clone();
        let References { backing_file, backing_format, has_data_file, data_file, encryption: kind } = self
            .look(&file, way.given, async |child| {
                // What cannot be read is no other format.
                if !matches!(probe::guessed(&probe::first_bytes(child).await?), Ok("qcow2")) {
                    return Err(Error::new("Image is not in qcow2 format"));
                }
                probe::references(&driver, child).await
            })
            .await?;
        if kind.is_some() && !tree.contains_key("encrypt") && !way.given.locked {
            return Err(Error::new("Parameter 'encrypt.key-secret' is required for cipher"));
        }
        match (kind, tree.get_mut("encrypt").and_then(Value::as_object_mut)) {
            (Some(kind), Some(encrypt)) => drop(encrypt.entry("format").or_insert_with(|| kind.into())),
            // As in QEMU, what opens an image that is open to everybody is of no use, and no harm.
            (None, Some(_)) if lacks_encryption => drop(tree.remove("encrypt")),
            _ => {}
        }
        let base = filename(&file);
        if let Some(name) = data_file.filter(|_| has_data_file && !tree.contains_key("data-file")) {
            // As in QEMU, its name is not looked up beside the image.
            let mut child = named(&name)?;
            if way.given.no_data {
                let any = [("driver".to_owned(), "null-co".into()), ("size".to_owned(), "9223372035781033984".into())];
                child = Tree::from_iter(any);
            } else {
                self.complete_protocol(&mut child, way).await?;
            }
            tree.insert("data-file".to_owned(), Value::Object(child));
        }
        let Some(name) = backing_file.filter(|name| !name.is_empty()) else { return Ok(()) };
        if tree.contains_key("backing") {
            return Ok(());
        }
        if way.given.no_backing {
            tree.insert("backing".to_owned(), Value::Null);
            return Ok(());
        }
        let doing = || "Could not open backing file";
        let mut below = named(&beside(&base, &name).doing(doing)?)?;
        if let Some(format) = backing_format.filter(|format| !format.is_empty() && !below.contains_key("driver")) {
            known(&format).doing(doing)?;
            below = over_file(below, &format);
        }
        let here = self.step_into(&below, way).await.doing(doing)?;
        way.layer += 1;
        let layer = way.layer;
        let completed = self.complete(&mut below, way).await;
        if way.is_too_deep {
            // Once is enough: it is about the whole chain.
            return completed;
        }
        completed.doing(doing)?;
        if let Some(Value::Object(file)) = below.get("file") {
            // What is wrong with it is said here, where it is known whose file it is.
            self.look(file, way.given, async |_| Ok(())).await.doing(doing)?;
        }
        if let Some(identity) = here {
            way.seen.remove(&identity);
        }
        way.layer -= 1;
        if way.given.writable_layer.is_some() {
            let writable = way.given.writable_layer == Some(layer);
            below.insert("read-only".to_owned(), if writable { "off" } else { "on" }.into());
        }
        tree.insert("backing".to_owned(), Value::Object(below));
        Ok(())
    }

    /// Notes that the way leads through a definition's file. A chain that comes back to where it has been has no end.
    async fn step_into(&self, tree: &Tree, way: &mut Way<'_>) -> Result<Option<Identity>> {
        let name = filename(tree);
        let identity = identity(&name).await;
        match identity.is_none_or(|identity| way.seen.insert(identity)) {
            true => Ok(identity),
            false => Err(Error::new(format!("Backing file '{name}' creates an infinite loop."))),
        }
    }

    /// Opens a file for a moment, only to read it and without taking locks, since the image is opened in earnest later.
    async fn look<R>(
        &self,
        tree: &Tree,
        given: &Given,
        work: impl AsyncFnOnce(block_core::graph::Child<'_>) -> Result<R>,
    ) -> Result<R> {
        let mut tree = tree.clone();
        let cache = Given { writable: false, force_share: true, ..given.clone() };
        common(&mut tree, &cache);
        let node = catalog::add_unnamed(&mut self.graph.permit(), typed(tree)?).await?;
        let perms = Perms { uses: PermSet::CONSISTENT_READ, shares: PermSet::ALL };
        let options = PortOptions { name: "a look at an image".into(), perms };
        let looked = match Port::attach(&mut self.graph.permit(), node, options, std::rc::Rc::new(|_| ())).await {
            Ok(port) => {
                let looked = port.handle().job(&self.local).step(async |cx| work(cx.child(PORT)).await).await;
                port.detach(&mut self.graph.permit()).await;
                looked
            }
            Err(error) => Err(error),
        };
        self.graph.permit().remove(node).await?;
        looked
    }
}

/// Where a chain of images has been so far.
struct Way<'g> {
    given: &'g Given,
    /// The files between the top and here.
    seen: HashSet<Identity>,
    depth: usize,
    /// The way ended because it leads too far down.
    is_too_deep: bool,
    /// How many layers are above.
    layer: usize,
    /// How many nodes it has come to.
    nodes: usize,
}

impl Way<'_> {
    /// One image further down.
    fn descend(&mut self) -> Result<()> {
        if self.depth == MAX_IMAGES {
            self.is_too_deep = true;
            return Err(Error::new(format!("Not more than {MAX_IMAGES} images may stand on each other")));
        }
        self.depth += 1;
        Ok(())
    }

    /// One node more. Images that name several others could otherwise ask for more than there is memory.
    fn count(&mut self) -> Result<()> {
        self.nodes += 1;
        match self.nodes <= MAX_NODES {
            true => Ok(()),
            false => Err(Error::new(format!("An image may not be made of more than {MAX_NODES} nodes"))),
        }
    }
}

/// What the command line says, not yet complete.
fn tree(given: &Given) -> Result<Tree> {
    let mut tree = match &given.name {
        FileName::Options(text) => options(text)?,
        FileName::Name(name) => named(name)?,
    };
    match (&given.format, &given.name) {
        (Some(format), _) => {
            known(format)?;
            if tree.get("driver").is_some_and(|driver| driver.as_str() != Some(format)) {
                return Err(Error::new("Driver specified twice"));
            }
            if !tree.contains_key("driver") {
                tree = over_file(tree, format);
            }
        }
        (None, _) => {
            if let Some(driver) = tree.get("driver").and_then(Value::as_str) {
                known(driver)?;
            }
        }
    }
    Ok(tree)
}

/// The tree of a file's name.
pub(crate) fn named(name: &str) -> Result<Tree> {
    if let Some(json) = name.strip_prefix("json:") {
        return options(json.trim_start()).doing(|| "Could not parse the JSON options");
    }
    Ok(Tree::from_iter([("filename".to_owned(), name.into())]))
}

fn options(text: &str) -> Result<Tree> {
    let parsed = parse_option(text, None).map_err(|error| Error::new(error.desc))?;
    match nested(in_words(parsed.value))? {
        Value::Object(tree) => Ok(tree),
        _ => Err(Error::new("Invalid JSON options")),
    }
}

/// A definition of a format over a file: what stands at its top and is the file's own goes to the file.
fn over_file(tree: Tree, format: &str) -> Tree {
    if tree.contains_key("file") || !tree.contains_key("filename") || PROTOCOL_DRIVERS.contains(&format) {
        return Tree::from_iter([("driver".to_owned(), format.into())].into_iter().chain(tree));
    }
    let mut top = Tree::from_iter([("driver".to_owned(), Value::from(format))]);
    let mut file = Tree::new();
    for (name, value) in tree {
        let place = if COMMON.contains(&name.as_str()) { &mut top } else { &mut file };
        place.insert(name, value);
    }
    top.insert("file".to_owned(), Value::Object(file));
    top
}

/// The driver for a file of the host.
pub(crate) async fn protocol(name: &str) -> &'static str {
    let path = name.strip_prefix("file:").unwrap_or(name).to_owned();
    let is_device =
        blocking(move || std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device())).await;
    if is_device { "host_device" } else { "file" }
}

/// Files are moved by the ring of our loop, unless something else is said.
fn through_ring(tree: &mut Tree) {
    if matches!(tree.get("driver").and_then(Value::as_str), Some("file" | "host_device")) {
        tree.entry("aio").or_insert_with(|| "io_uring".into());
    }
}

/// Common options of the top node, unless they are given.
fn common(tree: &mut Tree, given: &Given) {
    let mut put = |name: &str, value: &str| {
        tree.entry(name).or_insert_with(|| value.into());
    };
    put("read-only", if given.writable { "off" } else { "on" });
    if given.force_share {
        put("force-share", "on");
    }
    if given.unmap {
        put("discard", "unmap");
    }
    let cache = tree.entry("cache").or_insert_with(|| Value::Object(Tree::new()));
    if let Some(cache) = cache.as_object_mut() {
        let mut put = |name: &str, value: bool| {
            cache.entry(name).or_insert_with(|| if value { "on" } else { "off" }.into());
        };
        put("direct", given.cache.direct);
        put("no-flush", given.cache.no_flush);
    }
}

fn typed(mut tree: Tree) -> Result<BlockdevOptions> {
    let guesses = Guesses::taken_from(&mut tree);
    let mut options = from_keyval(Value::Object(tree)).map_err(|error| Error::new(error.desc))?;
    guesses.put_into(&mut options);
    Ok(options)
}

/// Which nodes of a tree are raw because they look like nothing else. It cannot be said in options that operators can give.
#[derive(Default)]
struct Guesses {
    here: bool,
    /// By the names of the edges.
    below: Vec<(String, Self)>,
}

impl Guesses {
    fn taken_from(tree: &mut Tree) -> Self {
        let mut guesses = Self { here: tree.remove(GUESSED).is_some(), below: Vec::new() };
        for (name, member) in tree {
            match member {
                Value::Object(child) => guesses.below.push((name.clone(), Self::taken_from(child))),
                Value::Array(children) => {
                    for (number, child) in children.iter_mut().enumerate() {
                        let child = child.as_object_mut().map(Self::taken_from).unwrap_or_default();
                        guesses.below.push((format!("{name}.{number}"), child));
                    }
                }
                _ => {}
            }
        }
        guesses
    }

    fn put_into(&self, options: &mut BlockdevOptions) {
        if let DriverOptions::Raw(raw) = &mut options.driver {
            raw.own.is_guess |= self.here;
        }
        for (edge, node) in options.driver.defined() {
            if let Some((_, guesses)) = self.below.iter().find(|(name, _)| *name == edge) {
                guesses.put_into(node);
            }
        }
    }
}

/// There is a driver of this name.
pub fn is_driver(name: &str) -> bool {
    catalog::drivers().contains(&name)
}

fn known(driver: &str) -> Result<()> {
    match is_driver(driver) {
        true => Ok(()),
        false => Err(Error::new(format!("Unknown driver '{driver}'"))),
    }
}

/// Leaves as the command line would have them.
fn in_words(value: Value) -> Value {
    match value {
        Value::Bool(switch) => if switch { "on" } else { "off" }.into(),
        Value::Number(number) => number.to_string().into(),
        Value::Array(values) => values.into_iter().map(in_words).collect(),
        Value::Object(members) => members.into_iter().map(|(name, value)| (name, in_words(value))).collect(),
        Value::Null | Value::String(_) => value,
    }
}

/// `"file.filename"` of JSON as a member of `file`.
fn nested(value: Value) -> Result<Value> {
    let Value::Object(members) = value else { return Ok(value) };
    let mut tree = Tree::new();
    for (name, value) in members {
        let (mut place, mut rest) = (&mut tree, name.as_str());
        while let Some((step, behind)) = rest.split_once('.') {
            let inner = place.entry(step).or_insert_with(|| Value::Object(Tree::new()));
            let clash = || Error::new(format!("Parameters '{step}.*' used inconsistently"));
            place = inner.as_object_mut().ok_or_else(clash)?;
            rest = behind;
        }
        place.insert(rest.to_owned(), nested(value)?);
    }
    Ok(Value::Object(tree))
}

/// The file that a definition comes down to; empty: none.
fn filename(tree: &Tree) -> String {
    match (tree.get("filename"), tree.get("file")) {
        (Some(Value::String(name)), _) => name.clone(),
        (_, Some(Value::Object(file))) => filename(file),
        _ => String::new(),
    }
}

/// A name that an image gives, from where we are.
pub fn beside(base: &str, name: &str) -> Result<String> {
    if name.starts_with("json:") {
        return Ok(name.to_owned());
    }
    let name = plain(name)?;
    Ok(match Path::new(base).parent() {
        Some(folder) if !Path::new(name).is_absolute() => as_file(&folder.join(name).to_string_lossy()),
        _ => as_file(name),
    })
}

/// A path that is not taken for a name with a protocol, as QEMU writes it.
fn as_file(path: &str) -> String {
    if plain(path).is_ok_and(|whole| whole == path) { path.to_owned() } else { format!("./{path}") }
}

/// A name without `file:`. Names that begin with another protocol have no driver yet.
pub fn plain(name: &str) -> Result<&str> {
    let end = name.find([':', '/']).filter(|end| name[*end..].starts_with(':'));
    match end.map(|end| name.split_at(end)) {
        None => Ok(name),
        Some(("file", rest)) => Ok(rest.strip_prefix(':').unwrap_or(rest)),
        Some((protocol, _)) => Err(Error::new(format!("Unknown protocol '{protocol}'"))),
    }
}

/// An image that is going to be written was taken for raw.
pub fn warn_of_guess(name: &str) {
    complain(&format!(
        "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         \
         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n         \
         Specify the 'raw' format explicitly to remove the restrictions.\n"
    ));
}

/// The member of a node's definition that says that `raw` is a guess.
pub const GUESSED: &str = "(guessed)";
/// How many images may stand on each other: below the last one is its file.
const MAX_IMAGES: usize = 63;
const _: () = assert!(MAX_IMAGES == MAX_DEPTH - 1, "the limit of the graph, and a file");
/// Nodes that an image may come to with all that it names.
const MAX_NODES: usize = 1024;
/// Children that are files rather than images.
const PROTOCOLS: &[&str] = &["file", "data-file", "header"];
/// Children that are images, but for `backing`.
const LAYERS: &[&str] = &["image", "target", "test", "raw", "log", "children"];
/// Drivers that stand on nothing.
const PROTOCOL_DRIVERS: &[&str] = &["file", "host_device", "null-co", "null-aio"];
/// What every node accepts.
const COMMON: &[&str] =
    &["node-name", "discard", "cache", "active", "read-only", "auto-read-only", "force-share", "detect-zeroes"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_looked_up_beside_the_image_that_gives_them() {
        for (base, name, found) in [
            ("/a/b.img", "c", "/a/c"),
            ("b.img", "c", "c"),
            ("d/b.img", "../c", "d/../c"),
            ("/a/b.img", "/c", "/c"),
            ("/a/b.img", "file:c", "/a/c"),
            ("/a/b.img", "x/y:z", "/a/x/y:z"),
        ] {
            assert_eq!(beside(base, name).unwrap(), found);
        }
        assert_eq!(beside("/a", "nbd:localhost:10809").unwrap_err().full(), "Unknown protocol 'nbd'");
    }

    #[test]
    fn flat_json_is_a_tree_of_words() {
        let tree = named("json:{\"driver\":\"raw\",\"offset\":512,\"file.filename\":\"x\",\"file.cache.direct\":true}");
        let expected = serde_json::json!({
            "driver": "raw", "offset": "512", "file": { "filename": "x", "cache": { "direct": "on" } }
        });
        assert_eq!(Value::Object(tree.unwrap()), expected);
        named("json:{\"file\":\"x\",\"file.filename\":\"y\"}").unwrap_err();
        named("json:{").unwrap_err();
    }

    #[test]
    fn a_format_stands_over_the_file() {
        let tree = over_file(named("x").unwrap(), "qcow2");
        assert_eq!(Value::Object(tree), serde_json::json!({ "driver": "qcow2", "file": { "filename": "x" } }));
        let tree = over_file(named("x").unwrap(), "file");
        assert_eq!(Value::Object(tree), serde_json::json!({ "driver": "file", "filename": "x" }));
    }
}
