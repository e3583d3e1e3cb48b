//! Key slots of encrypted images, as `-o` says what becomes of them.

use block_core::base::{Error, Result};
use block_core::catalog::BlockdevAmendOptions;
use qmp::schema::from_keyval;
use serde_json::{Map, Value};

use crate::pairs::Pairs;

/// A change of key slots of an image of this format, in QMP's words but for `encrypt.` before them.
pub fn key_change(driver: &str, keys: &Pairs) -> Result<BlockdevAmendOptions> {
    let mut members: Map<String, Value> = keys.iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
    if driver == "qcow2" {
        members.insert("format".to_owned(), "luks".into());
        members = Map::from_iter([("encrypt".to_owned(), Value::Object(members))]);
    }
    members.insert("driver".to_owned(), driver.into());
    from_keyval(Value::Object(members)).map_err(|error| Error::new(error.desc))
}
