//! The commands as a user types them: what they print, what they refuse and in which words, and with which exit code.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

#[path = "commands/serve.rs"]
mod serve;
#[path = "commands/split.rs"]
mod split;

/// How long a run may take on a busy machine before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often files are looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A run that takes seconds: an untrained policy is never right, so its groups differ in their length alone.
const SMALL: &str = r#"
[run]
name = "small"
steps = 4
async_level = 2

[warmup]
hidden = 32
intermediate = 64
layers = 2
heads = 2
kv_heads = 1
stop_accuracy = 0.0

[sampling]
group_size = 4
tokens_max = 12
stop = ["."]

[learner]
batch_groups = 8
checkpoint_every = 2

[eval]
every = 1000
samples = 32

[task]
type = "running_sums"

[[reward]]
type = "numeric_match"
name = "correct"
extract = { after_last = "," }
terminator = "."
number = "whole"

[[reward]]
type = "length"
name = "short"
unit = "chars"
target = 3
ramp = 12
"#;

/// Runs the binary in `folder`.
fn muster(folder: &Path, words: &[&str]) -> Output {
    command(folder, words).output().unwrap()
}

fn command(folder: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_muster"));
    command.args(words).current_dir(folder).stdin(Stdio::null());
    command
}

/// `muster local` with the server that `./setup` brought, if there is none on the PATH.
fn local(folder: &Path, words: &[&str]) -> Command {
    let mut command = command(folder, &["local"]);
    command.args(words);
    let server = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/nats-server");
    if server.is_file() {
        command.arg("--nats-server").arg(server);
    }
    command
}

/// What a command printed, after it succeeded.
fn result(output: &Output) -> String {
    assert!(output.status.success(), "{}", complaint(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What a command said when it failed: one sentence and exit code 1.
fn refusal(output: &Output) -> String {
    let said = complaint(output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let last = said.lines().last().unwrap_or_default().to_owned();
    assert!(last.starts_with("muster: "), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    last
}

fn complaint(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")))
        .collect()
}

/// A folder with a run of four steps in `run`, made once.
fn finished() -> &'static Path {
    static FINISHED: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = FINISHED.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("small.toml"), SMALL).unwrap();
        let ran = local(folder.path(), &["small.toml", "--dir", "run", "--quiet"]).output();
        let ran = ran.unwrap();
        assert!(
            ran.status.success(),
            "no run to look at (is there a NATS server? run ./setup): {}",
            complaint(&ran)
        );
        folder
    });
    folder.path()
}

/// The newest checkpoint of [`finished`], pulled into a folder of its own.
fn pulled(into: &Path) -> PathBuf {
    let out = into.join("pulled");
    let words = [
        "snapshot",
        "pull",
        "--run",
        "run",
        "--out",
        out.to_str().unwrap(),
    ];
    result(&muster(finished(), &words));
    out
}

/// A run that goes on until it is dropped.
struct Live {
    folder: tempfile::TempDir,
    parent: Child,
}

impl Live {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = SMALL
            .replace("steps = 4", "steps = 100000")
            .replace("checkpoint_every = 2", "checkpoint_every = 1000");
        fs::write(folder.path().join("small.toml"), config).unwrap();
        let mut command = local(folder.path(), &["small.toml", "--dir", "run", "--quiet"]);
        let parent = command.stdout(Stdio::null()).spawn().unwrap();
        let live = Self { folder, parent };
        live.until("the first step", || live.steps() > 0);
        live
    }

    fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn steps(&self) -> usize {
        let metrics = fs::read_to_string(self.folder().join("run/metrics.jsonl"));
        metrics.map_or(0, |text| text.matches('\n').count())
    }

    fn until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let start = Instant::now();
        while !is_so() {
            assert!(
                start.elapsed() < PATIENCE,
                "{what} did not come (is there a NATS server? run ./setup)"
            );
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.parent.kill().ok();
        self.parent.wait().ok();
    }
}

#[test]
fn a_finished_runs_checkpoints_are_listed_pulled_and_verified() {
    let folder = tempfile::tempdir().unwrap();
    let words = ["snapshot", "list", "--run", "run", "--json"];
    let listed = json_lines(&result(&muster(finished(), &words)));
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
    let out = out.to_str().unwrap();
    let verified = muster(
        finished(),
        &["snapshot", "verify", out, "--run", "run", "--json"],
    );
    let report = &json_lines(&result(&verified))[0];
    assert_eq!(report["policy_version"], 4);
    let learner = report["learner"].as_str().unwrap();
    result(&muster(
        folder.path(),
        &["snapshot", "verify", out, "--learner", learner],
    ));

    let stranger = "5".repeat(64);
    let words = ["snapshot", "verify", out, "--learner", &stranger];
    assert!(refusal(&muster(folder.path(), &words)).contains("from this run"));
    let words = ["snapshot", "pull", "--run", "run", "--out", out];
    assert!(refusal(&muster(finished(), &words)).contains("exists already"));
    let words = [
        "snapshot",
        "pull",
        "--run",
        "run",
        "--version",
        "3",
        "--out",
        "x",
    ];
    assert!(refusal(&muster(finished(), &words)).contains("choose one of 0, 2, 4"));
}

