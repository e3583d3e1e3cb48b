//! Descriptors that lie (VQ) of `hostile-inputs.md`, one test a row.
//!
//! | row | here as, or why not |
//! |---|---|
//! | VQ-24 | the limit is the queue size (1024 here), as conformance row 46 has it |
//! | VQ-34, VQ-36 | one plain disk here; that replicas are written from one copy is `all_copies_get_the_same_bytes` of quorum |
//! | VQ-41, VQ-42 | packed rings are a later feature |
//! | VQ-43 | a server that maps every region for writing refuses a sealed file as it refuses a read-only one (MEM-11); it may also take it and fail the read |
#![expect(clippy::cast_possible_truncation, reason = "indices and lengths of tests are short")]

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use trellis_tests::scene::{
    SLOW, Scene, expect_err_event, expect_queue_broken, expect_queue_works, expect_session_alive, repeats,
};
use trellis_tests::vhost_user::client::{
    Client, DATA, END, FEATURES, GAP, RINGS, SECOND, SLOTS, Setup, default_memory, slot,
};
use trellis_tests::vhost_user::memory::RegionSpec;
use trellis_tests::vhost_user::protocol::{blk_header, feature, kind, mem_table, request, status};
use trellis_tests::vhost_user::ring::{Desc, INDIRECT, NEXT, RingPlace, WRITE, linked, readable, writable};
use trellis_tests::vhost_user::wire::{pause, seal_future_writes, signal};

#[test]
fn vq_01_avail_idx_jumps() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&Setup { queues: 2, queue_size: 8, ..Setup::default() });
    let chain = client.chain(0, kind::FLUSH, 0, &[]);
    client.queue(0).ring.write_chain(0, &chain);
    client.queue(0).ring.store_avail_idx(5000);
    client.kick(0);
    expect_queue_broken(&mut client, 0, 0);
    drop(client);
    scene.still_good();
}

/// One guest's noise keeps nobody from hearing of another's trouble.
#[test]
fn vq_01_a_noisy_guest_does_not_silence_the_others() {
    let mut scene = Scene::new();
    let mut noisy = scene.client_with(&Setup { queue_size: 8, ..Setup::default() });
    for _ in 0..20 {
        noisy.queue(0).ring.store_avail_idx(5000);
        noisy.kick(0);
        expect_err_event(&mut noisy, 0);
        noisy.restart_queue(0);
    }
    let mut other = Client::start(&scene.server().socket("b"), &Setup { queue_size: 8, ..Setup::default() });
    other.queue(0).ring.store_avail_idx(5000);
    other.kick(0);
    expect_err_event(&mut other, 0);
    let said = |scene: &mut Scene, queue: &str| {
        let log = scene.server().log();
        log.lines().filter(|line| line.contains("broke the queue") && line.contains(queue)).count()
    };
    let end = Instant::now() + Duration::from_secs(5);
    while said(&mut scene, "b.0") == 0 && Instant::now() < end {
        pause(Duration::from_millis(10));
    }
    assert_eq!(said(&mut scene, "b.0"), 1, "{}", scene.server().log());
    assert_eq!(said(&mut scene, "a.0"), 10, "{}", scene.server().log());
    drop((noisy, other));
    scene.still_good();
}

#[test]
fn vq_02_avail_idx_goes_backwards() {
    let (mut scene, mut client) = two_queues();
    expect_queue_works(&mut client, 0);
    client.queue(0).ring.store_avail_idx(0);
    client.kick(0);
    expect_queue_broken(&mut client, 0, 1);
    drop(client);
    scene.still_good();
}

#[test]
fn vq_03_head_beyond_the_table() {
    for head in [256, 257, u16::MAX] {
        let (mut scene, mut client) = two_queues();
        client.queue(0).ring.publish(head);
        client.kick(0);
        expect_queue_broken(&mut client, 0, 0);
        drop(client);
        scene.still_good();
    }
}

#[test]
fn vq_04_next_beyond_the_table() {
    for next in [256, u16::MAX] {
        breaks(|client| {
            let header = client.prepare(0, kind::IN, 0).header;
            client.queue(0).ring.write_desc(0, Desc { addr: header, len: 16, flags: NEXT, next });
            None
        });
    }
}

#[test]
fn vq_05_self_loop() {
    breaks(|client| loop_of(client, 1));
}

#[test]
fn vq_05_two_cycle() {
    breaks(|client| loop_of(client, 2));
}

#[test]
fn vq_05_full_cycle() {
    breaks(|client| loop_of(client, 256));
}

