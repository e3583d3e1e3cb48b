//! `luks`: an encrypted image in `/dev/shm`, served by both servers in turn: small requests, and large ones.

use std::io;

use trellis_bench::client::load::Pattern;

use super::Pair;
use super::qcow2::{Arguments, Cell, Image, PLAIN, measure};

pub(crate) fn run(pair: &Pair, arguments: &Arguments) -> io::Result<()> {
    measure(pair, arguments, CELLS)
}

const SMALL: Cell = Cell { image: Image::luks, iops: 1.2, ..PLAIN };
const LARGE: Cell = Cell { block: 1 << 20, depth: 4, ..SMALL };

const CELLS: &[Cell] = &[
    Cell { name: "read-4k-d32", ..SMALL },
    Cell { name: "write-4k-d32", pattern: Pattern::RandWrite, ..SMALL },
    Cell { name: "read-1m-d4", ..LARGE },
    Cell { name: "write-1m-d4", pattern: Pattern::RandWrite, ..LARGE },
];
