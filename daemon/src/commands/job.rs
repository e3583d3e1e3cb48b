//! Jobs: how they are begun, seen and told.

use std::rc::Rc;

use block_core::catalog::{self, BlockdevAmendOptions, BlockdevCreateOptions};
use block_core::job::{JobReport, Kind, Status, Verb};
use qmp::schema::{Empty, Value};
use qmp::{Qapi, Result};

use super::blockdev::find;
use super::{Table, signed};
use crate::daemon::Daemon;
use crate::refused;

pub(super) fn register(table: &mut Table) {
    table.add("blockdev-create", "Begins a job that makes an image. It stays until it is dismissed.", blockdev_create);
    table.add(
        "query-block-jobs",
        "Jobs that copy from node to node. There are none here: the list is empty, and `query-jobs` has all others.",
        query_block_jobs,
    );
    table.add_with(
        "x-blockdev-amend",
        "Begins a job that changes the key slots of an encrypted disk, which may be in use. It stays until it is dismissed.",
        &["unstable"],
        blockdev_amend,
    );
    table.add(
        "query-jobs",
        "All jobs, those included that are over and not dismissed; the youngest first.",
        query_jobs,
    );
    table.add(
        "job-cancel",
        "Ends a job without a result. One that makes an image ends when it is made, with an error.",
        |daemon, arguments| tell(daemon, arguments, Verb::Cancel),
    );
    table.add(
        "job-pause",
        "Lets a job stand still. Refused by jobs that do not stop on their way.",
        |daemon, arguments| tell(daemon, arguments, Verb::Pause),
    );
    table.add("job-resume", "Lets a paused job go on.", |daemon, arguments| tell(daemon, arguments, Verb::Resume));
    table.add("job-complete", "Lets a job that is ready come to its end.", |daemon, arguments| {
        tell(daemon, arguments, Verb::Complete)
    });
    table.add("job-finalize", "Makes the result of a job that is pending count.", |daemon, arguments| {
        tell(daemon, arguments, Verb::Finalize)
    });
    table.add("job-dismiss", "Forgets a job that is over.", |daemon, arguments| tell(daemon, arguments, Verb::Dismiss));
}

/// The arguments of `blockdev-create`.
#[derive(Clone, Debug, Qapi)]
struct CreateArguments {
    /// The id that the job will have.
    job_id: String,
    /// What is made.
    options: BlockdevCreateOptions,
}

/// The arguments of `x-blockdev-amend`.
#[derive(Clone, Debug, Qapi)]
struct AmendArguments {
    /// The id that the job will have.
    job_id: String,
    /// The node.
    node_name: String,
    /// What is changed.
    options: BlockdevAmendOptions,
    /// Also what makes the disk unreadable for good. False if absent.
    force: Option<bool>,
}

/// The arguments of commands for one job.
#[derive(Clone, Debug, Qapi)]
struct JobArguments {
    /// The job.
    id: String,
}

/// A job.
#[derive(Clone, Debug, Qapi)]
struct JobInfo {
    /// Its id.
    id: String,
    /// What it does.
    r#type: JobType,
    /// Where it is in its life.
    status: JobStatus,
    /// How far it is, in units of its own.
    current_progress: i64,
    /// How far it will be at the end.
    total_progress: i64,
    /// Why it failed.
    error: Option<String>,
}

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
enum JobType {
    /// It makes an image.
    Create,
    /// It changes what an image is like.
    Amend,
}

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub(crate) enum JobStatus {
    /// It has an id and nothing else.
    Undefined,
    /// It is there and has not begun.
    Created,
    /// It works.
    Running,
    /// It stands still until it is resumed.
    Paused,
    /// It has nothing left to do but to keep up, until it is told to complete.
    Ready,
    /// It was ready and stands still.
    Standby,
    /// Its work is done; others of its transaction are not.
    Waiting,
    /// It can be finalized.
    Pending,
    /// It failed or was cancelled, and is undoing its work.
    Aborting,
    /// It is over, and is remembered until somebody dismisses it.
    Concluded,
    /// It is gone.
    Null,
}

impl From<Status> for JobStatus {
    fn from(status: Status) -> Self {
        match status {
            Status::Undefined => Self::Undefined,
            Status::Created => Self::Created,
            Status::Running => Self::Running,
            Status::Paused => Self::Paused,
            Status::Ready => Self::Ready,
            Status::Standby => Self::Standby,
            Status::Waiting => Self::Waiting,
            Status::Pending => Self::Pending,
            Status::Aborting => Self::Aborting,
            Status::Concluded => Self::Concluded,
            Status::Null => Self::Null,
        }
    }
}

impl From<JobReport> for JobInfo {
    fn from(report: JobReport) -> Self {
        let r#type = match report.kind {
            Kind::Create => JobType::Create,
            Kind::Amend => JobType::Amend,
        };
        Self {
            id: report.id,
            r#type,
            status: report.status.into(),
            current_progress: signed(report.done),
            total_progress: signed(report.total),
            error: report.error,
        }
    }
}

async fn blockdev_create(daemon: Rc<Daemon>, arguments: CreateArguments) -> Result<Empty> {
    let CreateArguments { job_id, options } = arguments;
    let graph = daemon.graph.clone();
    let work = async move { catalog::create(&graph, options).await };
    daemon.jobs.start(&job_id, Kind::Create, work).map_err(refused)?;
    Ok(Empty {})
}

async fn blockdev_amend(daemon: Rc<Daemon>, arguments: AmendArguments) -> Result<Empty> {
    let AmendArguments { job_id, node_name, options, force } = arguments;
    let node = find(&daemon, &node_name)?;
    let graph = daemon.graph.clone();
    let work = async move { catalog::amend(&graph, node, options, force == Some(true)).await };
    daemon.jobs.start(&job_id, Kind::Amend, work).map_err(refused)?;
    Ok(Empty {})
}

async fn query_jobs(daemon: Rc<Daemon>, _: Empty) -> Result<Vec<JobInfo>> {
    Ok(daemon.jobs.all().into_iter().map(JobInfo::from).collect())
}

/// Jobs that make or amend images are none of those that this command is about, with QEMU neither.
async fn query_block_jobs(_: Rc<Daemon>, _: Empty) -> Result<Vec<Value>> {
    Ok(vec![])
}

async fn tell(daemon: Rc<Daemon>, arguments: JobArguments, verb: Verb) -> Result<Empty> {
    daemon.jobs.tell(&arguments.id, verb).map_err(refused)?;
    Ok(Empty {})
}