#[test]
fn vq_06_data_of_length_0() {
    let (mut scene, mut client) = two_queues();
    let chain = client.chain(0, kind::IN, 0, &[writable(DATA, 0), writable(DATA, 512), writable(DATA, 0)]);
    client.submit(0, &chain);
    match client.used_within(0, Duration::from_millis(500)) {
        Some(used) => assert_eq!((used.len, client.memory().byte(slot(0).status)), (513, status::OK)),
        None => expect_queue_broken(&mut client, 0, 0),
    }
    drop(client);
    scene.still_good();
}

#[test]
fn vq_07_header_of_length_0() {
    breaks(|client| {
        let slot = client.prepare(0, kind::FLUSH, 0);
        Some(vec![readable(slot.header, 0), writable(slot.status, 1)])
    });
}

#[test]
fn vq_07_status_of_length_0() {
    breaks(|client| {
        let slot = client.prepare(0, kind::FLUSH, 0);
        Some(vec![readable(slot.header, 16), writable(slot.status, 0)])
    });
}

#[test]
fn vq_08_buffer_unmapped() {
    for address in [0, END, 1 << 40, u64::MAX - 4096] {
        breaks(|client| Some(client.chain(0, kind::IN, 0, &[writable(address, 512)])));
    }
}

#[test]
fn vq_09_address_plus_length_wraps() {
    breaks(|client| Some(client.chain(0, kind::IN, 0, &[writable(u64::MAX - 511, 1024)])));
    breaks(|client| Some(client.chain(0, kind::IN, 0, &[writable(DATA, u32::MAX)])));
}

#[test]
fn vq_10_buffer_runs_past_its_region() {
    breaks(|client| Some(client.chain(0, kind::IN, 0, &[writable(END - 512, 1024)])));
    breaks(|client| Some(client.chain(0, kind::OUT, 0, &[readable(END - 512, 1024)])));
    breaks(|client| {
        let status = client.prepare(0, kind::FLUSH, 0).status;
        Some(vec![readable(END - 8, 16), writable(status, 1)])
    });
}

#[test]
fn vq_11_buffer_straddles_two_adjacent_regions() {
    let (mut scene, mut client) = two_queues();
    let pattern: Vec<u8> = (0..=255).cycle().take(2048).collect();
    let edge = SECOND - 700;
    client.memory().write(edge, &pattern);
    assert_eq!(client.request(0, kind::OUT, 8, &[readable(edge, 2048)]).status, status::OK);
    client.memory().fill(edge, 2048, 0);
    assert_eq!(client.request(0, kind::IN, 8, &[writable(edge, 2048)]).used, 2049);
    assert_eq!(client.memory().read(edge, 2048), pattern);
    // Header and status may straddle as well as data.
    client.memory().write(SECOND - 5, &blk_header(kind::IN, 0, 8));
    client.memory().fill(DATA, 2048, 0);
    client.run(0, &[readable(SECOND - 5, 16), writable(DATA, 2048), writable(slot(0).status, 1)]);
    assert_eq!(client.memory().read(DATA, 2048), pattern);
    drop(client);
    scene.still_good();
}

#[test]
fn vq_12_indirect_table_straddles_two_regions() {
    let (mut scene, mut client) = two_queues();
    // 3 entries are 48 bytes: every split of them over the edge, also inside an entry.
    for before in 1..48 {
        read_through_indirect(&mut client, SECOND - before, &[writable(DATA, 512)]);
    }
    drop(client);
    scene.still_good();
}

#[test]
fn vq_13_indirect_table_of_1024_straddles_two_regions() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&Setup { queue_size: 1024, ..Setup::default() });
    let data: Vec<Desc> = (0..1022).map(|n| writable(DATA + n * 512, 512)).collect();
    for before in [1, 8, 16, 17, 4096, 8192, 16383] {
        read_through_indirect(&mut client, SECOND - before, &data);
    }
    drop(client);
    scene.still_good();
}

#[test]
fn vq_14_buffer_in_a_gap() {
    breaks(|client| Some(client.chain(0, kind::IN, 0, &[writable(GAP, 512)])));
    breaks(|client| Some(client.chain(0, kind::OUT, 0, &[readable(SLOTS - 512, 512)])));
    breaks(|client| Some(client.chain(0, kind::IN, 0, &[writable(GAP - 256, 512)])));
}

#[test]
fn vq_15_status_in_a_readable_descriptor() {
    breaks(|client| {
        let slot = client.prepare(0, kind::OUT, 0);
        Some(vec![readable(slot.header, 16), readable(DATA, 512), readable(slot.status, 1)])
    });
}

