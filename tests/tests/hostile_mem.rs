//! Memory that lies: tables, slots and files that shrink (MEM) of `hostile-inputs.md`, one test a row.
//!
//! | row | read as |
//! |---|---|
//! | MEM-03 | the table really holds 1000 entries (32 008 bytes), and 8 descriptors come with it |
//! | MEM-12 | `/dev/zero` and `/dev/null`; `/dev/mem` is a character device as they are, and not every kernel has one |
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]
#![expect(clippy::cast_possible_truncation, reason = "addresses of a test's guest are small")]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use trellis_tests::scene::{
    DISK, OK_WRITE, Scene, expect_err_event, expect_hang_up, expect_nack, expect_queue_works, expect_session_alive,
    repeats,
};
use trellis_tests::vhost_user::client::{
    Client, DATA, GAP, Mapping, PROTOCOL, RINGS, SECOND, Setup, default_memory, slot,
};
use trellis_tests::vhost_user::memory::{GuestMemory, RegionSpec};
use trellis_tests::vhost_user::protocol::{
    MemoryRegion, kind, mem_table, protocol_feature, request, single_region, status,
};
use trellis_tests::vhost_user::ring::{RingPlace, Used, readable, writable};
use trellis_tests::vhost_user::wire::{huge_memfd, limit_address_space, memfd, pause, pipe};

#[test]
fn mem_01_no_regions_before_any_ring() {
    let mut scene = Scene::new();
    let client = scene.negotiated();
    client.tell(request::SET_MEM_TABLE, &mem_table(&[]), &[]);
    expect_session_alive(&client);
    drop(client);
    scene.still_good();
}

#[test]
fn mem_01_no_regions_while_rings_live() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    expect_queue_works(&mut client, 0);
    expect_nack(&client, request::SET_MEM_TABLE, &mem_table(&[]), &[]);
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

#[test]
fn mem_02_nine_regions_eight_descriptors() {
    let memory = GuestMemory::new(&pages(9));
    refused_table(&memory.entries(), &memory.fds()[..8]);
}

#[test]
fn mem_03_a_thousand_regions() {
    let memory = GuestMemory::new(&pages(8));
    let entry = |n: u64| MemoryRegion { gpa: n << 16, size: 4096, uva: n << 16, mmap_offset: 0 };
    let entries: Vec<MemoryRegion> = (0..1000).map(entry).collect();
    refused_table(&entries, &memory.fds());
}

#[test]
fn mem_04_three_regions_one_descriptor() {
    let memory = GuestMemory::new(&pages(3));
    refused_table(&memory.entries(), &memory.fds()[..1]);
}

#[test]
fn mem_05_region_of_size_0() {
    refused_second_region(|region| region.size = 0);
}

#[test]
fn mem_06_guest_address_plus_size_wraps() {
    refused_second_region(|region| region.gpa = u64::MAX - 4095);
    refused_second_region(|region| region.gpa = u64::MAX - 8191);
}

#[test]
fn mem_07_offset_plus_size_wraps() {
    refused_second_region(|region| region.mmap_offset = u64::MAX - 4095);
}

#[test]
fn mem_08_regions_overlap_for_the_guest() {
    refused_second_region(|region| region.gpa = DATA + 4096);
}

#[test]
fn mem_09_regions_overlap_for_the_front_end() {
    let first = GuestMemory::new(&pages(2)).entries()[0].uva;
    refused_second_region(|region| region.uva = first + 4096);
}

#[test]
fn mem_10_region_larger_than_its_file() {
    refused_second_region(|region| region.size += 4096);
    refused_second_region(|region| region.mmap_offset += 4096);
    refused_second_region(|region| region.size = 1 << 40);
}

/// Neither the kernel nor the protocol engine could unmap the part of a page.
#[test]
fn mem_10_region_that_is_a_part_of_a_huge_page() {
    let Some(file) = huge_memfd(2 * HUGE) else { return eprintln!("SKIPPED: this kernel has no huge pages") };
    let mut scene = Scene::new();
    let client = scene.negotiated_protocol(PROTOCOL | protocol_feature::CONFIGURE_MEM_SLOTS);
    for (size, mmap_offset) in [(4096, 0), (HUGE + 4096, 0), (HUGE, 4096)] {
        let payload = single_region(MemoryRegion { gpa: 0, size, uva: 0, mmap_offset });
        for _ in 0..200 {
            if client.ask_ack(request::ADD_MEM_REG, &payload, &[file.as_fd()]) == 0 {
                client.tell(request::REM_MEM_REG, &payload, &[]);
            }
        }
        let maps = scene.server().shared_maps();
        assert_eq!(maps, 0, "{size} bytes at {mmap_offset} of a file in huge pages stay mapped");
        expect_nack(&client, request::ADD_MEM_REG, &payload, &[file.as_fd()]);
    }
    let whole = single_region(MemoryRegion { gpa: 0, size: HUGE, uva: 0, mmap_offset: HUGE });
    for _ in 0..200 {
        client.tell(request::ADD_MEM_REG, &whole, &[file.as_fd()]);
        client.tell(request::REM_MEM_REG, &whole, &[]);
    }
    assert_eq!(scene.server().shared_maps(), 0, "regions that were removed stay mapped");
    drop(client);
    scene.still_good();
}

