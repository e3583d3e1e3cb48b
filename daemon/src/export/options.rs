//! What `block-export-add` and `--export` take: QEMU's names, and two of ours that are marked as such.

use std::path::PathBuf;

use qmp::schema::Size;
use qmp::{Error, Qapi, Result};

use super::vhost_user::{Address, VhostUserOptions};

/// An export.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockExportOptions {
    /// What every export takes.
    #[qapi(flatten)]
    pub common: CommonOptions,
    /// How guests reach it.
    #[qapi(flatten)]
    pub kind: ExportKind,
}

/// What every export takes.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockExportOptionsBase")]
pub struct CommonOptions {
    /// The export's id.
    pub id: String,
    /// The node that it serves.
    pub node_name: String,
    /// Whether guests may write.
    #[qapi(default = false)]
    pub writable: bool,
    /// Whether every write is stable when it completes.
    #[qapi(default = false)]
    pub writethrough: bool,
    /// The IOThread of all its queues. Without it, and without `iothread-vq-mapping`, the export has a thread of its
    /// own.
    pub iothread: Option<String>,
    /// Accepted without effect: nodes are not bound to threads here, so nothing can move an export's.
    #[qapi(default = false)]
    pub fixed_iothread: bool,
    /// Refused where it is true: a guest cannot be served from an inactive node.
    #[qapi(default = false)]
    pub allow_inactive: bool,
}

/// How guests reach an export.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(union, tag = "type", tag_name = "BlockExportType")]
pub enum ExportKind {
    /// Over a vhost-user socket, as a virtio-blk device.
    VhostUserBlk(VhostUserBlkOptions),
}

/// A vhost-user-blk export.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockExportOptionsVhostUserBlk")]
pub struct VhostUserBlkOptions {
    /// Where guests connect: a unix socket that is made here, or a listening one that was passed to us.
    pub addr: ExportAddress,
    /// In bytes: a power of two, 512 to 2 MiB.
    #[qapi(default = Size(512))]
    pub logical_block_size: Size,
    /// How many queues a guest may use.
    #[qapi(default = 1)]
    pub num_queues: u16,
    /// An extension of ours: which IOThread serves which queues, as QEMU's virtio-blk device has it.
    pub iothread_vq_mapping: Option<Vec<VirtQueueMapping>>,
    /// An extension of ours: the serial number that a guest reads, at most 20 bytes.
    pub serial: Option<String>,
}

/// Queues of one IOThread.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "IOThreadVirtQueueMapping")]
pub struct VirtQueueMapping {
    /// The IOThread.
    pub iothread: String,
    /// Its queues. Either all entries have them, or none has: then queues are dealt out in turn.
    pub vqs: Option<Vec<u16>>,
}

/// Where a socket is.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(union, tag = "type", name = "SocketAddress", tag_name = "SocketAddressType")]
pub enum ExportAddress {
    /// TCP: refused.
    Inet(InetAddress),
    /// A path.
    Unix(UnixAddress),
    /// Virtio sockets: refused.
    Vsock(VsockAddress),
    /// A descriptor.
    Fd(FdAddress),
}

/// A TCP address.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "InetSocketAddress")]
pub struct InetAddress {
    /// The host.
    pub host: String,
    /// The port.
    pub port: String,
}

/// A unix socket's address.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "UnixSocketAddress")]
pub struct UnixAddress {
    /// The path.
    pub path: String,
    /// Refused where it is true: a socket that is no file lets everybody in.
    #[qapi(rename = "abstract", default = false)]
    pub is_abstract: bool,
    /// Without effect: it says how the name of an abstract socket is written.
    #[qapi(default = true)]
    pub tight: bool,
}

/// A virtio socket's address.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "VsockSocketAddress")]
pub struct VsockAddress {
    /// The context.
    pub cid: String,
    /// The port.
    pub port: String,
}

/// A descriptor that was passed to us.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "FdSocketAddress")]
pub struct FdAddress {
    /// Its number, or the name that systemd gave it.
    pub str: String,
}

impl VhostUserBlkOptions {
    /// The same for the server, with what no server could be made of refused.
    pub(super) fn for_server(&self, common: &CommonOptions) -> Result<VhostUserOptions> {
        let mut options = VhostUserOptions::new(&common.id, self.addr.for_server()?);
        options.writable = common.writable;
        options.writethrough = common.writethrough;
        options.num_queues = self.num_queues;
        options.logical_block_size = u32::try_from(self.logical_block_size.0)
            .map_err(|_| Error::generic("parameter logical-block-size must be a power of 2 between 512 and 2097152"))?;
        if let Some(serial) = &self.serial {
            options.serial.clone_from(serial);
        }
        Ok(options)
    }
}

impl ExportAddress {
    fn for_server(&self) -> Result<Address> {
        match self {
            Self::Unix(UnixAddress { is_abstract: true, .. }) => {
                Err(Error::generic("An abstract socket would be open to everybody: use a path"))
            }
            Self::Unix(UnixAddress { path, is_abstract: false, tight: _ }) => Ok(Address::Unix(PathBuf::from(path))),
            Self::Fd(FdAddress { str: word }) => Ok(Address::Fd(word.clone())),
            Self::Inet(_) | Self::Vsock(_) => {
                Err(Error::generic("Only socket address types 'unix' and 'fd' are supported"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use qmp::keyval::parse_option;
    use serde_json::json;

    use super::*;

    fn read(text: &str) -> Result<BlockExportOptions> {
        parse_option(text, Some("type"))?.into_typed()
    }

    #[test]
    fn keyval_and_json_make_the_same_options() {
        let keyval = read(
            "vhost-user-blk,id=e0,node-name=n0,addr.type=unix,addr.path=/run/e0.sock,writable=on,num-queues=2,logical-block-size=4k,\
             iothread-vq-mapping.0.iothread=io0,iothread-vq-mapping.0.vqs.0=1,serial=abc",
        );
        let json = json!({
            "type": "vhost-user-blk", "id": "e0", "node-name": "n0", "writable": true, "num-queues": 2,
            "addr": { "type": "unix", "path": "/run/e0.sock" }, "serial": "abc", "logical-block-size": 4096,
            "iothread-vq-mapping": [{ "iothread": "io0", "vqs": [1] }],
        });
        assert_eq!(keyval.unwrap(), qmp::schema::from_value(json).unwrap());
    }

    #[test]
    fn addresses_that_guests_cannot_reach_are_refused() {
        let options = read("vhost-user-blk,id=e0,node-name=n0,addr.type=inet,addr.host=::,addr.port=1").unwrap();
        let ExportKind::VhostUserBlk(own) = options.kind;
        let refused = own.for_server(&options.common).unwrap_err();
        assert_eq!(refused.desc, "Only socket address types 'unix' and 'fd' are supported");
        let open = "vhost-user-blk,id=e0,node-name=n0,addr.type=unix,addr.path=x,addr.tight=on,addr.abstract=";
        let on = |switch: &str| {
            let options = read(&format!("{open}{switch}")).unwrap();
            let ExportKind::VhostUserBlk(own) = options.kind;
            own.for_server(&options.common)
        };
        assert!(on("off").is_ok());
        assert!(on("on").unwrap_err().desc.contains("everybody"));
        let unknown = read("fuse,id=e0,node-name=n0").unwrap_err();
        assert_eq!(unknown.desc, "Parameter 'type' does not accept value 'fuse'");
    }
}
