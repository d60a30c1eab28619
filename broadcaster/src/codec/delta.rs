//! The format of a delta from one safetensors file to another of the same layout.
//!
//! Tensors are cut into slices of [`SLICE_ELEMENTS`], in the order of their bytes. A directory lists each slice's method and number
//! of coded bytes; the coded slices follow. The encoder takes the method with the fewest bytes, so a delta is at most as large as
//! the tensors and a few bytes per slice. Slices are independent: several threads code them, each with the memory of one slice.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};

use muster_protocol::message::version::Dtype;

use super::patch::{self, Float};
use super::{SLICE_ELEMENTS, SliceError, planes};
use crate::version::state::{StateError, tensor_spans};

/// A delta's first bytes; another format would have others.
const MAGIC: &[u8; 4] = b"msd1";
/// The encoder tries planes only if the patch has more than 1/16 of the slice's bytes. If few weights change, the patch is several
/// times smaller than planes, and compressing planes would take longer than the patch did.
const PLANES_WORTH_TRYING: usize = 16;

/// Why a delta cannot be made or applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// Parent or child is not a safetensors file.
    #[error(transparent)]
    State(#[from] StateError),
    #[error("two versions have different tensors or layouts: send the whole file")]
    Layout,
    #[error("cannot read delta of {bytes} bytes ({problem}): fetch the anchor")]
    Format { bytes: usize, problem: &'static str },
    #[error("slice {slice} of tensor `{tensor}` in the delta {problem}: fetch the anchor")]
    Slice {
        tensor: String,
        /// The slice's number within the tensor.
        slice: usize,
        problem: SliceError,
    },
    /// The result's buffer is not as long as the parent.
    #[error(
        "the result has {expected} bytes, but the buffer has {found}: pass a buffer as long as the parent"
    )]
    Room { expected: usize, found: usize },
    /// The caller stopped the encoder.
    #[error("encoding was stopped before the delta was complete")]
    GivenUp,
}

/// The coding of a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Method {
    /// Nothing changed, so no bytes.
    Same,
    /// Only the changed elements ([`super::patch`]).
    Patch,
    /// Byte planes, compressed ([`super::planes`]).
    Planes,
    /// The child's bytes.
    Raw,
}

impl Method {
    const ALL: [Self; 4] = [Self::Same, Self::Patch, Self::Planes, Self::Raw];
}

/// A delta and its statistics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delta {
    pub bytes: Vec<u8>,
    /// Number of elements that changed.
    pub changed: u64,
    /// Number of elements in the file.
    pub elements: u64,
    /// Number of slices by method, in the order of [`Method`].
    pub methods: [usize; 4],
}

/// A slice of a file.
#[derive(Debug, Clone)]
struct Slice {
    tensor: String,
    slice: usize,
    dtype: Dtype,
    start: usize,
    end: usize,
}

#[derive(Debug)]
struct Coded {
    method: Method,
    bytes: Vec<u8>,
    changed: u64,
}

/// Codes the change from `parent` to `child`, on up to `threads` threads.
///
/// # Errors
/// When the two are not safetensors files with the same header.
pub fn encode(parent: &[u8], child: &[u8], threads: NonZeroUsize) -> Result<Delta, DeltaError> {
    encode_while(parent, child, threads, || true)
}

/// [`encode`] that calls `goes_on` before each slice. `goes_on` may block while other work goes first; it returns false to stop.
///
/// # Errors
/// As [`encode`], and when `goes_on` returned false.
pub(crate) fn encode_while(
    parent: &[u8],
    child: &[u8],
    threads: NonZeroUsize,
    goes_on: impl Fn() -> bool + Sync,
) -> Result<Delta, DeltaError> {
    let slices = slices_of(parent)?;
    let header = slices.first().map_or(parent.len(), |slice| slice.start);
    if parent.len() != child.len() || parent[..header] != child[..header] {
        return Err(DeltaError::Layout);
    }
    let jobs = slices.iter().map(|slice| (slice, None)).collect();
    let coded = in_parallel(
        jobs,
        threads,
        |(slice, done): &mut (&Slice, Option<Coded>)| {
            if !goes_on() {
                return Err(DeltaError::GivenUp);
            }
            let range = slice.start..slice.end;
            *done = Some(encode_slice(
                &parent[range.clone()],
                &child[range],
                slice.dtype,
            ));
            Ok(())
        },
    )?;
    let coded: Vec<Coded> = coded.into_iter().filter_map(|(_, done)| done).collect();
    let mut delta = Delta {
        bytes: MAGIC.to_vec(),
        changed: coded.iter().map(|slice| slice.changed).sum(),
        elements: slices
            .iter()
            .map(|slice| (slice.end - slice.start) as u64 / slice.dtype.bytes())
            .sum(),
        methods: [0; 4],
    };
    for slice in &coded {
        let entry = (slice.bytes.len() as u64) << 2 | slice.method as u64;
        put_number(&mut delta.bytes, entry);
        delta.methods[slice.method as usize] += 1;
    }
    delta
        .bytes
        .reserve(coded.iter().map(|slice| slice.bytes.len()).sum());
    coded
        .iter()
        .for_each(|slice| delta.bytes.extend_from_slice(&slice.bytes));
    Ok(delta)
}

