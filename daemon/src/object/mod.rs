//! User-made objects (`object-add`) and what can be seen and changed of them (`qom-*` commands use this).

mod iothread;

use std::cell::RefCell;
use std::rc::Rc;

use qmp::schema::{Qapi, Value};
use qmp::{Error, Result};

pub use iothread::{IoThreadObject, IoThreadOptions};

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
}

/// All objects, in the order in which they were made.
#[derive(Default)]
pub struct Objects(RefCell<Vec<Rc<IoThreadObject>>>);

impl Objects {
    /// Makes an object.
    pub fn add(&self, options: ObjectOptions) -> Result<()> {
        let ObjectOptions { id, kind: ObjectKind::Iothread(options) } = options;
        if !crate::is_identifier(&id) {
            return Err(Error::generic("Parameter 'id' expects an identifier"));
        }
        if self.find(&id).is_some() {
            let desc = format!("attempt to add duplicate property '{id}' to object (type 'container')");
            return Err(Error::generic(desc));
        }
        let object = IoThreadObject::start(id, options)?;
        self.0.borrow_mut().push(Rc::new(object));
        Ok(())
    }

    /// Ends an object, unless somebody uses it.
    pub fn remove(&self, id: &str) -> Result<()> {
        let mut objects = self.0.borrow_mut();
        let at = objects.iter().position(|object| object.id() == id);
        let at = at.ok_or_else(|| Error::generic(format!("object '{id}' not found")))?;
        // Whoever uses an object holds it.
        if Rc::strong_count(&objects[at]) > 1 {
            return Err(Error::generic(format!("object '{id}' is in use, can not be deleted")));
        }
        objects.remove(at);
        Ok(())
    }

    /// The IOThread of this id. It cannot be removed while the answer is kept.
    pub fn find(&self, id: &str) -> Option<Rc<IoThreadObject>> {
        self.0.borrow().iter().find(|object| object.id() == id).cloned()
    }

    /// The ids, in order.
    pub fn ids(&self) -> Vec<String> {
        self.0.borrow().iter().map(|object| object.id().to_owned()).collect()
    }

    /// Ends all objects that nobody uses.
    pub fn clear(&self) {
        self.0.borrow_mut().retain(|object| Rc::strong_count(object) > 1);
    }
}

/// A property's value as a client wrote it.
pub(crate) fn property<T: Qapi>(name: &str, value: Value) -> Result<T> {
    let root = qmp::schema::At::root(qmp::schema::Mode::Json);
    T::parse(value, &root.member(name))
}
