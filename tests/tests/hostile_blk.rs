//! Requests that a disk must refuse, or take although they look odd (BLK) of `hostile-inputs.md`, one test a row.
//!
//! | row | here as, or why not |
//! |---|---|
//! | BLK-13 | the largest request is 4 GiB − 512, since more than 2³² bytes is a broken chain (VQ-31) |
//! | BLK-29 | 256 MiB, 1 GiB in the long form; the node is a file on tmpfs, which cannot zero a range in place |
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]
#![expect(clippy::cast_possible_truncation, reason = "indices and lengths of tests are short")]

use serde_json::json;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::{Duration, Instant};
use trellis_tests::scene::{DISK, IOERR, OK_WRITE, SECTORS, Scene, UNSUPP, expect_queue_works, long};
use trellis_tests::vhost_user::client::{Client, DATA, Done, FEATURES, POISON, Setup, default_memory, slot};
use trellis_tests::vhost_user::memory::RegionSpec;
use trellis_tests::vhost_user::protocol::{blk_header, blk_segment, config, feature, kind, status};
use trellis_tests::vhost_user::ring::{Desc, readable, writable};
use trellis_tests::vhost_user::wire::pause;

#[test]
fn blk_01_read_at_capacity() {
    refused_read(SECTORS, 512);
}

#[test]
fn blk_02_read_over_the_end() {
    refused_read(SECTORS - 1, 1024);
}

#[test]
fn blk_03_sector_2_to_the_55() {
    refused_read(1 << 55, 512);
}

#[test]
fn blk_04_last_sector_number() {
    refused_read(u64::MAX, 512);
    refused_read(u64::MAX, 1024);
}

#[test]
fn blk_05_write_at_capacity() {
    on_a_disk(|scene, client| {
        assert_eq!(client.write(0, SECTORS, &[0x42; 512]), IOERR);
        assert_eq!(client.write(0, SECTORS - 1, &[0x42; 1024]), IOERR);
        assert_eq!(client.read(0, SECTORS - 1, 512).1, [0; 512], "the part inside was written");
        assert_eq!(std::fs::metadata(scene.server().image("disk-a")).unwrap().len(), DISK);
    });
}

/// Whoever reads `query-blockstats` sees what a guest tries.
#[test]
fn blk_05_refused_requests_are_counted() {
    on_a_disk(|scene, client| {
        assert_eq!(client.read(0, SECTORS, 512).0, IOERR);
        assert_eq!(client.write(0, SECTORS, &[0x42; 512]), IOERR);
        assert_eq!(client.write(0, 0, &[0x42; 511]), IOERR);
        assert_eq!(client.read(0, 0, 512).0.status, status::OK);
        let all = scene.server().qmp("query-blockstats", &json!({ "query-nodes": true }));
        let all = all.as_array().unwrap();
        let stats = &all.iter().find(|node| node["node-name"] == "disk-a").unwrap()["stats"];
        assert_eq!((&stats["invalid_rd_operations"], &stats["invalid_wr_operations"]), (&json!(1), &json!(2)));
        assert_eq!(stats["failed_wr_operations"], 0);
    });
}

#[test]
fn blk_06_descriptors_whose_sum_passes_the_end() {
    on_a_disk(|_, client| {
        for count in 2..10 {
            let data: Vec<Desc> = (0..count).map(|n| writable(DATA + n * 512, 512)).collect();
            client.memory().fill(DATA, 8192, POISON);
            assert_eq!(client.request(0, kind::IN, SECTORS - 1, &data), IOERR);
            assert!(untouched(client, 8192), "a refused read wrote something");
        }
    });
}

#[test]
fn blk_07_read_of_odd_length() {
    for len in [511, 500, 513, 1] {
        refused_read(0, len);
    }
}

#[test]
fn blk_07_write_of_odd_length() {
    on_a_disk(|_, client| {
        for len in [511, 500, 513, 1] {
            assert_eq!(client.write(0, 0, &vec![0x42; len]), IOERR);
            assert_eq!(client.read(0, 0, 1024).1, [0; 1024], "a refused write of {len} bytes left something");
        }
    });
}

