//! The object tree as far as clients look at it: `/objects/ID` and `/chardevs/ID`, and the types behind them.
//!
//! A path is found as QEMU finds it: from the root, or by its last parts where only one place has them.

use std::rc::Rc;

use qmp::schema::{Empty, Value};
use qmp::{Error, ErrorClass, Qapi, Result};

use super::Table;
use crate::control::Chardev;
use crate::daemon::Daemon;
use crate::object::Object;

pub(super) fn register(table: &mut Table) {
    table.add("qom-list-types", "Which types of objects there are.", qom_list_types);
    table.add("qom-list-properties", "Which properties the objects of a type have.", qom_list_properties);
    table.add("qom-list", "What lies at a place of the object tree.", qom_list);
    table.add("qom-get", "The value of a property.", qom_get);
    table.add("qom-set", "Changes a property, while the object is in use too.", qom_set);
}

/// The arguments of `qom-list-types`.
#[derive(Clone, Debug, Qapi)]
struct ListTypesArguments {
    /// Only types that descend from this one, or offer it.
    implements: Option<String>,
    /// Also types of which no object can be made.
    #[qapi(rename = "abstract", default = false)]
    with_abstract: bool,
}

/// An element of `qom-list-types`.
#[derive(Clone, Debug, Qapi)]
struct ObjectTypeInfo {
    /// The type's name.
    name: String,
    /// Present and true where no object can be made of it.
    #[qapi(rename = "abstract")]
    is_abstract: Option<bool>,
    /// What it descends from.
    parent: Option<String>,
}

/// The arguments of `qom-list-properties`.
#[derive(Clone, Debug, Qapi)]
struct ListPropertiesArguments {
    /// The type.
    typename: String,
}

/// A property.
#[derive(Clone, Debug, Qapi)]
struct ObjectPropertyInfo {
    /// Its name.
    name: String,
    /// Its type.
    #[qapi(rename = "type")]
    of: String,
}

/// The arguments of `qom-list`.
#[derive(Clone, Debug, Qapi)]
struct PathArguments {
    /// A path such as `/objects/ID`, or its last parts.
    path: String,
}

/// The arguments of `qom-get`.
#[derive(Clone, Debug, Qapi)]
struct GetArguments {
    /// A path such as `/objects/ID`, or its last parts.
    path: String,
    /// The property.
    property: String,
}

/// The arguments of `qom-set`.
#[derive(Clone, Debug, Qapi)]
struct SetArguments {
    /// A path such as `/objects/ID`, or its last parts.
    path: String,
    /// The property.
    property: String,
    /// What it becomes.
    value: Value,
}

async fn qom_list_types(_: Rc<Daemon>, arguments: ListTypesArguments) -> Result<Vec<ObjectTypeInfo>> {
    let wanted = |of: &&Type| {
        (arguments.with_abstract || !of.is_abstract)
            && arguments.implements.as_ref().is_none_or(|name| of.implements(name))
    };
    Ok(TYPES.iter().filter(wanted).map(Type::info).collect())
}

async fn qom_list_properties(_: Rc<Daemon>, arguments: ListPropertiesArguments) -> Result<Vec<ObjectPropertyInfo>> {
    let name = &arguments.typename;
    match TYPES.iter().find(|of| of.name == name) {
        Some(of) => Ok(properties(of.name)),
        None => Err(Error::new(ErrorClass::DeviceNotFound, format!("Class '{name}' not found"))),
    }
}

async fn qom_list(daemon: Rc<Daemon>, arguments: PathArguments) -> Result<Vec<ObjectPropertyInfo>> {
    let path = &arguments.path;
    let place = Place::seek(&daemon, path).map_err(|lost| match lost {
        Lost::Missing => missing(path),
        Lost::Ambiguous => Error::generic(format!("Path '{path}' is ambiguous")),
    })?;
    let children = place.children(&daemon);
    let child = |(name, child): &(String, Place)| property(name, &format!("child<{}>", child.type_name()));
    Ok(properties(place.type_name()).into_iter().chain(children.iter().map(child)).collect())
}

async fn qom_get(daemon: Rc<Daemon>, arguments: GetArguments) -> Result<Value> {
    let place = Place::find(&daemon, &arguments.path)?;
    let name = arguments.property.as_str();
    match &place {
        Place::Object(object) => object.get(name),
        Place::Chardev(chardev) if name != "type" => {
            chardev.property(name).ok_or_else(|| not_found(place.type_name(), name))
        }
        Place::Chardev(_) | Place::Container(_) if name == "type" => Ok(place.type_name().into()),
        // A child's value is where it is.
        Place::Container(container) if place.child(&daemon, name).is_some() => {
            Ok(format!("{}/{name}", container.path()).into())
        }
        Place::Chardev(_) | Place::Container(_) => Err(not_found(place.type_name(), name)),
    }
}

async fn qom_set(daemon: Rc<Daemon>, arguments: SetArguments) -> Result<Empty> {
    let SetArguments { path, property, value } = arguments;
    let place = Place::find(&daemon, &path)?;
    if let Place::Object(object) = &place {
        return object.set(&property, value).map(|()| Empty {});
    }
    let of = place.type_name();
    let is_known =
        properties(of).iter().any(|known| known.name == property) || place.child(&daemon, &property).is_some();
    if !is_known {
        return Err(not_found(of, &property));
    }
    Err(Error::generic(format!("Property '{of}.{property}' is not writable")))
}

