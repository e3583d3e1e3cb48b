//! Messages that lie: framing (MSG) and features (FEA) of `hostile-inputs.md`, one test a row.
//!
//! | row | not here, because |
//! |---|---|
//! | MSG-24 | lists of permitted peer users are a later feature |
#![expect(clippy::unwrap_used, reason = "a test says what went wrong by stopping there")]
#![expect(clippy::cast_possible_truncation, reason = "payloads of tests are short")]

use serde_json::json;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use trellis_tests::scene::{
    Scene, expect_disconnect, expect_disconnect_within, expect_hang_up_unread, expect_nack, expect_queue_works, repeats,
};
use trellis_tests::vhost_user::client::{DATA, FEATURES, PROTOCOL, Setup, default_memory};
use trellis_tests::vhost_user::memory::{GuestMemory, RegionSpec};
use trellis_tests::vhost_user::protocol::{
    Header, VRING_NO_FD, config, config_payload, feature, flags, log_base, mem_table, protocol_feature, request,
    single_region, vring_state,
};
use trellis_tests::vhost_user::ring::RingPlace;
use trellis_tests::vhost_user::wire::{Wire, eventfd, lingering_socket, memfd, pause, while_it_stands_still};

#[test]
fn msg_01_payload_size_u32_max() {
    refused_header(Header { request: request::GET_FEATURES, flags: flags::VERSION, size: u32::MAX });
}

#[test]
fn msg_02_version_0() {
    refused_header(Header { request: request::GET_FEATURES, flags: 0, size: 0 });
}

#[test]
fn msg_03_version_3() {
    refused_header(Header { request: request::GET_FEATURES, flags: 3, size: 0 });
}

#[test]
fn msg_04_reply_flag_in_a_request() {
    refused_header(Header { request: request::GET_FEATURES, flags: flags::VERSION | flags::REPLY, size: 0 });
}

#[test]
fn msg_05_unknown_request() {
    refused_header(Header { request: 999, flags: flags::VERSION, size: 0 });
}

#[test]
fn msg_06_unknown_request_need_reply() {
    let mut scene = Scene::new();
    let client = scene.negotiated();
    expect_nack(&client, 999, &[], &[]);
    expect_nack(&client, 999, &[0; 8], &[]);
    drop(client);
    scene.still_good();
}

#[test]
fn msg_07_request_0() {
    refused_header(Header { request: 0, flags: flags::VERSION, size: 0 });
}

#[test]
fn msg_08_three_bytes_then_silence() {
    let mut scene = Scene::new();
    let wire = scene.wire();
    wire.send_bytes(&[1, 0, 0], &[]).unwrap();
    scene.neighbour_works();
    expect_disconnect_within(&wire, HEADER_TIMEOUT);
    drop(wire);
    scene.still_good();
}

#[test]
fn msg_09_three_bytes_then_close() {
    let mut scene = Scene::new();
    for _ in 0..100 {
        scene.wire().send_bytes(&[1, 0, 0], &[]).unwrap();
    }
    scene.still_good();
}

#[test]
fn msg_10_payload_cut_short_by_close() {
    let mut scene = Scene::new();
    for _ in 0..100 {
        let header = Header { request: request::SET_FEATURES, flags: flags::VERSION, size: 8 };
        scene.wire().send_with(header, &[0, 0], &[]).unwrap();
    }
    scene.still_good();
}

#[test]
fn msg_11_payload_one_byte_short_or_long() {
    let mut scene = Scene::new();
    let memory = GuestMemory::new(&default_memory());
    let log = memfd(1 << 20);
    let event = eventfd();
    let (channel, _ours) = UnixStream::pair().unwrap();
    for (request, payload) in well_formed_messages(&memory) {
        let fds = match request {
            request::SET_MEM_TABLE => memory.fds(),
            request::ADD_MEM_REG => vec![memory.regions()[0].file()],
            request::SET_LOG_BASE => vec![log.as_fd()],
            request::SET_LOG_FD => vec![event.as_fd()],
            request::SET_BACKEND_REQ_FD => vec![channel.as_fd()],
            _ => Vec::new(),
        };
        let long = [&payload[..], &[0]].concat();
        let short = payload.split_last().map(|(_, short)| short);
        for wrong in [Some(long.as_slice()), short].into_iter().flatten() {
            let client = scene.negotiated_protocol(u64::MAX);
            client.wire().send(request, wrong, &fds).unwrap();
            let closed = client.wire().closes_within(Duration::from_secs(5), |answer| {
                panic!("request {request} with {} of {} bytes is answered: {answer:?}", wrong.len(), payload.len());
            });
            assert!(closed, "request {request} with {} of {} bytes is taken", wrong.len(), payload.len());
        }
    }
    drop(memory);
    scene.still_good();
}

