//! Every call of storage fails once, and from then on, while a sub-command runs: it says so and ends with an error, or it
//! has done all that it should; sources are as before, what was made is gone again, and no disk is lost.
//!
//! The sub-commands run in this process, where `block_core::rt::fault` has calls fail.

#![expect(clippy::unwrap_used, reason = "a test stops where its machine fails it")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use block_core::base::ByteRange;
use block_core::graph::Repair;
use block_core::rt::fault::{Fault, Faults, Plan, Site};
use tempfile::TempDir;
use trellis_image::args::Read;
use trellis_image::{Failure, Given, Outcome, Session, words};
use trellis_img::commands::COMMANDS;

/// What fails: the call, and whether all later ones do too.
const PLANS: [(Fault, bool); 5] = [
    (Fault::Errno(libc::EIO), false),
    (Fault::Errno(libc::EIO), true),
    (Fault::Errno(libc::ENOSPC), false),
    (Fault::Errno(libc::ENOSPC), true),
    (Fault::Short, false),
];

/// Files for a sub-command, and what may become of them.
struct Case {
    folder: TempDir,
    /// The files' bytes before each run.
    files: BTreeMap<String, Vec<u8>>,
    /// Those that nobody may change.
    sources: Vec<&'static str>,
    /// What is there afterwards only if all went well: an image, and what it is a copy of.
    made: Option<(&'static str, &'static str)>,
    /// Images that have the same contents afterwards, whatever happens.
    kept: Vec<&'static str>,
    /// Images that are in order afterwards, whatever happens.
    valid: Vec<&'static str>,
    /// Looks at the rest.
    judge: fn(&Case, &Before, &Outcome) -> Result<(), String>,
}

/// Contents of the kept and valid images before the run.
type Before = BTreeMap<String, Vec<u8>>;

impl Case {
    /// `setup`: lines for `qemu-img`, or `qemu-io`.
    fn new(setup: &[&str]) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        for line in setup {
            let (program, line) = line.split_once(' ').unwrap();
            let words = line.split('\'').enumerate().flat_map(|(number, part)| match number % 2 {
                0 => part.split_whitespace().collect::<Vec<_>>(),
                _ => vec![part],
            });
            let done = Command::new(program).args(words).current_dir(folder.path()).output().unwrap();
            assert!(done.status.success(), "{line}: {}", String::from_utf8_lossy(&done.stderr));
        }
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(folder.path()).unwrap() {
            let entry = entry.unwrap();
            files.insert(entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap());
        }
        let judge = |_: &Self, _: &Before, _: &Outcome| Ok(());
        Self { folder, files, sources: Vec::new(), made: None, kept: Vec::new(), valid: Vec::new(), judge }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn refresh(&self) {
        for entry in std::fs::read_dir(self.folder.path()).unwrap() {
            std::fs::remove_file(entry.unwrap().path()).unwrap();
        }
        for (name, bytes) in &self.files {
            std::fs::write(self.path(name), bytes).unwrap();
        }
    }

    /// Runs a line with each fault at each call. `@` before a name: it is in our folder.
    fn fails_at_every_call(&self, line: &str) {
        let (points, failures) = self.at_every_call(line).unwrap_or_else(|wrong| panic!("{line}: {wrong}"));
        eprintln!("{line}: {points} faults, {failures} failures");
        assert!(points > 20 && failures > 10, "{line}: {points} faults, {failures} failures");
    }

    /// How many faults there were, and how often the command failed; or what is wrong.
    fn at_every_call(&self, line: &str) -> Result<(u64, u64), String> {
        let at = format!("{}/", self.folder.path().display());
        let words: Vec<String> = line.split(' ').map(|word| word.replace('@', &at)).collect();
        self.refresh();
        let named = self.kept.iter().chain(&self.valid);
        let before = named.map(|name| ((*name).to_owned(), contents(&self.path(name)).unwrap())).collect();
        let faults = Faults::default();
        let _entered = faults.enter();
        let (mut points, mut failures) = (0, 0);
        for (fault, lasting) in PLANS {
            for nth in 1.. {
                assert!(nth < 5_000, "{line}: it does not come to an end");
                self.refresh();
                let plan = Plan { nth, fault, lasting };
                faults.arm(plan);
                let outcome = run(&words);
                let struck = faults.disarm();
                let wrong = |wrong| format!("{plan:?} at {struck:?}: {outcome:?}: {wrong}");
                self.judged(&before, &outcome).map_err(wrong)?;
                if struck.is_empty() {
                    assert!(outcome == Ok(0), "{line}: {outcome:?}");
                    break;
                }
                points += 1;
                if let Err(failure) = &outcome {
                    failures += 1;
                    told(failure, fault, struck.contains(&Site::Read)).map_err(wrong)?;
                    // Our own check is not the only one that finds it in order.
                    if failures % 29 == 0 {
                        self.valid.iter().try_for_each(|name| in_order_for_qemu(&self.path(name))).map_err(wrong)?;
                    }
                }
            }
        }
        Ok((points, failures))
    }

