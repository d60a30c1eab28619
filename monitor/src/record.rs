//! Reads a run directory's logs: once for the report, or repeatedly as they grow. Knows nothing about the display.
//! Invariants: each line of a log is read once; reasons, which may contain a peer's text, are printable and bounded in number.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use muster_protocol::id::PeerId;
use muster_protocol::message::fate::Fate;
use muster_protocol::record::{
    EvalLine, JsonLinesError, JsonLinesReader, Line, RolloutLine, SelectionLine, StepMetrics,
    read_all,
};

use crate::text::printable;

/// Most reasons counted separately. Muster has a few dozen; a peer that varies its text must not fill the memory.
const REASONS_MAX: usize = 64;
/// Longest reason kept, in characters.
const REASON_CHARS_MAX: usize = 240;

/// Why a run directory was not read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("{} holds no run: its config.toml is missing; name the directory of a run", dir.display())]
    NoRun { dir: PathBuf },
    #[error("{} cannot be read: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Log(#[from] JsonLinesError),
}

/// All data of the report and the display.
#[derive(Debug, Clone, Default)]
pub struct RunRecord {
    /// The directory's name.
    pub name: String,
    /// Text of `config.toml`; empty until it is read.
    pub config: String,
    /// One per step, in order.
    pub steps: Vec<StepMetrics>,
    /// One per evaluation, in order.
    pub evals: Vec<EvalLine>,
    pub fates: Fates,
    /// Fates of each worker's groups.
    pub workers: BTreeMap<PeerId, WorkerTally>,
}

/// The fates of tickets and their reasons.
#[derive(Debug, Clone, Default)]
pub struct Fates {
    pub counts: BTreeMap<Fate, u64>,
    /// Reasons by fate and by sentence without its numbers.
    pub reasons: BTreeMap<(Fate, String), Reason>,
    /// The newest rejection's full sentence.
    pub newest_rejection: Option<String>,
}

/// A reason that several groups share.
#[derive(Debug, Clone, Default)]
pub struct Reason {
    pub count: u64,
    /// The newest such sentence, with its numbers.
    pub example: String,
}

/// The fates of a worker's groups.
#[derive(Debug, Clone, Default)]
pub struct WorkerTally {
    pub counts: BTreeMap<Fate, u64>,
    /// Groups checked by a forward pass.
    pub audited: u64,
    /// Completion tokens of its groups that were trained.
    pub tokens: u64,
}

impl Fates {
    /// Tickets with this fate.
    pub fn of(&self, fate: Fate) -> u64 {
        self.counts.get(&fate).copied().unwrap_or(0)
    }

    /// The reasons of a fate, the most frequent first.
    pub fn reasons_of(&self, fate: Fate) -> Vec<&Reason> {
        let mut reasons: Vec<&Reason> = self
            .reasons
            .iter()
            .filter(|((of, _), _)| *of == fate)
            .map(|(_, reason)| reason)
            .collect();
        reasons.sort_by_key(|reason| std::cmp::Reverse(reason.count));
        reasons
    }

    fn add(&mut self, line: &SelectionLine) {
        *self.counts.entry(line.fate).or_default() += 1;
        let words = printable(&line.reason, REASON_CHARS_MAX);
        if line.fate == Fate::Rejected {
            self.newest_rejection = Some(words.clone());
        }
        if words.is_empty() {
            return;
        }
        let mut key = (line.fate, without_numbers(&words));
        let mut example = words;
        if !self.reasons.contains_key(&key) && self.reasons.len() >= REASONS_MAX {
            key.1 = "other reasons".to_owned();
            example.clone_from(&key.1);
        }
        let reason = self.reasons.entry(key).or_default();
        reason.count += 1;
        reason.example = example;
    }
}

/// Replaces each word with a digit by `#`, so that sentences that differ in numbers only are equal.
fn without_numbers(sentence: &str) -> String {
    let hide = |word: &str| {
        if !word.contains(|c: char| c.is_ascii_digit()) {
            return word.to_owned();
        }
        let ending = word.len() - word.trim_end_matches([',', ';', ':', '.', ')']).len();
        format!("#{}", &word[word.len() - ending..])
    };
    sentence.split(' ').map(hide).collect::<Vec<_>>().join(" ")
}

/// Numbers of lines added to logs since the last read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Added {
    pub steps: usize,
    pub evals: usize,
}

/// Reads a run directory whose logs may still grow.
#[derive(Debug)]
pub struct RecordReader {
    dir: PathBuf,
    record: RunRecord,
    steps: JsonLinesReader<StepMetrics>,
    evals: JsonLinesReader<EvalLine>,
    selections: JsonLinesReader<SelectionLine>,
}

impl RecordReader {
    /// A reader that has read nothing yet; the directory need not exist.
    pub fn new(dir: &Path) -> Self {
        let name = dir.file_name().unwrap_or(dir.as_os_str()).to_string_lossy();
        Self {
            dir: dir.to_owned(),
            record: RunRecord {
                name: printable(&name, 80),
                ..RunRecord::default()
            },
            steps: JsonLinesReader::new(&dir.join(StepMetrics::FILE)),
            evals: JsonLinesReader::new(&dir.join(EvalLine::FILE)),
            selections: JsonLinesReader::new(&dir.join(SelectionLine::FILE)),
        }
    }