#[test]
fn blk_08_read_of_nothing() {
    on_a_disk(|_, client| assert_eq!(client.request(0, kind::IN, 0, &[]), OK_WRITE));
}

#[test]
fn blk_09_write_of_nothing() {
    on_a_disk(|_, client| assert_eq!(client.request(0, kind::OUT, 0, &[]), OK_WRITE));
}

#[test]
fn blk_10_write_from_a_writable_buffer() {
    on_a_disk(|_, client| {
        client.memory().fill(DATA, 512, 0x42);
        assert_eq!(client.request(0, kind::OUT, 0, &[writable(DATA, 512)]), IOERR);
        assert_eq!(client.read(0, 0, 512).1, [0; 512]);
    });
}

#[test]
fn blk_11_read_into_a_readable_buffer() {
    on_a_disk(|_, client| {
        client.memory().fill(DATA, 512, POISON);
        assert_eq!(client.request(0, kind::IN, 0, &[readable(DATA, 512)]), IOERR);
        assert!(untouched(client, 512), "a buffer that is for reading was written");
    });
}

#[test]
fn blk_12_unaligned_sector_on_large_blocks() {
    let mut scene = Scene::with_export(",logical-block-size=4096");
    let mut client = scene.client();
    for sector in 1..8 {
        assert_eq!(client.read(0, sector, 4096).0, IOERR);
        assert_eq!(client.write(0, sector, &[1; 4096]), IOERR);
    }
    assert_eq!(client.read(0, 8, 4096).0.status, status::OK);
    drop(client);
    scene.still_good();
}

#[test]
fn blk_13_read_of_2_gib_less_a_sector() {
    huge_read((2 << 30) - 512);
}

#[test]
fn blk_13_read_of_2_gib() {
    huge_read(2 << 30);
}

#[test]
fn blk_13_read_of_4_gib_less_a_sector() {
    huge_read((4 << 30) - 512);
}

#[test]
fn blk_14_flush_with_a_sector_and_with_data() {
    on_a_disk(|_, client| {
        assert_eq!(client.request(0, kind::FLUSH, 77, &[]), OK_WRITE);
        assert_eq!(client.request(0, kind::FLUSH, u64::MAX, &[]), OK_WRITE);
        assert_eq!(client.request(0, kind::FLUSH, 0, &[readable(DATA, 512)]), OK_WRITE);
        assert_eq!(client.request(0, kind::FLUSH, 0, &[writable(DATA, 512)]), OK_WRITE);
    });
}

#[test]
fn blk_15_device_id_of_any_length() {
    on_a_disk(|_, client| {
        let whole = client.device_id(0, 20).1;
        for len in [0, 4, 20, 512] {
            let (done, bytes) =
                if len == 0 { (client.request(0, kind::GET_ID, 0, &[]), Vec::new()) } else { client.device_id(0, len) };
            let copied = len.min(20);
            assert_eq!(done, Done { status: status::OK, used: copied as u32 + 1 });
            assert_eq!(bytes[..copied], whole[..copied]);
            assert!(bytes[copied..].iter().all(|&byte| byte == POISON), "more than 20 bytes were written");
        }
    });
}

#[test]
fn blk_16_unknown_type() {
    unsupported(&[0x7777, !(1 << 31)]);
}

/// The barrier bit of old drivers is masked, so this is a read.
#[test]
fn blk_17_barrier_bit() {
    on_a_disk(|_, client| {
        assert_eq!(client.write(0, 0, &[0x66; 512]), OK_WRITE);
        client.memory().fill(DATA, 512, POISON);
        let done = client.request(0, kind::IN | 1 << 31, 0, &[writable(DATA, 512)]);
        assert_eq!(done, Done { status: status::OK, used: 513 });
        assert_eq!(client.memory().read(DATA, 512), [0x66; 512]);
    });
}

#[test]
fn blk_18_scsi_types() {
    unsupported(&[2, 3]);
}

#[test]
fn blk_19_flush_out_and_9() {
    unsupported(&[9]);
    on_a_disk(|_, client| {
        let done = client.request(0, 5, 0, &[]);
        assert!([UNSUPP, OK_WRITE].contains(&done), "{done:?}");
    });
}

