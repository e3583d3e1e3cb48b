//! The one rule that fault and crash tests check: what each sector may hold, now and after a crash.
//!
//! [`Model`] is told what is asked of a disk and how it ended, in that order, and knows for each sector the *allowed
//! values*. A write that begins adds its value. One that ends well takes the values of those away that had ended before
//! it began: from what is read now at once; from what a crash may leave only when a flush that began later has ended
//! well, or if the write itself was stable. What failed, or was discarded, may have happened or not.
//!
//! Every sector that is written carries a [`Stamp`], so a wrong one says where its bytes come from. It knows nothing of
//! graphs: who moves the bytes tells it.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test file uses a part")]

use std::fmt;
use std::ops::Range;
use std::rc::Rc;

use block_core::base::ByteRange;

/// What tears at most: a disk writes a sector or does not.
pub const SECTOR: usize = 512;

/// What is asked of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Write,
    Zeroes,
    Discard,
}

/// A request that the model was told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpId(usize);

/// A flush that has begun.
#[derive(Clone, Copy, Debug)]
pub struct FlushId(u64);

/// All that a model can be told, to tell it to another one.
#[derive(Clone, Copy, Debug)]
pub enum Told {
    Begin(Work, ByteRange),
    End(OpId, bool, bool),
    BeginFlush,
    EndFlush(FlushId),
    BeginResize(u64),
    EndResize(bool),
}

/// See the file's head.
pub struct Model {
    seed: u64,
    /// Counts what the model is told.
    clock: u64,
    ops: Vec<Op>,
    sectors: Vec<Sector>,
    /// Bytes; sectors past it are kept, for a size change that a crash loses.
    size: u64,
    /// A resize that has begun: the size in bytes, and the end that it cuts off.
    resizing: Option<(u64, Option<OpId>)>,
}

struct Op {
    work: Work,
    sectors: Range<usize>,
    begun: u64,
    /// When, and whether well.
    ended: Option<(u64, bool)>,
    stable: bool,
}

struct Sector {
    generation: u64,
    now: Vec<Value>,
    after_crash: Vec<Value>,
}

/// What a sector may hold, and by whose work.
#[derive(Clone)]
struct Value {
    op: OpId,
    bytes: Rc<[u8; SECTOR]>,
}

