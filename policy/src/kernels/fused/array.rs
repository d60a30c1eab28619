//! An activation of the fused kernels.

use std::rc::Rc;

use super::buffer::Buffer;
use crate::kernels::matmul::Matrix;

/// An activation `[N, width]`.
#[derive(Debug, Clone)]
pub(crate) struct Array {
    /// Its name on the tape.
    pub(super) id: usize,
    pub(super) width: usize,
    pub(super) data: Rc<Buffer>,
}

impl Array {
    pub(super) fn rows(&self) -> usize {
        self.data.len() / self.width
    }

    pub(super) fn matrix(&self) -> Matrix<'_> {
        Matrix::new(&self.data, self.rows(), self.width)
    }
}
