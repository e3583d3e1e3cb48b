//! The JSON of a LUKS2 header as it stands there: what opening needs of it, and no more of that than a header may have.
//! Whatever else there is is passed over while it is read, and takes no memory.

use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::MAX_LUKS2_SLOTS;

/// All of it.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Tree {
    pub(super) config: Part<Config>,
    pub(super) digests: Part<Rows<Part<Digest>>>,
    pub(super) keyslots: Part<Rows<Part<Keyslot>>>,
    pub(super) segments: Part<Rows<Part<Segment>>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Config {
    pub(super) requirements: Option<Part<Requirements>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Requirements {
    pub(super) mandatory: List,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Segment {
    #[serde(rename = "type")]
    pub(super) kind: Word,
    pub(super) offset: Word,
    pub(super) size: Word,
    pub(super) iv_tweak: Word,
    pub(super) encryption: Word,
    pub(super) sector_size: Word,
    pub(super) integrity: Word,
    pub(super) flags: List,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Digest {
    #[serde(rename = "type")]
    pub(super) kind: Word,
    pub(super) keyslots: List,
    pub(super) segments: List,
    pub(super) hash: Word,
    pub(super) iterations: Word,
    pub(super) salt: Word,
    pub(super) digest: Word,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Keyslot {
    #[serde(rename = "type")]
    pub(super) kind: Word,
    pub(super) key_size: Word,
    pub(super) priority: Word,
    pub(super) area: Part<Area>,
    pub(super) af: Part<Af>,
    pub(super) kdf: Part<Kdf>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Area {
    #[serde(rename = "type")]
    pub(super) kind: Word,
    pub(super) offset: Word,
    pub(super) size: Word,
    pub(super) encryption: Word,
    pub(super) key_size: Word,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Af {
    #[serde(rename = "type")]
    pub(super) kind: Word,
    pub(super) stripes: Word,
    pub(super) hash: Word,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub(super) struct Kdf {
    #[serde(rename = "type")]
    pub(super) kind: Word,
    pub(super) hash: Word,
    pub(super) iterations: Word,
    pub(super) salt: Word,
    pub(super) time: Word,
    pub(super) memory: Word,
    pub(super) cpus: Word,
}

/// A text that is not too long, a number, or something else.
#[derive(Default)]
pub(super) enum Word {
    #[default]
    Absent,
    Text(String),
    Number(u64),
    Other,
}

/// An object, if it is one.
pub(super) struct Part<T>(pub(super) Option<T>);

/// The members of an object with any names.
pub(super) enum Rows<T> {
    Few(Vec<(String, T)>),
    /// More than a header may have.
    Many,
}

/// A list of texts.
#[derive(Default)]
pub(super) enum List {
    #[default]
    Absent,
    Texts(Vec<String>),
    /// No list, or one of other things, or of more than a header may have.
    Other,
}

impl<T> Default for Part<T> {
    fn default() -> Self {
        Self(None)
    }
}

/// A place of the JSON where something of any kind may stand. What is not said to be taken is passed over.
trait Any: Sized {
    /// What stands there is passed over.
    fn other() -> Self;

    fn text(_: &str) -> Self {
        Self::other()
    }

    fn number(_: u64) -> Self {
        Self::other()
    }

    fn list<'de, A: SeqAccess<'de>>(mut list: A) -> Result<Self, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Self::other())
    }

    fn object<'de, A: MapAccess<'de>>(mut members: A) -> Result<Self, A::Error> {
        while members.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Self::other())
    }
}

impl Any for Word {
    fn other() -> Self {
        Self::Other
    }

    fn text(text: &str) -> Self {
        if text.len() > MAX_TEXT {
            return Self::Other;
        }
        Self::Text(text.to_owned())
    }

    fn number(number: u64) -> Self {
        Self::Number(number)
    }
}

impl Any for List {
    fn other() -> Self {
        Self::Other
    }

    fn list<'de, A: SeqAccess<'de>>(mut list: A) -> Result<Self, A::Error> {
        let (mut texts, mut is_other) = (Vec::new(), false);
        while let Some(word) = list.next_element()? {
            match word {
                Word::Text(text) if texts.len() < MAX_LUKS2_SLOTS => texts.push(text),
                _ => is_other = true,
            }
        }
        Ok(if is_other { Self::Other } else { Self::Texts(texts) })
    }
}

impl<T: for<'t> Deserialize<'t>> Any for Part<T> {
    fn other() -> Self {
        Self(None)
    }

    fn object<'de, A: MapAccess<'de>>(members: A) -> Result<Self, A::Error> {
        T::deserialize(MapAccessDeserializer::new(members)).map(|object| Self(Some(object)))
    }
}

struct Taken<T>(PhantomData<T>);

impl<'de, T: Any> Visitor<'de> for Taken<T> {
    type Value = T;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("anything")
    }

    fn visit_unit<E: Error>(self) -> Result<T, E> {
        Ok(T::other())
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<T, E> {
        Ok(T::other())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<T, E> {
        Ok(T::other())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<T, E> {
        Ok(T::other())
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
        Ok(T::number(number))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        Ok(T::text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<T, A::Error> {
        T::list(list)
    }

    fn visit_map<A: MapAccess<'de>>(self, members: A) -> Result<T, A::Error> {
        T::object(members)
    }
}

impl<'de> Deserialize<'de> for Word {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Taken(PhantomData))
    }
}

impl<'de> Deserialize<'de> for List {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Taken(PhantomData))
    }
}

impl<'de, T: for<'t> Deserialize<'t>> Deserialize<'de> for Part<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Taken(PhantomData))
    }
}

impl<'de, T: for<'t> Deserialize<'t>> Deserialize<'de> for Rows<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(Members(PhantomData))
    }
}

struct Members<T>(PhantomData<T>);

impl<'de, T: for<'t> Deserialize<'t>> Visitor<'de> for Members<T> {
    type Value = Rows<T>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Rows<T>, A::Error> {
        let mut rows = Vec::new();
        while rows.len() < MAX_LUKS2_SLOTS {
            match members.next_key()? {
                None => return Ok(Rows::Few(rows)),
                Some(Word::Text(name)) => rows.push((name, members.next_value()?)),
                Some(_) => return Err(Error::custom("a name is too long")),
            }
        }
        let mut is_more = false;
        while members.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            is_more = true;
        }
        Ok(if is_more { Rows::Many } else { Rows::Few(rows) })
    }
}

/// Bytes of a text. Salts and digests have 88 at the most.
const MAX_TEXT: usize = 128;
