//! Ring set-up that lies (VR) of `hostile-inputs.md`, one test a row.
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]
#![expect(clippy::cast_possible_truncation, reason = "addresses of a test's guest are small")]

use serde_json::json;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;
use trellis_tests::scene::{
    DISK, SLOW, Scene, expect_disconnect, expect_hang_up, expect_nack, expect_queue_works, repeats,
};
use trellis_tests::vhost_user::client::{Client, DATA, END, GAP, RINGS, SECOND, Setup};
use trellis_tests::vhost_user::protocol::{VringAddr, kind, request, vring_state};
use trellis_tests::vhost_user::ring::{RingPlace, used_bytes, writable};
use trellis_tests::vhost_user::wire::{
    eventfd, full_eventfd, pause, pipe, readable_within, set_nonblocking, signal, take_events,
};

#[test]
fn vr_01_num_of_queue_1000() {
    refused(request::SET_VRING_NUM, &vring_state(1000, 64));
}

#[test]
fn vr_02_num_of_queue_2_to_the_31() {
    refused(request::SET_VRING_NUM, &vring_state(i32::MAX as u32, 64));
}

#[test]
fn vr_03_base_of_queue_2_to_the_31() {
    refused(request::SET_VRING_BASE, &vring_state(i32::MAX as u32, 0));
}

#[test]
fn vr_04_address_of_queue_2_to_the_30() {
    refused(request::SET_VRING_ADDR, &usual_place().announced((1 << 30) - 1).bytes());
}

#[test]
fn vr_05_get_base_of_queue_2_to_the_31() {
    let mut scene = Scene::new();
    let client = scene.mapped();
    client.wire().send(request::GET_VRING_BASE, &vring_state(i32::MAX as u32, 0), &[]).unwrap();
    expect_disconnect(client.wire());
    drop(client);
    scene.still_good();
}

#[test]
fn vr_06_enable_queue_2_to_the_31() {
    refused(request::SET_VRING_ENABLE, &vring_state(i32::MAX as u32, 1));
}

#[test]
fn vr_07_num_0_before_start() {
    refused(request::SET_VRING_NUM, &vring_state(0, 0));
}

#[test]
fn vr_08_num_0_while_running() {
    refused_while_running(request::SET_VRING_NUM, &vring_state(0, 0));
}

#[test]
fn vr_09_num_7() {
    refused(request::SET_VRING_NUM, &vring_state(0, 7));
}

#[test]
fn vr_10_num_32768() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&Setup { queue_size: 32768, ..Setup::default() });
    expect_queue_works(&mut client, 0);
    // The last descriptor of the table is as good as the first.
    let chain = client.chain(0, kind::FLUSH, 0, &[]);
    client.submit_at(0, 32766, &chain);
    assert_eq!(client.used(0).head, 32766);
    drop(client);
    scene.still_good();
}

#[test]
fn vr_10_num_65536() {
    refused(request::SET_VRING_NUM, &vring_state(0, 65536));
}

#[test]
fn vr_11_num_changed_while_running() {
    refused_while_running(request::SET_VRING_NUM, &vring_state(0, 128));
}

#[test]
fn vr_12_ring_address_unmapped() {
    for part in [GAP, END, 0, u64::MAX - 0x7000_0000_0000] {
        refused_place(|place| place.desc = part);
        refused_place(|place| place.avail = part);
        refused_place(|place| place.used = part);
    }
}

#[test]
fn vr_13_descriptor_table_ends_outside() {
    refused_place(|place| place.desc = GAP - 4096 + 16);
}

#[test]
fn vr_14_used_ring_ends_outside() {
    refused_place(|place| place.used = (GAP - used_bytes(256) + 8) & !3);
    refused_place(|place| place.avail = GAP - 512);
}

#[test]
fn vr_15_descriptor_table_misaligned() {
    refused_place(|place| place.desc += 8);
}

#[test]
fn vr_15_available_ring_misaligned() {
    refused_place(|place| place.avail += 1);
}

