//! Changing what an image is like while it is in use, as `x-blockdev-amend` has it: the key slots of encrypted disks.

use std::rc::Rc;
use std::time::Duration;

use qmp::Qapi;

use crate::base::{Error, Result};
use crate::codec::secret::Secret;
use crate::drivers::keys::{KeyChange, secret};
use crate::graph::{AmendRequest, Amending, Graph, JobCx, NodeId, Objects, PermSet, Perms};
use crate::port::{PORT, Port, PortOptions};
use crate::rt::Local;

/// What is to be changed.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(union, tag = "driver", tag_name = "BlockdevDriver")]
pub enum BlockdevAmendOptions {
    /// The key slots of an encrypted disk.
    #[qapi(rename = "luks")]
    Luks(QCryptoBlockAmendOptionsLuks),
    /// A qcow2 image: the key slots in it.
    #[qapi(rename = "qcow2")]
    Qcow2(BlockdevAmendOptionsQcow2),
}

/// A qcow2 image.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockdevAmendOptionsQcow2 {
    /// What becomes of its encryption; nothing if absent.
    pub encrypt: Option<QCryptoBlockAmendOptions>,
}

/// The encryption of a qcow2 image.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(union, tag = "format", tag_name = "QCryptoBlockFormat")]
pub enum QCryptoBlockAmendOptions {
    /// The key slots of the LUKS header in it.
    Luks(QCryptoBlockAmendOptionsLuks),
}

/// The key slots of an encrypted disk (LUKS1).
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "QCryptoBlockAmendOptionsLUKS")]
pub struct QCryptoBlockAmendOptionsLuks {
    /// Whether slots are to open the disk, or not any more.
    pub state: QCryptoBlockLuksKeyslotState,
    /// The id of the secret that will open the disk. Needs `active`.
    pub new_secret: Option<String>,
    /// The id of a secret: the slots that it opens are erased. Needs `inactive`.
    pub old_secret: Option<String>,
    /// The slot, 0 to 7; if absent, one that is free, or those that `old-secret` opens.
    pub keyslot: Option<i64>,
    /// How long one try of the passphrase takes on this machine, in milliseconds; 2000 if absent. Needs `active`.
    pub iter_time: Option<i64>,
    /// The id of a secret that opens the disk now; the one that opened the node if absent.
    pub secret: Option<String>,
}

/// What becomes of a key slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "QCryptoBlockLUKSKeyslotState")]
pub enum QCryptoBlockLuksKeyslotState {
    /// It opens the disk.
    Active,
    /// It is erased.
    Inactive,
}

/// Changes the image of a node. Others use the node meanwhile.
pub async fn amend(graph: &Rc<Graph>, node: NodeId, options: BlockdevAmendOptions, force: bool) -> Result<()> {
    let (wanted, keys) = match options {
        BlockdevAmendOptions::Luks(own) => ("luks", Some(own)),
        BlockdevAmendOptions::Qcow2(own) => ("qcow2", own.encrypt.map(|QCryptoBlockAmendOptions::Luks(own)| own)),
    };
    let driver = super::info(graph, node).await.map(|info| info.driver).unwrap_or_default();
    if driver != wanted {
        return Err(Error::new(format!("The node's driver is '{driver}', not '{wanted}'")));
    }
    let Some(keys) = keys else { return Ok(()) };
    let change = keys.change(graph.objects(), force)?;
    let options =
        PortOptions { name: "a change of key slots".into(), perms: Perms { uses: PermSet::NONE, ..Perms::IDLE } };
    let port = Port::attach(&mut graph.permit(), node, options, Rc::new(|_| ())).await?;
    let mut job = port.handle().job(&Local::current());
    let result = steps(&mut job, graph, &change).await;
    port.detach(&mut graph.permit()).await;
    result
}

/// What takes long is done between the steps: whoever drains the node, or one below, waits for none of it.
async fn steps(job: &mut JobCx, graph: &Rc<Graph>, change: &KeyChange) -> Result<()> {
    let mut done = None;
    loop {
        let request = AmendRequest { options: change, objects: graph.objects(), done: done.take() };
        match job.step(async |cx| cx.child(PORT).amend(request).await).await? {
            Amending::Done => return Ok(()),
            Amending::After(work) => done = Some(work.await?),
        }
    }
}

impl QCryptoBlockAmendOptionsLuks {
    pub(super) fn change(&self, objects: &Objects, force: bool) -> Result<KeyChange> {
        let found = |id: &Option<String>| id.as_deref().map(|id| secret(objects, id)).transpose();
        let (new, old): (Option<Secret>, Option<Secret>) = (found(&self.new_secret)?, found(&self.old_secret)?);
        let milliseconds = |time| u64::try_from(time).map_err(|_| Error::new("'iter-time' must not be negative"));
        let slot = |slot: i64| {
            let valid = usize::try_from(slot).ok().filter(|slot| *slot < KeyChange::SLOTS);
            valid.ok_or_else(|| {
                Error::new(format!("There is no key slot {slot}: they are 0 to {}", KeyChange::SLOTS - 1))
            })
        };
        Ok(KeyChange {
            activates: self.state == QCryptoBlockLuksKeyslotState::Active,
            new,
            old,
            slot: self.keyslot.map(slot).transpose()?,
            time: self.iter_time.map(milliseconds).transpose()?.map(Duration::from_millis),
            secret: found(&self.secret)?,
            force,
        })
    }
}
