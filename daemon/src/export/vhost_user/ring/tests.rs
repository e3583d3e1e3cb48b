//! A toy driver offers good and bad chains; what comes out is what went in, or the reason why not.

use super::super::tests::driver::{Driver, INDIRECT, NEXT as D_NEXT, WRITE as D_WRITE, shared};
use super::*;
use vm_memory::GuestMemoryMmap;

const RING: u64 = 0x1_0000;
const TABLE: u64 = 0x8_0000;
const HEADER: (u64, u32, bool) = (0x9_0000, 16, false);
const STATUS: (u64, u32, bool) = (0x9_1000, 1, true);
const BOTH: RingFeatures = RingFeatures { event_idx: true, indirect: true };

/// Where 8 MiB lie that nothing else is in.
const LARGE: u64 = 1 << 36;

/// 1 MiB in two regions that touch at 0x8_1000, so that an indirect table at `TABLE` can straddle them, and [`LARGE`].
fn memory() -> (GuestMemoryMmap<()>, MemoryMap) {
    shared(&[(0, 0x8_0000 + 0x1000), (0x8_1000, 0x7_F000), (LARGE, 8 << 20)])
}

struct Bench {
    map: MemoryMap,
    driver: Driver,
    ring: Ring,
    chain: Chain,
}

impl Bench {
    fn new(features: RingFeatures) -> Self {
        Self::at(features, 8, 0)
    }

    fn at(features: RingFeatures, size: u16, base: u16) -> Self {
        let (memory, map) = memory();
        let mut driver = Driver::new(&memory, size, RING);
        driver.put(driver.at.used + 2, base.to_le_bytes());
        driver.set_avail(base);
        driver.seen = base;
        let ring = Ring::start(&map, size, driver.at, base, features).unwrap();
        Self { map, driver, ring, chain: Chain::default() }
    }

    fn publish(&mut self) {
        self.ring.publish().for_each(drop);
    }

    fn take(&mut self) -> Result<(), Broken> {
        assert_ne!(self.ring.waiting()?, 0, "something was offered");
        self.ring.take(&self.map, &mut self.chain)
    }

    /// What a chain of these buffers comes to.
    fn offered(buffers: &[(u64, u32, bool)]) -> Result<(), Broken> {
        let mut bench = Self::new(BOTH);
        bench.driver.offer(buffers);
        bench.take()
    }

    /// What an indirect table of these descriptors, at `table`, comes to.
    fn indirect(table: u64, entries: &[super::super::tests::driver::Desc], len: u32) -> Result<Self, Broken> {
        let mut bench = Self::new(BOTH);
        for (n, entry) in entries.iter().enumerate() {
            bench.driver.put_desc(table, u16::try_from(n).unwrap(), *entry);
        }
        bench.driver.put_desc(bench.driver.at.desc, 0, (table, len, INDIRECT | D_WRITE, 0));
        bench.driver.offer_head(0);
        bench.take().map(|()| bench)
    }
}

#[test]
fn a_chain_comes_out_as_it_was_offered() {
    let mut bench = Bench::new(BOTH);
    let head = bench.driver.offer(&[HEADER, (0x9_2000, 512, true), STATUS]);
    bench.take().unwrap();
    assert_eq!(bench.chain.head(), head);
    assert_eq!((bench.chain.readable().1, bench.chain.writable().1), (16, 513));
    bench.driver.put(HEADER.0, *b"0123456789abcdef");
    assert_eq!(&bench.chain.take_header(&bench.map), b"0123456789abcdef");
    assert_eq!(bench.chain.take_status().gpa, STATUS.0);
    assert_eq!((bench.chain.readable(), bench.chain.writable().1), ((&[][..], 0), 512));
    assert_eq!(bench.ring.waiting(), Ok(0));
}

#[test]
fn framing_is_the_drivers_choice() {
    let mut bench = Bench::new(BOTH);
    // The header in two, the second part with data behind it; the status at the tail of the data.
    bench.driver.offer(&[(0x9_0000, 1, false), (0x9_1000, 15 + 512, false), (0x9_3000, 33, true)]);
    bench.driver.put(0x9_0000, [1]);
    bench.driver.put(0x9_1000, [2; 15]);
    bench.driver.put(0x9_100f, [3; 16]);
    bench.take().unwrap();
    let header = bench.chain.take_header(&bench.map);
    assert_eq!((header[0], &header[1..]), (1, &[2; 15][..]));
    assert_eq!(bench.chain.peek::<16>(&bench.map), [3; 16]);
    assert_eq!(bench.chain.readable().1, 512);
    assert_eq!((bench.chain.take_status().gpa, bench.chain.writable().1), (0x9_3020, 32));
}