#[test]
fn a_flipped_byte_in_any_file_of_a_snapshot_is_named_with_its_range() {
    let folder = tempfile::tempdir().unwrap();
    let out = pulled(folder.path());
    let verify = || {
        let words = ["snapshot", "verify", out.to_str().unwrap(), "--run", "run"];
        muster(finished(), &words)
    };
    result(&verify());
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
    result(&verify());
}

#[test]
fn a_live_run_gives_its_versions_to_an_evaluator_and_obeys_the_lab() {
    let live = Live::start();
    let folder = live.folder();
    let creds = "run/credentials/evaluator.json";
    let words = ["snapshot", "list", "--creds", creds, "--json"];
    let listed = json_lines(&result(&muster(folder, &words)));
    assert!(listed.len() > 1, "{listed:?}");
    let newest = listed.last().unwrap();
    assert_eq!(newest["held"], true, "{newest}");
    let words = [
        "snapshot", "pull", "--creds", creds, "--out", "pulled", "--json",
    ];
    let report = &json_lines(&result(&muster(folder, &words)))[0];
    assert!(report["policy_version"].as_u64() >= listed.last().unwrap()["policy_version"].as_u64());
    assert!(refusal(&muster(folder, &words)).contains("exists already"));
    result(&muster(
        folder,
        &["snapshot", "verify", "pulled", "--run", "run"],
    ));
    let words = ["generate", "--model", "pulled", "--prompt", "1+2="];
    result(&muster(folder, &words));
    let words = [
        "snapshot",
        "pull",
        "--creds",
        creds,
        "--version",
        "999999",
        "--out",
        "x",
    ];
    assert!(refusal(&muster(folder, &words)).contains("no such version"));
    let worker = "run/credentials/worker-1.json";
    let words = ["snapshot", "pull", "--creds", worker, "--out", "x"];
    assert!(refusal(&muster(folder, &words)).contains("worker"));

    let status = json_lines(&result(&muster(
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
    assert!(result(&ctl("pause")).contains("is paused"));
    assert!(result(&ctl("pause")).contains("is paused already"));
    assert!(result(&ctl("resume")).contains("is running"));
    let before = live.steps();
    live.until("a step after the pause", || live.steps() > before + 4);
    assert!(result(&ctl("stop")).contains("has stopped"));
    assert!(refusal(&ctl("stop")).contains("nothing to stop"));
    assert!(refusal(&ctl("pause")).contains("does not answer"));
    let words = ["snapshot", "pull", "--creds", creds, "--out", "x"];
    assert!(refusal(&muster(folder, &words)).contains("no NATS server answers"));
    let status = result(&muster(folder, &["status", "--run", "run"]));
    assert!(status.contains("not running"), "{status}");
}

#[test]
fn the_log_probs_on_record_are_those_of_the_version_that_is_pulled() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("start");
    let out = out.to_str().unwrap();
    let words = [
        "snapshot",
        "pull",
        "--run",
        "run",
        "--version",
        "0",
        "--out",
        out,
    ];
    result(&muster(finished(), &words));
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
    let words = [
        "logprobs",
        "--model",
        out,
        "--tokens",
        path.to_str().unwrap(),
    ];
    let scored = json_lines(&result(&muster(folder.path(), &words)));
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
fn each_line_of_tokens_that_cannot_be_scored_is_named_after_those_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let model = finished().join("run/model");
    let path = folder.path().join("tokens.jsonl");
    for (line, words) in [
        (r#"{"tokens": []}"#, "has no tokens"),
        (r#"{"tokens": [99]}"#, "holds token 99, the model has 32"),
        (r#"{"tokens": [-1]}"#, "expected u32"),
        (r#"{"tokens": [1.5]}"#, "expected u32"),
        (r#"{"ids": [1]}"#, "missing field `tokens`"),
        ("[1, 2", "is not {\"tokens\": [ids]}"),
        ("\u{0}\u{1}", "is not {\"tokens\": [ids]}"),
    ] {
        fs::write(&path, format!("{{\"tokens\": [5]}}\n\n{line}\n")).unwrap();
        let words_given = [
            "logprobs",
            "--model",
            model.to_str().unwrap(),
            "--tokens",
            path.to_str().unwrap(),
        ];
        let output = muster(folder.path(), &words_given);
        let said = refusal(&output);
        assert!(
            said.contains("tokens.jsonl:3") && said.contains(words),
            "{line}: {said}"
        );
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "{\"logprobs\":[]}\n"
        );
    }
    let long = vec!["1"; 200].join(",");
    fs::write(&path, format!("{{\"tokens\": [{long}]}}\n")).unwrap();
    let words = [
        "logprobs",
        "--model",
        model.to_str().unwrap(),
        "--tokens",
        path.to_str().unwrap(),
    ];
    assert!(
        refusal(&muster(folder.path(), &words)).contains("has 200 tokens, the model reads 128")
    );
}

#[test]
fn an_answer_has_the_promised_keys_and_equal_seeds_give_equal_answers() {
    let generate = |more: &[&str]| {
        let words = [
            &["generate", "--model", "run/model", "--prompt", "1+2="],
            more,
        ]
        .concat();
        muster(finished(), &words)
    };
    let answer = json_lines(&result(&generate(&["--json", "--max-tokens", "5"]))).remove(0);
    let mut keys: Vec<&String> = answer.as_object().unwrap().keys().collect();
    keys.sort();
    assert_eq!(keys, ["finish_reason", "logprobs", "text", "tokens"]);
    assert_eq!(
        answer["tokens"].as_array().unwrap().len(),
        answer["logprobs"].as_array().unwrap().len()
    );
    let drawn = |seed| result(&generate(&["--temperature", "1", "--seed", seed, "--json"]));
    assert_eq!(drawn("7"), drawn("7"));
    assert_ne!(drawn("7"), drawn("8"));
    assert!(refusal(&generate(&["--max-tokens", "500"])).contains("lower --max-tokens"));
    assert!(refusal(&generate(&["--temperature", "nan"])).contains("temperature"));
    let words = ["generate", "--model", "run/model", "--prompt", ""];
    assert!(refusal(&muster(finished(), &words)).contains("give --prompt a text"));
    let words = ["generate", "--model", "nowhere", "--prompt", "1"];
    assert!(refusal(&muster(finished(), &words)).contains("nowhere"));
}

#[test]
fn a_damaged_model_folder_is_refused_by_the_name_of_its_file() {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes_kept) in [("tokenizer.json", None), ("model.safetensors", Some(1000))] {
        let model = folder.path().join(name);
        fs::create_dir(&model).unwrap();
        for entry in fs::read_dir(finished().join("run/model")).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
        }
        match bytes_kept {
            None => fs::remove_file(model.join(name)).unwrap(),
            Some(bytes) => {
                let whole = fs::read(model.join(name)).unwrap();
                fs::write(model.join(name), &whole[..bytes]).unwrap();
            }
        }
        let words = [
            "generate",
            "--model",
            model.to_str().unwrap(),
            "--prompt",
            "1+2=",
        ];
        assert!(refusal(&muster(folder.path(), &words)).contains(name));
    }
}

#[test]
fn a_reward_is_explained_and_one_that_pays_for_a_hack_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let quickstart = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/quickstart.toml");
    let words = ["rewards", "check", quickstart.to_str().unwrap()];
    let said = result(&muster(folder.path(), &words));
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
    assert!(json_lines(&result(&good))[0]["probes"].is_array());
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
    let words = ["rewards", "check", "nowhere.toml"];
    assert!(refusal(&muster(folder.path(), &words)).contains("nowhere.toml"));
}

#[test]
fn answers_in_a_file_are_scored_line_by_line_and_a_bad_one_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("answers.jsonl");
    let score = |text: &str| {
        fs::write(&path, text).unwrap();
        let words = [
            "rewards",
            "score",
            "small.toml",
            path.to_str().unwrap(),
            "--json",
        ];
        muster(finished(), &words)
    };
    let lines = json_lines(&result(&score(
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
fn wrong_usage_ends_with_2_and_names_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    for words in [
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
        // The way through routers leads to a live run.
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
        let output = muster(folder.path(), words);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{words:?}: {}",
            complaint(&output)
        );
    }
}

#[test]
fn a_command_that_needs_a_run_says_how_to_name_one() {
    let folder = tempfile::tempdir().unwrap();
    for words in [
        &["status"][..],
        &["snapshot", "list"],
        &["snapshot", "pull", "--out", "x"],
        &["ctl", "pause"],
        &["ctl", "stop"],
    ] {
        let said = refusal(&muster(folder.path(), words));
        assert!(said.contains("name one with --run"), "{words:?}: {said}");
        let named = [words, &["--run", "nowhere"]].concat();
        let said = refusal(&muster(folder.path(), &named));
        assert!(said.contains("nowhere"), "{named:?}: {said}");
    }
}

#[test]
fn the_doctor_names_what_is_missing_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let words = ["doctor", "--json", "--nats-server", "nowhere"];
    let output = muster(folder.path(), &words);
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
    let words = ["status", "--run", "run", "--group", &ticket];
    let life = result(&muster(folder, &words));
    let mut rest = life.as_str();
    for stage in [
        "issued",
        "leased",
        "admitted",
        "critiqued",
        "ready for the trainer",
        "waits for a step",
        "fate=trained",
    ] {
        let at = rest.find(stage);
        rest =
            &rest[at.unwrap_or_else(|| panic!("no {stage} after its predecessor in:\n{life}"))..];
    }
    for stage in ["lease taken", "submitted"] {
        assert!(life.contains(stage), "no {stage} in:\n{life}");
    }
    let words = ["status", "--run", "run", "--group", "no-such-group"];
    assert!(refusal(&muster(folder, &words)).contains("no-such-group"));
}
