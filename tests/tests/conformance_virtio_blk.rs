//! Rows 1 to 59 of `conformance.md`: what a virtio block device owes its driver, over well-behaved and odd drivers.
//!
//! Rows that a hostile test proves already, and rows with a reason instead of a test, stand in `docs/conformance.md`.
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]
#![expect(clippy::cast_possible_truncation, reason = "indices and lengths of tests are short")]

use serde_json::json;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};
use trellis_tests::scene::{
    DISK, IOERR, OK_WRITE, SECTORS, Scene, UNSUPP, expect_nack, expect_queue_works, long, repeats,
};
use trellis_tests::vhost_user::client::{
    Client, DATA, Done, FEATURES, POISON, PROTOCOL, RINGS, Setup, default_memory, slot,
};
use trellis_tests::vhost_user::memory::RegionSpec;
use trellis_tests::vhost_user::protocol::{
    BACKEND_CONFIG_CHANGE, blk_segment, config, config_payload, feature, kind, protocol_feature, request, status,
};
use trellis_tests::vhost_user::ring::{Desc, INDIRECT, Used, WRITE, linked, readable, writable};
use trellis_tests::vhost_user::wire::{readable_within, take_events};
use trellis_tests::watched::Watched;

#[test]
fn c001_version_1_is_offered() {
    on_a_disk(|_, client| assert_ne!(client.offered() & feature::VERSION_1, 0));
}

#[test]
fn c002_offered_bits_are_known_and_complete() {
    const KNOWN: u64 = FEATURES
        | feature::SIZE_MAX
        | feature::EVENT_IDX
        | feature::LOG_ALL
        | feature::NOTIFY_ON_EMPTY
        | feature::GEOMETRY;
    on_a_disk(|_, client| {
        let offered = client.offered();
        assert_eq!(offered & !KNOWN, 0, "bits are offered that nothing honours");
        assert_eq!(offered & feature::RO, 0, "a writable disk is offered as read-only");
        let implies = |bit: u64, needed: u64| offered & bit == 0 || offered & needed != 0;
        assert!(implies(feature::CONFIG_WCE, feature::FLUSH));
        if offered & feature::SIZE_MAX != 0 {
            assert_ne!(client.config_u32(config::SIZE_MAX), 0, "SIZE_MAX is offered with no size");
        }
    });
}

#[test]
fn c003_every_subset_of_the_offered_bits() {
    let mut scene = Scene::new();
    let offered = scene.negotiated().offered();
    let needed = feature::VERSION_1 | feature::PROTOCOL_FEATURES;
    let choice = offered & !needed;
    let single = (0..64).map(|bit| choice & (1 << bit)).filter(|bit| *bit != 0);
    let subsets: Vec<u64> = single.clone().chain(single.map(|bit| choice & !bit)).chain([0, choice]).collect();
    for subset in subsets.into_iter().chain(random_words(repeats(100, 10_000)).map(|word| word & choice)) {
        let mut client = scene.client_with(&Setup { features: needed | subset, ..Setup::default() });
        assert_eq!(client.features(), needed | subset);
        client.queue(0).ring.set_used_event(0);
        expect_queue_works(&mut client, 0);
    }
    scene.still_good();
}

#[test]
fn c004_bits_not_offered() {
    let mut scene = Scene::new();
    let client = scene.negotiated();
    for bit in (0..64).map(|bit| 1_u64 << bit).filter(|bit| client.offered() & bit == 0) {
        let features = client.features() | bit;
        expect_nack(&client, request::SET_FEATURES, &features.to_le_bytes(), &[]);
    }
    drop(client);
    scene.still_good();
}

#[test]
fn c005_the_same_bits_after_a_reset() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    for _ in 0..20 {
        assert_ne!(client.protocol() & protocol_feature::RESET_DEVICE, 0, "RESET_DEVICE is offered");
        client.tell(request::RESET_DEVICE, &[], &[]);
        client.tell(request::SET_FEATURES, &client.features().to_le_bytes(), &[]);
        client.set_mem_table();
        client.restart_queue(0);
        expect_queue_works(&mut client, 0);
    }
    drop(client);
    scene.still_good();
}

