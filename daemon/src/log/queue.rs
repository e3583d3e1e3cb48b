//! Lines of the log on their way out: whoever logs never waits for whoever reads. A thread of its own writes; lines that it
//! does not get rid of in time give way to later ones, and are counted.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Lines on their way to one place.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    arrived: Condvar,
    written: Condvar,
}

#[derive(Default)]
struct State {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    dropped: u64,
    /// The thread has a line in its hands.
    writing: bool,
}

/// What the lines of one event are given to.
#[derive(Clone)]
pub(super) struct Writer(Arc<Queue>);

/// Starts the thread that writes the process's log with `write`, which may block. Once a process.
pub(super) fn start(write: impl FnMut(&[u8]) + Send + 'static) -> io::Result<Writer> {
    let queue = Arc::new(Queue::default());
    queue.serve(write)?;
    let _ = OURS.set(queue.clone());
    Ok(Writer(queue))
}

/// Waits until everything is written, but not longer than `limit`. False: somebody does not read.
pub(super) fn flush(limit: Duration) -> bool {
    OURS.get().is_none_or(|queue| queue.flush(limit))
}

impl Writer {
    /// Takes what is to be written at once.
    pub(super) fn offer(&self, line: &[u8]) {
        self.0.offer(line);
    }
}

impl io::Write for Writer {
    /// A formatter writes each event with one call.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.offer(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Queue {
    fn serve(self: &Arc<Self>, mut write: impl FnMut(&[u8]) + Send + 'static) -> io::Result<()> {
        let queue = self.clone();
        let work = move || {
            loop {
                let (line, dropped) = queue.take();
                write(&line);
                if dropped > 0 {
                    // It comes back to us as a line like any other.
                    tracing::warn!("{dropped} lines of the log were dropped before this one: nobody took them in time");
                }
                queue.lock().writing = false;
                queue.written.notify_all();
            }
        };
        std::thread::Builder::new().name("log".to_owned()).spawn(work).map(drop)
    }

    fn offer(&self, line: &[u8]) {
        let mut state = self.lock();
        state.bytes += line.len();
        state.lines.push_back(line.to_vec());
        while state.bytes > MAX_LOG_WAITING && state.lines.len() > 1 {
            let oldest = state.lines.pop_front();
            state.bytes -= oldest.map_or(0, |line| line.len());
            state.dropped += 1;
        }
        self.arrived.notify_one();
    }

    /// The next line, and how many were dropped before it.
    fn take(&self) -> (Vec<u8>, u64) {
        let mut state = self.lock();
        loop {
            if let Some(line) = state.lines.pop_front() {
                state.bytes -= line.len();
                state.writing = true;
                return (line, std::mem::take(&mut state.dropped));
            }
            state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn flush(&self, limit: Duration) -> bool {
        let start = Instant::now();
        let mut state = self.lock();
        while state.writing || !state.lines.is_empty() {
            let Some(left) = limit.checked_sub(start.elapsed()) else { return false };
            state = self.written.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The process's log.
static OURS: OnceLock<Arc<Queue>> = OnceLock::new();
/// Bytes that wait for a slow reader of the log.
const MAX_LOG_WAITING: usize = 256 << 10;

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn who_logs_does_not_wait_and_the_latest_lines_are_kept() {
        let queue = Arc::new(Queue::default());
        let (go, gone) = channel::<()>();
        let (told, heard) = channel();
        let write = move |line: &[u8]| {
            let _ = gone.recv();
            let _ = told.send(line.to_vec());
        };
        queue.serve(write).unwrap();
        let line = |number: u32| format!("{number:01000}").into_bytes();
        for number in 0..1000 {
            queue.offer(&line(number));
        }
        assert!(!queue.flush(Duration::from_millis(10)), "nobody has read");
        drop(go);
        assert!(queue.flush(Duration::from_secs(10)));
        let written: Vec<Vec<u8>> = heard.try_iter().collect();
        assert!((262..=263).contains(&written.len()), "{}", written.len());
        assert_eq!(written.last(), Some(&line(999)));
    }
}
