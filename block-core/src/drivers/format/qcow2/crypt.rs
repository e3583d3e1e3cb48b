//! Encrypted images: where the key is, and how guest data stands in clusters. Tables are not encrypted.
//!
//! | `crypt_method` | | sectors are numbered |
//! |---|---|---|
//! | 1 | AES-128 in CBC mode, the passphrase itself is the key: old images, which can only be read | as the guest sees them |
//! | 2 | a LUKS1 header lies in clusters of its own, where an extension says | by their places in the file |

use qmp::Qapi;
use serde_json::{Value, json};

use super::Image;
use super::extensions::Extensions;
use super::header::{Fields, Header};
use crate::base::{ByteRange, Error, Result, ResultExt, is_aligned};
use crate::codec::SecretBytes;
use crate::codec::cipher::{Family, IvGen, Mode, Spec};
use crate::codec::luks::{self, BEGINNING, v1};
use crate::codec::secret::Secret;
use crate::drivers::keys::{self, Home, KeyChange, KeyRing, needed_secret};
use crate::graph::{AmendRequest, Amending, Child, IoCx, Objects};
use crate::pipeline::Seal;

/// What opens an encrypted image.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(union, tag = "format", tag_name = "BlockdevQcow2EncryptionFormat")]
pub enum Qcow2Encryption {
    /// An old image (`crypt_method` 1), which can only be read.
    Aes(KeyOptions),
    /// A LUKS header in the image.
    Luks(KeyOptions),
}

/// The passphrase.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "QCryptoBlockOptionsLUKS")]
pub struct KeyOptions {
    /// The id of the secret that opens the image.
    pub key_secret: Option<String>,
}

/// What an encrypted image needs to be read.
#[derive(Debug)]
pub(super) struct Crypt {
    pub(super) seal: Seal,
    /// The keys, if they are in the image.
    pub(super) keys: Option<KeyRing>,
}

/// How the disk is encrypted, if it is.
pub(super) fn kind(header: &Header) -> Option<&'static str> {
    match header.crypt {
        0 => None,
        AES => Some("aes"),
        _ => Some("luks"),
    }
}

/// Nothing of an encrypted image is told without a key.
pub(super) fn passphrase(
    header: &Header,
    given: Option<&Qcow2Encryption>,
    objects: &Objects,
) -> Result<Option<Secret>> {
    let given = given.map(|given| match given {
        Qcow2Encryption::Aes(key) => ("aes", key),
        Qcow2Encryption::Luks(key) => ("luks", key),
    });
    let required = || Error::new("Parameter 'encrypt.key-secret' is required for cipher");
    let (kind, (named, key)) = match (kind(header), given) {
        (None, None) => return Ok(None),
        (None, Some((named, _))) => {
            return Err(Error::new(format!("No encryption in image header, but options specified format '{named}'")));
        }
        (Some(kind), given) => (kind, given.ok_or_else(required)?),
    };
    if named != kind {
        let text = format!("Header reported '{kind}' encryption format but options specify '{named}'");
        return Err(Error::new(text));
    }
    let id = key.key_secret.as_deref().ok_or_else(required)?;
    needed_secret(objects, Some(id)).map(Some)
}

/// An encrypted image whose key has not been derived yet.
#[derive(Debug)]
pub(super) struct Locked {
    passphrase: Secret,
    /// The LUKS header, where it is, and the material of its slots. Old images have none.
    keys: Option<(Home, luks::Header, Vec<SecretBytes>)>,
}

impl Locked {
    /// Reads what the key is derived from.
    pub(super) async fn read(
        file: Child<'_>,
        header: &Header,
        extensions: &Extensions,
        passphrase: Secret,
    ) -> Result<Self> {
        if header.crypt == AES {
            return Ok(Self { passphrase, keys: None });
        }
        let (home, header) = read_header(file, header, extensions).await?;
        let material = keys::read_material(file, home.start, &header).await?;
        Ok(Self { passphrase, keys: Some((home, header, material)) })
    }

    /// Derives the key. Takes long: outside of the graph, where nobody waits for it.
    pub(super) async fn unlock(self) -> Result<Crypt> {
        let Self { passphrase, keys } = self;
        let Some((home, header, material)) = keys else {
            let spec = Spec { family: Family::Aes, mode: Mode::Cbc, iv: Some(IvGen::Plain64) };
            let mut key = SecretBytes::zeroed(16);
            key.expose_mut().iter_mut().zip(passphrase.bytes().expose()).for_each(|(to, from)| *to = *from);
            let cipher = Some(spec.keyed(key.expose(), 512)?);
            return Ok(Crypt { seal: Seal { cipher, by_guest: true }, keys: None });
        };
        let (header, unlocked) = keys::unlock(header, passphrase, material).await?;
        let cipher = Some(header.payload().cipher(&unlocked.key)?);
        Ok(Crypt { seal: Seal { cipher, by_guest: false }, keys: Some(KeyRing::new(header, home)) })
    }
}

