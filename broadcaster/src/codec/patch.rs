//! Codes which 16-bit weights of a slice changed, and by how many units in the last place.
//!
//! The decoder has the parent, so it can infer from a weight's exponent how likely the weight changes. Weights are sorted into
//! classes by exponent ([`super::classes`]). A change is coded as a gap (the number of weights of its class since the class's last
//! change) and a step (the distance of the two weights in the order of their values). Gap and step are tokens, with tables for
//! each class. The order of values is a bijection of all 65,536 bit patterns (−0 lies beside +0, NaNs beyond the infinities), so a
//! step is exact for any bits. Symbols come in the order in which the decoder needs them: by blocks of 64 weights, and in a block by
//! class. After its last change, a class has the gap "no more".

use super::SLICE_ELEMENTS;
use super::SliceError;
use super::bits::{BitReader, BitWriter};
use super::block::{
    BLOCK, BLOCK_BYTES, CLASSES_MAX, Classes, ClassesOf, changed, classes_of, counts, mask, ones,
    rank, weight_of,
};
use super::classes::choose;
use super::rans::{Decoder, Encoder, Lookup, Table};
use super::token::{TOKENS, base, split};
use super::wide::{Loop, widest};

/// The coded gap "no more": the class has no further change. A gap of n weights is coded as n + 1.
const NO_MORE: u32 = 0;
/// A gap longer than any slice.
const NEVER: u32 = 1 << 30;
/// Largest coded step. A step is coded in zigzag order, less one since it is never 0.
const STEP_MAX: u32 = u16::MAX as u32 - 1;

/// The layout of a 16-bit float.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float {
    /// 8 bits of exponent, 7 of mantissa.
    Bf16,
    /// 5 bits of exponent, 10 of mantissa.
    F16,
}

impl Float {
    fn shift(self) -> u32 {
        match self {
            Self::Bf16 => 7,
            Self::F16 => 10,
        }
    }
}

/// A coded slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patch {
    pub bytes: Vec<u8>,
    /// Number of weights that changed.
    pub changed: u64,
}

/// Codes the change from `parent` to `child`, both of the same number of 16-bit floats, at most [`SLICE_ELEMENTS`]. `None` for other
/// lengths.
pub fn encode(parent: &[u8], child: &[u8], float: Float) -> Option<Patch> {
    if parent.len() != child.len()
        || !parent.len().is_multiple_of(2)
        || parent.len() > 2 * SLICE_ELEMENTS
    {
        return None;
    }
    let (parent, parent_tail) = parent.as_chunks::<BLOCK_BYTES>();
    let (child, child_tail) = child.as_chunks::<BLOCK_BYTES>();
    let tails = [padded(parent_tail), padded(child_tail)];
    let classes = if parent.is_empty() {
        choose(&tails[..1], &tails[1..], float.shift())
    } else {
        choose(parent, child, float.shift())
    };
    let mut scan = Scan::new(classes);
    widest(ScanBlocks {
        scan: &mut scan,
        parent,
        child,
    });
    if !parent_tail.is_empty() {
        scan.block(&tails[0], &tails[1]);
    }
    Some(scan.finish())
}

struct ScanBlocks<'a> {
    scan: &'a mut Scan,
    parent: &'a [[u8; BLOCK_BYTES]],
    child: &'a [[u8; BLOCK_BYTES]],
}

impl Loop for ScanBlocks<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (parent, child) in self.parent.iter().zip(self.child) {
            self.scan.block(parent, child);
        }
    }
}

