//! The key slots of an open image (LUKS1): other passphrases for a disk that is in use (QEMU: amend). The disk's key stays
//! what it is.
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
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{fetch, filled, put, read_material, unlock};
use crate::base::{ByteRange, Error, IoError, Result, ResultExt};
use crate::codec::SecretBytes;
use crate::codec::luks::{Budget, Header, v1};
use crate::codec::secret::Secret;
use crate::graph::{Amending, Child};
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
    /// Also what makes data unreadable for good.
    pub force: bool,
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

/// Where a header of LUKS1 is in the file that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Home {
    /// Where it begins.
    pub start: u64,
    /// Bytes for it and the material of its slots; `None`: up to the end of the file.
    pub len: Option<u64>,
    /// The payload is elsewhere.
    pub detached: bool,
}

/// The key slots of an open image.
#[derive(Debug)]
pub struct KeyRing {
    header: Mutex<Header>,
    home: Home,
    /// Somebody is changing them.
    changing: Arc<AtomicBool>,
    /// The header could not be written: the file may have either.
    is_unsure: AtomicBool,
}

impl KeyRing {
    /// Of an image that has this header.
    pub fn new(header: Header, home: Home) -> Self {
        Self { header: Mutex::new(header), home, changing: Arc::default(), is_unsure: AtomicBool::new(false) }
    }

    /// The header as it stands in the file. Never held while anything is waited for.
    pub fn header(&self) -> MutexGuard<'_, Header> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes key slots, in the file that has them. `opened` is what opened the image. Deriving takes long: it is asked for,
    /// and the slots are changed when this is called again with what came of it, in `done`.
    pub async fn change(
        &self,
        keeper: Child<'_>,
        change: &KeyChange,
        opened: impl FnOnce() -> Result<Secret>,
        done: Option<Box<dyn Any + Send>>,
    ) -> Result<Amending> {
        if let Some(found) = done {
            let found = found.downcast::<Found>().expect("it is what was asked for");
            let Found { turn, before, what } = *found;
            let mut slots = self.slots(keeper).await?;
            if slots.header != before {
                return Err(changed_elsewhere());
            }
            match what {
                What::Fill { index, header, material } => slots.fill(index, *header, &material).await?,
                What::Erase(erased) => slots.erase(&erased, change.force).await?,
            }
            drop(turn);
            return Ok(Amending::Done);
        }
        change.check()?;
        let turn = Turn::take(&self.changing)?;
        let mut slots = self.slots(keeper).await?;
        if let (false, Some(slot), None) = (change.activates, change.slot, &change.old) {
            slots.erase_one(slot, change.force).await?;
            return Ok(Amending::Done);
        }
        let (before, material) = (slots.header.clone(), slots.all_material().await?);
        let work: Pin<Box<dyn Future<Output = Result<What>>>> = if change.activates {
            let opens = change.secret.clone().map_or_else(opened, Ok)?;
            Box::pin(filling(before.clone(), slots.to_fill(change)?, opens, change.clone(), material))
        } else {
            Box::pin(erasing(before.clone(), change.clone(), material))
        };
        Ok(Amending::After(Box::pin(async move {
            let what = work.await?;
            Ok(Box::new(Found { turn, before, what }) as Box<dyn Any + Send>)
        })))
    }

    /// The same where nobody else uses the file, and waits for none of it.
    pub async fn change_alone(&self, keeper: Child<'_>, change: &KeyChange) -> Result<()> {
        let opened = || Err(Error::new("What opens the image now has to be given"));
        match self.change(keeper, change, opened, None).await? {
            Amending::Done => Ok(()),
            Amending::After(work) => {
                let found = work.await?;
                self.change(keeper, change, opened, Some(found)).await.map(|_| ())
            }
        }
    }