#[test]
fn vr_15_used_ring_misaligned() {
    refused_place(|place| place.used += 2);
}

/// The guest may ruin itself, and only itself.
#[test]
fn vr_16_rings_overlap_each_other_and_data() {
    let mut scene = Scene::new();
    let usual = usual_place();
    for place in [
        RingPlace { used: usual.avail, ..usual },
        RingPlace { used: usual.desc, ..usual },
        RingPlace { avail: usual.desc, ..usual },
        RingPlace { desc: DATA, avail: DATA, used: DATA },
    ] {
        let mut client = scene.mapped();
        client.add_queue_at(0, place, 256);
        client.announce_queue(0);
        client.enable_queue(0, true);
        let chain = client.chain(0, kind::IN, 0, &[writable(DATA, 65536)]);
        client.submit(0, &chain);
        pause(Duration::from_millis(20));
        scene.neighbour_works();
    }
    scene.still_good();
}

#[test]
fn vr_17_base_while_running() {
    refused_while_running(request::SET_VRING_BASE, &vring_state(0, 5));
}

#[test]
fn vr_18_base_with_high_bits() {
    refused(request::SET_VRING_BASE, &vring_state(0, 1 << 16));
    refused(request::SET_VRING_BASE, &vring_state(0, 0x8000_0001));
}

#[test]
fn vr_19_kick_is_dev_null() {
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    refused_kick(null.as_fd());
}

#[test]
fn vr_20_kick_is_a_regular_file() {
    refused_kick(tempfile::tempfile().unwrap().as_fd());
}

#[test]
fn vr_21_kick_is_a_socket_whose_peer_has_closed() {
    refused_kick(UnixStream::pair().unwrap().0.as_fd());
}

#[test]
fn vr_22_call_eventfd_is_full() {
    completes_with_call(full_eventfd(true).as_fd());
}

/// The eventfd's open file is shared with us, so whether a write to it blocks is ours to say: a server must not wait.
#[test]
fn vr_22_call_eventfd_is_full_and_would_block() {
    completes_with_call(full_eventfd(false).as_fd());
}

/// The flag is the frontend's as much as ours, so what it said once says nothing: whoever waited in a write would hold up
/// all exports of the thread, for ever.
#[test]
fn vr_22_call_eventfd_is_full_and_its_flag_cleared_later() {
    let mut scene = Scene::null_on_one_thread(DISK, "");
    let mut client = scene.client();
    let call = full_eventfd(true);
    client.tell(request::SET_VRING_CALL, &0_u64.to_le_bytes(), &[call.as_fd()]);
    set_nonblocking(call.as_fd(), false);
    expect_queue_works(&mut client, 0);
    scene.neighbour_works();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Relaxed) {
                set_nonblocking(call.as_fd(), true);
                set_nonblocking(call.as_fd(), false);
            }
        });
        for _ in 0..repeats(3000, 100_000) {
            let chain = client.chain(0, kind::FLUSH, 0, &[]);
            client.submit(0, &chain);
            assert!(client.used_within(0, Duration::from_secs(5)).is_some(), "the thread waits for the frontend");
        }
        over.store(true, Relaxed);
    });
    scene.neighbour_works();
    scene.server().qmp("block-export-del", &json!({ "id": "a", "mode": "hard" }));
    scene.server().qmp("quit", &json!({}));
    assert!(scene.server().ends_within(Duration::from_secs(5)).is_some(), "quit hangs");
}

#[test]
fn vr_23_call_is_a_pipe_without_reader() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    client.tell(request::SET_VRING_CALL, &0_u64.to_le_bytes(), &[pipe().1.as_fd()]);
    for _ in 0..10 {
        expect_queue_works(&mut client, 0);
    }
    drop(client);
    scene.still_good();
}

