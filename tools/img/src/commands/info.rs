//! `info`: what an image is, its snapshots, and what it stands on.

use std::fmt::Write;

use block_core::graph::NodeId;
use serde_json::{Map, Value, json};
use trellis_image::args::{Args, Definition, flag};
use trellis_image::{FileName, Given, Image, Outcome, Session, say};

use super::common::{
    FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, Output, closed, given, objects, one_image, open, output,
};
use super::snapshot::{described, listed};
use crate::output::{place, pretty, size};

pub(super) const DEFINITION: Definition = Definition {
    name: "info",
    about: "Says what an image is",
    options: &[
        FORMAT,
        IMAGE_OPTS,
        flag('b', "backing-chain", "also of what the image stands on, down to the bottom"),
        FORCE_SHARE,
        OBJECT,
        OUTPUT,
    ],
    words: "FILENAME",
};

pub(super) async fn run(session: &Session, args: Args) -> Outcome {
    let output = output(&args)?;
    let word = one_image(&args)?;
    let mut given = Given { no_backing: true, no_data: true, locked: true, ..given(&args, word)? };
    objects(session, &args).await?;
    let mut all = Vec::new();
    let mut seen = Vec::new();
    loop {
        let image = open(session, &given).await?;
        let info = ImageInfo::of(&image).await;
        closed(image, Ok(())).await?;
        let next = info.backing.clone().filter(|_| args.has("backing-chain"));
        seen.push(info.filename().to_owned());
        all.push(info);
        let Some((name, format)) = next else { break };
        if seen.contains(&name) {
            return Err(trellis_image::Failure::new(format!("Backing file '{name}' creates an infinite loop.")));
        }
        given = Given { name: FileName::Name(name), format, ..given };
    }
    match output {
        Output::Human => say(&all.iter().map(ImageInfo::human).collect::<Vec<_>>().join("\n")),
        Output::Json if args.has("backing-chain") => say(&pretty(&all.iter().map(ImageInfo::json).collect())),
        Output::Json => say(&pretty(&all[0].json())),
    }
    Ok(0)
}

/// What there is to say of an image.
struct ImageInfo {
    node: Map<String, Value>,
    /// What it stands on, from where we are, and the format of that.
    backing: Option<(String, Option<String>)>,
}

impl ImageInfo {
    async fn of(image: &Image) -> Self {
        let mut node = node(image, image.node).await;
        let info = image.info().await;
        if let Some(snapshots) = image.snapshots().filter(|all| !all.is_empty()) {
            node.insert("snapshots".to_owned(), snapshots.iter().map(described).collect());
        }
        let filename = node["filename"].as_str().unwrap_or_default().to_owned();
        node.insert("filename".to_owned(), image.filename().await.into());
        let backing = info.backing.map(|(name, format)| {
            let full = beside(&filename, &name);
            node.insert("backing-filename".to_owned(), name.into());
            node.insert("full-backing-filename".to_owned(), full.clone().into());
            if let Some(format) = &format {
                node.insert("backing-filename-format".to_owned(), format.clone().into());
            }
            (full, format)
        });
        Self { node, backing }
    }

    fn filename(&self) -> &str {
        self.node["filename"].as_str().unwrap_or_default()
    }

    fn json(&self) -> Value {
        Value::Object(self.node.clone())
    }

    fn human(&self) -> String {
        let node = &self.node;
        let text = |name: &str| node.get(name).and_then(Value::as_str);
        let mut page = format!("image: {}\nfile format: {}\n", self.filename(), text("format").unwrap_or_default());
        let bytes = node["virtual-size"].as_u64().unwrap_or_default();
        line(&mut page, 0, "virtual size", format!("{} ({bytes} bytes)", size(bytes)));
        line(&mut page, 0, "disk size", disk_size(node));
        if node.contains_key("encrypted") {
            line(&mut page, 0, "encrypted", "yes");
        }
        if let Some(cluster) = node.get("cluster-size") {
            line(&mut page, 0, "cluster_size", cluster);
        }
        if node["dirty-flag"] == true {
            line(&mut page, 0, "cleanly shut down", "no");
        }
        if let Some(name) = text("backing-filename") {
            let full = text("full-backing-filename").unwrap_or_default();
            let actual = if full == name { String::new() } else { format!(" (actual path: {full})") };
            line(&mut page, 0, "backing file", format!("{name}{actual}"));
        }
        if let Some(format) = text("backing-filename-format") {
            line(&mut page, 0, "backing file format", format);
        }
        if let Some(Value::Array(snapshots)) = node.get("snapshots") {
            page.push_str(&listed(snapshots));
        }
        let specific = node.get("format-specific").and_then(|specific| specific["data"].as_object());
        if let Some(data) = specific.filter(|data| !data.is_empty()) {
            page.push_str("Format specific information:\n");
            members(&mut page, data, 1);
        }
        if let Some(Value::Array(children)) = node.get("children") {
            children.iter().for_each(|child| child_page(&mut page, child, ""));
        }
        page
    }
}