#[test]
fn msg_12_set_features_without_payload() {
    refused_header(Header { request: request::SET_FEATURES, flags: flags::VERSION, size: 0 });
}

#[test]
fn msg_13_descriptor_on_a_message_that_takes_none() {
    let mut scene = Scene::new();
    let client = scene.negotiated();
    let gift = eventfd();
    let before = scene.extra_fds();
    for _ in 0..200 {
        client.wire().send(request::GET_FEATURES, &[], &[gift.as_fd()]).unwrap();
        assert_eq!(client.reply_to(request::GET_FEATURES).u64(), client.offered());
    }
    assert!(scene.extra_fds() <= before + 1, "descriptors that came with GET_FEATURES are kept");
    drop(client);
    scene.still_good();
}

#[test]
fn msg_14_descriptor_on_set_vring_num() {
    let mut scene = Scene::new();
    let client = scene.negotiated();
    let gift = eventfd();
    let before = scene.extra_fds();
    // Either answer is right, so a send that fails only ends the loop: the peer has hung up.
    for _ in 0..200 {
        if client.wire().send(request::SET_VRING_NUM, &vring_state(0, 64), &[gift.as_fd()]).is_err() {
            break;
        }
    }
    pause(Duration::from_millis(100));
    assert!(scene.extra_fds() <= before + 1, "descriptors that came with SET_VRING_NUM are kept");
    drop(client);
    scene.still_good();
}

#[test]
fn msg_15_nine_descriptors_for_eight_regions() {
    let mut scene = Scene::new();
    let client = scene.negotiated();
    let (memory, spare) = (GuestMemory::new(&small_regions(8)), memfd(4096));
    let mut fds = memory.fds();
    fds.push(spare.as_fd());
    client.wire().send(request::SET_MEM_TABLE, &mem_table(&memory.entries()), &fds).unwrap();
    expect_disconnect(client.wire());
    drop(client);
    scene.still_good();
}

#[test]
fn msg_16_more_descriptors_than_the_receiver_has_room_for() {
    let mut scene = Scene::new();
    let wire = scene.wire();
    let gift = eventfd();
    // 253 is the most that the kernel passes in one message; no sane receiver has room for them.
    let fds = vec![gift.as_fd(); 253];
    wire.send(request::GET_FEATURES, &[], &fds).unwrap();
    expect_disconnect(&wire);
    drop(wire);
    scene.still_good();
}

#[test]
fn msg_17_descriptors_with_the_payload_instead_of_the_header() {
    let mut scene = Scene::new();
    for _ in 0..20 {
        let client = scene.negotiated();
        let payload = mem_table(&client.memory().entries());
        let head = Header { request: request::SET_MEM_TABLE, flags: flags::VERSION, size: payload.len() as u32 };
        client.wire().send_bytes(&head.bytes(), &[]).unwrap();
        pause(Duration::from_millis(5));
        // The receiver may take the message or hang up, now or before; it may keep nothing.
        let _ = client.wire().send_bytes(&payload, &client.memory().fds());
    }
    scene.still_good();
}

#[test]
fn msg_18_peer_that_never_reads_its_replies() {
    let mut scene = Scene::new();
    let wire = scene.wire();
    wire.stream().set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let blocked = (0..MORE_THAN_SOCKETS_HOLD).any(|_| wire.send(request::GET_FEATURES, &[], &[]).is_err());
    assert!(blocked, "the server goes on reading from a peer that reads no replies");
    scene.neighbour_works();
    expect_hang_up_unread(&wire, HEADER_TIMEOUT);
    drop(wire);
    scene.still_good();
}

#[test]
fn msg_19_many_tiny_messages_in_order() {
    let mut scene = Scene::new();
    // The full 100 000 take seconds under a debugger; order and fairness show in fewer.
    let count = repeats(20_000, 100_000);
    let client = scene.negotiated();
    let requests = [request::GET_FEATURES, request::GET_QUEUE_NUM, request::GET_PROTOCOL_FEATURES];
    let order = || requests.iter().copied().cycle().take(count);
    std::thread::scope(|threads| {
        threads.spawn(|| order().for_each(|request| client.wire().send(request, &[], &[]).unwrap()));
        for (n, request) in order().enumerate() {
            client.reply_to(request);
            if n == count / 2 {
                let start = Instant::now();
                scene.neighbour_works();
                assert!(start.elapsed() < Duration::from_secs(1), "another export waits for a chatty peer");
            }
        }
    });
    drop(client);
    scene.still_good();
}

