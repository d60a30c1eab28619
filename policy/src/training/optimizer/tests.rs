use std::num::NonZeroUsize;

use candle_core::Device;

use super::*;
use crate::kernels::KernelSet;
use crate::policy::Policy;
use crate::testing::{texts, tiny, untied};
use crate::training::pass::TrainRow;
use crate::training::supervised::supervised;

fn gradients(master: &Master, seed: u64) -> Gradients {
    let config = master.config();
    let image = master.image(Storage::F32).unwrap();
    let policy = Policy::from_image(config, &image, KernelSet::Fused, &Device::Cpu).unwrap();
    let rows: Vec<TrainRow> = texts(config, seed, &[9, 14])
        .iter()
        .map(|text| TrainRow {
            tokens: text.to_vec(),
            targets: std::iter::once(1..text.len()).collect(),
        })
        .collect();
    supervised(&policy, &rows, NonZeroUsize::MIN)
        .unwrap()
        .pass
        .gradients
}

/// All reached, with the given value everywhere.
fn constant(master: &Master, value: f32) -> Gradients {
    let mut gradients = Gradients::zeros(master.layout());
    for block in master.layout().blocks() {
        gradients.block_mut(block).fill(value);
    }
    gradients
}

#[test]
fn fresh_weights_depend_on_the_seed_only() {
    let config = untied();
    let master = Master::init(&config, 3).unwrap();
    assert_eq!(master, Master::init(&config, 3).unwrap());
    assert_ne!(master.values(), Master::init(&config, 4).unwrap().values());
    for parameter in master.layout().parameters() {
        let values = &master.values()[parameter.range()];
        let std = (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt();
        let expected = match &parameter.shape[..] {
            [_, _] if parameter.name.contains("embed") => 0.05,
            [_, inputs] => 0.7 / (*inputs as f32).sqrt(),
            _ if parameter.name.contains("bias") => 0.0,
            _ => 1.0,
        };
        assert!(
            (std / expected - 1.0).abs() < 0.15 || std == expected,
            "{}",
            parameter.name
        );
    }
}

#[test]
fn two_updates_are_those_computed_by_hand() {
    let mut master = Master::init(&tiny(), 1).unwrap();
    let settings = AdamW {
        learning_rate: 0.01,
        weight_decay: 0.1,
        gradient_norm_max: 1e9,
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
    };
    let matrix = master.layout().parameters()[0].range().start;
    let norm = master.layout().norm.offset;
    let start = (
        f64::from(master.values()[matrix]),
        f64::from(master.values()[norm]),
    );
    let mut expected = start;
    let (mut m, mut v) = (0.0, 0.0);
    for (t, g) in [(1, 0.5f64), (2, -0.2)] {
        let gradients = constant(&master, g as f32);
        let update = master.step(&gradients, &settings).unwrap();
        let all = (master.layout().len() as f64).sqrt() * g.abs();
        assert!((f64::from(update.gradient_norm) / all - 1.0).abs() < 1e-5);
        assert_eq!(update.updates, t as u64);
        m = 0.9 * m + 0.1 * g;
        v = 0.99 * v + 0.01 * g * g;
        let step = m / (1.0 - 0.9f64.powi(t)) / ((v / (1.0 - 0.99f64.powi(t))).sqrt() + 1e-8);
        expected.0 -= 0.01 * (step + 0.1 * expected.0);
        expected.1 -= 0.01 * step;
    }
    assert!((f64::from(master.values()[matrix]) - expected.0).abs() < 1e-6);
    assert!((f64::from(master.values()[norm]) - expected.1).abs() < 1e-6);
}

#[test]
fn long_gradients_are_scaled_to_the_largest_norm() {
    let settings = AdamW {
        gradient_norm_max: 0.5,
        ..AdamW::default()
    };
    let mut clipped = Master::init(&tiny(), 1).unwrap();
    let mut scaled = clipped.clone();
    let long = constant(&clipped, 1.0);
    let norm = (clipped.layout().len() as f32).sqrt();
    assert!((clipped.step(&long, &settings).unwrap().gradient_norm / norm - 1.0).abs() < 1e-5);
    let short = constant(&scaled, 0.5 / norm);
    scaled.step(&short, &settings).unwrap();
    let pairs = clipped.values().iter().zip(scaled.values());
    assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-7));
}

#[test]
fn a_gradient_that_is_missing_or_not_finite_is_refused_by_name_and_changes_nothing() {
    let mut master = Master::init(&tiny(), 1).unwrap();
    let before = master.clone();
    let mut missing = Gradients::zeros(master.layout());
    for block in &master.layout().clone().blocks()[1..] {
        missing.block_mut(block).fill(1.0);
    }
    let error = master
        .step(&missing, &AdamW::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("model.embed_tokens.weight"), "{error}");
    for bad in [f32::NAN, f32::INFINITY] {
        let mut gradients = constant(&master, 1.0);
        let up = master
            .layout()
            .parameters()
            .iter()
            .find(|p| p.name.ends_with("up_proj.weight"));
        gradients.values_mut()[up.unwrap().offset + 3] = bad;
        let error = master.step(&gradients, &AdamW::default()).unwrap_err();
        let named = matches!(&error, OptimizerError::NotFinite { parameter, element: 3 }
            if parameter.ends_with("up_proj.weight"));
        assert!(named, "{error}");
    }
    let other = constant(&Master::init(&untied(), 1).unwrap(), 1.0);
    assert!(matches!(
        master.step(&other, &AdamW::default()),
        Err(OptimizerError::OtherModel { .. })
    ));
    assert_eq!(master, before);
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    type Breaks = fn(&mut AdamW);
    let breaks: [(Breaks, &str); 5] = [
        (|s| s.learning_rate = f32::NAN, "learning_rate"),
        (|s| s.beta1 = 1.0, "beta1"),
        (|s| s.epsilon = 0.0, "epsilon"),
        (|s| s.weight_decay = -0.1, "weight_decay"),
        (|s| s.gradient_norm_max = 0.0, "gradient_norm_max"),
    ];
    for (break_it, key) in breaks {
        let mut settings = AdamW::default();
        break_it(&mut settings);
        assert!(settings.validate().unwrap_err().to_string().contains(key));
    }
}

#[test]
fn a_saved_state_continues_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("optimizer.safetensors");
    let settings = AdamW {
        weight_decay: 0.01,
        ..AdamW::default()
    };
    let mut straight = Master::init(&tiny(), 1).unwrap();
    for seed in 0..3 {
        let gradients = gradients(&straight, seed);
        straight.step(&gradients, &settings).unwrap();
    }
    straight.save(&path).unwrap();
    let mut resumed = Master::load(&path).unwrap();
    assert_eq!(resumed, straight);
    let gradients = gradients(&straight, 9);
    straight.step(&gradients, &settings).unwrap();
    resumed.step(&gradients, &settings).unwrap();
    assert_eq!(resumed, straight);
}

#[test]
fn a_state_that_is_truncated_or_altered_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("optimizer.safetensors");
    Master::init(&tiny(), 1).unwrap().save(&path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() - 100] ^= 1;
    for bytes in [
        &whole[..whole.len() - 1],
        &whole[..whole.len() / 2],
        &whole[..9],
        &[],
        &flipped,
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = Master::load(&path).unwrap_err().to_string();
        assert!(
            error.contains("optimizer.safetensors") && error.contains("damaged"),
            "{error}"
        );
    }
    std::fs::remove_file(&path).unwrap();
    assert!(
        Master::load(&path)
            .unwrap_err()
            .to_string()
            .contains("missing")
    );
}