    fn judged(&self, before: &Before, outcome: &Outcome) -> Result<(), String> {
        for name in &self.sources {
            if std::fs::read(self.path(name)).ok().as_ref() != self.files.get(*name) {
                return Err(format!("'{name}' is another one"));
            }
        }
        if let Some((made, source)) = self.made {
            match outcome {
                Ok(0) if contents(&self.path(made))? != contents(&self.path(source))? => {
                    return Err("the copy is not one".to_owned());
                }
                Ok(0) => in_order(&self.path(made))?,
                _ if self.path(made).exists() => return Err("what was made is still there".to_owned()),
                _ => {}
            }
        }
        for name in self.kept.iter().chain(&self.valid) {
            in_order(&self.path(name)).map_err(|wrong| format!("{name}: {wrong}"))?;
        }
        for name in &self.kept {
            if contents(&self.path(name))? != before[*name] {
                return Err(format!("the disk of '{name}' is another one"));
            }
        }
        (self.judge)(self, before, outcome)
    }
}

fn run(words: &[String]) -> Outcome {
    let command = COMMANDS.iter().find(|command| command.definition.name == words[0]).unwrap();
    match command.definition.read(&words[1..])? {
        Read::Run(args) => Session::run("trellis-img", async |session| (command.run)(session, args).await),
        Read::Help => panic!("{words:?} asks for help"),
    }
}

/// Whoever reads the message knows what went wrong.
fn told(failure: &Failure, fault: Fault, reads: bool) -> Result<(), String> {
    let reason = match fault {
        // No read fails like that, and nobody has to know what it means.
        Fault::Errno(libc::ENOSPC) if reads => &[""],
        Fault::Errno(libc::ENOSPC) => &["No space left on device", "no space left"][..],
        Fault::Errno(_) | Fault::Lie => &["Input/output error", "I/O error"],
        Fault::Short => &[""],
    };
    let is_said = reason.iter().any(|reason| failure.text.contains(reason)) && failure.text.len() > 10;
    if failure.code != 0 && is_said { Ok(()) } else { Err(format!("the message does not say it: {failure:?}")) }
}

fn opened<R>(path: &Path, work: impl AsyncFnOnce(&trellis_image::Image) -> R) -> Result<R, String> {
    Session::run("t", async |session| {
        let given = Given { quiet: true, ..Given::named(path.to_str().unwrap()) };
        let image = session.open(&given).await.map_err(|error| words(&error))?;
        let result = work(&image).await;
        image.close().await.map_err(|error| words(&error))?;
        Ok(result)
    })
}

/// What a guest sees.
fn contents(path: &Path) -> Result<Vec<u8>, String> {
    opened(path, async |image| image.disk().read_vec(ByteRange::whole(image.size())).await.unwrap())
}

/// Nothing is wrong with an image, but for leaks and flags that say too little: where a flush fails in the middle of a
/// change of snapshots, clusters may stay marked as shared that are not, which costs a copy and nothing else.
fn in_order(path: &Path) -> Result<(), String> {
    let wrong = opened(path, async |image| {
        let report = if image.driver == "qcow2" { image.check(Repair::Nothing).await } else { return Ok(0) };
        report.map(|report| report.corruptions + report.check_errors).map_err(|error| words(&error))
    })??;
    if wrong == 0 { Ok(()) } else { in_order_for_qemu(path) }
}

