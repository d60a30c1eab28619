use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::testing::{families, gemma3, llama, qwen3, tiny};

#[test]
fn a_config_survives_writing_and_reading() {
    for mut config in families() {
        config.eos_token_ids = vec![1, 3];
        config.pad_token_id = Some(0);
        assert_eq!(Config::parse(&config.to_json("float32")), Ok(config));
    }
}

#[test]
fn an_unknown_architecture_is_refused_with_the_list_that_runs() {
    let error = Config::parse(r#"{"model_type": "gpt_oss"}"#)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("gpt_oss") && error.contains("qwen2"),
        "{error}"
    );
}

#[test]
fn sizes_that_do_not_fit_are_refused_by_name() {
    type Breaks = fn(&mut Config);
    let broken: [(Breaks, &str); 5] = [
        (|config| config.num_attention_heads = 5, "hidden_size"),
        (
            |config| config.num_key_value_heads = 3,
            "num_key_value_heads",
        ),
        (|config| config.vocab_size = 0, "vocab_size"),
        (
            |config| config.num_hidden_layers = usize::MAX,
            "num_hidden_layers",
        ),
        (|config| config.rms_norm_eps = f64::NAN, "rms_norm_eps"),
    ];
    for (breaks, key) in broken {
        let mut config = tiny();
        breaks(&mut config);
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn keys_that_change_the_function_are_refused_by_name() {
    for (config, key, value) in [
        (tiny(), "hidden_act", json!("gelu")),
        (
            tiny(),
            "rope_scaling",
            json!({"type": "longrope", "factor": 4.0}),
        ),
        (
            tiny(),
            "rope_parameters",
            json!({"rope_type": "proportional"}),
        ),
        (
            tiny(),
            "layer_types",
            json!(["full_attention", "sliding_attention"]),
        ),
        (
            tiny(),
            "layer_types",
            json!(["full_attention", "linear_attention"]),
        ),
        (tiny(), "layer_types", json!(["full_attention"])),
        (
            tiny(),
            "architectures",
            json!(["Qwen2ForSequenceClassification"]),
        ),
        (tiny(), "partial_rotary_factor", json!(0.5)),
        (llama(), "mlp_bias", json!("yes")),
        (
            llama(),
            "quantization_config",
            json!({"quant_method": "fp8"}),
        ),
        (
            llama(),
            "auto_map",
            json!({"AutoModelForCausalLM": "modeling.Own"}),
        ),
        (llama(), "rope_interleaved", json!(true)),
        (llama(), "num_local_experts", json!(8)),
        (tiny(), "use_mrope", json!(true)),
        (qwen3(), "attention_chunk_size", json!(8192)),
        (gemma3(), "hidden_activation", json!("gelu")),
        (gemma3(), "use_bidirectional_attention", json!(true)),
    ] {
        let mut file: Value = serde_json::from_str(&config.to_json("float32")).unwrap();
        file[key] = value;
        let error = Config::parse(&file.to_string()).unwrap_err().to_string();
        let named = [key, "rope_type", "invalid type"]
            .iter()
            .any(|name| error.contains(name));
        assert!(named, "{key}: {error}");
    }
}

#[test]
fn unknown_keys_are_written_back_unchanged() {
    for config in families() {
        let mut file: Value = serde_json::from_str(&config.to_json("float32")).unwrap();
        file["initializer_range"] = json!(0.02);
        file["unknown"] = json!({"nested": [1, null, "x"]});
        let read = Config::parse(&file.to_string()).unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&read.to_json("float32")).unwrap(),
            file
        );
        // The text is hashed, so it must not change with every reading.
        let again = Config::parse(&read.to_json("bfloat16")).unwrap();
        assert_eq!(again.to_json("bfloat16"), read.to_json("bfloat16"));
    }
}

/// The whole file of a published Llama.
const LLAMA: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
    "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
    "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": true,
    "vocab_size": 128256}"#;

/// Published files of small models, without the keys that this crate ignores, and the number of parameters of each model.
const PUBLISHED: [(&str, usize); 5] = [
    (LLAMA, 1_235_814_400),
    (
        // SmolLM2 135M
        r#"{
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": true, "max_position_embeddings": 8192, "model_type": "llama",
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
    "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 49152}"#,
        134_515_008,
    ),
    (
        // Qwen2.5 0.5B
        r#"{
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true,
    "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}"#,
        494_032_768,
    ),
    (
        // Qwen3 0.6B
        r#"{
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
    "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}"#,
        596_049_920,
    ),
    (
        // Gemma 3 270M
        r#"{
    "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"], "attention_bias": false,
    "attention_dropout": 0.0, "attn_logit_softcapping": null, "bos_token_id": 2, "eos_token_id": 1,
    "final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640,
    "initializer_range": 0.02, "intermediate_size": 2048, "layer_types": ["sliding_attention", "sliding_attention",
    "sliding_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention",
    "sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention", "full_attention",
    "sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention",
    "full_attention"], "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
    "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0, "rope_scaling": null, "rope_theta": 1000000.0,
    "sliding_window": 512, "torch_dtype": "bfloat16", "use_bidirectional_attention": false, "use_cache": true,
    "vocab_size": 262144}"#,
        268_098_176,
    ),
];

