//! Models from elsewhere: `muster model import` of GGUF files, and `muster model pull` against a hub on this machine: what
//! it fetches, how it goes on after a transfer broke, what the cache spares it, and in which words it refuses. No public
//! hub was asked.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

#[path = "models/hub.rs"]
mod hub;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use muster_policy::{Architecture, Config, Master, ModelFolder, Storage, Tokenizer};

use self::hub::{Behaviour, COMMIT, Hub};

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

/// Where one test keeps its cache and what it pulled.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn out(&self) -> PathBuf {
        self.0.path().join("out")
    }

    fn pull(&self, endpoint: &str, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_muster"))
            .args(["model", "pull"])
            .args(words)
            .arg("--out")
            .arg(self.out())
            .env_remove("HF_TOKEN")
            .env("HF_HOME", self.0.path().join("home"))
            .env("HF_ENDPOINT", endpoint)
            .output()
            .unwrap()
    }

    fn pulled(&self, hub: &Hub, words: &[&str]) -> String {
        let output = self.pull(hub.address(), words);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The last line of a refusal, which ends with code 1 and leaves no folder.
    fn refused(&self, endpoint: &str, words: &[&str]) -> String {
        let output = self.pull(endpoint, words);
        assert_eq!(output.status.code(), Some(1));
        assert!(output.stdout.is_empty() && !self.out().exists());
        let stderr = String::from_utf8(output.stderr).unwrap();
        stderr.lines().last().unwrap().to_owned()
    }
}

fn hub_with(change: impl FnOnce(&mut Behaviour)) -> Hub {
    let mut behaviour = Behaviour {
        files: model(),
        ..Behaviour::default()
    };
    change(&mut behaviour);
    Hub::start(behaviour)
}

#[test]
fn a_model_is_pulled_once_and_then_comes_from_the_cache() {
    let (hub, place) = (hub_with(|_| ()), Place::new());
    let said = place.pulled(&hub, &["lab/tiny"]);
    assert!(said.contains(COMMIT), "{said}");
    assert_eq!(files(&place.out()), model());
    ModelFolder::read(&place.out()).unwrap();
    // All but the first are asked for at the commit that the first one named.
    let requests = hub.requests();
    let others = requests
        .iter()
        .filter(|line| line.contains("/resolve/") && !line.contains("config.json"));
    assert!(
        others.clone().count() > 3 && others.into_iter().all(|line| line.contains(COMMIT)),
        "{requests:?}"
    );

    std::fs::remove_dir_all(place.out()).unwrap();
    let said = place.pulled(&hub, &["lab/tiny"]);
    assert!(
        said.contains("0.00B received") || said.contains(" 0B received"),
        "{said}"
    );
    assert_eq!(hub.requests().len(), requests.len());
    // The hub is gone, and a commit is as good a name as a branch.
    std::fs::remove_dir_all(place.out()).unwrap();
    let output = place.pull("http://127.0.0.1:9", &["lab/tiny", "--revision", COMMIT]);
    assert!(output.status.success());
    assert_eq!(files(&place.out()), model());

    std::fs::remove_dir_all(place.out()).unwrap();
    place.pulled(&hub, &["lab/tiny", "--fresh"]);
    assert!(hub.requests().len() > requests.len());
    assert!(
        !hub.requests()[requests.len()..]
            .iter()
            .any(|line| line.starts_with("/store/"))
    );
}

#[test]
fn a_split_model_is_pulled_with_the_files_of_its_index() {
    let hub = hub_with(|behaviour| {
        let whole = behaviour.files.remove("model.safetensors").unwrap();
        let name = "model-00001-of-00001.safetensors";
        let (_, metadata) = safetensors_names(&whole);
        let map: BTreeMap<String, &str> =
            metadata.into_iter().map(|tensor| (tensor, name)).collect();
        let index = serde_json::json!({ "weight_map": map }).to_string();
        behaviour.files.insert(name.to_owned(), whole);
        behaviour.files.insert(
            "model.safetensors.index.json".to_owned(),
            index.into_bytes(),
        );
    });
    let place = Place::new();
    place.pulled(&hub, &["lab/tiny", "--revision", "main"]);
    ModelFolder::read(&place.out()).unwrap();
}

/// Names in the header of a safetensors file.
fn safetensors_names(bytes: &[u8]) -> (usize, Vec<String>) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let names = header
        .as_object()
        .unwrap()
        .keys()
        .filter(|key| *key != "__metadata__");
    (length, names.cloned().collect())
}

