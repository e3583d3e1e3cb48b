//! Rows 65 to 100 of `conformance.md`: the control channel.
//!
//! Rows that a hostile test proves already, and rows with a reason instead of a test, stand in `docs/conformance.md`.
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]
#![expect(clippy::cast_possible_truncation, reason = "indices and lengths of tests are short")]

use serde_json::json;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;
use trellis_tests::scene::{DISK, OK_WRITE, SLOW, Scene, expect_nack, expect_queue_works, expect_session_alive};
use trellis_tests::vhost_user::client::{Client, DATA, END, FEATURES, Mapping, PROTOCOL, RINGS, SECOND, Setup, slot};
use trellis_tests::vhost_user::protocol::{
    Header, MemoryRegion, VRING_F_LOG, VRING_NO_FD, config, config_payload, feature, flags, kind, log_base, mem_table,
    protocol_feature, request, single_region, vring_state,
};
use trellis_tests::vhost_user::ring::{RingPlace, readable, writable};
use trellis_tests::vhost_user::wire::{eventfd, memfd, pause, readable_within, signal, take_events};

#[test]
fn c067_protocol_features_before_features() {
    let mut scene = Scene::new();
    let wire = scene.wire();
    wire.send(request::GET_PROTOCOL_FEATURES, &[], &[]).unwrap();
    let offered = wire.recv().unwrap().unwrap().u64();
    for needed in [protocol_feature::MQ, protocol_feature::REPLY_ACK, protocol_feature::CONFIG] {
        assert_ne!(offered & needed, 0, "protocol feature {needed:#x} is not offered");
    }
    wire.send(request::SET_PROTOCOL_FEATURES, &protocol_feature::REPLY_ACK.to_le_bytes(), &[]).unwrap();
    wire.send_need_reply(request::SET_OWNER, &[], &[]).unwrap();
    assert_eq!(wire.recv().unwrap().unwrap().u64(), 0, "acknowledgements work before SET_FEATURES");
    drop(wire);
    scene.still_good();
}

/// Without bit 30 nobody can enable a ring, so all are; with it they start disabled (`vr_25`).
#[test]
fn c068_rings_start_enabled_without_protocol_features() {
    let mut scene = Scene::new();
    let features = FEATURES & !feature::PROTOCOL_FEATURES;
    let mut client = scene.client_with(&Setup { features, ..Setup::default() });
    assert_eq!((client.features() & feature::PROTOCOL_FEATURES, client.protocol()), (0, 0));
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

#[test]
fn c069_need_reply_gets_exactly_one_answer() {
    let mut scene = Scene::new();
    let client = scene.mapped();
    let acknowledged = [
        (request::SET_OWNER, vec![]),
        (request::SET_FEATURES, client.features().to_le_bytes().to_vec()),
        (request::SET_PROTOCOL_FEATURES, client.protocol().to_le_bytes().to_vec()),
        (request::SET_VRING_NUM, vring_state(0, 256)),
        (request::SET_VRING_BASE, vring_state(0, 0)),
        (request::SET_VRING_ADDR, RingPlace::packed_at(RINGS, 256).announced(0).bytes()),
        (request::SET_VRING_CALL, VRING_NO_FD.to_le_bytes().to_vec()),
        (request::SET_VRING_ERR, VRING_NO_FD.to_le_bytes().to_vec()),
        (request::SET_VRING_ENABLE, vring_state(0, 0)),
        (request::SET_CONFIG, config_payload(config::WRITEBACK as u32, 1, 0, &[1])),
    ];
    for (request, payload) in acknowledged {
        assert_eq!(client.ask_ack(request, &payload, &[]), 0, "request {request}");
        expect_silence(&client);
    }
    let with_an_answer_of_its_own = [
        (request::GET_FEATURES, vec![], client.offered()),
        (request::GET_QUEUE_NUM, vec![], 2),
        (request::GET_VRING_BASE, vring_state(1, 0), 1),
    ];
    for (request, payload, answer) in with_an_answer_of_its_own {
        assert_eq!(client.ask_ack(request, &payload, &[]), answer, "request {request}");
        expect_silence(&client);
    }
    drop(client);
    scene.still_good();
}

#[test]
fn c069_no_answer_to_what_was_not_asked() {
    let mut scene = Scene::new();
    let client = scene.mapped();
    client.wire().send(request::SET_VRING_NUM, &vring_state(0, 128), &[]).unwrap();
    client.wire().send(request::SET_VRING_BASE, &vring_state(0, 3), &[]).unwrap();
    expect_silence(&client);
    expect_session_alive(&client);
    drop(client);
    scene.still_good();
}

/// Once a table is acknowledged, rings in it can be announced and used without another word.
#[test]
fn c070_effects_are_complete_before_the_ack() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    for _ in 0..100 {
        client.set_mem_table();
        client.restart_queue(0);
        expect_queue_works(&mut client, 0);
    }
    drop(client);
    scene.still_good();
}

