//! What the directory of a finished run must hold, whichever process was killed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use muster_broadcaster::snapshot;
use muster_protocol::credentials::Roster;
use muster_protocol::id::{GroupHash, TicketId};
use muster_protocol::message::fate::Fate;
use muster_protocol::record::{EvalLine, RolloutLine, SelectionLine, StepMetrics, read_all};
use muster_protocol::subject::Role;

use super::run::{BATCH_GROUPS, Run, STEPS};

/// Every ticket and every group has one fate, every step one line; no group is trained twice; the result is complete.
pub fn assert_complete(run: &Run) {
    let dir = run.dir();
    let selections = read_all::<SelectionLine>(&dir.join("selections.jsonl")).unwrap();
    assert_one_fate_each(&selections);
    let trained = trained_by_step(&selections);
    assert_steps(&dir, &trained);
    let evals = read_all::<EvalLine>(&dir.join("eval.jsonl")).unwrap();
    let evaluated: Vec<u64> = evals.iter().map(|line| line.policy_version.0).collect();
    assert_eq!(evaluated, [0, STEPS], "evaluated versions");
    let roster = Roster::load(&dir.join("roster.json")).unwrap();
    let learner = roster.first(Role::Trainer).unwrap().peer;
    let folder = dir.join("checkpoints").join(STEPS.to_string());
    let report = snapshot::verify(&folder, &learner, &"kills".parse().unwrap()).unwrap();
    assert_eq!(report.version.version.0, STEPS);
    assert!(dir.join("report.html").exists());
}

fn assert_one_fate_each(selections: &[SelectionLine]) {
    let mut tickets = BTreeMap::new();
    let mut groups = BTreeMap::new();
    for line in selections {
        if line.fate != Fate::Duplicate
            && let Some(earlier) = tickets.insert(line.ticket, line)
        {
            panic!("a ticket has two fates: {earlier:?} and {line:?}");
        }
        if let Some(group) = line.group
            && let Some(earlier) = groups.insert(group, line)
        {
            panic!("a group has two fates: {earlier:?} and {line:?}");
        }
    }
    let ended: Vec<u64> = tickets.keys().map(|ticket| ticket.0).collect();
    let issued: Vec<u64> = (1..=ended.len() as u64).collect();
    assert_eq!(ended, issued, "tickets without a fate");
}

type Groups = BTreeSet<(TicketId, GroupHash)>;

fn trained_by_step(selections: &[SelectionLine]) -> BTreeMap<u64, Groups> {
    let mut trained: BTreeMap<u64, Groups> = BTreeMap::new();
    for line in selections.iter().filter(|line| line.fate == Fate::Trained) {
        let (step, group) = (line.step.unwrap(), line.group.unwrap());
        trained
            .entry(step.0)
            .or_default()
            .insert((line.ticket, group));
    }
    trained
}

/// Each step has one line of metrics and one rollout file, with the groups that selections.jsonl names for it.
fn assert_steps(dir: &Path, trained: &BTreeMap<u64, Groups>) {
    let lines = read_all::<StepMetrics>(&dir.join("metrics.jsonl")).unwrap();
    let steps: Vec<u64> = lines.iter().map(|line| line.step).collect();
    assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>(), "steps on record");
    let files = std::fs::read_dir(dir.join("rollouts")).unwrap().count() as u64;
    assert_eq!(files, STEPS, "rollout files");
    for step in steps {
        let path = dir.join("rollouts").join(format!("step-{step:08}.jsonl"));
        let rollouts = read_all::<RolloutLine>(&path).unwrap();
        let groups: Groups = rollouts
            .iter()
            .map(|line| (line.ticket, line.group))
            .collect();
        assert_eq!(
            groups.len() as u64,
            BATCH_GROUPS,
            "number of groups of step {step}"
        );
        assert_eq!(trained.get(&step), Some(&groups), "groups of step {step}");
    }
}