/// Messages whose protocol feature was not agreed on.
#[test]
fn msg_20_gated_messages_without_their_feature() {
    let mut scene = Scene::new();
    let client = scene.negotiated_protocol(protocol_feature::REPLY_ACK);
    let region = client.memory().regions()[0].entry();
    let file = client.memory().regions()[0].file();
    let inflight = memfd(4096);
    let channel = UnixStream::pair().unwrap();
    let inflight_payload = [&log_base(4096, 0)[..], &[1, 0, 0, 1, 0, 0, 0, 0]].concat();
    let cases: [(u32, Vec<u8>, Vec<BorrowedFd<'_>>); 11] = [
        (request::GET_CONFIG, config_payload(0, 8, 0, &[0; 8]), vec![]),
        (request::SET_CONFIG, config_payload(config::WRITEBACK as u32, 1, 0, &[1]), vec![]),
        (request::GET_MAX_MEM_SLOTS, vec![], vec![]),
        (request::ADD_MEM_REG, single_region(region), vec![file]),
        (request::REM_MEM_REG, single_region(region), vec![]),
        (request::GET_INFLIGHT_FD, inflight_payload.clone(), vec![]),
        (request::SET_INFLIGHT_FD, inflight_payload, vec![inflight.as_fd()]),
        (request::SET_BACKEND_REQ_FD, vec![], vec![channel.1.as_fd()]),
        (request::RESET_DEVICE, vec![], vec![]),
        (request::GET_STATUS, vec![], vec![]),
        (request::SET_STATUS, vec![0; 8], vec![]),
    ];
    for (request, payload, fds) in &cases {
        expect_nack(&client, *request, payload, fds);
    }
    drop(client);
    scene.still_good();
}

#[test]
fn msg_21_messages_of_other_device_types() {
    let mut scene = Scene::new();
    let client = scene.negotiated();
    let socket = UnixStream::pair().unwrap();
    expect_nack(&client, request::SEND_RARP, &[0; 8], &[]);
    expect_nack(&client, request::NET_SET_MTU, &1500_u64.to_le_bytes(), &[]);
    expect_nack(&client, request::SET_VRING_ENDIAN, &vring_state(0, 1), &[]);
    expect_nack(&client, request::IOTLB_MSG, &[0; 32], &[]);
    expect_nack(&client, request::CREATE_CRYPTO_SESSION, &[0; 24], &[]);
    expect_nack(&client, request::CLOSE_CRYPTO_SESSION, &[0; 8], &[]);
    expect_nack(&client, request::GPU_SET_SOCKET, &[], &[socket.1.as_fd()]);
    expect_nack(&client, request::GET_SHARED_OBJECT, &[0; 16], &[]);
    expect_nack(&client, request::VRING_KICK, &vring_state(0, 0), &[]);
    drop(client);
    scene.still_good();
}

#[test]
fn msg_22_second_client_while_one_is_connected() {
    let mut scene = Scene::new();
    let mut first = scene.client();
    let second = scene.wire();
    // It waits or is closed; closed, its send may fail.
    let _ = second.send(request::GET_FEATURES, &[], &[]);
    expect_queue_works(&mut first, 0);
    drop(second);
    expect_queue_works(&mut first, 0);
    drop(first);
    scene.still_good();
}

#[test]
fn msg_23_connect_and_disconnect_as_fast_as_it_goes() {
    let mut scene = Scene::new();
    let end = Instant::now() + Duration::from_secs(repeats(1, 5) as u64);
    while Instant::now() < end {
        drop(scene.wire());
    }
    scene.still_good();
}

/// A good session is recorded as bytes and cut after each of them.
#[test]
fn msg_25_session_cut_at_every_byte() {
    let mut scene = Scene::new();
    let session = RecordedSession::new();
    let bytes: usize = session.messages.iter().map(|(bytes, _)| bytes.len()).sum();
    for cut in 0..=bytes {
        session.play(&scene.wire(), cut);
        if cut % 100 == 0 {
            expect_queue_works(&mut scene.client(), 0);
        }
    }
    scene.still_good();
}

/// Not in the table: descriptors whose closing takes as long as a frontend likes, wherever one of them is closed: refused with
/// a message, on a channel that is replaced, with an urgent byte, more than a message may have, unread behind a bad one, and
/// with a frontend that is never let in.
#[test]
fn descriptors_that_linger_keep_nobody_waiting() {
    let mut scene = Scene::new();
    let mut unread = Vec::new();
    let client = scene.mapped();
    for (request, len) in [
        (request::SET_VRING_KICK, 8),
        (request::SET_VRING_CALL, 8),
        (request::SET_LOG_BASE, 16),
        (request::ADD_MEM_REG, 40),
        (request::SET_BACKEND_REQ_FD, 0),
    ] {
        unread.push(send_lingering(&mut scene, client.wire(), request, len));
        assert_ne!(client.reply_to(request).u64(), 0, "request {request}");
    }
    for _ in 0..2 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        unread.push(send_lingering(&mut scene, &Wire::from_stream(theirs), request::GET_FEATURES, 0));
        while_it_stands_still(scene.server().pid(), || {
            client.wire().send_need_reply(request::SET_BACKEND_REQ_FD, &[], &[ours.as_fd()]).unwrap();
            drop(ours);
        });
        assert_eq!(client.reply_to(request::SET_BACKEND_REQ_FD).u64(), 0);
    }
    drop(client);
    let mut end_with = |deed: &dyn Fn(&Wire, BorrowedFd<'_>)| {
        let wire = scene.wire();
        let (socket, other) = lingering_socket();
        unread.push(other);
        while_it_stands_still(scene.server().pid(), || {
            deed(&wire, socket.as_fd());
            drop(socket);
        });
        expect_disconnect(&wire);
    };
    let bad_header = Header { request: request::GET_FEATURES, flags: 0, size: 0 };
    end_with(&|wire, socket| {
        wire.send_urgent(&[socket]).unwrap();
        wire.send_with(bad_header, &[], &[]).unwrap();
    });
    end_with(&|wire, socket| {
        let memory = memfd(4096);
        let mut fds = [memory.as_fd(); 100];
        fds[99] = socket;
        wire.send(request::GET_FEATURES, &[], &fds).unwrap();
    });
    end_with(&|wire, socket| {
        wire.send_with(bad_header, &[], &[]).unwrap();
        wire.send(request::GET_FEATURES, &[], &[socket]).unwrap();
    });

    expect_queue_works(&mut scene.client(), 0);
    scene.neighbour_works();
    let first = scene.client();
    let never_let_in = scene.wire();
    unread.push(send_lingering(&mut scene, &never_let_in, request::GET_FEATURES, 0));
    let deleted = scene.server().qmp("block-export-del", &json!({"id": "a", "mode": "hard"}));
    assert_eq!(deleted, json!({}));
    drop((first, never_let_in));
    scene.neighbour_works();
    scene.server().qmp("quit", &json!({}));
    let ended = scene.server().ends_within(Duration::from_secs(5)).expect("it ends, whatever lingers");
    assert!(ended.success(), "{ended}");
    drop(unread);
}