#[test]
fn c006_config_is_readable_before_features_are_set() {
    let mut scene = Scene::new();
    let wire = scene.acknowledging_wire();
    let payload = config_payload(0, config::LEN as u32, 0, &[0; config::LEN]);
    wire.send(request::GET_CONFIG, &payload, &[]).unwrap();
    let reply = wire.recv().unwrap().unwrap();
    assert_eq!(reply.payload[12..20], SECTORS.to_le_bytes());
    assert_ne!(word(&reply.payload[12..], config::MAX_DISCARD_SECTORS), 0, "a field of a bit merely offered");
    drop(wire);
    scene.still_good();
}

#[test]
fn c007_config_is_little_endian_and_its_gaps_are_zero() {
    on_a_disk(|_, client| {
        let bytes = client.config();
        assert_eq!(bytes[..8], SECTORS.to_le_bytes());
        assert_eq!(bytes[config::NUM_QUEUES..config::NUM_QUEUES + 2], [2, 0]);
        assert_eq!(word(&bytes, config::BLK_SIZE), 512);
        assert_eq!(bytes[config::UNUSED0], 0);
        assert_eq!(bytes[config::UNUSED1..config::SECURE_ERASE], [0; 3]);
        assert_eq!(
            bytes[config::SECURE_ERASE..],
            [0; config::LEN - config::SECURE_ERASE],
            "zones that are not offered"
        );
    });
}

#[test]
fn c008_capacity_is_in_512_byte_sectors() {
    let mut scene = Scene::with_export(",logical-block-size=4096");
    let mut client = scene.client();
    let bytes = client.config();
    assert_eq!((bytes[..8].to_vec(), word(&bytes, config::BLK_SIZE)), (SECTORS.to_le_bytes().to_vec(), 4096));
    assert_eq!(client.read(0, SECTORS - 8, 4096).0.status, status::OK);
    drop(client);
    scene.still_good();
}

#[test]
fn c009_capacity_changes_with_a_notice() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    client.open_backend_channel();
    for size in [2 * DISK, DISK / 2, DISK] {
        scene.server().qmp("block_resize", &json!({ "node-name": "disk-a", "size": size }));
        let notice = client.backend_channel().recv().unwrap().expect("the back-end's channel stays open");
        assert_eq!((notice.header.request, notice.header.size), (BACKEND_CONFIG_CHANGE, 0));
        client.answer_notice(&notice);
        assert_eq!(client.config()[..8], (size / 512).to_le_bytes());
    }
    drop(client);
    scene.still_good();
}

#[test]
fn c010_flush_is_offered() {
    on_a_disk(|_, client| assert_ne!(client.offered() & feature::FLUSH, 0));
    let mut scene = Scene::with_export(",writethrough=on");
    assert_ne!(scene.negotiated().offered() & feature::FLUSH, 0);
    scene.still_good();
}

/// The mode; that writes are then stable is `c029_each_write_is_stable_where_the_driver_has_no_cache`.
#[test]
fn c012_the_driver_sets_the_cache_mode() {
    on_a_disk(|_, client| {
        assert_eq!(client.config()[config::WRITEBACK], 1, "the cache is a write-back one and must say so");
        for mode in [0, 1, 0, 1] {
            assert_eq!(client.set_writeback(mode), 0);
            assert_eq!(client.config()[config::WRITEBACK], mode);
            assert_eq!(client.write(0, 0, &[mode; 512]), OK_WRITE);
        }
    });
}

#[test]
fn c015_any_queues_of_those_there_are() {
    let mut scene = Scene::new();
    let mut client = scene.mapped();
    assert_eq!(client.ask(request::GET_QUEUE_NUM, &[]).u64(), 2);
    // Queue 0 has a ring but is never announced; queue 1 works alone.
    client.add_queue(0);
    client.start_queue(1);
    expect_queue_works(&mut client, 1);
    drop(client);
    scene.still_good();
}

