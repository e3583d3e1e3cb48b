//! The configuration space (CFG) and the dirty log (LOG-01 to 06) under bad input, of `hostile-inputs.md`, one test a row.
//!
//! LOG-07 to LOG-18 are about in-flight tracking, postcopy and device state, which are later features.
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]
#![expect(clippy::cast_possible_truncation, reason = "offsets into 96 bytes")]

use serde_json::json;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;
use trellis_tests::scene::{
    DISK, OK_WRITE, Scene, expect_hang_up, expect_nack, expect_queue_works, expect_session_alive,
};
use trellis_tests::vhost_user::client::{DATA, END, FEATURES, PROTOCOL, Setup};
use trellis_tests::vhost_user::protocol::{
    MemoryRegion, VRING_F_LOG, config, config_payload, feature, kind, log_base, mem_table, protocol_feature, request,
    single_region, vring_state,
};
use trellis_tests::vhost_user::ring::{RingPlace, writable};
use trellis_tests::vhost_user::wire::{huge_memfd, memfd, set_len};

#[test]
fn cfg_01_get_config_of_256_bytes() {
    refused_get_config(0, 256);
}

#[test]
fn cfg_02_get_config_far_outside() {
    refused_get_config(0xffff_0000, 4);
    refused_get_config(config::LEN as u32, 1);
    refused_get_config(u32::MAX, 2);
}

#[test]
fn cfg_03_get_config_with_less_data_than_its_size() {
    let mut scene = Scene::new();
    let client = scene.negotiated();
    client.wire().send(request::GET_CONFIG, &config_payload(0, 60, 0, &[0; 4]), &[]).unwrap();
    // An error here is a time-out, which would be neither.
    match client.wire().recv().expect("an answer or an end in time") {
        None => {}
        Some(reply) => assert!(is_zero_size(&reply.payload), "{reply:?}"),
    }
    drop(client);
    scene.still_good();
}

#[test]
fn cfg_04_set_capacity() {
    refused_set_config(config::CAPACITY, 0, &(1_u64 << 40).to_le_bytes());
}

#[test]
fn cfg_05_set_writeback_to_2() {
    refused_set_config(config::WRITEBACK, 0, &[2]);
    refused_set_config(config::WRITEBACK, 0, &[255]);
}

/// The operator decides, and the driver sees it; nobody loses a disk over it, even where no refusal can be said.
#[test]
fn cfg_05_write_back_on_an_export_that_writes_through() {
    for acknowledged in [protocol_feature::REPLY_ACK, 0] {
        let mut scene = Scene::with_export(",writethrough=on");
        let protocol = PROTOCOL & !protocol_feature::REPLY_ACK | acknowledged;
        let mut client = scene.client_with(&Setup { protocol, ..Setup::default() });
        assert_eq!(client.config()[config::WRITEBACK], 0);
        let payload = config_payload(config::WRITEBACK as u32, 1, 0, &[1]);
        client.tell(request::SET_CONFIG, &payload, &[]);
        assert_eq!(client.config()[config::WRITEBACK], 0, "it is stable all the same, and says so");
        expect_queue_works(&mut client, 0);
        drop(client);
        scene.still_good();
    }
}

#[test]
fn cfg_06_set_another_capacity_as_live_migration() {
    refused_set_config(config::CAPACITY, 1, &(1_u64 << 40).to_le_bytes());
}

#[test]
fn cfg_07_node_resized_without_a_back_end_channel() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    let capacity = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(capacity(&client.config()), DISK / 512);
    scene.server().qmp("block_resize", &json!({ "node-name": "disk-a", "size": 2 * DISK }));
    assert_eq!(capacity(&client.config()), 2 * DISK / 512);
    assert_eq!(client.write(0, 2 * DISK / 512 - 1, &[7; 512]), OK_WRITE);
    drop(client);
    scene.still_good();
}

