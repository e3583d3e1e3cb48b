//! The registry: one line a driver. From it come the driver's name in QMP, its branch of [`BlockdevOptions`], how it
//! is opened and reopened, and its place in the test suites that go through all drivers.
//!
//! `options` is what all nodes accept, `add` opens trees of nodes, `reopen` changes options, `describe` answers queries,
//! `probe` is for tools that open what they are pointed at.

mod add;
mod amend;
mod children;
mod create;
mod describe;
mod luks;
mod options;
pub mod probe;
mod reopen;
mod secret;

use std::any::Any;
use std::borrow::Cow;

use qmp::Qapi;
use qmp::schema::Union;

use self::add::{Header, Opening};
use self::children::{ChildMember, Defined, GivenChild};
use self::reopen::Reopening;
use crate::base::Result;
use crate::drivers::filter::blkdebug::BlkdebugOptions;
use crate::drivers::filter::blklogwrites::BlkLogWritesOptions;
use crate::drivers::filter::blkreplay::BlkReplayOptions;
use crate::drivers::filter::blkverify::BlkVerifyOptions;
use crate::drivers::filter::compress::CompressOptions;
use crate::drivers::filter::copy_before_write::CopyBeforeWriteOptions;
use crate::drivers::filter::copy_on_read::CopyOnReadOptions;
use crate::drivers::filter::preallocate::PreallocateOptions;
use crate::drivers::filter::quorum::QuorumOptions;
use crate::drivers::filter::snapshot_access::SnapshotAccessOptions;
use crate::drivers::filter::throttle::ThrottleOptions;
use crate::drivers::format::luks::LuksOptions;
use crate::drivers::format::qcow2::Qcow2Options;
use crate::drivers::format::raw::RawOptions;
use crate::drivers::protocol::file::{FileOptions, HostDeviceOptions};
use crate::drivers::protocol::null::{NullAioOptions, NullOptions};
use crate::graph::{NodeOptions, Role};

pub use self::add::{add, add_unnamed, add_withheld};
pub use crate::drivers::format::qcow2::AmendOptions;

pub use self::amend::{
    BlockdevAmendOptions, BlockdevAmendOptionsQcow2, QCryptoBlockAmendOptions, QCryptoBlockAmendOptionsLuks,
    QCryptoBlockLuksKeyslotState, amend,
};
pub use self::create::{
    BlockdevCreateOptions, BlockdevCreateOptionsFile, BlockdevCreateOptionsLuks, BlockdevCreateOptionsQcow2,
    Measurement, PreallocMode, QCryptoBlockCreateOptions, Qcow2CompressionType, Qcow2Version, amend_image, create,
    measure,
};
pub use self::describe::info;
pub use self::luks::{LuksCreateOptions, QCryptoCipherAlgo, QCryptoCipherMode, QCryptoHashAlgo, QCryptoIvGenAlgo};
pub use self::options::{
    BlockdevOptions, BlockdevRef, BlockdevRefOrNull, CacheOptions, CommonOptions, DetectZeroesOption, DiscardOption,
    MAX_DEPTH, is_identifier,
};
pub use self::reopen::{reopen, reopen_steps};
pub use self::secret::{SecretFormat, SecretKeyringOptions, SecretOptions, SecretText};

/// The names of all drivers, as QMP has them.
pub fn drivers() -> &'static [&'static str] {
    DriverOptions::TAGS
}

