//! The tape of a training pass of the fused kernels, and its derivatives in reverse.
//!
//! Each record is dropped after its derivative is taken, so the next one reuses its buffers while they are in cache.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use super::array::Array;
use super::attention::{self, Attended, Turn};
use super::buffer::{Buffer, Pool};
use super::elementwise;
use super::head::{self, Shaping};
use super::model::FusedWeights;
use crate::kernels::Row;
use crate::kernels::gradients::Gradients;
use crate::kernels::matmul::{Matrix, Onto, multiply};
use crate::layout::{Attention, Block, HeadNorms, Linear};

/// An operation and the inputs of its derivative. Numbers are ids of arrays.
#[derive(Debug)]
pub(crate) enum Record {
    Embed {
        table: Block,
        tokens: Vec<u32>,
        out: usize,
    },
    Norm {
        x: Array,
        weight: Block,
        residual: Option<usize>,
        out: usize,
    },
    HeadNorms {
        qkv: Array,
        norms: HeadNorms,
        out: usize,
    },
    Linear {
        x: Array,
        linear: Linear,
        residual: Option<usize>,
        out: usize,
    },
    Attention {
        input: usize,
        rotated: Buffer,
        log_sums: Buffer,
        attention: Attention,
        rows: Rc<[Row]>,
        out: Array,
    },
    Gated {
        gate_up: Array,
        out: usize,
    },
    Gather {
        input: usize,
        rows: usize,
        width: usize,
        positions: Rc<[usize]>,
        out: usize,
    },
    Head {
        hidden: Array,
        head: Block,
        targets: Vec<u32>,
        shaping: Shaping,
    },
}

/// Operations in the order in which they ran.
#[derive(Debug, Default)]
pub(crate) struct Tape {
    records: Vec<Record>,
}

impl Tape {
    pub(crate) fn push(&mut self, record: Record) {
        self.records.push(record);
    }

    /// Derivative of `Σ coefficients · logprobs` by every parameter.
    pub(crate) fn backward(
        self,
        weights: &Arc<FusedWeights>,
        pool: &Pool,
        coefficients: &[f32],
    ) -> Gradients {
        let mut reverse = Reverse {
            weights,
            pool,
            slopes: HashMap::new(),
            gradients: Gradients::zeros(&weights.layout),
        };
        for record in self.records.into_iter().rev() {
            reverse.step(record, coefficients);
        }
        reverse.gradients
    }
}

/// State of the reverse pass: one buffer for each array that has received a derivative.
struct Reverse<'a> {
    weights: &'a FusedWeights,
    pool: &'a Pool,
    slopes: HashMap<usize, Buffer>,
    gradients: Gradients,
}

