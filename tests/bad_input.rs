//! Bad input: whatever is missing, mistyped, damaged, taken, full or refused ends in one sentence that names it and the way
//! out, with exit code 1, nothing on stdout and no panic.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

#[path = "bad_input/command.rs"]
mod command;
#[path = "bad_input/disk.rs"]
mod disk;
#[path = "bad_input/place.rs"]
mod place;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use muster_protocol::identity::Identity;
use muster_protocol::nats_server::{Member, NatsServer, ServerConfig};
use muster_protocol::subject::Role;

use self::command::{muster, refusal, refusal_after, usage_error};
use self::disk::{SmallDisk, on_small_disk};
use self::place::{CONFIG, Place, finished_run, text};

/// What `muster local` says to a configuration.
fn refused_configuration(place: &Place, config: &str) -> String {
    let path = place.write("config.toml", config);
    let dir = place.path("run");
    refusal(&["local", text(&path), "--dir", text(&dir), "--quiet"])
}

/// What `muster local` says to a starting policy that `damage` was done to.
fn refused_model(damage: impl FnOnce(&Path)) -> String {
    let place = Place::new();
    let model = place.copy_of_the_model();
    damage(&model);
    refused_configuration(&place, &place.config_with(&model))
}

fn assert_says(sentence: &str, parts: &[&str]) {
    for part in parts {
        assert!(sentence.contains(part), "{part:?} is not in {sentence:?}");
    }
}

#[test]
fn a_mistyped_key_is_named_with_its_line() {
    let found = refused_configuration(&Place::new(), &CONFIG.replace("steps", "setps"));
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
    let without = CONFIG.replace("[task]\ntype = \"running_sums\"", "");
    let found = refused_configuration(&Place::new(), &without);
    assert_says(&found, &["missing field `task`", "add it"]);
}

#[test]
fn a_missing_configuration_is_named() {
    let found = refusal(&["local", "/nowhere/run.toml"]);
    assert_says(
        &found,
        &["/nowhere/run.toml", "No such file", "check the path"],
    );
}

#[test]
fn a_value_of_the_wrong_kind_is_named() {
    let found = refused_configuration(
        &Place::new(),
        &CONFIG.replace("steps = 1", "steps = \"one\""),
    );
    assert_says(&found, &["config.toml:4", "one", "expected"]);
}

#[test]
fn top_p_is_refused_with_its_reason() {
    let config = CONFIG.replace("[sampling]", "[sampling]\ntop_p = 0.9");
    let found = refused_configuration(&Place::new(), &config);
    assert_says(&found, &["`sampling.top_p`", "critics", "take them out"]);
}

#[test]
fn audits_without_a_critic_are_refused() {
    let config = format!("{CONFIG}\n[local]\ncritics = 0\n[dispatch.audit]\nshare_min = 0.1\n");
    let found = refused_configuration(&Place::new(), &config);
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
    let config = CONFIG.replace(
        "type = \"running_sums\"",
        "type = \"jsonl\"\nfile = \"tasks.jsonl\"",
    );
    let found = refused_configuration(&Place::new(), &config);
    assert_says(&found, &["tasks.jsonl", "No such file"]);
}