#[test]
fn a_buffer_may_cross_two_regions_but_no_gap() {
    assert_eq!(Bench::offered(&[HEADER, (0x8_0f00, 512, true), STATUS]), Ok(()));
    assert_eq!(Bench::offered(&[HEADER, (0xf_ff00, 512, true), STATUS]), Err(Broken::Address(0x10_0000)));
    assert_eq!(Bench::offered(&[HEADER, (1 << 40, 512, true), STATUS]), Err(Broken::Address(1 << 40)));
    let wraps = Bench::offered(&[HEADER, (u64::MAX - 100, 512, true), STATUS]);
    assert!(matches!(wraps, Err(Broken::Address(_))));
}

#[test]
fn what_cannot_be_answered_breaks_the_queue() {
    assert_eq!(Bench::offered(&[STATUS]), Err(Broken::NoHeader));
    assert_eq!(Bench::offered(&[(0x9_0000, 8, false), STATUS]), Err(Broken::NoHeader));
    assert_eq!(Bench::offered(&[(0x9_0000, 0, false), HEADER, STATUS]), Err(Broken::NoHeader));
    assert_eq!(Bench::offered(&[HEADER]), Err(Broken::NoStatus));
    assert_eq!(Bench::offered(&[HEADER, (0x9_2000, 512, true), (0x9_1000, 0, true)]), Err(Broken::NoStatus));
    assert_eq!(Bench::offered(&[STATUS, HEADER]), Err(Broken::Order));
    assert_eq!(Bench::offered(&[HEADER, (0x9_2000, 0, true), STATUS]), Ok(()), "an empty one between is skipped");
}

#[test]
fn impossible_rings_break_the_queue() {
    let mut bench = Bench::new(BOTH);
    bench.driver.set_avail(5000);
    assert_eq!(bench.ring.waiting(), Err(Broken::AvailJump(5000)));
    bench.driver.set_avail(u16::MAX);
    assert_eq!(bench.ring.waiting(), Err(Broken::AvailJump(u16::MAX)), "backwards");

    let mut bench = Bench::new(BOTH);
    bench.driver.offer_head(8);
    assert_eq!(bench.take(), Err(Broken::Index(8)));

    let mut bench = Bench::new(BOTH);
    bench.driver.put_desc(RING, 0, (HEADER.0, 16, D_NEXT, 99));
    bench.driver.offer_head(0);
    assert_eq!(bench.take(), Err(Broken::Index(99)));

    for next in [0, 1] {
        let mut bench = Bench::new(BOTH);
        bench.driver.put_desc(RING, 0, (HEADER.0, 16, D_NEXT, next));
        bench.driver.put_desc(RING, 1, (HEADER.0, 16, D_NEXT, 0));
        bench.driver.offer_head(0);
        assert_eq!(bench.take(), Err(Broken::Endless));
        assert_eq!(bench.ring.next_avail(), 0, "what broke the queue was not taken");
    }
}

#[test]
fn a_head_is_offered_once_at_a_time() {
    let mut bench = Bench::new(BOTH);
    let head = bench.driver.offer(&[HEADER, STATUS]);
    bench.take().unwrap();
    bench.driver.offer_head(head);
    assert_eq!(bench.take(), Err(Broken::HeadTwice(head)));

    let mut bench = Bench::new(BOTH);
    let head = bench.driver.offer(&[HEADER, STATUS]);
    bench.take().unwrap();
    bench.ring.give_back(head, 1);
    bench.driver.offer_head(head);
    assert_eq!(bench.take(), Ok(()), "after it came back it is free again");
}

#[test]
fn a_chain_has_at_most_4_gib() {
    // A table that names the same memory over and over: little is needed to ask for 2^32 bytes.
    let chain = |last: u32| {
        let mut entries = vec![(HEADER.0, 16, D_NEXT, 1)];
        entries.extend((1..1023).map(|n| (LARGE, 0x40_0000, D_NEXT | D_WRITE, n + 1)));
        entries.push((LARGE, last, D_WRITE, 0));
        entries
    };
    let left = u32::try_from((1u64 << 32) - 16 - 1022 * 0x40_0000).unwrap();
    let whole = Bench::indirect(0xa_0000, &chain(left), 1024 * 16).unwrap();
    assert_eq!(whole.chain.readable().1 + whole.chain.writable().1, 1 << 32);
    assert_eq!(Bench::indirect(0xa_0000, &chain(left + 1), 1024 * 16).err(), Some(Broken::TooLong));
}

