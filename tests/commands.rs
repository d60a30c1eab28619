//! The commands as a user types them: what they print, how they refuse, and their exit code.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod harness;
#[path = "commands/runs.rs"]
mod runs;
#[path = "commands/serve.rs"]
mod serve;
#[path = "commands/split.rs"]
mod split;

use std::fs;
use std::path::Path;
use std::process::Output;

use serde_json::Value;

use self::harness::{copy_files, refusal, stderr, success, text};
use self::runs::{LiveRun, finished, json_lines, local, pulled};

/// Runs `muster` in `folder` to its end.
fn muster(folder: &Path, arguments: &[&str]) -> Output {
    harness::muster_in(folder, arguments).output().unwrap()
}

#[test]
fn a_finished_runs_checkpoints_are_listed_pulled_and_verified() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["snapshot", "list", "--run", "run", "--json"];
    let listed = json_lines(&success(&muster(finished(), &arguments)));
    let versions: Vec<u64> = listed
        .iter()
        .map(|line| line["policy_version"].as_u64().unwrap())
        .collect();
    assert_eq!(versions, [0, 2, 4]);
    assert!(listed[2]["accuracy"].is_number() && listed[1]["accuracy"].is_null());

    let out = pulled(folder.path());
    for name in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "manifest.json",
    ] {
        assert!(out.join(name).is_file(), "{name} is missing");
    }
    let out = text(&out);
    let verified = muster(
        finished(),
        &["snapshot", "verify", out, "--run", "run", "--json"],
    );
    let report = &json_lines(&success(&verified))[0];
    assert_eq!(report["policy_version"], 4);
    let learner = report["learner"].as_str().unwrap();
    success(&muster(
        folder.path(),
        &["snapshot", "verify", out, "--learner", learner],
    ));

    let stranger = "5".repeat(64);
    let arguments = ["snapshot", "verify", out, "--learner", &stranger];
    assert!(refusal(&muster(folder.path(), &arguments)).contains("from this run"));
    let arguments = ["snapshot", "pull", "--run", "run", "--out", out];
    assert!(refusal(&muster(finished(), &arguments)).contains("exists already"));
    let arguments = [
        "snapshot",
        "pull",
        "--run",
        "run",
        "--version",
        "3",
        "--out",
        "x",
    ];
    assert!(refusal(&muster(finished(), &arguments)).contains("choose one of 0, 2, 4"));
}

#[test]
fn a_flipped_byte_in_any_file_of_a_snapshot_is_named_with_its_range() {
    let folder = tempfile::tempdir().unwrap();
    let out = pulled(folder.path());
    let verify = || {
        let arguments = ["snapshot", "verify", text(&out), "--run", "run"];
        muster(finished(), &arguments)
    };
    success(&verify());
    for entry in fs::read_dir(&out).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let good = fs::read(&path).unwrap();
        for at in [0, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, bad).unwrap();
            let said = refusal(&verify());
            assert!(
                said.contains(&name) && said.contains(".."),
                "byte {at} of {name}: {said}"
            );
        }
        fs::write(&path, &good[..good.len() - 1]).unwrap();
        assert!(refusal(&verify()).contains(&name));
        fs::write(&path, good).unwrap();
    }
    success(&verify());
}