impl Reverse<'_> {
    fn step(&mut self, record: Record, coefficients: &[f32]) {
        match record {
            Record::Head {
                hidden,
                head,
                targets,
                shaping,
            } => {
                let mut dx = self.slope_or_zeros(&hidden);
                let dw = self.gradients.block_mut(&head);
                let w = self.weights.block(&head);
                let pair = (&hidden.data[..], w);
                head::backward((&mut dx, dw), pair, &targets, shaping, coefficients);
                self.slopes.insert(hidden.id, dx);
            }
            Record::Norm {
                x,
                weight,
                residual,
                out,
            } => self.norm(&x, &weight, residual, out),
            Record::HeadNorms { qkv, norms, out } => {
                let Some(mut g) = self.slopes.remove(&out) else {
                    return;
                };
                for (norm, columns) in self.weights.heads.normed(&norms) {
                    let dw = self.gradients.block_mut(norm);
                    let w = self.weights.block(norm);
                    let (x, width, constants) = (&qkv.data, qkv.width, self.weights.norms);
                    elementwise::head_norm_backward(&mut g, dw, x, width, columns, w, constants);
                }
                self.give(qkv.id, g);
            }
            Record::Linear {
                x,
                linear,
                residual,
                out,
            } => self.linear(x, &linear, residual, out),
            Record::Attention {
                input,
                rotated,
                log_sums,
                attention,
                rows,
                out,
            } => {
                let Some(g) = self.slopes.remove(&out.id) else {
                    return;
                };
                let mut dqkv = Buffer::zeros(self.pool, rotated.len());
                let attended = Attended {
                    qkv: &rotated,
                    out: &out.data,
                    log_sums: &log_sums,
                };
                let heads = self.weights.heads;
                attention::backward(&mut dqkv, &g, attended, (heads, &attention), &rows);
                let rotary = &self.weights.ropes[attention.rope];
                attention::rotate(&mut dqkv, heads, &rows, rotary, Turn::Back);
                self.give(input, dqkv);
            }
            Record::Gated { gate_up, out } => {
                let Some(g) = self.slopes.remove(&out) else {
                    return;
                };
                let width = gate_up.width / 2;
                let mut slope = Rc::try_unwrap(gate_up.data)
                    .unwrap_or_else(|shared| Buffer::copied(self.pool, &shared));
                let activation = self.weights.family.activation;
                elementwise::gated_backward(&mut slope, &g, width, activation);
                self.give(gate_up.id, slope);
            }
            Record::Gather {
                input,
                rows,
                width,
                positions,
                out,
            } => {
                let Some(g) = self.slopes.remove(&out) else {
                    return;
                };
                let mut dx = Buffer::zeros(self.pool, rows * width);
                for (g, &position) in g.chunks_exact(width).zip(positions.iter()) {
                    dx[position * width..][..width].copy_from_slice(g);
                }
                self.give(input, dx);
            }
            Record::Embed { table, tokens, out } => self.embed(&table, &tokens, out),
        }
    }

    /// Adds the slopes of the tokens' rows to the table's.
    fn embed(&mut self, table: &Block, tokens: &[u32], out: usize) {
        let Some(g) = self.slopes.remove(&out) else {
            return;
        };
        let width = table.columns;
        let dw = self.gradients.block_mut(table);
        for (g, &token) in g.chunks_exact(width).zip(tokens) {
            let row = &mut dw[token as usize * width..][..width];
            match self.weights.embedding_scale {
                None => elementwise::add(row, g),
                Some(scale) => elementwise::add_multiple(row, g, scale),
            }
        }
    }

    fn norm(&mut self, x: &Array, weight: &Block, residual: Option<usize>, out: usize) {
        let Some(g) = self.slopes.remove(&out) else {
            return;
        };
        let mut dx = self.slope_or_zeros(x);
        let dw = self.gradients.block_mut(weight);
        let w = self.weights.block(weight);
        elementwise::norm_backward(&mut dx, dw, &g, &x.data, w, self.weights.norms);
        self.slopes.insert(x.id, dx);
        if let Some(residual) = residual {
            self.give(residual, g);
        }
    }

    /// `dx += g W`, `dW += gᵀ x`, `db += Σ g`; the residual's derivative is `g` itself.
    fn linear(&mut self, x: Array, linear: &Linear, residual: Option<usize>, out: usize) {
        let Some(g) = self.slopes.remove(&out) else {
            return;
        };
        let (rows, out_width) = (x.rows(), linear.weight.rows);
        let slope = Matrix::new(&g, rows, out_width);
        let (mut dx, onto) = match self.slopes.remove(&x.id) {
            Some(dx) => (dx, Onto::Sum),
            None => (Buffer::stale(self.pool, x.data.len()), Onto::Nothing),
        };
        multiply(&mut dx, slope, self.weights.matrix(&linear.weight), onto);
        self.slopes.insert(x.id, dx);
        let dw = self.gradients.block_mut(&linear.weight);
        multiply(dw, slope.transposed(), x.matrix(), Onto::Sum);
        if let Some(bias) = &linear.bias {
            elementwise::sum_rows(self.gradients.block_mut(bias), &g);
        }
        if let Some(residual) = residual {
            self.give(residual, g);
        }
    }

    fn slope_or_zeros(&mut self, x: &Array) -> Buffer {
        self.slopes
            .remove(&x.id)
            .unwrap_or_else(|| Buffer::zeros(self.pool, x.data.len()))
    }

    fn give(&mut self, id: usize, slope: Buffer) {
        match self.slopes.get_mut(&id) {
            Some(sum) => elementwise::add(sum, &slope),
            None => {
                self.slopes.insert(id, slope);
            }
        }
    }
}
