//! What a late peer saves: bytes of one delta over several versions against the single steps between them, on synthetic
//! training and on the versions of a real run. Sizes only.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;

use muster_broadcaster::codec::delta::encode;
use muster_protocol::message::version::SQUASH_STRIDES;

use super::training::{Training, pairs};
use muster_monitor::output::say;
use muster_monitor::text::short;

/// The step after which synthetic versions are looked at: every weight has a history by then.
const FIRST_STEP: u32 = 8;
/// Tensors of 4 Mi weights that are trained: seventeen versions of each are in memory.
const TENSORS: usize = 2;

/// A distance that was measured.
#[derive(Debug, Serialize)]
struct Row {
    what: String,
    stride: u64,
    full_bytes: u64,
    /// Single steps, one after the other.
    chained_bytes: u64,
    /// One delta over all of them.
    squashed_bytes: u64,
}

/// Measures synthetic training.
pub(super) fn synthetic(
    trainings: impl Iterator<Item = (String, Training)>,
    threads: NonZeroUsize,
    json: bool,
) -> Result<()> {
    let longest = SQUASH_STRIDES.into_iter().max().unwrap_or(1);
    let steps: Vec<u32> = (FIRST_STEP + 1..=FIRST_STEP + longest as u32).collect();
    header(json)?;
    for (what, training) in trainings {
        let pairs = pairs(training, TENSORS, &steps, threads.get());
        let first = pairs.first().context("there are no steps")?;
        let mut chained = 0;
        for (distance, pair) in (1u64..).zip(&pairs) {
            chained += encode(&pair.parent, &pair.child, threads)?.bytes.len() as u64;
            if SQUASH_STRIDES.contains(&distance) {
                let squashed = encode(&first.parent, &pair.child, threads)?.bytes.len() as u64;
                tell(
                    &what,
                    distance,
                    pair.child.len() as u64,
                    (chained, squashed),
                    json,
                )?;
            }
        }
    }
    Ok(())
}

/// Measures the newest versions of a run that are a stride apart, by their place in the folder.
pub(super) fn real(versions: &[(u64, PathBuf)], threads: NonZeroUsize, json: bool) -> Result<()> {
    header(json)?;
    for stride in SQUASH_STRIDES {
        let skipped = versions.len().saturating_sub(stride as usize + 1);
        let Some([(from, first), steps @ ..]) = versions.get(skipped..) else {
            continue;
        };
        if (steps.len() as u64) < stride {
            say(&format!(
                "{} versions are too few for stride {stride}",
                versions.len()
            ))?;
            continue;
        }
        let read = |path: &PathBuf| {
            std::fs::read(path).with_context(|| format!("{} cannot be read", path.display()))
        };
        let begin = read(first)?;
        let (mut parent, mut chained, mut last) = (begin.clone(), 0, *from);
        for (version, path) in steps {
            let child = read(path)?;
            chained += encode(&parent, &child, threads)?.bytes.len() as u64;
            (parent, last) = (child, *version);
        }
        let squashed = encode(&begin, &parent, threads)?.bytes.len() as u64;
        let what = format!("version {from} to {last}");
        tell(
            &what,
            stride,
            parent.len() as u64,
            (chained, squashed),
            json,
        )?;
    }
    Ok(())
}

fn header(json: bool) -> Result<()> {
    if json {
        return Ok(());
    }
    say(&format!(
        "{:<26} {:>6} {:>9} {:>9} {:>9} {:>8}",
        "what", "stride", "full", "chained", "squashed", "smaller"
    ))
}

fn tell(
    what: &str,
    stride: u64,
    full_bytes: u64,
    (chained_bytes, squashed_bytes): (u64, u64),
    json: bool,
) -> Result<()> {
    if json {
        let what = what.to_owned();
        let row = Row {
            what,
            stride,
            full_bytes,
            chained_bytes,
            squashed_bytes,
        };
        return say(&serde_json::to_string(&row)?);
    }
    say(&format!(
        "{what:<26} {stride:>6} {:>9} {:>9} {:>9} {:>7.2}x",
        short(full_bytes as f64),
        short(chained_bytes as f64),
        short(squashed_bytes as f64),
        chained_bytes as f64 / squashed_bytes.max(1) as f64
    ))
}
