//! Which fields a valid image has, by their names in the specification, and what wrong values are worth trying.

use crate::paper::Sheet;
use crate::random::Random;

/// A number in the image, big-endian.
#[derive(Clone, Debug)]
struct Field {
    name: String,
    at: u64,
    /// 1, 2, 4 or 8.
    bytes: usize,
}

/// All that is known of an image, table by table: a table with many entries is not chosen more often.
pub(crate) struct Fields {
    tables: Vec<Vec<Field>>,
    /// Where tables and data are: what an offset may be led to.
    places: Vec<u64>,
}

/// A wrong value.
#[derive(Clone, Debug)]
pub(crate) struct Mutation {
    name: String,
    at: u64,
    /// Empty: the file ends at `at`.
    bytes: Vec<u8>,
}

impl Mutation {
    pub(crate) fn apply(&self, sheet: &Sheet) {
        if self.bytes.is_empty() { sheet.cut(self.at) } else { sheet.prepare(self.at, &self.bytes) }
    }

    pub(crate) fn all(all: &[Self]) -> String {
        let one = |one: &Self| match one.bytes.len() {
            0 => format!("the file ends at {:#x}", one.at),
            _ => format!("{} (at {:#x}) = {:02x?}", one.name, one.at, one.bytes),
        };
        all.iter().map(one).collect::<Vec<_>>().join(", ")
    }
}

/// The header's fields: name, place, bytes.
const HEADER: &[(&str, u64, usize)] = &[
    ("magic", 0, 4),
    ("version", 4, 4),
    ("backing_file_offset", 8, 8),
    ("backing_file_size", 16, 4),
    ("cluster_bits", 20, 4),
    ("size", 24, 8),
    ("crypt_method", 32, 4),
    ("l1_size", 36, 4),
    ("l1_table_offset", 40, 8),
    ("refcount_table_offset", 48, 8),
    ("refcount_table_clusters", 56, 4),
    ("nb_snapshots", 60, 4),
    ("snapshots_offset", 64, 8),
    ("incompatible_features", 72, 8),
    ("compatible_features", 80, 8),
    ("autoclear_features", 88, 8),
    ("refcount_order", 96, 4),
    ("header_length", 100, 4),
    ("compression_type", 104, 1),
];
/// Of a snapshot in the table.
const SNAPSHOT: &[(&str, u64, usize)] = &[
    ("l1_table_offset", 0, 8),
    ("l1_size", 8, 4),
    ("id_str_size", 12, 2),
    ("name_size", 14, 2),
    ("date_sec", 16, 4),
    ("date_nsec", 20, 4),
    ("vm_clock", 24, 8),
    ("vm_state_size", 32, 4),
    ("extra_data_size", 36, 4),
    ("large vm_state_size", 40, 8),
    ("disk size", 48, 8),
];
/// Of a bitmap in the directory.
const BITMAP: &[(&str, u64, usize)] = &[
    ("bitmap_table_offset", 0, 8),
    ("bitmap_table_size", 8, 4),
    ("flags", 12, 4),
    ("type", 16, 1),
    ("granularity_bits", 17, 1),
    ("name_size", 18, 2),
    ("extra_data_size", 20, 4),
];
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
/// Entries of a table that are looked at.
const FIRST: u64 = 16;

impl Fields {
    pub(crate) fn of(image: &[u8]) -> Self {
        let mut found = Self { tables: Vec::new(), places: vec![0] };
        let is_old = number(image, 4, 4) == 2;
        let bits = number(image, 20, 4);
        let extended = !is_old && number(image, 72, 8) & 16 != 0;
        let known = if is_old { 13 } else { HEADER.len() };
        // The header counts several times.
        for _ in 0..4 {
            found.add("header", 0, &HEADER[..known]);
        }
        found.extensions(image, if is_old { 72 } else { number(image, 100, 4) });
        let step = if extended { 16 } else { 8 };
        let (l1, entries) = (number(image, 40, 8), number(image, 36, 4));
        found.words("L1", l1, entries, 8);
        let l2: Vec<u64> =
            (0..entries).map(|entry| number(image, l1 + entry * 8, 8) & OFFSET).filter(|at| *at != 0).collect();
        for (number, table) in l2.iter().enumerate().take(2) {
            for _ in 0..3 {
                found.words(&format!("L2 table {number}"), *table, (1 << bits) / step * (step / 8), 8);
            }
            let data = crate::fields::number(image, *table, 8) & OFFSET;
            found.places.push(data);
        }
        let (table, clusters) = (number(image, 48, 8), number(image, 56, 4));
        found.words("refcount table", table, clusters << bits >> 3, 8);
        let block = number(image, table, 8);
        found.words("refcount block", block, FIRST, 2);
        found.snapshots(image);
        found
    }