/// Huge pages are mapped without being set aside. Where the pool has none left, the first touch is as if the page had
/// vanished.
#[test]
fn mem_18_request_header_in_a_huge_page_that_nobody_can_give() {
    let Some(file) = huge_memfd(HUGE) else { return eprintln!("SKIPPED: this kernel has no huge pages") };
    if huge_pages_free() > 0 {
        return eprintln!("SKIPPED: there are huge pages to be had");
    }
    let scene = Scene::new();
    let mut client = scene.client_with(&Setup { queues: 2, ..slot_setup() });
    expect_queue_works(&mut client, 0);
    let lost = MemoryRegion { gpa: 1 << 32, size: HUGE, uva: 1 << 32, mmap_offset: 0 };
    client.tell(request::ADD_MEM_REG, &single_region(lost), &[file.as_fd()]);
    let status = client.prepare(0, kind::FLUSH, 0).status;
    client.submit(0, &[readable(lost.gpa + 8192, 16), writable(status, 1)]);
    expect_vanished_memory(scene, client);
}

#[test]
fn mem_11_descriptor_is_a_directory() {
    refused_file(File::open("/").unwrap().into());
}

#[test]
fn mem_11_descriptor_is_a_pipe() {
    refused_file(pipe().0);
}

#[test]
fn mem_11_descriptor_is_a_read_only_file() {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    refused_file(File::open(file.path()).unwrap().into());
}

#[test]
fn mem_11_descriptor_is_a_closed_socket() {
    refused_file(UnixStream::pair().unwrap().0.into());
}

#[test]
fn mem_12_descriptor_is_dev_zero() {
    refused_file(device("/dev/zero"));
}

#[test]
fn mem_12_descriptor_is_dev_null() {
    refused_file(device("/dev/null"));
}

/// A page fault in it is answered by whoever has the file system, at their own pace.
#[test]
fn mem_12_descriptor_is_a_file_on_a_disk() {
    let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.set_len(1 << 20).unwrap();
    refused_file(file.into());
}

#[test]
fn mem_12_files_in_memory_are_taken() {
    let mut scene = Scene::new();
    let client = scene.negotiated();
    let named = tempfile::tempfile_in("/dev/shm").unwrap();
    named.set_len(1 << 20).unwrap();
    for file in [OwnedFd::from(named), memfd(1 << 20)] {
        let entry = MemoryRegion { gpa: DATA, size: 1 << 16, uva: DATA, mmap_offset: 0 };
        client.tell(request::SET_MEM_TABLE, &mem_table(&[entry]), &[file.as_fd()]);
    }
    drop(client);
    scene.still_good();
}

#[test]
fn mem_13_add_region_with_no_or_two_descriptors() {
    let mut scene = Scene::new();
    let client = scene.negotiated_protocol(PROTOCOL | protocol_feature::CONFIGURE_MEM_SLOTS);
    let memory = GuestMemory::new(&pages(2));
    let payload = single_region(memory.entries()[0]);
    let before = scene.extra_fds();
    expect_nack(&client, request::ADD_MEM_REG, &payload, &[]);
    expect_nack(&client, request::ADD_MEM_REG, &payload, &memory.fds());
    assert!(scene.extra_fds() <= before, "descriptors that came with a refused message are kept");
    drop(client);
    scene.still_good();
}