fn in_order_for_qemu(path: &Path) -> Result<(), String> {
    let done = Command::new("qemu-img").arg("check").arg(path).output().unwrap();
    let text = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
    let is_cautious = |line: &str| {
        let entry = line.split("_entry=").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or_default();
        // Bit 63 is not set.
        line.starts_with("ERROR OFLAG_COPIED") && line.ends_with("refcount=1") && entry.len() < 16
    };
    let errors: Vec<_> = text.lines().filter(|line| line.starts_with("ERROR") && !is_cautious(line)).collect();
    let is_known = matches!(done.status.code(), Some(0 | 3 | 63)) || text.contains("ERROR");
    if errors.is_empty() && is_known { Ok(()) } else { Err(format!("qemu-img check: {:?}: {text}", done.status)) }
}

/// A raw disk with data in it, holes, and zeroes.
const RAW: &[&str] = &[
    "qemu-img create -q -f raw a.raw 512k",
    "qemu-io -f raw -c 'write -P 1 0 100k' -c 'write -P 2 300k 64k' -c 'write -z 310k 8k' a.raw",
];

/// A chain with something in each layer, with bitmaps and a snapshot, and another base.
const CHAIN: &[&str] = &[
    "qemu-img create -q -f qcow2 -o cluster_size=4k base.qcow2 512k",
    "qemu-io -c 'write -P 1 0 64k' -c 'write -P 2 128k 32k' base.qcow2",
    "qemu-img create -q -f qcow2 -o cluster_size=4k other.qcow2 512k",
    "qemu-io -c 'write -P 1 0 64k' -c 'write -P 9 120k 32k' -c 'write -P 8 400k 4k' other.qcow2",
    "qemu-img create -q -f qcow2 -o cluster_size=4k -b base.qcow2 -F qcow2 top.qcow2",
    "qemu-io -c 'write -P 3 32k 16k' -c 'write -z 132k 4k' -c 'write -c -P 4 256k 4k' -c 'write -P 5 300k 2k' top.qcow2",
    "qemu-img bitmap --add -g 4k top.qcow2 b0",
    "qemu-io -c 'write -P 6 64k 4k' top.qcow2",
];

/// An image of its own, with a snapshot.
const ALONE: &[&str] = &[
    "qemu-img create -q -f qcow2 -o cluster_size=4k a.qcow2 512k",
    "qemu-io -c 'write -P 1 0 64k' -c 'write -P 2 128k 32k' -c 'write -c -P 4 256k 4k' a.qcow2",
    "qemu-img snapshot -c old a.qcow2",
    "qemu-io -c 'write -P 3 32k 64k' -c 'write -P 7 400k 8k' a.qcow2",
];

#[test]
fn creating() {
    let empty = || Case::new(&["qemu-img create -q -f raw zero.raw 512k"]);
    for options in ["", "-o preallocation=falloc ", "-o preallocation=full "] {
        let case = Case { made: Some(("t.raw", "zero.raw")), ..empty() };
        case.fails_at_every_call(&format!("create -q -f raw {options}@t.raw 512k"));
    }
    for options in ["", "-o preallocation=metadata,cluster_size=4k ", "-o preallocation=full ", "-o compat=0.10 "] {
        let case = Case { made: Some(("t.qcow2", "zero.raw")), ..empty() };
        case.fails_at_every_call(&format!("create -q -f qcow2 {options}@t.qcow2 512k"));
    }
    let judge = |case: &Case, _: &Before, outcome: &Outcome| match outcome {
        Err(_) if case.path("t.data").exists() => Err("the data file is still there".to_owned()),
        _ => Ok(()),
    };
    let case = Case { made: Some(("t.qcow2", "zero.raw")), judge, ..empty() };
    case.fails_at_every_call("create -q -f qcow2 -o data_file=@t.data,preallocation=metadata @t.qcow2 512k");
    // One that was there is whole afterwards, or given up.
    let judge = |case: &Case, _: &Before, outcome: &Outcome| match std::fs::read(case.path("a.raw")) {
        Ok(bytes) if outcome.is_err() && !bytes.is_empty() && bytes != case.files["a.raw"] => {
            Err("half of the data file is there".to_owned())
        }
        _ if outcome.is_err() && case.path("t.qcow2").exists() => Err("the image is still there".to_owned()),
        _ => Ok(()),
    };
    let case = Case { judge, ..Case::new(RAW) };
    case.fails_at_every_call("create -q -f qcow2 -o data_file=@a.raw @t.qcow2 512k");
    let case = Case { sources: vec!["base.qcow2"], made: Some(("t.qcow2", "base.qcow2")), ..Case::new(CHAIN) };
    case.fails_at_every_call("create -q -f qcow2 -b @base.qcow2 -F qcow2 @t.qcow2");
}