#[test]
fn a_broken_transfer_goes_on_where_it_ended() {
    let hub = hub_with(|behaviour| behaviour.breaks = Some((1000, 2)));
    let place = Place::new();
    place.pulled(&hub, &["lab/tiny"]);
    assert_eq!(files(&place.out()), model());
    let transfers: Vec<String> = hub
        .requests()
        .into_iter()
        .filter(|line| line.starts_with("/store/"))
        .collect();
    assert_eq!(
        transfers,
        ["bytes=0-", "bytes=1000-", "bytes=2000-"]
            .map(|range| format!("/store/model.safetensors {range}"))
    );
}

#[test]
fn what_came_before_a_pull_ended_is_not_fetched_again() {
    let hub = hub_with(|behaviour| behaviour.breaks = Some((1000, 5)));
    let place = Place::new();
    let error = place.refused(hub.address(), &["lab/tiny"]);
    assert!(
        error.contains("model.safetensors was not received")
            && error.contains("run the same command again"),
        "{error}"
    );
    place.pulled(&hub, &["lab/tiny"]);
    assert_eq!(files(&place.out()), model());
    assert!(
        hub.requests()
            .iter()
            .any(|line| line == "/store/model.safetensors bytes=5000-")
    );
}

#[test]
fn a_hub_without_ranges_is_read_from_the_start_again() {
    let hub = hub_with(|behaviour| {
        behaviour.breaks = Some((1000, 1));
        behaviour.knows_no_ranges = true;
    });
    let place = Place::new();
    place.pulled(&hub, &["lab/tiny"]);
    assert_eq!(files(&place.out()), model());
}

#[test]
fn other_bytes_than_announced_are_dropped() {
    let hub = hub_with(|behaviour| behaviour.lies = true);
    let error = Place::new().refused(hub.address(), &["lab/tiny"]);
    assert!(
        error.contains("SHA-256") && error.contains("model.safetensors"),
        "{error}"
    );
}

#[test]
fn a_name_of_bytes_that_leads_elsewhere_is_refused() {
    for etag in ["../../../../evil", "/tmp/evil", ""] {
        let hub = hub_with(|behaviour| behaviour.etag = Some(etag.to_owned()));
        let error = Place::new().refused(hub.address(), &["lab/tiny"]);
        assert!(error.contains("without a usable ETag"), "{error}");
    }
}

#[test]
fn refusals_name_the_model_and_the_way_out() {
    let open = hub_with(|_| ());
    for (words, parts) in [
        (vec!["lab/none"], ["no model `lab/none`", "HF_TOKEN"]),
        (
            vec!["lab/tiny", "--revision", "v9"],
            ["no revision `v9`", "name a branch"],
        ),
        (vec!["../etc"], ["the id `../etc`", "letters, digits"]),
    ] {
        let error = Place::new().refused(open.address(), &words);
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
    let error = Place::new().refused("http://127.0.0.1:9", &["lab/tiny"]);
    assert!(error.contains("config.json was not received"), "{error}");
    let error = Place::new().refused("127.0.0.1", &["lab/tiny"]);
    assert!(error.contains("begins with https://"), "{error}");
    let bare = hub_with(|behaviour| drop(behaviour.files.remove("tokenizer.json")));
    let error = Place::new().refused(bare.address(), &["lab/tiny"]);
    assert!(error.contains("no tokenizer.json"), "{error}");
    let foreign = hub_with(|behaviour| {
        behaviour.files.insert(
            "config.json".to_owned(),
            br#"{"model_type": "mamba"}"#.to_vec(),
        );
    });
    let error = Place::new().refused(foreign.address(), &["lab/tiny"]);
    assert!(
        error.contains("mamba") && error.contains("qwen2"),
        "{error}"
    );
    assert!(
        !foreign
            .requests()
            .iter()
            .any(|line| line.contains("safetensors"))
    );
}

#[test]
fn a_gated_model_needs_the_token() {
    let hub = hub_with(|behaviour| behaviour.token = Some("secret".to_owned()));
    let place = Place::new();
    let error = place.refused(hub.address(), &["lab/tiny"]);
    assert!(
        error.contains("status 401") && error.contains("HF_TOKEN"),
        "{error}"
    );
    let home = place.0.path().join("home");
    std::fs::create_dir_all(&home).unwrap();
    std::fs::write(home.join("token"), "secret\n").unwrap();
    place.pulled(&hub, &["lab/tiny"]);
}

#[test]
fn a_folder_that_holds_a_model_is_not_written_over() {
    let (hub, place) = (hub_with(|_| ()), Place::new());
    place.pulled(&hub, &["lab/tiny"]);
    let output = place.pull(hub.address(), &["lab/tiny"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("name a new folder"));
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