/// A frontend cannot have as many descriptors closed as it likes; what waits is closed when the one before is.
#[test]
fn what_waits_to_be_closed_is_limited_and_leaves_nothing_behind() {
    let mut scene = Scene::new();
    let client = scene.mapped();
    let unread = send_lingering(&mut scene, client.wire(), request::SET_VRING_CALL, 8);
    assert_ne!(client.reply_to(request::SET_VRING_CALL).u64(), 0);
    let (refused, _peer) = UnixStream::pair().unwrap();
    let mut count = 0;
    while client.wire().send_need_reply(request::SET_VRING_CALL, &[0; 8], &[refused.as_fd()]).is_ok()
        && matches!(client.wire().recv(), Ok(Some(_)))
    {
        count += 1;
        assert!(count < 1000, "it goes on for ever");
    }
    assert!(count > 10, "not listened to after {count}");
    drop(client);
    let ticks = scene.server().cpu_ticks();
    pause(Duration::from_millis(300));
    let ticks = scene.server().cpu_ticks() - ticks;
    assert!(ticks < 5, "{ticks} hundredths of a second of computing while nobody can be let in");
    drop(unread);
    scene.still_good();
}

/// Sends a request of `len` zeroes with a socket of which the server has the only descriptor then. It lingers for as long as
/// what is returned is there.
fn send_lingering(scene: &mut Scene, wire: &Wire, request: u32, len: usize) -> TcpStream {
    let (socket, unread) = lingering_socket();
    while_it_stands_still(scene.server().pid(), || {
        wire.send_need_reply(request, &vec![0; len], &[socket.as_fd()]).unwrap();
        drop(socket);
    });
    unread
}