#[test]
fn converting_from_raw() {
    for options in ["", "-c ", "-W -m 2 ", "-S 0 ", "-c -S 0 ", "-t writeback ", "-o preallocation=metadata "] {
        let case = Case { sources: vec!["a.raw"], made: Some(("t.qcow2", "a.raw")), ..Case::new(RAW) };
        case.fails_at_every_call(&format!("convert {options}-f raw -O qcow2 @a.raw @t.qcow2"));
    }
}

#[test]
fn converting_from_qcow2() {
    let sources = vec!["base.qcow2", "top.qcow2", "other.qcow2"];
    let case = Case { sources: sources.clone(), made: Some(("t.raw", "top.qcow2")), ..Case::new(CHAIN) };
    case.fails_at_every_call("convert -t writeback -O raw @top.qcow2 @t.raw");
    let case = Case { sources: sources.clone(), made: Some(("t.qcow2", "top.qcow2")), ..Case::new(CHAIN) };
    case.fails_at_every_call("convert -B @base.qcow2 -F qcow2 -O qcow2 @top.qcow2 @t.qcow2");
    let case = Case { sources, made: Some(("t.qcow2", "top.qcow2")), ..Case::new(CHAIN) };
    case.fails_at_every_call("convert --bitmaps -O qcow2 @top.qcow2 @t.qcow2");
}

/// What was there and is written over has old bytes and new ones.
#[test]
fn converting_into_what_is_there() {
    let mut setup = RAW.to_vec();
    setup.extend([
        "qemu-img create -q -f qcow2 -o cluster_size=4k t.qcow2 512k",
        "qemu-io -c 'write -P 9 0 512k' t.qcow2",
    ]);
    let judge = |case: &Case, before: &Before, outcome: &Outcome| {
        let (old, found) = (&before["t.qcow2"], contents(&case.path("t.qcow2"))?);
        let new = contents(&case.path("a.raw"))?;
        match outcome {
            Ok(_) if found != new => Err("the copy is not one".to_owned()),
            _ => mixed(&found, &[old, &new]),
        }
    };
    let case = Case { sources: vec!["a.raw"], valid: vec!["t.qcow2"], judge, ..Case::new(&setup) };
    case.fails_at_every_call("convert -n -t writeback -f raw -O qcow2 @a.raw @t.qcow2");
}

/// Each sector is one of those, or zeroes, which go before what is written.
fn mixed(found: &[u8], allowed: &[&[u8]]) -> Result<(), String> {
    for (number, sector) in found.chunks(512).enumerate() {
        let at = number * 512;
        let known = allowed.iter().any(|bytes| bytes.get(at..at + sector.len()) == Some(sector));
        if !known && sector.iter().any(|byte| *byte != 0) {
            return Err(format!("the sector at {at} is neither old nor new"));
        }
    }
    Ok(())
}

#[test]
fn rebasing() {
    for line in ["rebase -b @other.qcow2 -F qcow2 @top.qcow2", "rebase -b  @top.qcow2", "rebase -c -b  @top.qcow2"] {
        let sources = vec!["base.qcow2", "other.qcow2"];
        let case = Case { sources, kept: vec!["top.qcow2"], ..Case::new(CHAIN) };
        case.fails_at_every_call(line);
    }
}

#[test]
fn committing() {
    let judge = |case: &Case, before: &Before, outcome: &Outcome| match outcome {
        Ok(_) if contents(&case.path("base.qcow2"))? != before["top.qcow2"] => {
            Err("the base does not have it".to_owned())
        }
        _ => Ok(()),
    };
    let case = || {
        let mut setup = CHAIN.to_vec();
        // A layer with bitmaps that record cannot be emptied.
        setup.push("qemu-img bitmap --remove top.qcow2 b0");
        Case { kept: vec!["top.qcow2"], valid: vec!["base.qcow2"], judge, ..Case::new(&setup) }
    };
    case().fails_at_every_call("commit -q @top.qcow2");
    case().fails_at_every_call("commit -q -d @top.qcow2");
}