#[test]
fn vr_23_call_is_a_pipe_that_is_read_from_or_full() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    let (reader, writer) = pipe();
    client.tell(request::SET_VRING_CALL, &0_u64.to_le_bytes(), &[writer.as_fd()]);
    expect_queue_works(&mut client, 0);
    let (mut reader, mut writer) = (File::from(reader), File::from(writer));
    let mut signal = [0; 8];
    reader.read_exact(&mut signal).unwrap();
    assert_eq!(signal, 1_u64.to_ne_bytes());
    set_nonblocking(writer.as_fd(), true);
    while writer.write(&[0; 4096]).is_ok() {}
    set_nonblocking(writer.as_fd(), false);
    for _ in 0..10 {
        expect_queue_works(&mut client, 0);
    }
    drop(client);
    scene.still_good();
}

#[test]
fn vr_24_no_call_descriptor() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    client.set_no_call(0);
    for _ in 0..10 {
        expect_queue_works(&mut client, 0);
    }
    drop(client);
    scene.still_good();
}

#[test]
fn vr_25_kick_while_disabled() {
    let mut scene = Scene::new();
    let mut client = scene.mapped();
    client.add_queue(0);
    client.announce_queue(0);
    let chain = client.chain(0, kind::FLUSH, 0, &[]);
    client.submit(0, &chain);
    assert_eq!(client.used_within(0, QUIET), None, "a disabled ring is served");
    client.enable_queue(0, true);
    client.kick(0);
    assert_eq!(client.used(0).head, 0);
    drop(client);
    scene.still_good();
}

#[test]
fn vr_26_pending_but_not_kicked() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    let chain = client.chain(0, kind::FLUSH, 0, &[]);
    client.queue(0).ring.write_chain(0, &chain);
    client.queue(0).ring.publish(0);
    assert_eq!(client.used_within(0, QUIET), None, "a ring that was never kicked is served");
    client.kick(0);
    assert_eq!(client.used(0).head, 0);
    drop(client);
    scene.still_good();
}

#[test]
fn vr_27_get_base_with_32_in_flight() {
    let mut scene = Scene::slow();
    let mut client = scene.client();
    submit_reads(&mut client, 32);
    pause(SLOW / 6);
    assert_eq!(client.queue(0).ring.used_idx(), 0, "the slow disk is not slow");
    let base = client.stop_queue(0);
    let used = client.queue(0).ring.used_idx();
    assert_eq!((base, used), (32, 32), "the ring was stopped before what it had taken was done");
    let rings = client.memory().read(RINGS, (SECOND - RINGS) as usize);
    client.set_mem_table();
    pause(SLOW * 2);
    assert_eq!(client.memory().read(RINGS, (SECOND - RINGS) as usize), rings, "a stopped ring is written");
    drop(client);
    scene.still_good();
}

#[test]
fn vr_28_get_base_twice_and_of_a_ring_never_started() {
    let mut scene = Scene::new();
    let mut client = scene.mapped();
    client.tell(request::SET_VRING_BASE, &vring_state(1, 77), &[]);
    assert_eq!(client.stop_queue(1), 77);
    assert_eq!(client.stop_queue(1), 77);
    client.start_queue(0);
    expect_queue_works(&mut client, 0);
    expect_queue_works(&mut client, 0);
    assert_eq!(client.stop_queue(0), 2);
    assert_eq!(client.stop_queue(0), 2);
    drop(client);
    scene.still_good();
}

#[test]
fn vr_29_one_kick_for_all_queues() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&Setup { queues: 2, ..Setup::default() });
    let shared = client.queue(0).kick.try_clone().unwrap();
    client.queue(1).kick = shared;
    client.set_events(1);
    for round in 0..100 {
        let queue = round % 2;
        let chain = client.chain(0, kind::FLUSH, 0, &[]);
        client.submit(queue, &chain);
        assert!(served_when_kicked_again(&mut client, queue), "queue {queue} waits for a kick of its own");
    }
    drop(client);
    scene.still_good();
}

