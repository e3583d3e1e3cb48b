//! The traits behind structs, unions, enums and alternates, which `#[derive(Qapi)]` implements.

use super::{At, Collector, Definition, Kind, Map, Members, Mode, Qapi, Shape, TypeRef, Value};
use crate::Result;

/// A type that is a set of members: it can be an object of its own, or stand among the members of another (`flatten`).
pub trait Object: Sized + 'static {
    /// Takes this type's members out of an object, and leaves the others.
    fn take(members: &mut Members<'_>) -> Result<Self>;

    /// Writes this type's members into an object.
    fn put(&self, out: &mut Map);

    /// Adds this type's members to a description.
    fn shape(collector: &mut Collector, shape: &mut Shape);
}

/// A flat union: one member, the tag, says which branch's members stand beside it.
pub trait Union: Object {
    /// The tag's member name.
    const TAG: &'static str;
    /// The values that the tag may have, in the order of the variants.
    const TAGS: &'static [&'static str];

    /// The tag's value for this branch.
    fn tag(&self) -> &'static str;
}

/// The type of a union's tag, which stands only in descriptions.
pub trait TagType: 'static {
    /// The enum of the tag's values.
    fn define() -> Definition;
}

/// An enumeration of names.
pub trait Enum: Copy + Qapi {
    /// All names, in the order of the variants.
    const NAMES: &'static [&'static str];

    /// The name on the wire.
    fn name(self) -> &'static str;

    /// The value of this name, if there is one.
    fn from_name(name: &str) -> Option<Self>;

    /// Reads a name that stands at `at`.
    fn parse_name(value: Value, at: &At<'_>) -> Result<Self> {
        let Value::String(name) = value else { return Err(at.wrong_type("string")) };
        Self::from_name(&name).ok_or_else(|| at.not_accepted(&name))
    }
}

/// One of several types, told apart by the JSON type of the value.
pub trait Alternate: Qapi {
    /// The kinds of its branches, in the order of the variants.
    const KINDS: &'static [Kind];

    /// The branch that takes `value`. On the command line a word may also be a number or a switch, if no branch
    /// takes a string.
    fn choose(value: &Value, at: &At<'_>) -> Option<usize> {
        let exact = Self::KINDS.iter().position(|kind| kind.takes(value));
        let scalar = || Self::KINDS.iter().position(|kind| kind.takes_word());
        match at.mode() {
            Mode::Keyval if value.is_string() => exact.or_else(scalar),
            _ => exact,
        }
    }
}

/// Writes one member.
pub fn put_member(out: &mut Map, name: &'static str, value: &impl Qapi) {
    out.insert(name.to_owned(), value.to_value());
}

/// Writes the tag of a union.
pub fn put_tag<T: Union>(union: &T, out: &mut Map) {
    out.insert(T::TAG.to_owned(), union.tag().into());
}

impl<T: Object> Object for Box<T> {
    fn take(members: &mut Members<'_>) -> Result<Self> {
        T::take(members).map(Box::new)
    }

    fn put(&self, out: &mut Map) {
        T::put(self, out);
    }

    fn shape(collector: &mut Collector, shape: &mut Shape) {
        T::shape(collector, shape);
    }
}

impl<T: Qapi> Qapi for Box<T> {
    const KIND: Kind = T::KIND;

    fn parse(value: Value, at: &At<'_>) -> Result<Self> {
        T::parse(value, at).map(Box::new)
    }

    fn to_value(&self) -> Value {
        T::to_value(self)
    }

    fn define(collector: &mut Collector) -> Definition {
        T::define(collector)
    }

    fn type_ref(collector: &mut Collector) -> TypeRef {
        T::type_ref(collector)
    }
}

/// The object without members: the arguments of a command that takes none, and the answer of one that says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Qapi)]
pub struct Empty {}