/// Applies `delta` to `parent`, on up to `threads` threads. The caller verifies the result ([`crate::version::state`]).
///
/// # Errors
/// When the parent is not a safetensors file, or the delta does not fit it.
pub fn apply(parent: &[u8], delta: &[u8], threads: NonZeroUsize) -> Result<Vec<u8>, DeltaError> {
    let mut child = vec![0; parent.len()];
    apply_into(parent, delta, &mut child, threads)?;
    Ok(child)
}

/// [`apply`] into a buffer as long as the parent. After an error the buffer's content is undefined.
///
/// # Errors
/// As [`apply`], and when the buffer has another length.
pub fn apply_into(
    parent: &[u8],
    delta: &[u8],
    child: &mut [u8],
    threads: NonZeroUsize,
) -> Result<(), DeltaError> {
    if child.len() != parent.len() {
        let (expected, found) = (parent.len(), child.len());
        return Err(DeltaError::Room { expected, found });
    }
    let slices = slices_of(parent)?;
    let coded = directory(delta, slices.len())?;
    let header = slices.first().map_or(parent.len(), |slice| slice.start);
    let (start, mut rest) = child.split_at_mut(header);
    start.copy_from_slice(&parent[..header]);
    let mut jobs = VecDeque::with_capacity(slices.len());
    for (slice, (method, coded)) in slices.iter().zip(coded) {
        // Tensors tile the file, and slices the tensors.
        let (child, after) = rest.split_at_mut(slice.end - slice.start);
        rest = after;
        jobs.push_back((slice, method, coded, child));
    }
    in_parallel(jobs, threads, |(slice, method, coded, child)| {
        let parent = &parent[slice.start..slice.end];
        apply_slice(*method, coded, parent, child, slice.dtype).map_err(|problem| {
            DeltaError::Slice {
                tensor: slice.tensor.clone(),
                slice: slice.slice,
                problem,
            }
        })
    })?;
    Ok(())
}

/// The slices of a file, in the order of their bytes.
fn slices_of(file: &[u8]) -> Result<Vec<Slice>, StateError> {
    let mut spans = tensor_spans(file)?;
    spans.sort_by_key(|span| span.range.start);
    let mut slices = Vec::new();
    for span in spans {
        let dtype = span.parameter.dtype;
        let bytes = SLICE_ELEMENTS * dtype.bytes() as usize;
        for (slice, start) in span.range.clone().step_by(bytes).enumerate() {
            slices.push(Slice {
                tensor: span.parameter.name.clone(),
                slice,
                dtype,
                start,
                end: (start + bytes).min(span.range.end),
            });
        }
    }
    Ok(slices)
}

fn float_of(dtype: Dtype) -> Option<Float> {
    match dtype {
        Dtype::Bf16 => Some(Float::Bf16),
        Dtype::F16 => Some(Float::F16),
        Dtype::F32 => None,
    }
}

