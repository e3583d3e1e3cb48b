//! `snapshot`: internal snapshots of an image are listed, taken, deleted and applied.

use std::time::{SystemTime, UNIX_EPOCH};

use block_core::graph::{NewSnapshot, SnapshotInfo, SnapshotName, TakeSnapshot};
use serde_json::{Value, json};
use trellis_image::args::{Args, Definition, flag, option};
use trellis_image::pairs::Pairs;
use trellis_image::{Failure, Given, Image, Outcome, Session, local_time, say, words};

use super::common::{FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, QUIET, closed, given, objects, one_image, open};
use crate::output::size;

pub(super) const DEFINITION: Definition = Definition {
    name: "snapshot",
    about: "Lists, takes, applies and deletes internal snapshots of an image",
    options: &[
        QUIET,
        FORMAT,
        IMAGE_OPTS,
        FORCE_SHARE,
        OBJECT,
        flag('l', "list", "list all snapshots (the default)"),
        option('c', "create", "SNAPSHOT", "take a snapshot of this name"),
        option('a', "apply", "SNAPSHOT", "make the disk what it was; what it is now is lost"),
        option('d', "delete", "SNAPSHOT", "delete a snapshot"),
    ],
    words: "FILENAME",
};

/// What is to be done.
enum Act<'a> {
    List,
    Create(&'a str),
    Apply(&'a str),
    Delete(&'a str),
}

pub(super) async fn run(session: &Session, args: Args) -> Outcome {
    let acts: Vec<_> = args
        .given()
        .filter_map(|(id, name)| match id {
            "list" => Some(Act::List),
            "create" => Some(Act::Create(name)),
            "apply" => Some(Act::Apply(name)),
            "delete" => Some(Act::Delete(name)),
            _ => None,
        })
        .collect();
    if acts.len() > 1 {
        return Err(Failure::usage("Cannot mix '-l', '-a', '-c', '-d'"));
    }
    let word = one_image(&args)?;
    let act = acts.first().unwrap_or(&Act::List);
    let writable = !matches!(act, Act::List);
    let given = Given { writable, resizes: writable, ..given(&args, word)? };
    objects(session, &args).await?;
    let image = open(session, &given).await?;
    let result = match act {
        Act::List => {
            let all: Vec<_> = image.snapshots().unwrap_or_default().iter().map(described).collect();
            if !all.is_empty() {
                say(&listed(&all));
            }
            Ok(0)
        }
        Act::Create(name) => create(&image, name).await,
        Act::Apply(name) => apply(&image, name).await,
        Act::Delete(name) => delete(&image, name).await,
    };
    closed(image, result).await
}

async fn create(image: &Image, name: &str) -> Outcome {
    let doing = format!("Could not create snapshot '{name}'");
    if image.snapshots().is_none() {
        return Err(Failure::new(format!("{doing}: Operation not supported")));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // Like qemu-img, which counts in microseconds.
    let date = (u32::try_from(now.as_secs()).unwrap_or(u32::MAX), now.subsec_micros() * 1000);
    let step = TakeSnapshot::step(image.node, NewSnapshot { name: name.to_owned(), date });
    image.graph().permit().transact(vec![step]).await.map_err(|error| Failure::of(doing, &error))?;
    Ok(0)
}

async fn apply(image: &Image, name: &str) -> Outcome {
    let doing = format!("Could not apply snapshot '{name}'");
    let Some(all) = image.snapshots() else {
        return Err(Failure::new(format!("{doing}: Block driver does not support snapshots")));
    };
    let which = Wish::Word(name.to_owned()).find(&all);
    let which =
        which.ok_or_else(|| Failure::new(format!("{doing}: Failed to load snapshot: No such file or directory")))?;
    let applied = image.graph().permit().apply_snapshot(image.node, which).await;
    applied.map_err(|error| Failure::of(doing, &error))?;
    Ok(0)
}

async fn delete(image: &Image, name: &str) -> Outcome {
    let doing = format!("Could not delete snapshot '{name}'");
    let all = image.snapshots().unwrap_or_default();
    // By its name alone, unlike where one is applied.
    if !all.iter().any(|one| one.name == name) {
        return Err(Failure::new(format!("{doing}: snapshot not found")));
    }
    let which = SnapshotName { id: None, name: Some(name.to_owned()) };
    let deleted = image.graph().permit().delete_snapshot(image.node, which).await;
    deleted.map_err(|error| Failure::new(format!("{doing}: {}", words(&error))))?;
    Ok(0)
}

/// Which snapshot somebody wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// An id or a name.
    Word(String),
    /// What it says it is.
    Said(SnapshotName),
}

impl Wish {
    /// `-l`: a word, or `snapshot.id=…,snapshot.name=…`.
    pub(super) fn read(word: &str) -> Result<Self, Failure> {
        if !word.starts_with("snapshot.") {
            return Ok(Self::Word(word.to_owned()));
        }
        let (mut name, pairs) = (SnapshotName::default(), Pairs::read([word])?);
        for (member, value) in pairs.iter() {
            match member {
                "snapshot.id" => name.id = Some(value.to_owned()),
                "snapshot.name" => name.name = Some(value.to_owned()),
                _ => return Err(Failure::new(format!("Failed in parsing snapshot param '{word}'"))),
            }
        }
        Ok(Self::Said(name))
    }

    /// The one that is meant. A word is an id before it is a name.
    fn find(&self, all: &[SnapshotInfo]) -> Option<SnapshotName> {
        let found = match self {
            Self::Word(word) => {
                all.iter().find(|one| one.id == *word).or_else(|| all.iter().find(|one| one.name == *word))
            }
            Self::Said(name) => all.iter().find(|one| name.fits(&one.id, &one.name)),
        };
        found.map(|one| SnapshotName { id: Some(one.id.clone()), name: Some(one.name.clone()) })
    }
}

/// Opens a snapshot in place of the image that it is in. In QEMU's words.
pub(super) async fn at_snapshot(session: &Session, image: Image, given: &Given, wish: &Wish) -> Result<Image, Failure> {
    let found = match image.snapshots() {
        None => Err(format!(
            "Block format '{}' used by device '' does not support temporarily loading internal snapshots",
            image.driver
        )),
        Some(all) => wish.find(&all).ok_or_else(|| "Can't find snapshot".to_owned()),
    };
    image.close().await?;
    let found = found.map_err(|text| Failure::new(format!("Failed to load snapshot: {text}")))?;
    open(session, &Given { snapshot: Some(found), ..given.clone() }).await
}

/// A snapshot for programs.
pub(super) fn described(snapshot: &SnapshotInfo) -> Value {
    let mut value = json!({
        "id": snapshot.id, "name": snapshot.name, "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date.0, "date-nsec": snapshot.date.1,
        "vm-clock-sec": snapshot.vm_clock_nsec / NANOS, "vm-clock-nsec": snapshot.vm_clock_nsec % NANOS,
    });
    if let Some(icount) = snapshot.icount {
        value["icount"] = icount.into();
    }
    value
}

/// The same, all of them, for people.
pub(super) fn listed(all: &[Value]) -> String {
    let mut page = "Snapshot list:\n".to_owned();
    let row = |cells: [&str; 6]| {
        let [id, tag, size, date, clock, icount] = cells;
        format!("{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}\n")
    };
    page.push_str(&row(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]));
    for one in all {
        let number = |name: &str| one[name].as_u64().unwrap_or_default();
        let text = |name: &str| one[name].as_str().unwrap_or_default();
        let (seconds, millis) = (number("vm-clock-sec"), number("vm-clock-nsec") / 1_000_000);
        let clock = format!("{:04}:{:02}:{:02}.{millis:03}", seconds / 3600, seconds / 60 % 60, seconds % 60);
        let icount = one.get("icount").map_or("--".to_owned(), Value::to_string);
        let date = local_time(i64::try_from(number("date-sec")).unwrap_or(0));
        page.push_str(&row([text("id"), text("name"), &size(number("vm-state-size")), &date, &clock, &icount]));
    }
    page
}

const NANOS: u64 = 1_000_000_000;
