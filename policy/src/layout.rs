//! The canonical parameter table: all parameters of a decoder by Hugging Face name, in a fixed order, each with its place in
//! one flat vector.
//!
//! Parameters that multiply the same input are neighbours (q, k, v; their biases; gate, up), so that a [`Block`] of several
//! parameters is one matrix and needs one product. Invariant: the parameters tile the flat vector without gaps, and so do
//! the blocks.

use std::ops::Range;

use crate::config::Config;

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
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Always false: the sizes of a valid configuration are positive.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Matrices have weight decay; norms and biases do not.
    pub(crate) fn is_matrix(&self) -> bool {
        self.shape.len() == 2
    }

    /// Its place in the flat vector.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// Neighbouring parameters as one matrix `[rows, columns]`, or as one vector (`rows` = 1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Block {
    /// Index among the blocks.
    pub(crate) index: usize,
    /// First element in the flat vector.
    pub(crate) offset: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// Indices of its parameters in the table.
    pub(crate) parameters: Range<usize>,
}

impl Block {
    /// Its place in the flat vector.
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

/// Norms on each head of q and of k, `[D]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HeadNorms {
    pub(crate) query: Block,
    pub(crate) key: Block,
}

/// The attention parameters that differ between layers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Attention {
    /// Index among the layers, and of its keys and values in a cache.
    pub(crate) layer: usize,
    /// Index of its rotary embedding in [`Config::ropes`].
    pub(crate) rope: usize,
    /// Positions that a query attends to, including its own; `None` for all.
    pub(crate) window: Option<usize>,
    /// Multiplies the scores.
    pub(crate) scale: f64,
    /// Scaled scores s become `cap·tanh(s/cap)`.
    pub(crate) softcap: Option<f64>,
}

impl Attention {
    /// First position that a query at `position` attends to.
    pub(crate) fn first_visible(&self, position: usize) -> usize {
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// Blocks of one decoder layer, in order of use.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LayerBlocks {
    pub(crate) input_norm: Block,
    /// `[(H + 2 KV)·D, hidden]`: q, k and v.
    pub(crate) qkv: Linear,
    pub(crate) head_norms: Option<HeadNorms>,
    pub(crate) attention: Attention,
    pub(crate) output: Linear,
    /// On the output of the attention.
    pub(crate) output_norm: Option<Block>,
    pub(crate) mlp_norm: Block,
    /// `[2·intermediate, hidden]`: gate and up.
    pub(crate) gate_up: Linear,
    pub(crate) down: Linear,
    /// On the output of the MLP.
    pub(crate) down_norm: Option<Block>,
}

/// The parameter table of one configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    parameters: Vec<Parameter>,
    blocks: Vec<Block>,
    len: usize,
    pub(crate) embedding: Block,
    pub(crate) layers: Vec<LayerBlocks>,
    pub(crate) norm: Block,
    /// Equals `embedding` if the two are tied.
    pub(crate) head: Block,
}