#[test]
fn c071_a_ring_starts_at_its_first_kick() {
    let mut scene = Scene::new();
    let mut client = scene.mapped();
    client.add_queue(0);
    let chain = client.chain(0, kind::FLUSH, 0, &[]);
    client.queue(0).ring.write_chain(0, &chain);
    client.queue(0).ring.publish(0);
    client.announce_queue(0);
    client.enable_queue(0, true);
    assert_eq!(client.used_within(0, QUIET), None, "SET_VRING_KICK alone starts the ring");
    client.kick(0);
    assert_eq!(client.used(0).head, 0, "what was pending at the start");
    drop(client);
    scene.still_good();
}

#[test]
fn c072_a_stopped_ring_is_silent() {
    let mut scene = Scene::slow();
    let mut client = scene.client();
    let chain = client.chain(0, kind::IN, 0, &[writable(DATA, 512)]);
    client.submit(0, &chain);
    pause(SLOW / 6);
    assert_eq!(client.stop_queue(0), 1);
    let done = client.queue(0).ring.take_used();
    assert_eq!(done.map(|used| used.head), Some(0), "what was in flight is done when the answer comes");
    take_events(client.queue(0).call.as_fd());
    let next = client.chain(1, kind::FLUSH, 0, &[]);
    client.submit_at(0, 8, &next);
    assert_eq!(client.used_within(0, SLOW * 2), None, "a stopped ring is served");
    assert!(!readable_within(client.queue(0).call.as_fd(), Duration::ZERO), "a stopped ring interrupts");
    expect_session_alive(&client);
    drop(client);
    scene.still_good();
}

/// Stopping keeps the ring enabled; base and kick bring it back where it was.
#[test]
fn c073_a_stopped_ring_goes_on_where_it_was() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    for round in 1..=20_u16 {
        expect_queue_works(&mut client, 0);
        let base = client.stop_queue(0);
        assert_eq!(base, u32::from(round));
        assert_eq!(client.queue(0).ring.used_idx(), round);
        client.announce_queue(0);
        client.kick(0);
    }
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

#[test]
fn c074_enable_is_honoured_while_running() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    for _ in 0..5 {
        expect_queue_works(&mut client, 0);
        client.enable_queue(0, false);
        let chain = client.chain(0, kind::FLUSH, 0, &[]);
        client.submit(0, &chain);
        assert_eq!(client.used_within(0, QUIET), None, "a disabled ring is served");
        client.enable_queue(0, true);
        client.kick(0);
        assert_eq!(client.used(0).head, 0);
    }
    drop(client);
    scene.still_good();
}

#[test]
fn c075_a_new_event_replaces_and_closes_the_old() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    let fds = scene.extra_fds();
    for _ in 0..50 {
        let queue = client.queue(0);
        (queue.kick, queue.call, queue.err) = (eventfd(), eventfd(), eventfd());
        client.set_events(0);
        expect_queue_works(&mut client, 0);
    }
    assert!(scene.extra_fds() <= fds, "replaced events are kept");
    drop(client);
    scene.still_good();
}