#[test]
fn blk_20_zones_lifetime_secure_erase() {
    let zones: Vec<u32> = (15..=26).chain([kind::SECURE_ERASE, kind::GET_LIFETIME]).collect();
    unsupported(&zones);
}

#[test]
fn blk_21_discard_with_the_unmap_flag() {
    refused_segment(kind::DISCARD, blk_segment(0, 8, 1), UNSUPP);
}

#[test]
fn blk_22_discard_with_an_unknown_flag() {
    refused_segment(kind::DISCARD, blk_segment(0, 8, 2), UNSUPP);
    refused_segment(kind::DISCARD, blk_segment(0, 8, 1 << 31), UNSUPP);
}

#[test]
fn blk_23_discard_of_too_many_segments() {
    on_a_disk(|_, client| {
        let most = client.config_u32(config::MAX_DISCARD_SEG) as usize;
        let segment = |n: usize| blk_segment(n as u64 * 16, 8, 0);
        let exactly: Vec<[u8; 16]> = (0..most).map(segment).collect();
        let one_more: Vec<[u8; 16]> = (0..=most).map(segment).collect();
        assert_eq!(client.segments(0, kind::DISCARD, &exactly), OK_WRITE);
        assert_eq!(client.segments(0, kind::DISCARD, &one_more), UNSUPP);
    });
}

#[test]
fn blk_24_discard_of_odd_length() {
    on_a_disk(|_, client| {
        for len in [15, 1, 17] {
            client.memory().write(DATA, &[blk_segment(0, 8, 0), [0; 16]].concat());
            assert_eq!(client.request(0, kind::DISCARD, 0, &[readable(DATA, len)]), IOERR);
        }
        assert_eq!(client.request(0, kind::DISCARD, 0, &[]), IOERR);
    });
}

#[test]
fn blk_25_discard_outside() {
    refused_segment(kind::DISCARD, blk_segment(SECTORS, 1, 0), IOERR);
    refused_segment(kind::DISCARD, blk_segment(SECTORS - 1, 2, 0), IOERR);
    refused_segment(kind::DISCARD, blk_segment(0, u32::MAX, 0), IOERR);
    refused_segment(kind::DISCARD, blk_segment(u64::MAX, 1, 0), IOERR);
    refused_segment(kind::DISCARD, blk_segment(u64::MAX, u32::MAX, 0), IOERR);
}

#[test]
fn blk_26_discard_of_nothing() {
    on_a_disk(|_, client| assert_eq!(client.discard(0, 0, 0), OK_WRITE));
}

#[test]
fn blk_27_write_zeroes_with_an_unknown_flag() {
    refused_segment(kind::WRITE_ZEROES, blk_segment(0, 8, 2), UNSUPP);
    refused_segment(kind::WRITE_ZEROES, blk_segment(0, 8, 0x8000_0001), UNSUPP);
}

#[test]
fn blk_28_write_zeroes_far_outside() {
    refused_segment(kind::WRITE_ZEROES, blk_segment(1 << 55, 8, 0), IOERR);
    refused_segment(kind::WRITE_ZEROES, blk_segment(1 << 63, 8, 1), IOERR);
    refused_segment(kind::WRITE_ZEROES, blk_segment(SECTORS - 4, 8, 0), IOERR);
}

#[test]
fn blk_29_zeroing_much_where_zeroing_is_slow() {
    let size: u64 = if long() { 1 << 30 } else { 256 << 20 };
    let mut scene = Scene::new();
    scene.server().qmp("block_resize", &json!({ "node-name": "disk-a", "size": size }));
    let before = scene.server().rss_anon_kib();
    let mut client = scene.client();
    let most = client.config_u32(config::MAX_WRITE_ZEROES_SECTORS);
    let (mut sector, end) = (0, size / 512);
    while sector < end {
        let sectors = (end - sector).min(u64::from(most)) as u32;
        client.memory().write(DATA, &blk_segment(sector, sectors, 0));
        let chain = client.chain(0, kind::WRITE_ZEROES, 0, &[readable(DATA, 16)]);
        client.submit(0, &chain);
        let start = Instant::now();
        scene.neighbour_works();
        assert!(start.elapsed() < Duration::from_secs(2), "zeroing holds another export up");
        client.used(0);
        assert_eq!(client.memory().byte(slot(0).status), status::OK);
        let more = scene.server().rss_anon_kib().saturating_sub(before);
        assert!(more < 32 << 10, "{more} KiB of memory for zeroing");
        // A step a sixteenth of the disk apart is enough where one request takes only a little.
        sector += u64::from(sectors).max(size / 512 / 16);
    }
    drop(client);
    scene.still_good();
}

