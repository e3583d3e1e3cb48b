//! `check`: whether what an image says of itself is true, and putting it right.

use std::collections::HashSet;

use block_core::graph::{CheckReport, Finding, FindingKind, Findings, Repair};
use serde_json::{Map, Value};
use trellis_image::args::{Args, Definition, option};
use trellis_image::{Failure, Given, Image, Outcome, Session, complain, say, words};

use super::common::{
    FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, Output, QUIET, SOURCE_CACHE, closed, given, objects, one_image,
    open, output, source_cache,
};
use crate::output::pretty;

pub(super) const DEFINITION: Definition = Definition {
    name: "check",
    about: "Checks an image, and repairs it",
    options: &[
        QUIET,
        FORMAT,
        IMAGE_OPTS,
        SOURCE_CACHE,
        FORCE_SHARE,
        OUTPUT,
        option('r', "repair", "leaks|all", "give lost space back, or put right whatever can be"),
        OBJECT,
    ],
    words: "FILENAME",
};

pub(super) async fn run(session: &Session, args: Args) -> Outcome {
    let repair = match args.get("repair") {
        None => Repair::Nothing,
        Some("leaks") => Repair::Leaks,
        Some("all") => Repair::All,
        Some(other) => {
            return Err(Failure::usage(format!("--repair (-r) expects 'leaks' or 'all' not '{other}'")));
        }
    };
    let output = output(&args)?;
    let word = one_image(&args)?;
    let cache = source_cache(&args, "cache")?;
    let writable = repair != Repair::Nothing;
    let given = Given { cache, writable, resizes: writable, ..given(&args, word)? };
    objects(session, &args).await?;
    let image = open(session, &given).await?;
    let result = checked(&args, &image, repair, output).await;
    closed(image, result).await
}

async fn checked(args: &Args, image: &Image, repair: Repair, output: Output) -> Outcome {
    if !has_tables(image) {
        return Err(Failure::with_code(UNSUPPORTED, "This image format does not support checks"));
    }
    let check = async |repair| {
        let mut findings = Findings::default();
        let result = image.check_listing(repair, &mut findings).await;
        let is_whole = result.as_ref().is_ok_and(|report| report.check_errors == 0);
        complain(&listed(&findings, is_whole));
        match result {
            Ok(report) if is_whole => Ok(report),
            Ok(_) => Err(Failure::new("Check failed: Input/output error")),
            Err(error) => Err(Failure::new(format!("Check failed: {}", words(&error)))),
        }
    };
    let mut report = check(repair).await?;
    let is_repaired = report.leaks_fixed + report.corruptions_fixed > 0;
    if is_repaired {
        if output == Output::Human && !args.has("quiet") {
            say(&repaired(&report));
        }
        let fixed = report;
        report = check(Repair::Nothing).await?;
        (report.leaks_fixed, report.corruptions_fixed) = (fixed.leaks_fixed, fixed.corruptions_fixed);
    }
    match output {
        Output::Human | Output::Json if args.has("quiet") => {}
        Output::Human => say(&human(&report)),
        Output::Json => say(&pretty(&json(image, &report).await)),
    }
    Ok(match () {
        () if report.corruptions > 0 => 2,
        () if report.leaks > 0 => 3,
        () => 0,
    })
}

/// Formats without tables have nothing that could be untrue.
fn has_tables(image: &Image) -> bool {
    image.report().geometry.limits.compressed_cluster > 0 || image.driver == "qcow2"
}

/// What was found, and then what of that was put right. In QEMU's words. Where not all could be read,
/// nobody knows what is not in use.
fn listed(findings: &Findings, is_whole: bool) -> String {
    let mut page = String::new();
    let is_repaired: HashSet<_> = findings.repaired.iter().collect();
    for (at, Finding { kind, what }) in findings.all.iter().enumerate() {
        // Those that follow from others are only told of once.
        let follows = what.starts_with("OFLAG_COPIED") && is_repaired.contains(&at);
        match kind {
            FindingKind::Leak if is_whole => page.push_str(&format!("Leaked {what}\n")),
            FindingKind::Corruption if !follows => page.push_str(&format!("ERROR {what}\n")),
            FindingKind::Nowhere => page.push_str(&format!("ERROR: {what}\n")),
            FindingKind::Corruption | FindingKind::Leak => {}
        }
    }
    for at in &findings.repaired {
        page.push_str(&format!("Repairing {}\n", findings.all[*at].what));
    }
    if findings.more > 0 {
        page.push_str(&format!("and {} more\n", findings.more));
    }
    page
}

fn repaired(report: &CheckReport) -> String {
    format!(
        "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
         Double checking the fixed image now...\n",
        report.leaks_fixed, report.corruptions_fixed
    )
}

fn human(report: &CheckReport) -> String {
    let mut page = String::new();
    if report.corruptions == 0 && report.leaks == 0 {
        page.push_str("No errors were found on the image.\n");
    }
    if report.corruptions > 0 {
        page.push_str(&format!(
            "\n{} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n",
            report.corruptions
        ));
    }
    if report.leaks > 0 {
        page.push_str(&format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
            report.leaks
        ));
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        #[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
        let share = |of: u64, all: u64| of as f64 * 100.0 / all as f64;
        page.push_str(&format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            report.allocated_clusters,
            report.total_clusters,
            share(report.allocated_clusters, report.total_clusters),
            share(report.fragmented_clusters, report.allocated_clusters),
            share(report.compressed_clusters, report.allocated_clusters)
        ));
    }
    page.push_str(&format!("Image end offset: {}\n", report.image_end));
    page
}

async fn json(image: &Image, report: &CheckReport) -> Value {
    let mut object = Map::new();
    object.insert("filename".to_owned(), image.filename().await.into());
    object.insert("format".to_owned(), image.driver.clone().into());
    object.insert("check-errors".to_owned(), report.check_errors.into());
    let numbers = [
        ("image-end-offset", report.image_end),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", report.corruptions_fixed),
        ("leaks-fixed", report.leaks_fixed),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ];
    object.extend(
        numbers.into_iter().filter(|(_, number)| *number > 0).map(|(name, number)| (name.into(), number.into())),
    );
    Value::Object(object)
}

/// The exit code where there is nothing to check.
const UNSUPPORTED: u8 = 63;