#[test]
fn c075_the_index_is_in_the_low_byte() {
    let mut scene = Scene::new();
    let client = scene.mapped();
    let event = eventfd();
    for index in [2_u64, 0xFF] {
        for request in [request::SET_VRING_KICK, request::SET_VRING_CALL, request::SET_VRING_ERR] {
            expect_nack(&client, request, &index.to_le_bytes(), &[event.as_fd()]);
            expect_nack(&client, request, &(index | VRING_NO_FD).to_le_bytes(), &[]);
        }
    }
    drop(client);
    scene.still_good();
}

/// No kick descriptor means polling; a server may refuse that, but not take it and then sleep.
#[test]
fn c076_no_kick_is_refused_or_polled() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    client.stop_queue(0);
    if client.ask_ack(request::SET_VRING_KICK, &VRING_NO_FD.to_le_bytes(), &[]) == 0 {
        let chain = client.chain(0, kind::FLUSH, 0, &[]);
        client.queue(0).ring.write_chain(0, &chain);
        client.queue(0).ring.publish(0);
        client.used(0);
    }
    expect_session_alive(&client);
    drop(client);
    scene.still_good();
}

/// A table whose last region is bad leaves nothing of its first ones behind.
#[test]
fn c077_a_refused_table_leaves_the_old_one() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    client.memory().fill(DATA, 512, 0x11);
    let other = trellis_tests::vhost_user::memory::GuestMemory::new(&Setup::default().memory);
    let mut entries = other.entries();
    entries[2].size += 1 << 30;
    expect_nack(&client, request::SET_MEM_TABLE, &mem_table(&entries), &other.fds());
    assert_eq!(client.write(0, 0, &[0x22; 512]), OK_WRITE);
    assert_eq!(client.read(0, 0, 512).1, [0x22; 512]);
    drop((client, other));
    scene.still_good();
}

#[test]
fn c079_slots_are_added_and_removed() {
    let mut scene = Scene::new();
    let protocol = PROTOCOL | protocol_feature::CONFIGURE_MEM_SLOTS;
    let mut client = scene.client_with(&Setup { mapping: Mapping::Slots, protocol, ..Setup::default() });
    expect_queue_works(&mut client, 0);
    let second = client.memory().regions()[1].entry();
    for _ in 0..20 {
        // A region is known by its addresses and size; the offset does not matter, and a stray descriptor is closed.
        let stray = eventfd();
        let payload = single_region(MemoryRegion { mmap_offset: 0, ..second });
        client.tell(request::REM_MEM_REG, &payload, &[stray.as_fd()]);
        client.tell(request::ADD_MEM_REG, &single_region(second), &[client.memory().regions()[1].file()]);
        assert_eq!(client.request(0, kind::IN, 0, &[writable(SECOND, 512)]).used, 513);
    }
    drop(client);
    scene.still_good();
}

/// What the device writes is marked, and nothing else is: data, status and used ring, but no readable buffer.
#[test]
fn c082_own_writes_are_logged() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&logging());
    let log = Log::for_client(&client);
    log_used_ring(&client, VRING_F_LOG);
    log.take();
    assert_eq!(client.request(0, kind::IN, 0, &[writable(DATA + 100, 8192)]).used, 8193);
    let used = RingPlace::packed_at(RINGS, 256).used;
    assert_eq!(log.take(), pages(&[DATA, DATA + 4096, DATA + 8192, slot(0).status, used]));
    assert_eq!(client.request(0, kind::OUT, 0, &[readable(SECOND, 4096)]).used, 1);
    assert_eq!(log.take(), pages(&[slot(0).status, used]));
    drop(client);
    scene.still_good();
}

