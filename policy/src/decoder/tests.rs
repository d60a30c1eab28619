use std::sync::Arc;

use candle_core::{DType, Device};

use super::*;
use crate::config::Config;
use crate::kernels::Text;
use crate::kernels::candle::{Candle, CandleWeights};
use crate::kernels::fused::{Fused, FusedWeights};
use crate::testing::{families, image, texts};

/// Logits at `wanted`, the layers run in ranges that end at each of `cuts`.
fn logits<K: Kernels>(
    kernels: &mut K,
    layout: &Layout,
    batch: &Batch,
    wanted: &Rc<[usize]>,
    cuts: &[usize],
) -> Vec<f32> {
    let mut x = kernels.embed(&layout.embedding, &batch.tokens).unwrap();
    let mut start = 0;
    for end in cuts.iter().copied().chain([layout.layers.len()]) {
        let span = Span {
            layers: start..end,
            batch,
            wanted,
        };
        x = layers(kernels, layout, &span, x, None).unwrap();
        start = end;
    }
    let x = kernels.norm(&x, &layout.norm).unwrap();
    let mut logits = Vec::new();
    kernels
        .logits(&x, &layout.head, 0..wanted.len(), &mut logits)
        .unwrap();
    logits
}

fn both(config: &Config) -> (Arc<FusedWeights>, Arc<CandleWeights>, Arc<Layout>) {
    let layout = Arc::new(Layout::new(config));
    let image = image(config, 3);
    let candle = CandleWeights::new(
        config,
        Arc::clone(&layout),
        &image.values(),
        &Device::Cpu,
        DType::F32,
    );
    let fused = FusedWeights::new(config, Arc::clone(&layout), image, false);
    (Arc::new(fused), Arc::new(candle.unwrap()), layout)
}

#[test]
fn layers_run_in_two_ranges_give_what_they_give_in_one() {
    for config in families() {
        let (fused, candle, layout) = both(&config);
        let texts = texts(&config, 8, &[11, 3, 20]);
        let (batch, _) = Batch::packed(texts.iter().map(|text| Text::whole(text)));
        let every: Rc<[usize]> = (0..batch.tokens.len()).collect();
        let some: Rc<[usize]> = [0, 10, 12, 13, 33].into();
        for wanted in [every, some] {
            let run = |cuts: &[usize]| {
                let fused = logits(
                    &mut Fused::inference(&fused),
                    &layout,
                    &batch,
                    &wanted,
                    cuts,
                );
                let candle = logits(
                    &mut Candle::inference(&candle),
                    &layout,
                    &batch,
                    &wanted,
                    cuts,
                );
                (fused, candle)
            };
            let whole = run(&[]);
            for cut in 0..=config.num_hidden_layers {
                assert_eq!(run(&[cut]), whole, "{:?} cut at {cut}", config.architecture);
            }
        }
    }
}
