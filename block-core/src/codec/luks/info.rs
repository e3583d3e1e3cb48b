//! What may be said of a header, in QMP's words (QEMU: `QCryptoBlockInfoLUKS`). No key is anywhere near.

use serde_json::{Value, json};

use super::{Header, v1};
use crate::codec::cipher::IvGen;

impl Header {
    /// Its members but `detached-header`.
    pub fn described(&self) -> Value {
        let payload = self.payload();
        let spec = payload.spec;
        let own = spec.cipher_key(payload.key_len).unwrap_or(0);
        let mut data = json!({
            "cipher-alg": spec.family.name_with_key(own),
            "cipher-mode": spec.mode.name(),
            "ivgen-alg": spec.iv.unwrap_or(IvGen::Plain64).name(),
            "payload-offset": payload.offset,
        });
        let mut put = |name: &str, value: Value| drop(data.as_object_mut().map(|data| data.insert(name.into(), value)));
        if let Some(IvGen::Essiv(hash)) = spec.iv {
            put("ivgen-hash-alg", hash.name().into());
        }
        match self {
            Self::V1(header) => {
                put("hash-alg", header.hash().name().into());
                put("master-key-iters", header.digest_iterations().into());
                put("uuid", header.uuid().into());
                put("slots", header.slots().into_iter().map(slot).collect());
            }
            Self::V2(header) => {
                put("version", 2.into());
                put("hash-alg", header.hash().name().into());
                put("master-key-iters", header.digest_iterations().into());
                put("uuid", header.uuid().into());
                let slots = header.slots().map(|(_, offset)| json!({ "active": true, "key-offset": offset }));
                put("slots", slots.collect());
            }
        }
        data
    }
}

fn slot(slot: v1::SlotInfo) -> Value {
    let mut said = json!({ "active": slot.is_active, "key-offset": slot.offset });
    if slot.is_active {
        said["iters"] = slot.iterations.into();
        said["stripes"] = crate::codec::split::STRIPES.into();
    }
    said
}
