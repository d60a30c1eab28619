//! The canonical parameter table: every parameter of a decoder by its Hugging Face name, in one fixed order, and where it
//! lies in a flat vector of them all.
//!
//! The order puts parameters that are multiplied together side by side (q, k, v; their biases; gate, up), so that a
//! [`Block`] of several parameters is one matrix of the flat vector and one product. Invariant: the parameters tile
//! the flat vector without gaps, and so do the blocks.

use std::ops::Range;

use crate::config::Config;

/// One named parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Hugging Face name, such as `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// `[out, in]` for matrices, `[width]` for norms and biases.
    pub shape: Vec<usize>,
    /// First element in the flat vector.
    pub offset: usize,
}

impl Parameter {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Never: every size of a valid configuration is above zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it is a matrix, which weight decay applies to, and not a norm or a bias.
    pub fn is_matrix(&self) -> bool {
        self.shape.len() == 2
    }

    /// Where its elements lie in the flat vector.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// One or several neighbouring parameters taken as one matrix `[rows, columns]`, or as one vector (`rows` = 1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Block {
    /// Place among the blocks.
    pub(crate) index: usize,
    /// First element in the flat vector.
    pub(crate) offset: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Which parameters of the table it is made of.
    pub(crate) parameters: Range<usize>,
}

impl Block {
    /// Where its elements lie in the flat vector.
    pub(crate) fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.rows * self.columns
    }
}

/// `y = x Wᵀ + b`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Linear {
    /// `[out, in]`
    pub(crate) weight: Block,
    /// `[out]`
    pub(crate) bias: Option<Block>,
}

/// Blocks of one decoder layer, in the order in which they are used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LayerBlocks {
    pub(crate) input_norm: Block,
    /// `[(H + 2 KV)·D, hidden]`: q, k and v.
    pub(crate) qkv: Linear,
    pub(crate) output: Linear,
    pub(crate) mlp_norm: Block,
    /// `[2·intermediate, hidden]`: gate and up.
    pub(crate) gate_up: Linear,
    pub(crate) down: Linear,
}

/// The parameter table of one configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    parameters: Vec<Parameter>,
    blocks: Vec<Block>,
    len: usize,
    pub(crate) embedding: Block,
    pub(crate) layers: Vec<LayerBlocks>,
    pub(crate) norm: Block,
    /// The embedding when the two are tied.
    pub(crate) head: Block,
}

impl Layout {
    /// Lists the parameters of a decoder. `config` must be valid ([`Config::validate`]).
    pub fn new(config: &Config) -> Self {
        let mut table = Table::default();
        let (hidden, ff) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (
            config.num_attention_heads * config.head_dim(),
            config.kv_width(),
        );
        let embedding = table.matrix("model.embed_tokens.weight", config.vocab_size, hidden);
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for layer in 0..config.num_hidden_layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            layers.push(LayerBlocks {
                input_norm: table.vector(&name("input_layernorm.weight"), hidden),
                qkv: Linear {
                    weight: table.matrices(
                        &[
                            (name("self_attn.q_proj.weight"), q),
                            (name("self_attn.k_proj.weight"), kv),
                            (name("self_attn.v_proj.weight"), kv),
                        ],
                        hidden,
                    ),
                    bias: Some(table.vectors(&[
                        (name("self_attn.q_proj.bias"), q),
                        (name("self_attn.k_proj.bias"), kv),
                        (name("self_attn.v_proj.bias"), kv),
                    ])),
                },
                output: Linear {
                    weight: table.matrix(&name("self_attn.o_proj.weight"), hidden, q),
                    bias: None,
                },
                mlp_norm: table.vector(&name("post_attention_layernorm.weight"), hidden),
                gate_up: Linear {
                    weight: table.matrices(
                        &[
                            (name("mlp.gate_proj.weight"), ff),
                            (name("mlp.up_proj.weight"), ff),
                        ],
                        hidden,
                    ),
                    bias: None,
                },
                down: Linear {
                    weight: table.matrix(&name("mlp.down_proj.weight"), hidden, ff),
                    bias: None,
                },
            });
        }
        let norm = table.vector("model.norm.weight", hidden);
        let head = if config.tie_word_embeddings {
            embedding.clone()
        } else {
            table.matrix("lm_head.weight", config.vocab_size, hidden)
        };
        let Table {
            parameters,
            blocks,
            len,
        } = table;
        Self {
            parameters,
            blocks,
            len,
            embedding,
            layers,
            norm,
            head,
        }
    }

    /// Every parameter, in canonical order.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Elements of all parameters together.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: every valid configuration has parameters.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn blocks(&self) -> &[Block] {
        &self.blocks
    }
}

/// A table under construction.
#[derive(Default)]
struct Table {
    parameters: Vec<Parameter>,
    blocks: Vec<Block>,
    len: usize,
}

impl Table {
    fn matrix(&mut self, name: &str, rows: usize, columns: usize) -> Block {
        self.matrices(&[(name.to_owned(), rows)], columns)
    }

    /// Matrices of equal width, one below the other.
    fn matrices(&mut self, parts: &[(String, usize)], columns: usize) -> Block {
        let rows = parts.iter().map(|(_, rows)| rows).sum();
        let shapes = parts
            .iter()
            .map(|(name, rows)| (name.clone(), vec![*rows, columns]));
        self.block(shapes.collect(), rows, columns)
    }

    fn vector(&mut self, name: &str, width: usize) -> Block {
        self.vectors(&[(name.to_owned(), width)])
    }

    fn vectors(&mut self, parts: &[(String, usize)]) -> Block {
        let width = parts.iter().map(|(_, width)| width).sum();
        let shapes = parts
            .iter()
            .map(|(name, width)| (name.clone(), vec![*width]));
        self.block(shapes.collect(), 1, width)
    }

    fn block(&mut self, parts: Vec<(String, Vec<usize>)>, rows: usize, columns: usize) -> Block {
        let (first, offset) = (self.parameters.len(), self.len);
        for (name, shape) in parts {
            let parameter = Parameter {
                name,
                shape,
                offset: self.len,
            };
            self.len += parameter.len();
            self.parameters.push(parameter);
        }
        let parameters = first..self.parameters.len();
        let block = Block {
            index: self.blocks.len(),
            offset,
            rows,
            columns,
            parameters,
        };
        self.blocks.push(block.clone());
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{tiny, untied};

    #[test]
    fn parameters_and_blocks_tile_the_flat_vector() {
        for config in [tiny(), untied()] {
            let layout = Layout::new(&config);
            let mut end = 0;
            for parameter in layout.parameters() {
                assert_eq!(parameter.offset, end, "{}", parameter.name);
                end = parameter.range().end;
            }
            assert_eq!(end, layout.len());
            let mut end = 0;
            for block in layout.blocks() {
                assert_eq!(block.offset, end);
                end = block.range().end;
            }
            assert_eq!(end, layout.len());
        }
    }

    #[test]
    fn a_tied_head_is_the_embedding_and_has_no_parameter_of_its_own() {
        let tied = Layout::new(&tiny());
        assert_eq!(tied.head, tied.embedding);
        assert!(
            tied.parameters()
                .iter()
                .all(|parameter| parameter.name != "lm_head.weight")
        );
        let untied = Layout::new(&untied());
        assert_ne!(untied.head, untied.embedding);
    }
}
