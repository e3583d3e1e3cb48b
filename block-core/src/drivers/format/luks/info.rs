//! What queries say about an image: `ImageInfoSpecificLUKS`. No key and no passphrase is anywhere near.

use serde_json::{Value, json};

use super::Luks;
use crate::codec::cipher::IvGen;
use crate::codec::luks::Header;
use crate::graph::DriverInfo;

impl Luks {
    pub(super) fn described(&self) -> DriverInfo {
        let header = self.header();
        let (spec, payload) = (self.payload.spec, self.payload);
        let own = spec.cipher_key(payload.key_len).unwrap_or(0);
        let mut data = json!({
            "cipher-alg": spec.family.name_with_key(own),
            "cipher-mode": spec.mode.name(),
            "ivgen-alg": spec.iv.unwrap_or(IvGen::Plain64).name(),
            "detached-header": self.header_in.is_some(),
            "payload-offset": payload.offset,
        });
        let mut put = |name: &str, value: Value| drop(data.as_object_mut().map(|data| data.insert(name.into(), value)));
        if let Some(IvGen::Essiv(hash)) = spec.iv {
            put("ivgen-hash-alg", hash.name().into());
        }
        match &*header {
            Header::V1(header) => {
                put("hash-alg", header.hash().name().into());
                put("master-key-iters", header.digest_iterations().into());
                put("uuid", header.uuid().into());
                let slots = header.slots().into_iter().map(|slot| {
                    let mut said = json!({ "active": slot.is_active, "key-offset": slot.offset });
                    if slot.is_active {
                        said["iters"] = slot.iterations.into();
                        said["stripes"] = 4000.into();
                    }
                    said
                });
                put("slots", slots.collect());
            }
            Header::V2(header) => {
                put("version", 2.into());
                put("hash-alg", header.hash().name().into());
                put("master-key-iters", header.digest_iterations().into());
                put("uuid", header.uuid().into());
                let slots = header.slots().map(|(_, offset)| json!({ "active": true, "key-offset": offset }));
                put("slots", slots.collect());
            }
        }
        let specific = Some(json!({ "type": "luks", "data": data }));
        DriverInfo { driver: "luks", encrypted: true, specific, ..DriverInfo::default() }
    }
}
