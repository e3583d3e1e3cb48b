//! Other passphrases for a disk that is in use (QEMU: amend). The disk's key stays what it is.
//!
//! | step | a crash behind it leaves |
//! |---|---|
//! | a slot is filled: its material, flush | the slots that there were; one that was overwritten opens nothing, and is never the only one |
//! | then the header, flush | the new slot too |
//! | slots are erased: the header, flush | the slots that are left; the material of the others is still there |
//! | then noise over their material, flush | – |
//!
//! Keys are derived between two steps inside the graph. Before each, the header has to be what it was: other programs may
//! change it where no locks keep them off.

use std::any::Any;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};
use std::time::Duration;

use super::create::put;
use super::{Luks, LuksOptions};
use crate::base::{ByteRange, Error, Result, ResultExt};
use crate::codec::SecretBytes;
use crate::codec::luks::{Header, v1};
use crate::codec::secret::Secret;
use crate::drivers::keys::{fetch, filled, read_material, secret, unlock};
use crate::graph::{AmendRequest, Amending, Child, IoCx};
use crate::rt::{blocking_long, random};

/// A change of key slots.
#[derive(Clone, Debug)]
pub struct KeyChange {
    /// A slot is filled, else slots are erased.
    pub activates: bool,
    /// What will open the disk.
    pub new: Option<Secret>,
    /// The slots that this opens are erased.
    pub old: Option<Secret>,
    /// The slot, less than [`KeyChange::SLOTS`].
    pub slot: Option<usize>,
    /// How long one try of the new passphrase takes on this machine.
    pub time: Option<Duration>,
    /// What opens the disk now; what opened the node, if absent.
    pub secret: Option<Secret>,
}

impl KeyChange {
    /// Slots that a disk has.
    pub const SLOTS: usize = v1::SLOTS;

    /// Members that belong to the other kind of change.
    fn check(&self) -> Result<()> {
        let refused = match (self.activates, &self.new, &self.old, self.time, self.slot) {
            (true, None, ..) => "'new-secret' is required to activate a keyslot",
            (true, .., Some(Duration::ZERO), _) => "'iter-time' must not be 0",
            (true, _, Some(_), ..) => "'old-secret' must not be given when activating keyslots",
            (false, Some(_), ..) => "'new-secret' must not be given when erasing keyslots",
            (false, _, _, Some(_), _) => "'iter-time' must not be given when erasing keyslots",
            (false, _, None, _, None) => "Either 'keyslot' or 'old-secret' says which keyslots are erased",
            _ => return Ok(()),
        };
        Err(Error::new(refused))
    }
}

/// What is written next, once it has been found out outside of the graph.
struct Found {
    turn: Turn,
    /// What it was found from.
    before: v1::Header,
    what: What,
}

enum What {
    Fill { index: usize, header: Box<v1::Header>, material: SecretBytes },
    Erase(Vec<usize>),
}

impl Luks {
    /// Deriving takes long: it is asked for, and the slots are changed when this is called again with what came of it.
    pub(super) async fn change_keys(
        &self,
        own: &LuksOptions,
        cx: IoCx<'_>,
        change: &KeyChange,
        request: AmendRequest<'_>,
    ) -> Result<Amending> {
        let keeper = cx.child(self.header_in.unwrap_or(self.file));
        if let Some(found) = request.done {
            let found = found.downcast::<Found>().expect("it is what was asked for");
            let Found { turn, before, what } = *found;
            let mut slots = self.slots(keeper).await?;
            if slots.header != before {
                return Err(changed_elsewhere());
            }
            match what {
                What::Fill { index, header, material } => slots.fill(index, *header, &material).await?,
                What::Erase(erased) => slots.erase(&erased, request.force).await?,
            }
            drop(turn);
            return Ok(Amending::Done);
        }
        change.check()?;
        let turn = Turn::take(&self.changing)?;
        let mut slots = self.slots(keeper).await?;
        if let (false, Some(slot), None) = (change.activates, change.slot, &change.old) {
            slots.erase_one(slot, request.force).await?;
            return Ok(Amending::Done);
        }
        let (before, material) = (slots.header.clone(), slots.all_material().await?);
        let work: Pin<Box<dyn Future<Output = Result<What>>>> = if change.activates {
            let opens = match (&change.secret, &own.key_secret) {
                (Some(given), _) => given.clone(),
                (None, id) => secret(request.objects, id.as_deref().unwrap_or_default())?,
            };
            Box::pin(filling(before.clone(), slots.to_fill(change, request.force)?, opens, change.clone(), material))
        } else {
            Box::pin(erasing(before.clone(), change.clone(), material))
        };
        Ok(Amending::After(Box::pin(async move {
            let what = work.await?;
            Ok(Box::new(Found { turn, before, what }) as Box<dyn Any + Send>)
        })))
    }

    /// The slots as the file has them, which is as they were when it was last looked at.
    async fn slots<'s>(&'s self, keeper: Child<'s>) -> Result<Slots<'s>> {
        let Header::V1(known) = self.header().clone() else {
            return Err(Error::new("The key slots of LUKS2 cannot be changed yet"));
        };
        let bytes = fetch(keeper, ByteRange::whole(v1::LEN as u64)).await.doing(|| "Could not read the header")?;
        let header = v1::Header::parse(&bytes, keeper.size(), self.header_in.is_some());
        let header = header.map_err(|_| changed_elsewhere())?;
        // Of a change of ours that failed nobody knows how much was done.
        if header != known && !self.is_unsure.load(Acquire) {
            return Err(changed_elsewhere());
        }
        Ok(Slots { image: self, keeper, header })
    }
}

