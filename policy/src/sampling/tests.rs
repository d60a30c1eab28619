use proptest::prelude::*;
use serde_json::Value;

use super::*;

fn vectors() -> Value {
    serde_json::from_str(include_str!("../../testdata/seeds_sampling.json")).unwrap()
}

#[test]
fn uniforms_are_those_of_the_published_vectors() {
    for case in vectors()["cases"].as_array().unwrap() {
        let mut seed = [0; 32];
        hex::decode_to_slice(case["seed"].as_str().unwrap(), &mut seed).unwrap();
        let expected = case["u"].as_array().unwrap();
        for (index, expected) in expected.iter().enumerate() {
            let (rollout, position) = (index as u32 / 3, index as u64 % 3);
            assert_eq!(
                uniform(&seed, rollout, position),
                expected.as_f64().unwrap()
            );
        }
    }
}

#[test]
fn draws_are_those_of_the_published_vectors() {
    let mut distribution = Distribution::default();
    for case in vectors()["inverse_cdf"].as_array().unwrap() {
        let logits: Vec<f32> = case["logits"]
            .as_array()
            .unwrap()
            .iter()
            .map(|l| l.as_f64().unwrap() as f32)
            .collect();
        assert!(distribution.load(&logits, case["temperature"].as_f64().unwrap() as f32));
        let token = distribution.draw(case["u"].as_f64().unwrap());
        assert_eq!(u64::from(token), case["token"].as_u64().unwrap(), "{case}");
    }
}

#[test]
fn logits_that_are_no_distribution_are_refused() {
    let mut distribution = Distribution::default();
    for bad in [f32::NAN, f32::INFINITY] {
        assert!(!distribution.load(&[0.0, bad, 1.0], 1.0));
    }
    assert!(!distribution.load(&[f32::NEG_INFINITY; 3], 1.0));
    assert!(!distribution.load(&[], 1.0));
}

#[test]
fn an_impossible_token_is_never_drawn() {
    let mut distribution = Distribution::default();
    assert!(distribution.load(
        &[
            f32::NEG_INFINITY,
            1.0,
            f32::NEG_INFINITY,
            0.0,
            f32::NEG_INFINITY
        ],
        1.0
    ));
    assert_eq!(distribution.draw(0.0), 1);
    assert_eq!(distribution.draw(1.0 - f64::EPSILON / 2.0), 3);
    // Beyond what `uniform` yields: the last possible token, not the last.
    assert_eq!(distribution.draw(1.5), 3);
}

#[test]
fn the_likeliest_token_is_the_lowest_among_equals() {
    let mut distribution = Distribution::default();
    assert!(distribution.load(&[0.0, 2.0, 1.0, 2.0], 1.0));
    assert_eq!(distribution.likeliest(), 1);
}

proptest! {
    #[test]
    fn a_draw_is_the_first_token_above_u(
        logits in prop::collection::vec(-8.0f32..8.0, 1..300),
        temperature in 0.2f32..3.0,
        u in 0.0f64..1.0,
    ) {
        let mut distribution = Distribution::default();
        prop_assert!(distribution.load(&logits, temperature));
        let token = distribution.draw(u);
        let (below, through) = distribution.interval(token);
        prop_assert!(below <= u + 1e-15 && u < through + 1e-15);
        // The rule, written plainly with the system's exponential.
        let max = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
        let weights: Vec<f64> =
            logits.iter().map(|&l| ((f64::from(l) - max) / f64::from(temperature)).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut sum = 0.0;
        let plain = weights.iter().position(|weight| { sum += weight / total; u < sum });
        // Only a u within rounding of an edge may differ.
        if (u - below).abs() > 1e-12 && (u - through).abs() > 1e-12 {
            prop_assert_eq!(Some(token as usize), plain);
        }
        let expected = (weights[token as usize] / total).ln();
        prop_assert!((f64::from(distribution.logprob(token)) - expected).abs() < 1e-5);
    }
}