#[test]
fn mem_14_add_region_beyond_the_last_slot() {
    let mut scene = Scene::new();
    let client = scene.negotiated_protocol(PROTOCOL | protocol_feature::CONFIGURE_MEM_SLOTS);
    let slots = client.ask(request::GET_MAX_MEM_SLOTS, &[]).u64();
    assert!((1..600).contains(&slots), "{slots} memory slots");
    let file = memfd(600 * 4096);
    let region = |n: u64| MemoryRegion { gpa: n << 13, size: 4096, uva: n << 13, mmap_offset: n << 12 };
    for n in 0..slots {
        client.tell(request::ADD_MEM_REG, &single_region(region(n)), &[file.as_fd()]);
    }
    for n in slots..600 {
        expect_nack(&client, request::ADD_MEM_REG, &single_region(region(n)), &[file.as_fd()]);
    }
    client.tell(request::REM_MEM_REG, &single_region(region(0)), &[]);
    client.tell(request::ADD_MEM_REG, &single_region(region(599)), &[file.as_fd()]);
    drop(client);
    scene.still_good();
}

#[test]
fn mem_15_the_same_region_added_twice() {
    let mut scene = Scene::new();
    let client = scene.negotiated_protocol(PROTOCOL | protocol_feature::CONFIGURE_MEM_SLOTS);
    let region = &client.memory().regions()[0];
    client.tell(request::ADD_MEM_REG, &single_region(region.entry()), &[region.file()]);
    expect_nack(&client, request::ADD_MEM_REG, &single_region(region.entry()), &[region.file()]);
    drop(client);
    scene.still_good();
}

#[test]
fn mem_16_removing_an_unknown_region() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&slot_setup());
    let known = client.memory().regions()[0].entry();
    for unknown in [
        MemoryRegion { gpa: known.gpa + 4096, ..known },
        MemoryRegion { uva: known.uva + 4096, ..known },
        MemoryRegion { size: known.size - 4096, ..known },
    ] {
        expect_nack(&client, request::REM_MEM_REG, &single_region(unknown), &[]);
    }
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

#[test]
fn mem_17_region_removed_under_a_live_ring() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&Setup { queues: 2, ..slot_setup() });
    expect_queue_works(&mut client, 0);
    let rings = client.memory().regions()[0].entry();
    client.tell(request::REM_MEM_REG, &single_region(rings), &[]);
    let chain = client.chain(0, kind::FLUSH, 0, &[]);
    client.submit(0, &chain);
    expect_err_event(&mut client, 0);
    assert_eq!(client.memory().byte(slot(0).status), status::UNTOUCHED, "a request from unmapped memory was executed");
    expect_session_alive(&client);
    drop(client);
    scene.still_good();
}

#[test]
fn mem_18_request_header_in_the_hole_of_a_shrunk_file() {
    let scene = Scene::new();
    let mut client = scene.client_with(&Setup { queues: 2, ..Setup::default() });
    expect_queue_works(&mut client, 0);
    client.memory().regions()[1].shrink_to(HOLE - SECOND);
    let status = client.prepare(0, kind::FLUSH, 0).status;
    client.submit(0, &[readable(HOLE, 16), writable(status, 1)]);
    expect_vanished_memory(scene, client);
}

#[test]
fn mem_19_descriptor_table_in_the_hole_of_a_shrunk_file() {
    let scene = Scene::new();
    let mut client = scene.mapped();
    let usual = RingPlace::packed_at(RINGS, 256);
    client.add_queue_at(0, RingPlace { desc: HOLE, ..usual }, 256);
    client.announce_queue(0);
    client.enable_queue(0, true);
    expect_queue_works(&mut client, 0);
    // The chain of the last read still stands in the table; it is offered once more after its page has gone.
    client.queue(0).ring.publish(0);
    client.memory().regions()[1].shrink_to(HOLE - SECOND);
    client.kick(0);
    expect_vanished_memory(scene, client);
}

#[test]
fn mem_20_status_byte_in_the_hole_of_a_shrunk_file() {
    let scene = Scene::new();
    let mut client = scene.client();
    expect_queue_works(&mut client, 0);
    client.memory().regions()[1].shrink_to(HOLE - SECOND);
    let header = client.prepare(0, kind::FLUSH, 0).header;
    client.submit(0, &[readable(header, 16), writable(HOLE, 1)]);
    expect_vanished_memory(scene, client);
}

#[test]
fn mem_21_data_in_the_hole_of_a_shrunk_file() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    expect_queue_works(&mut client, 0);
    client.memory().regions()[1].shrink_to(HOLE - SECOND);
    assert_eq!(client.request(0, kind::IN, 0, &[writable(HOLE, 4096)]).status, status::IOERR);
    assert_eq!(client.request(0, kind::OUT, 0, &[readable(HOLE, 4096)]).status, status::IOERR);
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