/// A line is `"name" Variant(Branch): Options { child: Type = Role, … }`; the children are members of the branch, of
/// one of the types that [`ChildMember`] knows, and get their edges in this order.
macro_rules! drivers {
    ($(
        $(#[$doc:meta])*
        $name:literal $variant:ident($branch:ident): $own:ident { $($(#[$child_doc:meta])* $child:ident: $type:ty = $role:ident),* }
    )*) => {
        /// What a node accepts besides the common options, by driver.
        #[derive(Clone, Debug, PartialEq, Qapi)]
        #[qapi(union, tag = "driver", tag_name = "BlockdevDriver")]
        pub enum DriverOptions {
            $($(#[$doc])* #[qapi(rename = $name)] $variant($branch),)*
        }

        $(
            $(#[$doc])*
            #[derive(Clone, Debug, PartialEq, Qapi)]
            pub struct $branch {
                $($(#[$child_doc])* pub $child: $type,)*
                /// The driver's own options.
                #[qapi(flatten)]
                pub own: $own,
            }
        )*

        impl DriverOptions {
            /// The children that are given, in the order in which they get their edges.
            fn children(&self) -> Vec<GivenChild<'_>> {
                match self {
                    $(Self::$variant(_branch) => {
                        let members: Vec<Vec<GivenChild<'_>>> =
                            vec![$(_branch.$child.given(stringify!($child), Role::$role)),*];
                        members.into_iter().flatten().collect()
                    })*
                }
            }

            /// The nodes that are defined in this one, by the edges that lead to them.
            pub fn defined(&mut self) -> Vec<(Cow<'static, str>, &mut BlockdevOptions)> {
                match self {
                    $(Self::$variant(_branch) => {
                        let members: Vec<Vec<Defined<'_>>> = vec![$(_branch.$child.defined(stringify!($child))),*];
                        members.into_iter().flatten().collect()
                    })*
                }
            }

            /// Opens a node, its children first.
            async fn open(&self, opening: &mut Opening, header: Header) -> Result<()> {
                match self {
                    $(Self::$variant(branch) => {
                        opening.node(header, &self.children(), &branch.own).await
                    })*
                }
            }

            /// Collects what a reopen of the node that `reopening` is at asks of it and of its inline children.
            fn reopen(&self, reopening: &mut Reopening, common: NodeOptions) -> Result<Box<dyn Any + Send>> {
                match self {
                    $(Self::$variant(branch) => {
                        reopening.children(common, &self.children())?;
                        Ok(Box::new(branch.own.clone()))
                    })*
                }
            }
        }
    };
}

drivers! {
    /// A regular file of the host.
    "file" File(FileNode): FileOptions {}
    /// A block device of the host.
    "host_device" HostDevice(HostDeviceNode): HostDeviceOptions {}
    /// A disk of nothing.
    "null-co" NullCo(NullCoNode): NullOptions {}
    /// A disk of nothing, under QEMU's other name for it.
    "null-aio" NullAio(NullAioNode): NullAioOptions {}
    /// The bytes of a file as they are.
    "raw" Raw(RawNode): RawOptions {
        /// Where the bytes are.
        file: BlockdevRef = Data
    }
    /// An encrypted disk.
    "luks" Luks(LuksNode): LuksOptions {
        /// The image; where the header is elsewhere, the disk alone.
        file: BlockdevRef = Metadata,
        /// Where the header is, if it is not in the image.
        header: Option<BlockdevRef> = Metadata
    }
    /// A disk in a file that grows with what is written to it.
    "qcow2" Qcow2(Qcow2Node): Qcow2Options {
        /// The image.
        file: BlockdevRef = Metadata,
        /// Where guest data is, for an image that keeps it in another file.
        data_file: Option<BlockdevRef> = Data,
        /// What the image stands on. It has to be given where the image names a backing file: no file is opened because an
        /// image names it.
        backing: Option<BlockdevRefOrNull> = Cow
    }
    /// Keeps what its child had, by copying what is about to be overwritten.
    "copy-before-write" CopyBeforeWrite(CopyBeforeWriteNode): CopyBeforeWriteOptions {
        /// Where requests go.
        file: BlockdevRef = Filtered,
        /// Where old contents go; at least as large.
        target: BlockdevRef = Data
    }
    /// A view of the snapshot that the node below keeps.
    "snapshot-access" SnapshotAccess(SnapshotAccessNode): SnapshotAccessOptions {
        /// The node that keeps it: a `copy-before-write`.
        file: BlockdevRef = Data
    }
    /// Requests wait for the limits of a group.
    "throttle" Throttle(ThrottleNode): ThrottleOptions {
        /// Where requests go.
        file: BlockdevRef = Filtered
    }
    /// What is read from below the upper layer is copied into it.
    "copy-on-read" CopyOnRead(CopyOnReadNode): CopyOnReadOptions {
        /// Where requests go.
        file: BlockdevRef = Filtered,
        /// What lies below this node is not copied.
        bottom: Option<String> = Reference
    }
    /// A file that grows by writing gets space ahead of the writer.
    "preallocate" Preallocate(PreallocateNode): PreallocateOptions {
        /// Where requests go: a file.
        file: BlockdevRef = Filtered
    }
    /// Every write is stored compressed.
    "compress" Compress(CompressNode): CompressOptions {
        /// Where requests go: a format that can store compressed data.
        file: BlockdevRef = Filtered
    }
    /// A filter for tests: it makes requests fail, wait, or come in odd pieces.
    "blkdebug" Blkdebug(BlkdebugNode): BlkdebugOptions {
        /// Where requests go.
        image: BlockdevRef = Filtered
    }
    /// Copies of one disk, which vote.
    "quorum" Quorum(QuorumNode): QuorumOptions {
        /// The copies, of one size.
        children: Vec<BlockdevRef> = Data
    }
    /// A filter for tests: it logs what is written.
    "blklogwrites" BlkLogWrites(BlkLogWritesNode): BlkLogWritesOptions {
        /// Where requests go.
        file: BlockdevRef = Filtered,
        /// Where the log is; as large as the log may become.
        log: BlockdevRef = Metadata
    }
    /// A filter for tests: requests end in an order that a number decides.
    "blkreplay" BlkReplay(BlkReplayNode): BlkReplayOptions {
        /// Where requests go.
        image: BlockdevRef = Filtered
    }
    /// A filter for tests: two disks that have to agree.
    "blkverify" BlkVerify(BlkVerifyNode): BlkVerifyOptions {
        /// The disk under test.
        test: BlockdevRef = Data,
        /// A disk that is known to be right.
        raw: BlockdevRef = Filtered
    }
}
