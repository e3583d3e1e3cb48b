//! `bench`: how fast an image is, by requests of one size in a row.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use block_core::base::{ByteRange, IoError};
use block_core::graph::WriteFlags;
use block_core::rt::IoBuf;
use block_core::rt::sync::Notify;
use trellis_image::args::{Args, Definition, flag, long_flag, long_option, option};
use trellis_image::{Cache, Disk, Failure, Given, Outcome, Session, say, size, strerror};

use super::common::{FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, QUIET, closed, given, objects, one_image, open};

pub(super) const DEFINITION: Definition = Definition {
    name: "bench",
    about: "Measures how long requests take",
    options: &[
        FORMAT,
        IMAGE_OPTS,
        OBJECT,
        QUIET,
        FORCE_SHARE,
        option('c', "count", "COUNT", "requests (default: 75000)"),
        option('d', "depth", "DEPTH", "requests under way at once (default: 64)"),
        option('s', "buffer-size", "SIZE", "bytes of a request (default: 4k)"),
        option('S', "step-size", "SIZE", "from the beginning of a request to that of the next (default: the same)"),
        option('o', "offset", "OFFSET", "where the first one begins"),
        flag('w', "write", "write instead of reading"),
        long_option("pattern", "BYTE", "what is written (default: 0)"),
        long_option("flush-interval", "COUNT", "flush after so many writes"),
        long_flag("no-drain", "without waiting for those under way"),
        option('i', "aio", "MODE", "threads, native or io_uring: accepted, the runtime chooses"),
        flag('n', "native", "as -i native"),
        option('t', "cache", "CACHE", "how the host caches the image (default: writeback)"),
    ],
    words: "FILENAME",
};

pub(super) async fn run(session: &Session, args: Args) -> Outcome {
    let load = Load::read(&args)?;
    let word = one_image(&args)?;
    load.check()?;
    let given = Given { cache: load.cache, writable: load.writes, ..given(&args, word)? };
    if load.native && !load.cache.direct {
        let text = "aio=native was specified, but it requires cache.direct=on, which was not specified.";
        return Err(Failure::new(format!("Could not open '{word}': {text}")));
    }
    objects(session, &args).await?;
    let image = open(session, &given).await?;
    say(&load.described());
    let begun = Instant::now();
    let result = Run::new(load, image.disk(), image.size()).all(session).await;
    let result = result.map_err(|error| Failure::new(format!("Failed request: {}", strerror(error))));
    if result.is_ok() {
        say(&format!("Run completed in {:.3} seconds.\n", begun.elapsed().as_secs_f64()));
    }
    closed(image, result.map(|()| 0)).await
}

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Load {
    count: u64,
    depth: u64,
    bytes: u64,
    /// 0: as many as a request has.
    step: u64,
    offset: u64,
    writes: bool,
    pattern: u8,
    /// Writes between flushes; 0: nobody flushes.
    flush_interval: u64,
    drains: bool,
    cache: Cache,
    native: bool,
}

impl Load {
    fn read(args: &Args) -> Result<Self, Failure> {
        let mut load = Self {
            count: 75_000,
            depth: 64,
            bytes: 4096,
            step: 0,
            offset: 0,
            writes: args.has("write"),
            pattern: 0,
            flush_interval: 0,
            drains: !args.has("no-drain"),
            cache: Cache::WRITEBACK,
            native: args.has("native"),
        };
        // In order: the first that is wrong is said.
        for (id, word) in args.given() {
            match id {
                "count" => load.count = size::parse_count("request count", word, 1, MOST)?,
                "depth" => load.depth = size::parse_count("queue depth", word, 1, MOST)?,
                "buffer-size" => load.bytes = size::parse_between("buffer size", word, 1, MOST)?,
                "step-size" => load.step = size::parse_between("step size", word, 0, MOST)?,
                "offset" => load.offset = size::parse_named("offset", word)?,
                "pattern" => {
                    let byte = size::parse_count("pattern byte", word, 0, 255)?;
                    load.pattern = u8::try_from(byte).unwrap_or(0);
                }
                "flush-interval" => load.flush_interval = size::parse_count("flush interval", word, 0, MOST)?,
                "cache" => load.cache = Cache::named(word).ok_or_else(|| Failure::new("Invalid cache mode"))?,
                "aio" => match word {
                    "native" => load.native = true,
                    "threads" | "io_uring" => {}
                    _ => return Err(Failure::new(format!("Invalid aio option: {word}"))),
                },
                _ => {}
            }
        }
        Ok(load)
    }

    fn check(&self) -> Result<(), Failure> {
        if self.flush_interval > 0 && !self.writes {
            return Err(Failure::new("--flush-interval is only available in write tests"));
        }
        if self.flush_interval > 0 && self.flush_interval < self.depth {
            return Err(Failure::new("Flush interval can't be smaller than depth"));
        }
        Ok(())
    }

    fn step(&self) -> u64 {
        if self.step == 0 { self.bytes } else { self.step }
    }

