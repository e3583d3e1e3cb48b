//! The prompt: one line after another is read as a command and carried out. What fails is told at once and counts at the
//! end.

use std::cell::Cell;
use std::io::{BufRead, Read as _};
use std::rc::Rc;
use std::time::{Duration, Instant};

use block_core::base::{ByteRange, IoError};
use block_core::catalog::PreallocMode;
use block_core::rt::blocking;
use block_core::rt::sync::Notify;
use qmp::schema::from_value;
use trellis_image::{Disk, Image, Session, complain, say, strerror, words as words_of};

use crate::command::{COMMANDS, Command, Needs, Read, Refusal, Reopen, Report, Spec, Write, words};
use crate::opening::{Opened, Wanted};
use crate::report;
use crate::requests::{self, Failed, Misaligned};
use crate::stops::Stops;

/// One run of the program.
pub(crate) struct Shell<'s> {
    session: &'s Session,
    misaligned: Misaligned,
    open: Option<Opened>,
    under_way: Rc<UnderWay>,
    stops: Stops,
}

/// Whether there is more to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    GoOn,
    End,
}

/// Asynchronous requests.
#[derive(Default)]
struct UnderWay {
    count: Cell<usize>,
    over: Notify,
}

impl<'s> Shell<'s> {
    pub(crate) fn new(session: &'s Session, misaligned: Misaligned) -> Self {
        Self { session, misaligned, open: None, under_way: Rc::default(), stops: Stops::default() }
    }