#[test]
fn indirect_tables_lie_anywhere() {
    let entries = [(HEADER.0, 16, D_NEXT, 1), (0x9_2000, 512, D_NEXT | D_WRITE, 2), (STATUS.0, 1, D_WRITE, 0)];
    // At an odd address, and across two regions at each possible byte.
    for table in [0xa_0001].into_iter().chain(0x8_1000 - 48..0x8_1000) {
        let bench = Bench::indirect(table, &entries, 48).unwrap();
        assert_eq!((bench.chain.readable().1, bench.chain.writable().1), (16, 513), "{table:#x}");
    }
}

#[test]
fn a_table_may_follow_plain_descriptors() {
    let mut bench = Bench::new(BOTH);
    bench.driver.put_desc(TABLE, 0, (STATUS.0, 1, D_WRITE, 0));
    bench.driver.put_desc(RING, 0, (HEADER.0, 16, D_NEXT, 1));
    bench.driver.put_desc(RING, 1, (TABLE, 16, INDIRECT, 0));
    bench.driver.offer_head(0);
    bench.take().unwrap();
    assert_eq!((bench.chain.readable().1, bench.chain.writable().1), (16, 1));
}

#[test]
fn tables_that_lie_break_the_queue() {
    let good = [(HEADER.0, 16, D_NEXT, 1), (STATUS.0, 1, D_WRITE, 0)];
    for len in [0, 17, 16 * 1025, u32::MAX - 15] {
        assert_eq!(Bench::indirect(TABLE, &good, len).err(), Some(Broken::IndirectLength(len)));
    }
    let nested = [(TABLE, 16, INDIRECT, 0)];
    assert_eq!(Bench::indirect(TABLE, &nested, 16).err(), Some(Broken::IndirectNested));
    let cycle = [(HEADER.0, 16, D_NEXT, 0)];
    assert_eq!(Bench::indirect(TABLE, &cycle, 16).err(), Some(Broken::Endless));
    let outside = [(HEADER.0, 16, D_NEXT, 2)];
    assert_eq!(Bench::indirect(TABLE, &outside, 32).err(), Some(Broken::Index(2)));
    assert!(matches!(Bench::indirect(0xf_fff8, &[], 16), Err(Broken::Address(_))));

    let mut bench = Bench::new(BOTH);
    bench.driver.put_desc(RING, 0, (TABLE, 16, INDIRECT | D_NEXT, 1));
    bench.driver.offer_head(0);
    assert_eq!(bench.take(), Err(Broken::IndirectNext));

    let mut bench = Bench::new(RingFeatures { indirect: false, ..BOTH });
    bench.driver.put_desc(RING, 0, (TABLE, 16, INDIRECT, 0));
    bench.driver.offer_head(0);
    assert_eq!(bench.take(), Err(Broken::IndirectNotNegotiated));
}

#[test]
fn nothing_is_seen_before_it_is_published_and_all_of_it_after() {
    let mut bench = Bench::new(RingFeatures::default());
    for _ in 0..3 {
        bench.driver.offer(&[HEADER, STATUS]);
        bench.take().unwrap();
    }
    bench.ring.give_back(4, 513);
    bench.ring.give_back(0, 1);
    assert_eq!(bench.driver.take_used(), None);
    bench.publish();
    assert_eq!(bench.ring.unannounced(), 2);
    assert!(bench.ring.announce(), "one call for both");
    assert!(!bench.ring.announce(), "and none for nothing");
    assert_eq!(bench.driver.take_used(), Some((4, 513)));
    assert_eq!(bench.driver.take_used(), Some((0, 1)));
    assert_eq!(bench.driver.take_used(), None);
}

#[test]
fn without_event_indexes_the_flag_decides() {
    let mut bench = Bench::new(RingFeatures::default());
    bench.driver.set_used_event(100);
    bench.driver.put(bench.driver.at.avail, NO_INTERRUPT.to_le_bytes());
    let head = bench.driver.offer(&[HEADER, STATUS]);
    bench.take().unwrap();
    bench.ring.give_back(head, 1);
    bench.publish();
    assert!(!bench.ring.announce());
    assert_eq!(bench.ring.want_kicks(false), Some((0, 2)));
    assert_eq!(bench.driver.get::<2>(bench.driver.at.used), NO_NOTIFY.to_le_bytes());
    bench.ring.want_kicks(true);
    assert_eq!(bench.driver.get::<2>(bench.driver.at.used), [0; 2]);
}

