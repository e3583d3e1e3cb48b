//! Work that outlives the command that began it, and what clients see of it.
//!
//! Jobs live on the control thread. A job's work is a future; its result is kept until somebody dismisses it.

mod state;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;

use crate::base::{Error, Result};
use crate::rt::Local;
use crate::rt::sync::Notify;

pub use self::state::{Status, Verb};

/// More jobs than this, those included that are over and not dismissed, are refused.
pub const MAX_JOBS: usize = 1024;

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Makes an image: one step, which cannot be paused, and is done even if it is cancelled meanwhile.
    Create,
    /// Changes what an image is like: one step like that.
    Amend,
}

/// What there is to say about a job.
#[derive(Clone, Debug)]
pub struct JobReport {
    /// Its id.
    pub id: String,
    /// What it does.
    pub kind: Kind,
    /// Where it is.
    pub status: Status,
    /// How far it is, in units of its own.
    pub done: u64,
    /// How far it will be at the end.
    pub total: u64,
    /// Why it failed.
    pub error: Option<String>,
}

struct Job {
    id: String,
    kind: Kind,
    status: Cell<Status>,
    cancelled: Cell<bool>,
    done: Cell<u64>,
    error: RefCell<Option<String>>,
}

/// Hears of a job, by its id, and where it is now.
type News = dyn Fn(&str, Status);

/// All jobs.
pub struct Jobs {
    /// The youngest first.
    all: RefCell<Vec<Rc<Job>>>,
    /// Is told of every change of a job's state.
    news: Box<News>,
    changed: Notify,
    /// No job begins any more.
    closing: Cell<bool>,
}

impl Jobs {
    /// No jobs yet. `news` is told of every change of state, by the job's id.
    pub fn new(news: impl Fn(&str, Status) + 'static) -> Rc<Self> {
        Rc::new(Self {
            all: RefCell::default(),
            news: Box::new(news),
            changed: Notify::new(),
            closing: Cell::new(false),
        })
    }

    /// All jobs, the youngest first.
    pub fn all(&self) -> Vec<JobReport> {
        self.all.borrow().iter().map(|job| job.report()).collect()
    }

    /// Begins a job. It runs on this thread, beside the caller.
    pub fn start(
        self: &Rc<Self>,
        id: &str,
        kind: Kind,
        work: impl Future<Output = Result<()>> + 'static,
    ) -> Result<()> {
        let job = self.created(id, kind)?;
        self.becomes(&job, Status::Running);
        let jobs = self.clone();
        Local::current().spawn(async move {
            let result = work.await;
            jobs.ended(&job, result);
        });
        Ok(())
    }

    /// Says something to a job.
    pub fn tell(&self, id: &str, verb: Verb) -> Result<()> {
        let job = self.find(id).ok_or_else(|| Error::new("Job not found"))?;
        let status = job.status.get();
        if !status.takes(verb) {
            return Err(Error::new(format!("Job '{id}' in state '{status}' cannot accept command verb '{verb}'")));
        }
        match verb {
            Verb::Cancel => job.cancelled.set(true),
            Verb::Dismiss => self.forget(&job),
            // A create is one step: it is never ready, and is finalized by itself.
            Verb::Pause | Verb::Resume | Verb::Complete | Verb::Finalize => {
                return Err(Error::new(format!("Job '{id}' does not stop on its way, so it takes no '{verb}'")));
            }
        }
        Ok(())
    }

    /// Waits until all jobs are over, and forgets them: there is nobody left to do it. From now on none begins.
    pub async fn end_all(&self) {
        self.closing.set(true);
        loop {
            let changed = self.changed.notified();
            let oldest = self.all.borrow().last().cloned();
            match oldest {
                None => return,
                Some(job) if job.status.get().takes(Verb::Dismiss) => self.forget(&job),
                Some(_) => changed.await,
            }
        }
    }

    fn find(&self, id: &str) -> Option<Rc<Job>> {
        self.all.borrow().iter().find(|job| job.id == id).cloned()
    }

    fn created(&self, id: &str, kind: Kind) -> Result<Rc<Job>> {
        if self.closing.get() {
            return Err(Error::new("No job begins any more: everything is ending"));
        }
        if !is_id(id) {
            return Err(Error::new(format!("Invalid job ID '{id}'")));
        }
        if self.find(id).is_some() {
            return Err(Error::new(format!("Job ID '{id}' already in use")));
        }
        if self.all.borrow().len() >= MAX_JOBS {
            return Err(Error::new(format!("There may not be more than {MAX_JOBS} jobs; dismiss some that are over")));
        }
        let job = Rc::new(Job {
            id: id.to_owned(),
            kind,
            status: Cell::new(Status::Undefined),
            cancelled: Cell::default(),
            done: Cell::default(),
            error: RefCell::default(),
        });
        self.all.borrow_mut().insert(0, job.clone());
        self.becomes(&job, Status::Created);
        Ok(job)
    }

