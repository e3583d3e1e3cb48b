//! Other passphrases for a disk that is in use (QEMU: amend). The disk's key stays what it is.
//!
//! | step | a crash behind it leaves |
//! |---|---|
//! | a slot is filled: its material, flush | the slots that there were; one that was overwritten opens nothing |
//! | then the header, flush | the new slot too |
//! | slots are erased: the header, flush | the slots that are left; the material of the others is still there |
//! | then noise over their material, flush | – |

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{AcqRel, Release};
use std::time::Duration;

use super::create::put;
use super::{Luks, LuksOptions};
use crate::base::{Error, Result, ResultExt};
use crate::codec::SecretBytes;
use crate::codec::luks::{Header, v1};
use crate::codec::secret::Secret;
use crate::drivers::keys::{filled, read_material, secret, unlock};
use crate::graph::{AmendRequest, Child, IoCx};
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
            (true, _, Some(_), ..) => "'old-secret' must not be given when activating keyslots",
            (false, Some(_), ..) => "'new-secret' must not be given when erasing keyslots",
            (false, _, _, Some(_), _) => "'iter-time' must not be given when erasing keyslots",
            (false, _, None, _, None) => "Either 'keyslot' or 'old-secret' says which keyslots are erased",
            _ => return Ok(()),
        };
        Err(Error::new(refused))
    }
}

impl Luks {
    pub(super) async fn change_keys(
        &self,
        own: &LuksOptions,
        cx: IoCx<'_>,
        change: &KeyChange,
        request: &AmendRequest<'_>,
    ) -> Result<()> {
        change.check()?;
        let _turn = Turn::take(&self.changing)?;
        let Header::V1(header) = self.header().clone() else {
            return Err(Error::new("The key slots of LUKS2 cannot be changed yet"));
        };
        let keeper = cx.child(self.header_in.unwrap_or(self.file));
        let mut slots = Slots { keeper, header };
        let changed = if change.activates {
            let opens = match (&change.secret, &own.key_secret) {
                (Some(given), _) => given.clone(),
                (None, id) => secret(request.objects, id.as_deref().unwrap_or_default())?,
            };
            slots.fill(change, opens, request.force).await
        } else {
            slots.erase(change, request.force).await
        };
        *self.header() = Header::V1(slots.header);
        changed
    }
}

/// The header, as it stands in the file, and where that is.
struct Slots<'g> {
    keeper: Child<'g>,
    header: v1::Header,
}

impl Slots<'_> {
    async fn fill(&mut self, change: &KeyChange, opens: Secret, force: bool) -> Result<()> {
        let slots = self.header.slots();
        let free = slots.iter().position(|slot| !slot.is_active);
        let index = change.slot.or(free).ok_or_else(|| Error::new("All keyslots are in use"))?;
        if slots[index].is_active && !force {
            return Err(Error::new(format!("Keyslot {index} is in use: it has to be erased first")));
        }
        let header = Header::V1(self.header.clone());
        let (_, unlocked) = unlock(header, opens, self.all_material().await?).await?;
        let new = change.new.clone().ok_or_else(|| Error::new("There is no new secret"))?;
        let time = change.time.unwrap_or(TIME);
        let (header, material) = filled(self.header.clone(), index, new, unlocked.key, time).await?;
        let doing = || format!("Could not write keyslot {index}");
        put(self.keeper, header.material(index).start(), material.expose()).await.doing(doing)?;
        self.keeper.flush().await.doing(doing)?;
        self.write(header).await
    }

    async fn erase(&mut self, change: &KeyChange, force: bool) -> Result<()> {
        let active: Vec<usize> = self.active();
        let erased = match (change.slot, &change.old) {
            (Some(slot), _) if !active.contains(&slot) => {
                return Err(Error::new(format!("Keyslot {slot} is not in use")));
            }
            (Some(slot), None) => vec![slot],
            (slot, Some(old)) => {
                let mut opened = self.opened_by(old).await?;
                opened.retain(|index| slot.is_none_or(|slot| slot == *index));
                opened
            }
            (None, None) => Vec::new(),
        };
        if erased.is_empty() {
            return Err(Error::new("The old secret opens no keyslot that could be erased"));
        }
        if erased.len() == active.len() && !force {
            let text = "No keyslot would be left, and the disk would be lost for good: this needs 'force'";
            return Err(Error::new(text));
        }
        let mut header = self.header.clone();
        erased.iter().for_each(|index| header.clear(*index));
        self.write(header).await?;
        for index in erased {
            let at = self.header.material(index);
            let mut noise = SecretBytes::zeroed(usize::try_from(at.len()).unwrap_or(0));
            let doing = || format!("Keyslot {index} is erased, and its material could not be overwritten");
            random(noise.expose_mut()).doing(doing)?;
            put(self.keeper, at.start(), noise.expose()).await.doing(doing)?;
        }
        self.keeper.flush().await.doing(|| "The keyslots are erased, and their material may not be")
    }

    fn active(&self) -> Vec<usize> {
        let slots = self.header.slots();
        (0..v1::SLOTS).filter(|index| slots[*index].is_active).collect()
    }

    async fn opened_by(&self, old: &Secret) -> Result<Vec<usize>> {
        let (header, active, old) = (self.header.clone(), self.active(), old.clone());
        let material = self.all_material().await?;
        let tried = blocking_long(move || {
            let mut opened = Vec::new();
            for (index, material) in active.into_iter().zip(material) {
                if header.try_slot(index, old.bytes(), material)?.is_some() {
                    opened.push(index);
                }
            }
            Ok(opened)
        });
        tried.await
    }

    /// Of the slots that are in use.
    async fn all_material(&self) -> Result<Vec<SecretBytes>> {
        read_material(self.keeper, 0, &Header::V1(self.header.clone())).await
    }

    async fn write(&mut self, header: v1::Header) -> Result<()> {
        let doing = || "Could not write the header";
        // What failed may be there all the same. The next change writes all of the header again, as it was told.
        put(self.keeper, 0, &header.to_bytes()).await.doing(doing)?;
        self.keeper.flush().await.doing(doing)?;
        self.header = header;
        Ok(())
    }
}

/// One change at a time.
struct Turn<'l>(&'l AtomicBool);

impl<'l> Turn<'l> {
    fn take(changing: &'l AtomicBool) -> Result<Self> {
        if changing.swap(true, AcqRel) {
            return Err(Error::new("The key slots are being changed already"));
        }
        Ok(Self(changing))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Release);
    }
}

/// As long as a new image's.
const TIME: Duration = Duration::from_secs(2);
