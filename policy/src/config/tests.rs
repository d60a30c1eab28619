use super::*;
use crate::testing::tiny;

#[test]
fn a_config_survives_writing_and_reading() {
    let mut config = tiny();
    config.eos_token_ids = vec![1, 3];
    config.pad_token_id = Some(0);
    assert_eq!(Config::parse(&config.to_json("float32")), Ok(config));
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
fn a_rotary_table_that_would_fill_the_memory_is_refused() {
    let config = Config {
        max_position_embeddings: 1 << 21,
        hidden_size: 4096,
        ..tiny()
    };
    let error = config.validate().unwrap_err().to_string();
    assert!(error.contains("max_position_embeddings"), "{error}");
}

#[test]
fn features_that_do_not_run_are_refused() {
    for (key, value) in [
        ("hidden_act", json!("gelu")),
        ("use_sliding_window", json!(true)),
        ("rope_scaling", json!({"type": "yarn", "factor": 4.0})),
        ("head_dim", json!(128)),
        ("layer_types", json!(["sliding_attention"])),
    ] {
        let mut file: Value = serde_json::from_str(&tiny().to_json("float32")).unwrap();
        file[key] = value;
        let error = Config::parse(&file.to_string()).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn the_rotary_base_is_found_where_transformers_5_keeps_it() {
    let mut file: Value = serde_json::from_str(&tiny().to_json("float32")).unwrap();
    file["rope_theta"] = Value::Null;
    file["rope_parameters"]["rope_theta"] = json!(5000.0);
    assert_eq!(Config::parse(&file.to_string()).unwrap().rope_theta, 5000.0);
}