fn encode_slice(parent: &[u8], child: &[u8], dtype: Dtype) -> Coded {
    let width = dtype.bytes() as usize;
    let mut best = Coded {
        method: Method::Raw,
        bytes: Vec::new(),
        changed: 0,
    };
    if parent == child {
        best.method = Method::Same;
        return best;
    }
    let mut length = child.len();
    match float_of(dtype).and_then(|float| patch::encode(parent, child, float)) {
        Some(patch) => {
            best.changed = patch.changed;
            if patch.bytes.len() < length {
                length = patch.bytes.len();
                (best.method, best.bytes) = (Method::Patch, patch.bytes);
            }
        }
        None => best.changed = changed(parent, child, width),
    }
    if length > child.len() / PLANES_WORTH_TRYING
        && let Some(planes) = planes::encode(parent, child, width)
        && planes.len() < length
    {
        (best.method, best.bytes) = (Method::Planes, planes);
    }
    if best.method == Method::Raw {
        best.bytes = child.to_vec();
    }
    best
}

fn changed(parent: &[u8], child: &[u8], width: usize) -> u64 {
    let pairs = parent.chunks(width).zip(child.chunks(width));
    pairs.filter(|(parent, child)| parent != child).count() as u64
}

fn apply_slice(
    method: Method,
    coded: &[u8],
    parent: &[u8],
    child: &mut [u8],
    dtype: Dtype,
) -> Result<(), SliceError> {
    match (method, float_of(dtype)) {
        (Method::Same, _) if !coded.is_empty() => Err(SliceError::Trailing),
        (Method::Same, _) => {
            child.copy_from_slice(parent);
            Ok(())
        }
        (Method::Patch, Some(float)) => patch::apply(coded, parent, child, float),
        (Method::Patch, None) => Err(SliceError::Table),
        (Method::Planes, _) => planes::apply(coded, parent, child, dtype.bytes() as usize),
        (Method::Raw, _) if coded.len() < child.len() => Err(SliceError::Truncated),
        (Method::Raw, _) if coded.len() > child.len() => Err(SliceError::Trailing),
        (Method::Raw, _) => {
            child.copy_from_slice(coded);
            Ok(())
        }
    }
}

/// The coded bytes of every slice.
fn directory(delta: &[u8], slices: usize) -> Result<Vec<(Method, &[u8])>, DeltaError> {
    let bytes = delta.len();
    let bad = |problem| DeltaError::Format { bytes, problem };
    let mut rest = delta
        .strip_prefix(MAGIC)
        .ok_or_else(|| bad("its first bytes are not `msd1`"))?;
    let mut entries = Vec::with_capacity(slices);
    for _ in 0..slices {
        let entry = take_number(&mut rest).ok_or_else(|| bad("its directory is cut short"))?;
        entries.push((Method::ALL[(entry & 3) as usize], entry >> 2));
    }
    let mut coded = Vec::with_capacity(slices);
    for (method, length) in entries {
        let split = usize::try_from(length).ok();
        let split = split.and_then(|length| rest.split_at_checked(length));
        let (slice, after) = split.ok_or_else(|| bad("a slice is cut short"))?;
        coded.push((method, slice));
        rest = after;
    }
    if rest.is_empty() {
        Ok(coded)
    } else {
        Err(bad("bytes are left over"))
    }
}

/// Seven bits a byte, lowest first.
fn put_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take_number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    // Eight bytes hold the size of any object.
    for shift in (0..56).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// Runs `work` on every job, on this thread and others. Returns the jobs in order, or the first error.
fn in_parallel<J: Send>(
    jobs: VecDeque<J>,
    threads: NonZeroUsize,
    work: impl Fn(&mut J) -> Result<(), DeltaError> + Sync,
) -> Result<Vec<J>, DeltaError> {
    let helpers = (threads.get() - 1).min(jobs.len().saturating_sub(1));
    let total = jobs.len();
    let waiting = Mutex::new(jobs.into_iter().enumerate());
    let next = || {
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.next()
    };
    let run = || {
        let mut done = Vec::new();
        while let Some((index, mut job)) = next() {
            work(&mut job)?;
            done.push((index, job));
        }
        Ok::<_, DeltaError>(done)
    };
    let mut done = std::thread::scope(|scope| {
        let helpers: Vec<_> = (0..helpers).map(|_| scope.spawn(run)).collect();
        let mut done = run()?;
        for helper in helpers {
            match helper.join() {
                Ok(others) => done.extend(others?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok::<_, DeltaError>(done)
    })?;
    debug_assert_eq!(done.len(), total, "every job was done");
    done.sort_by_key(|(index, _)| *index);
    Ok(done.into_iter().map(|(_, job)| job).collect())
}

#[cfg(test)]
mod tests;