#[test]
fn vq_16_writable_before_readable() {
    breaks(|client| {
        let slot = client.prepare(0, kind::OUT, 0);
        Some(vec![readable(slot.header, 16), writable(slot.status, 1), readable(DATA, 512)])
    });
    breaks(|client| {
        let slot = client.prepare(0, kind::OUT, 0);
        Some(vec![writable(slot.status, 1), readable(slot.header, 16)])
    });
}

#[test]
fn vq_17_only_a_status_byte() {
    breaks(|client| Some(vec![writable(client.prepare(0, kind::FLUSH, 0).status, 1)]));
}

#[test]
fn vq_18_no_writable_byte() {
    breaks(|client| Some(vec![readable(client.prepare(0, kind::FLUSH, 0).header, 16)]));
}

#[test]
fn vq_19_header_of_8_bytes() {
    breaks(|client| {
        let slot = client.prepare(0, kind::FLUSH, 0);
        Some(vec![readable(slot.header, 8), writable(slot.status, 1)])
    });
}

#[test]
fn vq_20_short_headers_then_a_good_request() {
    breaks(|client| {
        for n in 0..64 {
            let slot = client.prepare(u64::from(n), kind::FLUSH, 0);
            client.queue(0).ring.write_chain(2 * n, &[readable(slot.header, 8), writable(slot.status, 1)]);
        }
        let good = client.chain(64, kind::FLUSH, 0, &[]);
        client.queue(0).ring.write_chain(128, &good);
        let heads: Vec<u16> = (1..65).map(|n| 2 * n).collect();
        client.queue(0).ring.publish_all(&heads);
        None
    });
}

#[test]
fn vq_21_header_in_pieces() {
    let (mut scene, mut client) = two_queues();
    let slot = client.prepare(0, kind::IN, 0);
    let (data, end) = (writable(DATA, 512), writable(slot.status, 1));
    let ones = (0..16).map(|n| readable(slot.header + n, 1));
    for chain in
        [vec![readable(slot.header, 1), readable(slot.header + 1, 15), data, end], ones.chain([data, end]).collect()]
    {
        client.memory().write(slot.status, &[status::UNTOUCHED]);
        assert_eq!(client.run(0, &chain).len, 513);
        assert_eq!(client.memory().byte(slot.status), status::OK);
    }
    drop(client);
    scene.still_good();
}

#[test]
fn vq_21_header_and_data_in_one_descriptor() {
    let (mut scene, mut client) = two_queues();
    client.memory().write(DATA, &blk_header(kind::OUT, 0, 3));
    client.memory().fill(DATA + 16, 1024, 0xC7);
    client.run(0, &[readable(DATA, 16 + 1024), writable(slot(0).status, 1)]);
    assert_eq!(client.memory().byte(slot(0).status), status::OK);
    let (_, bytes) = client.read(0, 3, 1024);
    assert_eq!(bytes, [0xC7; 1024]);
    drop(client);
    scene.still_good();
}

#[test]
fn vq_22_status_at_the_tail_of_the_data() {
    let (mut scene, mut client) = two_queues();
    assert_eq!(client.write(0, 5, &[0x3C; 1024]).status, status::OK);
    let header = client.prepare(0, kind::IN, 5).header;
    client.memory().fill(DATA, 1026, 0xEE);
    assert_eq!(client.run(0, &[readable(header, 16), writable(DATA, 1025)]).len, 1025);
    assert_eq!(client.memory().read(DATA, 1024), [0x3C; 1024]);
    assert_eq!(client.memory().read(DATA + 1024, 2), [status::OK, 0xEE]);
    drop(client);
    scene.still_good();
}

#[test]
fn vq_23_indirect_table_of_bad_length() {
    for len in [17, 0, 15, u32::MAX - 15] {
        breaks(|client| Some(vec![indirect_table(client, TABLE, Some(len), &[writable(DATA, 512)])]));
    }
}

#[test]
fn vq_24_indirect_table_at_and_over_the_limit() {
    let setup = Setup { queues: 2, queue_size: 1024, ..Setup::default() };
    let mut scene = Scene::new();
    let mut client = scene.client_with(&setup);
    let data = |count| -> Vec<Desc> { (0..count).map(|n| writable(DATA + n % 1024 * 512, 512)).collect() };
    read_through_indirect(&mut client, TABLE, &data(1022));
    for count in [1023, 65534] {
        client.restart_queue(0);
        let table = indirect_table(&client, TABLE, None, &data(count));
        client.submit(0, &[table]);
        expect_queue_broken(&mut client, 0, 0);
    }
    drop(client);
    scene.still_good();
}