impl Model {
    /// A disk of `size` bytes, all zero.
    pub fn new(seed: u64, size: u64) -> Self {
        let start = Op { work: Work::Zeroes, sectors: 0..0, begun: 0, ended: Some((0, true)), stable: true };
        let mut model = Self { seed, clock: 1, ops: vec![start], sectors: Vec::new(), size, resizing: None };
        model.grow(size);
        model
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// A request begins. The bytes are what a write writes.
    pub fn begin(&mut self, work: Work, at: ByteRange) -> (OpId, Vec<u8>) {
        let op = OpId(self.ops.len());
        let (first, end) = (sector(at.start()), sector(at.end().next_multiple_of(SECTOR as u64)));
        let mut bytes = Vec::with_capacity(at.len().try_into().unwrap());
        for number in first..end {
            let whole = ByteRange::new((number * SECTOR) as u64, SECTOR as u64).unwrap();
            let part = whole.intersection(at).unwrap();
            let part = inside(part.start() - whole.start())..inside(part.end() - whole.start());
            let new = self.sectors[number].begin(op, work, part.clone(), self.seed, number as u64);
            bytes.extend_from_slice(&new[part]);
        }
        let begun = self.tick();
        self.ops.push(Op { work, sectors: first..end, begun, ended: None, stable: false });
        (op, bytes)
    }

    /// It has ended; `stable`: it was to be stable at its end.
    pub fn end(&mut self, op: OpId, well: bool, stable: bool) {
        let now = self.tick();
        self.ops[op.0].ended = Some((now, well));
        if well && self.ops[op.0].work != Work::Discard {
            self.supersede(op, |sector| &mut sector.now);
            if stable {
                self.made_stable(op);
            }
        }
    }

    /// A flush begins.
    pub fn begin_flush(&mut self) -> FlushId {
        FlushId(self.tick())
    }

    /// A flush has ended well.
    pub fn end_flush(&mut self, flush: FlushId) {
        let covered = |op: &Op| op.ended.is_some_and(|(at, well)| well && at < flush.0) && op.work != Work::Discard;
        let all: Vec<_> = (0..self.ops.len()).filter(|op| !self.ops[*op].stable && covered(&self.ops[*op])).collect();
        all.into_iter().for_each(|op| self.made_stable(OpId(op)));
    }

    /// The size begins to change to `size` bytes. What is cut off is zero when it comes back; a crash may keep it.
    pub fn begin_resize(&mut self, size: u64) {
        let first = size.next_multiple_of(SECTOR as u64);
        let cut = ByteRange::between(first, self.size).filter(|cut| !cut.is_empty());
        self.resizing = Some((size, cut.map(|cut| self.begin(Work::Zeroes, cut).0)));
        self.grow(size);
    }

    /// It has changed, or not.
    pub fn end_resize(&mut self, well: bool) {
        let (size, cut) = self.resizing.take().expect("a resize has begun");
        if let Some(op) = cut {
            self.end(op, well, false);
        }
        if well {
            self.size = size;
        }
    }

    /// The same as what another model was told.
    pub fn hear(&mut self, told: &Told) {
        match *told {
            Told::Begin(work, at) => drop(self.begin(work, at)),
            Told::End(op, well, stable) => self.end(op, well, stable),
            Told::BeginFlush => drop(self.begin_flush()),
            Told::EndFlush(flush) => self.end_flush(flush),
            Told::BeginResize(size) => self.begin_resize(size),
            Told::EndResize(well) => self.end_resize(well),
        }
    }

    /// What is wrong with what a reader sees now, from the start of the disk on.
    pub fn wrong_now(&self, bytes: &[u8]) -> Vec<Wrong> {
        self.wrong(bytes, |sector| &sector.now)
    }

    /// A crash may leave one value only of this sector.
    pub fn is_settled(&self, sector: u64) -> bool {
        let sector = self.sectors.get(usize::try_from(sector).unwrap());
        sector.is_none_or(|sector| sector.after_crash.len() == 1)
    }

    /// What is wrong with what a crash has left. What is missing at the end counts as zeroes.
    pub fn wrong_after_crash(&self, bytes: &[u8]) -> Vec<Wrong> {
        self.wrong(bytes, |sector| &sector.after_crash)
    }

    fn wrong(&self, bytes: &[u8], allowed: impl Fn(&Sector) -> &Vec<Value>) -> Vec<Wrong> {
        let here = self.sectors.iter().take(self.size.div_ceil(SECTOR as u64).try_into().unwrap()).enumerate();
        here.filter_map(|(number, sector)| {
            let mut found = [0; SECTOR];
            let there = bytes.get(number * SECTOR..).unwrap_or_default();
            let there = &there[..there.len().min(SECTOR)];
            found[..there.len()].copy_from_slice(there);
            let allowed = allowed(sector);
            let fits = allowed.iter().any(|value| *value.bytes == found);
            (!fits).then(|| Wrong::new(self.seed, number as u64, &found, allowed))
        })
        .collect()
    }

    fn made_stable(&mut self, op: OpId) {
        self.ops[op.0].stable = true;
        self.supersede(op, |sector| &mut sector.after_crash);
    }

    /// Only what had ended before this one began is older; of those that ran beside it nobody knows.
    fn supersede(&mut self, op: OpId, values: impl Fn(&mut Sector) -> &mut Vec<Value>) {
        let Self { ops, sectors, .. } = self;
        let begun = ops[op.0].begun;
        let is_older = |other: OpId| ops[other.0].ended.is_some_and(|(ended, _)| ended < begun);
        for sector in &mut sectors[ops[op.0].sectors.clone()] {
            values(sector).retain(|value| value.op == op || !is_older(value.op));
        }
    }

    fn grow(&mut self, size: u64) {
        let zero = || vec![Value { op: OpId(0), bytes: Rc::new([0; SECTOR]) }];
        let sectors = sector(size.next_multiple_of(SECTOR as u64)).max(self.sectors.len());
        self.sectors.resize_with(sectors, || Sector { generation: 0, now: zero(), after_crash: zero() });
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }
}

impl Sector {
    /// Adds the values that `op` may leave, where it changes `part`; gives what it writes.
    fn begin(&mut self, op: OpId, work: Work, part: Range<usize>, seed: u64, number: u64) -> [u8; SECTOR] {
        self.generation += 1;
        let new = match work {
            Work::Write => Stamp { seed, sector: number, generation: self.generation, op: op.0 as u64 }.bytes(),
            Work::Zeroes | Work::Discard => [0; SECTOR],
        };
        // A part of a sector changes whatever is there.
        let under = if part.len() == SECTOR { &self.now[..1] } else { &self.now[..] };
        let values = under.iter().map(|value| {
            let mut bytes = *value.bytes;
            bytes[part.clone()].copy_from_slice(&new[part.clone()]);
            Value { op, bytes: Rc::new(bytes) }
        });
        let values: Vec<_> = values.collect();
        self.now.extend_from_slice(&values);
        self.after_crash.extend(values);
        new
    }
}

/// What a written sector says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Of the test's run.
    pub seed: u64,
    /// Where it belongs.
    pub sector: u64,
    /// How many requests to this sector had begun, this one included.
    pub generation: u64,
    /// The request.
    pub op: u64,
}