#[test]
fn a_live_run_serves_its_versions_to_an_evaluator_and_obeys_the_lab() {
    let live = LiveRun::start();
    let folder = live.folder();
    let creds = "run/credentials/evaluator.json";
    let arguments = ["snapshot", "list", "--creds", creds, "--json"];
    let listed = json_lines(&success(&muster(folder, &arguments)));
    assert!(listed.len() > 1, "{listed:?}");
    let newest = listed.last().unwrap();
    assert_eq!(newest["held"], true, "{newest}");
    let arguments = [
        "snapshot", "pull", "--creds", creds, "--out", "pulled", "--json",
    ];
    let report = &json_lines(&success(&muster(folder, &arguments)))[0];
    assert!(report["policy_version"].as_u64() >= listed.last().unwrap()["policy_version"].as_u64());
    assert!(refusal(&muster(folder, &arguments)).contains("exists already"));
    success(&muster(
        folder,
        &["snapshot", "verify", "pulled", "--run", "run"],
    ));
    let arguments = ["generate", "--model", "pulled", "--prompt", "1+2="];
    success(&muster(folder, &arguments));
    let arguments = [
        "snapshot",
        "pull",
        "--creds",
        creds,
        "--version",
        "999999",
        "--out",
        "x",
    ];
    assert!(refusal(&muster(folder, &arguments)).contains("no such version"));
    let worker = "run/credentials/worker-1.json";
    let arguments = ["snapshot", "pull", "--creds", worker, "--out", "x"];
    assert!(refusal(&muster(folder, &arguments)).contains("worker"));

    let status = json_lines(&success(&muster(
        folder,
        &["status", "--run", "run", "--json"],
    )));
    assert_eq!(status[0]["running"], true);
    let names: Vec<&str> = status[0]["processes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|process| process["name"].as_str().unwrap())
        .collect();
    assert!(
        names.contains(&"trainer") && names.contains(&"worker-2"),
        "{names:?}"
    );
    let second = local(folder, &["small.toml", "--dir", "run"])
        .output()
        .unwrap();
    assert!(refusal(&second).contains("is being run by process"));

    let ctl = |order: &str| muster(folder, &["ctl", order, "--run", "run"]);
    assert!(success(&ctl("pause")).contains("is paused"));
    assert!(success(&ctl("pause")).contains("is paused already"));
    assert!(success(&ctl("resume")).contains("is running"));
    let before = live.steps();
    live.wait_for("a step after the pause", || live.steps() > before + 4);
    assert!(success(&ctl("stop")).contains("has stopped"));
    assert!(refusal(&ctl("stop")).contains("nothing to stop"));
    assert!(refusal(&ctl("pause")).contains("does not answer"));
    let arguments = ["snapshot", "pull", "--creds", creds, "--out", "x"];
    assert!(refusal(&muster(folder, &arguments)).contains("no NATS server answers"));
    let status = success(&muster(folder, &["status", "--run", "run"]));
    assert!(status.contains("not running"), "{status}");
}

#[test]
fn the_recorded_log_probs_match_those_of_the_pulled_version() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("start");
    let out = text(&out);
    let arguments = [
        "snapshot",
        "pull",
        "--run",
        "run",
        "--version",
        "0",
        "--out",
        out,
    ];
    success(&muster(finished(), &arguments));
    let mut records = Vec::new();
    for entry in fs::read_dir(finished().join("run/rollouts")).unwrap() {
        let text = fs::read_to_string(entry.unwrap().path()).unwrap();
        let lines = json_lines(&text).into_iter();
        records.extend(lines.filter(|line| line["policy_version"] == 0));
    }
    assert!(!records.is_empty());
    let ids = |line: &Value, key: &str| -> Vec<Value> { line[key].as_array().unwrap().clone() };
    let mut file = String::new();
    for record in &records {
        let tokens = [
            ids(record, "prompt_tokens"),
            ids(record, "completion_tokens"),
        ]
        .concat();
        file.push_str(&serde_json::json!({"tokens": tokens}).to_string());
        file.push('\n');
    }
    let path = folder.path().join("tokens.jsonl");
    fs::write(&path, file).unwrap();
    let arguments = ["logprobs", "--model", out, "--tokens", text(&path)];
    let scored = json_lines(&success(&muster(folder.path(), &arguments)));
    assert_eq!(scored.len(), records.len());
    for (record, line) in records.iter().zip(&scored) {
        let (recorded, found) = (ids(record, "rollout_logprobs"), ids(line, "logprobs"));
        let prompt = ids(record, "prompt_tokens").len();
        assert_eq!(found.len(), prompt + recorded.len() - 1);
        for (recorded, found) in recorded.iter().zip(&found[prompt - 1..]) {
            let difference = recorded.as_f64().unwrap() - found.as_f64().unwrap();
            assert!(difference.abs() < 1e-4, "{recorded} on record, {found} now");
        }
    }
}