/// A node for programs, with its children but for what it stands on and where its data is.
async fn node(image: &Image, id: NodeId) -> Map<String, Value> {
    let graph = image.graph();
    let info = block_core::catalog::info(graph, id).await.unwrap_or_default();
    let report = graph.node(id);
    let mut children = Vec::new();
    for (name, child) in
        report.iter().flat_map(|report| &report.children).filter(|(name, _)| name != "backing" && name != "data-file")
    {
        let child = json!({ "name": name, "info": Box::pin(node(image, *child)).await });
        // A header is said first, as it is what is opened first.
        children.insert(if name == "header" { 0 } else { children.len() }, child);
    }
    let mut node = Map::new();
    let mut put = |name: &str, value: Value| {
        node.insert(name.to_owned(), value);
    };
    put("children", children.into());
    put("virtual-size", report.map_or(0, |report| report.geometry.size.next_multiple_of(512)).into());
    put("filename", info.filename.into());
    put("format", info.driver.into());
    if info.encrypted {
        put("encrypted", true.into());
    }
    put("dirty-flag", info.dirty.unwrap_or(false).into());
    if let Some(allocated) = info.allocated {
        put("actual-size", allocated.into());
    }
    if let Some(cluster) = info.cluster_size {
        put("cluster-size", cluster.into());
    }
    if let Some(specific) = info.specific {
        put("format-specific", specific);
    }
    node
}

/// A child for people.
fn child_page(page: &mut String, child: &Value, above: &str) {
    let path = format!("{above}/{}", child["name"].as_str().unwrap_or_default());
    let info = &child["info"];
    let Some(node) = info.as_object() else { return };
    let _ = writeln!(page, "Child node '{path}':");
    let is_protocol = info["children"].as_array().is_none_or(Vec::is_empty);
    let (name, kind, length) = match is_protocol {
        true => ("filename", "protocol type", "file length"),
        false => ("image", "file format", "virtual size"),
    };
    line(page, 1, name, info["filename"].as_str().unwrap_or_default());
    line(page, 1, kind, info["format"].as_str().unwrap_or_default());
    let bytes = info["virtual-size"].as_u64().unwrap_or_default();
    line(page, 1, length, format!("{} ({bytes} bytes)", size(bytes)));
    line(page, 1, "disk size", disk_size(node));
    if let Some(children) = info["children"].as_array() {
        children.iter().for_each(|child| child_page(page, child, &path));
    }
}

fn disk_size(node: &Map<String, Value>) -> String {
    node.get("actual-size").and_then(Value::as_u64).map_or("unavailable".to_owned(), size)
}

fn line(page: &mut String, depth: usize, name: &str, value: impl std::fmt::Display) {
    let _ = writeln!(page, "{}{name}: {value}", "    ".repeat(depth));
}

/// Members of an object for people: lists have numbers, and what is inside is further in.
fn members(page: &mut String, object: &Map<String, Value>, depth: usize) {
    let mut members: Vec<_> = object.iter().collect();
    members.sort_by_key(|(name, _)| place(name));
    for (name, value) in members {
        entry(page, &name.replace('-', " "), value, depth);
    }
}

fn entry(page: &mut String, name: &str, value: &Value, depth: usize) {
    match value {
        Value::Object(inner) => {
            let _ = writeln!(page, "{}{name}:", "    ".repeat(depth));
            members(page, inner, depth + 1);
        }
        Value::Array(values) => {
            let _ = writeln!(page, "{}{name}:", "    ".repeat(depth));
            for (number, value) in values.iter().enumerate() {
                entry(page, &format!("[{number}]"), value, depth + 1);
            }
        }
        Value::String(text) => line(page, depth, name, text),
        scalar => line(page, depth, name, scalar),
    }
}

/// A name that an image gives, from where we are.
fn beside(base: &str, name: &str) -> String {
    let base = std::path::Path::new(base).parent().filter(|_| !name.starts_with('/') && !name.contains(':'));
    base.map_or(name.to_owned(), |folder| folder.join(name).to_string_lossy().into_owned())
}
