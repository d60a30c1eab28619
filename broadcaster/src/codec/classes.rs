//! Chooses the classes of weights by how likely they change. A weight's class follows from the exponent of the parent: an
//! optimizer step is below half a unit in the last place of a large weight and many units of a small one.
//!
//! Neighbouring exponents share a class at both ends of the range, where weights are few or change alike. The choice compares
//! the entropy that a merger costs with what the tables of a class cost.

use super::block::{BLOCK_BYTES, CLASSES_MAX, Classes, changed, ones, weights};

/// Blocks sampled to choose the classes: 65,536 weights tell the rates of change well enough, in little time.
const SAMPLED_BLOCKS: usize = 1_024;
/// About how many bits the tables of one more class cost.
const CLASS_BITS: f64 = 200.0;

/// Chooses the classes for a slice's blocks.
pub(super) fn choose(
    parent: &[[u8; BLOCK_BYTES]],
    child: &[[u8; BLOCK_BYTES]],
    shift: u32,
) -> Classes {
    let stride = parent.len().div_ceil(SAMPLED_BLOCKS).max(1);
    let (mut weights_seen, mut changes_seen) = ([0u32; 256], [0u32; 256]);
    for (parent, child) in parent.iter().zip(child).step_by(stride) {
        let exponents = weights(parent).map(|weight| ((weight & 0x7fff) >> shift) as u8);
        for exponent in exponents {
            weights_seen[usize::from(exponent)] += 1;
        }
        for i in ones(changed(parent, child)) {
            changes_seen[usize::from(exponents[i])] += 1;
        }
    }
    let tallies = std::array::from_fn(|exponent| Tally {
        weights: f64::from(weights_seen[exponent]),
        changed: f64::from(changes_seen[exponent]),
    });
    let (low, high) = merge(&tallies, CLASS_BITS / stride as f64);
    Classes { shift, low, high }
}

#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    weights: f64,
    changed: f64,
}

impl Tally {
    /// Entropy in bits of which of the weights changed.
    fn bits(&self) -> f64 {
        let part = |n: f64| {
            if n > 0.0 {
                n * (self.weights / n).log2()
            } else {
                0.0
            }
        };
        part(self.changed) + part(self.weights - self.changed)
    }

    fn with(&self, other: &Self) -> Self {
        Self {
            weights: self.weights + other.weights,
            changed: self.changed + other.changed,
        }
    }
}

/// Merges the cheaper of the two ends until there are few enough classes and each is worth its tables. Returns the exponents of
/// the first and the last class.
fn merge(tallies: &[Tally; 256], class_bits: f64) -> (u8, u8) {
    let is_seen = |tally: &Tally| tally.weights > 0.0;
    let mut low = tallies.iter().position(is_seen).unwrap_or(0);
    let mut high = tallies.iter().rposition(is_seen).unwrap_or(0);
    let (mut lowest, mut highest) = (tallies[low], tallies[high]);
    while low < high {
        if high - low == 1 {
            let cost = lowest.with(&highest).bits() - lowest.bits() - highest.bits();
            if cost < class_bits {
                high = low;
            }
            break;
        }
        let (up, down) = (tallies[low + 1], tallies[high - 1]);
        let cost_low = lowest.with(&up).bits() - lowest.bits() - up.bits();
        let cost_high = highest.with(&down).bits() - highest.bits() - down.bits();
        if high - low < CLASSES_MAX && cost_low.min(cost_high) >= class_bits {
            break;
        }
        if cost_low <= cost_high {
            (low, lowest) = (low + 1, lowest.with(&up));
        } else {
            (high, highest) = (high - 1, highest.with(&down));
        }
    }
    debug_assert!(high - low < CLASSES_MAX, "at most CLASSES_MAX classes");
    (low as u8, high as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponents_that_change_alike_share_a_class_and_others_do_not() {
        let mut tallies = [Tally::default(); 256];
        for (exponent, (weights, changed)) in [
            (100, (50.0, 25.0)),
            (101, (60.0, 31.0)),
            (110, (1e5, 4e4)),
            (111, (2e5, 4e4)),
            (112, (4e5, 4e4)),
            (113, (100.0, 10.0)),
            (140, (3.0, 0.0)),
        ] {
            tallies[exponent] = Tally { weights, changed };
        }
        assert_eq!(merge(&tallies, CLASS_BITS), (110, 112));
        assert_eq!(merge(&[Tally::default(); 256], CLASS_BITS), (0, 0));
    }

    #[test]
    fn there_are_never_more_classes_than_allowed() {
        let mut tallies = [Tally::default(); 256];
        for (exponent, tally) in tallies.iter_mut().enumerate() {
            tally.weights = 1e6;
            tally.changed = if exponent % 2 == 0 { 1e3 } else { 5e5 };
        }
        let (low, high) = merge(&tallies, CLASS_BITS);
        assert_eq!(usize::from(high - low) + 1, CLASSES_MAX);
    }
}
