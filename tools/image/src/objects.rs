//! `--object`: what nodes refer to by id.

use block_core::base::{Error, Result};
use block_core::drivers::filter::throttle::{FlatThrottleLimits, Limits, ThrottleGroup, ThrottleLimits};
use qmp::Qapi;
use qmp::keyval::parse_option;

use crate::session::Session;

/// The argument of `--object`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
struct ObjectOptions {
    /// The object's name.
    id: String,
    /// What it is.
    #[qapi(flatten)]
    kind: ObjectKind,
}

/// What an object is.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(union, tag = "qom-type", tag_name = "ObjectType")]
enum ObjectKind {
    /// Limits that nodes share.
    ThrottleGroup(Box<ThrottleGroupOptions>),
}

/// Limits that nodes share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Qapi)]
#[qapi(name = "ThrottleGroupProperties")]
struct ThrottleGroupOptions {
    /// What the members of the group may do together. They go before the flat properties.
    limits: Option<ThrottleLimits>,
    /// The same limits one by one.
    #[qapi(flatten)]
    flat: FlatThrottleLimits,
}

/// Makes an object as the command line says.
pub fn add_object(session: &Session, text: &str) -> Result<()> {
    let parsed = parse_option(text, Some("qom-type")).and_then(|parsed| parsed.into_typed());
    let ObjectOptions { id, kind } = parsed.map_err(|error| Error::new(error.desc))?;
    match kind {
        ObjectKind::ThrottleGroup(options) => {
            let given = options.limits.unwrap_or_default().or(options.flat.into());
            session.graph.objects().insert(&id, ThrottleGroup::new(given.over(Limits::default())?));
            Ok(())
        }
    }
}
