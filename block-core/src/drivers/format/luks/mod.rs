//! `luks`: an encrypted disk. What a header is and how keys are derived is in `codec/luks`; here headers are read from
//! children and written to them, and requests pass through the cipher.
//!
//! Requests go through a buffer of our own: see `pipeline/sealed.rs`. Other passphrases are the business of `drivers/keys`.
//!
//! | | |
//! |---|---|
//! | `options` `info` | what an operator says, and is told |
//! | `open` | reading a header, and deriving the key on a helper thread |
//! | `create` | a new image |

mod create;
mod info;
mod open;
mod options;

use crate::base::{ByteRange, Error, IoError, Result, SECTOR, align_down, is_aligned};
use crate::codec::cipher::SectorCipher;
use crate::codec::luks::Payload;
use crate::drivers::keys::{KeyChange, KeyRing, needed_secret};
use crate::graph::{
    AmendRequest, Amending, ChildId, Driver, DriverInfo, Extent, Geometry, IoCx, Limits, NodeOptions, Perms, Place,
    Preallocation, ReopenRequest, Role, WriteFlags,
};
use crate::pipeline::sealed;
use crate::rt::IoBuf;

pub use self::create::{CreateOptions, create};
pub use self::options::LuksOptions;

/// An open image.
pub struct Luks {
    file: ChildId,
    /// Where the header is, if not in the file.
    header_in: Option<ChildId>,
    keys: KeyRing,
    payload: Payload,
    /// `None`: nobody has said what opens it.
    cipher: Option<SectorCipher>,
}

impl Luks {
    /// Where in the file a range of the disk is.
    fn below(&self, at: ByteRange) -> Result<ByteRange, IoError> {
        at.shifted(self.payload.offset).ok_or(IoError::OutOfRange)
    }

    fn cipher(&self) -> Result<&SectorCipher, IoError> {
        self.cipher.as_ref().ok_or(IoError::Unsupported)
    }

    /// The number of the range's first sector, as the cipher counts them.
    fn number(&self, at: ByteRange) -> u64 {
        self.payload.first.wrapping_add(at.start() / SECTOR)
    }

    /// The file's size with a disk of `size` bytes in it.
    fn file_size(&self, size: u64) -> Result<u64> {
        if self.payload.size.is_some() {
            return Err(Error::new("The image says how large its disk is, and cannot be resized"));
        }
        let unit = u64::from(self.payload.unit);
        if !is_aligned(size, unit) {
            return Err(Error::new(format!("The size of this disk is a multiple of {unit} bytes")));
        }
        let size = ByteRange::new(self.payload.offset, size);
        size.map(ByteRange::end).ok_or_else(|| Error::new("The disk is too large for its place in the file"))
    }
}

impl Driver for Luks {
    type Conf = LuksOptions;

    fn geometry(&self, _: &LuksOptions, children: &[Geometry]) -> Result<Geometry> {
        let Payload { offset, size, unit, .. } = self.payload;
        let file = self.file.of(children);
        let room = file.size.checked_sub(offset).filter(|room| size.is_none_or(|size| size <= *room));
        let room = room.ok_or_else(|| Error::new("The file is too short for the disk that its header describes"))?;
        let limits = Limits {
            request_alignment: unit,
            max_transfer: PIECE,
            write_zeroes_alignment: unit,
            physical_block: file.limits.physical_block.max(unit),
            unmap_zeroes: false,
            discard: false,
            compressed_cluster: 0,
            ..file.limits.passed_on()
        };
        Ok(Geometry { size: size.unwrap_or(align_down(room, unit.into())), limits })
    }

    async fn read(&self, _: &LuksOptions, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        let (cipher, sealed) = (self.cipher()?, IoBuf::private(at.len())?);
        cx.child(self.file).read(self.below(at)?, sealed.clone()).await?;
        sealed::decrypt(cipher, self.number(at), &sealed, &buf);
        Ok(())
    }

    async fn write(
        &self,
        _: &LuksOptions,
        cx: IoCx<'_>,
        at: ByteRange,
        buf: IoBuf,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        let (cipher, sealed) = (self.cipher()?, IoBuf::private(at.len())?);
        sealed::encrypt(cipher, self.number(at), &buf, &sealed);
        cx.child(self.file).write(self.below(at)?, sealed, flags).await
    }

    /// Zeroes of the file are none of the disk.
    async fn write_zeroes(&self, _: &LuksOptions, _: IoCx<'_>, _: ByteRange, _: WriteFlags) -> Result<(), IoError> {
        Err(IoError::Unsupported)
    }

    /// Says nothing to the file: what it freed would read as noise, and show which parts of the disk are used.
    async fn discard(&self, _: &LuksOptions, _: IoCx<'_>, _: ByteRange) -> Result<(), IoError> {
        Ok(())
    }

    async fn flush(&self, _: &LuksOptions, cx: IoCx<'_>) -> Result<(), IoError> {
        cx.child(self.file).flush().await
    }

    async fn map(&self, _: &LuksOptions, _: IoCx<'_>, at: ByteRange) -> Result<Extent, IoError> {
        Ok(Extent { len: at.len(), place: Place::Encoded })
    }

    async fn truncate(&self, own: &LuksOptions, _: IoCx<'_>, size: u64, _: Preallocation) -> Result<LuksOptions> {
        self.file_size(size)?;
        Ok(own.clone())
    }

    /// What is new reads as noise: nothing has been encrypted there.
    fn passes_size(&self, _: &LuksOptions, size: u64) -> Result<Option<(ChildId, u64)>> {
        Ok(Some((self.file, self.file_size(size)?)))
    }

    /// A file without the header has nothing but the disk.
    fn child_perms(&self, _: &LuksOptions, child: ChildId, role: Role, above: Perms, writable: bool) -> Perms {
        let role = if child == self.file && self.header_in.is_some() { Role::Data } else { role };
        role.child_perms(above, writable)
    }

    async fn reopen(&self, own: &LuksOptions, request: ReopenRequest<'_>) -> Result<LuksOptions> {
        let new = request.options.downcast_ref::<LuksOptions>();
        let new = new.expect("the catalog reopens a driver with options of its kind");
        if new != own {
            return Err(Error::new("Cannot change the option 'key-secret'"));
        }
        Ok(own.clone())
    }

    async fn amend(&self, own: &LuksOptions, cx: IoCx<'_>, request: AmendRequest<'_>) -> Result<Amending> {
        let change = request.options.downcast_ref::<KeyChange>();
        let change = change.expect("the catalog amends a driver with options of its kind");
        let keeper = cx.child(self.header_in.unwrap_or(self.file));
        let opened = || needed_secret(request.objects, own.key_secret.as_deref());
        self.keys.change(keeper, change, opened, request.done).await
    }

    async fn set_active(&self, _: &LuksOptions, _: NodeOptions, _: Perms) -> Result<Option<LuksOptions>> {
        Err(Error::new("A luks node cannot be made inactive, or active again, yet"))
    }

    async fn info(&self, _: &LuksOptions) -> DriverInfo {
        self.described()
    }
}

/// The largest request, in bytes: other requests of the thread have their turn after so much.
const PIECE: u64 = 1 << 20;
