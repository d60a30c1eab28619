//! Compares every family with Hugging Face transformers, by numbers from `tests/reference/families.py`.

use std::path::PathBuf;

use candle_core::Device;
use serde_json::Value;

use super::*;
use crate::config::{Architecture, Config};
use crate::kernels::candle::Candle;
use crate::kernels::fused::Fused;
use crate::kernels::{KernelSet, Text};
use crate::policy::{Policy, Prepared};
use crate::testing::BOTH;
use crate::weights::{Image, Storage};

/// A configuration and the logits of transformers.
struct Case {
    family: &'static str,
    name: String,
    config: Config,
    tokens: Vec<u32>,
    positions: Rc<[usize]>,
    /// `[positions, V]`
    logits: Vec<f32>,
}

fn numbers(family: &str) -> Vec<Value> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/families");
    let text = std::fs::read_to_string(folder.join(format!("{family}.json"))).unwrap();
    let mut file: Value = serde_json::from_str(&text).unwrap();
    serde_json::from_value(file["cases"].take()).unwrap()
}

fn cases() -> Vec<Case> {
    let of = |family: &'static str| {
        let cases = numbers(family).into_iter();
        cases.map(move |mut case| {
            let logits: Vec<Vec<f32>> = serde_json::from_value(case["logits"].take()).unwrap();
            let positions: Vec<usize> = serde_json::from_value(case["positions"].take()).unwrap();
            Case {
                family,
                name: format!("{family}, {}", case["name"]),
                config: Config::parse(&case["config"].to_string()).unwrap(),
                tokens: serde_json::from_value(case["tokens"].take()).unwrap(),
                positions: positions.into(),
                logits: logits.concat(),
            }
        })
    };
    ["llama", "qwen2", "qwen3", "gemma3"]
        .into_iter()
        .flat_map(of)
        .collect()
}