#[test]
fn c016_as_many_segments_as_announced() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&Setup { queue_size: 32768, ..Setup::default() });
    let most = client.config_u32(config::SEG_MAX);
    assert!((1..=32766).contains(&most), "{most} segments");
    let data: Vec<Desc> = (0..u64::from(most)).map(|n| writable(DATA + n % 1024 * 512, 512)).collect();
    let whole = Done { status: status::OK, used: most * 512 + 1 };
    assert_eq!(client.request(0, kind::IN, 0, &data), whole);
    drop(client);
    scene.still_good();
}

#[test]
fn c016_seg_max_fits_the_usual_queue() {
    on_a_disk(|_, client| {
        let most = client.config_u32(config::SEG_MAX);
        let data: Vec<Desc> = (0..u64::from(most)).map(|n| writable(DATA + n * 512, 512)).collect();
        let table: Vec<u8> =
            linked(0, &client.chain(0, kind::IN, 0, &data)).iter().flat_map(|desc| desc.bytes()).collect();
        client.memory().write(TABLE, &table);
        let indirect = Desc { addr: TABLE, len: table.len() as u32, flags: INDIRECT, next: 0 };
        assert_eq!(client.run(0, &[indirect]).len, most * 512 + 1);
        assert!(most <= 254, "a ring of 256 cannot carry {most} segments, header and status");
    });
}

#[test]
fn c017_discard_up_to_its_limit() {
    up_to_the_limit(kind::DISCARD, config::MAX_DISCARD_SECTORS);
}

#[test]
fn c017_write_zeroes_up_to_its_limit() {
    up_to_the_limit(kind::WRITE_ZEROES, config::MAX_WRITE_ZEROES_SECTORS);
}

#[test]
fn c018_may_unmap_is_true() {
    for (option, may) in [(",discard=unmap", 1), (",discard=ignore", 0)] {
        let mut scene = Scene::with_disk(option, "");
        assert_eq!(scene.client().config()[config::WRITE_ZEROES_MAY_UNMAP], may, "with {option}");
        scene.still_good();
    }
}

#[test]
fn c019_what_we_lack_is_not_offered() {
    let lacking = feature::ZONED
        | feature::LIFETIME
        | feature::SECURE_ERASE
        | feature::BARRIER
        | feature::SCSI
        | feature::RING_PACKED
        | feature::IN_ORDER;
    on_a_disk(|_, client| assert_eq!(client.offered() & lacking, 0));
}

#[test]
fn c020_bit_30_is_protocol_features() {
    on_a_disk(|_, client| {
        assert_eq!(feature::PROTOCOL_FEATURES, 0x4000_0000);
        assert_ne!(client.offered() & 0x4000_0000, 0);
    });
}

/// One write and one read, cut into descriptors at random places, direct and indirect.
#[test]
fn c021_framing_is_free() {
    on_a_disk(|_, client| {
        let mut random = random_words(usize::MAX);
        let mut next = move |below: u64| random.next().expect("endless") % below;
        for round in 0..repeats(200, 20_000) {
            let len = 512 * (1 + next(8) as u32);
            let pattern: Vec<u8> = (0..len).map(|n| (n as u8) ^ (round as u8)).collect();
            let sector = next(SECTORS - 8);
            let slot = client.prepare(0, kind::OUT, sector);
            client.memory().write(DATA, &client.memory().read(slot.header, 16));
            client.memory().write(DATA + 16, &pattern);
            let mut chain = cut(readable(DATA, 16 + len), &mut next);
            chain.push(writable(slot.status, 1));
            client.run(0, &chain);
            assert_eq!(client.memory().byte(slot.status), status::OK);

            let header = client.prepare(0, kind::IN, sector).header;
            client.memory().fill(DATA, len as usize + 1, status::UNTOUCHED);
            let mut chain = cut(readable(header, 16), &mut next);
            chain.extend(cut(writable(DATA, len + 1), &mut next));
            assert_eq!(client.run(0, &chain).len, len + 1);
            assert_eq!(client.memory().read(DATA, len as usize), pattern);
            assert_eq!(client.memory().byte(DATA + u64::from(len)), status::OK);
        }
    });
}

