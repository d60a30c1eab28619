//! Bad input: a command refuses a missing, mistyped or damaged file, a taken port or a full disk with one sentence that
//! names it and the way out, with exit code 1, nothing on standard output and no panic.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

#[path = "bad_input/disk.rs"]
mod disk;
#[path = "bad_input/fixtures.rs"]
mod fixtures;
mod harness;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use muster_protocol::identity::Identity;
use muster_protocol::nats_server::{Member, NatsServer, ServerConfig};
use muster_protocol::subject::Role;

use self::disk::{SmallDisk, on_small_disk};
use self::fixtures::{
    TestDir, config, config_with, finished_run, model, refused, refused_after, usage_error,
};
use self::harness::{copy_files, lines, muster, succeed, text};

/// The sentence with which `muster local` refuses a configuration.
fn refused_configuration(dir: &TestDir, config: &str) -> String {
    let path = dir.write("config.toml", config);
    let run = dir.path("run");
    refused(&["local", text(&path), "--dir", text(&run), "--quiet"])
}

/// The sentence with which `muster local` refuses a starting policy after `damage`.
fn refused_model(damage: impl FnOnce(&Path)) -> String {
    let dir = TestDir::new();
    let model = dir.copy_of_the_model();
    damage(&model);
    refused_configuration(&dir, &config_with(&model))
}

fn assert_says(sentence: &str, parts: &[&str]) {
    for part in parts {
        assert!(sentence.contains(part), "{part:?} is not in {sentence:?}");
    }
}

#[test]
fn a_mistyped_key_is_named_with_its_line() {
    let found = refused_configuration(&TestDir::new(), &config().replace("steps", "setps"));
    assert_says(
        &found,
        &[
            "config.toml:4",
            "unknown field `setps`",
            "`steps`",
            "correct the key",
        ],
    );
}

#[test]
fn a_missing_key_is_named() {
    let without = config().replace("[task]\ntype = \"running_sums\"", "");
    let found = refused_configuration(&TestDir::new(), &without);
    assert_says(&found, &["missing field `task`", "add it"]);
}

#[test]
fn a_missing_configuration_is_named() {
    let found = refused(&["local", "/nowhere/run.toml"]);
    assert_says(
        &found,
        &["/nowhere/run.toml", "No such file", "check the path"],
    );
}

#[test]
fn a_value_of_the_wrong_type_is_named() {
    let found = refused_configuration(
        &TestDir::new(),
        &config().replace("steps = 1", "steps = \"one\""),
    );
    assert_says(&found, &["config.toml:4", "one", "expected"]);
}

#[test]
fn top_p_is_refused_with_its_reason() {
    let config = config().replace("[sampling]", "[sampling]\ntop_p = 0.9");
    let found = refused_configuration(&TestDir::new(), &config);
    assert_says(&found, &["`sampling.top_p`", "critics", "take them out"]);
}

#[test]
fn audits_without_a_critic_are_refused() {
    let config = format!(
        "{}\n[local]\ncritics = 0\n[dispatch.audit]\nshare_min = 0.1\n",
        config()
    );
    let found = refused_configuration(&TestDir::new(), &config);
    assert_says(
        &found,
        &[
            "`dispatch.audit.share_min` is 0.1",
            "`local.critics` is 0",
            "1 or more",
        ],
    );
}

#[test]
fn a_task_file_that_is_missing_is_named() {
    let config = config().replace(
        "type = \"running_sums\"",
        "type = \"jsonl\"\nfile = \"tasks.jsonl\"",
    );
    let found = refused_configuration(&TestDir::new(), &config);
    assert_says(&found, &["tasks.jsonl", "No such file"]);
}

#[test]
fn a_line_of_a_task_file_that_is_not_json_is_named() {
    let dir = TestDir::new();
    let config = config().replace(
        "type = \"running_sums\"",
        "type = \"jsonl\"\nfile = \"tasks.jsonl\"",
    );
    dir.write(
        "tasks.jsonl",
        "{\"prompt\": \"1+1=\", \"gold\": \"2\"}\n{\"prompt\": \"1+2=\", \"gold\n",
    );
    let found = refused_configuration(&dir, &config);
    assert_says(
        &found,
        &["tasks.jsonl:2", "not one JSON object", "write it as"],
    );
}