    pub fn record(&self) -> &RunRecord {
        &self.record
    }

    pub fn into_record(self) -> RunRecord {
        self.record
    }

    /// Reads the lines added to the logs. A log that a resumed run has truncated is read again from its start.
    ///
    /// # Errors
    /// A log cannot be read, or has lines of another kind.
    pub fn read_new(&mut self) -> Result<Added, JsonLinesError> {
        let steps = self.steps.read_new()?;
        let evals = self.evals.read_new()?;
        let selections = self.selections.read_new()?;
        let record = &mut self.record;
        let before = (record.steps.len(), record.evals.len());
        if steps.restarted {
            record.steps.clear();
        }
        record.steps.extend(steps.lines);
        if evals.restarted {
            record.evals.clear();
        }
        record.evals.extend(evals.lines);
        // What a resumed run takes again is not news.
        let added = Added {
            steps: record.steps.len().saturating_sub(before.0),
            evals: record.evals.len().saturating_sub(before.1),
        };
        if selections.restarted {
            record.fates = Fates::default();
            record.workers.clear();
        }
        for line in &selections.lines {
            record.add_selection(line);
        }
        Ok(added)
    }
}

impl RunRecord {
    /// Reads a whole run directory, with the tokens of each worker's rollouts.
    ///
    /// # Errors
    /// The directory has no run, or a log cannot be read.
    pub fn load(dir: &Path) -> Result<Self, RecordError> {
        let mut reader = RecordReader::new(dir);
        reader.read_new()?;
        let mut record = reader.record;
        let config = reader.dir.join("config.toml");
        record.config = fs::read_to_string(&config).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => RecordError::NoRun {
                dir: dir.to_owned(),
            },
            _ => RecordError::Io {
                path: config,
                source,
            },
        })?;
        for path in rollout_logs(&reader.dir.join(RolloutLine::FILE))? {
            for rollout in read_all::<RolloutLine>(&path)? {
                let tally = record.workers.entry(rollout.worker).or_default();
                tally.tokens += rollout.completion_tokens.len() as u64;
            }
        }
        Ok(record)
    }

    pub fn steps_taken(&self) -> u64 {
        self.steps.last().map_or(0, |line| line.step)
    }

    /// Seconds of all steps over all starts of the run, waits for batches included.
    pub fn seconds(&self) -> f64 {
        self.steps.iter().map(|line| line.time_step).sum()
    }

    /// Tokens trained.
    pub fn tokens_trained(&self) -> u64 {
        self.steps.iter().map(|line| line.tokens_trained).sum()
    }

    /// The evaluation with the highest accuracy; of equal ones, the earliest.
    pub fn best_eval(&self) -> Option<&EvalLine> {
        self.evals
            .iter()
            .rev()
            .max_by(|a, b| a.accuracy.total_cmp(&b.accuracy))
    }

    fn add_selection(&mut self, line: &SelectionLine) {
        self.fates.add(line);
        if let Some(worker) = line.worker {
            let tally = self.workers.entry(worker).or_default();
            *tally.counts.entry(line.fate).or_default() += 1;
            tally.audited += u64::from(line.audited);
        }
    }
}

/// The folder of a run's newest checkpoint, named by its version.
///
/// # Errors
/// The folder of checkpoints exists and cannot be listed.
pub fn newest_checkpoint(dir: &Path) -> Result<Option<PathBuf>, RecordError> {
    let folder = dir.join("checkpoints");
    let version = |path: &PathBuf| {
        path.file_name()
            .and_then(|name| name.to_str()?.parse::<u64>().ok())
    };
    let newest = list(&folder)?
        .into_iter()
        .filter(|path| version(path).is_some());
    Ok(newest.max_by_key(version))
}

fn rollout_logs(folder: &Path) -> Result<Vec<PathBuf>, RecordError> {
    let is_log = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "jsonl");
    let mut logs: Vec<PathBuf> = list(folder)?.into_iter().filter(is_log).collect();
    logs.sort();
    Ok(logs)
}

