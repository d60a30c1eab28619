//! Draws tokens from the logits of a step, on several threads: over a large vocabulary the exponentials of many rows take as
//! long as a layer.
//!
//! Pure: logits and uniform numbers in, tokens out. Invariant: a draw depends on its own row of logits alone, so the number
//! of threads changes no token.

use std::cell::RefCell;

use super::plan::Sequence;
use crate::kernels::threads::Threads;
use crate::sampling::Distribution;

/// Fewest logits worth handing to another thread: some tens of microseconds.
const ELEMENTS: usize = 1 << 14;

/// A token to draw.
#[derive(Debug, Clone, Copy)]
pub(super) struct Draw {
    pub(super) sequence: Sequence,
    /// Row of the logits.
    pub(super) row: usize,
    /// Divides the logits.
    pub(super) temperature: f32,
    /// In [0, 1); none takes the likeliest token.
    pub(super) uniform: Option<f64>,
}

/// A drawn token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Drawn {
    pub(super) token: u32,
    /// In nats, at the draw's temperature.
    pub(super) logprob: f32,
}

thread_local! {
    /// Allocated once, loaded again for every row.
    static DISTRIBUTION: RefCell<Distribution> = RefCell::default();
}

/// Draws every token; `logits` `[rows, vocab]`. None if a row of logits is not a distribution.
pub(super) fn draw(
    threads: &Threads,
    (logits, vocab): (&[f32], usize),
    draws: &[Draw],
) -> Vec<Option<Drawn>> {
    let mut drawn = vec![None; draws.len()];
    threads.share_rows(&mut drawn, 1, ELEMENTS / vocab, |first, drawn| {
        DISTRIBUTION.with_borrow_mut(|distribution| {
            for (drawn, draw) in drawn.iter_mut().zip(&draws[first..]) {
                let logits = &logits[draw.row * vocab..][..vocab];
                if !distribution.load(logits, draw.temperature) {
                    continue;
                }
                let token = match draw.uniform {
                    None => distribution.likeliest(),
                    Some(u) => distribution.draw(u),
                };
                *drawn = Some(Drawn {
                    token,
                    logprob: distribution.logprob(token),
                });
            }
        });
    });
    drawn
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    #[test]
    fn every_draw_is_of_its_own_row_on_any_number_of_threads() {
        let vocab = ELEMENTS / 2;
        let logits: Vec<f32> = (0..5 * vocab)
            .map(|at| {
                (at * 7919 % 1009) as f32 / 100.0 + if at / vocab == 3 { f32::NAN } else { 0.0 }
            })
            .collect();
        let draws: Vec<Draw> = (0..20)
            .map(|number| Draw {
                sequence: number as Sequence,
                row: number % 5,
                temperature: 0.7,
                uniform: (number != 4).then_some(number as f64 / 20.0),
            })
            .collect();
        let mut plain = Distribution::default();
        let expected: Vec<Option<u32>> = draws
            .iter()
            .map(|draw| {
                let fine = plain.load(&logits[draw.row * vocab..][..vocab], draw.temperature);
                let token = |plain: &Distribution| {
                    draw.uniform
                        .map_or_else(|| plain.likeliest(), |u| plain.draw(u))
                };
                fine.then(|| token(&plain))
            })
            .collect();
        for count in [1, 2, 3] {
            let threads = Threads::new(NonZeroUsize::new(count).unwrap());
            let drawn = draw(&threads, (&logits, vocab), &draws);
            let tokens: Vec<Option<u32>> =
                drawn.iter().map(|drawn| drawn.map(|d| d.token)).collect();
            assert_eq!(tokens, expected);
            assert_eq!(tokens.iter().filter(|token| token.is_none()).count(), 4);
        }
    }
}