#[test]
fn a_line_of_tokens_that_cannot_be_scored_is_named_and_the_lines_before_it_are_scored() {
    let folder = tempfile::tempdir().unwrap();
    let model = finished().join("run/model");
    let path = folder.path().join("tokens.jsonl");
    for (line, reason) in [
        (r#"{"tokens": []}"#, "has no tokens"),
        (r#"{"tokens": [99]}"#, "holds token 99, the model has 32"),
        (r#"{"tokens": [-1]}"#, "expected u32"),
        (r#"{"tokens": [1.5]}"#, "expected u32"),
        (r#"{"ids": [1]}"#, "missing field `tokens`"),
        ("[1, 2", "is not {\"tokens\": [ids]}"),
        ("\u{0}\u{1}", "is not {\"tokens\": [ids]}"),
    ] {
        fs::write(&path, format!("{{\"tokens\": [5]}}\n\n{line}\n")).unwrap();
        let arguments = ["logprobs", "--model", text(&model), "--tokens", text(&path)];
        let output = muster(folder.path(), &arguments);
        let said = refusal(&output);
        assert!(
            said.contains("tokens.jsonl:3") && said.contains(reason),
            "{line}: {said}"
        );
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "{\"logprobs\":[]}\n"
        );
    }
    let long = vec!["1"; 200].join(",");
    fs::write(&path, format!("{{\"tokens\": [{long}]}}\n")).unwrap();
    let arguments = ["logprobs", "--model", text(&model), "--tokens", text(&path)];
    assert!(
        refusal(&muster(folder.path(), &arguments)).contains("has 200 tokens, the model reads 128")
    );
}

#[test]
fn an_answer_has_the_documented_keys_and_equal_seeds_give_equal_answers() {
    let generate = |more: &[&str]| {
        let arguments = [
            &["generate", "--model", "run/model", "--prompt", "1+2="],
            more,
        ]
        .concat();
        muster(finished(), &arguments)
    };
    let answer = json_lines(&success(&generate(&["--json", "--max-tokens", "5"]))).remove(0);
    let mut keys: Vec<&String> = answer.as_object().unwrap().keys().collect();
    keys.sort();
    assert_eq!(keys, ["finish_reason", "logprobs", "text", "tokens"]);
    assert_eq!(
        answer["tokens"].as_array().unwrap().len(),
        answer["logprobs"].as_array().unwrap().len()
    );
    let drawn = |seed| success(&generate(&["--temperature", "1", "--seed", seed, "--json"]));
    assert_eq!(drawn("7"), drawn("7"));
    assert_ne!(drawn("7"), drawn("8"));
    assert!(refusal(&generate(&["--max-tokens", "500"])).contains("lower --max-tokens"));
    assert!(refusal(&generate(&["--temperature", "nan"])).contains("temperature"));
    let arguments = ["generate", "--model", "run/model", "--prompt", ""];
    assert!(refusal(&muster(finished(), &arguments)).contains("give --prompt a text"));
    let arguments = ["generate", "--model", "nowhere", "--prompt", "1"];
    assert!(refusal(&muster(finished(), &arguments)).contains("nowhere"));
}

#[test]
fn a_damaged_model_folder_is_refused_with_the_name_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes_kept) in [("tokenizer.json", None), ("model.safetensors", Some(1000))] {
        let model = folder.path().join(name);
        copy_files(&finished().join("run/model"), &model);
        match bytes_kept {
            None => fs::remove_file(model.join(name)).unwrap(),
            Some(bytes) => {
                let whole = fs::read(model.join(name)).unwrap();
                fs::write(model.join(name), &whole[..bytes]).unwrap();
            }
        }
        let arguments = ["generate", "--model", text(&model), "--prompt", "1+2="];
        assert!(refusal(&muster(folder.path(), &arguments)).contains(name));
    }
}

#[test]
fn a_reward_is_explained_and_a_reward_that_pays_for_a_hack_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let quickstart = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/quickstart.toml");
    let arguments = ["rewards", "check", text(&quickstart)];
    let said = success(&muster(folder.path(), &arguments));
    assert!(
        said.contains("held out") && said.contains("prompt echo"),
        "{said}"
    );

    let check = |reward: &str| {
        let text = format!("[task]\ntype = \"running_sums\"\n{reward}\n");
        fs::write(folder.path().join("reward.toml"), text).unwrap();
        muster(
            folder.path(),
            &["rewards", "check", "reward.toml", "--json"],
        )
    };
    let good = check(
        "[[reward]]\ntype = \"numeric_match\"\nextract = { after_last = \",\" }\nterminator = \".\"\nnumber = \"whole\"",
    );
    assert!(json_lines(&success(&good))[0]["probes"].is_array());
    let gamed = check("[[reward]]\ntype = \"regex\"\npattern = \"[0-9]+\"");
    let said = refusal(&gamed);
    assert!(
        said.contains("pay under the reward") && said.contains("digit spam"),
        "{said}"
    );
    let typo = check("[[reward]]\ntype = \"numeric_match\"\ntolerence = 1");
    let said = refusal(&typo);
    assert!(
        said.contains("tolerence") && said.contains("reward.toml"),
        "{said}"
    );
    let arguments = ["rewards", "check", "nowhere.toml"];
    assert!(refusal(&muster(folder.path(), &arguments)).contains("nowhere.toml"));
}

#[test]
fn answers_in_a_file_are_scored_line_by_line_and_a_malformed_line_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("answers.jsonl");
    let score = |answers: &str| {
        fs::write(&path, answers).unwrap();
        let arguments = ["rewards", "score", "small.toml", text(&path), "--json"];
        muster(finished(), &arguments)
    };
    let lines = json_lines(&success(&score(
        "{\"text\": \"3,6.\", \"gold\": 6}\n{\"text\": \"3,7.\", \"gold\": 6}\n",
    )));
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[0]["components"][0]["value"], 1.0);
    assert_eq!(lines[1]["components"][0]["value"], 0.0);
    assert_eq!(lines[2]["lines"], 2);
    assert_eq!(lines[2]["components"][0]["value"], 0.5);
    let said = refusal(&score("{\"text\": \"3,6.\", \"gold\": 6}\n{\"text\": 3}\n"));
    assert!(said.contains("answers.jsonl:2"), "{said}");
}

