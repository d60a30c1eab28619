//! One pair of versions through every coder, interleaved: what another process takes from the machine in a round, it takes
//! from all of them.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use muster_broadcaster::codec::delta::{Delta, apply_into, encode};
use muster_broadcaster::codec::planes;
use muster_broadcaster::version::state::{TensorSpan, tensor_spans};
use muster_protocol::message::version::Dtype;

use super::pulse;
use crate::spread::Spread;

/// A coder's figures for one pair.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Figures {
    /// Size of what is sent.
    pub(super) bytes: u64,
    /// Speeds in GB of weights per second, the median of the rounds.
    pub(super) encode: f64,
    pub(super) apply: f64,
}

/// What one pair showed.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Outcome {
    pub(super) full_bytes: u64,
    pub(super) tensors: usize,
    pub(super) changed: f64,
    /// Slices that are the same, patched, in planes, as they are.
    pub(super) methods: [usize; 4],
    pub(super) ours: Figures,
    /// PULSE's patch with flat gaps.
    pub(super) pulse: Figures,
    /// Its size as its own code packs it, in rows and columns.
    pub(super) pulse_rows_bytes: u64,
    pub(super) planes: Figures,
    /// GB/s of one copy by one thread, and of copies by all of them.
    pub(super) memcpy: f64,
    pub(super) memcpy_all: f64,
}

impl Outcome {
    /// The smaller of the two PULSE-style patches.
    pub(super) fn pulse_bytes(&self) -> u64 {
        self.pulse.bytes.min(self.pulse_rows_bytes)
    }
}

/// Parent and child in, the patch out; nothing where there is no patch.
type Encode = fn(&[u8], &[u8]) -> Option<Vec<u8>>;
/// Patch and parent in, the child into the last; nothing where the patch is no good.
type Apply = fn(&[u8], &[u8], &mut [u8]) -> Option<()>;

/// How a contender codes a tensor of 16-bit weights, and applies what it coded.
struct Contender {
    encode: Encode,
    apply: Apply,
}

const PULSE: Contender = Contender {
    encode: pulse::packed_flat,
    apply: pulse::apply_flat,
};
const PLANES: Contender = Contender {
    encode: |parent, child| planes::encode(parent, child, 2),
    apply: |coded, parent, child| planes::apply(coded, parent, child, 2).ok(),
};

/// Measures one pair of safetensors files, `rounds` times.
pub(super) fn race(
    parent: &[u8],
    child: &[u8],
    rounds: usize,
    threads: NonZeroUsize,
) -> Result<Outcome> {
    let mut tensors = tensor_spans(parent)?;
    // The contenders are for 16-bit weights, whatever the tensor's type: what they leave out makes them look better.
    tensors.retain(|tensor| tensor.parameter.dtype != Dtype::F32);
    let mut out = vec![0; parent.len()];
    let mut times = [const { Vec::new() }; 8];
    let (mut delta, mut pulse_bytes, mut planes_bytes) = (None, 0, 0);
    for _ in 0..rounds.max(1) {
        times[0].push(seconds(|| out.copy_from_slice(parent)).1);
        times[1].push(copy_on_all(parent, &mut out, threads));
        let (coded, took) = seconds(|| encode(parent, child, threads));
        let coded = coded?;
        times[2].push(took);
        let (applied, took) = seconds(|| apply_into(parent, &coded.bytes, &mut out, threads));
        applied?;
        times[3].push(took);
        ensure!(
            out == child,
            "a delta led to other bytes than it was made from"
        );
        delta = Some(coded);
        for (contender, at, bytes) in [(PULSE, 4, &mut pulse_bytes), (PLANES, 6, &mut planes_bytes)]
        {
            let (coded, took) =
                seconds(|| encode_all(&contender, &tensors, parent, child, threads));
            let coded = coded.context("a contender could not code these weights")?;
            times[at].push(took);
            *bytes = coded.iter().map(|coded| coded.len() as u64).sum();
            let (applied, took) =
                seconds(|| apply_all(&contender, &tensors, &coded, parent, &mut out, threads));
            applied.context("a contender could not apply its own patch")?;
            times[at + 1].push(took);
        }
    }
    let Delta {
        bytes,
        changed,
        elements,
        methods,
    } = delta.context("nothing was measured")?;
    let speeds = times.map(|times| parent.len() as f64 / 1e9 / Spread::of(times).median);
    let figures = |bytes, at: usize| Figures {
        bytes,
        encode: speeds[at],
        apply: speeds[at + 1],
    };
    Ok(Outcome {
        full_bytes: parent.len() as u64,
        tensors: tensors.len(),
        changed: changed as f64 / elements.max(1) as f64,
        methods,
        ours: figures(bytes.len() as u64, 2),
        pulse: figures(pulse_bytes, 4),
        pulse_rows_bytes: rows_bytes(&tensors, parent, child)?,
        planes: figures(planes_bytes, 6),
        memcpy: speeds[0],
        memcpy_all: speeds[1],
    })
}