/// Copies `parent` to `child` and applies a patch in the same pass. Both have the same even length.
///
/// # Errors
/// When the patch is damaged, or made for a slice of another length. The content of `child` is then undefined.
pub fn apply(
    patch: &[u8],
    parent: &[u8],
    child: &mut [u8],
    float: Float,
) -> Result<(), SliceError> {
    if parent.len() != child.len()
        || !parent.len().is_multiple_of(2)
        || parent.len() > 2 * SLICE_ELEMENTS
    {
        return Err(SliceError::Beyond);
    }
    let mut applier = Applier::new(patch, float)?;
    let (parent, parent_tail) = parent.as_chunks::<BLOCK_BYTES>();
    let (child, child_tail) = child.as_chunks_mut::<BLOCK_BYTES>();
    widest(ApplyBlocks {
        applier: &mut applier,
        parent,
        child,
    })?;
    if !parent_tail.is_empty() {
        let mut last = [0; BLOCK_BYTES];
        applier.block(&padded(parent_tail), &mut last, parent_tail.len() / 2)?;
        child_tail.copy_from_slice(&last[..parent_tail.len()]);
    }
    applier.finish()
}

struct ApplyBlocks<'a, 'b> {
    applier: &'a mut Applier<'b>,
    parent: &'a [[u8; BLOCK_BYTES]],
    child: &'a mut [[u8; BLOCK_BYTES]],
}

impl Loop for ApplyBlocks<'_, '_> {
    type Output = Result<(), SliceError>;

    #[inline(always)]
    fn run(self) -> Self::Output {
        for (parent, child) in self.parent.iter().zip(self.child) {
            self.applier.block(parent, child, BLOCK)?;
        }
        Ok(())
    }
}

/// The slice's last weights, padded to a block with zeros that never change.
fn padded(tail: &[u8]) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    block[..tail.len()].copy_from_slice(tail);
    block
}

/// A 16-bit float's place in the order of values. A bijection; [`weight_at`] is its inverse.
#[inline(always)]
fn place(weight: u16) -> u16 {
    if weight & 0x8000 != 0 {
        !weight
    } else {
        weight | 0x8000
    }
}

#[inline(always)]
fn weight_at(place: u16) -> u16 {
    if place & 0x8000 != 0 {
        place & 0x7fff
    } else {
        !place
    }
}

/// The coded step between two different weights: zigzag, less one.
#[inline(always)]
fn step_between(parent: u16, child: u16) -> u32 {
    let step = place(child).wrapping_sub(place(parent)) as i16;
    u32::from(((step << 1) ^ (step >> 15)) as u16) - 1
}

/// The weight at a coded step from `parent`, or `None` if the step is too large.
#[inline(always)]
fn stepped(parent: u16, step: u32) -> Option<u16> {
    if step > STEP_MAX {
        return None;
    }
    let zigzag = (step + 1) as u16;
    let step = (zigzag >> 1) ^ (zigzag & 1).wrapping_neg();
    Some(weight_at(place(parent).wrapping_add(step)))
}

/// A change's class, gap and step, in one word since there may be millions.
#[derive(Debug, Clone, Copy)]
struct Change(u64);

impl Change {
    fn new(class: u8, gap: u32, step: u32) -> Self {
        debug_assert!(step <= STEP_MAX, "a step between two 16-bit weights");
        Self(u64::from(class) << 56 | u64::from(gap) << 24 | u64::from(step))
    }

    fn class(self) -> usize {
        (self.0 >> 56) as usize
    }

    fn gap(self) -> u32 {
        (self.0 >> 24) as u32
    }

    fn step(self) -> u32 {
        self.0 as u32 & 0xff_ffff
    }
}

/// The encoder's first pass: finds the changes and counts tokens.
struct Scan {
    classes: Classes,
    /// Number of weights of each class since its last change.
    passed: [u32; CLASSES_MAX],
    changes: Vec<Change>,
    gaps: [[u32; TOKENS]; CLASSES_MAX],
    steps: [[u32; TOKENS]; CLASSES_MAX],
}

impl Scan {
    fn new(classes: Classes) -> Self {
        Self {
            classes,
            passed: [0; CLASSES_MAX],
            changes: Vec::new(),
            gaps: [[0; TOKENS]; CLASSES_MAX],
            steps: [[0; TOKENS]; CLASSES_MAX],
        }
    }