#[test]
fn c082_the_log_survives_a_new_memory_table() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&logging());
    let log = Log::for_client(&client);
    client.set_mem_table();
    log.take();
    expect_queue_works(&mut client, 0);
    assert!(log.take().contains(&(DATA / 4096)), "a new memory table loses the log");
    drop(client);
    scene.still_good();
}

#[test]
fn c083_logging_is_switched_while_running() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    expect_queue_works(&mut client, 0);
    let log = Log::for_client(&client);
    for _ in 0..3 {
        client.tell(request::SET_FEATURES, &(client.features() | feature::LOG_ALL).to_le_bytes(), &[]);
        log_used_ring(&client, VRING_F_LOG);
        log.take();
        expect_queue_works(&mut client, 0);
        assert!(log.take().contains(&(DATA / 4096)), "a write is not logged");
        log_used_ring(&client, 0);
        client.tell(request::SET_FEATURES, &client.features().to_le_bytes(), &[]);
        log.take();
        expect_queue_works(&mut client, 0);
        assert_eq!(log.take(), [0; 0], "a write is logged after logging was switched off");
    }
    drop(client);
    scene.still_good();
}

/// Whether the event is ever signalled is the server's choice; that the message is known is not.
#[test]
fn c084_set_log_fd_is_taken() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&logging());
    let event = eventfd();
    client.tell(request::SET_LOG_FD, &[], &[event.as_fd()]);
    let _log = Log::for_client(&client);
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

#[test]
fn c090_reset_owner_keeps_the_connection() {
    let mut scene = Scene::new();
    let client = scene.client();
    client.tell(request::RESET_OWNER, &[], &[]);
    expect_session_alive(&client);
    drop(client);
    scene.still_good();
}

#[test]
fn c090_reset_device_disables_the_rings() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    expect_queue_works(&mut client, 0);
    assert_ne!(client.protocol() & protocol_feature::RESET_DEVICE, 0, "RESET_DEVICE is offered");
    client.tell(request::RESET_DEVICE, &[], &[]);
    let chain = client.chain(0, kind::FLUSH, 0, &[]);
    client.submit(0, &chain);
    assert_eq!(client.used_within(0, QUIET), None, "a ring is served after a device reset");
    // Whether a reset forgets the memory is left open, so a front-end says it again.
    client.tell(request::SET_FEATURES, &client.features().to_le_bytes(), &[]);
    client.set_mem_table();
    client.restart_queue(0);
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

#[test]
fn c092_config_replies_are_as_long_as_the_question() {
    let mut scene = Scene::new();
    let client = scene.negotiated();
    let whole = client.config();
    for (offset, size) in [(0, 1), (0, 8), (8, 4), (20, 4), (32, 1), (34, 2), (0, 60), (95, 1), (36, 60)] {
        let payload = config_payload(offset as u32, size as u32, 0, &vec![0; size]);
        let reply = client.ask(request::GET_CONFIG, &payload);
        assert_eq!(reply.payload.len(), 12 + size, "{size} bytes at {offset}");
        assert_eq!(reply.payload[12..], whole[offset..offset + size], "{size} bytes at {offset}");
    }
    drop(client);
    scene.still_good();
}

/// A peer that never reads its channel stops neither requests nor the control task.
#[test]
fn c093_a_mute_peer_blocks_nobody() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    client.open_backend_channel();
    for n in 0..400_u64 {
        let size = DISK + (n % 2) * 512;
        scene.server().qmp("block_resize", &json!({ "node-name": "disk-a", "size": size }));
    }
    expect_queue_works(&mut client, 0);
    expect_session_alive(&client);
    scene.neighbour_works();
    drop(client);
    scene.still_good();
}

#[test]
fn c093_a_closed_channel_blocks_nobody() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    client.open_backend_channel();
    client.close_backend_channel();
    scene.server().qmp("block_resize", &json!({ "node-name": "disk-a", "size": 2 * DISK }));
    expect_queue_works(&mut client, 0);
    expect_session_alive(&client);
    drop(client);
    scene.still_good();
}