/// A place in the tree.
#[derive(Clone)]
enum Place {
    Container(Container),
    Object(Object),
    Chardev(Rc<Chardev>),
}

/// A place that has others below it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Container {
    Root,
    /// Nothing is ever in it.
    Backend,
    Objects,
    Chardevs,
}

impl Container {
    /// Its path, without the slash of the root.
    fn path(self) -> &'static str {
        match self {
            Self::Root => "",
            Self::Backend => "/backend",
            Self::Objects => "/objects",
            Self::Chardevs => "/chardevs",
        }
    }
}

impl Place {
    /// The place of a path, or the refusal of commands for one property.
    fn find(daemon: &Daemon, path: &str) -> Result<Self> {
        Self::seek(daemon, path).map_err(|_| missing(path))
    }

    /// The place of a path from the root, or of the last parts of one path only. Empty parts say nothing.
    fn seek(daemon: &Daemon, path: &str) -> Result<Self, Lost> {
        let root = Self::Container(Container::Root);
        if path.is_empty() {
            return Err(Lost::Ambiguous);
        }
        if path.starts_with('/') {
            return root.below(daemon, path).ok_or(Lost::Missing);
        }
        let starts = std::iter::once(root.clone()).chain(root.children(daemon).into_iter().map(|(_, child)| child));
        let mut found = starts.filter_map(|start| start.below(daemon, path));
        let first = found.next().ok_or(Lost::Missing)?;
        if found.next().is_some() { Err(Lost::Ambiguous) } else { Ok(first) }
    }

    fn below(&self, daemon: &Daemon, path: &str) -> Option<Self> {
        let mut parts = path.split('/').filter(|part| !part.is_empty());
        parts.try_fold(self.clone(), |place, part| place.child(daemon, part))
    }

    fn child(&self, daemon: &Daemon, name: &str) -> Option<Self> {
        self.children(daemon).into_iter().find_map(|(known, child)| (known == name).then_some(child))
    }

    fn children(&self, daemon: &Daemon) -> Vec<(String, Self)> {
        let containers = [Container::Backend, Container::Objects, Container::Chardevs];
        match self {
            Self::Container(Container::Root) => containers
                .map(|container| (container.path().trim_start_matches('/').to_owned(), Self::Container(container)))
                .into(),
            Self::Container(Container::Objects) => {
                let all = daemon.objects.all().into_iter();
                all.map(|object| (object.id().to_owned(), Self::Object(object))).collect()
            }
            Self::Container(Container::Chardevs) => {
                let all = daemon.chardevs.all().into_iter();
                all.map(|chardev| (chardev.id().to_owned(), Self::Chardev(chardev))).collect()
            }
            Self::Container(Container::Backend) | Self::Object(_) | Self::Chardev(_) => Vec::new(),
        }
    }

    fn type_name(&self) -> &'static str {
        match self {
            Self::Container(_) => "container",
            Self::Object(object) => object.type_name(),
            Self::Chardev(chardev) => chardev.type_name(),
        }
    }
}

/// Why a path leads nowhere.
enum Lost {
    Missing,
    Ambiguous,
}

fn missing(path: &str) -> Error {
    Error::new(ErrorClass::DeviceNotFound, format!("Device '{path}' not found"))
}

fn not_found(of: &str, name: &str) -> Error {
    Error::generic(format!("Property '{of}.{name}' not found"))
}

/// A type that exists here.
struct Type {
    name: &'static str,
    parent: Option<&'static str>,
    is_abstract: bool,
    user_creatable: bool,
}

impl Type {
    fn implements(&self, name: &str) -> bool {
        if self.name == name || (self.user_creatable && name == "user-creatable") {
            return true;
        }
        let parent = self.parent.and_then(|parent| TYPES.iter().find(|of| of.name == parent));
        parent.is_some_and(|parent| parent.implements(name))
    }

    fn info(&self) -> ObjectTypeInfo {
        ObjectTypeInfo {
            name: self.name.to_owned(),
            is_abstract: self.is_abstract.then_some(true),
            parent: self.parent.map(str::to_owned),
        }
    }
}

fn properties(of: &str) -> Vec<ObjectPropertyInfo> {
    let own = Object::properties(of)
        .into_iter()
        .chain(Chardev::properties(of).iter().copied())
        .map(|(name, of)| property(name, of));
    std::iter::once(property("type", "string")).chain(own).collect()
}

fn property(name: &str, of: &str) -> ObjectPropertyInfo {
    ObjectPropertyInfo { name: name.to_owned(), of: of.to_owned() }
}

const fn concrete(name: &'static str, parent: &'static str, user_creatable: bool) -> Type {
    Type { name, parent: Some(parent), is_abstract: false, user_creatable }
}

const fn of_no_object(name: &'static str, parent: &'static str, user_creatable: bool) -> Type {
    Type { name, parent: Some(parent), is_abstract: true, user_creatable }
}

const TYPES: &[Type] = &[
    Type { name: "object", parent: None, is_abstract: true, user_creatable: false },
    concrete("container", "object", false),
    of_no_object("event-loop-base", "object", true),
    concrete("iothread", "event-loop-base", true),
    of_no_object("secret_common", "object", true),
    concrete("secret", "secret_common", true),
    concrete("secret_keyring", "secret_common", true),
    concrete("throttle-group", "object", true),
    of_no_object("chardev", "object", false),
    of_no_object("chardev-fd", "chardev", false),
    concrete("chardev-socket", "chardev", false),
    concrete("chardev-null", "chardev", false),
    concrete("chardev-stdio", "chardev-fd", false),
];