    /// Carries out the lines of `commands`, or those that are typed if there are none. False: one of them failed.
    pub(crate) async fn run<'c>(&mut self, commands: impl ExactSizeIterator<Item = &'c str>) -> bool {
        let mut is_good = true;
        if commands.len() > 0 {
            for line in commands {
                let (flow, result) = self.line(line).await;
                is_good &= result.is_ok();
                if flow == Flow::End {
                    break;
                }
            }
        } else {
            while let Some(line) = self.typed().await {
                let (flow, result) = self.line(line.trim_end_matches('\n')).await;
                is_good &= result.is_ok();
                if flow == Flow::End {
                    break;
                }
            }
        }
        is_good & self.close().await.is_ok()
    }

    async fn typed(&self) -> Option<String> {
        say(&format!("{}> ", self.session.program));
        blocking(|| {
            let mut line = Vec::new();
            // What is longer is several lines.
            let read = std::io::stdin().lock().take(MOST_LINE).read_until(b'\n', &mut line);
            read.ok().filter(|len| *len > 0).map(|_| String::from_utf8_lossy(&line).into_owned())
        })
        .await
    }

    /// Carries out one line.
    pub(crate) async fn line(&mut self, line: &str) -> (Flow, Result<(), Failed>) {
        let words = words(line);
        match self.parsed(&words) {
            Ok(None) => (Flow::GoOn, Ok(())),
            Ok(Some(Command::Quit)) => (Flow::End, Ok(())),
            Ok(Some(command)) => (Flow::GoOn, self.carry_out(command).await),
            Err(refusal) => (Flow::GoOn, Err(self.refuse(&refusal))),
        }
    }

    fn parsed(&self, words: &[&str]) -> Result<Option<Command>, Refusal> {
        let Some(name) = words.first() else { return Ok(None) };
        let spec = Spec::named(name)?;
        if spec.needs != Needs::Nothing && self.open.is_none() {
            return Err(Refusal::Complained("no file open, try 'help open'".to_owned()));
        }
        spec.check_count(words)?;
        let is_read_only = self.open.as_ref().is_some_and(|open| open.wanted.manner.read_only);
        if matches!(spec.needs, Needs::Write | Needs::Resize) && is_read_only {
            return Err(Refusal::Named("Block node is read-only".to_owned()));
        }
        spec.parse(words).map(Some)
    }

    async fn carry_out(&mut self, command: Command) -> Result<(), Failed> {
        match command {
            Command::Read(read) => requests::read(&self.disk(), &read, self.misaligned).await,
            Command::Write(write) => requests::write(&self.disk(), &write, self.misaligned).await,
            Command::AioRead(read) => self.begin_read(read),
            Command::AioWrite(write) => self.begin_write(write),
            Command::AioInvalid { write } => {
                say(&format!("injecting invalid {} request\n", if write { "write" } else { "read" }));
                Ok(())
            }
            Command::AioFlush => {
                self.under_way.wait().await;
                Ok(())
            }
            Command::Flush => self.disk().flush().await.map_err(|_| Failed),
            Command::Discard { at, len, report } => self.discard(at, len, report).await,
            Command::Alloc { at, len } => self.alloc(at, len).await,
            Command::Map => self.map().await,
            Command::Truncate { size, preallocation } => self.truncate(size, preallocation).await,
            Command::Length => {
                say(&format!("{}\n", report::whole_size(self.image().size())));
                Ok(())
            }
            Command::Info => self.info().await,
            Command::Open(open) => {
                let wanted = Wanted::of(open).map_err(|error| self.complain(&words_of(&error)))?;
                self.open(wanted).await
            }
            Command::Close => self.close().await,
            Command::Reopen(reopen) => self.reopen(reopen).await,
            Command::Sleep(ms) => {
                self.session.local.sleep(Duration::from_millis(ms)).await;
                Ok(())
            }
            Command::Sigraise => Err(self.complain("sigraise: this program sends no signals to itself")),
            Command::Abort => std::process::abort(),
            Command::Break { event, tag } => self.stops.set(self.session, self.image(), &event, &tag),
            Command::Resume(tag) => self.stops.resume(self.image(), &tag),
            Command::RemoveBreak(tag) => self.stops.remove(self.image(), &tag),
            Command::WaitBreak(tag) => {
                let is_idle = self.under_way.count.get() == 0;
                self.stops.wait(self.image(), &tag, is_idle).await.map_err(|text| self.complain(&text))
            }
            Command::Zone(what) => Err(requests::failed(&format!("zone {what}"), IoError::Unsupported)),
            Command::Help(name) => help(name.as_deref()),
            Command::Quit => unreachable!("whoever reads lines ends"),
        }
    }

    fn image(&self) -> &Image {
        &self.open.as_ref().expect("the command needs an open image, which was checked").image
    }

    fn disk(&self) -> Disk {
        self.image().disk()
    }

    // ---- requests that are not waited for -----------------------------------------------------------------------

    /// Asynchronous requests are told of, and never count as failures.
    fn begin_read(&self, read: Read) -> Result<(), Failed> {
        let (disk, misaligned) = (self.disk(), self.misaligned);
        self.begin(async move { requests::read(&disk, &read, misaligned).await });
        Ok(())
    }

    fn begin_write(&self, write: Write) -> Result<(), Failed> {
        let (disk, misaligned) = (self.disk(), self.misaligned);
        self.begin(async move { requests::write(&disk, &write, misaligned).await });
        Ok(())
    }

    fn begin(&self, request: impl Future<Output = Result<(), Failed>> + 'static) {
        let under_way = self.under_way.clone();
        under_way.count.set(under_way.count.get() + 1);
        self.session.local.spawn(async move {
            let _told: Result<(), Failed> = request.await;
            under_way.count.set(under_way.count.get() - 1);
            under_way.over.notify_one();
        });
    }

    // ---- what is asked of the whole image -----------------------------------------------------------------------

    async fn discard(&self, at: u64, len: u64, report: Report) -> Result<(), Failed> {
        let begun = Instant::now();
        let result = match ByteRange::new(at, len) {
            Some(range) => self.disk().discard(range).await,
            None => Err(IoError::OutOfRange),
        };
        result.map_err(|error| requests::failed("discard", error))?;
        say(&report::transfer(report, "discard", at, len, begun.elapsed()));
        Ok(())
    }

    async fn alloc(&self, at: u64, len: u64) -> Result<(), Failed> {
        let disk = self.disk();
        let inside = len.min(disk.size().await.saturating_sub(at));
        let (mut own, mut next) = (0, at);
        while next < at + inside {
            let left = ByteRange::between(next, at + inside).expect("the end of the image fits an offset");
            let (is_own, same) = disk.allocated(left).await.map_err(not_mapped)?;
            own += if is_own { same } else { 0 };
            next += same;
        }
        say(&format!("{own}/{inside} bytes allocated at offset {}\n", report::whole_size(at)));
        Ok(())
    }

    async fn map(&self) -> Result<(), Failed> {
        let disk = self.disk();
        let size = disk.size().await;
        let tell = |start: u64, end: u64, is_own: bool| {
            let (len, word) = (end - start, if is_own { "    allocated" } else { "not allocated" });
            let (len_text, start_text) = (report::whole_size(len), report::whole_size(start));
            say(&format!("{len_text} ({len:#x}) bytes {word} at offset {start_text} ({start:#x})\n"));
        };
        let (mut start, mut next, mut was_own) = (0, 0, None);
        while next < size {
            let left = ByteRange::between(next, size).expect("the end of the image fits an offset");
            let (is_own, same) = disk.allocated(left).await.map_err(not_mapped)?;
            if let Some(was) = was_own.filter(|was| *was != is_own) {
                tell(start, next, was);
                start = next;
            }
            (was_own, next) = (Some(is_own), next + same);
        }
        if let Some(was) = was_own {
            tell(start, next, was);
        }
        Ok(())
    }

    async fn truncate(&self, size: u64, preallocation: String) -> Result<(), Failed> {
        let mode: PreallocMode = from_value(preallocation.into()).expect("the parser let no other word pass");
        let resized = self.image().resize(size, mode.into()).await;
        resized.map_err(|error| self.complain(&words_of(&error)))
    }

    async fn info(&self) -> Result<(), Failed> {
        let image = self.image();
        let mut info = image.info().await;
        if info.driver == "copy-on-read"
            && let Some(below) = image.child("file")
        {
            info = image.graph().info(below).await.unwrap_or_default();
        }
        let cluster = report::whole_size(info.cluster_size.unwrap_or(0));
        let state = report::whole_size(info.vm_state_offset.unwrap_or(0));
        say(&format!("format name: {}\ncluster size: {cluster}\nvm state offset: {state}\n", info.driver));
        let specific = info.specific.as_ref().and_then(|specific| specific.get("data"));
        if let Some(data) = specific.filter(|data| data.as_object().is_some_and(|members| !members.is_empty())) {
            say(&format!("Format specific information:\n{}", report::specific(data, 1)));
        }
        Ok(())
    }

    // ---- opening and closing ------------------------------------------------------------------------------------

    /// Opens an image; there may be none open.
    pub(crate) async fn open(&mut self, wanted: Wanted) -> Result<(), Failed> {
        if self.open.is_some() {
            return Err(self.complain("file open already, try 'help close'"));
        }
        let doing = match &wanted.label {
            Some(name) => format!("can't open device {name}"),
            None => "can't open".to_owned(),
        };
        match wanted.open(self.session).await {
            Ok(opened) => {
                self.open = Some(opened);
                Ok(())
            }
            Err(error) => Err(self.complain(&format!("{doing}: {}", words_of(&error)))),
        }
    }

    /// Waits for what is under way, and lets the image go, if there is one.
    async fn close(&mut self) -> Result<(), Failed> {
        let Some(Opened { image, .. }) = self.open.take() else { return Ok(()) };
        self.stops.forget(&image);
        self.under_way.wait().await;
        image.close().await.map_err(|error| self.complain(&words_of(&error)))
    }

    /// Closes the image and opens it in another manner; if that is refused, as it was.
    async fn reopen(&mut self, reopen: Reopen) -> Result<(), Failed> {
        let wanted = match &self.open {
            Some(open) => open.wanted.clone(),
            None => return Err(Failed),
        };
        let changed = wanted.changed(&reopen).map_err(|error| self.complain(&words_of(&error)))?;
        self.close().await?;
        let refused = match changed.open(self.session).await {
            Ok(opened) => {
                self.open = Some(opened);
                return Ok(());
            }
            Err(error) => self.complain(&words_of(&error)),
        };
        match wanted.open(self.session).await {
            Ok(opened) => self.open = Some(opened),
            Err(error) => drop(self.complain(&words_of(&error))),
        }
        Err(refused)
    }

    // ---- what is said -------------------------------------------------------------------------------------------

    /// Says why something failed, as the program.
    fn complain(&self, text: &str) -> Failed {
        self.session.complain(text);
        Failed
    }

    pub(crate) fn refuse(&self, refusal: &Refusal) -> Failed {
        match refusal {
            Refusal::Usage(spec) => say(&format!("{}\n", spec.synopsis())),
            Refusal::BadOption(text, spec) => {
                complain(&format!("{text}\n"));
                say(&format!("{}\n", spec.synopsis()));
            }
            Refusal::Said(text) => say(&format!("{text}\n")),
            Refusal::Complained(text) => complain(&format!("{text}\n")),
            Refusal::Named(text) => self.session.complain(text),
        }
        Failed
    }
}

impl UnderWay {
    async fn wait(&self) {
        while self.count.get() > 0 {
            self.over.notified().await;
        }
    }
}

fn not_mapped(error: IoError) -> Failed {
    say(&format!("is_allocated failed: {}\n", strerror(error)));
    Failed
}

fn help(name: Option<&str>) -> Result<(), Failed> {
    let Some(name) = name else {
        let lines: String = COMMANDS.iter().map(|spec| format!("{}\n", spec.synopsis())).collect();
        say(&format!("{lines}\nUse 'help commandname' for extended help.\n"));
        return Ok(());
    };
    match Spec::named(name) {
        Ok(spec) => say(&format!("{}\n\n{}\n\n", spec.synopsis(), spec.help)),
        Err(_) => say(&format!("command {name} not found\n")),
    }
    Ok(())
}

/// Bytes of a line that is typed.
const MOST_LINE: u64 = 64 << 10;