#[test]
fn c024_the_last_sector_is_inside() {
    on_a_disk(|_, client| {
        assert_eq!(client.write(0, SECTORS - 1, &[9; 512]), OK_WRITE);
        assert_eq!(client.read(0, SECTORS - 1, 512).1, [9; 512]);
    });
}

#[test]
fn c025_whole_blocks_only_where_blocks_are_large() {
    let mut scene = Scene::with_export(",logical-block-size=4096");
    let mut client = scene.client();
    assert_eq!(client.write(0, 8, &[5; 4096]), OK_WRITE);
    assert_eq!(client.read(0, 8, 4096).1, [5; 4096]);
    assert_eq!(client.read(0, 9, 512).0, IOERR);
    drop(client);
    scene.still_good();
}

#[test]
fn c028_flush_on_one_queue_after_a_write_on_another() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&Setup { queues: 2, ..Setup::default() });
    for round in 0..50 {
        assert_eq!(client.write(0, 0, &[round; 4096]), OK_WRITE);
        assert_eq!(client.flush(1), OK_WRITE);
        assert_eq!(client.read(1, 0, 4096).1, [round; 4096]);
    }
    drop(client);
    scene.still_good();
}

/// A driver without a cache, or one that has switched it off, counts on each write being stable when it is answered; the
/// disk notes of each write whether it was asked for that.
#[test]
fn c029_each_write_is_stable_where_the_driver_has_no_cache() {
    const CACHED: [u64; 2] = [0, 0];
    const STABLE: [u64; 2] = [LOG_FUA, LOG_FUA];
    for (without, writeback, export, expected) in [
        (0, None, "", CACHED),
        (0, Some(0), "", STABLE),
        (0, Some(1), "", CACHED),
        (0, None, ",writethrough=on", STABLE),
        (feature::FLUSH, None, "", STABLE),
        (feature::FLUSH | feature::CONFIG_WCE, None, "", STABLE),
        (feature::CONFIG_WCE, None, "", CACHED),
    ] {
        let builder = Watched::builder().image("disk", DISK, "").image("log", DISK, "");
        let logging = "blklogwrites,node-name=logged,file=disk,log=log,log-super-update-interval=1";
        let mut server =
            builder.arg("--blockdev", logging).export("a", "logged", &format!(",writable=on{export}")).start();
        let setup = Setup { features: FEATURES & !without, ..Setup::default() };
        let mut client = Client::start(&server.socket("a"), &setup);
        if let Some(mode) = writeback {
            assert_eq!(client.set_writeback(mode), 0);
        }
        assert_eq!(client.write(0, 0, &[7; 4096]), OK_WRITE);
        assert_eq!(client.write_zeroes(0, 16, 8, false), OK_WRITE);
        let noted = logged_flags(&server.image("log"));
        assert_eq!(noted, expected, "without {without:#x}, writeback {writeback:?}, export '{export}'");
        assert!(server.alive());
    }
}

#[test]
fn c032_write_zeroes_of_odd_length_and_count() {
    on_a_disk(|_, client| {
        for len in [15, 1, 17] {
            client.memory().write(DATA, &[blk_segment(0, 8, 0), [0; 16]].concat());
            assert_eq!(client.request(0, kind::WRITE_ZEROES, 0, &[readable(DATA, len)]), IOERR);
        }
        let most = client.config_u32(config::MAX_WRITE_ZEROES_SEG) as usize;
        let done = client.segments(0, kind::WRITE_ZEROES, &vec![blk_segment(0, 8, 0); most + 1]);
        assert!([IOERR, UNSUPP].contains(&done), "{done:?}");
    });
}

