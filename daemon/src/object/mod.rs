//! User-made objects (`object-add`) and what can be seen and changed of them (`qom-*` commands use this).

mod iothread;
mod secret;
mod throttle_group;

use std::cell::RefCell;
use std::rc::Rc;

use block_core::catalog::{SecretKeyringOptions, SecretOptions, is_identifier};
use block_core::drivers::filter::throttle::ThrottleGroupOptions;
use block_core::graph::Graph;
use qmp::schema::{Qapi, Value};
use qmp::{Error, Result};

pub use iothread::{IoThreadObject, IoThreadOptions};
pub use secret::SecretObject;
pub use throttle_group::ThrottleGroupObject;

/// The argument of `object-add` and `--object`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct ObjectOptions {
    /// The object's name: a letter, then letters, digits, `-`, `.` and `_`.
    pub id: String,
    /// What it is.
    #[qapi(flatten)]
    pub kind: ObjectKind,
}

/// What an object is.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(union, tag = "qom-type", tag_name = "ObjectType")]
pub enum ObjectKind {
    /// A thread that serves queues of exports.
    Iothread(IoThreadOptions),
    /// A passphrase or a key, given or in a file.
    Secret(SecretOptions),
    /// A passphrase or a key that the kernel keeps.
    #[qapi(rename = "secret_keyring")]
    SecretKeyring(SecretKeyringOptions),
    /// Limits that nodes share.
    ThrottleGroup(Box<ThrottleGroupOptions>),
}

/// An object that was made.
#[derive(Clone)]
pub enum Object {
    /// A thread.
    IoThread(Rc<IoThreadObject>),
    /// A passphrase or a key.
    Secret(Rc<SecretObject>),
    /// Limits.
    ThrottleGroup(Rc<ThrottleGroupObject>),
}

impl Object {
    /// The object's id.
    pub fn id(&self) -> &str {
        match self {
            Self::IoThread(thread) => thread.id(),
            Self::Secret(secret) => secret.id(),
            Self::ThrottleGroup(group) => group.id(),
        }
    }

    /// The name of its type.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::IoThread(_) => "iothread",
            Self::Secret(secret) => secret.type_name(),
            Self::ThrottleGroup(_) => "throttle-group",
        }
    }

    /// A property's value.
    pub fn get(&self, name: &str) -> Result<Value> {
        match self {
            Self::IoThread(thread) => thread.get(name),
            Self::Secret(secret) => secret.get(name),
            Self::ThrottleGroup(group) => group.get(name),
        }
    }

    /// Changes a property; it is in force at once.
    pub fn set(&self, name: &str, value: Value) -> Result<()> {
        match self {
            Self::IoThread(thread) => thread.set(name, value),
            Self::Secret(secret) => secret.set(name),
            Self::ThrottleGroup(group) => group.set(name, value),
        }
    }

    /// Whoever uses a thread holds the object; whoever uses a group holds the group; whoever uses a secret has done so.
    fn is_used(&self) -> bool {
        match self {
            Self::IoThread(thread) => Rc::strong_count(thread) > 1,
            Self::Secret(_) => false,
            Self::ThrottleGroup(group) => group.is_used(),
        }
    }

    /// The properties of the objects of a type, with their types, besides `type`.
    pub fn properties(type_name: &str) -> Vec<(&'static str, &'static str)> {
        match type_name {
            "iothread" => IoThreadOptions::properties(),
            "event-loop-base" => IoThreadOptions::base_properties(),
            "secret_common" | "secret" | "secret_keyring" => SecretObject::properties(type_name),
            "throttle-group" => ThrottleGroupObject::properties(),
            _ => Vec::new(),
        }
    }
}

/// All objects, in the order in which they were made.
pub struct Objects {
    graph: Rc<Graph>,
    all: RefCell<Vec<Object>>,
}

impl Objects {
    /// None yet. Nodes of `graph` find those that are for nodes.
    pub fn new(graph: Rc<Graph>) -> Self {
        Self { graph, all: RefCell::default() }
    }

    /// Makes an object.
    pub async fn add(&self, options: ObjectOptions) -> Result<()> {
        let ObjectOptions { id, kind } = options;
        if !is_identifier(&id) {
            return Err(Error::generic("Parameter 'id' expects an identifier"));
        }
        self.check_free(&id)?;
        let object = match kind {
            ObjectKind::Iothread(options) => Object::IoThread(Rc::new(IoThreadObject::start(id, options)?)),
            ObjectKind::Secret(options) => {
                Object::Secret(Rc::new(SecretObject::read(&self.graph, id, options, |id| self.check_free(id)).await?))
            }
            ObjectKind::SecretKeyring(options) => {
                Object::Secret(Rc::new(SecretObject::fetch(&self.graph, id, options, |id| self.check_free(id)).await?))
            }
            ObjectKind::ThrottleGroup(options) => {
                Object::ThrottleGroup(Rc::new(ThrottleGroupObject::offer(&self.graph, id, *options)?))
            }
        };
        self.all.borrow_mut().push(object);
        Ok(())
    }

    fn check_free(&self, id: &str) -> Result<()> {
        match self.find(id) {
            None => Ok(()),
            Some(_) => {
                let desc = format!("attempt to add duplicate property '{id}' to object (type 'container')");
                Err(Error::generic(desc))
            }
        }
    }

    /// Ends an object, unless somebody uses it.
    pub fn remove(&self, id: &str) -> Result<()> {
        let mut all = self.all.borrow_mut();
        let at = all.iter().position(|object| object.id() == id);
        let at = at.ok_or_else(|| Error::generic(format!("object '{id}' not found")))?;
        if all[at].is_used() {
            return Err(Error::generic(format!("object '{id}' is in use, can not be deleted")));
        }
        all.remove(at);
        Ok(())
    }

    /// The object of this id.
    pub fn find(&self, id: &str) -> Option<Object> {
        self.all.borrow().iter().find(|object| object.id() == id).cloned()
    }

    /// The IOThread of this id. It cannot be removed while the answer is kept.
    pub fn iothread(&self, id: &str) -> Option<Rc<IoThreadObject>> {
        match self.find(id)? {
            Object::IoThread(thread) => Some(thread),
            Object::Secret(_) | Object::ThrottleGroup(_) => None,
        }
    }

    /// All of them, in order.
    pub fn all(&self) -> Vec<Object> {
        self.all.borrow().clone()
    }

    /// Ends all objects that nobody uses.
    pub fn clear(&self) {
        self.all.borrow_mut().retain(Object::is_used);
    }
}

/// A property's value as a client wrote it.
pub(crate) fn property<T: Qapi>(name: &str, value: Value) -> Result<T> {
    let root = qmp::schema::At::root(qmp::schema::Mode::Json);
    T::parse(value, &root.member(name))
}

fn not_found(type_name: &str, name: &str) -> Error {
    Error::generic(format!("Property '{type_name}.{name}' not found"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use qmp::keyval::parse_option;

    use super::*;

    pub(super) fn objects() -> Objects {
        Objects::new(Graph::new(Arc::new(|_| ())))
    }

    /// What does not wait for anything.
    pub(super) fn at_once<T>(work: impl Future<Output = T>) -> T {
        let poll = std::pin::pin!(work).poll(&mut std::task::Context::from_waker(std::task::Waker::noop()));
        assert!(poll.is_ready(), "it waits for something");
        match poll {
            std::task::Poll::Ready(value) => value,
            std::task::Poll::Pending => unreachable!("it is ready"),
        }
    }

    pub(super) fn read(text: &str) -> Result<ObjectOptions> {
        parse_option(text, Some("qom-type"))?.into_typed()
    }
}