#[test]
fn mem_22_the_same_table_again_and_again_during_io() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    let (slots, heads): (Vec<u64>, Vec<u16>) = ((0..8).collect(), (0..8).map(|n| n * 3).collect());
    // 2000 replacements in the long form; a lost or doubled request shows in the first few hundred.
    for _ in 0..repeats(200, 2000) {
        for (&n, &head) in slots.iter().zip(&heads) {
            let chain = client.chain(n, kind::IN, n * 8, &[writable(DATA + n * 4096, 4096)]);
            client.queue(0).ring.write_chain(head, &chain);
        }
        client.queue(0).ring.publish_all(&heads);
        client.kick(0);
        client.set_mem_table();
        let mut done: Vec<Used> = heads.iter().map(|_| client.used(0)).collect();
        done.sort_by_key(|used| used.head);
        let expected: Vec<Used> = heads.iter().map(|&head| Used { head: head.into(), len: 4097 }).collect();
        assert_eq!(done, expected);
        assert!(slots.iter().all(|&n| client.memory().byte(slot(n).status) == status::OK));
    }
    drop(client);
    scene.still_good();
}

/// The specification asks neither for an order nor for zeroes in the padding.
#[test]
fn mem_22_the_same_table_in_another_order() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    let pattern: Vec<u8> = (0..=255).cycle().take(4096).collect();
    for padding in [0, 1, u8::MAX] {
        let (mut entries, mut fds) = (client.memory().entries(), client.memory().fds());
        entries.reverse();
        fds.reverse();
        let mut table = mem_table(&entries);
        table[4..8].fill(padding);
        client.tell(request::SET_MEM_TABLE, &table, &fds);
        assert_eq!(client.write(0, 0, &pattern), OK_WRITE);
        assert_eq!(client.read(0, 0, 4096).1, pattern, "a region lies where another should");
        let data = client.request(0, kind::IN, 0, &[writable(GAP - 4096, 4096)]);
        assert_eq!((data.status, client.memory().read(GAP - 4096, 4096)), (status::OK, pattern.clone()));
    }
    drop(client);
    scene.still_good();
}

/// What is in flight ends in the memory from which it came, and the new memory's data stay as they were.
#[test]
fn mem_23_another_file_while_io_is_in_flight() {
    let mut scene = Scene::slow();
    let mut client = scene.client();
    client.memory().fill(DATA, 4096, 0xAA);
    let chain = client.chain(0, kind::IN, 0, &[writable(DATA, 4096)]);
    client.submit(0, &chain);
    pause(trellis_tests::scene::SLOW / 6);
    let fresh = GuestMemory::new(&default_memory());
    fresh.write(RINGS, &client.memory().read(RINGS, (SECOND - RINGS) as usize));
    fresh.fill(DATA, 4096, 0xBB);
    client.tell(request::SET_MEM_TABLE, &mem_table(&fresh.entries()), &fresh.fds());
    pause(trellis_tests::scene::SLOW * 2);
    assert!(client.memory().read(DATA, 4096).iter().all(|&byte| byte == 0), "the read did not reach its own memory");
    assert_eq!(client.memory().byte(slot(0).status), status::OK);
    assert!(fresh.read(DATA, 4096).iter().all(|&byte| byte == 0xBB), "the read went to memory that came later");
    drop(client);
    scene.still_good();
}

#[test]
fn mem_24_region_of_128_tib() {
    let mut scene = Scene::new();
    let client = scene.negotiated();
    let size = 1 << 47;
    let file = memfd(size);
    let before = scene.server().rss_anon_kib();
    let entry = MemoryRegion { gpa: 0, size, uva: 1 << 48, mmap_offset: 0 };
    // Taken or refused, both are right; what is asked is that nothing is paid for it.
    client.ask_ack(request::SET_MEM_TABLE, &mem_table(&[entry]), &[file.as_fd()]);
    expect_session_alive(&client);
    let more = scene.server().rss_anon_kib().saturating_sub(before);
    assert!(more < 4096, "{more} KiB of memory for a sparse region");
    drop(client);
    scene.still_good();
}

#[test]
fn mem_25_mmap_fails() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    let huge = GuestMemory::new(&[RegionSpec { gpa: 0, size: 64 << 30, mmap_offset: 0 }]);
    let server = scene.server();
    let now = server.address_space_kib() << 10;
    limit_address_space(server.pid(), Some(now + (1 << 30)));
    expect_nack(&client, request::SET_MEM_TABLE, &mem_table(&huge.entries()), &huge.fds());
    limit_address_space(scene.server().pid(), None);
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

