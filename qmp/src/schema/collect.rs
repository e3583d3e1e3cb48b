//! Gathers types, commands and events, and lists them as `query-qmp-schema` shows them.
//!
//! Type names are masked as numbers there, in the order of first use: they are no part of the language.

use std::any::TypeId;
use std::collections::HashMap;

use serde_json::json;

use super::{Map, Object, Qapi, TagType, Value};

/// All types that a set of commands and events uses.
#[derive(Debug, Default)]
pub struct Collector {
    by_type: HashMap<TypeId, TypeRef>,
    /// `None` while a type is being defined, which is when it may be met again inside itself.
    types: Vec<Option<Definition>>,
    entries: Vec<Entry>,
}

/// A collected type: its number in the listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TypeRef(usize);

/// The JSON type of a value, or `Any`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `{…}`
    Object,
    /// `[…]`
    Array,
    /// `"…"`, enums included
    String,
    /// A whole number.
    Int,
    /// Any number.
    Number,
    /// `true` or `false`
    Bool,
    /// `null`
    Null,
    /// Whatever there is.
    Any,
}

/// What a type is.
#[derive(Clone, Debug)]
pub enum Definition {
    /// A type that QMP brings with it.
    Builtin {
        /// Which one.
        kind: Kind,
    },
    /// A list.
    Array {
        /// Of what.
        element: TypeRef,
    },
    /// One of some names.
    Enum {
        /// Its name in errors and in the manual.
        name: &'static str,
        /// Its doc comment.
        doc: &'static str,
        /// Its names.
        values: Vec<EnumValue>,
    },
    /// An object or a flat union.
    Object {
        /// Its name in errors and in the manual.
        name: &'static str,
        /// Its doc comment.
        doc: &'static str,
        /// What it is made of.
        shape: Shape,
        /// Feature names that clients look for.
        features: &'static [&'static str],
    },
    /// One of some types, told apart by JSON type.
    Alternate {
        /// Its name in errors and in the manual.
        name: &'static str,
        /// Its doc comment.
        doc: &'static str,
        /// Its types.
        branches: Vec<TypeRef>,
    },
}

/// One name of an enum.
#[derive(Clone, Debug)]
pub struct EnumValue {
    /// The name on the wire.
    pub name: &'static str,
    /// The variant's doc comment.
    pub doc: &'static str,
    /// Feature names that clients look for.
    pub features: &'static [&'static str],
}

/// The members of an object, and the branches if it is a union.
#[derive(Clone, Debug, Default)]
pub struct Shape {
    /// In the order of the struct's fields; a tag stands first.
    pub members: Vec<Member>,
    /// The tag's name and the branches.
    pub union: Option<(&'static str, Vec<Variant>)>,
}

/// A member of an object.
#[derive(Clone, Debug)]
pub struct Member {
    /// The name on the wire.
    pub name: &'static str,
    /// What it holds.
    pub of: TypeRef,
    /// Whether it may be absent.
    pub optional: bool,
    /// What its absence means, where that is a value.
    pub default: Option<Value>,
    /// The field's doc comment.
    pub doc: &'static str,
    /// Feature names that clients look for.
    pub features: &'static [&'static str],
}

/// A branch of a union.
#[derive(Clone, Debug)]
pub struct Variant {
    /// The tag's value.
    pub case: &'static str,
    /// The object whose members then stand beside the tag.
    pub of: TypeRef,
}

#[derive(Debug)]
enum Entry {
    Command(Command),
    Event { name: &'static str, data: TypeRef, features: &'static [&'static str] },
}

/// A listed command.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    /// The name on the wire.
    pub name: &'static str,
    /// What it does, for people.
    pub doc: &'static str,
    /// What it takes.
    pub arguments: TypeRef,
    /// What it answers.
    pub returns: TypeRef,
    /// Feature names that clients look for.
    pub features: &'static [&'static str],
}