    fn described(&self) -> String {
        let Self { count, depth, bytes, offset, flush_interval, .. } = *self;
        let (kind, step) = (if self.writes { "write" } else { "read" }, self.step());
        let flushes =
            if flush_interval > 0 { format!("Sending flush every {flush_interval} requests\n") } else { String::new() };
        format!(
            "Sending {count} {kind} requests, {bytes} bytes each, {depth} in parallel (starting at offset {offset}, step \
             size {step})\n{flushes}"
        )
    }

    /// Where a request begins in a disk of `size` bytes.
    fn place(&self, number: u64, size: u64) -> Result<ByteRange, IoError> {
        let start = match number {
            0 => self.offset,
            _ => {
                let far = u128::from(self.offset) + u128::from(number) * u128::from(self.step());
                u64::try_from(far % u128::from(size.max(1))).unwrap_or(0)
            }
        };
        ByteRange::new(start, self.bytes).filter(|at| at.end() <= size).ok_or(IoError::OutOfRange)
    }
}

/// Requests under way.
struct Run {
    load: Load,
    disk: Disk,
    size: u64,
    begun: Cell<u64>,
    /// No request with this number or a later one is begun before the flush.
    until: Cell<u64>,
    workers: Cell<u64>,
    over: Notify,
    error: Cell<Option<IoError>>,
}

impl Run {
    fn new(load: Load, disk: Disk, size: u64) -> Rc<Self> {
        let (begun, until, workers) = (Cell::new(0), Cell::new(0), Cell::new(0));
        Rc::new(Self { load, disk, size, begun, until, workers, over: Notify::new(), error: Cell::new(None) })
    }

    async fn all(self: &Rc<Self>, session: &Session) -> Result<(), IoError> {
        let Load { count, flush_interval, drains, .. } = self.load;
        let batch = if flush_interval > 0 { flush_interval } else { count };
        while self.begun.get() < count && self.error.get().is_none() {
            self.until.set((self.begun.get() + batch).min(count));
            self.some(session)?;
            self.wait_for(if drains || self.until.get() == count { 0 } else { self.load.depth - 1 }).await;
            if flush_interval > 0 && self.until.get().is_multiple_of(batch) {
                self.disk.flush().await?;
            }
        }
        self.wait_for(0).await;
        self.error.get().map_or(Ok(()), Err)
    }

    /// As many workers as there are to be requests under way.
    fn some(self: &Rc<Self>, session: &Session) -> Result<(), IoError> {
        let wanted = self.load.depth.min(self.until.get() - self.begun.get());
        while self.workers.get() < wanted {
            let buf = IoBuf::private(self.load.bytes)?;
            buf.fill(self.load.pattern);
            self.workers.set(self.workers.get() + 1);
            let run = self.clone();
            session.local.spawn(async move {
                run.work(buf).await;
                run.workers.set(run.workers.get() - 1);
                run.over.notify_one();
            });
        }
        Ok(())
    }

    async fn wait_for(&self, workers: u64) {
        while self.workers.get() > workers {
            self.over.notified().await;
        }
    }

    async fn work(&self, buf: IoBuf) {
        while self.begun.get() < self.until.get() && self.error.get().is_none() {
            let number = self.begun.get();
            self.begun.set(number + 1);
            if let Err(error) = self.request(number, buf.clone()).await {
                self.error.set(Some(error));
            }
        }
    }

    async fn request(&self, number: u64, buf: IoBuf) -> Result<(), IoError> {
        let at = self.load.place(number, self.size)?;
        match self.load.writes {
            true => self.disk.write(at, buf, WriteFlags::default()).await,
            false => self.disk.read(at, buf).await,
        }
    }
}

const MOST: u64 = i32::MAX as u64;

#[cfg(test)]
mod tests {
    use super::*;

    fn load(words: &[&str]) -> Result<Load, String> {
        let words: Vec<_> = words.iter().map(|word| (*word).to_owned()).collect();
        let Ok(trellis_image::args::Read::Run(args)) = DEFINITION.read(&words) else { panic!("{words:?}") };
        let load = Load::read(&args).and_then(|load| load.check().map(|()| load));
        load.map_err(|failure| failure.text)
    }

    #[test]
    fn requests_walk_through_the_disk_and_begin_again() {
        let load = load(&["-o", "1k", "-s", "512", "-S", "1k"]).unwrap();
        let starts: Vec<_> = (0..5).map(|number| load.place(number, 4096).unwrap().start()).collect();
        assert_eq!(starts, [1024, 2048, 3072, 0, 1024]);
        assert_eq!(load.place(0, 1024), Err(IoError::OutOfRange));
        assert_eq!(load.place(1, 0), Err(IoError::OutOfRange));
    }

    #[test]
    fn nonsense_is_refused() {
        for (words, text) in [
            (&["-c", "0"][..], "Invalid request count specified. Must be between 1 and 2147483647."),
            (&["-d", "x"], "Invalid queue depth specified: 'x'."),
            (&["--pattern=256"], "Invalid pattern byte specified. Must be between 0 and 255."),
            (&["-t", "bogus"], "Invalid cache mode"),
            (&["--flush-interval=2"], "--flush-interval is only available in write tests"),
            (&["-w", "--flush-interval=2"], "Flush interval can't be smaller than depth"),
        ] {
            assert_eq!(load(words).unwrap_err(), text);
        }
    }
}
