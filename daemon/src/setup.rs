//! From the command line to a daemon that serves, and to its end.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::rc::Rc;

use block_core::catalog::{self, BlockdevOptions};
use block_core::rt::{Local, run_control};
use qmp::keyval::{ParsedOption, parse_option};
use qmp::schema::{Qapi, describe};

use crate::cli::{self, Invocation, Plan, Step, StepOption};
use crate::control::{ChardevOptions, MonitorOptions, Monitors};
use crate::daemon::Daemon;
use crate::export::{self, BlockExportOptions};
use crate::object::ObjectOptions;
use crate::process::pidfile::PidFile;
use crate::process::signals::{self, Signals};
use crate::process::{background, inherited, raise_file_limit};
use crate::scratch::Scratch;
use crate::shutdown::Why;
use crate::{First, first, hidden, log, notify, shutdown};

type Result<T, E = String> = std::result::Result<T, E>;

/// Runs the program. An error is the sentence to print.
pub(crate) fn start(arguments: impl IntoIterator<Item = OsString>) -> Result<ExitCode> {
    inherited::remember();
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let plan = match cli::parse(arguments.clone())? {
        Invocation::Print(text) => {
            say(&text);
            return Ok(ExitCode::SUCCESS);
        }
        Invocation::Run(plan) => plan,
    };
    hidden::hide_secrets(&arguments, &plan);
    match (plan.daemonize, background::is_background()) {
        (true, false) => return background::start().map_err(|error| error.full()),
        (true, true) => background::leave_session().map_err(|error| error.full())?,
        (false, _) => {}
    }
    signals::block().map_err(|error| error.full())?;
    log::start(plan.log, &plan.traces)?;
    raise_file_limit();
    run_control(|local| run(local, *plan))
}

/// Whether to go on after a step.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    GoOn,
    /// Help was asked for, and printed.
    End,
    /// A signal came.
    Interrupted(&'static str),
}

async fn run(local: Rc<Local>, plan: Plan) -> Result<ExitCode> {
    let signals = Signals::open(local.clone()).map_err(|error| error.full())?;
    let daemon = Daemon::new(local);
    let mut held = Held::default();
    let outcome = live(&daemon, &signals, &plan, &mut held).await;
    let why = outcome.as_ref().copied().unwrap_or(Why::OwnWill);
    let code = shutdown::run(&daemon, &signals, held, why).await;
    outcome.map(|_| code)
}

/// From the first step to the wish that all of it should end.
async fn live(daemon: &Rc<Daemon>, signals: &Signals, plan: &Plan, held: &mut Held) -> Result<Why> {
    let steps = match plan.steps.as_slice() {
        [] if inherited::has_name(ACTIVATED) => vec![qmp_on(&format!("fd:{ACTIVATED}"))],
        [] => held.scratch.insert(Scratch::make().map_err(|error| error.full())?).steps(),
        steps => steps.to_vec(),
    };
    let flow = match first(signals.next(), set_up(daemon, &steps)).await {
        First::This(signal) => Flow::Interrupted(signal),
        First::That(flow) => flow?,
    };
    hidden::forget_secrets();
    match flow {
        Flow::GoOn => {}
        Flow::End => return Ok(Why::OwnWill),
        // Whoever waits for the foreground would take its success for a daemon.
        Flow::Interrupted(signal) if plan.daemonize => {
            return Err(format!("{signal} came before everything was set up"));
        }
        Flow::Interrupted(signal) => {
            tracing::info!("{signal} came before everything was set up");
            return Ok(Why::Signal);
        }
    }
    if let Some(path) = &plan.pidfile {
        held.pidfile = Some(PidFile::write(path).map_err(|error| error.full())?);
    }
    if let Some(scratch) = &held.scratch {
        say(&scratch.to_string());
    }
    if plan.daemonize {
        // What was logged so far belongs into the stderr that we had.
        log::flush();
        background::settle().map_err(|error| error.full())?;
    }
    daemon.end_set_up();
    notify::ready("serving");
    notify::keep_watchdog(&daemon.local);
    export::keep_watch(daemon);
    match first(signals.next(), daemon.asked_to_quit()).await {
        First::This(signal) => {
            tracing::info!("{signal}: ending");
            Ok(Why::Signal)
        }
        First::That(()) => {
            tracing::info!("ending as asked");
            Ok(Why::OwnWill)
        }
    }
}

