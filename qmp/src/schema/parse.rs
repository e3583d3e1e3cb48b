//! Where a value stands while it is read, and how a JSON object is taken apart member by member.
//!
//! The texts of the errors made here are part of the language: clients compare them.

use std::fmt;

use super::{Map, Object, Qapi, Value};
use crate::{Error, Result};

/// How many objects and arrays may stand inside each other in typed arguments. The wire allows 1024, but each level
/// here is a level of recursion and, for a node that is defined in place, of the graph.
pub const MAX_INLINE_DEPTH: usize = 64;

/// Reads command arguments, or any other JSON of a client.
pub fn from_value<T: Qapi>(value: Value) -> Result<T> {
    T::parse(value, &At::root(Mode::Json))
}

/// Reads a tree whose scalars are all strings, as [`crate::keyval`] makes it.
pub fn from_keyval<T: Qapi>(value: Value) -> Result<T> {
    T::parse(value, &At::root(Mode::Keyval))
}

/// Where scalars come from, and so how they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// JSON: numbers are numbers.
    Json,
    /// The command line: everything is a string, and sizes take suffixes.
    Keyval,
}

/// The place of a value in its message: `file.children[2].driver`. A chain on the stack, made text only for an error.
#[derive(Clone, Copy, Debug)]
pub struct At<'a> {
    parent: Option<&'a At<'a>>,
    step: Step<'a>,
    depth: usize,
    mode: Mode,
}

#[derive(Clone, Copy, Debug)]
enum Step<'a> {
    Root,
    Member(&'a str),
    Index(usize),
}

impl<'a> At<'a> {
    /// The whole of a command's arguments.
    pub fn root(mode: Mode) -> Self {
        At { parent: None, step: Step::Root, depth: 0, mode }
    }

    /// The member `name` of the object here.
    #[must_use]
    pub fn member(&'a self, name: &'a str) -> At<'a> {
        self.step(Step::Member(name))
    }

    /// The element `index` of the array here.
    #[must_use]
    pub fn index(&'a self, index: usize) -> At<'a> {
        self.step(Step::Index(index))
    }

    fn step(&'a self, step: Step<'a>) -> At<'a> {
        At { parent: Some(self), step, depth: self.depth + 1, mode: self.mode }
    }

    /// How scalars are written here.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Refuses a container that stands inside too many others.
    pub fn check_depth(&self) -> Result<()> {
        if self.depth >= MAX_INLINE_DEPTH {
            return Err(Error::generic(format!("Parameter '{self}' is nested deeper than {MAX_INLINE_DEPTH} levels")));
        }
        Ok(())
    }

    /// A value of another JSON type than `expected` stands here.
    pub fn wrong_type(&self, expected: &str) -> Error {
        Error::generic(format!("Invalid parameter type for '{self}', expected: {expected}"))
    }

    /// A number out of range, or a word that is none of the allowed ones.
    pub fn expects(&self, expected: &str) -> Error {
        Error::generic(format!("Parameter '{self}' expects {expected}"))
    }

    /// A word that is not among an enum's values.
    pub fn not_accepted(&self, value: &str) -> Error {
        Error::generic(format!("Parameter '{self}' does not accept value '{value}'"))
    }

    /// Nothing stands here, though something must.
    pub fn missing(&self) -> Error {
        Error::generic(format!("Parameter '{self}' is missing"))
    }

    /// Something stands here, though nothing may.
    pub fn unexpected(&self) -> Error {
        Error::generic(format!("Parameter '{self}' is unexpected"))
    }
}

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.parent.filter(|parent| !matches!(parent.step, Step::Root));
        if let Some(parent) = inner {
            parent.fmt(f)?;
        }
        match self.step {
            Step::Root => f.write_str("arguments"),
            Step::Member(name) if inner.is_some() => write!(f, ".{name}"),
            Step::Member(name) => f.write_str(name),
            Step::Index(index) => write!(f, "[{index}]"),
        }
    }
}

/// A JSON object that is being taken apart: each reader takes what it knows, and nothing may be left.
#[derive(Debug)]
pub struct Members<'a> {
    left: Map,
    at: &'a At<'a>,
}

impl<'a> Members<'a> {
    /// Opens the object at `at`.
    pub fn open(value: Value, at: &'a At<'a>) -> Result<Self> {
        let Value::Object(left) = value else { return Err(at.wrong_type("object")) };
        at.check_depth()?;
        Ok(Self { left, at })
    }

    /// Reads a whole object: all of `T`'s members and no others.
    pub fn whole<T: Object>(value: Value, at: &At<'_>) -> Result<T> {
        let mut members = Members::open(value, at)?;
        let taken = T::take(&mut members)?;
        members.finish()?;
        Ok(taken)
    }

    /// Takes a member that must be there.
    pub fn required<T: Qapi>(&mut self, name: &'static str) -> Result<T> {
        self.optional(name)?.ok_or_else(|| self.at.member(name).missing())
    }

    /// Takes a member that may be absent. A `null` is not absent.
    pub fn optional<T: Qapi>(&mut self, name: &'static str) -> Result<Option<T>> {
        self.left.swap_remove(name).map(|value| T::parse(value, &self.at.member(name))).transpose()
    }

    /// Takes a member that has a default.
    pub fn or_else<T: Qapi>(&mut self, name: &'static str, default: impl FnOnce() -> T) -> Result<T> {
        Ok(self.optional(name)?.unwrap_or_else(default))
    }

    /// Takes a union's tag, whose value must be one of `allowed`, and says which.
    pub fn tag(&mut self, name: &'static str, allowed: &[&'static str]) -> Result<&'static str> {
        let at = self.at.member(name);
        let value = self.left.swap_remove(name).ok_or_else(|| at.missing())?;
        let Value::String(tag) = value else { return Err(at.wrong_type("string")) };
        allowed.iter().copied().find(|known| *known == tag).ok_or_else(|| at.not_accepted(&tag))
    }

    /// Refuses what nobody took.
    pub fn finish(self) -> Result<()> {
        match self.left.keys().next() {
            Some(name) => Err(self.at.member(name).unexpected()),
            None => Ok(()),
        }
    }
}