#[test]
fn fea_01_without_version_1() {
    let mut scene = Scene::new();
    let client = scene.negotiated();
    let features = FEATURES & client.offered() & !feature::VERSION_1;
    expect_nack(&client, request::SET_FEATURES, &features.to_le_bytes(), &[]);
    drop(client);
    scene.still_good();
}

#[test]
fn fea_02_all_feature_bits() {
    let mut scene = Scene::new();
    let client = scene.negotiated();
    expect_nack(&client, request::SET_FEATURES, &u64::MAX.to_le_bytes(), &[]);
    drop(client);
    scene.still_good();
}

#[test]
fn fea_03_all_protocol_bits() {
    let mut scene = Scene::new();
    let client = scene.negotiated();
    expect_nack(&client, request::SET_PROTOCOL_FEATURES, &u64::MAX.to_le_bytes(), &[]);
    drop(client);
    scene.still_good();
}

#[test]
fn fea_04_in_band_without_a_channel_and_acks() {
    let mut scene = Scene::new();
    let wire = scene.wire();
    wire.send(request::SET_PROTOCOL_FEATURES, &protocol_feature::INBAND_NOTIFICATIONS.to_le_bytes(), &[]).unwrap();
    expect_disconnect(&wire);
    drop(wire);
    scene.still_good();
}

#[test]
fn fea_05_other_features_while_rings_run() {
    features_toggled_while_running(feature::FLUSH);
}

#[test]
fn fea_06_event_idx_toggled_while_running() {
    features_toggled_while_running(feature::EVENT_IDX);
}

#[test]
fn fea_06_indirect_toggled_while_running() {
    features_toggled_while_running(feature::INDIRECT_DESC);
}