#[test]
fn log_01_log_file_is_read_only() {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(LOG_SIZE).unwrap();
    refused_log(File::open(file.path()).unwrap().as_fd(), LOG_SIZE, 0);
}

#[test]
fn log_01_log_file_is_a_directory() {
    refused_log(File::open("/").unwrap().as_fd(), LOG_SIZE, 0);
}

#[test]
fn log_02_log_too_small_for_the_guest() {
    let small = END / 4096 / 8 - 8;
    refused_log(memfd(LOG_SIZE).as_fd(), small, 0);
}

#[test]
fn log_02_log_larger_than_its_file() {
    refused_log(memfd(LOG_SIZE).as_fd(), LOG_SIZE * 2, 0);
}

/// A front-end enlarges the log first, then adds memory (QEMU, `vhost_dev_log_resize`). What does it the other way round
/// would lose writes.
#[test]
fn log_02_memory_beyond_the_log() {
    let mut scene = Scene::new();
    let features = FEATURES | feature::LOG_ALL;
    let protocol = PROTOCOL | protocol_feature::CONFIGURE_MEM_SLOTS;
    let mut client = scene.client_with(&Setup { features, protocol, ..Setup::default() });
    let log = memfd(LOG_SIZE);
    let covered = LOG_SIZE * 8 * 4096;
    set_log_base(&client, log.as_fd(), LOG_SIZE, 0);
    let file = memfd(8192);
    let region = |gpa| MemoryRegion { gpa, size: 8192, uva: 1 << 40, mmap_offset: 0 };
    let far = region(covered - 4096);
    expect_nack(&client, request::ADD_MEM_REG, &single_region(far), &[file.as_fd()]);
    let memory = client.memory().clone();
    let table = mem_table(&[memory.entries(), vec![far]].concat());
    let fds = [memory.fds(), vec![file.as_fd()]].concat();
    expect_nack(&client, request::SET_MEM_TABLE, &table, &fds);
    client.tell(request::ADD_MEM_REG, &single_region(region(covered - 8192)), &[file.as_fd()]);
    client.tell(request::REM_MEM_REG, &single_region(region(covered - 8192)), &[]);
    expect_queue_works(&mut client, 0);
    // After a migration that was given up, the log means nothing any more, until logging begins again.
    let logging = client.features();
    client.tell(request::SET_FEATURES, &(logging & !feature::LOG_ALL).to_le_bytes(), &[]);
    client.tell(request::SET_MEM_TABLE, &table, &fds);
    expect_nack(&client, request::SET_FEATURES, &logging.to_le_bytes(), &[]);
    let larger = memfd(2 * LOG_SIZE);
    set_log_base(&client, larger.as_fd(), 2 * LOG_SIZE, 0);
    client.tell(request::SET_FEATURES, &logging.to_le_bytes(), &[]);
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

#[test]
fn log_03_log_offset_plus_size_wraps() {
    refused_log(memfd(LOG_SIZE).as_fd(), LOG_SIZE, u64::MAX - 4095);
    refused_log(memfd(LOG_SIZE).as_fd(), u64::MAX - 4095, 8192);
}

#[test]
fn log_04_log_all_without_a_log() {
    let mut scene = Scene::new();
    let features = FEATURES | feature::LOG_ALL;
    let mut client = scene.client_with(&Setup { features, ..Setup::default() });
    assert_ne!(client.features() & feature::LOG_ALL, 0, "LOG_ALL is offered");
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

#[test]
fn log_05_log_file_shrunk_while_running() {
    let mut scene = Scene::new();
    let features = FEATURES | feature::LOG_ALL;
    let mut client = scene.client_with(&Setup { features, ..Setup::default() });
    let log = memfd(LOG_SIZE);
    set_log_base(&client, log.as_fd(), LOG_SIZE, 0);
    expect_queue_works(&mut client, 0);
    set_len(log.as_fd(), 0);
    let chain = client.chain(0, kind::IN, 0, &[writable(DATA, 512)]);
    client.submit(0, &chain);
    expect_hang_up(client.wire());
    drop(client);
    scene.still_good();
}

/// Where the pool has a page, it is taken away again. Where it has none, the log is lost from the start.
#[test]
fn log_05_log_in_huge_pages_shrunk_while_running() {
    let Some(log) = huge_memfd(2 << 20) else { return eprintln!("SKIPPED: this kernel has no huge pages") };
    let mut scene = Scene::new();
    let features = FEATURES | feature::LOG_ALL;
    let mut client = scene.client_with(&Setup { features, ..Setup::default() });
    set_log_base(&client, log.as_fd(), LOG_SIZE, 0);
    let chain = client.chain(0, kind::IN, 0, &[writable(DATA, 512)]);
    client.submit(0, &chain);
    client.used_within(0, Duration::from_secs(1));
    set_len(log.as_fd(), 0);
    client.submit_at(0, 3, &chain);
    expect_hang_up(client.wire());
    drop(client);
    scene.still_good();
}

#[test]
fn log_01_log_file_is_on_a_disk() {
    let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.set_len(LOG_SIZE).unwrap();
    refused_log(file.as_fd(), LOG_SIZE, 0);
}

#[test]
fn log_06_used_ring_logged_far_outside_the_log() {
    let mut scene = Scene::new();
    let mut client = scene.mapped();
    let log = memfd(LOG_SIZE);
    set_log_base(&client, log.as_fd(), LOG_SIZE, 0);
    client.tell(request::SET_VRING_NUM, &vring_state(0, 256), &[]);
    let place = RingPlace::packed_at(trellis_tests::vhost_user::client::RINGS, 256);
    for far in [LOG_SIZE * 8 * 4096, u64::MAX, 1 << 60] {
        let mut address = place.announced(0);
        address.flags = VRING_F_LOG;
        address.log = far;
        expect_nack(&client, request::SET_VRING_ADDR, &address.bytes(), &[]);
    }
    client.start_queue(0);
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

/// "Zero-size": nothing at all, or a configuration header that says 0 bytes.
fn is_zero_size(payload: &[u8]) -> bool {
    payload.is_empty() || (payload.len() == 12 && payload[4..8] == [0; 4])
}

fn refused_get_config(offset: u32, size: u32) {
    let mut scene = Scene::new();
    let client = scene.negotiated();
    let reply = client.ask(request::GET_CONFIG, &config_payload(offset, size, 0, &vec![0; size as usize]));
    assert!(is_zero_size(&reply.payload), "{reply:?}");
    expect_session_alive(&client);
    drop(client);
    scene.still_good();
}

fn refused_set_config(offset: usize, flags: u32, data: &[u8]) {
    let mut scene = Scene::new();
    let mut client = scene.client();
    let before = client.config();
    let payload = config_payload(offset as u32, data.len() as u32, flags, data);
    expect_nack(&client, request::SET_CONFIG, &payload, &[]);
    assert_eq!(client.config(), before);
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

/// A log is refused, and I/O afterwards neither logs nor dies.
fn refused_log(file: BorrowedFd<'_>, size: u64, offset: u64) {
    let mut scene = Scene::new();
    let features = FEATURES | feature::LOG_ALL;
    let mut client = scene.client_with(&Setup { features, ..Setup::default() });
    expect_nack(&client, request::SET_LOG_BASE, &log_base(size, offset), &[file]);
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

/// `SET_LOG_BASE` always has a reply, whose content the specification leaves open.
fn set_log_base(client: &trellis_tests::vhost_user::client::Client, file: BorrowedFd<'_>, size: u64, offset: u64) {
    client.wire().send(request::SET_LOG_BASE, &log_base(size, offset), &[file]).unwrap();
    client.reply_to(request::SET_LOG_BASE);
}

/// Enough for 256 MiB of guest addresses.
const LOG_SIZE: u64 = 8192;