#[test]
fn c033_no_sectors_are_no_error() {
    on_a_disk(|_, client| {
        assert_eq!(client.write_zeroes(0, 0, 0, false), OK_WRITE);
        assert_eq!(client.discard(0, SECTORS - 1, 0), OK_WRITE);
    });
}

#[test]
fn c034_zeroed_ranges_read_as_zero() {
    for option in [",discard=unmap", ",discard=ignore"] {
        let mut scene = Scene::with_disk(option, "");
        let mut client = scene.client();
        for unmap in [false, true] {
            for (sector, sectors) in [(0, 8), (3, 1), (5, 17), (100, 128)] {
                assert_eq!(client.write(0, 0, &[0xFF; 256 * 512]), OK_WRITE);
                assert_eq!(client.write_zeroes(0, sector, sectors, unmap), OK_WRITE);
                let (_, bytes) = client.read(0, 0, 256 * 512);
                let inside = sector as usize * 512..(sector as usize + sectors as usize) * 512;
                let right = |(at, &byte): (usize, &u8)| byte == if inside.contains(&at) { 0 } else { 0xFF };
                assert!(bytes.iter().enumerate().all(right), "sectors {sector}+{sectors}, unmap {unmap}");
            }
        }
        drop(client);
        scene.still_good();
    }
}

#[test]
fn c035_discarded_ranges_show_old_bytes_or_zeroes() {
    on_a_disk(|_, client| {
        assert_eq!(client.write(0, 0, &[0x77; 65536]), OK_WRITE);
        assert_eq!(client.discard(0, 8, 64), OK_WRITE);
        let (_, bytes) = client.read(0, 0, 65536);
        assert!(bytes[..4096].iter().chain(&bytes[4096 + 32768..]).all(|byte| *byte == 0x77));
        assert!(
            bytes[4096..4096 + 32768].chunks(512).all(|sector| [[0; 512], [0x77; 512]].iter().any(|s| s == sector))
        );
    });
}

#[test]
fn c036_the_serial_is_the_device_id() {
    for (serial, shown) in [("disk-0815", &b"disk-0815"[..]), ("exactly-twenty-chars", b"exactly-twenty-chars")] {
        let mut scene = Scene::with_export(&format!(",serial={serial}"));
        let mut client = scene.client();
        let mut whole = [0; 20];
        whole[..shown.len()].copy_from_slice(shown);
        assert_eq!(client.device_id(0, 20), (Done { status: status::OK, used: 21 }, whole.to_vec()));
        drop(client);
        scene.still_good();
    }
}

/// The device says no more than it wrote: in every byte that it claims, the poison is gone.
#[test]
fn c039_used_length_is_not_more_than_was_written() {
    on_a_disk(|_, client| {
        assert_eq!(client.write(0, 0, &[1; 4096]), OK_WRITE);
        let (kinds, outside) = ([kind::IN, kind::GET_ID, kind::FLUSH, 0x7777], SECTORS);
        for (kind, sector) in kinds.map(|kind| (kind, 0)).into_iter().chain([(kind::IN, outside)]) {
            client.memory().fill(DATA, 4096, POISON);
            let done = client.request(0, kind, sector, &[writable(DATA, 4096)]);
            let written = client.memory().read(DATA, 4096).iter().take_while(|byte| **byte != POISON).count();
            assert!(done.used as usize <= written + 1, "type {kind:#x}: {done:?}, but {written} bytes are there");
            assert!(done.used >= 1, "the status byte counts");
        }
    });
}

#[test]
fn c040_no_stale_bytes_in_a_failed_read() {
    on_a_disk(|_, client| {
        assert_eq!(client.write(0, 0, &[0xCC; 65536]), OK_WRITE);
        assert_eq!(client.read(0, 0, 65536).1, [0xCC; 65536]);
        let (done, bytes) = client.read(0, SECTORS - 8, 65536);
        assert_eq!(done, IOERR);
        assert!(!bytes.contains(&0xCC), "another request's bytes in a refused read");
    });
}