#[test]
fn blk_30_writes_to_a_read_only_disk() {
    refused_on_read_only(FEATURES);
}

#[test]
fn blk_30_writes_to_a_read_only_disk_whose_driver_ignores_it() {
    refused_on_read_only(FEATURES & !feature::RO);
}

#[test]
fn blk_31_flush_of_a_read_only_disk() {
    let mut scene = Scene::read_only();
    let mut client = scene.client();
    assert_eq!(client.flush(0), OK_WRITE);
    drop(client);
    scene.still_good();
}

#[test]
fn blk_32_io_priority_is_ignored() {
    on_a_disk(|_, client| {
        let chain = client.chain(0, kind::IN, 0, &[writable(DATA, 512)]);
        client.memory().write(slot(0).header, &blk_header(kind::IN, 0xDEAD_BEEF, 0));
        assert_eq!(client.run(0, &chain).len, 513);
        assert_eq!(client.memory().byte(slot(0).status), status::OK);
    });
}

#[test]
fn blk_33_overlapping_writes() {
    on_a_disk(|_, client| {
        for round in 0..20 {
            for n in 0..32_u16 {
                let at = DATA + (1 << 20) + u64::from(n) * 4096;
                client.memory().fill(at, 4096, n as u8 + 1);
                let chain = client.chain(n.into(), kind::OUT, u64::from(n % 4), &[readable(at, 4096)]);
                client.queue(0).ring.write_chain(n * 3, &chain);
            }
            let heads: Vec<u16> = (0..32).map(|n| n * 3).collect();
            client.queue(0).ring.publish_all(&heads);
            client.kick(0);
            for _ in 0..32 {
                client.used(0);
            }
            let (_, bytes) = client.read(0, 0, 4096);
            for (sector, bytes) in bytes.chunks(512).enumerate() {
                let whole = bytes.iter().all(|byte| *byte == bytes[0]) && (1..=32).contains(&bytes[0]);
                assert!(whole, "round {round}: sector {sector} is torn");
            }
        }
    });
}

#[test]
fn blk_34_read_while_the_node_shrinks() {
    on_a_disk(|scene, client| {
        assert_eq!(client.write(0, SECTORS - 8, &[0x99; 4096]), OK_WRITE);
        for n in 0..64_u16 {
            let at = DATA + u64::from(n) * 4096;
            client.memory().fill(at, 4096, POISON);
            let chain = client.chain(n.into(), kind::IN, SECTORS - 8, &[writable(at, 4096)]);
            client.queue(0).ring.write_chain(n * 3, &chain);
        }
        let heads: Vec<u16> = (0..64).map(|n| n * 3).collect();
        client.queue(0).ring.publish_all(&heads);
        client.kick(0);
        scene.server().qmp("block_resize", &json!({ "node-name": "disk-a", "size": DISK / 2 }));
        for _ in 0..64 {
            client.used(0);
        }
        for n in 0..64 {
            let bytes = client.memory().read(DATA + n * 4096, 4096);
            match client.memory().byte(slot(n).status) {
                status::OK => assert_eq!(bytes, [0x99; 4096], "a read beside a shrink shows what was never there"),
                other => assert_eq!(other, status::IOERR),
            }
        }
        assert_eq!(client.read(0, SECTORS - 8, 4096).0, IOERR);
        assert!(untouched(client, 4096), "stale bytes in a refused read");
    });
}

