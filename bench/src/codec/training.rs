//! Versions to measure a codec on, without a model: weights N(0, 0.02²) that start on the bf16 grid, a float32 master, Adam
//! (0.9, 0.999) and Gaussian gradients, each following its own autocorrelation. Weights do not influence one another, so a
//! tensor is made through all its steps before the next one is begun.

use std::thread;

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand_distr::{Distribution as _, StandardNormal};

/// Weights of a tensor.
pub(super) const TENSOR_WEIGHTS: usize = 4 << 20;
/// Weights of a row, as in a model of a few billion.
const COLUMNS: usize = 4_096;
/// Standard deviation of a weight.
const DEVIATION: f32 = 0.02;
/// Size of a gradient; Adam divides it out.
const GRADIENT: f32 = 1e-4;

/// How the weights are trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Training {
    /// Learning rate.
    pub(super) lr: f32,
    /// Autocorrelation of gradients from step to step.
    pub(super) autocorrelation: f32,
}

/// A version and the one before it, as safetensors files of bf16.
#[derive(Debug, Clone, Default)]
pub(super) struct Pair {
    /// The version after this many steps.
    pub(super) step: u32,
    pub(super) parent: Vec<u8>,
    pub(super) child: Vec<u8>,
}

/// The pairs that end at `steps` (ascending), of `tensors` tensors, made on `threads` threads.
pub(super) fn pairs(
    training: Training,
    tensors: usize,
    steps: &[u32],
    threads: usize,
) -> Vec<Pair> {
    let mut file = header(tensors);
    let start = file.len();
    file.resize(start + tensors * TENSOR_WEIGHTS * 2, 0);
    let mut pairs: Vec<Pair> = steps
        .iter()
        .map(|step| Pair {
            step: *step,
            parent: file.clone(),
            child: file.clone(),
        })
        .collect();
    // Of every tensor, the places in all pairs that it is written to.
    let mut places: Vec<Vec<Place<'_>>> = (0..tensors).map(|_| Vec::new()).collect();
    for pair in &mut pairs {
        let parents = pair.parent[start..].chunks_mut(TENSOR_WEIGHTS * 2);
        let children = pair.child[start..].chunks_mut(TENSOR_WEIGHTS * 2);
        for (places, (parent, child)) in places.iter_mut().zip(parents.zip(children)) {
            places.push(Place {
                step: pair.step,
                parent,
                child,
            });
        }
    }
    let share = tensors.div_ceil(threads.max(1)).max(1);
    thread::scope(|scope| {
        for (part, places) in places.chunks_mut(share).enumerate() {
            scope.spawn(move || {
                for (i, places) in places.iter_mut().enumerate() {
                    train(training, (part * share + i) as u64, places);
                }
            });
        }
    });
    pairs
}

/// A safetensors file up to its first weight.
fn header(tensors: usize) -> Vec<u8> {
    let entry = |i: usize| {
        let bytes = TENSOR_WEIGHTS * 2;
        let shape = [TENSOR_WEIGHTS / COLUMNS, COLUMNS];
        let offsets = [i * bytes, (i + 1) * bytes];
        let entry = serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": offsets});
        (format!("layers.{i}.weight"), entry)
    };
    let entries: serde_json::Map<_, _> = (0..tensors).map(entry).collect();
    let json = serde_json::Value::Object(entries).to_string();
    [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat()
}

struct Place<'a> {
    step: u32,
    parent: &'a mut [u8],
    child: &'a mut [u8],
}

/// Trains one tensor, in pieces that fit the processor's cache.
fn train(training: Training, seed: u64, places: &mut [Place<'_>]) {
    const PIECE: usize = 1 << 14;
    let mut rng = StdRng::seed_from_u64(seed);
    let last = places.last().map_or(0, |place| place.step);
    for start in (0..TENSOR_WEIGHTS).step_by(PIECE) {
        let range = 2 * start..2 * (start + PIECE);
        let mut weights = Weights::new(PIECE, &mut rng);
        for step in 1..=last {
            for place in places.iter_mut().filter(|place| place.step == step) {
                weights.write(&mut place.parent[range.clone()]);
            }
            weights.step(training, step as i32, &mut rng);
            for place in places.iter_mut().filter(|place| place.step == step) {
                weights.write(&mut place.child[range.clone()]);
            }
        }
    }
}

struct Weights {
    master: Vec<f32>,
    momentum: Vec<f32>,
    variance: Vec<f32>,
    direction: Vec<f32>,
}

impl Weights {
    fn new(n: usize, rng: &mut StdRng) -> Self {
        let mut normal = || -> f32 { StandardNormal.sample(rng) };
        let on_grid = |weight: f32| f32::from_bits(u32::from(bf16(weight)) << 16);
        Self {
            master: (0..n).map(|_| on_grid(DEVIATION * normal())).collect(),
            direction: (0..n).map(|_| normal()).collect(),
            momentum: vec![0.0; n],
            variance: vec![0.0; n],
        }
    }

    fn step(&mut self, training: Training, step: i32, rng: &mut StdRng) {
        let (beta1, beta2, epsilon) = (0.9f32, 0.999f32, 1e-8f32);
        let (bias1, bias2) = (1.0 - beta1.powi(step), 1.0 - beta2.powi(step));
        let rho = training.autocorrelation;
        let fresh = (1.0 - rho * rho).sqrt();
        for i in 0..self.master.len() {
            let noise: f32 = StandardNormal.sample(rng);
            self.direction[i] = rho * self.direction[i] + fresh * noise;
            let gradient = GRADIENT * self.direction[i];
            self.momentum[i] = beta1 * self.momentum[i] + (1.0 - beta1) * gradient;
            self.variance[i] = beta2 * self.variance[i] + (1.0 - beta2) * gradient * gradient;
            let scale = (self.variance[i] / bias2).sqrt() + epsilon;
            self.master[i] -= training.lr * (self.momentum[i] / bias1) / scale;
        }
    }

    fn write(&self, bytes: &mut [u8]) {
        for (pair, weight) in bytes.chunks_exact_mut(2).zip(&self.master) {
            pair.copy_from_slice(&bf16(*weight).to_le_bytes());
        }
    }
}

/// Rounded to the nearest, ties to the even one.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}