impl Stamp {
    /// The sector: a head, its checksum, and a filling that follows from them.
    pub fn bytes(self) -> [u8; SECTOR] {
        let head = [MAGIC, self.seed, self.sector, self.generation, self.op];
        let mut words = head.to_vec();
        let mut word = checksum(&head);
        while words.len() < SECTOR / 8 {
            words.push(word);
            word = word.wrapping_mul(FACTOR).rotate_left(23) ^ 0x5555;
        }
        let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        bytes.try_into().unwrap()
    }

    /// `None`: no stamp, or not a whole one.
    pub fn read(bytes: &[u8; SECTOR]) -> Option<Self> {
        let word = |number: usize| u64::from_le_bytes(bytes[number * 8..][..8].try_into().unwrap());
        let stamp = Self { seed: word(1), sector: word(2), generation: word(3), op: word(4) };
        (stamp.bytes() == *bytes).then_some(stamp)
    }
}

const MAGIC: u64 = u64::from_le_bytes(*b"a stamp.");
const FACTOR: u64 = 0x0000_0100_0000_01b3;

/// FNV-1a over words.
fn checksum(words: &[u64]) -> u64 {
    words.iter().fold(0xcbf2_9ce4_8422_2325, |sum: u64, word| (sum ^ word).wrapping_mul(FACTOR).rotate_left(31))
}

/// A sector that holds what it may not.
#[derive(Clone, Debug)]
pub struct Wrong {
    pub sector: u64,
    pub harm: Harm,
    found: String,
    allowed: Vec<String>,
}

/// What it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// An older value, or none: what was promised is not there.
    Lost,
    /// The bytes of another sector, disk or run.
    Leaked,
    /// No value that anybody wrote.
    Torn,
    /// It cannot be read, although it was stable.
    Unreadable,
}

impl Wrong {
    /// A sector that cannot be read.
    pub fn unreadable(sector: u64) -> Self {
        Self { sector, harm: Harm::Unreadable, found: "an error".into(), allowed: Vec::new() }
    }

    fn new(seed: u64, sector: u64, found: &[u8; SECTOR], allowed: &[Value]) -> Self {
        let harm = match Stamp::read(found) {
            Some(stamp) if (stamp.seed, stamp.sector) != (seed, sector) => Harm::Leaked,
            Some(_) => Harm::Lost,
            None if *found == [0; SECTOR] => Harm::Lost,
            None => Harm::Torn,
        };
        let allowed = allowed.iter().map(|value| described(&value.bytes)).collect();
        Self { sector, harm, found: described(found), allowed }
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sector, harm, found, allowed } = self;
        write!(f, "sector {sector} ({harm:?}): found {found}, allowed {}", allowed.join(" or "))
    }
}

fn described(bytes: &[u8; SECTOR]) -> String {
    match Stamp::read(bytes) {
        Some(Stamp { seed, sector, generation, op }) => {
            format!("op {op} (run {seed}, sector {sector}, its {generation}th)")
        }
        None if *bytes == [0; SECTOR] => "zeroes".to_owned(),
        None => format!("{:02x?}…", &bytes[..16]),
    }
}

fn sector(byte: u64) -> usize {
    usize::try_from(byte).unwrap() / SECTOR
}

fn inside(byte: u64) -> usize {
    usize::try_from(byte).unwrap()
}
