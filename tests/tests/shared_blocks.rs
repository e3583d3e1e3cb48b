//! Guests that write into the same blocks of a disk whose blocks are larger than a sector.

use std::path::PathBuf;

use serde_json::json;
use trellis_tests::scene::OK_WRITE;
use trellis_tests::vhost_user::client::{Client, Setup};
use trellis_tests::vhost_user::protocol::status;
use trellis_tests::watched::Watched;

const BLOCK: usize = 4096;
const SECTOR: usize = 512;
const BLOCKS: u64 = 4;

/// Writes whole blocks, and has all but their first sectors to itself.
fn write_blocks(socket: PathBuf, rounds: u64) {
    let mut guest = Client::start(&socket, &Setup::default());
    for round in 0..rounds {
        let (sector, byte) = (round % BLOCKS * 8, (round % 251) as u8);
        assert_eq!(guest.write(0, sector, &[byte; BLOCK]), OK_WRITE);
        let (done, bytes) = guest.read(0, sector + 1, BLOCK - SECTOR);
        assert_eq!((done.status, bytes), (status::OK, vec![byte; BLOCK - SECTOR]), "round {round}: a write is lost");
    }
}

/// Writes the first sectors of the same blocks.
fn write_sectors(socket: PathBuf, rounds: u64) {
    let mut guest = Client::start(&socket, &Setup::default());
    for round in 0..rounds {
        assert_eq!(guest.write(0, round % BLOCKS * 8, &[255; SECTOR]), OK_WRITE);
    }
}

fn write_alone(socket: PathBuf) {
    let mut guest = Client::start(&socket, &Setup::default());
    assert_eq!(guest.write(0, 0, &[1; BLOCK]), OK_WRITE);
}

/// A write of a whole block goes by a ring entry, that of a sector reads the block first and rewrites it, on another
/// thread. Neither loses what the other one wrote.
#[test]
fn guests_that_share_blocks_lose_no_write() {
    let server = Watched::builder()
        .image("disk", 1 << 20, ",aio=io_uring")
        .arg("--blockdev", "driver=blkdebug,node-name=blocks,image=disk,align=4096")
        .export("a", "blocks", ",writable=on")
        .export("b", "blocks", ",writable=on")
        .start();
    write_alone(server.socket("a"));
    let details = server.qmp("x-query-export-details", &json!({}));
    assert_eq!(details[0]["queues"][0]["slow"], 0, "else this shows nothing about ring entries: {details}");
    std::thread::scope(|scope| {
        let (a, b) = (server.socket("a"), server.socket("b"));
        scope.spawn(move || write_blocks(a, 4000));
        scope.spawn(move || write_sectors(b, 4000));
    });
}