impl Collector {
    /// A collector without types.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lists a command and all types that it uses; `doc` says to people what it does.
    pub fn command<A: Qapi, R: Qapi>(
        &mut self,
        name: &'static str,
        doc: &'static str,
        features: &'static [&'static str],
    ) {
        let arguments = A::type_ref(self);
        let returns = R::type_ref(self);
        self.entries.push(Entry::Command(Command { name, doc, arguments, returns, features }));
    }

    /// Lists an event and all types that it uses.
    pub fn event<D: Qapi>(&mut self, name: &'static str, features: &'static [&'static str]) {
        let data = D::type_ref(self);
        self.entries.push(Entry::Event { name, data, features });
    }

    /// The names of all listed commands, in the order of listing.
    pub fn command_names(&self) -> impl Iterator<Item = &'static str> {
        self.commands().map(|command| command.name)
    }

    /// All listed commands, as the manual wants them.
    pub fn commands(&self) -> impl Iterator<Item = &Command> {
        self.entries.iter().filter_map(|entry| match entry {
            Entry::Command(command) => Some(command),
            Entry::Event { .. } => None,
        })
    }

    /// All listed events with their data.
    pub fn events(&self) -> impl Iterator<Item = (&'static str, TypeRef)> {
        self.entries.iter().filter_map(|entry| match entry {
            Entry::Event { name, data, .. } => Some((*name, *data)),
            Entry::Command(_) => None,
        })
    }

    /// All types that were met.
    pub fn types(&self) -> impl Iterator<Item = TypeRef> {
        (0..self.types.len()).map(TypeRef)
    }

    /// The number of `T`, which is defined when it is met first.
    pub fn add<T: Qapi>(&mut self) -> TypeRef {
        self.define_once(TypeId::of::<T>(), T::define)
    }

    /// The number of the list of `T`; types that clients cannot tell apart share one list.
    pub(super) fn array<T: Qapi>(&mut self) -> TypeRef {
        let element = T::type_ref(self);
        let known =
            self.types.iter().position(|t| matches!(t, Some(Definition::Array { element: e }) if *e == element));
        known.map_or_else(|| self.add::<Vec<T>>(), TypeRef)
    }

    /// The number of the type of a union's tag.
    pub fn tag_type<T: TagType>(&mut self) -> TypeRef {
        self.define_once(TypeId::of::<T>(), |_| T::define())
    }

    fn define_once(&mut self, id: TypeId, define: fn(&mut Self) -> Definition) -> TypeRef {
        if let Some(known) = self.by_type.get(&id) {
            return *known;
        }
        let new = TypeRef(self.types.len());
        self.types.push(None);
        self.by_type.insert(id, new);
        self.types[new.0] = Some(define(self));
        new
    }

    /// What a collected type is.
    ///
    /// # Panics
    /// While `of` is still being defined: ask after collecting.
    pub fn definition(&self, of: TypeRef) -> &Definition {
        self.types[of.0].as_ref().expect("a type is asked for once its definition is complete")
    }

    /// The name of a type for people: `str`, `[BlockdevRef]`.
    pub fn type_name(&self, of: TypeRef) -> String {
        match self.definition(of) {
            Definition::Builtin { kind } => kind.builtin_name().to_owned(),
            Definition::Array { element } => format!("[{}]", self.type_name(*element)),
            Definition::Enum { name, .. } | Definition::Object { name, .. } | Definition::Alternate { name, .. } => {
                (*name).to_owned()
            }
        }
    }

    /// The answer of `query-qmp-schema`: commands and events in the order of listing, then the types.
    pub fn schema(&self) -> Value {
        let entries = self.entries.iter().map(|entry| self.entry_info(entry));
        let types = self.types().map(|of| self.type_info(of));
        entries.chain(types).collect()
    }

    fn entry_info(&self, entry: &Entry) -> Value {
        let (info, features) = match entry {
            Entry::Command(Command { name, arguments, returns, features, .. }) => (
                json!({ "name": name, "ret-type": self.masked(*returns), "meta-type": "command", "arg-type": self.masked(*arguments) }),
                features,
            ),
            Entry::Event { name, data, features } => {
                (json!({ "name": name, "meta-type": "event", "arg-type": self.masked(*data) }), features)
            }
        };
        with_features(info, features)
    }

    fn type_info(&self, of: TypeRef) -> Value {
        let name = self.masked(of);
        match self.definition(of) {
            Definition::Builtin { kind } => {
                json!({ "name": name, "json-type": kind.json_type(), "meta-type": "builtin" })
            }
            Definition::Array { element } => {
                json!({ "name": name, "element-type": self.masked(*element), "meta-type": "array" })
            }
            Definition::Enum { values, .. } => {
                let members: Value =
                    values.iter().map(|v| with_features(json!({ "name": v.name }), v.features)).collect();
                let names: Value = values.iter().map(|v| Value::from(v.name)).collect();
                json!({ "name": name, "members": members, "meta-type": "enum", "values": names })
            }
            Definition::Alternate { branches, .. } => {
                let members: Value = branches.iter().map(|branch| json!({ "type": self.masked(*branch) })).collect();
                json!({ "name": name, "members": members, "meta-type": "alternate" })
            }
            Definition::Object { shape, features, .. } => with_features(self.object_info(&name, shape), features),
        }
    }

    fn object_info(&self, name: &str, shape: &Shape) -> Value {
        let members: Value = shape.members.iter().map(|member| self.member_info(member)).collect();
        let Some((tag, variants)) = &shape.union else {
            return json!({ "name": name, "members": members, "meta-type": "object" });
        };
        let variants: Value = variants.iter().map(|v| json!({ "case": v.case, "type": self.masked(v.of) })).collect();
        json!({ "name": name, "tag": tag, "variants": variants, "members": members, "meta-type": "object" })
    }

    /// A `default` of null is all that the listing says of an optional member; the value is for the manual.
    fn member_info(&self, member: &Member) -> Value {
        let mut info = Map::new();
        info.insert("name".to_owned(), member.name.into());
        if member.optional {
            info.insert("default".to_owned(), Value::Null);
        }
        info.insert("type".to_owned(), self.masked(member.of).into());
        with_features(Value::Object(info), member.features)
    }

    fn masked(&self, of: TypeRef) -> String {
        match self.definition(of) {
            Definition::Builtin { kind } => kind.builtin_name().to_owned(),
            Definition::Array { element } => format!("[{}]", self.masked(*element)),
            Definition::Enum { .. } | Definition::Object { .. } | Definition::Alternate { .. } => of.0.to_string(),
        }
    }
}