    /// The slots as the file has them, which is as they were when it was last looked at.
    async fn slots<'s>(&'s self, keeper: Child<'s>) -> Result<Slots<'s>> {
        let Header::V1(known) = self.header().clone() else {
            return Err(Error::new("The key slots of LUKS2 cannot be changed yet"));
        };
        let Home { start, len, detached } = self.home;
        let doing = || "Could not read the header";
        let at = ByteRange::new(start, v1::LEN as u64).ok_or(IoError::OutOfRange).doing(doing)?;
        let bytes = fetch(keeper, at).await.doing(doing)?;
        let header = v1::Header::parse(&bytes, len.unwrap_or(keeper.size()), detached);
        let header = header.map_err(|_| changed_elsewhere())?;
        // Of a change of ours that failed nobody knows how much was done.
        if header != known && !self.is_unsure.load(Acquire) {
            return Err(changed_elsewhere());
        }
        Ok(Slots { ring: self, keeper, header })
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
        let fitting = Header::V1(before).fitting(old.bytes(), material, &Budget::default())?;
        Ok::<_, Error>(fitting.into_iter().map(|unlocked| unlocked.slot).collect::<Vec<_>>())
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
    ring: &'g KeyRing,
    keeper: Child<'g>,
    header: v1::Header,
}

impl Slots<'_> {
    /// The slot that is filled.
    fn to_fill(&self, change: &KeyChange) -> Result<usize> {
        let active = active(&self.header);
        let free = (0..v1::SLOTS).filter(|index| !active.contains(index));
        let free = free.min_by_key(|index| self.check_room(*index).is_err());
        let index = change.slot.or(free).ok_or_else(|| Error::new("All keyslots are in use"))?;
        if active.contains(&index) && !change.force {
            return Err(Error::new(format!("Keyslot {index} is in use: it has to be erased first")));
        }
        // Half-way through, nothing would open the disk.
        if active == [index] {
            return Err(Error::new(format!(
                "Keyslot {index} is the only one in use: fill another one first, and erase this one then"
            )));
        }
        self.check_room(index)?;
        Ok(index)
    }

    /// Slots that are not in use may say that they are anywhere, even where guest data is: they have not been asked.
    fn check_room(&self, index: usize) -> Result<()> {
        let room = self.ring.home.len.unwrap_or(self.keeper.size());
        match self.header.material(index).end() <= room {
            true => Ok(()),
            false => Err(Error::new(format!("Keyslot {index} has no room in the header"))),
        }
    }

    async fn fill(&mut self, index: usize, header: v1::Header, material: &SecretBytes) -> Result<()> {
        self.check_room(index)?;
        let doing = || format!("Could not write keyslot {index}");
        self.put(header.material(index).start(), material.expose()).await.doing(doing)?;
        self.keeper.flush().await.doing(doing)?;
        self.write(header).await
    }

    /// One that is erased already may have material that could not be overwritten then.
    async fn erase_one(&mut self, slot: usize, force: bool) -> Result<()> {
        self.check_room(slot)?;
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
            self.put(at.start(), noise.expose()).await.doing(doing)?;
        }
        self.keeper
            .flush()
            .await
            .doing(|| "The keyslots are erased, and their material may not be: erase them once more")
    }

    /// Of the slots that are in use.
    async fn all_material(&self) -> Result<Vec<SecretBytes>> {
        read_material(self.keeper, self.ring.home.start, &Header::V1(self.header.clone())).await
    }

    /// Bytes that are so far behind the header's beginning.
    async fn put(&self, offset: u64, bytes: &[u8]) -> Result<(), IoError> {
        let start = self.ring.home.start.checked_add(offset).ok_or(IoError::OutOfRange)?;
        put(self.keeper, start, bytes).await
    }

    async fn write(&mut self, header: v1::Header) -> Result<()> {
        let doing = || "Could not write the header, which may be changed all the same";
        // What failed may be there all the same: the next change goes on from what is found.
        self.ring.is_unsure.store(true, Release);
        self.put(0, &header.to_bytes()).await.doing(doing)?;
        self.keeper.flush().await.doing(doing)?;
        self.ring.is_unsure.store(false, Release);
        *self.ring.header() = Header::V1(header.clone());
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
