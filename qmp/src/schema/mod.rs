//! Typed options: JSON in, structs out, and the description of both.
//!
//! A type that implements [`Qapi`] can be read ([`from_value`]), written ([`Qapi::to_value`]) and described
//! ([`Collector`] for `query-qmp-schema`, [`TypeDoc`] for help and the manual). `#[derive(Qapi)]` writes the
//! implementation; the struct and its doc comments are the only place where an option is said.
//!
//! | Rust | QAPI | attributes |
//! |---|---|---|
//! | struct | object, members in kebab-case | `#[qapi(name = "…", feature = "…")]` |
//! | its field | required member; `Option<T>` is optional | `rename = "…"`, `default`, `default = expr`, `feature = "…"` |
//! | its field | all members of another object or union stand here | `flatten` |
//! | its field | no member: only programs set it, and what is read has the default of its type | `skip` |
//! | enum of unit variants | enum, values in kebab-case | `rename = "…"`, `feature = "…"` on a variant |
//! | enum with `#[qapi(union, tag = "…")]` | flat union: the tag's value picks a variant, which holds that branch's object | `tag_name = "…"` names the tag's type |
//! | enum with `#[qapi(alternate)]` | alternate: the JSON type picks a variant; a unit variant is `null` | |
//!
//! A flat union with common members is a struct that flattens both, so that a new driver is one more variant:
//!
//! ```
//! use qmp::{Qapi, schema};
//! use serde_json::json;
//!
//! /// A node of the graph.
//! #[derive(Debug, PartialEq, Qapi)]
//! struct BlockdevOptions {
//!     #[qapi(flatten)]
//!     common: NodeOptions,
//!     #[qapi(flatten)]
//!     driver: DriverOptions,
//! }
//!
//! /// What every node accepts.
//! #[derive(Debug, PartialEq, Qapi)]
//! struct NodeOptions {
//!     /// The name by which others refer to this node.
//!     node_name: Option<String>,
//!     /// Refuse writes.
//!     #[qapi(default = false)]
//!     read_only: bool,
//! }
//!
//! /// What each driver accepts besides.
//! #[derive(Debug, PartialEq, Qapi)]
//! #[qapi(union, tag = "driver", tag_name = "BlockdevDriver")]
//! enum DriverOptions {
//!     Raw(RawOptions),
//!     NullCo(NullOptions),
//! }
//!
//! /// A window on its file.
//! #[derive(Debug, PartialEq, Qapi)]
//! struct RawOptions {
//!     /// Where the bytes come from.
//!     file: BlockdevRef,
//! }
//!
//! /// A disk of nothing.
//! #[derive(Debug, PartialEq, Qapi)]
//! struct NullOptions {
//!     /// In bytes.
//!     #[qapi(default = 1 << 30)]
//!     size: i64,
//! }
//!
//! /// A node by its name, or defined in place.
//! #[derive(Debug, PartialEq, Qapi)]
//! #[qapi(alternate)]
//! enum BlockdevRef {
//!     Definition(Box<BlockdevOptions>),
//!     Reference(String),
//! }
//!
//! let options: BlockdevOptions = schema::from_value(json!({
//!     "driver": "raw", "node-name": "disk", "file": { "driver": "null-co", "size": 512 }
//! }))?;
//! assert_eq!(options.common.node_name.as_deref(), Some("disk"));
//! let DriverOptions::Raw(RawOptions { file: BlockdevRef::Definition(file) }) = options.driver else { panic!() };
//! assert_eq!(file.driver, DriverOptions::NullCo(NullOptions { size: 512 }));
//!
//! let refused = schema::from_value::<BlockdevOptions>(json!({ "driver": "raw", "file": { "driver": "null-co", "x": 1 } }));
//! assert_eq!(refused.unwrap_err().desc, "Parameter 'file.x' is unexpected");
//!
//! use qmp::schema::Union;
//! assert_eq!(DriverOptions::TAGS, ["raw", "null-co"]);
//! # Ok::<(), qmp::Error>(())
//! ```

mod collect;
mod describe;
mod parse;
#[cfg(test)]
mod sample;
mod scalar;
mod shape;

pub use collect::{Collector, Command, Definition, EnumValue, Kind, Member, Shape, TypeRef, Variant};
pub use describe::{MemberDoc, TypeDoc, describe};
pub use parse::{At, MAX_INLINE_DEPTH, Members, Mode, from_keyval, from_value};
/// `#[derive(Qapi)]`: the table at the head of [this module](self) lists what it reads.
pub use qmp_derive::Qapi;
pub use scalar::Size;
pub use serde_json::Value;
pub use shape::{Alternate, Empty, Enum, Object, TagType, Union, put_member, put_tag};

use crate::Result;

/// The members of a JSON object, in the order in which they were written.
pub type Map = serde_json::Map<String, Value>;

/// A type of the QMP language: read from JSON, written to it, and described to clients. Usually derived.
pub trait Qapi: Sized + 'static {
    /// Which JSON type a value of this type has; an alternate chooses by it.
    const KIND: Kind;

    /// Reads a value that stands at `at`; errors name that place.
    fn parse(value: Value, at: &At<'_>) -> Result<Self>;

    /// The value as a client sees it.
    fn to_value(&self) -> Value;

    /// What this type is. Called once for each type and collector, so a type may contain itself.
    fn define(collector: &mut Collector) -> Definition;

    /// This type's place among the collected types.
    fn type_ref(collector: &mut Collector) -> TypeRef {
        collector.add::<Self>()
    }
}
