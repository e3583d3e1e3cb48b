//! A ring as the protocol engine sees it: records what it is told and tells the queue's thread.
//!
//! The engine wants to look at a `VringState` of its own, which cannot be made from outside; so there is a shadow of
//! which it reads "ready" and "has a kick". The truth is in [`RingControl`]: plain settings, and whether the queue is
//! live. A queue that stops gives its base back, so that it can be started again from the settings alone.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::call::Call;
use super::descriptors::Bin;
use super::queue_ref::QueueRef;
use super::ring::Addresses;
use super::settings::Settings;

/// Guest memory as the engine holds it.
pub(super) type GuestMemory = GuestMemoryAtomic<GuestMemoryMmap<()>>;

/// A ring's state on the control side.
pub(super) struct RingControl {
    queue: QueueRef,
    /// Ends the session: the ring cannot be served as the frontend was told.
    hang_up: Arc<dyn Fn() + Send + Sync>,
    /// Descriptors that the queue's thread has had are closed by others.
    bin: Arc<Bin>,
    state: Mutex<State>,
}

/// What the control side may change.
pub(super) struct State {
    pub(super) settings: Settings,
    /// Between SET_VRING_KICK and GET_VRING_BASE.
    ready: bool,
    /// By SET_VRING_ENABLE, or because protocol features were not negotiated.
    enabled: bool,
    /// Between SET_VRING_ADDR and the end.
    placed: bool,
    /// The driver has said which features it takes: without them a ring cannot be read.
    pub(super) negotiated: bool,
    /// The queue has been started.
    live: bool,
}

impl RingControl {
    pub(super) fn new(
        queue: QueueRef,
        settings: Settings,
        hang_up: Arc<dyn Fn() + Send + Sync>,
        bin: Arc<Bin>,
    ) -> Self {
        let (ready, enabled, placed, negotiated, live) = (false, false, false, false, false);
        Self { queue, hang_up, bin, state: Mutex::new(State { settings, ready, enabled, placed, negotiated, live }) }
    }

    /// Changes the settings and brings the queue in line with them. In force when this returns: a queue that is no
    /// longer to serve has nothing under way any more.
    pub(super) fn change(&self, change: impl FnOnce(&mut State)) {
        let state = &mut *self.lock();
        change(state);
        let known = state.placed && state.negotiated && state.settings.kick.is_some() && state.settings.size != 0;
        let wanted = state.ready && state.enabled && known;
        match (state.live, wanted) {
            (false, false) => {}
            (false, true) => self.queue.start(state.settings.clone()),
            (true, true) => self.queue.adjust(state.settings.clone()),
            (true, false) => state.settings.base = self.queue.stop().unwrap_or(state.settings.base),
        }
        state.live = wanted;
    }

    /// Stops the queue, whatever was asked before, and lets go of its descriptors.
    pub(super) fn shut(&self) {
        let (mut kick, mut call, mut err) = (None, None, None);
        self.change(|state| {
            state.ready = false;
            state.enabled = false;
            kick = state.settings.kick.take();
            (call, err) = (state.settings.call.take(), state.settings.err.take());
        });
        self.bin.put_last(kick);
        self.bin.put_last(call);
        self.bin.put_last(err);
    }

    fn call(&self, file: Option<File>) -> Option<Arc<Call>> {
        let call = file.map(|file| Call::new(file.into(), &self.bin)).transpose();
        self.or_hang_up(call).flatten().map(Arc::new)
    }