/// Obeys the steps in order, up to the first that fails.
async fn set_up(daemon: &Rc<Daemon>, steps: &[Step]) -> Result<Flow> {
    for step in steps {
        let flow = obey(daemon, step).await.map_err(|error| format!("{step}: {error}"))?;
        if flow != Flow::GoOn {
            return Ok(flow);
        }
    }
    Ok(Flow::GoOn)
}

async fn obey(daemon: &Rc<Daemon>, step: &Step) -> Result<Flow> {
    let text = step.text.as_str();
    match step.option {
        StepOption::Blockdev => {
            let Some(options) = read::<BlockdevOptions>(text, "driver")? else { return Ok(Flow::End) };
            catalog::add(&mut daemon.graph.permit(), options).await.map_err(|error| error.full())?;
        }
        StepOption::Chardev => {
            let text = ChardevOptions::modernised(text);
            let Some(options) = read::<ChardevOptions>(&text, "backend")? else { return Ok(Flow::End) };
            daemon.chardevs.add(&daemon.local, options).await.map_err(|error| error.full())?;
        }
        StepOption::Export => {
            let Some(options) = read::<BlockExportOptions>(text, "type")? else { return Ok(Flow::End) };
            export::add(daemon, options).await.map_err(|error| error.desc)?;
        }
        StepOption::Monitor => {
            let Some(options) = read::<MonitorOptions>(text, "chardev")? else { return Ok(Flow::End) };
            Monitors::add(daemon, options).map_err(|error| error.full())?;
        }
        StepOption::Object => {
            let read = read::<ObjectOptions>(text, "qom-type").map_err(without_words);
            let Some(options) = read? else { return Ok(Flow::End) };
            daemon.objects.add(options).await.map_err(|error| error.desc)?;
        }
        StepOption::Qmp => serve_qmp(daemon, text).await?,
        StepOption::NbdServer => return Err("there is no NBD server here yet".to_owned()),
    }
    Ok(Flow::GoOn)
}

/// The argument as a `T`; `None` where help was asked for, and printed.
fn read<T: Qapi>(text: &str, implied: &str) -> Result<Option<T>> {
    let parsed = parse_option(text, Some(implied)).map_err(|error| error.desc)?;
    if parsed.help {
        say(&help::<T>(&parsed, implied));
        return Ok(None);
    }
    parsed.into_typed().map(Some).map_err(|error| error.desc)
}

/// Why an object's options cannot be read, without the words in which they were written: any part of them may be a part of a
/// secret, such as what stands behind a comma in it. What is missing we name ourselves.
fn without_words(error: String) -> String {
    if error.ends_with("' is missing") {
        return error;
    }
    "The options cannot be read. They are not shown, as a secret may be among them; `--object help` lists what there is"
        .to_owned()
}

/// All options, or those of the branch that was named.
fn help<T: Qapi>(asked: &ParsedOption, tag: &str) -> String {
    let mut page = describe::<T>();
    if let Some(named) = asked.word(tag)
        && page.branches.iter().any(|(case, _)| case == named)
    {
        page.branches.retain(|(case, _)| case == named);
    }
    page.to_string()
}

async fn serve_qmp(daemon: &Rc<Daemon>, place: &str) -> Result<()> {
    let id = daemon.chardevs.free_id("qmp");
    let options = ChardevOptions::of_short_form(id.clone(), place);
    daemon.chardevs.add(&daemon.local, options).await.map_err(|error| error.full())?;
    Monitors::add(daemon, MonitorOptions::on(id)).map_err(|error| error.full())
}

/// The step that serves QMP at `place`.
fn qmp_on(place: &str) -> Step {
    Step { option: StepOption::Qmp, text: place.to_owned() }
}

/// Prints for people. Nobody may be reading, which is no reason to stop.
fn say(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// What is removed from the file system at the end.
#[derive(Default)]
pub(crate) struct Held {
    pidfile: Option<PidFile>,
    scratch: Option<Scratch>,
}

/// The name that our socket unit gives the QMP socket.
const ACTIVATED: &str = "qmp";