#[test]
fn vq_25_nested_indirect() {
    breaks(|client| {
        let inner = indirect_table(client, TABLE, None, &[writable(DATA, 512)]);
        client.memory().write(TABLE + 4096, &inner.bytes());
        Some(vec![Desc { addr: TABLE + 4096, len: 16, flags: INDIRECT, next: 0 }])
    });
}

#[test]
fn vq_26_indirect_with_next() {
    breaks(|client| {
        let table = indirect_table(client, TABLE, None, &[writable(DATA, 512)]);
        Some(vec![table, writable(DATA + 4096, 512)])
    });
}

#[test]
fn vq_27_direct_then_indirect() {
    let (mut scene, mut client) = two_queues();
    assert_eq!(client.write(0, 9, &[0x77; 512]).status, status::OK);
    let slot = client.prepare(0, kind::IN, 9);
    client.memory().fill(DATA, 512, 0);
    let rest = linked(0, &[writable(DATA, 512), writable(slot.status, 1)]);
    client.memory().write(TABLE, &rest.iter().flat_map(|desc| desc.bytes()).collect::<Vec<u8>>());
    let table = Desc { addr: TABLE, len: 32, flags: INDIRECT, next: 0 };
    assert_eq!(client.run(0, &[readable(slot.header, 16), table]).len, 513);
    assert_eq!(client.memory().read(DATA, 512), [0x77; 512]);
    drop(client);
    scene.still_good();
}

#[test]
fn vq_28_indirect_not_negotiated() {
    let mut scene = Scene::new();
    let features = FEATURES & !feature::INDIRECT_DESC;
    let mut client = scene.client_with(&Setup { queues: 2, features, ..Setup::default() });
    let table = indirect_table(&client, TABLE, None, &[writable(DATA, 512)]);
    client.submit(0, &[table]);
    expect_queue_broken(&mut client, 0, 0);
    drop(client);
    scene.still_good();
}

#[test]
fn vq_29_indirect_table_at_an_odd_address() {
    let (mut scene, mut client) = two_queues();
    for odd in [1, 3, 7, 15] {
        read_through_indirect(&mut client, TABLE + odd, &[writable(DATA, 512)]);
    }
    drop(client);
    scene.still_good();
}

#[test]
fn vq_30_head_published_twice_while_in_flight() {
    let mut scene = Scene::slow();
    let mut client = scene.client_with(&Setup { queues: 2, ..Setup::default() });
    let chain = client.chain(0, kind::IN, 0, &[writable(DATA, 512)]);
    client.submit(0, &chain);
    pause(SLOW / 6);
    client.queue(0).ring.publish(0);
    client.kick(0);
    expect_err_event(&mut client, 0);
    expect_session_alive(&client);
    expect_queue_works(&mut client, 1);
    client.restart_queue(0);
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

#[test]
fn vq_31_more_than_2_to_the_32_bytes() {
    let mut scene = Scene::new();
    let mut memory = default_memory();
    memory.push(RegionSpec { gpa: HUGE, size: 6 << 30, mmap_offset: 0 });
    let mut client = scene.client_with(&Setup { queues: 2, memory, ..Setup::default() });
    let chain = client.chain(0, kind::IN, 0, &[writable(HUGE, u32::MAX), writable(HUGE, u32::MAX)]);
    client.submit(0, &chain);
    expect_queue_broken(&mut client, 0, 0);
    drop(client);
    scene.still_good();
}

#[test]
fn vq_32_one_byte_data_descriptors() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&Setup { queue_size: 1024, ..Setup::default() });
    let data: Vec<Desc> = (0..512).map(|n| writable(DATA + 2 * n, 1)).collect();
    let done = client.request(0, kind::IN, 0, &data);
    let good = [(status::OK, 513), (status::IOERR, 1)];
    assert!(good.contains(&(done.status, done.used)), "{done:?}");
    drop(client);
    scene.still_good();
}