    /// Descriptors or memory are short. Better no session than one whose queue nobody serves.
    fn or_hang_up<T>(&self, result: io::Result<T>) -> Option<T> {
        if result.is_err() {
            (self.hang_up)();
        }
        result.ok()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

thread_local! {
    /// Whom [`Vring::new`] stands for: the engine calls it once a queue, in order, on the thread that makes the engine.
    static RINGS: RefCell<VecDeque<Arc<RingControl>>> = RefCell::default();
}

/// The rings that the engine made next on this thread will get.
pub(super) fn announce(rings: &[Arc<RingControl>]) {
    RINGS.with_borrow_mut(|waiting| *waiting = rings.iter().cloned().collect());
}

/// See the module's head.
#[derive(Clone)]
pub(super) struct Vring {
    shadow: VringMutex<GuestMemory>,
    ring: Arc<RingControl>,
}

impl<'a> VringStateGuard<'a, GuestMemory> for Vring {
    type G = MutexGuard<'a, VringState<GuestMemory>>;
}

impl<'a> VringStateMutGuard<'a, GuestMemory> for Vring {
    type G = MutexGuard<'a, VringState<GuestMemory>>;
}

impl VringT<GuestMemory> for Vring {
    fn new(memory: GuestMemory, max_queue_size: u16) -> Result<Self, virtio_queue::Error> {
        let ring = RINGS.with_borrow_mut(VecDeque::pop_front);
        let shadow = VringMutex::new(memory, max_queue_size)?;
        Ok(Self { shadow, ring: ring.expect("rings are announced before the engine is made") })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, GuestMemory>>::G {
        self.shadow.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, GuestMemory>>::G {
        self.shadow.get_mut()
    }

    // The engine has no thread that would work on the ring: what follows is asked of its own queue, and never called.
    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), virtio_queue::Error> {
        self.shadow.add_used(desc_index, len)
    }
    fn signal_used_queue(&self) -> io::Result<()> {
        self.shadow.signal_used_queue()
    }
    fn enable_notification(&self) -> Result<bool, virtio_queue::Error> {
        self.shadow.enable_notification()
    }
    fn disable_notification(&self) -> Result<(), virtio_queue::Error> {
        self.shadow.disable_notification()
    }
    fn needs_notification(&self) -> Result<bool, virtio_queue::Error> {
        self.shadow.needs_notification()
    }
    fn read_kick(&self) -> io::Result<bool> {
        self.shadow.read_kick()
    }

    fn set_enabled(&self, enabled: bool) {
        self.shadow.set_enabled(enabled);
        self.ring.change(|state| state.enabled = enabled);
    }

    fn set_queue_info(&self, desc: u64, avail: u64, used: u64) -> Result<(), virtio_queue::Error> {
        self.ring.change(|state| {
            state.settings.at = Addresses { desc, avail, used };
            state.placed = true;
        });
        Ok(())
    }

    fn queue_next_avail(&self) -> u16 {
        self.ring.lock().settings.base
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.ring.change(|state| state.settings.base = base);
    }

    // The queue reads the used index from the ring itself when it starts; the engine would do so without a guard
    // against vanished memory.
    fn set_queue_next_used(&self, _index: u16) {}
    fn queue_used_idx(&self) -> Result<u16, virtio_queue::Error> {
        Ok(0)
    }

    fn set_queue_size(&self, size: u16) {
        self.ring.change(|state| state.settings.size = size);
    }

    // Comes with all other features through `Device::features_acked`.
    fn set_queue_event_idx(&self, _enabled: bool) {}

    fn set_queue_ready(&self, ready: bool) {
        self.shadow.set_queue_ready(ready);
        self.ring.change(|state| state.ready = ready);
    }

    fn set_kick(&self, file: Option<File>) {
        let ours = file.map(|file| Arc::new(OwnedFd::from(file)));
        // The engine wants to see that there is one. It gets one in whose closing nobody has a say.
        let shadow = ours.as_ref().map(|_| eventfd(0, EventfdFlags::CLOEXEC).map(File::from)).transpose();
        let shadow = self.ring.or_hang_up(shadow.map_err(io::Error::from)).flatten();
        let mut old = ours;
        self.ring.change(|state| std::mem::swap(&mut state.settings.kick, &mut old));
        self.ring.bin.put_last(old);
        self.shadow.set_kick(shadow);
    }

    fn set_call(&self, file: Option<File>) {
        let mut old = self.ring.call(file);
        self.ring.change(|state| std::mem::swap(&mut state.settings.call, &mut old));
        self.ring.bin.put_last(old);
    }

    fn set_err(&self, file: Option<File>) {
        let mut old = self.ring.call(file);
        self.ring.change(|state| std::mem::swap(&mut state.settings.err, &mut old));
        self.ring.bin.put_last(old);
    }
}
