//! The comparison as a Markdown table, with the aims beside the figures.

use std::fmt::Write;
use std::io;
use std::time::Duration;

use super::cell::{Aims, Cell, Rounds, Sample};
use super::verdict;

/// Rows in the order in which they were measured.
#[derive(Debug)]
pub(super) struct Table {
    head: String,
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    cell: Cell,
    disk: String,
    rounds: io::Result<Rounds>,
}

impl Table {
    pub(super) fn new(head: String) -> Self {
        Self { head, rows: Vec::new() }
    }

    pub(super) fn add(&mut self, cell: Cell, disk: &str, rounds: io::Result<Rounds>) {
        self.rows.push(Row { cell, disk: disk.to_owned(), rounds });
    }

    /// Cells without figures.
    pub(super) fn failures(&self) -> usize {
        self.rows.iter().filter(|row| row.rounds.is_err()).count()
    }

    /// The whole report.
    pub(super) fn finish(&self, took: Duration) -> String {
        let mut text = self.head.clone();
        let _ =
            writeln!(text, "run time {} s; every pair of figures is subject / peer, in the median\n", took.as_secs());
        text.push_str(HEADINGS);
        for row in &self.rows {
            text.push_str(&self.line(row));
        }
        text.push_str(&self.summary());
        text
    }

    fn line(&self, row: &Row) -> String {
        let name = row.cell.name();
        let rounds = match &row.rounds {
            Ok(rounds) => rounds,
            Err(error) => return format!("| {name} | {} | not measured: {error} |\n", row.disk),
        };
        let (iops, iops_least) = rounds.ratio(|sample| sample.outcome.iops());
        let (cpu, _) = rounds.ratio(Sample::cpu_ns_per_io);
        let per_io = |count: fn(&Sample) -> u64| {
            both(rounds, 3, move |sample| count(sample) as f64 / sample.outcome.ios.max(1) as f64)
        };
        let quantile = |share: f64| both(rounds, 1, move |sample| sample.outcome.quantile_us(share));
        format!(
            "| {name} | {} | {iops:.2} | {iops_least:.2} | {} | {cpu:.2} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |\n",
            row.disk,
            both(rounds, 0, |sample| sample.outcome.iops() / 1000.0),
            both(rounds, 0, Sample::cpu_ns_per_io),
            both(rounds, 0, Sample::client_ns_per_io),
            quantile(0.5),
            quantile(0.99),
            quantile(0.999),
            per_io(|sample| sample.outcome.kicks),
            per_io(|sample| sample.outcome.interrupts),
            both(rounds, 1, |sample| sample.memory.rss_kib as f64 / 1024.0),
            both(rounds, 1, |sample| sample.memory.anon_kib as f64 / 1024.0),
            both(rounds, 2, |sample| sample.cpu.others),
            self.judge(row, rounds),
        )
    }

    fn judge(&self, row: &Row, rounds: &Rounds) -> String {
        let aims = Aims::of(&row.cell);
        let mut words = Vec::new();
        if let Some(aim) = aims.iops {
            let (ratio, _) = rounds.ratio(|sample| sample.outcome.iops());
            words.push(format!("IOPS ≥ {aim} × {}", verdict(ratio >= aim)));
        }
        if let Some(aim) = aims.cpu {
            let (ratio, _) = rounds.ratio(Sample::cpu_ns_per_io);
            words.push(format!("CPU ≤ {aim} × {}", verdict(ratio <= aim)));
        }
        if let Some(aim) = aims.own_single {
            words.push(match self.own_single_ratio(row, rounds) {
                Some(ratio) => format!("IOPS ≥ {aim} × own q1 ({ratio:.2}) {}", verdict(ratio >= aim)),
                None => format!("IOPS ≥ {aim} × own q1: q1 not measured"),
            });
        }
        words.join("; ")
    }

    /// The subject's IOPS here by its IOPS with one queue, both in the median.
    fn own_single_ratio(&self, row: &Row, rounds: &Rounds) -> Option<f64> {
        let single = row.cell.with_one_queue();
        let single = self.rows.iter().find(|other| other.cell == single)?.rounds.as_ref().ok()?;
        let iops = |rounds: &Rounds| rounds.median(0, |sample| sample.outcome.iops());
        Some(iops(rounds) / iops(single))
    }

    fn summary(&self) -> String {
        let judged: Vec<String> =
            self.rows.iter().filter_map(|row| row.rounds.as_ref().ok().map(|rounds| self.judge(row, rounds))).collect();
        let count = |word: &str| -> usize { judged.iter().map(|text| text.matches(word).count()).sum() };
        format!(
            "\naims: {} met, {} missed, {} cells not measured, {} measured beside other load (more than {QUIET} CPUs: \
             repeat these)\n",
            count(verdict(true)),
            count(verdict(false)),
            self.failures(),
            self.disturbed()
        )
    }

    /// Cells in whose rounds somebody else was busy, in the median of either server.
    fn disturbed(&self) -> usize {
        let loud = |rounds: &Rounds| (0..2).any(|side| rounds.median(side, |sample| sample.cpu.others) > QUIET);
        self.rows.iter().filter(|row| row.rounds.as_ref().is_ok_and(loud)).count()
    }
}

/// A figure of both servers, in the median.
fn both(rounds: &Rounds, digits: usize, figure: impl Fn(&Sample) -> f64) -> String {
    format!("{:.digits$} / {:.digits$}", rounds.median(0, &figure), rounds.median(1, &figure))
}

/// Other load, in CPUs, up to which a cell counts as undisturbed.
const QUIET: f64 = 0.1;

const HEADINGS: &str = "\
| cell | disk | IOPS ratio | least | kIOPS | CPU ratio | CPU ns/IO | client ns/IO | p50 µs | p99 µs | p99.9 µs | kicks/IO | interrupts/IO \
| RSS MiB | RssAnon MiB | other load, CPUs | aims |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
";