fn changed_elsewhere() -> Error {
    Error::new(
        "The header has been changed by somebody else since the node was added: remove the node, and add it again",
    )
}

/// Finds the disk's key, and hides it in a slot.
async fn filling(
    before: v1::Header,
    index: usize,
    opens: Secret,
    change: KeyChange,
    material: Vec<SecretBytes>,
) -> Result<What> {
    let (_, unlocked) = unlock(Header::V1(before.clone()), opens, material).await?;
    let new = change.new.ok_or_else(|| Error::new("There is no new secret"))?;
    let (header, material) = filled(before, index, new, unlocked.key, change.time.unwrap_or(TIME)).await?;
    Ok(What::Fill { index, header: Box::new(header), material })
}

/// Finds the slots that the old secret opens.
async fn erasing(before: v1::Header, change: KeyChange, material: Vec<SecretBytes>) -> Result<What> {
    let old = change.old.ok_or_else(|| Error::new("There is no old secret"))?;
    let active = active(&before);
    if let Some(slot) = change.slot.filter(|slot| !active.contains(slot)) {
        return Err(Error::new(format!("Keyslot {slot} is not in use")));
    }
    let tried = blocking_long(move || {
        let mut opened = Vec::new();
        for (index, material) in active.into_iter().zip(material) {
            if before.try_slot(index, old.bytes(), material)?.is_some() {
                opened.push(index);
            }
        }
        Ok::<_, Error>(opened)
    });
    let mut opened = tried.await?;
    opened.retain(|index| change.slot.is_none_or(|slot| slot == *index));
    if opened.is_empty() {
        return Err(Error::new("The old secret opens no keyslot that could be erased"));
    }
    Ok(What::Erase(opened))
}

fn active(header: &v1::Header) -> Vec<usize> {
    let slots = header.slots();
    (0..v1::SLOTS).filter(|index| slots[*index].is_active).collect()
}

/// The header, as it stands in the file, and where that is.
struct Slots<'g> {
    image: &'g Luks,
    keeper: Child<'g>,
    header: v1::Header,
}

impl Slots<'_> {
    /// The slot that is filled.
    fn to_fill(&self, change: &KeyChange, force: bool) -> Result<usize> {
        let active = active(&self.header);
        let free = (0..v1::SLOTS).find(|index| !active.contains(index));
        let index = change.slot.or(free).ok_or_else(|| Error::new("All keyslots are in use"))?;
        if active.contains(&index) && !force {
            return Err(Error::new(format!("Keyslot {index} is in use: it has to be erased first")));
        }
        // Half-way through, nothing would open the disk.
        if active == [index] {
            return Err(Error::new(format!(
                "Keyslot {index} is the only one in use: fill another one first, and erase this one then"
            )));
        }
        Ok(index)
    }

    async fn fill(&mut self, index: usize, header: v1::Header, material: &SecretBytes) -> Result<()> {
        let doing = || format!("Could not write keyslot {index}");
        put(self.keeper, header.material(index).start(), material.expose()).await.doing(doing)?;
        self.keeper.flush().await.doing(doing)?;
        self.write(header).await
    }

    /// One that is erased already may have material that could not be overwritten then.
    async fn erase_one(&mut self, slot: usize, force: bool) -> Result<()> {
        match active(&self.header).contains(&slot) {
            true => self.erase(&[slot], force).await,
            false => self.overwrite(&[slot]).await,
        }
    }

    async fn erase(&mut self, erased: &[usize], force: bool) -> Result<()> {
        if erased.len() == active(&self.header).len() && !force {
            let text = "No keyslot would be left, and the disk would be lost for good: this needs 'force'";
            return Err(Error::new(text));
        }
        let mut header = self.header.clone();
        erased.iter().for_each(|index| header.clear(*index));
        self.write(header).await?;
        self.overwrite(erased).await
    }

    /// Noise over the material of slots that are not in use any more.
    async fn overwrite(&self, erased: &[usize]) -> Result<()> {
        for index in erased {
            let at = self.header.material(*index);
            let mut noise = SecretBytes::zeroed(usize::try_from(at.len()).unwrap_or(0));
            let doing =
                || format!("Keyslot {index} is erased, and its material could not be overwritten: erase it once more");
            random(noise.expose_mut()).doing(doing)?;
            put(self.keeper, at.start(), noise.expose()).await.doing(doing)?;
        }
        self.keeper
            .flush()
            .await
            .doing(|| "The keyslots are erased, and their material may not be: erase them once more")
    }

    /// Of the slots that are in use.
    async fn all_material(&self) -> Result<Vec<SecretBytes>> {
        read_material(self.keeper, 0, &Header::V1(self.header.clone())).await
    }

    async fn write(&mut self, header: v1::Header) -> Result<()> {
        let doing = || "Could not write the header, which may be changed all the same";
        // What failed may be there all the same: the next change goes on from what is found.
        self.image.is_unsure.store(true, Release);
        put(self.keeper, 0, &header.to_bytes()).await.doing(doing)?;
        self.keeper.flush().await.doing(doing)?;
        self.image.is_unsure.store(false, Release);
        *self.image.header() = Header::V1(header.clone());
        self.header = header;
        Ok(())
    }
}

/// One change at a time.
struct Turn(Arc<AtomicBool>);

impl Turn {
    fn take(changing: &Arc<AtomicBool>) -> Result<Self> {
        if changing.swap(true, AcqRel) {
            return Err(Error::new("The key slots are being changed already"));
        }
        Ok(Self(changing.clone()))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.store(false, Release);
    }
}

/// As long as a new image's.
const TIME: Duration = Duration::from_secs(2);
