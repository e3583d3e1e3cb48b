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

/// Why a definition cannot be read, without words of it that may be a part of a secret, such as what stands behind a comma in
/// one. The names of members, a type and a format are none.
fn hushed(text: &str, desc: String) -> String {
    if text.starts_with("throttle-group") || desc.ends_with("' is missing") {
        return desc;
    }
    let mut parts = text.split(',');
    let kind = parts.next().unwrap_or_default();
    let formats: Vec<_> = parts.filter_map(|part| part.strip_prefix("format=")).collect();
    let is_told = |word: &str| SAID.contains(&word) || word == kind || formats.contains(&word);
    match !text.contains('\'') && desc.split('\'').skip(1).step_by(2).all(is_told) {
        true => desc,
        false => "The options cannot be read. They are not shown, as a secret may be among them".to_owned(),
    }
}

/// Members of definitions.
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
            "secret,id=s,dta=pass,swordfish",
            "secret,id=s,dta=pass,swordfish=1",
            "secret,id=s,data=it's,swordfish",
            "{\"qom-type\":\"secret\",\"id\":\"s\",\"swordfish\":1}",
            "{\"qom-type\":\"secret\",\"id\":\"s\",\"data\":\"swordfish\",}",
            "{\"qom-type\":\"secret\",\"id\":\"s\",\"data\":swordfish}",
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
            assert_eq!(made("throttle-group,id=u,nosuch=1").await.unwrap_err(), "Parameter 'nosuch' is unexpected");
            assert_eq!(
                made("secret,id=u,format=nope,data=x").await.unwrap_err(),
                "Parameter 'format' does not accept value 'nope'"
            );
        });
    }
}
