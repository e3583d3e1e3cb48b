//! `blkreplay`: requests end in an order that a number decides, so that a test can have an interleaving again.
//!
//! QEMU's driver of this name belongs to its record and replay of whole machines; this one stands alone. A request goes
//! down at once. When it is done it waits until `x-window` requests wait with it, or none has come for `x-patience-ms`;
//! then one of them ends, and which is a matter of the seed alone: those that wait are ordered by kind, place and
//! arrival, whichever thread they came from. A drain lets all of its root's requests end.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use qmp::Qapi;

use crate::base::{Error, IoError, Result};
use crate::drivers::{Open, Opened, Site};
use crate::graph::{ChildId, DriverInfo, IoCx, ReopenRequest};
use crate::pipeline::{Filter, Filtered, Request};

/// A filter that lets requests end in an order that a number decides.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsBlkreplay")]
pub struct BlkReplayOptions {
    /// Decides the order.
    #[qapi(default = 0)]
    pub x_seed: u64,
    /// As soon as this many requests wait, one ends. 1: each ends at once.
    #[qapi(default = 4)]
    pub x_window: u32,
    /// If no request came for this many milliseconds, one that waits ends.
    #[qapi(default = 5)]
    pub x_patience_ms: u32,
}

impl Open for BlkReplayOptions {
    type Driver = Filtered<BlkReplay>;

    async fn open(&self, site: Site<'_>) -> Result<Opened<Self::Driver>> {
        let driver = BlkReplay { image: site.child("image") };
        Ok(Opened { driver: Filtered(driver), conf: Conf::new(self)?, options: site.common })
    }
}

/// The driver: it knows only its child.
pub struct BlkReplay {
    image: ChildId,
}

/// The options, checked, and the requests that wait. A reopen begins the order anew.
pub struct Conf {
    waiting: Mutex<Waiting>,
    patience: Duration,
}

impl Conf {
    fn new(options: &BlkReplayOptions) -> Result<Self> {
        if options.x_window == 0 {
            return Err(Error::new("Value '0' is out of range for parameter 'x-window'"));
        }
        let window = options.x_window as usize;
        let waiting = Waiting { random: options.x_seed, window, moves: 0, here: BTreeMap::new() };
        Ok(Self { waiting: Mutex::new(waiting), patience: Duration::from_millis(options.x_patience_ms.into()) })
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until this request may end.
    async fn turn(&self, cx: IoCx<'_>, request: Request) {
        let here = Here { conf: self, key: self.lock().arrive(request) };
        loop {
            let moves = self.lock().moves;
            let mut patience = pin!(cx.local().sleep(self.patience));
            let chosen = poll_fn(|task| match here.poll_chosen(task) {
                Poll::Ready(()) => Poll::Ready(true),
                Poll::Pending => patience.as_mut().poll(task).map(|_| false),
            });
            if chosen.await {
                return;
            }
            self.lock().choose_unless_moved(moves);
        }
    }
}

/// How those that wait are ordered: kind, place, length, arrival.
type Key = (usize, u64, u64, u64);

/// The requests that are done and have not ended.
struct Waiting {
    /// The state of the generator.
    random: u64,
    window: usize,
    /// Requests that arrived, and choices.
    moves: u64,
    here: BTreeMap<Key, State>,
}

#[derive(Default)]
struct State {
    chosen: bool,
    waker: Option<Waker>,
}

impl Waiting {
    fn arrive(&mut self, request: Request) -> Key {
        let key = (request.kind as usize, request.at.start(), request.at.len(), self.moves);
        self.moves += 1;
        self.here.insert(key, State::default());
        if self.here.values().filter(|state| !state.chosen).count() >= self.window {
            self.choose();
        }
        key
    }

    /// Chooses one if nothing has happened since there were `moves`.
    fn choose_unless_moved(&mut self, moves: u64) {
        if self.moves == moves {
            self.choose();
        }
    }

    fn choose(&mut self) {
        let mut left: Vec<_> = self.here.values_mut().filter(|state| !state.chosen).collect();
        let Some(last) = (left.len() as u64).checked_sub(1) else { return };
        // Which of those that are left: at most `last`, which is a place in the list.
        let place = usize::try_from(next(&mut self.random) % (last + 1)).unwrap_or(0);
        self.moves += 1;
        left[place].chosen = true;
        left[place].waker.take().into_iter().for_each(Waker::wake);
    }
}

/// A small generator (SplitMix64): every seed, 0 too, gives numbers that look random.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// A request's place among those that wait, until it ends.
struct Here<'c> {
    conf: &'c Conf,
    key: Key,
}

impl Here<'_> {
    fn poll_chosen(&self, task: &Context<'_>) -> Poll<()> {
        let mut waiting = self.conf.lock();
        let me = waiting.here.get_mut(&self.key).expect("it is there as long as this value");
        me.waker = Some(task.waker().clone());
        if me.chosen { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Here<'_> {
    fn drop(&mut self) {
        self.conf.lock().here.remove(&self.key);
    }
}

impl Filter for BlkReplay {
    type Conf = Conf;

    fn child(&self) -> ChildId {
        self.image
    }

    /// Whoever is hurried ends at once.
    async fn after(
        &self,
        conf: &Conf,
        cx: IoCx<'_>,
        request: Request,
        result: Result<(), IoError>,
    ) -> Result<(), IoError> {
        let _ = cx.unless_hurried(conf.turn(cx, request)).await;
        result
    }

    async fn reopen(&self, _: &Conf, request: ReopenRequest<'_>) -> Result<Conf, Error> {
        let own = request.options.downcast_ref::<BlkReplayOptions>();
        Conf::new(own.expect("the catalog reopens a driver with options of its kind"))
    }

    fn info(&self, _: &Conf) -> DriverInfo {
        DriverInfo { driver: "blkreplay", ..DriverInfo::default() }
    }
}