    fn add(&mut self, table: &str, start: u64, fields: &[(&str, u64, usize)]) {
        let field = |(name, at, bytes): &(&str, u64, usize)| Field {
            name: format!("{table}: {name}"),
            at: start + at,
            bytes: *bytes,
        };
        self.tables.push(fields.iter().map(field).collect());
    }

    fn words(&mut self, table: &str, start: u64, count: u64, step: u64) {
        let field = |entry| Field { name: format!("{table}[{entry}]"), at: start + entry * step, bytes: step as usize };
        self.tables.push((0..count.min(FIRST)).map(field).collect());
        self.places.push(start);
    }

    fn extensions(&mut self, image: &[u8], mut at: u64) {
        loop {
            let (kind, len) = (number(image, at, 4), number(image, at + 4, 4));
            let name = format!("extension {kind:#x}");
            self.add(&name, at, &[("type", 0, 4), ("length", 4, 4), ("data", 8, 8)]);
            if kind == 0 {
                return;
            }
            if kind == 0x2385_2875 {
                let fields =
                    [("nb_bitmaps", 8, 4), ("reserved", 12, 4), ("directory_size", 16, 8), ("directory_offset", 24, 8)];
                self.add(&name, at, &fields);
                self.add(&name, at, &fields);
                self.bitmaps(image, number(image, at + 24, 8), number(image, at + 8, 4));
            }
            if kind == 0x0537_be77 {
                self.add(&name, at, &[("offset", 8, 8), ("length", 16, 8)]);
                self.places.push(number(image, at + 8, 8));
            }
            at += 8 + len.next_multiple_of(8);
        }
    }

    fn bitmaps(&mut self, image: &[u8], mut at: u64, count: u64) {
        self.places.push(at);
        for entry in 0..count {
            self.add(&format!("bitmap {entry}"), at, BITMAP);
            self.words(&format!("table of bitmap {entry}"), number(image, at, 8), number(image, at + 8, 4), 8);
            at += (24 + number(image, at + 18, 2) + number(image, at + 20, 4)).next_multiple_of(8);
        }
    }

    fn snapshots(&mut self, image: &[u8]) {
        let (count, mut at) = (number(image, 60, 4), number(image, 64, 8));
        self.places.push(at);
        for entry in 0..count {
            self.add(&format!("snapshot {entry}"), at, SNAPSHOT);
            self.words(&format!("L1 of snapshot {entry}"), number(image, at, 8), number(image, at + 8, 4), 8);
            let texts = number(image, at + 12, 2) + number(image, at + 14, 2);
            at += (40 + number(image, at + 36, 4) + texts).next_multiple_of(8);
        }
    }

    /// One to three of them, and sometimes an early end.
    pub(crate) fn mutations(&self, image: &[u8], random: &mut Random) -> Vec<Mutation> {
        let mut all: Vec<_> = (0..1 + random.below(3)).map(|_| self.one(image, random)).collect();
        if random.below(32) == 0 {
            all.push(Mutation { name: String::new(), at: random.below(image.len() as u64), bytes: Vec::new() });
        }
        all
    }

    fn one(&self, image: &[u8], random: &mut Random) -> Mutation {
        let any = |random: &mut Random, len: usize| random.below(len as u64) as usize;
        let table = &self.tables[any(random, self.tables.len())];
        let field = &table[any(random, table.len())];
        let (old, bits) = (number(image, field.at, field.bytes), field.bytes as u64 * 8);
        let value = match random.below(12) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << random.below(bits),
            3 => old ^ 1 << random.below(bits),
            4 => old.wrapping_add(1),
            5 => old.wrapping_sub(1),
            6 => (1u64 << random.below(bits)).wrapping_sub(1),
            7 => self.places[any(random, self.places.len())] | COPIED,
            8 => self.places[any(random, self.places.len())],
            9 => old ^ (1u64 << random.below(bits) | 1u64 << random.below(bits)),
            10 => random.below(256),
            _ => random.next(),
        };
        Mutation { name: field.name.clone(), at: field.at, bytes: value.to_be_bytes()[8 - field.bytes..].to_vec() }
    }
}

/// What stands there; what is not in the file is 0.
fn number(image: &[u8], at: u64, bytes: usize) -> u64 {
    let byte = |number: usize| image.get(at as usize + number).copied().unwrap_or(0);
    (0..bytes).fold(0, |value, number| value << 8 | u64::from(byte(number)))
}
