//! The device as one session sees it: negotiated features, write mode, log, and the rings that follow from them.
//!
//! Shared by the message filter and the protocol engine's backend, both of which run on the thread of the session.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block_core::port::PortHandle;
use block_core::rt::Remote;

use super::config_space::{
    CONFIG_LEN, F_CONFIG_WCE, F_EVENT_IDX, F_FLUSH, F_INDIRECT, F_LOG_ALL, Shape, config, features,
};
use super::descriptors::Bin;
use super::limit::Limit;
use super::memory::{DirtyLog, MemoryMap, Quota};
use super::options::VhostUserOptions;
use super::queue_ref::QueueRef;
use super::ring::{Addresses, RingFeatures};
use super::settings::{Settings, Traits};
use super::stats::QueueStats;
use super::vring::RingControl;

/// What all sessions of an export share.
pub(super) struct ExportShared {
    pub(super) options: VhostUserOptions,
    pub(super) port: PortHandle,
    /// The thread of each queue.
    pub(super) threads: Vec<Remote>,
    /// The counters of each queue.
    pub(super) stats: Vec<Arc<QueueStats>>,
    /// A guest broke its queue.
    pub(super) broken: Arc<Limit>,
    /// A frontend was refused something, or thrown out.
    pub(super) thrown_out: Limit,
    /// What frontends share.
    pub(super) quota: Quota,
}

impl ExportShared {
    /// With a thread for each queue.
    pub(super) fn new(options: VhostUserOptions, port: PortHandle, threads: Vec<Remote>) -> Self {
        let stats = threads.iter().map(|_| Arc::default()).collect();
        let (broken, thrown_out, quota) = Default::default();
        Self { options, port, threads, stats, broken, thrown_out, quota }
    }
}

/// See the module's head.
pub(super) struct Device {
    export: Arc<ExportShared>,
    rings: Vec<Arc<RingControl>>,
    bin: Arc<Bin>,
    state: Mutex<State>,
}

struct State {
    /// As acked; 0 before.
    features: u64,
    /// They were acked.
    negotiated: bool,
    /// The writeback byte of the config space.
    writeback: bool,
    log: Option<Arc<DirtyLog>>,
    memory: Arc<MemoryMap>,
}

impl Device {
    /// A device whose queues stand on their threads, stopped.
    pub(super) fn new(export: Arc<ExportShared>, hang_up: Arc<dyn Fn() + Send + Sync>, bin: &Arc<Bin>) -> Self {
        let no_memory = Arc::new(MemoryMap::empty());
        let mut rings = Vec::new();
        for (index, (thread, stats)) in export.threads.iter().zip(&export.stats).enumerate() {
            let traits = Traits {
                name: format!("{}.{index}", export.options.id),
                block: export.options.logical_block_size,
                writable: export.options.writable,
                serial: export.options.serial_bytes(),
                lines: export.broken.clone(),
                hang_up: hang_up.clone(),
            };
            let queue = QueueRef::new(thread.clone(), export.port.clone(), traits, stats.clone());
            let settings = first_settings(no_memory.clone());
            rings.push(Arc::new(RingControl::new(queue, settings, hang_up.clone(), bin.clone())));
        }
        let state = State {
            features: 0,
            negotiated: false,
            writeback: !export.options.writethrough,
            log: None,
            memory: no_memory,
        };
        Self { export, rings, bin: bin.clone(), state: Mutex::new(state) }
    }

    pub(super) fn rings(&self) -> &[Arc<RingControl>] {
        &self.rings
    }

    /// The feature bits that this device offers.
    pub(super) fn features(&self) -> u64 {
        features(self.export.options.writable)
    }

    /// The driver's choice, a subset of what is offered. In force when this returns.
    pub(super) fn features_acked(&self, acked: u64) {
        let mut state = self.lock();
        (state.features, state.negotiated) = (acked, true);
        if acked & F_CONFIG_WCE != 0 && acked & F_FLUSH == 0 {
            state.writeback = false;
        }
        self.apply(&state);
    }

    /// The config space as it is now.
    pub(super) fn config(&self) -> [u8; CONFIG_LEN] {
        let options = &self.export.options;
        config(&Shape {
            geometry: self.export.port.geometry(),
            block: options.logical_block_size,
            queues: options.num_queues,
            writeback: self.lock().writeback,
        })
    }

    /// The driver switches the write mode. Where the operator wants writes to be stable they stay so, and the config space
    /// says it; a refusal could end the session, which is too much for a wish.
    pub(super) fn set_writeback(&self, writeback: bool) {
        let mut state = self.lock();
        state.writeback = writeback && !self.export.options.writethrough;
        self.apply(&state);
    }

    /// Other guest memory. In force when this returns; requests under way keep the old one.
    pub(super) fn set_memory(&self, map: MemoryMap) {
        let map = Arc::new(map);
        // Kept until no ring has it any more, so that what is unmapped is unmapped here.
        let _old = std::mem::replace(&mut self.lock().memory, map.clone());
        self.rings.iter().for_each(|ring| ring.change(|state| state.settings.memory = map.clone()));
    }

    /// Another dirty log. Used while F_LOG_ALL is acked.
    pub(super) fn set_log(&self, log: DirtyLog) {
        let mut state = self.lock();
        let old = state.log.replace(Arc::new(log));
        self.apply(&state);
        // Unmapping takes a lock that the frontend can hold.
        self.bin.put_last(old);
    }

    /// Where writes to a ring's used part are logged, if they are.
    pub(super) fn set_log_used(&self, ring: usize, at: Option<u64>) {
        self.rings[ring].change(|state| state.settings.log_used = at);
    }

    /// RESET_DEVICE: as at the beginning of the session. The rings are disabled already.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        (state.features, state.negotiated) = (0, false);
        state.writeback = !self.export.options.writethrough;
        self.apply(&state);
    }

    /// Stops all queues and waits for what is under way.
    pub(super) fn shut(&self) {
        self.rings.iter().for_each(|ring| ring.shut());
    }

    fn apply(&self, state: &State) {
        let acked = |bit| state.features & bit != 0;
        let features = RingFeatures { event_idx: acked(F_EVENT_IDX), indirect: acked(F_INDIRECT) };
        let log = state.log.clone().filter(|_| acked(F_LOG_ALL));
        let fua = self.export.options.writethrough || !volatile(state.features, state.writeback);
        for ring in &self.rings {
            ring.change(|ring| {
                ring.negotiated = state.negotiated;
                ring.settings.features = features;
                ring.settings.log.clone_from(&log);
                ring.settings.fua = fua;
            });
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// May a completed write be lost until the next flush? (virtio 1.3, 5.2.6.2)
fn volatile(features: u64, writeback: bool) -> bool {
    if features & F_CONFIG_WCE != 0 { writeback } else { features & F_FLUSH != 0 }
}

fn first_settings(memory: Arc<MemoryMap>) -> Settings {
    Settings {
        size: 0,
        at: Addresses::default(),
        log_used: None,
        base: 0,
        features: RingFeatures::default(),
        kick: None,
        call: None,
        err: None,
        memory,
        log: None,
        fua: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_driver_that_can_flush_or_ask_gets_volatile_writes() {
        assert!(!volatile(0, true), "neither FLUSH nor CONFIG_WCE: stable at completion");
        assert!(volatile(F_FLUSH, false), "FLUSH alone means write-back");
        assert!(volatile(F_FLUSH | F_CONFIG_WCE, true));
        assert!(!volatile(F_FLUSH | F_CONFIG_WCE, false));
    }
}