fn seconds<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let begin = Instant::now();
    let done = work();
    (done, begin.elapsed().as_secs_f64())
}

fn copy_on_all(from: &[u8], to: &mut [u8], threads: NonZeroUsize) -> f64 {
    let share = from.len().div_ceil(threads.get()).max(1);
    let parts = from.chunks(share).zip(to.chunks_mut(share));
    seconds(|| {
        thread::scope(|scope| {
            for (from, to) in parts {
                scope.spawn(|| to.copy_from_slice(from));
            }
        });
    })
    .1
}

fn rows_bytes(tensors: &[TensorSpan], parent: &[u8], child: &[u8]) -> Result<u64> {
    let mut bytes = 0;
    for tensor in tensors {
        let range = tensor.range.clone();
        let columns = tensor.parameter.shape.last().copied().unwrap_or(1) as usize;
        let found = pulse::coordinates(&parent[range.clone()], &child[range], columns);
        let packed = pulse::packed(&found).context("a contender could not code these weights")?;
        bytes += packed.len() as u64;
    }
    Ok(bytes)
}

/// Codes every tensor, each by whichever thread is free.
fn encode_all(
    contender: &Contender,
    tensors: &[TensorSpan],
    parent: &[u8],
    child: &[u8],
    threads: NonZeroUsize,
) -> Option<Vec<Vec<u8>>> {
    let results: Vec<Mutex<Option<Vec<u8>>>> = tensors.iter().map(|_| Mutex::new(None)).collect();
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..threads.get() {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(tensor) = tensors.get(i) else { break };
                    let range = tensor.range.clone();
                    let coded = (contender.encode)(&parent[range.clone()], &child[range]);
                    *results[i].lock().unwrap_or_else(PoisonError::into_inner) = coded;
                }
            });
        }
    });
    results
        .into_iter()
        .map(|result| result.into_inner().unwrap_or_else(PoisonError::into_inner))
        .collect()
}

/// Applies every tensor's patch, as many at a time as there are threads.
fn apply_all(
    contender: &Contender,
    tensors: &[TensorSpan],
    coded: &[Vec<u8>],
    parent: &[u8],
    out: &mut [u8],
    threads: NonZeroUsize,
) -> Option<()> {
    let mut order: Vec<(&TensorSpan, &Vec<u8>)> = tensors.iter().zip(coded).collect();
    order.sort_by_key(|(tensor, _)| tensor.range.start);
    let mut jobs = Vec::with_capacity(order.len());
    let (mut rest, mut at) = (out, 0);
    for (tensor, coded) in order {
        let (_, after) = rest.split_at_mut(tensor.range.start - at);
        let (child, after) = after.split_at_mut(tensor.range.len());
        (rest, at) = (after, tensor.range.end);
        jobs.push((&parent[tensor.range.clone()], coded, child));
    }
    let jobs = Mutex::new(jobs.into_iter());
    let next = || {
        let mut jobs = jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.next()
    };
    let work = || {
        while let Some((parent, coded, child)) = next() {
            (contender.apply)(coded, parent, child)?;
        }
        Some(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads.get()).map(|_| scope.spawn(work)).collect();
        let done: Option<Vec<()>> = threads
            .into_iter()
            .map(|thread| thread.join().ok()?)
            .collect();
        done.map(drop)
    })
}