#[test]
fn c044_what_the_device_reads_it_never_writes() {
    on_a_disk(|_, client| {
        client.memory().write(DATA, &(0..=255).cycle().take(8192).collect::<Vec<u8>>());
        let chain = client.chain(0, kind::OUT, 0, &[readable(DATA, 4096), readable(DATA + 4096, 4096)]);
        client.queue(0).ring.write_chain(0, &chain);
        let table_and_avail = (RINGS, 4096 + 4096);
        client.queue(0).ring.publish(0);
        let seen = |client: &Client| {
            let header = client.memory().read(slot(0).header, 16);
            (client.memory().read(table_and_avail.0, table_and_avail.1), header, client.memory().read(DATA, 8192))
        };
        let before = seen(client);
        client.kick(0);
        client.used(0);
        assert_eq!(seen(client), before);
    });
}

#[test]
fn c048_the_write_flag_of_an_indirect_descriptor_is_ignored() {
    on_a_disk(|_, client| {
        let chain = linked(0, &client.chain(0, kind::IN, 0, &[writable(DATA, 512)]));
        client.memory().write(TABLE, &chain.iter().flat_map(|desc| desc.bytes()).collect::<Vec<u8>>());
        assert_eq!(client.run(0, &[Desc { addr: TABLE, len: 48, flags: INDIRECT | WRITE, next: 0 }]).len, 513);
        assert_eq!(client.memory().byte(slot(0).status), status::OK);
    });
}

/// Each completion is looked at the moment its index shows: the entry, the status and the data must be there.
#[test]
fn c054_the_entry_is_there_before_its_index() {
    on_a_disk(|_, client| {
        // Without interrupts nothing but the index says when to look, so that looking comes as early as it can.
        client.queue(0).ring.set_avail_flags(1);
        for round in 0..repeats(5000, 10_000_000) {
            let head = (round % 80) as u16 * 3;
            let slot = slot(0);
            let chain = client.chain(0, kind::IN, 0, &[writable(DATA, 512)]);
            client.memory().fill(DATA + 510, 2, POISON);
            client.submit_at(0, head, &chain);
            let used = spin_for_used(client);
            assert_eq!((used.head, used.len), (head.into(), 513), "round {round}");
            assert_eq!(client.memory().byte(slot.status), status::OK);
            assert_eq!(client.memory().read(DATA + 510, 2), [0, 0], "round {round}: data come after the index");
        }
    });
}

#[test]
fn c055_without_event_index_the_flag_decides() {
    on_a_disk(|_, client| {
        flush_unseen(client);
        until_quiet(client);
        client.queue(0).ring.set_avail_flags(1);
        client.queue(0).ring.set_used_event(0);
        flush_unseen(client);
        assert!(!interrupted(client, QUIET), "an interrupt although the driver wants none");
        client.queue(0).ring.set_avail_flags(0);
        for _ in 0..10 {
            flush_unseen(client);
            assert!(interrupted(client, PATIENT), "no interrupt although the driver wants one");
        }
    });
}

/// Interrupts may be kept back while more requests wait (`moderation.rs` of the device); the last answers of a batch get
/// theirs.
#[test]
fn c055_each_batch_is_interrupted_for_to_its_end() {
    on_a_disk(|_, client| {
        let heads: Vec<u16> = (0..80).map(|n| n * 3).collect();
        for round in 0..repeats(200, 20_000) {
            for &head in &heads {
                let chain = client.chain(u64::from(head / 3), kind::IN, 0, &[writable(DATA, 512)]);
                client.queue(0).ring.write_chain(head, &chain);
            }
            client.queue(0).ring.publish_all(&heads);
            client.kick(0);
            let mut done = 0;
            while done < heads.len() {
                let call = client.queue(0).call.as_fd();
                assert!(readable_within(call, PATIENT), "round {round}: no interrupt after answer {done}");
                take_events(call);
                done += std::iter::from_fn(|| client.queue(0).ring.take_used()).count();
            }
        }
    });
}