#[test]
fn what_is_announced_late_is_decided_by_the_event_as_it_is_then() {
    for (event, called) in [(0, true), (2, true), (3, false), (0xffff, false)] {
        let mut bench = Bench::new(BOTH);
        for n in 1..=3 {
            let head = bench.driver.offer(&[HEADER, STATUS]);
            bench.take().unwrap();
            bench.ring.give_back(head, 1);
            bench.publish();
            assert_eq!(bench.ring.unannounced(), n);
        }
        bench.driver.set_used_event(event);
        assert_eq!(bench.ring.announce(), called, "0 -> 3, event at {event}");
        assert_eq!(bench.ring.unannounced(), 0);
        assert!(!bench.ring.announce(), "nothing new");
    }
}

#[test]
fn with_event_indexes_the_event_decides_and_the_flag_is_ignored() {
    let mut bench = Bench::new(BOTH);
    bench.driver.put(bench.driver.at.avail, NO_INTERRUPT.to_le_bytes());
    let mut publish_one = |event: u16| {
        bench.driver.set_used_event(event);
        let head = bench.driver.offer(&[HEADER, STATUS]);
        bench.take().unwrap();
        bench.ring.give_back(head, 1);
        bench.publish();
        bench.ring.announce()
    };
    assert!(publish_one(0), "0 -> 1 passes 0");
    assert!(!publish_one(3), "1 -> 2 does not pass 3");
    assert!(!publish_one(3));
    assert!(publish_one(3), "3 -> 4 does");
    let at = 4 + 8 * 8;
    for (wanted, event) in [(true, 4u16), (false, 3), (true, 4)] {
        assert_eq!(bench.ring.want_kicks(wanted), Some((at, 2)));
        assert_eq!(bench.driver.get::<2>(bench.driver.at.used + at), event.to_le_bytes(), "4 is the next: {wanted}");
    }
    bench.driver.offer(&[HEADER, STATUS]);
    assert_eq!(bench.ring.want_kicks(false), None, "the driver has crossed it");
}

#[test]
fn crossing_is_right_for_each_distance_around_the_wrap() {
    for old in [0u16, 1, 7, 0x7fff, 0xfffe, 0xffff] {
        for step in [1u16, 2, 5, 100] {
            let passed: Vec<u16> = (0..step).map(|n| old.wrapping_add(n)).collect();
            for near in 0..=300u16 {
                let event = old.wrapping_sub(100).wrapping_add(near);
                assert_eq!(
                    crossed(event, old, old.wrapping_add(step)),
                    passed.contains(&event),
                    "{old} {step} {event}"
                );
            }
        }
    }
}

#[test]
fn indexes_wrap_at_65536() {
    let mut bench = Bench::at(BOTH, 8, 65530);
    for n in 0..20u32 {
        let head = bench.driver.offer(&[HEADER, STATUS]);
        bench.take().unwrap();
        bench.ring.give_back(head, n);
        bench.publish();
        assert_eq!(bench.driver.take_used(), Some((u32::from(head), n)));
    }
    assert_eq!((bench.ring.next_avail(), bench.driver.used_index()), (14, 14));
}

#[test]
fn a_ring_outside_memory_or_of_a_wrong_size_is_none() {
    let (memory, map) = memory();
    let good = Driver::new(&memory, 8, RING).at;
    let start = |size, at| Ring::start(&map, size, at, 0, BOTH).err();
    assert_eq!(start(8, good), None);
    assert_eq!(start(7, good), Some(Broken::Size(7)));
    assert_eq!(start(0, good), Some(Broken::Size(0)));
    assert_eq!(start(8, Addresses { desc: 0xf_fff0, ..good }), Some(Broken::Ring(0xf_fff0)));
    assert_eq!(start(8, Addresses { avail: RING + 1, ..good }), Some(Broken::Ring(RING + 1)));
    assert_eq!(start(8, Addresses { used: RING + 2, ..good }), Some(Broken::Ring(RING + 2)));
    assert_eq!(start(8, Addresses { used: 0x8_0fc8, ..good }), Some(Broken::Ring(0x8_0fc8)), "across two regions");
}

#[test]
fn the_log_gets_what_the_used_ring_got() {
    let mut bench = Bench::at(BOTH, 8, 7);
    for _ in 0..2 {
        let head = bench.driver.offer(&[HEADER, STATUS]);
        bench.take().unwrap();
        bench.ring.give_back(head, 1);
    }
    let ranges: Vec<_> = bench.ring.publish().collect();
    assert_eq!(ranges, [(4 + 8 * 7, 8), (4, 8), (2, 2)]);
    assert_eq!(bench.ring.publish().next(), None, "nothing was written");
}