/// Whether old or new, one of the two call descriptors must tell of each completion.
#[test]
fn vr_30_call_replaced_under_io() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    let calls = [eventfd(), eventfd()];
    let fds = scene.extra_fds();
    // 10⁵ in the long form; a leak of one descriptor each shows much earlier.
    for round in 0..repeats(2000, 100_000) {
        let chain = client.chain(0, kind::FLUSH, 0, &[]);
        client.submit(0, &chain);
        client.tell(request::SET_VRING_CALL, &0_u64.to_le_bytes(), &[calls[round % 2].as_fd()]);
        let told = |call: &std::os::fd::OwnedFd| readable_within(call.as_fd(), Duration::from_millis(1));
        let told_by_any = (0..1000).any(|_| calls.iter().any(told) || told(&client.queue(0).call));
        assert!(told_by_any, "round {round}: an interrupt is lost");
        assert_eq!(client.used(0).head, 0);
        for call in &calls {
            take_events(call.as_fd());
        }
    }
    assert!(scene.extra_fds() <= fds + 2, "replaced call descriptors are kept");
    drop(client);
    scene.still_good();
}

/// Refused with need_reply, while the session goes on; said without it, the session ends.
fn refused(request: u32, payload: &[u8]) {
    let mut scene = Scene::new();
    let client = scene.mapped();
    expect_nack(&client, request, payload, &[]);
    client.wire().send(request, payload, &[]).unwrap();
    expect_hang_up(client.wire());
    drop(client);
    scene.still_good();
}

fn refused_while_running(request: u32, payload: &[u8]) {
    let mut scene = Scene::new();
    let mut client = scene.client();
    expect_queue_works(&mut client, 0);
    expect_nack(&client, request, payload, &[]);
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

fn refused_place(spoil: impl FnOnce(&mut RingPlace)) {
    let mut scene = Scene::new();
    let mut client = scene.mapped();
    client.tell(request::SET_VRING_NUM, &vring_state(0, 256), &[]);
    let mut place = usual_place();
    spoil(&mut place);
    let payload: VringAddr = RingPlace { ..place }.announced(0);
    expect_nack(&client, request::SET_VRING_ADDR, &payload.bytes(), &[]);
    client.start_queue(0);
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

fn refused_kick(fd: BorrowedFd<'_>) {
    let mut scene = Scene::new();
    let mut client = scene.client();
    expect_queue_works(&mut client, 0);
    client.stop_queue(0);
    expect_nack(&client, request::SET_VRING_KICK, &0_u64.to_le_bytes(), &[fd]);
    client.restart_queue(0);
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

/// Requests complete whatever becomes of the interrupt.
fn completes_with_call(call: BorrowedFd<'_>) {
    let mut scene = Scene::new();
    let mut client = scene.client();
    client.tell(request::SET_VRING_CALL, &0_u64.to_le_bytes(), &[call]);
    for _ in 0..10 {
        expect_queue_works(&mut client, 0);
    }
    drop(client);
    scene.still_good();
}

fn submit_reads(client: &mut Client, count: u16) {
    for n in 0..count {
        let chain = client.chain(n.into(), kind::IN, 0, &[writable(DATA + u64::from(n) * 512, 512)]);
        client.queue(0).ring.write_chain(n * 3, &chain);
    }
    let heads: Vec<u16> = (0..count).map(|n| n * 3).collect();
    client.queue(0).ring.publish_all(&heads);
    client.kick(0);
}

/// Two queues that read one counter may take each other's event; a kick repeated soon must be enough.
fn served_when_kicked_again(client: &mut Client, queue: u16) -> bool {
    (0..50).any(|_| {
        let served = client.used_within(queue, Duration::from_millis(100)).is_some();
        signal(client.queue(queue).kick.as_fd());
        served
    })
}

fn usual_place() -> RingPlace {
    RingPlace::packed_at(RINGS, 256)
}

/// How long nothing has to happen for "nothing happens".
const QUIET: Duration = Duration::from_millis(200);