#[test]
fn c056_with_event_index_the_index_decides() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&event_index());
    flush_unseen(&mut client);
    until_quiet(&mut client);
    // The flag must not matter any more.
    client.queue(0).ring.set_avail_flags(1);
    client.queue(0).ring.set_used_event(3);
    for n in 2..=6 {
        flush_unseen(&mut client);
        let expected = n == 4;
        let got = interrupted(&mut client, if expected { PATIENT } else { QUIET });
        assert_eq!(got, expected, "completion {n} where used_event is 3");
    }
    drop(client);
    scene.still_good();
}

/// Used indices 65 534, 65 535, 0, 1: the comparison must be one of 16 bits.
#[test]
fn c056_event_index_at_the_wrap() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&event_index());
    client.queue(0).ring.set_used_event(0x8000);
    run_flushes(&mut client, 65_533);
    interrupted(&mut client, Duration::ZERO);
    client.queue(0).ring.set_used_event(0);
    for index in [65_534_u16, 65_535, 0, 1, 2] {
        flush_unseen(&mut client);
        assert_eq!(client.queue(0).ring.used_idx(), index);
        let expected = index == 1;
        let got = interrupted(&mut client, if expected { PATIENT } else { QUIET });
        assert_eq!(got, expected, "used index {index} where used_event is 0");
    }
    drop(client);
    scene.still_good();
}

/// A driver that kicks only when the device asked for it loses no request.
#[test]
fn c057_no_kick_is_lost() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&event_index());
    let mut kicks = 0;
    for round in 0..repeats(5000, 1_000_000) {
        let chain = client.chain(0, kind::FLUSH, 0, &[]);
        let ring = &mut client.queue(0).ring;
        ring.set_used_event(ring.used_seen());
        let old = ring.avail_idx();
        ring.write_chain(0, &chain);
        ring.publish(0);
        let (new, event) = (ring.avail_idx(), ring.avail_event());
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            client.kick(0);
            kicks += 1;
        }
        assert!(client.used_within(0, PATIENT).is_some(), "round {round}: a request nobody saw, after {kicks} kicks");
    }
    drop(client);
    scene.still_good();
}

#[test]
fn c059_indices_wrap_at_65536() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    run_flushes(&mut client, if long() { 200_000 } else { 70_000 });
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

/// A ring that begins near the end of the index space, as after long use, works from its first request.
#[test]
fn c059_a_ring_that_starts_near_the_wrap() {
    let mut scene = Scene::new();
    let memory = [default_memory(), vec![RegionSpec { gpa: 1 << 30, size: 4096, mmap_offset: 0 }]].concat();
    let mut client = scene.client_with(&Setup { memory, ..Setup::default() });
    client.restart_queue_at(0, 65_530);
    for _ in 0..20 {
        expect_queue_works(&mut client, 0);
    }
    assert_eq!(client.stop_queue(0), 14);
    drop(client);
    scene.still_good();
}

fn on_a_disk(test: impl FnOnce(&mut Scene, &mut Client)) {
    let mut scene = Scene::new();
    let mut client = scene.client();
    test(&mut scene, &mut client);
    drop(client);
    scene.still_good();
}

/// On a disk that is larger than the limit, so that nothing else refuses one sector more.
fn up_to_the_limit(kind: u32, limit: usize) {
    const SIZE: u64 = 8 << 30;
    let mut scene = Scene::null(SIZE, "");
    let mut client = scene.client();
    let most = client.config_u32(limit);
    assert!((1..SIZE / 512).contains(&u64::from(most)), "a limit of {most} sectors");
    assert_eq!(client.segments(0, kind, &[blk_segment(0, most, 0)]), OK_WRITE);
    let done = client.segments(0, kind, &[blk_segment(0, most + 1, 0)]);
    assert!([IOERR, UNSUPP].contains(&done), "{} sectors: {done:?}", most + 1);
    assert_eq!(client.segments(0, kind, &[blk_segment(SIZE / 512 - 1, 1, 0)]), OK_WRITE);
    drop(client);
    scene.still_good();
}