/// `base + amplitude·(2u − 1)`, u the upper 24 bits of splitmix64 of the name's FNV-1a and the element's place.
fn formula(name: &str, len: usize, base: f64, amplitude: f64) -> impl Iterator<Item = f32> {
    let seed = name.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |state, byte| {
        (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    (1..=len as u64).map(move |place| {
        let z = seed.wrapping_add(place.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let u = ((z ^ (z >> 31)) >> 40) as f64 / f64::from(1 << 24);
        (base + amplitude * (2.0 * u - 1.0)) as f32
    })
}

fn image(config: &Config) -> Image {
    let layout = Layout::new(config);
    let mut values = Vec::with_capacity(layout.len());
    for parameter in layout.parameters() {
        let (base, amplitude) = match parameter.shape[..] {
            _ if parameter.name.ends_with(".bias") => (0.0, 0.3),
            [_] if config.architecture == Architecture::Gemma3 => (0.0, 0.3),
            [_, inputs] if !parameter.name.ends_with("embed_tokens.weight") => {
                (0.0, 2.4 / (inputs as f64).sqrt())
            }
            [_, _] => (0.0, 0.7),
            _ => (1.0, 0.3),
        };
        values.extend(formula(&parameter.name, parameter.len(), base, amplitude));
    }
    Image::from_values(&layout, &values, Storage::F32).unwrap()
}

fn run<K: Kernels>(mut kernels: K, layout: &Layout, case: &Case) -> Vec<f32> {
    let (batch, _) = Batch::packed([Text::whole(&case.tokens)]);
    let hidden = hidden(&mut kernels, layout, &batch, &case.positions, None).unwrap();
    let (rows, mut logits) = (0..case.positions.len(), Vec::new());
    kernels
        .logits(&hidden, &layout.head, rows, &mut logits)
        .unwrap();
    logits
}

fn logits(case: &Case, kernels: KernelSet) -> Vec<f32> {
    let policy =
        Policy::from_image(&case.config, &image(&case.config), kernels, &Device::Cpu).unwrap();
    match policy.prepared() {
        Prepared::Fused(weights) => run(Fused::inference(weights), policy.layout(), case),
        Prepared::Candle(weights) => run(Candle::inference(weights), policy.layout(), case),
    }
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    // A maximum that keeps NaN.
    differences.fold(
        0.0,
        |max, difference| if difference <= max { max } else { difference },
    )
}

#[test]
fn every_family_computes_the_logits_of_transformers_on_both_kernel_sets() {
    let cases = cases();
    assert!(cases.len() >= 20);
    for case in &cases {
        for kernels in BOTH {
            let difference = largest_difference(&logits(case, kernels), &case.logits);
            assert!(
                difference <= 1e-4,
                "{kernels:?} {}: {difference:e}",
                case.name
            );
        }
    }
}

/// Each key changes the logits little, yet the recorded numbers show it.
#[test]
fn a_configuration_that_differs_in_one_key_computes_other_logits() {
    type Change = fn(&mut Config);
    let changes: [(&str, &str, Change); 10] = [
        ("llama3\"", "rope", |config| {
            config.rope = crate::config::Rope::plain(500.0)
        }),
        ("linear", "theta", |config| config.rope.theta = 1001.0),
        ("window on", "window", |config| {
            config.sliding_window = Some(6)
        }),
        ("window on", "layers", |config| config.layer_types.reverse()),
        ("qwen2, \"yarn", "rope", |config| {
            config.rope = crate::config::Rope::plain(1000.0)
        }),
        ("every bias", "eps", |config| config.rms_norm_eps = 2e-3),
        ("keys of transformers 4", "scalar", |config| {
            config.query_pre_attn_scalar = Some(21.0)
        }),
        ("keys of transformers 4", "local", |config| {
            config.local_rope = None
        }),
        ("both caps", "attention", |config| {
            config.attn_logit_softcapping = Some(2.1)
        }),
        ("both caps", "final", |config| {
            config.final_logit_softcapping = None
        }),
    ];
    for (name, what, change) in changes {
        let mut cases = cases();
        let case = cases
            .iter_mut()
            .find(|case| case.name.contains(name))
            .unwrap();
        change(&mut case.config);
        for kernels in BOTH {
            let difference = largest_difference(&logits(case, kernels), &case.logits);
            assert!(
                difference > 1e-3,
                "{kernels:?} {name}, {what}: {difference:e}"
            );
        }
    }
}

#[test]
fn rotary_frequencies_are_those_of_transformers() {
    for case in numbers("rope") {
        let config = Config::parse(&case["config"].to_string()).unwrap();
        let expected: Vec<f32> = serde_json::from_value(case["frequencies"].clone()).unwrap();
        let found = config.rope.frequencies(config.head_dim());
        assert_eq!(found.len(), expected.len());
        for (pair, (found, expected)) in found.iter().zip(&expected).enumerate() {
            // Its power function is exact to one unit in the last place, and the divisions and blends add theirs.
            let error = (found - expected).abs() / expected;
            assert!(
                error <= 3e-7,
                "{} pair {pair}: {found:e} {expected:e}",
                case["name"]
            );
        }
        let factor = case["attention_factor"].as_f64().unwrap();
        assert!((f64::from(config.rope.attention_factor()) - factor).abs() < 1e-6);
    }
}

/// Writes every case as the folder that `tests/reference/families.py check` loads with transformers.
#[test]
#[ignore = "writes folders for a reference that needs transformers"]
fn write_folders_for_transformers() {
    let out = PathBuf::from(std::env::var("MUSTER_FOLDERS").unwrap());
    let cases = cases();
    for (index, case) in cases.iter().enumerate() {
        let number = cases[..index]
            .iter()
            .filter(|other| other.family == case.family)
            .count();
        let folder = out.join(format!("{}-{number}", case.family));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("config.json"), case.config.to_json("float32")).unwrap();
        let image = image(&case.config);
        std::fs::write(folder.join("model.safetensors"), image.bytes()).unwrap();
    }
}
