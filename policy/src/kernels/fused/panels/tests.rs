use std::num::NonZeroUsize;

use proptest::prelude::*;

use half::bf16;

use super::*;
use crate::kernels::matmul::{Matrix, multiply};
use crate::weights::{Storage, StoredTensor};

/// Whole numbers, so that every sum is exact and every order of it gives the same.
fn whole(len: usize, step: usize, modulus: usize) -> Vec<f32> {
    let half = (modulus / 2) as f32;
    (0..len)
        .map(|i| (i * step % modulus) as f32 - half)
        .collect()
}

fn bytes(values: &[f32], storage: Storage) -> Vec<u8> {
    let narrow = |value: &f32| bf16::from_f32(*value).to_le_bytes().to_vec();
    let full = |value: &f32| value.to_le_bytes().to_vec();
    match storage {
        Storage::Bf16 => values.iter().flat_map(narrow).collect(),
        Storage::F32 => values.iter().flat_map(full).collect(),
    }
}

fn threads(count: usize) -> Threads {
    Threads::new(NonZeroUsize::new(count).unwrap())
}

fn kept(storage: Storage) -> Kept {
    match storage {
        Storage::Bf16 => Kept::Bf16,
        Storage::F32 => Kept::F32,
    }
}

proptest! {
    #[test]
    fn panels_agree_with_plain_products(
        rows in 0usize..40,
        outputs in 1usize..100,
        inputs in 1usize..90,
        cut in 0usize..100,
        narrow in any::<bool>(),
    ) {
        let storage = if narrow { Storage::Bf16 } else { Storage::F32 };
        let x = whole(rows * inputs, 7, 11);
        let w = whole(outputs * inputs, 5, 13);
        let mut plain = vec![0.0; rows * outputs];
        let transposed = Matrix::new(&w, outputs, inputs).transposed();
        multiply(&mut plain, Matrix::new(&x, rows, inputs), transposed, Onto::Nothing);
        let (above, below) = w.split_at(cut.min(outputs) * inputs);
        let (above, below) = (bytes(above, Storage::F32), bytes(below, storage));
        let parts = [
            StoredTensor { bytes: &above, format: Storage::F32.into() },
            StoredTensor { bytes: &below, format: storage.into() },
        ];
        let panels = Panels::new(&parts, inputs, kept(storage), &threads(2));
        let mut out = vec![3.0; rows * outputs];
        panels.multiply(&mut out, &x, Onto::Nothing, &threads(1));
        panels.multiply(&mut out, &x, Onto::Sum, &threads(3));
        for (out, plain) in out.iter().zip(&plain) {
            prop_assert_eq!(*out, 2.0 * plain);
        }
    }
}