fn event_index() -> Setup {
    Setup { features: FEATURES | feature::EVENT_IDX, protocol: PROTOCOL, ..Setup::default() }
}

/// One flush, waited for without looking at the call event.
fn flush_unseen(client: &mut Client) {
    let chain = client.chain(0, kind::FLUSH, 0, &[]);
    client.submit(0, &chain);
    spin_for_used(client);
}

/// The next completion of queue 0 as soon as its index shows.
fn spin_for_used(client: &mut Client) -> Used {
    let end = Instant::now() + PATIENT;
    loop {
        if let Some(used) = client.queue(0).ring.take_used() {
            return used;
        }
        assert!(Instant::now() < end, "queue 0 completes nothing");
    }
}

fn interrupted(client: &mut Client, patience: Duration) -> bool {
    let call = client.queue(0).call.as_fd();
    readable_within(call, patience) && take_events(call) > 0
}

/// Until no interrupt comes any more: one too many at the start is harmless and usual, and may come after the first
/// completion's.
fn until_quiet(client: &mut Client) {
    while interrupted(client, QUIET) {}
}

/// `count` flushes, as many at once as the ring holds.
fn run_flushes(client: &mut Client, count: usize) {
    let mut left = count;
    for n in 0..128_u16 {
        let chain = client.chain(n.into(), kind::FLUSH, 0, &[]);
        client.queue(0).ring.write_chain(2 * n, &chain);
    }
    while left > 0 {
        let now = left.min(128);
        let heads: Vec<u16> = (0..now as u16).map(|n| 2 * n).collect();
        client.queue(0).ring.publish_all(&heads);
        client.kick(0);
        for _ in 0..now {
            client.used(0);
        }
        left -= now;
    }
}

/// Cuts one buffer into at most a few dozen, at places that `below` chooses.
fn cut(whole: Desc, below: &mut impl FnMut(u64) -> u64) -> Vec<Desc> {
    let mut out = Vec::new();
    let (mut at, end) = (whole.addr, whole.addr + u64::from(whole.len));
    while at < end && out.len() < 30 {
        let len = (1 + below(if out.len() % 3 == 0 { 8 } else { 900 })).min(end - at);
        out.push(Desc { addr: at, len: len as u32, ..whole });
        at += len;
    }
    if at < end {
        out.push(Desc { addr: at, len: (end - at) as u32, ..whole });
    }
    out
}

/// The same `count` words in every run (xorshift), so that a failure can be repeated.
fn random_words(count: usize) -> impl Iterator<Item = u64> {
    let step = |state: &mut u64| {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        Some(*state)
    };
    std::iter::repeat_n((), count).scan(0x2545_F491_4F6C_DD1D_u64, move |state, ()| step(state))
}

/// The flags of all entries in a log of the kernel's dm-log-writes: a sector with the count, and for each entry a sector
/// and its data.
fn logged_flags(log: &Path) -> Vec<u64> {
    const SECTOR: usize = 512;
    let log = std::fs::read(log).unwrap();
    let word = |at: usize| u64::from_le_bytes(log[at..at + 8].try_into().unwrap());
    let mut at = SECTOR;
    let next = |_| {
        let (sectors, flags) = (word(at + 8) as usize, word(at + 16));
        at += SECTOR + sectors * SECTOR;
        flags
    };
    (0..word(16)).map(next).collect()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// In a log of dm-log-writes: the write was to be stable when it was answered.
const LOG_FUA: u64 = 2;
/// Where indirect tables stand.
const TABLE: u64 = DATA + (4 << 20);
/// How long nothing has to happen for "nothing happens".
const QUIET: Duration = Duration::from_millis(50);
/// How long something that must happen may take.
const PATIENT: Duration = Duration::from_secs(5);
