//! Secrets as operators define them: what the daemon and the tools accept, and how it is read.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::Arc;
use std::time::{Duration, Instant};

use qmp::Qapi;
use qmp::schema::{At, Collector, Definition, Kind, TypeRef, Value};
use zeroize::Zeroize;

use crate::base::{Error, Result, ResultExt};
use crate::codec::SecretBytes;
use crate::codec::secret::{Encoding, Secret};
use crate::drivers::keys::secret;
use crate::graph::Objects;
use crate::rt::{Local, blocking, keyring, leave_no_dumps, system_call};

/// A secret that is given, or in a file.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "SecretProperties")]
pub struct SecretOptions {
    /// How the bytes stand for the secret; raw if absent.
    pub format: Option<SecretFormat>,
    /// The id of the secret that this one is encrypted with.
    pub keyid: Option<String>,
    /// The initial vector of that encryption, in base64. Needs `keyid`.
    pub iv: Option<String>,
    /// The bytes. Whoever sees the command line sees them; `file` is better.
    pub data: Option<SecretText>,
    /// The file that has the bytes; read once, now.
    pub file: Option<String>,
}

/// A secret that the kernel keeps.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "SecretKeyringProperties")]
pub struct SecretKeyringOptions {
    /// How the bytes stand for the secret; raw if absent.
    pub format: Option<SecretFormat>,
    /// The id of the secret that this one is encrypted with.
    pub keyid: Option<String>,
    /// The initial vector of that encryption, in base64. Needs `keyid`.
    pub iv: Option<String>,
    /// The key's number; read once, now.
    pub serial: i32,
}

/// How bytes stand for a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "QCryptoSecretFormat")]
pub enum SecretFormat {
    /// They are it.
    Raw,
    /// They are its base64.
    Base64,
}

impl SecretOptions {
    /// The bytes that were given, if they are not encrypted. They are no part of the options any more.
    pub fn take_plain(&mut self) -> Option<SecretBytes> {
        if self.keyid.is_some() {
            return None;
        }
        self.data.take().map(SecretText::into_bytes)
    }

    /// Reads the secret. Whoever offers it to nodes gives it an id. From now on the process leaves no core dumps.
    pub async fn read(mut self, objects: &Objects) -> Result<Arc<Secret>> {
        leave_no_dumps();
        let data = self.data.take();
        let given = match (data, self.file.clone()) {
            (Some(data), None) => data.into_bytes(),
            (None, Some(file)) => read_file(file).await?,
            (Some(_), Some(_)) => return Err(Error::new("'file' and 'data' are mutually exclusive")),
            (None, None) => return Err(Error::new("Either 'file' or 'data' must be provided")),
        };
        let Self { format, keyid, iv, .. } = self;
        made(objects, given, format, keyid.as_deref(), iv.as_deref())
    }
}

impl SecretKeyringOptions {
    /// The same for the kernel's.
    pub async fn read(self, objects: &Objects) -> Result<Arc<Secret>> {
        leave_no_dumps();
        let Self { format, keyid, iv, serial } = self;
        let doing = || format!("Unable to read serial key {serial:08x}");
        let read = blocking(move || {
            let mut room = SecretBytes::zeroed(MAX_SECRET);
            let len = keyring::read(serial, room.expose_mut())?;
            Ok::<_, io::Error>(SecretBytes::new(room.expose()[..len].to_vec()))
        });
        made(objects, read.await.doing(doing)?, format, keyid.as_deref(), iv.as_deref())
    }
}

fn made(
    objects: &Objects,
    given: SecretBytes,
    format: Option<SecretFormat>,
    keyid: Option<&str>,
    iv: Option<&str>,
) -> Result<Arc<Secret>> {
    let encoding = match format {
        None | Some(SecretFormat::Raw) => Encoding::Raw,
        Some(SecretFormat::Base64) => Encoding::Base64,
    };
    let secret = match (keyid, iv) {
        (None, None) => Secret::new(given, encoding)?,
        (Some(keyid), iv) => Secret::wrapped(given, encoding, &secret(objects, keyid)?, iv)?,
        (None, Some(_)) => return Err(Error::new("'iv' needs 'keyid'")),
    };
    Ok(Arc::new(secret))
}