#[test]
fn fea_07_config_wce_without_flush() {
    let mut scene = Scene::new();
    let setup = Setup { features: FEATURES & !feature::FLUSH, ..Setup::default() };
    let mut client = scene.client_with(&setup);
    assert_ne!(client.features() & feature::CONFIG_WCE, 0, "CONFIG_WCE is offered");
    assert_eq!(client.config()[config::WRITEBACK], 0, "a driver that cannot flush must not get a write-back cache");
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

#[test]
fn fea_08_no_set_owner() {
    let mut scene = Scene::new();
    let mut client = scene.client_with(&Setup { owner: false, ..Setup::default() });
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

/// A first message with this header, and nothing after it, ends the connection.
fn refused_header(header: Header) {
    let mut scene = Scene::new();
    let wire = scene.wire();
    wire.send_with(header, &[], &[]).unwrap();
    expect_disconnect(&wire);
    drop(wire);
    scene.still_good();
}

fn features_toggled_while_running(bit: u64) {
    let mut scene = Scene::new();
    let mut client = scene.client();
    expect_queue_works(&mut client, 0);
    expect_nack(&client, request::SET_FEATURES, &(client.features() ^ bit).to_le_bytes(), &[]);
    expect_queue_works(&mut client, 0);
    // The set that is in force may be said again.
    client.tell(request::SET_FEATURES, &client.features().to_le_bytes(), &[]);
    expect_queue_works(&mut client, 0);
    drop(client);
    scene.still_good();
}

/// Each message of a block front-end that we negotiate, as it must look.
fn well_formed_messages(memory: &GuestMemory) -> Vec<(u32, Vec<u8>)> {
    let word = |value: u64| value.to_le_bytes().to_vec();
    let address = RingPlace::packed_at(memory.regions()[0].entry().gpa, 64).announced(0).bytes();
    vec![
        (request::GET_FEATURES, vec![]),
        (request::SET_FEATURES, word(feature::VERSION_1)),
        (request::SET_OWNER, vec![]),
        (request::RESET_OWNER, vec![]),
        (request::SET_MEM_TABLE, mem_table(&memory.entries())),
        (request::SET_LOG_BASE, log_base(1 << 20, 0)),
        // With and without eight bytes that say nothing: both are taken.
        (request::SET_LOG_FD, vec![]),
        (request::SET_LOG_FD, word(0)),
        (request::SET_BACKEND_REQ_FD, vec![]),
        (request::SET_VRING_NUM, vring_state(0, 64)),
        (request::SET_VRING_ADDR, address),
        (request::SET_VRING_BASE, vring_state(0, 0)),
        (request::GET_VRING_BASE, vring_state(0, 0)),
        (request::SET_VRING_KICK, word(VRING_NO_FD)),
        (request::SET_VRING_CALL, word(VRING_NO_FD)),
        (request::SET_VRING_ERR, word(VRING_NO_FD)),
        (request::GET_PROTOCOL_FEATURES, vec![]),
        (request::SET_PROTOCOL_FEATURES, word(PROTOCOL)),
        (request::GET_QUEUE_NUM, vec![]),
        (request::SET_VRING_ENABLE, vring_state(0, 1)),
        // Longer and shorter data than `size` says is CFG-03; here the fixed part is cut.
        (request::GET_CONFIG, config_payload(0, 0, 0, &[])),
        (request::SET_CONFIG, config_payload(config::WRITEBACK as u32, 1, 0, &[1])),
        (request::GET_MAX_MEM_SLOTS, vec![]),
        (request::ADD_MEM_REG, single_region(memory.regions()[0].entry())),
        (request::REM_MEM_REG, single_region(memory.regions()[0].entry())),
        (request::RESET_DEVICE, vec![]),
    ]
}

/// Regions of one page each with a page between them, in the data area's address range.
fn small_regions(count: u64) -> Vec<RegionSpec> {
    let region = |n| RegionSpec { gpa: DATA + n * 8192, size: 4096, mmap_offset: 0 };
    (0..count).map(region).collect()
}

/// What a front-end sends from connect to a started queue, message by message.
struct RecordedSession {
    messages: Vec<(Vec<u8>, Vec<OwnedFd>)>,
}

impl RecordedSession {
    fn new() -> Self {
        let memory = GuestMemory::new(&default_memory());
        let own = |fds: Vec<BorrowedFd<'_>>| fds.into_iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
        let word = |value: u64| value.to_le_bytes().to_vec();
        let place = RingPlace::packed_at(memory.regions()[0].entry().gpa, 64);
        let steps: Vec<(u32, Vec<u8>, Vec<OwnedFd>)> = vec![
            (request::GET_FEATURES, vec![], vec![]),
            (request::GET_PROTOCOL_FEATURES, vec![], vec![]),
            (request::SET_PROTOCOL_FEATURES, word(protocol_feature::REPLY_ACK | protocol_feature::CONFIG), vec![]),
            (request::SET_OWNER, vec![], vec![]),
            (request::SET_FEATURES, word(feature::VERSION_1 | feature::PROTOCOL_FEATURES), vec![]),
            (request::GET_CONFIG, config_payload(0, 60, 0, &[0; 60]), vec![]),
            (request::SET_MEM_TABLE, mem_table(&memory.entries()), own(memory.fds())),
            (request::SET_VRING_NUM, vring_state(0, 64), vec![]),
            (request::SET_VRING_BASE, vring_state(0, 0), vec![]),
            (request::SET_VRING_ADDR, place.announced(0).bytes(), vec![]),
            (request::SET_VRING_ERR, word(0), vec![eventfd()]),
            (request::SET_VRING_CALL, word(0), vec![eventfd()]),
            (request::SET_VRING_KICK, word(0), vec![eventfd()]),
            (request::SET_VRING_ENABLE, vring_state(0, 1), vec![]),
            (request::GET_VRING_BASE, vring_state(0, 0), vec![]),
        ];
        let framed = |(request, payload, fds): (u32, Vec<u8>, Vec<OwnedFd>)| {
            let head = Header { request, flags: flags::VERSION, size: payload.len() as u32 };
            ([&head.bytes()[..], &payload].concat(), fds)
        };
        Self { messages: steps.into_iter().map(framed).collect() }
    }

    /// Sends the first `cut` bytes with the descriptors that belong to them, and hangs up.
    fn play(&self, wire: &Wire, cut: usize) {
        let mut left = cut;
        for (bytes, fds) in &self.messages {
            let now = left.min(bytes.len());
            if now == 0 {
                return;
            }
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            wire.send_bytes(&bytes[..now], &fds).unwrap();
            left -= now;
        }
    }
}

/// The header time-out (10 s), with room for a busy machine.
const HEADER_TIMEOUT: Duration = Duration::from_secs(16);
/// Messages enough to fill both directions of a socket and what a server may read ahead.
const MORE_THAN_SOCKETS_HOLD: usize = 20_000;
