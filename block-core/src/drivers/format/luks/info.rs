//! What queries say about an image: `ImageInfoSpecificLUKS`.

use serde_json::json;

use super::Luks;
use crate::graph::DriverInfo;

impl Luks {
    pub(super) fn described(&self) -> DriverInfo {
        let mut data = self.keys.header().described();
        data["detached-header"] = self.header_in.is_some().into();
        let specific = Some(json!({ "type": "luks", "data": data }));
        DriverInfo { driver: "luks", encrypted: true, specific, ..DriverInfo::default() }
    }
}