#[test]
fn a_model_folder_without_a_tokenizer_is_named() {
    let found = refused_model(|model| fs::remove_file(model.join("tokenizer.json")).unwrap());
    assert_says(&found, &["tokenizer.json is missing", "copy it"]);
}

#[test]
fn a_model_folder_that_is_not_there_is_named() {
    let found = refused_model(|model| fs::remove_dir_all(model).unwrap());
    assert_says(&found, &["model", "missing"]);
}

#[test]
fn a_tokenizer_with_more_ids_than_the_model_has_rows_is_named() {
    let found = refused_model(|model| {
        let path = model.join("tokenizer.json");
        let tokenizer = fs::read_to_string(&path).unwrap();
        let mut tokenizer: serde_json::Value = serde_json::from_str(&tokenizer).unwrap();
        tokenizer["model"]["vocab"]["Z"] = 40.into();
        fs::write(&path, tokenizer.to_string()).unwrap();
    });
    assert_says(
        &found,
        &["`Z`", "40", "vocab_size = 32", "of the same model"],
    );
}

#[test]
fn weights_for_another_vocabulary_are_named() {
    let found = refused_model(|model| {
        let path = model.join("config.json");
        let config = fs::read_to_string(&path).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
        config["vocab_size"] = 24.into();
        fs::write(&path, config.to_string()).unwrap();
    });
    assert_says(
        &found,
        &[
            "model.embed_tokens.weight",
            "[32, 32]",
            "[24, 32]",
            "of the same model",
        ],
    );
}

#[test]
fn a_truncated_weights_file_is_named() {
    let found = refused_model(|model| {
        let path = model.join("model.safetensors");
        let length = fs::metadata(&path).unwrap().len();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(length - 100).unwrap();
    });
    assert_says(&found, &["truncated", "tensor", "fetch them again"]);
}

#[test]
fn a_weights_file_without_a_header_is_named() {
    let found = refused_model(|model| {
        fs::write(model.join("model.safetensors"), [0xff; 64]).unwrap();
    });
    assert_says(&found, &["model"]);
}

#[test]
fn an_address_without_a_nats_server_is_named() {
    let credentials = finished_run().join("credentials/worker-1.json");
    let words = [
        "rollout",
        "--creds",
        text(&credentials),
        "--nats",
        "nats://127.0.0.1:1",
    ];
    assert_says(
        &refused(&words),
        &["nats://127.0.0.1:1", "no NATS server answers", "start it"],
    );
}

#[test]
fn credentials_that_the_server_does_not_know_are_refused() {
    let dir = TestDir::new();
    let member = Member {
        user: Identity::generate().login_user(),
        role: Role::Worker,
    };
    let mut server = ServerConfig::new(&"bad".parse().unwrap(), &dir.path("nats"), vec![member]);
    server.project = env!("CARGO_MANIFEST_DIR").into();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime
        .block_on(NatsServer::start(&server))
        .unwrap_or_else(|error| panic!("{error}"));
    let credentials = finished_run().join("credentials/worker-1.json");
    let found = refused(&[
        "rollout",
        "--creds",
        text(&credentials),
        "--nats",
        &server.url(),
    ]);
    assert_says(&found, &[&server.url(), "credentials"]);
    runtime.block_on(server.stop());
}

