//! Throttle groups as objects: what nodes find by id, and limits that can be changed while requests wait for them.

use std::rc::Rc;
use std::sync::Arc;

use block_core::drivers::filter::throttle::{Limits, ThrottleGroup, ThrottleGroupOptions, ThrottleLimits};
use block_core::graph::Graph;
use qmp::schema::{Qapi, Value};
use qmp::{Error, Result};

use super::{not_found, property};
use crate::refused;

/// A group that nodes can join, as long as the value lives.
pub struct ThrottleGroupObject {
    id: String,
    group: Arc<ThrottleGroup>,
    graph: Rc<Graph>,
}

impl ThrottleGroupObject {
    /// Offers a group to the nodes of `graph`.
    pub fn offer(graph: &Rc<Graph>, id: String, options: ThrottleGroupOptions) -> Result<Self> {
        let group = ThrottleGroup::new(options.checked().map_err(refused)?);
        graph.objects().insert(&id, group.clone());
        Ok(Self { id, group, graph: graph.clone() })
    }

    /// The object's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// A node is a member.
    pub fn is_used(&self) -> bool {
        self.group.is_used()
    }

    /// Its properties with their types, besides `type`.
    pub fn properties() -> Vec<(&'static str, &'static str)> {
        let flat = ThrottleLimits::FLAT.iter().map(|name| (*name, "int"));
        std::iter::once(("limits", "ThrottleLimits")).chain(flat).collect()
    }

    /// A property's value.
    pub fn get(&self, name: &str) -> Result<Value> {
        let limits = ThrottleLimits::from(self.group.limits()).to_value();
        match name {
            "type" => Ok("throttle-group".into()),
            "limits" => Ok(limits),
            flat if ThrottleLimits::FLAT.contains(&flat) => Ok(limits[flat.trim_start_matches("x-")].clone()),
            other => Err(not_found("throttle-group", other)),
        }
    }

    /// Changes the limits, for those who wait too; what `value` leaves out stays.
    pub fn set(&self, name: &str, value: Value) -> Result<()> {
        match name {
            "limits" => {
                let change: ThrottleLimits = property(name, value)?;
                self.group.set_limits(over(self.group.limits(), &change)?);
                Ok(())
            }
            "type" => Err(Error::generic("Property 'throttle-group.type' is not writable")),
            flat if ThrottleLimits::FLAT.contains(&flat) => {
                Err(Error::generic("Property cannot be set after initialization"))
            }
            other => Err(not_found("throttle-group", other)),
        }
    }
}

impl Drop for ThrottleGroupObject {
    fn drop(&mut self) {
        self.graph.objects().remove(&self.id);
    }
}

fn over(old: Limits, change: &ThrottleLimits) -> Result<Limits> {
    change.over(old).map_err(refused)
}