/// The entries of a folder; none if the folder is missing.
fn list(folder: &Path) -> Result<Vec<PathBuf>, RecordError> {
    let refused = |source| RecordError::Io {
        path: folder.to_owned(),
        source,
    };
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(refused(source)),
    };
    entries
        .map(|entry| entry.map(|entry| entry.path()).map_err(refused))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_protocol::id::{GroupHash, PolicyVersion, TicketId};
    use muster_protocol::message::group::FinishReason;
    use muster_protocol::record::JsonLines;

    fn selection(ticket: u64, fate: Fate, reason: &str) -> SelectionLine {
        SelectionLine {
            ticket: TicketId(ticket),
            group: None,
            worker: Some(PeerId([(ticket % 2) as u8; 32])),
            policy_version: None,
            fate,
            reason: reason.to_owned(),
            audited: true,
            step: None,
        }
    }

    #[test]
    fn a_directory_is_read_as_it_grows_and_read_anew_when_a_resumed_run_cut_it() {
        let folder = tempfile::tempdir().unwrap();
        let mut reader = RecordReader::new(folder.path());
        assert_eq!(reader.read_new().unwrap(), Added::default());

        let metrics = folder.path().join("metrics.jsonl");
        let mut log = JsonLines::open(&metrics, |_| true).unwrap();
        for step in 1..=3 {
            let line = StepMetrics {
                step,
                time_step: 2.0,
                tokens_trained: 100,
                ..Default::default()
            };
            log.append(&line).unwrap();
        }
        assert_eq!(reader.read_new().unwrap(), Added { steps: 3, evals: 0 });
        let record = reader.record();
        assert_eq!((record.steps_taken(), record.tokens_trained()), (3, 300));
        assert!((record.seconds() - 6.0).abs() < 1e-9);

        drop(JsonLines::open(&metrics, |line: &StepMetrics| line.step <= 1).unwrap());
        reader.read_new().unwrap();
        assert_eq!(reader.record().steps_taken(), 1);
    }

    #[test]
    fn reasons_that_differ_in_their_numbers_are_one() {
        let mut fates = Fates::default();
        fates.add(&selection(
            1,
            Fate::Stale,
            "group is 5 steps stale, limit 4",
        ));
        fates.add(&selection(
            2,
            Fate::Stale,
            "group is 7 steps stale, limit 4",
        ));
        fates.add(&selection(
            3,
            Fate::Rejected,
            "draws of rollout 3 are off by 0.41, limit 1e-4",
        ));
        assert_eq!(fates.of(Fate::Stale), 2);
        let stale = fates.reasons_of(Fate::Stale);
        assert_eq!((stale.len(), stale[0].count), (1, 2));
        assert_eq!(stale[0].example, "group is 7 steps stale, limit 4");
        assert!(fates.newest_rejection.unwrap().contains("0.41"));
    }

    #[test]
    fn a_peer_that_varies_its_reasons_does_not_fill_the_memory() {
        let mut fates = Fates::default();
        for ticket in 0..1_000u64 {
            let word = format!("bad\x1b[2J{}", "x".repeat(ticket as usize % 500));
            fates.add(&selection(ticket, Fate::Rejected, &word));
        }
        assert!(fates.reasons.len() <= REASONS_MAX + 1);
        assert_eq!(fates.of(Fate::Rejected), 1_000);
        let counted: u64 = fates.reasons.values().map(|reason| reason.count).sum();
        assert_eq!(counted, 1_000);
        assert!(
            fates
                .reasons
                .values()
                .all(|reason| !reason.example.contains('\x1b'))
        );
    }

    #[test]
    fn a_whole_run_is_loaded_with_its_workers_and_its_newest_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let error = RunRecord::load(dir).unwrap_err().to_string();
        assert!(error.contains("holds no run"), "{error}");

        fs::write(dir.join("config.toml"), "steps = 2\n").unwrap();
        let mut log = JsonLines::open(&dir.join("selections.jsonl"), |_| true).unwrap();
        for ticket in 1..=3 {
            log.append(&selection(ticket, Fate::Trained, "")).unwrap();
        }
        let rollout = RolloutLine {
            ticket: TicketId(1),
            group: GroupHash([0; 32]),
            worker: PeerId([1; 32]),
            step: 1,
            policy_version: PolicyVersion(0),
            temperature: 1.0,
            prompt_tokens: vec![1],
            completion_tokens: vec![1, 2, 3],
            rollout_logprobs: vec![-0.5; 3],
            reward: 0.0,
            advantage: 0.0,
            finish_reason: FinishReason::Stop,
        };
        let mut log = JsonLines::open(&dir.join("rollouts/1.jsonl"), |_| true).unwrap();
        log.append(&rollout).unwrap();
        for version in ["2", "10", "partial"] {
            fs::create_dir_all(dir.join("checkpoints").join(version)).unwrap();
        }

        let record = RunRecord::load(dir).unwrap();
        assert_eq!(record.config, "steps = 2\n");
        let tally = &record.workers[&PeerId([1; 32])];
        assert_eq!(
            (tally.tokens, tally.counts[&Fate::Trained], tally.audited),
            (3, 2, 2)
        );
        let newest = newest_checkpoint(dir).unwrap().unwrap();
        assert!(newest.ends_with("checkpoints/10"), "{}", newest.display());
    }

    #[test]
    fn the_best_evaluation_is_the_earliest_of_equals() {
        let eval = |version, accuracy| EvalLine {
            policy_version: PolicyVersion(version),
            accuracy,
            samples: 10,
            seconds: 0.1,
        };
        let evals = vec![eval(0, 0.5), eval(10, 0.9), eval(20, 0.9), eval(30, 0.8)];
        let record = RunRecord {
            evals,
            ..RunRecord::default()
        };
        assert_eq!(
            record.best_eval().unwrap().policy_version,
            PolicyVersion(10)
        );
    }
}