#[test]
fn blk_35_discard_beside_a_write() {
    on_a_disk(|_, client| {
        for _ in 0..50 {
            assert_eq!(client.write(0, 0, &[0xAA; 4096]), OK_WRITE);
            client.memory().write(DATA, &blk_segment(0, 8, 0));
            client.memory().fill(DATA + 4096, 4096, 0xBB);
            let discard = client.chain(0, kind::DISCARD, 0, &[readable(DATA, 16)]);
            let write = client.chain(1, kind::OUT, 0, &[readable(DATA + 4096, 4096)]);
            client.queue(0).ring.write_chain(0, &discard);
            client.queue(0).ring.write_chain(8, &write);
            client.queue(0).ring.publish_all(&[0, 8]);
            client.kick(0);
            client.used(0);
            client.used(0);
            let (_, bytes) = client.read(0, 0, 4096);
            for sector in bytes.chunks(512) {
                // The write, if it came last; zero or (a discard may do nothing) the write again, if the discard did.
                let possible = [0xBB, 0x00].iter().any(|value| sector.iter().all(|byte| byte == value));
                assert!(possible, "{:x} in a sector after discard and write", sector[0]);
            }
        }
    });
}

/// A disk of its own for `test`, and the check after it.
fn on_a_disk(test: impl FnOnce(&mut Scene, &mut Client)) {
    let mut scene = Scene::new();
    let mut client = scene.client();
    test(&mut scene, &mut client);
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

fn refused_read(sector: u64, len: usize) {
    on_a_disk(|_, client| {
        let (done, _) = client.read(0, sector, len);
        assert_eq!(done, IOERR);
        assert!(untouched(client, len), "a refused read wrote something");
    });
}

fn refused_segment(kind: u32, segment: [u8; 16], answer: Done) {
    on_a_disk(|_, client| {
        assert_eq!(client.write(0, 0, &[0x42; 4096]), OK_WRITE);
        assert_eq!(client.write(0, SECTORS - 8, &[0x43; 4096]), OK_WRITE);
        assert_eq!(client.segments(0, kind, &[segment]), answer);
        assert_eq!(client.read(0, 0, 4096).1, [0x42; 4096], "a refused request had an effect");
        assert_eq!(client.read(0, SECTORS - 8, 4096).1, [0x43; 4096], "a refused request had an effect");
    });
}

/// A sector in the middle of a cluster, where a node has to copy, to wait, or to encrypt more than the guest asked for.
#[test]
fn blk_36_one_sector_of_a_cluster() {
    const PLACE: u64 = 131;
    let mut scene = Scene::new();
    let server = scene.server();
    let path = |name: &str| server.dir().join(name);
    let base: Vec<u8> = (0..1 << 20).map(|at: u32| (at / 512) as u8).collect();
    std::fs::write(path("base"), &base).unwrap();
    let make = |arguments: &[&str]| {
        let mut program = Command::new("qemu-img");
        program.arg("create").arg("-q").args(arguments).current_dir(server.dir());
        assert!(program.status().expect("qemu-img is installed (qemu-utils)").success());
    };
    make(&["-f", "qcow2", "-F", "raw", "-b", "base", "top"]);
    let quick = "key-secret=s,iter-time=10";
    make(&["-f", "luks", "--object", "secret,id=s,data=word", "-o", quick, "safe", "1M"]);
    server.qmp("object-add", &json!({ "qom-type": "secret", "id": "s", "data": "word" }));
    server.qmp("object-add", &json!({ "qom-type": "throttle-group", "id": "g", "limits": { "iops-total": 1000 } }));
    let file = |name: &str| json!({ "driver": "file", "filename": path(name) });
    let top = json!({ "driver": "qcow2", "file": file("top"), "backing": file("base") });
    let nodes = [
        (json!({ "driver": "copy-on-read", "node-name": "x", "file": top }), &base[..]),
        (json!({ "driver": "luks", "node-name": "x", "key-secret": "s", "file": file("safe") }), &[]),
        (json!({ "driver": "throttle", "node-name": "x", "throttle-group": "g", "file": file("base") }), &base[..]),
    ];
    for (node, holds) in nodes {
        server.qmp("blockdev-add", &node);
        let socket = path("x.sock");
        let addr = json!({ "type": "unix", "path": socket });
        let export = json!({ "type": "vhost-user-blk", "id": "x", "node-name": "x", "writable": true, "addr": addr });
        server.qmp("block-export-add", &export);
        let mut client = Client::start(&socket, &Setup::default());
        let at = PLACE as usize * 512;
        if !holds.is_empty() {
            let (done, bytes) = client.read(0, PLACE, 512);
            assert_eq!(done.status, status::OK, "{node}");
            assert_eq!(bytes, holds[at..at + 512], "{node}");
        }
        let neighbours = [PLACE - 1, PLACE + 1].map(|sector| client.read(0, sector, 512).1);
        assert_eq!(client.write(0, PLACE, &[0x77; 512]), OK_WRITE, "{node}");
        assert_eq!(client.read(0, PLACE, 512).1, [0x77; 512], "{node}");
        assert_eq!([PLACE - 1, PLACE + 1].map(|sector| client.read(0, sector, 512).1), neighbours, "{node}");
        drop(client);
        server.qmp("block-export-del", &json!({ "id": "x", "mode": "hard" }));
        let removed = || {
            let message = json!({ "execute": "blockdev-del", "arguments": { "node-name": "x" } });
            server.qmp_raw(&message).get("return").is_some()
        };
        let end = Instant::now() + Duration::from_secs(10);
        while !removed() {
            assert!(Instant::now() < end, "the node stays: {node}");
            pause(Duration::from_millis(10));
        }
    }
    server.qmp("object-del", &json!({ "id": "g" }));
    server.qmp("object-del", &json!({ "id": "s" }));
    scene.still_good();
}

fn unsupported(kinds: &[u32]) {
    on_a_disk(|_, client| {
        for &kind in kinds {
            client.memory().fill(DATA, 512, POISON);
            assert_eq!(client.request(0, kind, 0, &[]), UNSUPP, "type {kind} without data");
            assert_eq!(client.request(0, kind, 0, &[writable(DATA, 512)]), UNSUPP, "type {kind} with room for data");
            assert_eq!(client.request(0, kind, 0, &[readable(DATA, 512)]), UNSUPP, "type {kind} with data");
            assert!(untouched(client, 512), "type {kind} wrote something");
        }
    });
}

fn refused_on_read_only(features: u64) {
    let mut scene = Scene::read_only();
    let image = scene.server().image("disk-a");
    let changed = || std::fs::metadata(&image).map(|meta| (meta.mtime(), meta.mtime_nsec())).unwrap();
    let before = changed();
    let mut client = scene.client_with(&Setup { features, ..Setup::default() });
    assert_ne!(client.offered() & feature::RO, 0, "a read-only disk must say so");
    assert_eq!(client.write(0, 0, &[1; 512]), IOERR);
    assert_eq!(client.discard(0, 0, 8), IOERR);
    assert_eq!(client.write_zeroes(0, 0, 8, false), IOERR);
    assert_eq!(client.write_zeroes(0, 0, 8, true), IOERR);
    assert_eq!(client.read(0, 0, 512).1, [0; 512]);
    assert_eq!(changed(), before, "a read-only image was touched");
    drop(client);
    scene.still_good();
}

/// One request of `bytes`, all of it into the same 16 MiB of guest memory again and again.
fn huge_read(bytes: u64) {
    const AREA: u64 = 1 << 32;
    const PIECE: u64 = 16 << 20;
    let mut scene = Scene::null(8 << 30, "");
    let mut memory = default_memory();
    memory.push(RegionSpec { gpa: AREA, size: PIECE, mmap_offset: 0 });
    let mut client = scene.client_with(&Setup { memory, queue_size: 512, ..Setup::default() });
    let mut data = vec![writable(AREA, PIECE as u32); (bytes / PIECE) as usize];
    if !bytes.is_multiple_of(PIECE) {
        data.push(writable(AREA, (bytes % PIECE) as u32));
    }
    let done = client.request(0, kind::IN, 0, &data);
    let whole = Done { status: status::OK, used: bytes as u32 + 1 };
    assert!([whole, IOERR].contains(&done), "{done:?}");
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

fn untouched(client: &Client, len: usize) -> bool {
    client.memory().read(DATA, len).iter().all(|&byte| byte == POISON)
}