#[test]
fn a_task_file_with_a_line_that_is_no_json_is_named_with_the_line() {
    let place = Place::new();
    let config = CONFIG.replace(
        "type = \"running_sums\"",
        "type = \"jsonl\"\nfile = \"tasks.jsonl\"",
    );
    place.write(
        "tasks.jsonl",
        "{\"prompt\": \"1+1=\", \"gold\": \"2\"}\n{\"prompt\": \"1+2=\", \"gold\n",
    );
    let found = refused_configuration(&place, &config);
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
fn a_bus_that_nobody_answers_at_is_named() {
    let credentials = finished_run().join("credentials/worker-1.json");
    let words = [
        "rollout",
        "--creds",
        text(&credentials),
        "--nats",
        "nats://127.0.0.1:1",
    ];
    assert_says(
        &refusal(&words),
        &["nats://127.0.0.1:1", "no NATS server answers", "start it"],
    );
}

#[test]
fn credentials_that_the_server_does_not_know_are_refused() {
    let place = Place::new();
    let member = Member {
        user: Identity::generate().login_user(),
        role: Role::Worker,
    };
    let mut config = ServerConfig::new(&"bad".parse().unwrap(), &place.path("nats"), vec![member]);
    config.project = env!("CARGO_MANIFEST_DIR").into();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime
        .block_on(NatsServer::start(&config))
        .unwrap_or_else(|error| panic!("{error}"));
    let credentials = finished_run().join("credentials/worker-1.json");
    let found = refusal(&[
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
    let place = Place::new();
    let path = place.path("worker.json");
    fs::copy(finished_run().join("credentials/worker-1.json"), &path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let found = refusal(&["rollout", "--creds", text(&path)]);
    assert_says(&found, &["worker.json", "mode 644", "chmod 600"]);
}

#[test]
fn credentials_that_are_none_are_named() {
    let found = refusal(&["rollout", "--creds", "/nowhere/worker.json"]);
    assert_says(
        &found,
        &["/nowhere/worker.json", "No such file", "check the path"],
    );
    let place = Place::new();
    let path = place.write("worker.json", "{");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let found = refusal(&["rollout", "--creds", text(&path)]);
    assert_says(&found, &["worker.json", "not a credentials file", "line 1"]);
}

#[test]
fn credentials_of_another_role_are_refused() {
    let credentials = finished_run().join("credentials/worker-1.json");
    let found = refusal(&["critic", "--creds", text(&credentials)]);
    assert_says(&found, &["worker-1.json", "worker", "critic", "--creds"]);
}

#[test]
fn a_port_that_is_taken_is_named() {
    let place = Place::new();
    let other = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = other.local_addr().unwrap().port();
    let config = format!(
        "{}\n[local]\nport = {port}\n",
        place.config_with(place::model())
    );
    let found = refused_configuration(&place, &config);
    assert_says(
        &found,
        &[&format!("port {port} is taken"), "choose another"],
    );
}

#[test]
fn a_run_directory_of_another_configuration_is_refused_and_left_as_it_is() {
    let place = Place::new();
    let before = fs::read(finished_run().join("config.toml")).unwrap();
    let config = place
        .config_with(place::model())
        .replace("seed = 1", "seed = 2");
    let path = place.write("config.toml", &config);
    let found = refusal(&["local", text(&path), "--dir", text(finished_run())]);
    assert_says(&found, &["another configuration", "--dir"]);
    assert_eq!(
        fs::read(finished_run().join("config.toml")).unwrap(),
        before
    );
}

#[test]
fn a_snapshot_with_one_flipped_byte_is_named_with_the_place() {
    let place = Place::new();
    let folder = place.path("1");
    place::copy(&finished_run().join("checkpoints/1"), &folder);
    let run = finished_run();
    let words = ["snapshot", "verify", text(&folder), "--run", text(run)];
    let whole = muster(&words).output().unwrap();
    assert!(
        whole.status.success(),
        "{}",
        String::from_utf8_lossy(&whole.stderr)
    );
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
        assert_says(&refusal(&words), &[name]);
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
    let place = Place::new();
    let config = place.write("config.toml", &place.config_with(place::model()));
    let dir = disk.path().join("run");
    fs::write(disk.path().join("ballast"), vec![0u8; 100 << 10]).unwrap();
    let found = refusal(&["local", text(&config), "--dir", text(&dir), "--quiet"]);
    assert_says(&found, &[text(&dir), "No space left", "free space"]);
}

/// The same command goes on with the run once there is room.
#[test]
fn a_disk_that_fills_up_during_a_run_loses_nothing() {
    on_small_disk(
        "a_disk_that_fills_up_during_a_run_loses_nothing",
        8 << 20,
        full_during_a_run,
    );
}

fn full_during_a_run(disk: &SmallDisk) {
    let place = Place::new();
    let steps = 40;
    let config = place
        .config_with(place::model())
        .replace("steps = 1\n", &format!("steps = {steps}\n"));
    let config = place.write("config.toml", &config);
    let dir = disk.path().join("run");
    let words = ["local", text(&config), "--dir", text(&dir), "--quiet"];
    let found = refusal_after(&words, || {
        if place::lines(&dir.join("metrics.jsonl")) == 0 {
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
    place::succeed(&words);
    assert_eq!(place::lines(&dir.join("metrics.jsonl")), steps);
    let selections = fs::read_to_string(dir.join("selections.jsonl")).unwrap();
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
