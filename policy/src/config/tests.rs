use proptest::prelude::*;
use serde_json::json;

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
fn what_would_change_the_function_is_refused_by_name() {
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
fn keys_of_other_software_come_back_as_they_were() {
    for config in families() {
        let mut file: Value = serde_json::from_str(&config.to_json("float32")).unwrap();
        file["initializer_range"] = json!(0.02);
        file["somebody's"] = json!({"nested": [1, null, "x"]});
        let read = Config::parse(&file.to_string()).unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&read.to_json("float32")).unwrap(),
            file
        );
        // What is hashed must not change with every reading.
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

/// The whole file, but for the images' part, of a published Gemma 3 of images and text.
const GEMMA: &str = r#"{
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3", "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
    "model_type": "gemma3_text", "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024}, "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152}}"#;

#[test]
fn published_files_are_read_as_transformers_reads_them() {
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
    // It is written as the text decoder that it is here.
    let text: Value = serde_json::from_str(&gemma.to_json("bfloat16")).unwrap();
    assert_eq!(text["architectures"], json!(["Gemma3ForCausalLM"]));
    assert_eq!(Config::parse(&gemma.to_json("bfloat16")), Ok(gemma));
}

#[test]
fn the_windows_of_qwen_are_off_unless_its_file_turns_them_on() {
    let file = |on: bool| {
        let mut file: Value = serde_json::from_str(&tiny().to_json("float32")).unwrap();
        file["sliding_window"] = json!(7);
        file["max_window_layers"] = json!(1);
        file["use_sliding_window"] = json!(on);
        Config::parse(&file.to_string()).unwrap()
    };
    assert_eq!((file(false).window(0), file(false).window(1)), (None, None));
    assert_eq!(
        (file(true).window(0), file(true).window(1)),
        (None, Some(7))
    );
}

#[test]
fn the_rotary_base_is_found_where_transformers_5_keeps_it() {
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
    /// Whatever stands in a file, it is read or refused; what is read is within bounds.
    #[test]
    fn no_value_of_any_key_can_do_harm(family in 0usize..5, key in 0usize..64, value in 0usize..14) {
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