#[test]
fn vq_33_descriptors_flip_while_they_are_read() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&Setup { queues: 2, ..Setup::default() });
    let canary = canaries(&client);
    let wild = [
        readable(DATA, 512),
        writable(DATA, 512),
        writable(GAP, 512),
        Desc { addr: DATA, len: u32::MAX, flags: WRITE | NEXT, next: u16::MAX },
        Desc { addr: DATA, len: 512, flags: WRITE | NEXT, next: 1 },
        Desc { addr: TABLE, len: 48, flags: INDIRECT, next: 0 },
    ];
    let memory = client.memory().clone();
    while_another_thread(
        |n| memory.write(RINGS + Desc::LEN, &wild[n % wild.len()].bytes()),
        || {
            for _ in 0..repeats(300, 30_000) {
                let chain = client.chain(0, kind::IN, 0, &[writable(DATA, 512)]);
                client.submit(0, &chain);
                if client.used_within(0, Duration::from_millis(20)).is_none() {
                    client.restart_queue(0);
                }
            }
        },
    );
    assert_eq!(canaries(&client), canary, "memory outside every descriptor was written");
    expect_queue_works(&mut client, 1);
    drop(client);
    scene.still_good();
}

#[test]
fn vq_34_header_flips_after_publishing() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&Setup { queues: 2, ..Setup::default() });
    assert_eq!(client.write(0, 0, &[0x11; 512]).status, status::OK);
    assert_eq!(client.write(0, 8, &[0x22; 512]).status, status::OK);
    let memory = client.memory().clone();
    // Both flips change a single byte, so that each moment holds a whole header: IN, UNSUPP (7), sector 0 or 8.
    let (kind_at, sector_at) = (slot(0).header, slot(0).header + 8);
    while_another_thread(
        |n| {
            memory.write(sector_at, &[if n % 2 == 0 { 0 } else { 8 }]);
            memory.write(kind_at, &[if n % 3 == 0 { 7 } else { 0 }]);
        },
        || {
            for _ in 0..repeats(500, 50_000) {
                let (done, bytes) = client.read(0, 0, 512);
                let whole = [[0x11; 512], [0x22; 512]].iter().any(|one| bytes == one);
                match done.status {
                    status::OK => assert!(whole, "a read mixes two requests"),
                    other => assert_eq!((other, done.used), (status::UNSUPP, 1)),
                }
            }
        },
    );
    drop(client);
    scene.still_good();
}

#[test]
fn vq_35_data_overlaps_ring_header_and_another_request() {
    let mut scene = Scene::new();
    for target in [RINGS, RINGS + 4096, RINGS + 8192, slot(0).header & !511] {
        let mut client = scene.client_with(&Setup { queues: 2, ..Setup::default() });
        let chain = client.chain(0, kind::IN, 0, &[writable(target, 512)]);
        let other = client.chain(1, kind::IN, 0, &[writable(target, 512)]);
        client.queue(0).ring.write_chain(16, &other);
        client.submit(0, &chain);
        client.queue(0).ring.publish(16);
        client.kick(0);
        pause(Duration::from_millis(20));
        expect_queue_works(&mut client, 1);
    }
    scene.still_good();
}

#[test]
fn vq_36_data_change_while_they_are_written() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&Setup { queues: 2, ..Setup::default() });
    let memory = client.memory().clone();
    const BUFFER: u64 = DATA + (1 << 20);
    memory.fill(BUFFER, 65536, 0x11);
    while_another_thread(
        |n| memory.fill(BUFFER + (n as u64 % 16) * 4096, 4096, if n / 16 % 2 == 0 { 0x22 } else { 0x11 }),
        || {
            for _ in 0..repeats(50, 5000) {
                assert_eq!(client.request(0, kind::OUT, 0, &[readable(BUFFER, 65536)]).status, status::OK);
                let (_, bytes) = client.read(1, 0, 65536);
                assert!(bytes.iter().all(|byte| [0x11, 0x22].contains(byte)), "a byte that was never in the buffer");
            }
        },
    );
    drop(client);
    scene.still_good();
}

/// One queue is kept full for ever; the other must keep 40 % of its pace.
#[test]
fn vq_37_avail_bumped_for_ever() {
    let mut scene = Scene::new();
    // A busy machine can spoil one comparison, not three.
    let shares: Vec<f64> = (0..3).map(|_| share_beside_a_flood(&scene)).collect();
    assert!(shares.iter().any(|share| *share >= 0.4), "a flooded queue leaves its neighbour {shares:.2?} of its pace");
    scene.still_good();
}

/// As many reads of a gigabyte as one visit takes, again and again: a neighbour on the same thread goes on.
#[test]
fn vq_37_zeroes_by_the_gigabyte() {
    beside_long_reads(Scene::null_on_one_thread(8 << 30, ""), 1 << 30, 16, Duration::from_secs(1));
}