/// Numbers whose sums are rounded.
fn fractions(len: usize) -> Vec<f32> {
    (0..len)
        .map(|i| ((i * 7919 % 1009) as f32 / 1009.0 - 0.5) * 0.1)
        .collect()
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_others_on_any_number_of_threads() {
    let (rows, outputs, inputs) = (45, 3 * WIDE + 5, 700);
    let (x, w) = (fractions(rows * inputs), fractions(outputs * inputs));
    for storage in [Storage::F32, Storage::Bf16] {
        let bytes = bytes(&w, storage);
        let parts = [StoredTensor {
            bytes: &bytes,
            format: storage.into(),
        }];
        let panels = Panels::new(&parts, inputs, kept(storage), &threads(1));
        let mut alone = vec![0.0; rows * outputs];
        for (out, x) in alone.chunks_exact_mut(outputs).zip(x.chunks_exact(inputs)) {
            panels.multiply(out, x, Onto::Nothing, &threads(1));
        }
        for count in [1, 2, 5] {
            let mut together = vec![0.0; rows * outputs];
            panels.multiply(&mut together, &x, Onto::Nothing, &threads(count));
            assert_eq!(together, alone, "{storage:?}, {count} threads");
        }
    }
}

#[test]
fn narrow_panels_give_the_bits_of_full_panels_with_the_same_weights() {
    let (outputs, inputs) = (70, 96);
    let stored = bytes(&fractions(outputs * inputs), Storage::Bf16);
    let parts = [StoredTensor {
        bytes: &stored,
        format: Storage::Bf16.into(),
    }];
    for rows in [1, 2, 4, 8, 40] {
        let x = fractions(rows * inputs);
        let products = [Kept::F32, Kept::Bf16].map(|kept| {
            let mut out = vec![0.0; rows * outputs];
            let panels = Panels::new(&parts, inputs, kept, &threads(1));
            panels.multiply(&mut out, &x, Onto::Nothing, &threads(2));
            out
        });
        assert_eq!(products[0], products[1]);
    }
}

#[test]
fn both_widths_of_panels_agree() {
    let (rows, outputs, inputs) = (21, 50, 130);
    let (x, w) = (whole(rows * inputs, 7, 11), whole(outputs * inputs, 5, 13));
    let bytes = bytes(&w, Storage::Bf16);
    let parts = [StoredTensor {
        bytes: &bytes,
        format: Storage::Bf16.into(),
    }];
    let stored = Rows::new(&parts, inputs);
    let one = Threads::one();
    let mut forms = vec![
        Lanes::FullNarrow(pack(&stored, &one)),
        Lanes::HalfNarrow(pack(&stored, &one)),
    ];
    if width() == Width::Avx512 {
        forms.push(Lanes::FullWide(pack(&stored, &one)));
        forms.push(Lanes::HalfWide(pack(&stored, &one)));
    }
    let products = forms.into_iter().map(|lanes| {
        let panels = Panels {
            lanes,
            inputs,
            outputs,
        };
        // The last rows alone as well, which are too few to be widened first.
        let mut out = vec![0.0; (rows + 15) * outputs];
        let (all, few) = out.split_at_mut(rows * outputs);
        panels.multiply(all, &x, Onto::Nothing, &one);
        panels.multiply(few, &x[6 * inputs..], Onto::Nothing, &one);
        out
    });
    let products: Vec<Vec<f32>> = products.collect();
    assert!(products.iter().all(|product| *product == products[0]));
}

#[test]
fn eight_bits_are_off_by_half_a_step_of_the_largest_neighbour_at_most() {
    // Not a multiple of the inputs that share a scale, and one column of zeros.
    let (outputs, inputs) = (37, TOGETHER + 9);
    let mut w = fractions(outputs * inputs);
    w[5 * inputs..6 * inputs].fill(0.0);
    let bytes = bytes(&w, Storage::F32);
    let parts = [StoredTensor {
        bytes: &bytes,
        format: Storage::F32.into(),
    }];
    let panels = Panels::new(&parts, inputs, Kept::Int8, &threads(2));
    let mut x = vec![0.0; inputs * inputs];
    for input in 0..inputs {
        x[input * inputs + input] = 1.0;
    }
    let mut out = vec![0.0; inputs * outputs];
    panels.multiply(&mut out, &x, Onto::Nothing, &threads(2));
    for output in 0..outputs {
        let row = &w[output * inputs..(output + 1) * inputs];
        for (input, &weight) in row.iter().enumerate() {
            let from = input / TOGETHER * TOGETHER;
            let neighbours = &row[from..(from + TOGETHER).min(inputs)];
            let largest = neighbours.iter().fold(0.0f32, |most, w| most.max(w.abs()));
            let error = (out[input * outputs + output] - weight).abs();
            assert!(error <= largest / 127.0 * 0.501, "{error} of {weight}");
        }
    }
}

#[test]
fn eight_bits_give_a_row_the_same_bits_alone_and_among_others() {
    let (rows, outputs, inputs) = (19, 70, 130);
    let (x, stored) = (
        fractions(rows * inputs),
        bytes(&fractions(outputs * inputs), Storage::Bf16),
    );
    let parts = [StoredTensor {
        bytes: &stored,
        format: Storage::Bf16.into(),
    }];
    let panels = Panels::new(&parts, inputs, Kept::Int8, &threads(1));
    let (mut alone, mut together) = (vec![0.0; rows * outputs], vec![0.0; rows * outputs]);
    for (out, x) in alone.chunks_exact_mut(outputs).zip(x.chunks_exact(inputs)) {
        panels.multiply(out, x, Onto::Nothing, &threads(1));
    }
    panels.multiply(&mut together, &x, Onto::Nothing, &threads(3));
    assert_eq!(together, alone);
}