#[test]
fn c098_the_second_client_is_served_after_the_first() {
    let mut scene = Scene::new();
    let mut first = scene.client();
    expect_queue_works(&mut first, 0);
    drop(first);
    for _ in 0..20 {
        expect_queue_works(&mut scene.client(), 0);
    }
    scene.still_good();
}

#[test]
fn c099_disconnect_with_requests_in_flight() {
    let mut scene = Scene::slow();
    for _ in 0..3 {
        let mut client = scene.client();
        for n in 0..32_u16 {
            let chain = client.chain(n.into(), kind::IN, 0, &[writable(DATA, 512)]);
            client.queue(0).ring.write_chain(n * 3, &chain);
            client.queue(0).ring.publish(n * 3);
        }
        signal(client.queue(0).kick.as_fd());
        pause(SLOW / 10);
    }
    scene.still_good();
}

/// A slow peer is slow for itself only, and its message counts once it is whole.
#[test]
fn c100_a_dribbled_message_is_served() {
    let mut scene = Scene::new();
    let client = scene.negotiated();
    let message = Header { request: request::GET_FEATURES, flags: flags::VERSION, size: 0 }.bytes();
    for byte in message {
        scene.neighbour_works();
        client.wire().send_bytes(&[byte], &[]).unwrap();
        pause(Duration::from_millis(20));
    }
    assert_eq!(client.reply_to(request::GET_FEATURES).u64(), client.offered());
    drop(client);
    scene.still_good();
}

/// The dirty log of a client: one bit for each page of 4096 bytes.
struct Log {
    file: OwnedFd,
}

impl Log {
    /// Shares a log that covers all of the client's memory.
    fn for_client(client: &Client) -> Self {
        let file = memfd(LOG_SIZE);
        client.wire().send(request::SET_LOG_BASE, &log_base(LOG_SIZE, 0), &[file.as_fd()]).unwrap();
        client.reply_to(request::SET_LOG_BASE);
        Self { file }
    }

    /// The pages marked since the last call, by number.
    fn take(&self) -> Vec<u64> {
        let mut bytes = vec![0; LOG_SIZE as usize];
        let file = File::from(self.file.try_clone().unwrap());
        file.read_exact_at(&mut bytes, 0).unwrap();
        file.write_all_at(&vec![0; LOG_SIZE as usize], 0).unwrap();
        (0..LOG_SIZE * 8).filter(|page| bytes[(page / 8) as usize] & (1 << (page % 8)) != 0).collect()
    }
}

fn logging() -> Setup {
    Setup { features: FEATURES | feature::LOG_ALL, ..Setup::default() }
}

/// Says the addresses of queue 0 once more, with or without the log flag, as a migrating front-end does.
fn log_used_ring(client: &Client, flags: u32) {
    let place = RingPlace::packed_at(RINGS, 256);
    let mut address = place.announced(0);
    (address.flags, address.log) = (flags, place.used);
    client.tell(request::SET_VRING_ADDR, &address.bytes(), &[]);
}

/// The numbers of the pages at these addresses, in order and once each.
fn pages(addresses: &[u64]) -> Vec<u64> {
    let mut pages: Vec<u64> = addresses.iter().map(|address| address / 4096).collect();
    pages.sort_unstable();
    pages.dedup();
    pages
}

/// Asserts that no message comes that nobody asked for.
fn expect_silence(client: &Client) {
    assert!(!readable_within(client.wire().stream().as_fd(), QUIET / 4), "an answer too many");
}

/// How long nothing has to happen for "nothing happens".
const QUIET: Duration = Duration::from_millis(200);
/// One bit for each page up to 256 MiB, which is beyond the last guest address.
const LOG_SIZE: u64 = 8192;
const _: () = assert!(LOG_SIZE * 8 * 4096 > END);