/// What the page cache has is not copied by the thread that others have requests on, nor by a thread for each request. Not in
/// memory's own file system: that has workers copy in any case.
#[test]
fn vq_37_data_by_the_quarter_gigabyte() {
    const LEN: u64 = 256 << 20;
    let mut file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
    file.as_file().set_len(LEN).unwrap();
    std::io::copy(file.as_file_mut(), &mut std::io::sink()).unwrap();
    for options in ["", ",cache.direct=on"] {
        let mut scene = Scene::file_on_one_thread(file.path(), options);
        let threads = scene.server().threads();
        let most = beside_long_reads(scene, LEN, 64, Duration::from_millis(400));
        assert!(most < threads + 32, "{most} threads, where there were {threads} {options}");
    }
}

#[test]
fn vq_38_kick_storm_without_work() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&Setup { queues: 2, ..Setup::default() });
    let kick = client.queue(0).kick.try_clone().unwrap();
    // 10⁶ in the long form.
    for _ in 0..repeats(50_000, 1_000_000) {
        signal(kick.as_fd());
    }
    while_another_thread(
        |_| signal(kick.as_fd()),
        || {
            let start = Instant::now();
            scene.neighbour_works();
            expect_queue_works(&mut client, 1);
            assert!(start.elapsed() < Duration::from_secs(1), "kicks without work hold others up");
        },
    );
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

#[test]
fn vq_39_used_event_garbage_or_still() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&Setup { features: FEATURES | feature::EVENT_IDX, ..Setup::default() });
    for garbage in [0, 0, 0, u16::MAX, 0x8000, 3, 40_000] {
        client.queue(0).ring.set_used_event(garbage);
        expect_queue_works(&mut client, 0);
    }
    drop(client);
    scene.still_good();
}

#[test]
fn vq_40_reserved_descriptor_flags() {
    let (mut scene, mut client) = two_queues();
    let mut chain = client.chain(0, kind::IN, 0, &[writable(DATA, 512)]);
    for desc in &mut chain {
        desc.flags |= 0xFFF8;
    }
    assert_eq!(client.run(0, &chain).len, 513);
    assert_eq!(client.memory().byte(slot(0).status), status::OK);
    drop(client);
    scene.still_good();
}

#[test]
fn vq_43_read_into_a_sealed_file() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    let mut memory = default_memory();
    memory.push(RegionSpec { gpa: HUGE, size: 1 << 20, mmap_offset: 0 });
    let sealed = trellis_tests::vhost_user::memory::Region::new(memory[3]);
    seal_future_writes(sealed.file());
    let mut entries = client.memory().entries();
    entries.push(sealed.entry());
    let mut fds = client.memory().fds();
    fds.push(sealed.file());
    if client.ask_ack(request::SET_MEM_TABLE, &mem_table(&entries), &fds) == 0 {
        assert_eq!(client.request(0, kind::IN, 0, &[writable(HUGE, 512)]).status, status::IOERR);
    }
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

fn two_queues() -> (Scene, Client) {
    let scene = Scene::new();
    let client = scene.client_with(&Setup { queues: 2, ..Setup::default() });
    (scene, client)
}

/// What `prepare` publishes (its chain at descriptor 0, or what it has published itself with descriptor 0 as the first
/// head) breaks queue 0, and nothing else.
fn breaks(prepare: impl FnOnce(&mut Client) -> Option<Vec<Desc>>) {
    let (mut scene, mut client) = two_queues();
    if let Some(chain) = prepare(&mut client) {
        client.queue(0).ring.write_chain(0, &chain);
    }
    if client.queue(0).ring.avail_idx() == 0 {
        client.queue(0).ring.publish(0);
    }
    client.kick(0);
    expect_queue_broken(&mut client, 0, 0);
    drop(client);
    scene.still_good();
}

/// `length` descriptors in a circle. The first is a whole header, so that the chain begins well.
fn loop_of(client: &mut Client, length: u16) -> Option<Vec<Desc>> {
    let header = client.prepare(0, kind::OUT, 0).header;
    for at in 0..length {
        let desc = Desc { addr: header, len: 16, flags: NEXT, next: (at + 1) % length };
        client.queue(0).ring.write_desc(at, desc);
    }
    None
}