fn with_features(mut info: Value, features: &[&str]) -> Value {
    if !features.is_empty() {
        info["features"] = features.iter().map(|feature| Value::from(*feature)).collect();
    }
    info
}

impl Definition {
    /// A type that QMP brings with it.
    pub fn builtin(kind: Kind) -> Self {
        Self::Builtin { kind }
    }

    /// An object or union of `T`'s members.
    pub fn object<T: Object>(
        collector: &mut Collector,
        name: &'static str,
        doc: &'static str,
        features: &'static [&'static str],
    ) -> Self {
        let mut shape = Shape::default();
        T::shape(collector, &mut shape);
        Self::Object { name, doc, shape, features }
    }
}

impl Shape {
    /// Makes this object a union: the member `tag`, of the type `of`, picks one of `variants`.
    ///
    /// # Panics
    /// If it is one already: QAPI knows one tag an object.
    pub fn set_union(&mut self, tag: &'static str, of: TypeRef, variants: Vec<Variant>) {
        assert!(self.union.is_none(), "an object has one tag, and '{tag}' would be a second");
        self.union = Some((tag, variants));
        let doc = "Which of the branches this is.";
        self.members.insert(0, Member { name: tag, of, optional: false, default: None, doc, features: &[] });
    }
}

impl Kind {
    /// Whether a JSON value is of this kind.
    pub fn takes(self, value: &Value) -> bool {
        match self {
            Self::Object => value.is_object(),
            Self::Array => value.is_array(),
            Self::String => value.is_string(),
            Self::Int => value.is_i64() || value.is_u64(),
            Self::Number => value.is_number(),
            Self::Bool => value.is_boolean(),
            Self::Null => value.is_null(),
            Self::Any => true,
        }
    }

    /// Whether the command line writes this kind as a word other than itself.
    pub fn takes_word(self) -> bool {
        matches!(self, Self::Int | Self::Number | Self::Bool)
    }