/// Each step leaves a slow request in memory that nobody has any more. Sooner or later that is too much, which is said
/// to whoever does it, and to nobody else.
#[test]
fn mem_25_requests_under_way_hold_old_memory() {
    let mut scene = Scene::null(DISK, ",latency-ns=4000000000");
    let mut client = scene.client_with(&Setup { queue_size: 4096, ..slot_setup() });
    let file = memfd(4096);
    let region =
        |n: u64| MemoryRegion { gpa: (1 << 32) + (n << 13), size: 4096, uva: (1 << 40) + (n << 13), mmap_offset: 0 };
    let slots = client.ask(request::GET_MAX_MEM_SLOTS, &[]).u64() - client.memory().regions().len() as u64;
    for n in 0..slots {
        client.tell(request::ADD_MEM_REG, &single_region(region(n)), &[file.as_fd()]);
    }
    let mut refused = 0;
    for step in 0..1200 {
        let chain = client.chain(step, kind::IN, 0, &[writable(DATA, 512)]);
        client.queue(0).ring.write_chain((step * 3 % 4096) as u16, &chain);
        client.queue(0).ring.publish((step * 3 % 4096) as u16);
        client.kick(0);
        pause(Duration::from_micros(200));
        client.tell(request::REM_MEM_REG, &single_region(region(step)), &[]);
        let next = single_region(region(slots + step));
        if client.ask_ack(request::ADD_MEM_REG, &next, &[file.as_fd()]) != 0 {
            refused += 1;
            break;
        }
    }
    assert_eq!(refused, 1, "an export may hold any number of mappings");
    expect_session_alive(&client);
    let maps = scene.server().shared_maps();
    assert!(maps < 4000, "{maps} mappings of guest memory for 509 regions");
    scene.neighbour_works();
    drop(client);
    scene.still_good();
}

/// A table is refused before and while rings run, and the session goes on; what was in force stays in force.
fn refused_table(entries: &[MemoryRegion], fds: &[BorrowedFd<'_>]) {
    let mut scene = Scene::new();
    expect_nack(&scene.negotiated(), request::SET_MEM_TABLE, &mem_table(entries), fds);
    let mut client = scene.client();
    expect_nack(&client, request::SET_MEM_TABLE, &mem_table(entries), fds);
    expect_queue_works(&mut client, 0);
    // Without need_reply a refusal cannot be said, so the session ends.
    client.wire().send(request::SET_MEM_TABLE, &mem_table(entries), fds).unwrap();
    expect_hang_up(client.wire());
    drop(client);
    scene.still_good();
}

/// A table of two good regions is refused once `spoil` has been at the second.
fn refused_second_region(spoil: impl FnOnce(&mut MemoryRegion)) {
    let memory = GuestMemory::new(&pages(2));
    let mut entries = memory.entries();
    spoil(&mut entries[1]);
    refused_table(&entries, &memory.fds());
}

fn refused_file(file: OwnedFd) {
    let entry = MemoryRegion { gpa: DATA, size: 1 << 16, uva: DATA, mmap_offset: 0 };
    refused_table(&[entry], &[file.as_fd()]);
}

/// Memory that vanished breaks the queue and ends the session, and harms nobody else.
fn expect_vanished_memory(mut scene: Scene, mut client: Client) {
    expect_err_event(&mut client, 0);
    expect_hang_up(client.wire());
    drop(client);
    scene.still_good();
}

fn device(path: &str) -> OwnedFd {
    File::options().read(true).write(true).open(path).unwrap().into()
}

/// `count` regions of 16 pages in the data area's address range, apart from each other.
fn pages(count: u64) -> Vec<RegionSpec> {
    (0..count).map(|n| RegionSpec { gpa: DATA + (n << 17), size: 1 << 16, mmap_offset: 0 }).collect()
}

fn slot_setup() -> Setup {
    let protocol = PROTOCOL | protocol_feature::CONFIGURE_MEM_SLOTS;
    Setup { mapping: Mapping::Slots, protocol, ..Setup::default() }
}

/// Where the second region's file is cut off.
const HOLE: u64 = SECOND + (1 << 19);

/// Bytes of a usual huge page.
const HUGE: u64 = 2 << 20;

fn huge_pages_free() -> usize {
    let all = std::fs::read_to_string("/proc/meminfo").unwrap();
    let free = all.lines().find_map(|line| line.strip_prefix("HugePages_Free:"));
    free.map_or(0, |free| free.trim().parse().unwrap())
}