#[test]
fn amending() {
    for options in [
        "compat=1.1,refcount_bits=32",
        "refcount_bits=64,lazy_refcounts=on",
        "lazy_refcounts=on",
        "refcount_bits=8",
        "compat=0.10",
    ] {
        let mut setup = ALONE.to_vec();
        if options == "compat=0.10" {
            setup.push("qemu-img snapshot -d old a.qcow2");
        }
        let case = Case { kept: vec!["a.qcow2"], ..Case::new(&setup) };
        case.fails_at_every_call(&format!("amend -o {options} @a.qcow2"));
    }
}

#[test]
fn changing_the_size() {
    // The beginning stays, and what comes is zeroes.
    let judge = |case: &Case, before: &Before, _: &Outcome| {
        let (old, found) = (&before["a.qcow2"], contents(&case.path("a.qcow2"))?);
        let common = old.len().min(found.len());
        let is_kept = old[..common] == found[..common] && found[common..].iter().all(|byte| *byte == 0);
        let is_size = [512, 1024, 256].contains(&(found.len() >> 10));
        if is_kept && is_size { Ok(()) } else { Err(format!("the disk has {} bytes", found.len())) }
    };
    let mut bare = ALONE.to_vec();
    bare.push("qemu-img snapshot -d old a.qcow2");
    for (setup, line) in [
        (ALONE, "resize -q @a.qcow2 1M"),
        (ALONE, "resize -q --preallocation=metadata @a.qcow2 1M"),
        (ALONE, "resize -q --preallocation=full @a.qcow2 1M"),
        (&bare[..], "resize -q --shrink @a.qcow2 256k"),
        (ALONE, "amend -o size=1M @a.qcow2"),
    ] {
        let case = Case { valid: vec!["a.qcow2"], judge, ..Case::new(setup) };
        case.fails_at_every_call(line);
    }
}

#[test]
fn changing_snapshots_and_bitmaps() {
    let mut setup = ALONE.to_vec();
    setup.extend(["qemu-img bitmap --add -g 4k a.qcow2 b0", "qemu-io -c 'write -P 6 64k 4k' a.qcow2"]);
    for line in [
        "snapshot -q -c new @a.qcow2",
        "snapshot -q -d old @a.qcow2",
        "bitmap --add -g 4k @a.qcow2 b1",
        "bitmap --clear @a.qcow2 b0",
        "bitmap --disable @a.qcow2 b0",
        "bitmap --remove @a.qcow2 b0",
        "bitmap --add --merge b0 @a.qcow2 b1",
    ] {
        let case = Case { kept: vec!["a.qcow2"], ..Case::new(&setup) };
        case.fails_at_every_call(line);
    }
    // The disk is what it was, or what it is made.
    let judge = |case: &Case, before: &Before, outcome: &Outcome| {
        let found = contents(&case.path("a.qcow2"))?;
        match outcome {
            Ok(_) if found == before["a.qcow2"] => Err("nothing was applied".to_owned()),
            Err(_) if found != before["a.qcow2"] && found[32 << 10] != 1 => Err("half of it was applied".to_owned()),
            _ => Ok(()),
        }
    };
    let case = Case { valid: vec!["a.qcow2"], judge, ..Case::new(ALONE) };
    case.fails_at_every_call("snapshot -q -a old @a.qcow2");
}

/// Who loses a disk, or leaves half a copy, is found.
#[test]
fn the_judge_can_say_no() {
    let mut setup = RAW.to_vec();
    setup.push("qemu-img create -q -f qcow2 -o cluster_size=4k t.qcow2 512k");
    let line = "convert -n -f raw -O qcow2 @a.raw @t.qcow2";
    let wrong = Case { kept: vec!["t.qcow2"], ..Case::new(&setup) }.at_every_call(line).unwrap_err();
    assert!(wrong.ends_with("the disk of 't.qcow2' is another one"), "{wrong}");
    let wrong = Case { made: Some(("t.qcow2", "a.raw")), ..Case::new(&setup) }.at_every_call(line).unwrap_err();
    assert!(wrong.ends_with("what was made is still there"), "{wrong}");
    let wrong = Case { sources: vec!["t.qcow2"], ..Case::new(&setup) }.at_every_call(line).unwrap_err();
    assert!(wrong.ends_with("'t.qcow2' is another one"), "{wrong}");
}
