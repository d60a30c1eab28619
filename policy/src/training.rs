//! Training: the pass that yields gradients, the optimizer that applies them, and the supervised loss.

pub(crate) mod optimizer;
pub(crate) mod pass;
pub(crate) mod supervised;
