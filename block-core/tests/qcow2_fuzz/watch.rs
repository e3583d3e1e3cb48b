//! Says which case it was: of a panic, and of what does not end.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The longest that a case may take.
const LONGEST: Duration = Duration::from_secs(20);

/// What a thread is at, and since when.
#[derive(Clone, Default)]
pub(crate) struct Watch(Arc<Mutex<Option<(String, Instant)>>>);

/// While this lives its case runs.
pub(crate) struct Said<'a>(&'a Watch);

impl Watch {
    pub(crate) fn begin(&self, what: String) -> Said<'_> {
        *self.0.lock().unwrap() = Some((what, Instant::now()));
        Said(self)
    }
}

impl Drop for Said<'_> {
    fn drop(&mut self) {
        let case = self.0.0.lock().unwrap().take();
        if let Some((what, _)) = case.filter(|_| std::thread::panicking()) {
            eprintln!("{what}");
        }
    }
}

/// Waits for all threads. One whose case does not end ends the program.
pub(crate) fn until_over(workers: Vec<(JoinHandle<()>, Watch)>) {
    while workers.iter().any(|(worker, _)| !worker.is_finished()) {
        std::thread::sleep(Duration::from_millis(50));
        for (_, watch) in &workers {
            let at = watch.0.lock().unwrap().clone();
            if let Some((what, _)) = at.filter(|(_, since)| since.elapsed() > LONGEST) {
                eprintln!("it does not end: {what}");
                std::process::abort();
            }
        }
    }
    workers.into_iter().for_each(|(worker, _)| worker.join().expect("a case failed; it is named above"));
}