impl Layout {
    /// `config` must be valid ([`Config::validate`]).
    pub fn new(config: &Config) -> Self {
        debug_assert_eq!(
            config.validate(),
            Ok(()),
            "a layout is made of a valid configuration"
        );
        let mut table = LayoutBuilder::default();
        let hidden = config.hidden_size;
        let embedding = table.matrix("model.embed_tokens.weight", config.vocab_size, hidden);
        let layers = (0..config.num_hidden_layers)
            .map(|layer| table.layer(config, layer))
            .collect();
        let norm = table.vector("model.norm.weight", hidden);
        let head = if config.tie_word_embeddings {
            embedding.clone()
        } else {
            table.matrix("lm_head.weight", config.vocab_size, hidden)
        };
        let LayoutBuilder {
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

    /// In canonical order.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Elements of all parameters together.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Always false: a valid configuration has parameters.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The matrices that every token is multiplied with: all except an embedding that is not also the head.
    pub(crate) fn multiplied(&self) -> impl Iterator<Item = &Block> {
        let blocks = self.blocks.iter().filter(|block| block.rows > 1);
        blocks.filter(|block| block.index != self.embedding.index || **block == self.head)
    }

    pub(crate) fn blocks(&self) -> &[Block] {
        &self.blocks
    }
}

fn attention(config: &Config, layer: usize) -> Attention {
    let window = config.window(layer);
    Attention {
        layer,
        rope: match window {
            Some(_) => config.ropes().len() - 1,
            None => 0,
        },
        window,
        scale: config.attention_scale(),
        softcap: config.attn_logit_softcapping,
    }
}

#[derive(Default)]
struct LayoutBuilder {
    parameters: Vec<Parameter>,
    blocks: Vec<Block>,
    len: usize,
}

impl LayoutBuilder {
    /// The parameters of one layer, in order of use.
    fn layer(&mut self, config: &Config, layer: usize) -> LayerBlocks {
        let family = config.architecture.family();
        let (hidden, ff) = (config.hidden_size, config.intermediate_size);
        let query = config.num_attention_heads * config.head_dim();
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        // Families with branch norms use this name for the norm on the attention's output.
        let mlp_norm = if family.branch_norms {
            "pre_feedforward_layernorm.weight"
        } else {
            "post_attention_layernorm.weight"
        };
        let branch_norm = |table: &mut Self, part: &str| {
            let normed = family.branch_norms;
            normed.then(|| table.vector(&name(part), hidden))
        };
        LayerBlocks {
            input_norm: self.vector(&name("input_layernorm.weight"), hidden),
            qkv: self.linear(
                &[
                    (name("self_attn.q_proj"), query),
                    (name("self_attn.k_proj"), config.kv_width()),
                    (name("self_attn.v_proj"), config.kv_width()),
                ],
                hidden,
                family.always_biased || config.attention_bias,
            ),
            head_norms: family.head_norms.then(|| HeadNorms {
                query: self.vector(&name("self_attn.q_norm.weight"), config.head_dim()),
                key: self.vector(&name("self_attn.k_norm.weight"), config.head_dim()),
            }),
            attention: attention(config, layer),
            // Qwen2 always has biases on q, k and v, but never here.
            output: self.linear(
                &[(name("self_attn.o_proj"), hidden)],
                query,
                config.attention_bias && !family.always_biased,
            ),
            output_norm: branch_norm(self, "post_attention_layernorm.weight"),
            mlp_norm: self.vector(&name(mlp_norm), hidden),
            gate_up: self.linear(
                &[(name("mlp.gate_proj"), ff), (name("mlp.up_proj"), ff)],
                hidden,
                config.mlp_bias,
            ),
            down: self.linear(&[(name("mlp.down_proj"), hidden)], ff, config.mlp_bias),
            down_norm: branch_norm(self, "post_feedforward_layernorm.weight"),
        }
    }

    /// Linear maps of the same input: all weights, then all biases.
    fn linear(&mut self, parts: &[(String, usize)], inputs: usize, biased: bool) -> Linear {
        let named = |suffix: &str| -> Vec<(String, usize)> {
            let parts = parts.iter();
            parts
                .map(|(name, rows)| (format!("{name}.{suffix}"), *rows))
                .collect()
        };
        Linear {
            weight: self.matrices(&named("weight"), inputs),
            bias: biased.then(|| self.vectors(&named("bias"))),
        }
    }

    fn matrix(&mut self, name: &str, rows: usize, columns: usize) -> Block {
        self.matrices(&[(name.to_owned(), rows)], columns)
    }

    /// Matrices of equal width, stacked.
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
        debug_assert_eq!(block.range().end, self.len, "blocks tile the flat vector");
        self.blocks.push(block.clone());
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{families, gemma3, tiny, untied};

    #[test]
    fn parameters_and_blocks_tile_the_flat_vector() {
        for config in families() {
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

    #[test]
    fn a_layer_lists_its_parameters_in_order_of_use() {
        let layout = Layout::new(&gemma3());
        let first = layout.parameters()[1..].iter().take(13);
        let names: Vec<&str> = first
            .map(|parameter| parameter.name.trim_start_matches("model.layers.0."))
            .collect();
        let expected = [
            "input_layernorm.weight",
            "self_attn.q_proj.weight",
            "self_attn.k_proj.weight",
            "self_attn.v_proj.weight",
            "self_attn.q_norm.weight",
            "self_attn.k_norm.weight",
            "self_attn.o_proj.weight",
            "post_attention_layernorm.weight",
            "pre_feedforward_layernorm.weight",
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
            "mlp.down_proj.weight",
            "post_feedforward_layernorm.weight",
        ];
        assert_eq!(names, expected);
    }
}