/// The whole of a regular file, or of a pipe until its writers have closed it.
async fn read_file(path: String) -> Result<SecretBytes> {
    let shown = path.clone();
    let read = async {
        let (file, is_pipe) = blocking(move || open(&path)).await?;
        if is_pipe { from_pipe(&file).await } else { blocking(move || from_regular(&file)).await }
    };
    let secret = read.await.doing(|| format!("Unable to read {shown}"))?;
    if secret.len() > MAX_SECRET {
        return Err(Error::new(format!("The secret in '{shown}' is longer than {MAX_SECRET} bytes")));
    }
    Ok(secret)
}

/// The file, and whether it is a pipe. What has no end, or may have none, is refused.
fn open(path: &str) -> io::Result<(File, bool)> {
    // A pipe that nobody writes to would hold the thread for ever.
    let file = system_call(|| OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path))?;
    let kind = system_call(|| file.metadata())?.file_type();
    if kind.is_file() || kind.is_fifo() {
        return Ok((file, kind.is_fifo()));
    }
    Err(io::Error::other("it is no regular file, nor a pipe"))
}

fn from_regular(mut file: &File) -> io::Result<SecretBytes> {
    let mut room = Room::new();
    loop {
        let count = system_call(|| file.read(room.rest()))?;
        if !room.take(count) {
            return Ok(room.into_secret());
        }
    }
}

async fn from_pipe(mut file: &File) -> io::Result<SecretBytes> {
    let (mut room, begun) = (Room::new(), Instant::now());
    loop {
        match system_call(|| file.read(room.rest())) {
            // Where nobody has it open for writing, yet, nothing is read either.
            Ok(0) if room.done == 0 => {}
            Ok(count) if room.take(count) => continue,
            Ok(_) => return Ok(room.into_secret()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if begun.elapsed() > PIPE_PATIENCE {
            let why = format!("the pipe was not written and closed within {} s", PIPE_PATIENCE.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        Local::current().sleep(PIPE_PAUSE).await;
    }
}

/// A place for the longest secret and one byte more: a vector that grows leaves copies behind.
struct Room {
    bytes: SecretBytes,
    done: usize,
}

impl Room {
    fn new() -> Self {
        Self { bytes: SecretBytes::zeroed(MAX_SECRET + 1), done: 0 }
    }

    fn rest(&mut self) -> &mut [u8] {
        &mut self.bytes.expose_mut()[self.done..]
    }

    /// `count` bytes more are there; false where that is none: the end, or no room.
    fn take(&mut self, count: usize) -> bool {
        self.done += count;
        count > 0
    }

    fn into_secret(self) -> SecretBytes {
        SecretBytes::new(self.bytes.expose()[..self.done].to_vec())
    }
}

/// How long a pipe may take to be written and closed.
const PIPE_PATIENCE: Duration = Duration::from_secs(10);

/// Between two looks at a pipe.
const PIPE_PAUSE: Duration = Duration::from_millis(2);

/// Bytes of a secret as it is handed over.
const MAX_SECRET: usize = 64 << 10;

/// A text that is not shown, and is wiped when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretText(String);

impl SecretText {
    fn into_bytes(mut self) -> SecretBytes {
        SecretBytes::new(std::mem::take(&mut self.0).into_bytes())
    }
}

impl Drop for SecretText {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl std::fmt::Debug for SecretText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SecretText(…)")
    }
}

impl Qapi for SecretText {
    const KIND: Kind = String::KIND;

    fn parse(value: Value, at: &At<'_>) -> qmp::Result<Self> {
        String::parse(value, at).map(Self)
    }

    /// Never what it is.
    fn to_value(&self) -> Value {
        Value::Null
    }

    fn define(collector: &mut Collector) -> Definition {
        String::define(collector)
    }

    fn type_ref(collector: &mut Collector) -> TypeRef {
        String::type_ref(collector)
    }
}
