//! A log survives being killed, cut, filled and damaged.

use super::super::{EvalLine, SelectionLine, StepMetrics};
use super::*;
use crate::id::{PolicyVersion, TicketId};
use crate::message::fate::Fate;
use proptest::prelude::*;

fn eval(version: u64) -> EvalLine {
    let policy_version = PolicyVersion(version);
    EvalLine {
        policy_version,
        accuracy: 0.5,
        samples: 1_000,
        seconds: 0.25,
    }
}

fn versions(lines: &[EvalLine]) -> Vec<u64> {
    lines.iter().map(|line| line.policy_version.0).collect()
}

fn log_of(path: &Path, count: u64) {
    let mut log = JsonLines::open(path, |_| true).unwrap();
    (0..count).for_each(|version| log.append(&eval(version)).unwrap());
}

#[test]
fn a_run_that_resumes_drops_the_lines_of_steps_it_takes_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rollouts").join("eval.jsonl");
    log_of(&path, 5);
    let mut log = JsonLines::open(&path, |line: &EvalLine| line.policy_version.0 <= 2).unwrap();
    log.append(&eval(9)).unwrap();
    assert_eq!(versions(&read_all(&path).unwrap()), [0, 1, 2, 9]);
}

#[test]
fn a_torn_last_line_is_no_record_and_is_cut_before_the_next_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("eval.jsonl");
    log_of(&path, 2);
    let mut text = fs::read(&path).unwrap();
    text.extend_from_slice(b"{\"policy_version\":2,\"accur");
    fs::write(&path, &text).unwrap();
    assert_eq!(versions(&read_all(&path).unwrap()), [0, 1]);
    JsonLines::open(&path, |_| true)
        .unwrap()
        .append(&eval(2))
        .unwrap();
    assert_eq!(versions(&read_all(&path).unwrap()), [0, 1, 2]);
}

#[test]
fn a_damaged_line_in_the_middle_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("eval.jsonl");
    log_of(&path, 2);
    let text = fs::read_to_string(&path)
        .unwrap()
        .replacen("accuracy", "acuracy", 1);
    fs::write(&path, text).unwrap();
    let error = read_all::<EvalLine>(&path).unwrap_err();
    assert!(
        matches!(error, JsonLinesError::Corrupt { line: 1, .. }),
        "{error}"
    );
    assert!(
        error.to_string().contains("missing field `accuracy`"),
        "{error}"
    );
    assert!(JsonLines::<EvalLine>::open(&path, |_| true).is_err());
}

#[test]
fn a_number_that_is_not_finite_is_refused_by_its_key() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("metrics.jsonl");
    let mut log = JsonLines::open(&path, |_| true).unwrap();
    let bad = StepMetrics {
        grad_norm: f64::NAN,
        ..StepMetrics::default()
    };
    let error = log.append(&bad).unwrap_err().to_string();
    assert!(
        error.starts_with("`optim/grad_norm` of a line for"),
        "{error}"
    );
    log.append(&StepMetrics::default()).unwrap();
    assert_eq!(read_all::<StepMetrics>(&path).unwrap().len(), 1);
}

#[test]
fn an_absent_worker_is_not_a_number_that_is_not_finite() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("selections.jsonl");
    let mut log = JsonLines::open(&path, |_| true).unwrap();
    let line = SelectionLine {
        ticket: TicketId(1),
        group: None,
        worker: None,
        policy_version: None,
        fate: Fate::Expired,
        reason: "a null, <b>and</b>\na line break".to_owned(),
        audited: false,
        step: None,
    };
    log.append(&line).unwrap();
    assert_eq!(read_all::<SelectionLine>(&path).unwrap(), [line]);
}

#[test]
fn a_full_disk_is_told_in_one_sentence() {
    let full = io::Error::from(io::ErrorKind::StorageFull);
    let error = JsonLinesError::io(Path::new("run/metrics.jsonl"), "written", full);
    assert_eq!(
        error.to_string(),
        "the disk is full: run/metrics.jsonl could not grow; \
         free some space and start the same command again"
    );
}

#[test]
fn a_disk_that_fills_up_within_a_line_leaves_none_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("eval.jsonl");
    log_of(&path, 2);
    let mut log = JsonLines::open(&path, |_| true).unwrap();
    let full = log.append_by(&eval(2), |file, text| {
        file.write_all(&text[..text.len() / 2])?;
        Err(io::ErrorKind::StorageFull.into())
    });
    assert!(matches!(full, Err(JsonLinesError::DiskFull { .. })));
    log.append(&eval(3)).unwrap();
    assert_eq!(versions(&read_all(&path).unwrap()), [0, 1, 3]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_device_without_space_gives_that_error() {
    let path = Path::new("/dev/full");
    let Ok(file) = OpenOptions::new().append(true).open(path) else {
        return;
    };
    let mut log = JsonLines {
        path: path.to_owned(),
        file,
        bytes: 0,
        line: PhantomData,
    };
    assert!(matches!(
        log.append(&eval(0)),
        Err(JsonLinesError::DiskFull { .. })
    ));
}

#[test]
fn a_reader_follows_a_log_as_it_grows_and_notices_when_it_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("eval.jsonl");
    let mut reader = JsonLinesReader::<EvalLine>::new(&path);
    assert_eq!(
        reader.read_new().unwrap(),
        Read {
            lines: vec![],
            restarted: false
        }
    );
    log_of(&path, 3);
    assert_eq!(versions(&reader.read_new().unwrap().lines), [0, 1, 2]);
    JsonLines::open(&path, |_| true)
        .unwrap()
        .append(&eval(3))
        .unwrap();
    assert_eq!(versions(&reader.read_new().unwrap().lines), [3]);
    assert!(reader.read_new().unwrap().lines.is_empty());
    drop(JsonLines::open(&path, |line: &EvalLine| line.policy_version.0 < 1).unwrap());
    let cut = reader.read_new().unwrap();
    assert_eq!((versions(&cut.lines), cut.restarted), (vec![0], true));
    // Cut, and grown beyond where it was before anybody looked.
    let mut log = JsonLines::open(&path, |_: &EvalLine| false).unwrap();
    (5..9).for_each(|version| log.append(&eval(version)).unwrap());
    let regrown = reader.read_new().unwrap();
    assert_eq!(
        (versions(&regrown.lines), regrown.restarted),
        (vec![5, 6, 7, 8], true)
    );
}

proptest! {
    #[test]
    fn a_log_cut_at_any_byte_keeps_every_line_that_was_whole(lost in 0usize..400) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("eval.jsonl");
        log_of(&path, 4);
        let text = fs::read(&path).unwrap();
        let kept = &text[..text.len().saturating_sub(lost)];
        let whole = kept.iter().filter(|&&byte| byte == b'\n').count() as u64;
        fs::write(&path, kept).unwrap();
        JsonLines::open(&path, |_| true).unwrap().append(&eval(77)).unwrap();
        let expected: Vec<u64> = (0..whole).chain([77]).collect();
        prop_assert_eq!(versions(&read_all(&path).unwrap()), expected);
    }
}
