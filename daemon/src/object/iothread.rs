//! IOThreads as objects: options that are checked, a thread, and properties that can be changed while it runs.

use std::cell::Cell;

use block_core::rt::{IoThread, PollParams, Remote};
use qmp::schema::{Qapi, Value};
use qmp::{Error, Result};

use super::{not_found, property};

/// The options of an IOThread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "IothreadProperties")]
pub struct IoThreadOptions {
    /// The longest busy wait for the next request, in nanoseconds; 0 turns busy waiting off. After a burst of requests it is
    /// up to four times as long: once for each eight of them.
    #[qapi(default = 32768)]
    pub poll_max_ns: i64,
    /// The factor by which busy waiting grows where it pays; 0 means 2.
    #[qapi(default = 0)]
    pub poll_grow: i64,
    /// The divisor by which it shrinks where it does not; 0 means that it starts anew from nothing.
    #[qapi(default = 0)]
    pub poll_shrink: i64,
    /// How many requests go to the kernel at once at most; 0 leaves it to us.
    #[qapi(default = 0)]
    pub aio_max_batch: i64,
    /// Accepted and checked, without effect: helper threads are the process's, and come and go with the work.
    #[qapi(default = 0)]
    pub thread_pool_min: i64,
    /// Accepted and checked, without effect: see `thread-pool-min`.
    #[qapi(default = 64)]
    pub thread_pool_max: i64,
}

/// A running IOThread.
pub struct IoThreadObject {
    id: String,
    options: Cell<IoThreadOptions>,
    thread: IoThread,
}

impl IoThreadOptions {
    /// The names of the properties, in the order in which they are listed.
    pub const PROPERTIES: [&'static str; 6] =
        ["thread-pool-min", "aio-max-batch", "thread-pool-max", "poll-max-ns", "poll-grow", "poll-shrink"];

    /// The same with their types.
    pub fn properties() -> Vec<(&'static str, &'static str)> {
        Self::PROPERTIES.map(|name| (name, "int")).into()
    }

    /// Those of them that belong to the type above.
    pub fn base_properties() -> Vec<(&'static str, &'static str)> {
        let base = |name: &&str| !name.starts_with("poll");
        Self::PROPERTIES.into_iter().filter(base).map(|name| (name, "int")).collect()
    }

    fn property(&mut self, name: &str) -> Option<&mut i64> {
        Some(match name {
            "poll-max-ns" => &mut self.poll_max_ns,
            "poll-grow" => &mut self.poll_grow,
            "poll-shrink" => &mut self.poll_shrink,
            "aio-max-batch" => &mut self.aio_max_batch,
            "thread-pool-min" => &mut self.thread_pool_min,
            "thread-pool-max" => &mut self.thread_pool_max,
            _ => return None,
        })
    }

    /// What the runtime takes of the options, once they have been checked.
    fn checked(mut self) -> Result<PollParams> {
        for name in Self::PROPERTIES {
            if self.property(name).is_some_and(|value| *value < 0) {
                return Err(Error::generic(format!("{name} value must be in range [0, {}]", i64::MAX)));
            }
        }
        let too_many = self.thread_pool_max > i64::from(i32::MAX);
        if self.thread_pool_max == 0 || self.thread_pool_min > self.thread_pool_max || too_many {
            return Err(Error::generic("bad thread-pool-min/thread-pool-max values"));
        }
        Ok(PollParams {
            poll_max_ns: self.poll_max_ns.unsigned_abs(),
            poll_grow: self.poll_grow.unsigned_abs(),
            poll_shrink: self.poll_shrink.unsigned_abs(),
            aio_max_batch: self.aio_max_batch.unsigned_abs(),
        })
    }
}

impl Default for IoThreadOptions {
    fn default() -> Self {
        Self {
            poll_max_ns: 32768,
            poll_grow: 0,
            poll_shrink: 0,
            aio_max_batch: 0,
            thread_pool_min: 0,
            thread_pool_max: 64,
        }
    }
}

impl IoThreadObject {
    /// Starts a thread.
    pub fn start(id: String, options: IoThreadOptions) -> Result<Self> {
        let params = options.checked()?;
        let thread = IoThread::spawn(&id, params)
            .map_err(|error| Error::generic(format!("Could not start the thread of '{id}': {error}")))?;
        Ok(Self { id, options: Cell::new(options), thread })
    }