#[test]
fn credentials_that_others_can_read_are_refused() {
    let dir = TestDir::new();
    let path = dir.path("worker.json");
    fs::copy(finished_run().join("credentials/worker-1.json"), &path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let found = refused(&["rollout", "--creds", text(&path)]);
    assert_says(&found, &["worker.json", "mode 644", "chmod 600"]);
}

#[test]
fn missing_and_malformed_credentials_are_named() {
    let found = refused(&["rollout", "--creds", "/nowhere/worker.json"]);
    assert_says(
        &found,
        &["/nowhere/worker.json", "No such file", "check the path"],
    );
    let dir = TestDir::new();
    let path = dir.write("worker.json", "{");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let found = refused(&["rollout", "--creds", text(&path)]);
    assert_says(&found, &["worker.json", "not a credentials file", "line 1"]);
}

#[test]
fn credentials_of_another_role_are_refused() {
    let credentials = finished_run().join("credentials/worker-1.json");
    let found = refused(&["critic", "--creds", text(&credentials)]);
    assert_says(&found, &["worker-1.json", "worker", "critic", "--creds"]);
}

#[test]
fn a_port_that_is_taken_is_named() {
    let dir = TestDir::new();
    let other = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = other.local_addr().unwrap().port();
    let config = format!("{}\n[local]\nport = {port}\n", config_with(model()));
    let found = refused_configuration(&dir, &config);
    assert_says(
        &found,
        &[&format!("port {port} is taken"), "choose another"],
    );
}

#[test]
fn a_run_directory_of_another_configuration_is_refused_and_not_changed() {
    let dir = TestDir::new();
    let before = fs::read(finished_run().join("config.toml")).unwrap();
    let config = config_with(model()).replace("seed = 1", "seed = 2");
    let path = dir.write("config.toml", &config);
    let found = refused(&["local", text(&path), "--dir", text(finished_run())]);
    assert_says(&found, &["another configuration", "--dir"]);
    assert_eq!(
        fs::read(finished_run().join("config.toml")).unwrap(),
        before
    );
}

#[test]
fn a_flipped_byte_of_a_snapshot_is_named_with_its_file() {
    let dir = TestDir::new();
    let folder = dir.path("1");
    copy_files(&finished_run().join("checkpoints/1"), &folder);
    let run = finished_run();
    let words = ["snapshot", "verify", text(&folder), "--run", text(run)];
    succeed(&mut muster(&words));
    for name in [
        "model.safetensors",
        "tokenizer.json",
        "config.json",
        "manifest.json",
    ] {
        let path = folder.join(name);
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        let at = flipped.len() * 2 / 3;
        flipped[at] ^= 1;
        fs::write(&path, flipped).unwrap();
        assert_says(&refused(&words), &[name]);
        fs::write(&path, whole).unwrap();
    }
}

#[test]
fn a_disk_that_is_full_from_the_start_is_named() {
    on_small_disk(
        "a_disk_that_is_full_from_the_start_is_named",
        128 << 10,
        full_from_the_start,
    );
}

fn full_from_the_start(disk: &SmallDisk) {
    let dir = TestDir::new();
    let config = dir.write("config.toml", &config_with(model()));
    let run = disk.path().join("run");
    fs::write(disk.path().join("ballast"), vec![0u8; 100 << 10]).unwrap();
    let found = refused(&["local", text(&config), "--dir", text(&run), "--quiet"]);
    assert_says(&found, &[text(&run), "No space left", "free space"]);
}

/// Once there is room, the same command resumes the run.
#[test]
fn a_disk_that_fills_up_during_a_run_loses_nothing() {
    on_small_disk(
        "a_disk_that_fills_up_during_a_run_loses_nothing",
        8 << 20,
        full_during_a_run,
    );
}

fn full_during_a_run(disk: &SmallDisk) {
    let dir = TestDir::new();
    let steps = 40;
    let config = config_with(model()).replace("steps = 1\n", &format!("steps = {steps}\n"));
    let config = dir.write("config.toml", &config);
    let run = disk.path().join("run");
    let words = ["local", text(&config), "--dir", text(&run), "--quiet"];
    let found = refused_after(&words, || {
        if lines(&run.join("metrics.jsonl")) == 0 {
            return false;
        }
        disk.fill();
        true
    });
    assert_says(
        &found,
        &["o space left on device", "free", text(disk.path())],
    );
    disk.empty();
    succeed(&mut muster(&words));
    assert_eq!(lines(&run.join("metrics.jsonl")), steps);
    let selections = fs::read_to_string(run.join("selections.jsonl")).unwrap();
    let trained = selections.matches("\"fate\":\"trained\"").count();
    assert_eq!(trained, 8 * steps);
}

#[test]
fn wrong_usage_exits_with_2() {
    usage_error(&["local", "--nonsense"]);
    usage_error(&["rollout"]);
    usage_error(&["no-such-command"]);
    usage_error(&["local", "--steps", "0"]);
}