    #[inline(always)]
    fn block(&mut self, parent: &[u8; BLOCK_BYTES], child: &[u8; BLOCK_BYTES]) {
        let of = classes_of(parent, &self.classes);
        let counts = counts(&of, self.classes.len());
        let differs = changed(parent, child);
        if differs != 0 {
            self.changes_of(parent, child, &of, differs);
        }
        for (passed, count) in self.passed.iter_mut().zip(&counts) {
            *passed = passed.wrapping_add(u32::from(*count));
        }
    }

    /// Records a block's changes, by class. Meanwhile `passed` counts from the start of the block: after a change it is below zero
    /// until the block's weights are added.
    #[inline(always)]
    fn changes_of(
        &mut self,
        parent: &[u8; BLOCK_BYTES],
        child: &[u8; BLOCK_BYTES],
        of: &ClassesOf,
        differs: u64,
    ) {
        let mut in_class = [0u64; CLASSES_MAX];
        let mut touched = 0u32;
        for i in ones(differs) {
            let class = usize::from(of[i]) % CLASSES_MAX;
            in_class[class] |= 1 << i;
            touched |= 1 << class;
        }
        for class in ones(u64::from(touched)) {
            let class = class % CLASSES_MAX;
            for i in ones(in_class[class]) {
                let rank = rank(of, i);
                let gap = self.passed[class].wrapping_add(rank);
                self.passed[class] = 0u32.wrapping_sub(rank + 1);
                let step = step_between(weight_of(parent, i), weight_of(child, i));
                self.change(class as u8, gap, step);
            }
        }
    }

    #[inline(always)]
    fn change(&mut self, class: u8, gap: u32, step: u32) {
        let index = usize::from(class);
        self.gaps[index][split(gap + 1).0] += 1;
        self.steps[index][split(step).0] += 1;
        self.changes.push(Change::new(class, gap, step));
    }

    /// The second pass: codes the changes, last first.
    fn finish(mut self) -> Patch {
        let classes = self.classes.len();
        let mut bits = BitWriter::default();
        bits.put(u32::from(self.classes.low), 8);
        bits.put(u32::from(self.classes.high), 8);
        for (gaps, steps) in self.gaps.iter_mut().zip(&self.steps).take(classes) {
            if gaps.iter().any(|count| *count > 0) {
                gaps[NO_MORE as usize] += 1;
            }
            Table::write(gaps, &mut bits);
            Table::write(steps, &mut bits);
        }
        let gaps = self.gaps.map(|counts| Table::of_counts(&counts));
        let steps = self.steps.map(|counts| Table::of_counts(&counts));
        let mut coder = Encoder::new();
        // For each class, the coded gap after the change at hand.
        let mut next = [NO_MORE; CLASSES_MAX];
        for change in self.changes.iter().rev() {
            let class = change.class();
            put(&mut coder, &gaps[class], next[class]);
            put(&mut coder, &steps[class], change.step());
            next[class] = change.gap() + 1;
        }
        for class in (0..classes).rev().filter(|class| !gaps[*class].is_empty()) {
            put(&mut coder, &gaps[class], next[class]);
        }
        let mut bytes = bits.finish();
        coder.finish(&mut bytes);
        Patch {
            bytes,
            changed: self.changes.len() as u64,
        }
    }
}

#[inline(always)]
fn put(coder: &mut Encoder, table: &Table, value: u32) {
    let (token, raw, raw_bits) = split(value);
    coder.put_raw(raw, raw_bits);
    coder.put(table, token);
}

/// The decoder: copies the parent's blocks and applies the patch's changes.
struct Applier<'a> {
    classes: Classes,
    gaps: Vec<Lookup>,
    steps: Vec<Lookup>,
    /// Number of weights of each class before its next change.
    until: [u32; CLASSES_MAX],
    coder: Decoder<'a>,
}

