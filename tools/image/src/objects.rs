//! `--object`: what images refer to by id. What they are is said in the library, for the daemon too; here is how a command
//! line makes them, and that it never says again what was secret.

use block_core::base::{Error, Result};
use block_core::catalog::{SecretKeyringOptions, SecretOptions, is_identifier};
use block_core::codec::secret::Secret;
use block_core::drivers::filter::throttle::{ThrottleGroup, ThrottleGroupOptions};
use qmp::Qapi;
use qmp::keyval::parse_option;

use crate::session::Session;

/// The argument of `--object`.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
struct ObjectOptions {
    /// The object's name.
    id: String,
    /// What it is.
    #[qapi(flatten)]
    kind: ObjectKind,
}

/// What an object is.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(union, tag = "qom-type", tag_name = "ObjectType")]
enum ObjectKind {
    /// A passphrase or a key, given or in a file.
    Secret(SecretOptions),
    /// A passphrase or a key that the kernel keeps.
    #[qapi(rename = "secret_keyring")]
    SecretKeyring(SecretKeyringOptions),
    /// Limits that nodes share.
    ThrottleGroup(Box<ThrottleGroupOptions>),
}

/// Makes an object as the command line says.
pub async fn add_object(session: &Session, text: &str) -> Result<()> {
    let parsed = parse_option(text, Some("qom-type")).and_then(|parsed| parsed.into_typed());
    let ObjectOptions { id, kind } = parsed.map_err(|error| Error::new(hushed(text, error.desc)))?;
    let objects = session.graph.objects();
    if !is_identifier(&id) {
        return Err(Error::new(
            "Parameter 'id' expects an identifier\nIdentifiers consist of letters, digits, '-', '.', '_', starting with a \
             letter.",
        ));
    }
    if objects.find::<Secret>(&id).is_some() || objects.find::<ThrottleGroup>(&id).is_some() {
        return Err(Error::new(format!("attempt to add duplicate property '{id}' to object (type 'container')")));
    }
    match kind {
        ObjectKind::Secret(options) => objects.insert(&id, options.read(objects).await?),
        ObjectKind::SecretKeyring(options) => objects.insert(&id, options.read(objects).await?),
        ObjectKind::ThrottleGroup(options) => objects.insert(&id, ThrottleGroup::new(options.checked()?)),
    }
    Ok(())
}

/// What is said of a definition that cannot be read. Behind a comma in a secret that is not doubled stands the rest of it,
/// which looks like an option of that name: it is not said.
fn hushed(text: &str, desc: String) -> String {
    let Some((_, behind)) = text.split_once("data=") else { return desc };
    let is_known = |part: &&str| SAID.iter().any(|name| part.split('=').next() == Some(*name));
    let mut rest = behind.split(',').skip(1).filter(|part| !is_known(part) && !part.is_empty());
    let quoted: Vec<&str> = desc.split('\'').skip(1).step_by(2).collect();
    let is_told = rest.any(|part| quoted.iter().any(|quoted| part.contains(quoted) || quoted.contains(part)));
    if is_told {
        "What stands behind a comma in 'data' is no option: a comma of the secret is doubled".to_owned()
    } else {
        desc
    }
}

/// Members of a definition: they are no part of a secret.
const SAID: &[&str] = &["id", "qom-type", "format", "keyid", "iv", "file", "serial", "data"];

#[cfg(test)]
mod tests {
    use super::*;

    /// Everything that may be wrong with a definition, and nothing of what is secret is said.
    #[test]
    fn a_secret_is_never_said_again() {
        for text in [
            "secret,id=s,data=pass,swordfish",
            "secret,id=s,data=pass,swordfish=1",
            "secret,id=s,data=pass,swordfish.x=1,format=raw",
            "secret,id=s,data=swordfish,format=nope",
            "secret,id=s,data=swordfish,data.x=1",
            "secret,id=1,data=swordfish",
            "secret,id=s,format=base64,data=swordfish%",
            "secret,id=s,data=swordfish,keyid=none",
            "secret,id=s,data=swordfish,iv=AAAA",
            "secret,id=s,data=swordfish,file=/none",
            "secret,id=s,data=swordfish,nosuch=1",
            "nosuch,id=s,data=swordfish",
            "secret,data=swordfish",
            "secret,id=s,data=swordfish,id=1",
        ] {
            let said = Session::run("t", async |session| add_object(session, text).await.unwrap_err());
            let said = format!("{} {said:?}", said.full());
            assert!(!said.contains("swordfish"), "{text}: {said}");
        }
    }

    #[test]
    fn objects_are_made_and_found() {
        Session::run("t", async |session| {
            let made = async |text: &str| add_object(session, text).await.map_err(|error| error.full());
            made("secret,id=s,data=a,,b").await.unwrap();
            assert!(session.graph.objects().find::<Secret>("s").unwrap().bytes().is(b"a,b"));
            made("throttle-group,id=t,x-bps-total=1000").await.unwrap();
            let twice = "attempt to add duplicate property 't' to object (type 'container')";
            assert_eq!(made("secret,id=t,data=x").await.unwrap_err(), twice);
            assert_eq!(made("secret,id=u,nosuch=1,data=x").await.unwrap_err(), "Parameter 'nosuch' is unexpected");
            assert_eq!(
                made("secret,id=u,format=nope,data=x").await.unwrap_err(),
                "Parameter 'format' does not accept value 'nope'"
            );
        });
    }
}