#[test]
fn published_models_have_their_published_number_of_parameters() {
    for (file, parameters) in PUBLISHED {
        let config = Config::parse(file).unwrap();
        assert_eq!(
            crate::Layout::new(&config).len(),
            parameters,
            "{}",
            config.architecture
        );
        assert_eq!(Config::parse(&config.to_json("bfloat16")), Ok(config));
    }
}

/// The file of a published multimodal Gemma 3, with a shortened `vision_config`.
const GEMMA: &str = r#"{
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3", "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
    "model_type": "gemma3_text", "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024}, "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152}}"#;

#[test]
fn published_files_are_read_as_in_transformers() {
    let llama = Config::parse(LLAMA).unwrap();
    assert_eq!((llama.head_dim(), llama.kv_width()), (64, 512));
    assert_eq!(llama.rope.theta, 500_000.0);
    assert!(matches!(
        llama.rope.scaling,
        RopeScaling::Llama3 { factor: 32.0, .. }
    ));
    assert_eq!(llama.eos_token_ids, [128_001, 128_008, 128_009]);
    assert_eq!(llama.unknown["pretraining_tp"], 1);

    let gemma = Config::parse(GEMMA).unwrap();
    assert_eq!(gemma.architecture, Architecture::Gemma3);
    let sizes = (
        gemma.vocab_size,
        gemma.num_attention_heads,
        gemma.num_key_value_heads,
    );
    assert_eq!(sizes, (262_208, 8, 4));
    assert_eq!(
        (gemma.head_dim(), gemma.attention_scale()),
        (256, 1.0 / 16.0)
    );
    assert_eq!(gemma.eos_token_ids, [1, 106]);
    assert!(gemma.tie_word_embeddings);
    assert_eq!(gemma.rope.scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(gemma.local_rope, Some(Rope::plain(10_000.0)));
    let windows: Vec<_> = (0..7).map(|layer| gemma.window(layer)).collect();
    assert_eq!(windows[4..], [Some(1024), None, Some(1024)]);
    // It is written as the text decoder alone.
    let text: Value = serde_json::from_str(&gemma.to_json("bfloat16")).unwrap();
    assert_eq!(text["architectures"], json!(["Gemma3ForCausalLM"]));
    assert_eq!(Config::parse(&gemma.to_json("bfloat16")), Ok(gemma));
}

#[test]
fn qwen_has_sliding_windows_only_if_its_file_enables_them() {
    let windows = |on: bool, window: Option<Value>| {
        let mut file: Value = serde_json::from_str(&tiny().to_json("float32")).unwrap();
        file["max_window_layers"] = json!(1);
        file["use_sliding_window"] = json!(on);
        if let Some(window) = window {
            file["sliding_window"] = window;
        }
        let config = Config::parse(&file.to_string()).unwrap();
        (config.window(0), config.window(1))
    };
    assert_eq!(windows(false, Some(json!(7))), (None, None));
    assert_eq!(windows(true, Some(json!(7))), (None, Some(7)));
    // As in transformers, a missing key and a null differ.
    assert_eq!(windows(true, None), (None, Some(4096)));
    assert_eq!(windows(true, Some(json!(null))), (None, None));
}

#[test]
fn the_rotary_base_of_transformers_5_is_read() {
    let mut file: Value = serde_json::from_str(&tiny().to_json("float32")).unwrap();
    file["rope_theta"] = Value::Null;
    file["rope_parameters"]["rope_theta"] = json!(5000.0);
    let theta = |file: &Value| Config::parse(&file.to_string()).unwrap().rope.theta;
    assert_eq!(theta(&file), 5000.0);
    file["rope_theta"] = json!(7000.0);
    assert_eq!(theta(&file), 5000.0);
    file["rope_parameters"] = Value::Null;
    assert_eq!(theta(&file), 7000.0);
}

proptest! {
    /// Every value is read or refused; all that is read is within bounds.
    #[test]
    fn no_value_of_any_key_escapes_the_bounds(family in 0usize..5, key in 0usize..64, value in 0usize..14) {
        let mut file: Value = serde_json::from_str(&families()[family].to_json("float32")).unwrap();
        let hostile = [
            json!(null), json!(0), json!(-1), json!(1), json!(3), json!(u64::MAX), json!(1e300), json!(1e-300),
            json!(""), json!([]), json!([1e9]), json!({}), json!({"rope_type": "yarn", "factor": 0.0}), json!(true),
        ];
        let fields = file.as_object_mut().unwrap();
        let key = fields.keys().nth(key % fields.len()).unwrap().clone();
        fields[&key] = hostile[value].clone();
        if let Ok(config) = Config::parse(&file.to_string()) {
            prop_assert!(config.validate().is_ok());
            let frequencies = config.ropes().into_iter().flat_map(|rope| rope.frequencies(config.head_dim()));
            prop_assert!(frequencies.into_iter().all(f32::is_finite));
        }
    }
}