impl<'a> Applier<'a> {
    fn new(patch: &'a [u8], float: Float) -> Result<Self, SliceError> {
        let mut bits = BitReader::new(patch);
        let (low, high) = (bits.get(8)? as u8, bits.get(8)? as u8);
        if low > high || usize::from(high - low) >= CLASSES_MAX {
            return Err(SliceError::Table);
        }
        let classes = Classes {
            shift: float.shift(),
            low,
            high,
        };
        let (mut gaps, mut steps) = (Vec::new(), Vec::new());
        for _ in 0..classes.len() {
            gaps.push(Lookup::new(Table::read(&mut bits)?));
            steps.push(Lookup::new(Table::read(&mut bits)?));
        }
        let mut applier = Self {
            classes,
            gaps,
            steps,
            until: [NEVER; CLASSES_MAX],
            coder: Decoder::new(bits.rest()?)?,
        };
        for class in 0..applier.classes.len() {
            if !applier.gaps[class].is_empty() {
                applier.until[class] = applier.gap(class);
            }
        }
        Ok(applier)
    }

    #[inline(always)]
    fn gap(&mut self, class: usize) -> u32 {
        match get(&mut self.coder, &self.gaps[class]) {
            NO_MORE => NEVER,
            gap => gap - 1,
        }
    }

    /// Decodes a block, of which only the first `length` weights exist.
    #[inline(always)]
    fn block(
        &mut self,
        parent: &[u8; BLOCK_BYTES],
        child: &mut [u8; BLOCK_BYTES],
        length: usize,
    ) -> Result<(), SliceError> {
        *child = *parent;
        let of = classes_of(parent, &self.classes);
        let counts = counts(&of, self.classes.len());
        let mut due = false;
        for (until, count) in self.until.iter().zip(&counts) {
            due |= *until < u32::from(*count);
        }
        if due {
            return self.changes_of(child, &of, &counts, length);
        }
        for (until, count) in self.until.iter_mut().zip(&counts) {
            *until -= u32::from(*count);
        }
        Ok(())
    }

    #[inline(always)]
    fn changes_of(
        &mut self,
        child: &mut [u8; BLOCK_BYTES],
        of: &ClassesOf,
        counts: &[u8; CLASSES_MAX],
        length: usize,
    ) -> Result<(), SliceError> {
        for (class, count) in counts.iter().enumerate().take(self.classes.len()) {
            let count = u32::from(*count);
            if self.until[class] >= count {
                self.until[class] -= count;
                continue;
            }
            let mut members = mask(of, class as u8);
            let mut left = count;
            while self.until[class] < left {
                for _ in 0..self.until[class] {
                    members &= members - 1;
                }
                left -= self.until[class] + 1;
                let i = members.trailing_zeros() as usize % BLOCK;
                members &= members - 1;
                if i >= length {
                    return Err(SliceError::Beyond);
                }
                self.change(child, class, i)?;
                self.until[class] = self.gap(class);
            }
            self.until[class] -= left;
        }
        Ok(())
    }

    #[inline(always)]
    fn change(
        &mut self,
        child: &mut [u8; BLOCK_BYTES],
        class: usize,
        i: usize,
    ) -> Result<(), SliceError> {
        let step = get(&mut self.coder, &self.steps[class]);
        let at = [child[2 * i], child[2 * i + 1]];
        let weight = stepped(u16::from_le_bytes(at), step).ok_or(SliceError::Step)?;
        child[2 * i..2 * i + 2].copy_from_slice(&weight.to_le_bytes());
        Ok(())
    }

    fn finish(self) -> Result<(), SliceError> {
        // A slice is shorter than half of NEVER, so a class without further changes still counts more than that.
        if self.until.iter().any(|until| *until < NEVER / 2) {
            return Err(SliceError::Beyond);
        }
        self.coder.finish()
    }
}

#[inline(always)]
fn get(coder: &mut Decoder, lookup: &Lookup) -> u32 {
    let (base, raw_bits) = base(coder.get(lookup));
    base + coder.get_raw(raw_bits)
}

#[cfg(test)]
mod tests;
