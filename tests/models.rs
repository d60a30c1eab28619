//! Models from elsewhere: `muster model import` of GGUF files, and what a folder that was imported answers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

use muster_policy::{Architecture, Config, Master, ModelFolder, Storage, Tokenizer};

/// A model small enough to write with every test, in one file or split in two.
fn model() -> BTreeMap<String, Vec<u8>> {
    let config = Config {
        vocab_size: 16,
        hidden_size: 16,
        intermediate_size: 16,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        max_position_embeddings: 32,
        tie_word_embeddings: true,
        eos_token_ids: vec![1],
        ..Architecture::Qwen2.defaults()
    };
    let folder = tempfile::tempdir().unwrap();
    let written = ModelFolder {
        image: Master::init(&config, 1)
            .unwrap()
            .image(Storage::F32)
            .unwrap(),
        tokenizer: Tokenizer::characters("0123456789+=").unwrap(),
        config,
    };
    written.write(folder.path()).unwrap();
    files(folder.path())
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, std::fs::read(path).unwrap())
        })
        .collect()
}

fn muster(words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_muster"));
    command
        .args(words)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap()
}

#[test]
fn an_imported_file_is_a_folder_that_answers_in_its_own_chat_format() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("model");
    let out = out.to_str().unwrap();
    let imported = muster(&[
        "model",
        "import",
        "policy/testdata/gguf/gemma3.gguf",
        "--out",
        out,
        "--dtype",
        "f32",
    ]);
    assert!(
        imported.status.success(),
        "{}",
        String::from_utf8_lossy(&imported.stderr)
    );
    let said = String::from_utf8(imported.stdout).unwrap();
    assert!(
        said.contains("gemma3_text") && said.contains("Q5_0"),
        "{said}"
    );
    let answered = |words: &[&str]| {
        let common = [
            "generate",
            "--model",
            out,
            "--max-tokens",
            "3",
            "--json",
            "--prompt",
        ];
        let output = muster(&[&common[..], words].concat());
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        answer["logprobs"].clone()
    };
    // What the template writes is not added a second time by the tokenizer.
    let spelt = "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n";
    assert_eq!(answered(&["hi", "--chat"]), answered(&[spelt]));
    assert_ne!(answered(&["hi", "--chat"]), answered(&["hi"]));

    let again = muster(&[
        "model",
        "import",
        "policy/testdata/gguf/gemma3.gguf",
        "--out",
        out,
    ]);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("name a new folder"));
}

#[test]
fn a_file_that_is_no_gguf_and_a_model_without_a_template_are_refused_in_one_sentence() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    let refused = |words: &[&str]| {
        let output = muster(words);
        assert_eq!(output.status.code(), Some(1));
        assert!(output.stdout.is_empty());
        String::from_utf8(output.stderr)
            .unwrap()
            .lines()
            .last()
            .unwrap()
            .to_owned()
    };
    let error = refused(&[
        "model",
        "import",
        "Cargo.toml",
        "--out",
        out.to_str().unwrap(),
    ]);
    assert!(
        error.contains("Cargo.toml was not imported") && error.contains("GGUF"),
        "{error}"
    );
    assert!(!out.exists());
    for (name, bytes) in model() {
        std::fs::write(place.path().join(name), bytes).unwrap();
    }
    let folder = place.path().to_str().unwrap();
    let error = refused(&["generate", "--model", folder, "--prompt", "1", "--chat"]);
    assert!(error.contains("no chat template"), "{error}");
}
