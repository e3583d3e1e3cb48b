//! Secrets as objects: what drivers find by id. Nothing that was secret can be read back.

use std::rc::Rc;

use block_core::catalog::{SecretFormat, SecretKeyringOptions, SecretOptions};
use block_core::graph::Graph;
use qmp::schema::{Qapi, Value};
use qmp::{Error, Result};

use super::not_found;
use crate::refused;

/// A secret that nodes can find, as long as the value lives.
pub struct SecretObject {
    id: String,
    type_name: &'static str,
    /// What may be shown of the options.
    shown: Vec<(&'static str, Value)>,
    graph: Rc<Graph>,
}

impl SecretObject {
    /// Offers a secret that is given or in a file. `is_free` is asked again once it has been read.
    pub async fn read(
        graph: &Rc<Graph>,
        id: String,
        options: SecretOptions,
        is_free: impl Fn(&str) -> Result<()>,
    ) -> Result<Self> {
        let mut shown = common(options.format, options.keyid.as_ref(), options.iv.as_ref());
        shown.push(("file", options.file.clone().unwrap_or_default().into()));
        // One that is encrypted with another may be seen.
        if options.data.is_some() && options.keyid.is_none() {
            tracing::warn!(
                id,
                "a secret was given with `data`: whoever sees the command line or the QMP socket has it; use `file`"
            );
        }
        let secret = options.read(graph.objects()).await.map_err(refused)?;
        is_free(&id)?;
        graph.objects().insert(&id, secret);
        Ok(Self { id, type_name: "secret", shown, graph: graph.clone() })
    }

    /// The same for one that the kernel keeps.
    pub async fn fetch(
        graph: &Rc<Graph>,
        id: String,
        options: SecretKeyringOptions,
        is_free: impl Fn(&str) -> Result<()>,
    ) -> Result<Self> {
        let mut shown = common(options.format, options.keyid.as_ref(), options.iv.as_ref());
        shown.push(("serial", options.serial.into()));
        let secret = options.read(graph.objects()).await.map_err(refused)?;
        is_free(&id)?;
        graph.objects().insert(&id, secret);
        Ok(Self { id, type_name: "secret_keyring", shown, graph: graph.clone() })
    }

    /// The object's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The name of its type.
    pub fn type_name(&self) -> &'static str {
        self.type_name
    }

    /// Its properties with their types, besides `type`.
    pub fn properties(type_name: &str) -> Vec<(&'static str, &'static str)> {
        let common = [("iv", "string"), ("keyid", "string"), ("format", "QCryptoSecretFormat")];
        let own: &[_] = match type_name {
            "secret" => &[("file", "string"), ("data", "string")],
            "secret_keyring" => &[("serial", "int32_t")],
            _ => &[],
        };
        common.into_iter().chain(own.iter().copied()).collect()
    }

    /// A property's value. What is secret is none.
    pub fn get(&self, name: &str) -> Result<Value> {
        let type_name = self.type_name;
        match name {
            "type" => Ok(type_name.into()),
            "data" if type_name == "secret" => Err(Error::generic("Property 'secret.data' is not readable")),
            _ => {
                let shown = self.shown.iter().find(|(shown, _)| *shown == name);
                shown.map(|(_, value)| value.clone()).ok_or_else(|| not_found(type_name, name))
            }
        }
    }

    /// Nothing can be changed.
    pub fn set(&self, name: &str) -> Result<()> {
        let type_name = self.type_name;
        let is_known = name == "type" || Self::properties(type_name).iter().any(|(known, _)| *known == name);
        if !is_known {
            return Err(not_found(type_name, name));
        }
        Err(Error::generic(format!("Property '{type_name}.{name}' is not writable")))
    }
}

impl Drop for SecretObject {
    fn drop(&mut self) {
        self.graph.objects().remove(&self.id);
    }
}

fn common(format: Option<SecretFormat>, keyid: Option<&String>, iv: Option<&String>) -> Vec<(&'static str, Value)> {
    let text = |text: Option<&String>| Value::from(text.cloned().unwrap_or_default());
    vec![("format", format.unwrap_or(SecretFormat::Raw).to_value()), ("keyid", text(keyid)), ("iv", text(iv))]
}