    fn builtin_name(self) -> &'static str {
        match self {
            Self::String => "str",
            Self::Int => "int",
            Self::Number => "number",
            Self::Bool => "bool",
            Self::Null => "null",
            Self::Any => "any",
            Self::Object => "object",
            Self::Array => "array",
        }
    }

    fn json_type(self) -> &'static str {
        match self {
            Self::String => "string",
            Self::Int => "int",
            Self::Number => "number",
            Self::Bool => "boolean",
            Self::Null => "null",
            Self::Any => "value",
            Self::Object => "object",
            Self::Array => "array",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use super::super::Empty;
    use super::super::sample::{NodeOptions, Switch};
    use super::Collector;

    fn schema() -> Vec<Value> {
        let mut collector = Collector::new();
        collector.command::<NodeOptions, Empty>("blockdev-add", "Makes a node.", &[]);
        collector.command::<Vec<NodeOptions>, Vec<String>>("blockdev-reopen", "Changes nodes.", &["unstable"]);
        collector.event::<Switch>("SWITCHED", &[]);
        let Value::Array(entries) = collector.schema() else { panic!("the listing is a list") };
        entries
    }

    fn entry<'a>(schema: &'a [Value], name: &Value) -> &'a Value {
        schema.iter().find(|entry| entry["name"] == *name).unwrap()
    }

    #[test]
    fn commands_and_events_come_first() {
        let schema = schema();
        assert_eq!((&schema[0]["name"], &schema[0]["meta-type"]), (&json!("blockdev-add"), &json!("command")));
        assert_eq!(schema[1]["arg-type"], format!("[{}]", schema[0]["arg-type"].as_str().unwrap()));
        assert_eq!((&schema[1]["ret-type"], &schema[1]["features"]), (&json!("[str]"), &json!(["unstable"])));
        assert_eq!((&schema[2]["name"], &schema[2]["meta-type"]), (&json!("SWITCHED"), &json!("event")));
        assert!(schema[2].get("ret-type").is_none());
        assert_eq!(entry(&schema, &schema[0]["ret-type"])["members"], json!([]));
    }

    #[test]
    fn what_is_listed_can_be_walked_for_the_manual() {
        let mut collector = Collector::new();
        collector.command::<NodeOptions, Empty>("blockdev-add", "Makes a node.", &[]);
        collector.event::<Switch>("SWITCHED", &[]);
        assert_eq!(collector.command_names().collect::<Vec<_>>(), ["blockdev-add"]);
        let command = collector.commands().next().unwrap();
        assert_eq!(command.doc, "Makes a node.");
        let types = [command.arguments, command.returns].map(|of| collector.type_name(of));
        assert_eq!(types, ["NodeOptions", "Empty"]);
        let data = collector.events().map(|(name, data)| (name, collector.type_name(data)));
        assert_eq!(data.collect::<Vec<_>>(), [("SWITCHED", "Switch".to_owned())]);
        assert!(collector.types().any(|of| collector.type_name(of) == "[BlockdevRef]"));
    }

    #[test]
    fn a_union_lists_its_tag_its_common_members_and_its_branches() {
        let schema = schema();
        let options = entry(&schema, &schema[0]["arg-type"]);
        assert_eq!(options["tag"], "driver");
        let names = |of: &Value| of.as_array().unwrap().iter().map(|m| m["name"].clone()).collect::<Value>();
        assert_eq!(names(&options["members"]), json!(["driver", "node-name", "read-only", "discard", "cache"]));
        assert_eq!(options["members"][1], json!({ "name": "node-name", "default": null, "type": "str" }));

        let tag = entry(&schema, &options["members"][0]["type"]);
        assert_eq!(tag["values"], json!(["raw", "null-co", "blk-quorum", "void"]));
        let cases: Vec<_> = options["variants"].as_array().unwrap().iter().map(|v| v["case"].clone()).collect();
        assert_eq!(json!(cases), tag["values"]);

        let raw = entry(&schema, &options["variants"][0]["type"]);
        assert_eq!((&raw["features"], &raw["meta-type"]), (&json!(["dynamic"]), &json!("object")));
        assert_eq!(names(&raw["members"]), json!(["file", "backing", "offset", "size"]));
        let null = entry(&schema, &options["variants"][1]["type"]);
        let latency = json!({ "name": "latency-ns", "default": null, "type": "int", "features": ["unstable"] });
        assert_eq!(null["members"][1], latency);
        assert_eq!(entry(&schema, &options["variants"][3]["type"])["members"], json!([]));
    }

    #[test]
    fn a_type_that_contains_itself_is_listed_once() {
        let schema = schema();
        let options = &schema[0]["arg-type"];
        let raw = entry(&schema, &entry(&schema, options)["variants"][0]["type"]);
        let file = entry(&schema, &raw["members"][0]["type"]);
        assert_eq!(file["meta-type"], "alternate");
        assert_eq!(file["members"], json!([{ "type": options }, { "type": "str" }]));
        let backing = entry(&schema, &raw["members"][1]["type"]);
        assert_eq!(backing["members"][2], json!({ "type": "null" }));
    }

    #[test]
    fn enums_list_their_names_and_features() {
        let schema = schema();
        let discard = &entry(&schema, &schema[0]["arg-type"])["members"][3]["type"];
        let expected = json!({
            "name": discard, "meta-type": "enum", "values": ["ignore", "unmap"],
            "members": [{ "name": "ignore" }, { "name": "unmap", "features": ["unstable"] }],
        });
        assert_eq!(entry(&schema, discard), &expected);
    }

    #[test]
    fn every_type_that_is_named_is_listed_once() {
        let schema = schema();
        let listed: Vec<_> = schema.iter().map(|entry| entry["name"].as_str().unwrap()).collect();
        let unique: BTreeSet<_> = listed.iter().copied().collect();
        assert_eq!(unique.len(), listed.len());
        let parts = |entry: &Value| {
            [&entry["members"], &entry["variants"]].map(|l| l.as_array().cloned().unwrap_or_default()).concat()
        };
        let in_parts = schema.iter().flat_map(parts).filter_map(|part| Some(part.get("type")?.as_str()?.to_owned()));
        let direct = ["arg-type", "ret-type", "element-type"].into_iter();
        let direct =
            direct.flat_map(|key| schema.iter().filter_map(move |entry| Some(entry.get(key)?.as_str()?.to_owned())));
        for named in in_parts.chain(direct) {
            assert!(unique.contains(named.as_str()), "{named} is named and not listed");
        }
        let builtin = json!({ "name": "bool", "json-type": "boolean", "meta-type": "builtin" });
        assert_eq!(entry(&schema, &json!("bool")), &builtin);
    }
}
