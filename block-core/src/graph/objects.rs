//! Things that operators make and that nodes refer to by id: throttle groups, and later secrets. A driver looks one up
//! while it is opened or reopened, and holds it; requests never come here.

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

/// All of them, by id. Lives on the control thread.
#[derive(Default)]
pub struct Objects(RefCell<HashMap<String, Arc<dyn Any + Send + Sync>>>);

impl Objects {
    /// Offers an object to nodes. An older one of the same id is forgotten; whoever holds it keeps it.
    pub fn insert<T: Any + Send + Sync>(&self, id: &str, object: Arc<T>) {
        self.0.borrow_mut().insert(id.to_owned(), object);
    }

    /// The object of this id, if there is one of this kind.
    pub fn find<T: Any + Send + Sync>(&self, id: &str) -> Option<Arc<T>> {
        self.0.borrow().get(id)?.clone().downcast().ok()
    }

    /// Offers it no more.
    pub fn remove(&self, id: &str) {
        self.0.borrow_mut().remove(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_of_another_kind_is_not_found() {
        let objects = Objects::default();
        objects.insert("a", Arc::new(7_u8));
        assert_eq!(objects.find::<u8>("a").as_deref(), Some(&7));
        assert!(objects.find::<u16>("a").is_none() && objects.find::<u8>("b").is_none());
        objects.remove("a");
        assert!(objects.find::<u8>("a").is_none());
    }
}
