use std::path::PathBuf;

use half::bf16;
use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::config::{Architecture, RopeScaling};
use crate::folder::ModelFolder;

const NAMES: [&str; 3] = ["llama", "gemma3", "qwen2"];

fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata")
        .join(name)
}

fn bytes_of(name: &str) -> Vec<u8> {
    std::fs::read(testdata(&format!("gguf/{name}.gguf"))).unwrap()
}

fn json_of(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(testdata(name)).unwrap()).unwrap()
}

fn imported(name: &str, storage: Storage) -> (GgufImport, ModelFolder) {
    let folder = tempfile::tempdir().unwrap();
    let file = testdata(&format!("gguf/{name}.gguf"));
    let import = import_gguf(&file, folder.path(), storage).unwrap();
    (import, ModelFolder::read(folder.path()).unwrap())
}

/// The error of importing damaged bytes.
fn refused(bytes: &[u8]) -> GgufError {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    std::fs::write(&file, bytes).unwrap();
    import_gguf(&file, &folder.path().join("out"), Storage::F32).unwrap_err()
}

/// The file with the first `from` replaced by `to`, of the same length.
fn replaced(name: &str, from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = bytes_of(name);
    let at = bytes.windows(from.len()).position(|window| window == from);
    let at = at.unwrap();
    bytes[at..at + to.len()].copy_from_slice(to);
    bytes
}