/// Writes a whole read request with `data` as a table at `at`; the descriptor of it, with length `len` if given.
fn indirect_table(client: &Client, at: u64, len: Option<u32>, data: &[Desc]) -> Desc {
    // Tables of 65536 entries end where `next` cannot count any more; the links then wrap.
    let chain = client.chain(0, kind::IN, 0, data);
    let last = chain.len() - 1;
    let entry = |(n, desc): (usize, &Desc)| {
        let flags = if n == last { desc.flags } else { desc.flags | NEXT };
        Desc { flags, next: (n as u16).wrapping_add(1), ..*desc }.bytes()
    };
    let bytes: Vec<u8> = chain.iter().enumerate().flat_map(entry).collect();
    client.memory().write(at, &bytes);
    Desc { addr: at, len: len.unwrap_or(bytes.len() as u32), flags: INDIRECT, next: 0 }
}

/// A read whose whole chain stands in an indirect table at `at` goes well.
fn read_through_indirect(client: &mut Client, at: u64, data: &[Desc]) {
    let len: u32 = data.iter().map(|desc| desc.len).sum();
    let pattern: Vec<u8> = (0..251).cycle().take(len as usize).collect();
    client.memory().write(DATA, &pattern);
    assert_eq!(client.request(0, kind::OUT, 0, &[readable(DATA, len)]).status, status::OK);
    client.memory().fill(DATA, len as usize, 0);
    let table = indirect_table(client, at, None, data);
    assert_eq!(client.run(0, &[table]).len, len + 1, "a table at {at:#x}");
    assert_eq!(client.memory().byte(slot(0).status), status::OK);
    assert_eq!(client.memory().read(DATA, len as usize), pattern, "through a table at {at:#x}");
}

/// What stands where no descriptor of ours ever points.
fn canaries(client: &Client) -> Vec<u8> {
    [END - 4096, SLOTS + (1 << 19), SECOND + 0x8000].iter().flat_map(|&at| client.memory().read(at, 4096)).collect()
}