impl Crypt {
    /// The same where nobody has said what opens the image.
    pub(super) async fn locked(file: Child<'_>, header: &Header, extensions: &Extensions) -> Result<Self> {
        let seal = Seal { cipher: None, by_guest: header.crypt == AES };
        if header.crypt == AES {
            return Ok(Self { seal, keys: None });
        }
        let (home, header) = read_header(file, header, extensions).await?;
        Ok(Self { seal, keys: Some(KeyRing::new(header, home)) })
    }

    /// `ImageInfoSpecificQCow2Encryption`.
    pub(super) fn described(&self) -> Value {
        let Some(keys) = &self.keys else { return json!({ "format": "aes" }) };
        let mut data = keys.header().described();
        data["format"] = "luks".into();
        data["detached-header"] = false.into();
        data
    }
}

impl Image {
    /// Other passphrases (QEMU: `BlockdevAmendOptionsQcow2`), beside other requests.
    pub(super) async fn change_keys(&self, cx: IoCx<'_>, request: AmendRequest<'_>) -> Result<Amending> {
        let change: &KeyChange = request.options.downcast_ref().expect("the catalog amends with options of its kind");
        let crypt = self.crypt.as_ref().ok_or_else(not_encrypted)?;
        let keys = crypt.keys.as_ref().ok_or_else(|| Error::new(NO_SLOTS))?;
        self.ready(cx).await.doing(|| "The image cannot be written")?;
        let opened = || match &self.options.encrypt {
            Some(Qcow2Encryption::Luks(key) | Qcow2Encryption::Aes(key)) => {
                needed_secret(request.objects, key.key_secret.as_deref())
            }
            None => Err(not_encrypted()),
        };
        keys.change(cx.child(self.file), change, opened, request.done).await
    }
}

/// Other passphrases for an image that nobody has open.
pub(super) async fn change_keys(
    file: Child<'_>,
    header: &Header,
    extensions: &Extensions,
    change: &KeyChange,
) -> Result<()> {
    match header.crypt {
        0 => return Err(not_encrypted()),
        AES => return Err(Error::new(NO_SLOTS)),
        _ => {}
    }
    let (home, header) = read_header(file, header, extensions).await?;
    KeyRing::new(header, home).change_alone(file, change).await
}

fn not_encrypted() -> Error {
    Error::new("image is not encrypted, can't amend")
}

/// Where the LUKS header is, and what it says. Nothing has been derived.
async fn read_header(file: Child<'_>, header: &Header, extensions: &Extensions) -> Result<(Home, luks::Header)> {
    let (place, doing) = (place(header, extensions)?, || "Could not read the image's LUKS header");
    let beginning = ByteRange::new(place.start(), BEGINNING.min(place.len())).ok_or_else(missing)?;
    let beginning = keys::fetch(file, beginning).await.doing(doing)?;
    let version = luks::version(&beginning)?;
    if version != 1 {
        return Err(Error::new(format!("LUKS version {version} is not supported in a qcow2 image")));
    }
    // Guest data has places of its own, whatever this header says of a payload.
    let home = Home { start: place.start(), len: Some(place.len()), detached: true };
    Ok((home, luks::Header::V1(v1::Header::parse(&beginning, place.len(), true)?)))
}

/// Where the LUKS header of the image is, if it has one at a place where one can be.
pub(super) fn keys_place(header: &Header, extensions: &Extensions) -> Option<ByteRange> {
    if header.crypt == LUKS { place(header, extensions).ok() } else { None }
}

/// Where the extension says that the LUKS header is.
fn place(header: &Header, extensions: &Extensions) -> Result<ByteRange> {
    let mut all = extensions.all.iter().filter(|extension| extension.kind == CRYPTO);
    let (Some(extension), None) = (all.next(), all.next()) else { return Err(missing()) };
    let field = Fields(&extension.data);
    if extension.data.len() != 16 {
        return Err(Error::new(format!("The encryption extension has {} bytes; it has 16", extension.data.len())));
    }
    let place = ByteRange::new(field.u64(0)?, field.u64(8)?);
    let place = place.filter(|place| is_aligned(place.start(), 1 << header.cluster_bits) && !place.is_empty());
    let place = place.filter(|place| place.start() >= 1 << header.cluster_bits && place.len() <= MAX_KEYS);
    place.ok_or_else(|| Error::new("The image's LUKS header has an impossible place or size"))
}

fn missing() -> Error {
    Error::new("Header extension with encryption metadata is missing")
}

const NO_SLOTS: &str = "An image with the old encryption (aes) has no key slots";
/// The header extension that says where an encrypted image has its keys.
pub(super) const CRYPTO: u32 = 0x0537_be77;
/// `crypt_method`.
pub(super) const AES: u32 = 1;
pub(super) const LUKS: u32 = 2;
/// The largest LUKS header that is believed, in bytes.
const MAX_KEYS: u64 = 64 << 20;