    fn ended(&self, job: &Job, result: Result<()>) {
        job.done.set(TOTAL);
        let result = if job.cancelled.get() { result.and(Err(Error::new("Operation canceled"))) } else { result };
        match result {
            Ok(()) => {
                self.becomes(job, Status::Waiting);
                self.becomes(job, Status::Pending);
            }
            Err(error) => {
                job.error.replace(Some(error.full()));
                self.becomes(job, Status::Aborting);
            }
        }
        self.becomes(job, Status::Concluded);
    }

    fn forget(&self, job: &Rc<Job>) {
        self.all.borrow_mut().retain(|other| !Rc::ptr_eq(other, job));
        self.becomes(job, Status::Null);
    }

    fn becomes(&self, job: &Job, next: Status) {
        let now = job.status.replace(next);
        assert!(now.may_become(next), "a job that is {now} does not become {next}");
        (self.news)(&job.id, next);
        self.changed.notify_all();
    }
}

/// Work that is one step is done once.
const TOTAL: u64 = 1;

impl Job {
    fn report(&self) -> JobReport {
        JobReport {
            id: self.id.clone(),
            kind: self.kind,
            status: self.status.get(),
            done: self.done.get(),
            total: TOTAL,
            error: self.error.borrow().clone(),
        }
    }
}

/// A letter, then letters, digits, `-`, `.` and `_`: QEMU's identifiers.
fn is_id(id: &str) -> bool {
    let is_tail = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    id.starts_with(|c: char| c.is_ascii_alphabetic()) && id.len() <= MAX_ID && id.chars().all(is_tail)
}

/// Bytes in a job's id at the most.
const MAX_ID: usize = 255;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rt::run_control;
    use crate::rt::sync::oneshot;

    type Told = Rc<RefCell<Vec<String>>>;

    fn jobs() -> (Rc<Jobs>, Told) {
        let told = Told::default();
        let log = told.clone();
        (Jobs::new(move |id, status| log.borrow_mut().push(format!("{id} {status}"))), told)
    }

    async fn over(jobs: &Jobs, id: &str) {
        while jobs.all().iter().any(|job| job.id == id && job.status != Status::Concluded) {
            Local::current().sleep(std::time::Duration::from_millis(1)).await;
        }
    }

    #[test]
    fn a_job_is_told_of_from_its_beginning_to_its_end() {
        run_control(async |_| {
            let (jobs, told) = jobs();
            jobs.start("good", Kind::Create, async { Ok(()) }).unwrap();
            assert_eq!(*told.borrow(), ["good created", "good running"], "before the command is answered");
            over(&jobs, "good").await;
            jobs.tell("good", Verb::Dismiss).unwrap();
            let all = ["created", "running", "waiting", "pending", "concluded", "null"]
                .map(|status| format!("good {status}"));
            assert_eq!(*told.borrow(), all);
            assert!(jobs.all().is_empty());
            assert_eq!(jobs.tell("good", Verb::Dismiss).unwrap_err().full(), "Job not found");
        });
    }

    #[test]
    fn a_job_that_fails_says_why() {
        run_control(async |_| {
            let (jobs, told) = jobs();
            jobs.start("bad", Kind::Create, async { Err(Error::new("no room")) }).unwrap();
            over(&jobs, "bad").await;
            assert_eq!(told.borrow()[2..], ["bad aborting", "bad concluded"]);
            let report = jobs.all().remove(0);
            assert_eq!((report.error.as_deref(), report.done, report.total), (Some("no room"), 1, 1));
            let refused = jobs.start("bad", Kind::Create, async { Ok(()) }).unwrap_err().full();
            assert_eq!(refused, "Job ID 'bad' already in use");
        });
    }

    #[test]
    fn what_is_cancelled_ends_with_an_error() {
        run_control(async |_| {
            let (jobs, _) = jobs();
            let (go, gone) = oneshot::<()>();
            let work = async move {
                gone.await.unwrap();
                Ok(())
            };
            jobs.start("slow", Kind::Create, work).unwrap();
            let early = jobs.tell("slow", Verb::Dismiss).unwrap_err().full();
            assert_eq!(early, "Job 'slow' in state 'running' cannot accept command verb 'dismiss'");
            jobs.tell("slow", Verb::Pause).unwrap_err();
            jobs.tell("slow", Verb::Cancel).unwrap();
            go.send(()).unwrap();
            over(&jobs, "slow").await;
            assert_eq!(jobs.all()[0].error.as_deref(), Some("Operation canceled"));
            jobs.end_all().await;
            assert!(jobs.all().is_empty());
            jobs.start("late", Kind::Create, async { Ok(()) }).unwrap_err();
        });
    }

    #[test]
    fn ids_are_identifiers_and_jobs_are_limited() {
        run_control(async |_| {
            let (jobs, _) = jobs();
            for id in ["", "1bad", "a b", "\u{e4}", &"x".repeat(256)] {
                jobs.start(id, Kind::Create, async { Ok(()) }).unwrap_err();
            }
            for number in 0..MAX_JOBS {
                jobs.start(&format!("job{number}"), Kind::Create, async { Ok(()) }).unwrap();
            }
            jobs.start("more", Kind::Create, async { Ok(()) }).unwrap_err();
            assert_eq!(jobs.all()[0].id, format!("job{}", MAX_JOBS - 1), "the youngest comes first");
        });
    }
}