fn fnv(bytes: &[u8]) -> String {
    let digest = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |digest, &byte| {
            (digest ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
    format!("{digest:016x}")
}

#[test]
fn widened_values_equal_those_of_the_gguf_package_bit_for_bit() {
    let expected = json_of("gguf/expected.json");
    let mut types = BTreeMap::new();
    for name in NAMES {
        let (import, model) = imported(name, Storage::F32);
        types.extend(import.types);
        let expected = expected[name].as_object().unwrap();
        assert_eq!(model.image.tensors().len(), expected.len());
        for entry in model.image.tensors() {
            let found = fnv(&model.image.bytes()[entry.bytes.clone()]);
            assert_eq!(
                found,
                expected[&entry.name].as_str().unwrap(),
                "{name}: {}",
                entry.name
            );
        }
    }
    let types: Vec<&str> = types.keys().map(String::as_str).collect();
    let every = [
        "BF16", "F16", "F32", "Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K",
        "Q6_K", "Q8_0",
    ];
    assert_eq!(types, every);
}

#[test]
fn bf16_import_rounds_the_widened_values() {
    let (_, exact) = imported("gemma3", Storage::F32);
    let (_, rounded) = imported("gemma3", Storage::Bf16);
    let expected: Vec<f32> = exact
        .image
        .values()
        .iter()
        .map(|&value| bf16::from_f32(value).to_f32())
        .collect();
    assert_eq!(rounded.image.values(), expected);
}

#[test]
fn the_published_configuration_is_rebuilt() {
    let (llama, _) = imported("llama", Storage::Bf16);
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    assert_eq!(llama.config.architecture, Architecture::Llama);
    assert_eq!(
        (llama.config.rope.scaling, llama.config.rope.theta),
        (scaling, 500_000.0)
    );
    assert_eq!(
        (llama.config.rms_norm_eps, llama.config.tie_word_embeddings),
        (1e-6, true)
    );
    let (gemma, _) = imported("gemma3", Storage::Bf16);
    assert_eq!(gemma.config.sliding_window, Some(16));
    assert_eq!(gemma.config.query_pre_attn_scalar, Some(16.0));
    assert_eq!(gemma.config.local_rope.as_ref().unwrap().theta, 10_000.0);
    assert_eq!(gemma.config.window(4), Some(16));
    assert_eq!(gemma.config.window(5), None);
    let (qwen, _) = imported("qwen2", Storage::Bf16);
    assert!(!qwen.config.tie_word_embeddings);
}

#[test]
fn the_rebuilt_tokenizer_gives_the_ids_that_transformers_gives() {
    for (name, vocabulary) in [("llama", "llama"), ("gemma3", "gemma"), ("qwen2", "qwen2")] {
        let (import, model) = imported(name, Storage::Bf16);
        let expected = json_of(&format!("tokenizers/{vocabulary}-expected.json"));
        for case in expected["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids = |key: &str| serde_json::from_value::<Vec<u32>>(case[key].clone()).unwrap();
            assert_eq!(
                model.tokenizer.encode(text).unwrap(),
                ids("plain"),
                "{name}: {text:?}"
            );
            assert_eq!(
                model.tokenizer.encode_prompt(text).unwrap(),
                ids("prompt"),
                "{name}: {text:?}"
            );
            let decoded = model.tokenizer.decode(&ids("plain")).unwrap();
            assert_eq!(
                decoded,
                case["decoded"].as_str().unwrap(),
                "{name}: {text:?}"
            );
        }
        model.tokenizer.chat_template().unwrap();
        assert_eq!(import.config.eos_token_ids, model.config.eos_token_ids);
        assert!(!import.config.eos_token_ids.is_empty());
    }
    let (_, gemma) = imported("gemma3", Storage::Bf16);
    let end = gemma.tokenizer.id("<end_of_turn>").unwrap();
    assert!(gemma.config.eos_token_ids.contains(&end));
}

#[test]
fn unsupported_metadata_and_tensors_are_refused_by_name() {
    for (bytes, expected) in [
        (
            replaced(
                "qwen2",
                b"\x05\0\0\0\0\0\0\0qwen2",
                b"\x05\0\0\0\0\0\0\0qwen9",
            ),
            "`qwen9`",
        ),
        (
            replaced("qwen2", b"qwen2.rope.freq_base", b"qwen2.rope.freq_bass"),
            "`qwen2.rope.freq_bass`",
        ),
        (
            replaced("gemma3", b"blk.2.attn_q.weight", b"blk.2.attn_x.weight"),
            "`blk.2.attn_q.weight`",
        ),
        (
            replaced("llama", b"rope_freqs.weight", b"rope_frexs.weight"),
            "`rope_frexs.weight`",
        ),
        (replaced("llama", b"llama-bpe", b"llama-bpx"), "`llama-bpx`"),
        (
            replaced("llama", b"llama.block_count", b"llama.block_coumt"),
            "`llama.block_coumt`",
        ),
        (replaced("llama", b"GGUF", b"GGML"), "does not begin with"),
    ] {
        let error = refused(&bytes).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
    // The type follows the name, the number of axes and two axes.
    let mut bytes = bytes_of("qwen2");
    let name = b"blk.0.ffn_up.weight";
    let at = bytes
        .windows(name.len())
        .position(|window| window == name)
        .unwrap()
        + name.len()
        + 4
        + 16;
    bytes[at..at + 4].copy_from_slice(&19u32.to_le_bytes());
    let error = refused(&bytes);
    assert!(
        matches!(&error, GgufError::Type { tensor, found } if tensor == "blk.0.ffn_up.weight" && found == "IQ1_S"),
        "{error}"
    );
}

#[test]
fn a_truncated_file_is_refused_by_name_and_nothing_is_written() {
    let bytes = bytes_of("qwen2");
    for length in [0, 3, 4, 23, 24, 100, 5000, bytes.len() / 2] {
        let error = refused(&bytes[..length]);
        assert!(
            matches!(error, GgufError::Malformed(_)),
            "{length}: {error}"
        );
    }
    let error = refused(&bytes[..bytes.len() - 4096]).to_string();
    assert!(
        error.contains("fetch it again") && error.contains("tensor `"),
        "{error}"
    );
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("f.gguf"), folder.path().join("out"));
    std::fs::write(&file, &bytes[..bytes.len() - 4096]).unwrap();
    import_gguf(&file, &out, Storage::F32).unwrap_err();
    assert!(!out.exists());
}

#[test]
fn announced_counts_do_not_size_allocations() {
    let header = |tensors: u64, keys: u64| {
        [
            &b"GGUF"[..],
            &3u32.to_le_bytes(),
            &tensors.to_le_bytes(),
            &keys.to_le_bytes(),
        ]
        .concat()
    };
    let key = |kind: u32| [&1u64.to_le_bytes()[..], b"k", &kind.to_le_bytes()].concat();
    let list = |kind: u32, count: u64| [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
    for bytes in [
        header(u64::MAX, 0),
        header(0, u64::MAX),
        [header(0, 1), u64::MAX.to_le_bytes().to_vec()].concat(),
        [header(0, 1), key(8), u64::MAX.to_le_bytes().to_vec()].concat(),
        [header(0, 1), key(9), list(0, u64::MAX)].concat(),
        [header(0, 1), key(9), list(8, 1 << 40)].concat(),
        [header(0, 1), key(9), list(9, 1)].concat(),
        [header(0, 1), key(77)].concat(),
    ] {
        assert!(matches!(
            Container::parse(&bytes),
            Err(GgufError::Malformed(_))
        ));
    }
}

#[test]
fn a_value_that_is_not_finite_is_refused_by_tensor() {
    let mut bytes = bytes_of("qwen2");
    let container = Container::parse(&bytes).unwrap();
    let data = container.tensors["output_norm.weight"].bytes;
    let at = data.as_ptr() as usize - bytes.as_ptr() as usize;
    bytes[at + 8..at + 12].copy_from_slice(&f32::NAN.to_le_bytes());
    let error = refused(&bytes);
    assert!(
        matches!(&error, GgufError::NotFinite { tensor, element: 2 } if tensor == "output_norm.weight"),
        "{error}"
    );
}

#[test]
fn interleaved_rows_are_put_back_in_order() {
    // Two heads of width 6: the file stores the pairs (0, 3), (1, 4), (2, 5) side by side.
    let rows: Vec<usize> = (0..12).map(|row| interleaved_row(row, 6)).collect();
    assert_eq!(rows, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn altered_bytes_never_panic(place in 0.0f64..1.0, in_header: bool, value: u8, cut in 0usize..200) {
        for name in NAMES {
            let mut bytes = bytes_of(name);
            // Most of a file is weights, where every byte is valid.
            let span = if in_header { 700 } else { bytes.len() };
            bytes[(place * span as f64) as usize] = value;
            bytes.truncate(bytes.len() - cut);
            if let Ok(container) = Container::parse(&bytes)
                && let Ok(description) = Description::new(&container)
                && let Ok(config) = description.config()
            {
                drop(match_tensors(&container, &description, &config, &Layout::new(&config)));
                if let Ok(vocabulary) = Vocabulary::new(&container, config.architecture) {
                    drop(vocabulary.settings(&config));
                }
            }
        }
    }
}
