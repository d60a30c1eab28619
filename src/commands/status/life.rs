//! `muster status --group ID`: the life of one group in order, from the logs of all processes of the run on this machine.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::Path;

use anyhow::{Context, Result, bail};

use muster_monitor::output::say;
use muster_monitor::text::printable;
use muster_protocol::life;

use crate::run_dir::RunDir;

/// Most characters of a printed line: enough for every stage, and a log may hold a peer's text.
const LINE_MAX: usize = 400;

/// A stage in a group's life, as a process logged it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Stage {
    /// RFC 3339 in UTC, so that the order of the text is the order of time.
    time: String,
    process: String,
    text: String,
}

impl Stage {
    /// Reads `TIME LEVEL TARGET: TEXT`; `None` for lines of other targets.
    fn parse(process: &str, line: &str) -> Option<Self> {
        let (head, text) = line.split_once(&format!(" {}: ", life::TARGET))?;
        let (time, level) = head.split_once(' ')?;
        level.trim_start().starts_with("DEBUG").then(|| Self {
            time: time.to_owned(),
            process: process.to_owned(),
            text: text.to_owned(),
        })
    }

    fn field(&self, name: &str) -> Option<&str> {
        self.text
            .split(' ')
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.trim_matches('"'))
    }
}

/// Prints the stages of the group `id`: a ticket's number or the group's hash.
pub(super) fn print(dir: &RunDir, id: &str) -> Result<()> {
    let folder = dir.root().join("logs");
    let stages = life_of(read(&folder)?, id);
    if stages.is_empty() {
        bail!(
            "the logs in {} have no group {id}: give a ticket's number or a group's hash; if MUSTER_LOG \
             was set for the run, it must contain {}=debug",
            folder.display(),
            life::TARGET
        );
    }
    for stage in stages {
        let line = format!("{} {:<10} {}", stage.time, stage.process, stage.text);
        say(&printable(&line, LINE_MAX))?;
    }
    Ok(())
}

fn read(folder: &Path) -> Result<Vec<Stage>> {
    let unreadable = |path: &Path| format!("{} cannot be read", path.display());
    let mut stages = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| unreadable(folder))? {
        let path = entry.with_context(|| unreadable(folder))?.path();
        let process = path.file_stem().unwrap_or_default().to_string_lossy();
        let mut log = BufReader::new(File::open(&path).with_context(|| unreadable(&path))?);
        let mut line = Vec::new();
        while log
            .read_until(b'\n', &mut line)
            .with_context(|| unreadable(&path))?
            > 0
        {
            let text = String::from_utf8_lossy(&line);
            stages.extend(Stage::parse(&process, text.trim_end()));
            line.clear();
        }
    }
    Ok(stages)
}

/// All stages of the tickets that `id` names, in order of time. Early stages have a ticket and no hash yet; logs have the
/// first digits of a hash.
fn life_of(mut stages: Vec<Stage>, id: &str) -> Vec<Stage> {
    let named = stages.iter().filter(|stage| {
        let group = stage.field("group");
        stage.field("ticket") == Some(id) || group.is_some_and(|group| id.starts_with(group))
    });
    let tickets: BTreeSet<String> = named
        .filter_map(|stage| stage.field("ticket").map(str::to_owned))
        .collect();
    stages.retain(|stage| {
        stage
            .field("ticket")
            .is_some_and(|ticket| tickets.contains(ticket))
    });
    stages.sort();
    stages
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISPATCH: &str = "\
2026-11-30T08:00:00.000001Z DEBUG muster::life: issued ticket=4
2026-11-30T08:00:00.000003Z DEBUG muster::life: issued ticket=41
2026-11-30T08:00:00.500000Z  INFO muster_dispatch: ticket=4 is not a stage
2026-11-30T08:00:02.000000Z DEBUG muster::life: admitted ticket=4 lease=9 group=\"01234567\" worker=worker-1";
    const WORKER: &str = "\
2026-11-30T08:00:01.000000Z DEBUG muster::life: lease taken ticket=4 lease=9";

    fn stages() -> Vec<Stage> {
        let of = |process: &'static str, log: &'static str| {
            log.lines()
                .filter_map(move |line| Stage::parse(process, line))
        };
        of("dispatch", DISPATCH)
            .chain(of("worker-1", WORKER))
            .collect()
    }

    #[test]
    fn the_life_of_a_group_is_in_order_of_time_over_all_processes() {
        let life = life_of(stages(), "4");
        let texts: Vec<&str> = life.iter().map(|stage| stage.text.as_str()).collect();
        assert_eq!(
            texts,
            [
                "issued ticket=4",
                "lease taken ticket=4 lease=9",
                "admitted ticket=4 lease=9 group=\"01234567\" worker=worker-1"
            ]
        );
    }

    #[test]
    fn a_hash_names_a_group_too() {
        assert_eq!(
            life_of(stages(), "0123456789abcdef"),
            life_of(stages(), "4")
        );
        assert_eq!(life_of(stages(), "01234567"), life_of(stages(), "4"));
        assert_eq!(life_of(stages(), "01"), []);
        assert_eq!(life_of(stages(), "5"), []);
    }
}