/// Runs `work` while another thread does `meddle(0)`, `meddle(1)`, … as fast as it can.
fn while_another_thread(meddle: impl Fn(usize) + Send + Sync, work: impl FnOnce()) {
    let over = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            for n in 0.. {
                meddle(n);
                if over.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        // A failed assertion must not leave the other thread meddling for ever.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        over.store(true, Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

/// While queue 0 reads `len` bytes, `heads` times at once, for three seconds, a neighbour waits no longer than `patience`. The most
/// threads that the server had.
fn beside_long_reads(mut scene: Scene, len: u64, heads: u16, patience: Duration) -> usize {
    const PIECE: u64 = 16 << 20;
    let mut memory = default_memory();
    memory.push(RegionSpec { gpa: HUGE, size: PIECE, mmap_offset: 0 });
    let mut client = scene.client_with(&Setup { memory, queue_size: 256, ..Setup::default() });
    let neighbour = scene.socket().with_file_name("b.sock");
    let mut neighbour = Client::start(&neighbour, &Setup::default());
    // Every chain ends in the same data and the same status byte.
    let slot = client.prepare(0, kind::IN, 0);
    let mut tail = vec![writable(HUGE, PIECE as u32); (len / PIECE) as usize];
    tail.push(writable(slot.status, 1));
    let first = 64;
    let ring = &mut client.queue(0).ring;
    ring.write_chain(first, &tail);
    for head in 0..heads {
        ring.write_desc(head, Desc { flags: NEXT, next: first, ..readable(slot.header, 16) });
    }
    ring.publish_all(&(0..heads).collect::<Vec<_>>());
    client.kick(0);
    let start = Instant::now();
    let (mut slowest, mut came_back, mut threads) = (Duration::ZERO, 0, 0);
    while start.elapsed() < Duration::from_secs(if came_back > 0 { 3 } else { 30 }) {
        while let Some(used) = client.queue(0).ring.take_used() {
            assert_eq!(used.len, len as u32 + 1);
            came_back += 1;
            client.queue(0).ring.publish(used.head as u16);
            client.kick(0);
        }
        let begun = Instant::now();
        assert_eq!(neighbour.read(0, 0, 4096).0.status, status::OK);
        slowest = slowest.max(begun.elapsed());
        threads = threads.max(scene.server().threads());
    }
    assert!(slowest < patience, "a neighbour waited {slowest:?}");
    assert!(came_back > 0, "the long ones go on too");
    drop((client, neighbour));
    scene.still_good();
    threads
}

/// The pace of queue 1 while queue 0 is always full, as a share of its pace alone.
fn share_beside_a_flood(scene: &Scene) -> f64 {
    let mut client = scene.client_with(&Setup { queues: 2, ..Setup::default() });
    let alone = batches_in(&mut client, 1, FLOOD);
    // The flood is of cheap requests: what is compared is turns, not the disk's speed.
    for n in 0..64_u16 {
        let chain = client.chain(64 + u64::from(n), kind::GET_ID, 0, &[writable(TABLE, 20)]);
        client.queue(0).ring.write_chain(3 * n, &chain);
    }
    let heads: Vec<u16> = (0..64).map(|n| 3 * n).collect();
    client.queue(0).ring.publish_all(&heads);
    client.kick(0);
    let end = Instant::now() + FLOOD;
    let mut beside = 0;
    while Instant::now() < end {
        while let Some(used) = client.queue(0).ring.take_used() {
            client.queue(0).ring.publish(used.head as u16);
        }
        client.kick(0);
        beside += run_batch(&mut client, 1);
    }
    f64::from(beside) / f64::from(alone)
}

fn batches_in(client: &mut Client, queue: u16, time: Duration) -> u32 {
    let end = Instant::now() + time;
    let mut done = 0;
    while Instant::now() < end {
        done += run_batch(client, queue);
    }
    done
}

/// 32 reads at once; how many were done.
fn run_batch(client: &mut Client, queue: u16) -> u32 {
    for n in 0..32_u16 {
        let chain = client.chain(u64::from(n), kind::IN, 0, &[writable(DATA, 4096)]);
        client.queue(queue).ring.write_chain(3 * n, &chain);
    }
    let heads: Vec<u16> = (0..32).map(|n| 3 * n).collect();
    client.queue(queue).ring.publish_all(&heads);
    client.kick(queue);
    for _ in 0..32 {
        client.used(queue);
    }
    32
}

/// Where indirect tables stand: behind the data that tests with tables use, and room for 65536 entries.
const TABLE: u64 = DATA + (4 << 20);
/// A region of its own, far above the others.
const HUGE: u64 = 1 << 32;
/// How long each pace is measured.
const FLOOD: Duration = Duration::from_millis(400);

#[test]
fn chains_that_share_descriptors_cost_no_more_memory_than_others() {
    const CHAINS: u16 = 300;
    const PIECES: u16 = 4000;
    let mut scene = Scene::null(64 << 20, ",latency-ns=50000000");
    let mut client = scene.client_with(&Setup { queue_size: 8192, ..Setup::default() });
    let before = scene.server().rss_anon_kib();
    let (first, slot) = (CHAINS, client.prepare(0, kind::IN, 0));
    let ring = &mut client.queue(0).ring;
    let mut tail = vec![writable(DATA, 512); usize::from(PIECES)];
    tail.push(writable(slot.status, 1));
    ring.write_chain(first, &tail);
    for head in 0..CHAINS {
        ring.write_desc(head, Desc { flags: NEXT, next: first, ..readable(slot.header, 16) });
    }
    ring.publish_all(&(0..CHAINS).collect::<Vec<_>>());
    client.kick(0);
    let mut most = 0;
    for _ in 0..CHAINS {
        assert_eq!(client.used(0).len, 512 * u32::from(PIECES) + 1);
        most = most.max(scene.server().rss_anon_kib());
    }
    assert!(most < before + (48 << 10), "{most} KiB where there were {before}");
    drop(client);
    scene.still_good();
}

/// A task takes memory, however short its request is.
#[test]
fn a_ring_full_of_flushes_is_not_taken_all_at_once() {
    const CHAINS: u16 = 32768 / 2;
    let mut scene = Scene::null(64 << 20, ",latency-ns=300000000");
    let place = RingPlace::packed_at(HUGE, 32768);
    let mut memory = default_memory();
    memory.push(RegionSpec { gpa: HUGE, size: 2 << 20, mmap_offset: 0 });
    let mut client = Client::mapped(&scene.socket(), &Setup { memory, ..Setup::default() });
    client.add_queue_at(0, place, 32768);
    client.announce_queue(0);
    client.enable_queue(0, true);
    let before = scene.server().rss_anon_kib();
    let slot = client.prepare(0, kind::FLUSH, 0);
    let ring = &mut client.queue(0).ring;
    ring.write_desc(CHAINS, writable(slot.status, 1));
    for head in 0..CHAINS {
        ring.write_desc(head, Desc { flags: NEXT, next: CHAINS, ..readable(slot.header, 16) });
    }
    ring.publish_all(&(0..CHAINS).collect::<Vec<_>>());
    client.kick(0);
    let mut most = 0;
    for _ in 0..CHAINS {
        assert_eq!(client.used(0).len, 1);
        most = most.max(scene.server().rss_anon_kib());
    }
    assert!(most < before + (12 << 10), "{most} KiB where there were {before}");
    drop(client);
    scene.still_good();
}
