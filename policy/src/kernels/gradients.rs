//! The derivative of a loss by every parameter, in one flat vector.
//!
//! Kernel sets write it, the optimizer reads it. Invariant: a parameter that no derivative reached is marked as such, so
//! that the optimizer can refuse it.

use std::sync::Arc;

use crate::layout::{Block, Layout, Parameter};

/// Derivative of a loss by every parameter, flat, in the order of the parameter table.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    layout: Arc<Layout>,
    values: Vec<f32>,
    /// For each parameter, whether a derivative reached it.
    reached: Vec<bool>,
}

impl Gradients {
    /// Zeros, with no parameter reached.
    pub fn zeros(layout: &Arc<Layout>) -> Self {
        Self {
            layout: Arc::clone(layout),
            values: vec![0.0; layout.len()],
            reached: vec![false; layout.parameters().len()],
        }
    }

    /// The parameter table.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Every derivative, flat.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Every derivative, flat, to scale or clip.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// Each parameter with its derivative; none if no derivative reached it.
    pub fn iter(&self) -> impl Iterator<Item = (&Parameter, Option<&[f32]>)> {
        let parameters = self.layout.parameters().iter().zip(&self.reached);
        parameters.map(|(parameter, &reached)| {
            (parameter, reached.then(|| &self.values[parameter.range()]))
        })
    }

    /// Adds the gradients of another part of the same batch.
    pub fn add(&mut self, other: &Self) {
        debug_assert_eq!(
            self.values.len(),
            other.values.len(),
            "gradients of one model"
        );
        for (sum, value) in self.values.iter_mut().zip(&other.values) {
            *sum += value;
        }
        for (sum, reached) in self.reached.iter_mut().zip(&other.reached) {
            *sum |= reached;
        }
    }

    /// The derivatives of a block, for writing. Marks its parameters as reached.
    pub(crate) fn block_mut(&mut self, block: &Block) -> &mut [f32] {
        self.reached[block.parameters.clone()].fill(true);
        &mut self.values[block.range()]
    }
}
