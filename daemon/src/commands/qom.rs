//! The object tree as far as clients look at it: `/objects/ID` and `/chardevs/ID`, and the types behind them.

use std::rc::Rc;

use qmp::schema::{Empty, Value};
use qmp::{Error, ErrorClass, Qapi, Result};

use super::Table;
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
    /// `/objects/ID`, or the id alone.
    path: String,
}

/// The arguments of `qom-get`.
#[derive(Clone, Debug, Qapi)]
struct GetArguments {
    /// `/objects/ID`, or the id alone.
    path: String,
    /// The property.
    property: String,
}

/// The arguments of `qom-set`.
#[derive(Clone, Debug, Qapi)]
struct SetArguments {
    /// `/objects/ID`, or the id alone.
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
    let child = |of: &'static str| move |name: &str| property(name, &format!("child<{of}>"));
    let mut list = properties("container");
    match Place::find(&daemon, &arguments.path)? {
        Place::Root => list.extend(["objects", "chardevs"].map(child("container"))),
        Place::Objects => {
            list.extend(daemon.objects.all().iter().map(|object| child(object.type_name())(object.id())));
        }
        Place::Chardevs => {
            list.extend(daemon.chardevs.report().iter().map(|info| child("chardev")(&info.label)));
        }
        Place::Object(object) => return Ok(properties(object.type_name())),
    }
    Ok(list)
}

async fn qom_get(daemon: Rc<Daemon>, arguments: GetArguments) -> Result<Value> {
    match (Place::find(&daemon, &arguments.path)?, arguments.property.as_str()) {
        (Place::Object(object), name) => object.get(name),
        (Place::Root | Place::Objects | Place::Chardevs, "type") => Ok("container".into()),
        (_, name) => Err(Error::generic(format!("Property 'container.{name}' not found"))),
    }
}

async fn qom_set(daemon: Rc<Daemon>, arguments: SetArguments) -> Result<Empty> {
    let SetArguments { path, property, value } = arguments;
    match Place::find(&daemon, &path)? {
        Place::Object(object) => object.set(&property, value).map(|()| Empty {}),
        Place::Root | Place::Objects | Place::Chardevs => {
            Err(Error::generic(format!("Property 'container.{property}' is not writable")))
        }
    }
}

/// A place in the tree.
enum Place {
    Root,
    Objects,
    Chardevs,
    Object(Object),
}

impl Place {
    fn find(daemon: &Daemon, path: &str) -> Result<Self> {
        let missing = || Error::new(ErrorClass::DeviceNotFound, format!("Device '{path}' not found"));
        match path {
            "/" => Ok(Self::Root),
            "/objects" | "objects" => Ok(Self::Objects),
            "/chardevs" | "chardevs" => Ok(Self::Chardevs),
            _ => {
                let id = path.strip_prefix("/objects/").unwrap_or(path);
                daemon.objects.find(id).map(Self::Object).ok_or_else(missing)
            }
        }
    }
}

/// A type that exists here.
struct Type {
    name: &'static str,
    parent: &'static str,
    is_abstract: bool,
    user_creatable: bool,
}

impl Type {
    fn implements(&self, name: &str) -> bool {
        if self.name == name || (self.user_creatable && name == "user-creatable") {
            return true;
        }
        match TYPES.iter().find(|of| of.name == self.parent) {
            Some(parent) => parent.implements(name),
            None => self.parent == name,
        }
    }

    fn info(&self) -> ObjectTypeInfo {
        ObjectTypeInfo {
            name: self.name.to_owned(),
            is_abstract: self.is_abstract.then_some(true),
            parent: Some(self.parent.to_owned()),
        }
    }
}

fn properties(of: &str) -> Vec<ObjectPropertyInfo> {
    let own = Object::properties(of).into_iter().map(|(name, of)| property(name, of));
    std::iter::once(property("type", "string")).chain(own).collect()
}

fn property(name: &str, of: &str) -> ObjectPropertyInfo {
    ObjectPropertyInfo { name: name.to_owned(), of: of.to_owned() }
}

const TYPES: &[Type] = &[
    Type { name: "container", parent: "object", is_abstract: false, user_creatable: false },
    Type { name: "event-loop-base", parent: "object", is_abstract: true, user_creatable: false },
    Type { name: "iothread", parent: "event-loop-base", is_abstract: false, user_creatable: true },
    Type { name: "secret_common", parent: "object", is_abstract: true, user_creatable: false },
    Type { name: "secret", parent: "secret_common", is_abstract: false, user_creatable: true },
    Type { name: "secret_keyring", parent: "secret_common", is_abstract: false, user_creatable: true },
    Type { name: "throttle-group", parent: "object", is_abstract: false, user_creatable: true },
    Type { name: "chardev", parent: "object", is_abstract: true, user_creatable: false },
    Type { name: "chardev-socket", parent: "chardev", is_abstract: false, user_creatable: false },
    Type { name: "chardev-null", parent: "chardev", is_abstract: false, user_creatable: false },
];
