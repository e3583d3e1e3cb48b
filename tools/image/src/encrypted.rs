//! What a tree says of an encrypted image: what opens it, that nothing does, and what it is called then.

use block_core::catalog::{BlockdevOptions, BlockdevRef, BlockdevRefOrNull, DriverOptions};
use serde_json::{Value, json};

use crate::source::Tree;

/// What is said of an image's encryption.
pub(crate) fn encryption(tree: &Tree) -> Option<&Tree> {
    tree.get("encrypt").and_then(Value::as_object)
}

/// What opens an image that was made a moment ago.
pub(crate) fn keyed(tree: &mut Tree, id: &str) {
    match tree.get("driver").and_then(Value::as_str) {
        Some("luks") => drop(tree.insert("key-secret".to_owned(), id.into())),
        Some("qcow2") => drop(tree.insert("encrypt".to_owned(), json!({ "format": "luks", "key-secret": id }))),
        _ => {}
    }
}

/// Nothing is asked for that opens the image, nor what it stands on.
pub(crate) fn leave_locked(options: &mut BlockdevOptions) {
    let below = match &mut options.driver {
        DriverOptions::Qcow2(qcow2) => {
            qcow2.own.locked = true;
            match &mut qcow2.backing {
                Some(BlockdevRefOrNull::Definition(below)) => below,
                _ => return,
            }
        }
        DriverOptions::Luks(luks) => {
            luks.own.locked = true;
            return;
        }
        DriverOptions::Raw(raw) => match &mut raw.file {
            BlockdevRef::Definition(below) => below,
            BlockdevRef::Reference(_) => return,
        },
        _ => return,
    };
    leave_locked(below);
}

/// As QEMU calls an image that cannot be opened by its file's name alone.
pub(crate) fn shown(tree: &Tree, driver: &str) -> Option<String> {
    let quoted = |member: Option<&Value>| member.filter(|member| member.is_string()).map(Value::to_string);
    let place = |child: &Value| {
        let (driver, filename) = (quoted(child.get("driver"))?, quoted(child.get("filename"))?);
        Some(format!("{{\"driver\": {driver}, \"filename\": {filename}}}"))
    };
    let file = place(tree.get("file")?)?;
    match driver {
        "luks" => {
            let id = quoted(tree.get("key-secret"))?;
            let header = match tree.get("header") {
                Some(header) => format!("\"header\": {}, ", place(header)?),
                None => String::new(),
            };
            Some(format!("json:{{{header}\"driver\": \"luks\", \"file\": {file}, \"key-secret\": {id}}}"))
        }
        "qcow2" => {
            let id = quoted(encryption(tree)?.get("key-secret"))?;
            Some(format!("json:{{\"encrypt.key-secret\": {id}, \"driver\": \"qcow2\", \"file\": {file}}}"))
        }
        _ => None,
    }
}
