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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::sample::Switch;
    use super::super::sample::{
        Cache, Common, Discard, Driver, NodeOptions, NodeRef, NodeRefOrNull, Null, Quorum, Raw,
    };
    use super::super::{Enum, Qapi, Size, Union, Value};
    use super::{MAX_INLINE_DEPTH, from_keyval, from_value};

    fn read(value: Value) -> NodeOptions {
        from_value(value).unwrap()
    }

    fn refused(value: Value) -> String {
        from_value::<NodeOptions>(value).unwrap_err().desc
    }

    fn refused_words(value: Value) -> String {
        from_keyval::<NodeOptions>(value).unwrap_err().desc
    }

    fn no_options() -> Common {
        Common { node_name: None, read_only: false, discard: Discard::Ignore, cache: None }
    }

    fn null() -> Null {
        Null { size: 1 << 30, latency_ns: 0, r#type: None, any: None }
    }

    #[test]
    fn the_tag_and_all_members_may_stand_in_any_order() {
        let tree = json!({ "file": { "latency-ns": 5, "driver": "null-co" }, "read-only": true, "driver": "raw", "node-name": "x" });
        let file = NodeOptions { common: no_options(), driver: Driver::NullCo(Null { latency_ns: 5, ..null() }) };
        let raw = Raw { file: NodeRef::Definition(Box::new(file)), backing: None, offset: None, size: None };
        let common = Common { node_name: Some("x".to_owned()), read_only: true, ..no_options() };
        assert_eq!(read(tree), NodeOptions { common, driver: Driver::Raw(Box::new(raw)) });
    }

    #[test]
    fn what_is_written_reads_back_the_same() {
        let full = json!({
            "node-name": "x", "read-only": true, "discard": "unmap", "cache": { "direct": true },
            "driver": "raw", "file": "y", "backing": null, "offset": -1, "size": 512,
        });
        assert_eq!(read(full.clone()).to_value(), full);
        let with_branches = json!({ "driver": "blk-quorum", "children": ["a", { "driver": "void" }], "cache": {} });
        let options = read(with_branches);
        assert_eq!(read(options.to_value()), options);
        let Driver::Quorum(Quorum { children }) = options.driver else { panic!() };
        assert_eq!(children.len(), 2);
        assert_eq!(options.common.cache, Some(Cache { direct: false }));
    }

    #[test]
    fn tags_and_names_can_be_listed() {
        assert_eq!(Driver::TAGS, ["raw", "null-co", "blk-quorum", "void"]);
        assert_eq!((Driver::TAG, Driver::Void.tag()), ("driver", "void"));
        assert_eq!(Discard::NAMES, ["ignore", "unmap"]);
        assert_eq!(Discard::from_name("unmap").map(Discard::name), Some("unmap"));
    }

    #[test]
    fn qmp_12_unknown_members_are_refused_where_they_stand() {
        assert_eq!(refused(json!({ "driver": "void", "x": 1 })), "Parameter 'x' is unexpected");
        assert_eq!(refused(json!({ "driver": "void", "cache": { "x": 1 } })), "Parameter 'cache.x' is unexpected");
        let inner = json!({ "driver": "raw", "file": { "driver": "raw", "file": { "driver": "void", "y": 1 } } });
        assert_eq!(refused(inner), "Parameter 'file.file.y' is unexpected");
        assert_eq!(refused(json!({ "driver": "void", "file": "a" })), "Parameter 'file' is unexpected");
    }

    #[test]
    fn errors_name_the_place_and_what_belongs_there() {
        let cases = [
            (json!({}), "Parameter 'driver' is missing"),
            (json!({ "driver": "foo" }), "Parameter 'driver' does not accept value 'foo'"),
            (json!({ "driver": 1 }), "Invalid parameter type for 'driver', expected: string"),
            (json!({ "driver": "raw" }), "Parameter 'file' is missing"),
            (json!({ "driver": "raw", "file": {} }), "Parameter 'file.driver' is missing"),
            (json!({ "driver": "raw", "file": null }), "Invalid parameter type for 'file', expected: BlockdevRef"),
            (
                json!({ "driver": "raw", "file": "x", "backing": 1 }),
                "Invalid parameter type for 'backing', expected: BlockdevRefOrNull",
            ),
            (
                json!({ "driver": "blk-quorum", "children": {} }),
                "Invalid parameter type for 'children', expected: array",
            ),
            (
                json!({ "driver": "blk-quorum", "children": ["a", 1] }),
                "Invalid parameter type for 'children[1]', expected: BlockdevRef",
            ),
            (
                json!({ "driver": "blk-quorum", "children": [{ "driver": "raw" }] }),
                "Parameter 'children[0].file' is missing",
            ),
            (
                json!({ "driver": "void", "read-only": "on" }),
                "Invalid parameter type for 'read-only', expected: boolean",
            ),
            (
                json!({ "driver": "void", "node-name": null }),
                "Invalid parameter type for 'node-name', expected: string",
            ),
            (json!({ "driver": "void", "cache": 5 }), "Invalid parameter type for 'cache', expected: object"),
            (json!({ "driver": "void", "discard": "x" }), "Parameter 'discard' does not accept value 'x'"),
            (json!([]), "Invalid parameter type for 'arguments', expected: object"),
        ];
        for (value, error) in cases {
            assert_eq!(refused(value.clone()), error, "{value}");
        }
    }

    #[test]
    fn qmp_08_a_nul_in_a_name_is_refused() {
        let error = "Parameter 'node-name' must not contain a NUL character";
        assert_eq!(refused(json!({ "driver": "void", "node-name": "a\0b" })), error);
    }

    #[test]
    fn qmp_15_a_number_that_does_not_fit_is_refused() {
        let null = |name: &str, value: Value| refused(json!({ "driver": "null-co", name: value }));
        let huge = crate::wire::parse_text("18446744073709551616").unwrap();
        for value in [json!(1.5), json!(u64::MAX), huge.clone(), json!("1"), json!(1.0)] {
            assert_eq!(null("size", value), "Invalid parameter type for 'size', expected: integer");
        }
        for value in [json!(-1), json!(1.5), huge.clone(), json!("1")] {
            assert_eq!(null("latency-ns", value), "Parameter 'latency-ns' expects uint64");
        }
        for value in [json!(-1), json!(65536)] {
            assert_eq!(null("type", value), "Parameter 'type' expects uint16_t");
        }
        assert_eq!(null("type", json!("x")), "Parameter 'type' expects uint64");
        for value in [json!(-1), json!(1.5), huge] {
            assert_eq!(
                refused(json!({ "driver": "raw", "file": "x", "size": value })),
                "Parameter 'size' expects uint64"
            );
        }
    }

    #[test]
    fn inline_nesting_ends_at_64() {
        let nested = |levels: usize| {
            let inner = json!({ "driver": "void" });
            (1..levels).fold(inner, |file, _| json!({ "driver": "raw", "file": file }))
        };
        assert_eq!(read(nested(MAX_INLINE_DEPTH)).driver.tag(), "raw");
        let error = refused(nested(MAX_INLINE_DEPTH + 1));
        assert!(error.ends_with("is nested deeper than 64 levels"), "{error}");
        assert!(refused(nested(1000)).ends_with("is nested deeper than 64 levels"));
    }

    #[test]
    fn on_the_command_line_scalars_are_words() {
        let words = json!({
            "driver": "raw", "read-only": "on", "offset": "-0x10", "size": "1.5k", "backing": "",
            "file": { "driver": "null-co", "size": "010", "latency-ns": "7", "any": "x" },
        });
        let options: NodeOptions = from_keyval(words).unwrap();
        assert!(options.common.read_only);
        let Driver::Raw(raw) = options.driver else { panic!() };
        assert_eq!((raw.offset, raw.size), (Some(-16), Some(Size(1536))));
        assert_eq!(raw.backing, Some(NodeRefOrNull::Reference(String::new())));
        let NodeRef::Definition(file) = raw.file else { panic!() };
        let expected = Null { size: 8, latency_ns: 7, r#type: None, any: Some("x".into()) };
        assert_eq!(file.driver, Driver::NullCo(expected));
    }

    #[test]
    fn words_that_do_not_fit_are_refused() {
        let null = |name: &str, value: &str| refused_words(json!({ "driver": "null-co", name: value }));
        assert_eq!(null("size", "1k"), "Parameter 'size' expects integer");
        assert_eq!(null("size", "99999999999999999999"), "Parameter 'size' expects integer");
        assert_eq!(null("latency-ns", "abc"), "Parameter 'latency-ns' expects integer");
        assert_eq!(null("latency-ns", "-1"), "Parameter 'latency-ns' expects uint64");
        assert_eq!(null("type", "65536"), "Parameter 'type' expects uint16_t");
        assert_eq!(null("read-only", "1"), "Parameter 'read-only' expects 'on' or 'off'");
        assert_eq!(null("cache", "x"), "Invalid parameter type for 'cache', expected: object");
        let raw = |size: &str| refused_words(json!({ "driver": "raw", "file": "x", "size": size }));
        assert_eq!(raw("zz"), "Parameter 'size' expects size");
        assert_eq!(raw("-1"), "Parameter 'size' expects size");
    }

    #[test]
    fn an_alternate_without_strings_reads_words() {
        assert_eq!(from_keyval::<Switch>(json!("off")).unwrap(), Switch::Flag(false));
        assert_eq!(from_keyval::<Switch>(json!(["1"])).unwrap(), Switch::List(vec![1]));
        let json = from_value::<Switch>(json!("off")).unwrap_err().desc;
        assert_eq!(json, "Invalid parameter type for 'arguments', expected: Switch");
    }
}