#[test]
fn wrong_usage_exits_with_2() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [
        &["snapshot"][..],
        &["snapshot", "pull", "--version", "newest", "--out", "x"],
        &["snapshot", "pull", "--file-bytes-max", "5GB", "--out", "x"],
        &[
            "snapshot",
            "pull",
            "--file-bytes-max",
            "16383",
            "--out",
            "x",
        ],
        &["snapshot", "serve", "--file-bytes-max", "100000"],
        &["snapshot", "verify", "x", "--learner", "abc"],
        &["generate", "--model", "x"],
        &["ctl"],
        // NAT traversal needs a live run.
        &["snapshot", "list", "--nat"],
        &["snapshot", "pull", "--out", "x", "--run", "y", "--nat"],
        &["snapshot", "serve", "--nat"],
        &["snapshot", "serve", "x", "--nat"],
        &[
            "snapshot",
            "list",
            "--creds",
            "x",
            "--nat-relay",
            "https://x",
        ],
    ] {
        let output = muster(folder.path(), arguments);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{arguments:?}: {}",
            stderr(&output)
        );
    }
}

#[test]
fn a_command_that_needs_a_run_says_how_to_name_one() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [
        &["status"][..],
        &["snapshot", "list"],
        &["snapshot", "pull", "--out", "x"],
        &["ctl", "pause"],
        &["ctl", "stop"],
    ] {
        let said = refusal(&muster(folder.path(), arguments));
        assert!(
            said.contains("name one with --run"),
            "{arguments:?}: {said}"
        );
        let named = [arguments, &["--run", "nowhere"]].concat();
        let said = refusal(&muster(folder.path(), &named));
        assert!(said.contains("nowhere"), "{named:?}: {said}");
    }
}

#[test]
fn the_doctor_names_a_missing_nats_server_and_the_way_to_install_it() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["doctor", "--json", "--nats-server", "nowhere"];
    let output = muster(folder.path(), &arguments);
    assert!(refusal(&output).contains("nats-server"));
    let findings = json_lines(&String::from_utf8_lossy(&output.stdout));
    assert_eq!(findings[0]["state"], "bad");
    assert!(findings[0]["found"].as_str().unwrap().contains("./setup"));
    assert!(findings.len() >= 6);
}

#[test]
fn the_doctor_measures_speed_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let output = muster(folder.path(), &["doctor", "--speed", "--json"]);
    let lines = json_lines(&String::from_utf8_lossy(&output.stdout));
    let speed = lines.iter().find(|line| line["what"] == "speed").unwrap();
    for key in [
        "read_bytes_per_second",
        "multiply_adds_per_second",
        "decode_tokens_per_second",
    ] {
        assert!(speed[key].as_f64().unwrap() > 0.0, "{key}: {speed}");
    }
}

#[test]
fn status_prints_the_life_of_one_group_in_order() {
    let folder = finished();
    let lines = fs::read_to_string(folder.join("run/selections.jsonl")).unwrap();
    let lines = json_lines(&lines);
    let trained = lines.iter().find(|line| line["fate"] == "trained").unwrap();
    let ticket = trained["ticket"].to_string();
    let arguments = ["status", "--run", "run", "--group", &ticket];
    let life = success(&muster(folder, &arguments));
    let mut rest = life.as_str();
    for stage in [
        "issued",
        "leased",
        "admitted",
        "critiqued",
        "waits for a step",
        "fate=trained",
    ] {
        let at = rest.find(stage);
        rest =
            &rest[at.unwrap_or_else(|| panic!("no {stage} after its predecessor in:\n{life}"))..];
    }
    // Processes log these after the next one may have gone on.
    for stage in ["lease taken", "submitted", "ready for the trainer"] {
        assert!(life.contains(stage), "no {stage} in:\n{life}");
    }
    let arguments = ["status", "--run", "run", "--group", "no-such-group"];
    assert!(refusal(&muster(folder, &arguments)).contains("no-such-group"));
}
