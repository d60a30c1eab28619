//! Names of tensors in published files, if they differ from those of the parameter table.

use super::shape::Config;

/// Prefixes of the text decoder in multimodal models, and their replacements in the table.
const PREFIXES: [(&str, &str); 3] = [
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
];

/// Other parts of multimodal models.
const TOWERS: [&str; 4] = [
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
];

impl Config {
    /// Name in the parameter table of a published tensor. `None` for tensors outside the text decoder, and for the rotary
    /// angles in old Llama files, which follow from the configuration.
    pub(crate) fn parameter_name(&self, tensor: &str) -> Option<String> {
        if tensor.ends_with(".rotary_emb.inv_freq") {
            return None;
        }
        if !self.architecture.family().in_multimodal {
            return Some(tensor.to_owned());
        }
        if TOWERS.iter().any(|tower| tensor.starts_with(tower)) {
            return None;
        }
        let renamed = PREFIXES.iter().find_map(|(prefix, ours)| {
            let rest = tensor.strip_prefix(prefix)?;
            Some(format!("{ours}{rest}"))
        });
        Some(renamed.unwrap_or_else(|| tensor.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{gemma3, llama};

    #[test]
    fn the_text_decoder_of_a_multimodal_model_is_renamed_and_other_parts_are_skipped() {
        let gemma = gemma3();
        let name = |tensor: &str| gemma.parameter_name(tensor);
        for prefix in ["model.", "language_model.model.", "model.language_model."] {
            let found = name(&format!("{prefix}layers.0.mlp.up_proj.weight"));
            assert_eq!(found.as_deref(), Some("model.layers.0.mlp.up_proj.weight"));
        }
        let head = name("language_model.lm_head.weight");
        assert_eq!(head.as_deref(), Some("lm_head.weight"));
        assert_eq!(
            name("vision_tower.vision_model.embeddings.patch_embedding.bias"),
            None
        );
        assert_eq!(name("multi_modal_projector.mm_soft_emb_norm.weight"), None);
    }

    #[test]
    fn other_families_keep_every_name_except_that_of_rotary_angles() {
        let name = |tensor: &str| llama().parameter_name(tensor);
        assert_eq!(name("vision_tower.x").as_deref(), Some("vision_tower.x"));
        assert_eq!(name("model.layers.0.self_attn.rotary_emb.inv_freq"), None);
    }
}