    /// The object's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// How queues reach the thread.
    pub fn remote(&self) -> Remote {
        self.thread.remote()
    }

    /// A property's value.
    pub fn get(&self, name: &str) -> Result<Value> {
        if name == "type" {
            return Ok("iothread".into());
        }
        let mut options = self.options.get();
        let value = options.property(name).ok_or_else(|| not_found("iothread", name))?;
        Ok(Value::from(*value))
    }

    /// Changes a property; it is in force at once.
    pub fn set(&self, name: &str, value: Value) -> Result<()> {
        if name == "type" {
            return Err(Error::generic("Property 'iothread.type' is not writable"));
        }
        let mut options = self.options.get();
        *options.property(name).ok_or_else(|| not_found("iothread", name))? = property(name, value)?;
        self.thread.set_params(options.checked()?);
        self.options.set(options);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::ObjectKind;
    use super::super::tests::{at_once, objects, read};
    use super::*;

    fn refused(text: &str) -> String {
        read(text).and_then(|options| at_once(objects().add(options))).unwrap_err().desc
    }

    #[test]
    fn keyval_and_json_make_the_same_options() {
        let keyval = read("iothread,id=io0,poll-max-ns=5").unwrap();
        let json = read("{\"qom-type\":\"iothread\",\"id\":\"io0\",\"poll-max-ns\":5}").unwrap();
        assert_eq!(keyval, json);
        let options = IoThreadOptions { poll_max_ns: 5, ..IoThreadOptions::default() };
        assert_eq!(keyval.kind, ObjectKind::Iothread(options));
    }

    #[test]
    fn refusals_are_those_that_clients_know() {
        assert_eq!(refused("iothread,id=1x"), "Parameter 'id' expects an identifier");
        assert_eq!(
            refused("iothread,id=x,poll-max-ns=-1"),
            "poll-max-ns value must be in range [0, 9223372036854775807]"
        );
        let pool = "bad thread-pool-min/thread-pool-max values";
        assert_eq!(refused("iothread,id=x,thread-pool-min=10,thread-pool-max=5"), pool);
        assert_eq!(refused("iothread,id=x,thread-pool-max=0"), pool);
        assert_eq!(refused("iothread,id=x,thread-pool-max=2147483648"), pool);
        assert_eq!(refused("zzz,id=x"), "Parameter 'qom-type' does not accept value 'zzz'");
        assert_eq!(refused("iothread,id=x,zz=1"), "Parameter 'zz' is unexpected");
    }

    #[test]
    fn an_object_in_use_stays() {
        let objects = objects();
        at_once(objects.add(read("iothread,id=io0").unwrap())).unwrap();
        let user = objects.iothread("io0").unwrap();
        assert_eq!(objects.remove("io0").unwrap_err().desc, "object 'io0' is in use, can not be deleted");
        drop(user);
        objects.remove("io0").unwrap();
        assert_eq!(objects.remove("io0").unwrap_err().desc, "object 'io0' not found");
    }

    #[test]
    fn properties_change_while_the_thread_runs() {
        let objects = objects();
        at_once(objects.add(read("iothread,id=io0").unwrap())).unwrap();
        let thread = objects.iothread("io0").unwrap();
        thread.set("poll-max-ns", json!(7)).unwrap();
        assert_eq!(thread.get("poll-max-ns").unwrap(), json!(7));
        assert_eq!(thread.thread.params().poll_max_ns, 7);
        let wrong = thread.set("poll-max-ns", json!("x")).unwrap_err();
        assert_eq!(wrong.desc, "Invalid parameter type for 'poll-max-ns', expected: integer");
        assert!(thread.set("poll-max-ns", json!(-5)).is_err());
        assert_eq!(thread.get("zz").unwrap_err().desc, "Property 'iothread.zz' not found");
        assert_eq!(thread.get("poll-max-ns").unwrap(), json!(7), "a refused change changes nothing");
    }
}
