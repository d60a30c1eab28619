//! `muster snapshot serve` as its clients see it: the paths of a hub, ranges, entity tags, and refusals.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Stdio};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::harness::{muster_in, refusal, success, text};
use super::muster;
use super::runs::{LiveRun, finished, json_lines, pulled};

/// A gateway that serves until it is dropped.
pub(super) struct Gateway {
    process: Child,
    address: String,
    /// Kept open, so that the gateway may print.
    _stdout: BufReader<std::process::ChildStdout>,
}

impl Gateway {
    pub(super) fn start(folder: &Path, arguments: &[&str]) -> Self {
        let mut command = muster_in(folder, &["snapshot", "serve", "--listen", "127.0.0.1:0"]);
        let mut process = command
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let after = line.split("http://").nth(1);
        let address = after.unwrap_or_else(|| panic!("{arguments:?} said {line:?}"));
        let address = address.split(',').next().unwrap().to_owned();
        Self {
            process,
            address,
            _stdout: stdout,
        }
    }

    /// Status line with header fields, and the body.
    fn request(&self, method: &str, path: &str, fields: &str) -> (String, Vec<u8>) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: a\r\n{fields}Connection: close\r\n\r\n"
        )
        .unwrap();
        let mut said = Vec::new();
        stream.read_to_end(&mut said).unwrap();
        let end = said
            .windows(4)
            .position(|four| four == b"\r\n\r\n")
            .unwrap();
        let body = said.split_off(end + 4);
        (String::from_utf8(said).unwrap(), body)
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn get(&self, path: &str) -> (String, Vec<u8>) {
        self.request("GET", path, "")
    }

    fn json(&self, path: &str) -> Value {
        let (head, body) = self.get(path);
        assert!(head.starts_with("HTTP/1.1 200 "), "{path}: {head}");
        serde_json::from_slice(&body).unwrap()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

fn field<'a>(head: &'a str, name: &str) -> &'a str {
    let mut fields = head.lines().filter_map(|line| line.split_once(": "));
    let found = fields.find(|(found, _)| found.eq_ignore_ascii_case(name));
    found.unwrap_or_else(|| panic!("no {name} in {head}")).1
}

fn assert_error(answered: &(String, Vec<u8>), status: &str, code: &str) {
    let (head, body) = answered;
    assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
    assert_eq!(field(head, "X-Error-Code"), code);
    assert!(serde_json::from_slice::<Value>(body).unwrap()["error"].is_string());
}

#[test]
fn checkpoints_are_served_under_a_hubs_paths_by_number_root_and_commit() {
    let gateway = Gateway::start(finished(), &["--run", "run"]);
    let home = gateway.json("/");
    let versions = home["versions"].as_array().unwrap();
    let numbers: Vec<u64> = versions
        .iter()
        .map(|v| v["policy_version"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, [0, 2, 4]);
    let weights = |version: u64| {
        fs::read(finished().join(format!("run/checkpoints/{version}/model.safetensors"))).unwrap()
    };
    for version in versions {
        let number = version["policy_version"].as_u64().unwrap();
        let (root, commit) = (
            version["root"].as_str().unwrap(),
            version["commit"].as_str().unwrap(),
        );
        for revision in [&format!("v{number}"), root, commit] {
            let (head, body) = gateway.get(&format!("/small/resolve/{revision}/model.safetensors"));
            assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
            assert!(body == weights(number), "version {number} by {revision}");
            assert_eq!(field(&head, "X-Repo-Commit"), commit);
            assert_eq!(
                field(&head, "ETag"),
                format!("\"{}\"", hex::encode(Sha256::digest(&body)))
            );
        }
        let info = gateway.json(&format!("/api/models/muster/small/revision/v{number}"));
        assert_eq!(info["sha"], commit);
    }
    assert!(gateway.get("/small/resolve/latest/model.safetensors").1 == weights(4));
    let tree = gateway.json("/api/models/small/tree/main?recursive=true");
    let names: Vec<&str> = tree
        .as_array()
        .unwrap()
        .iter()
        .map(|f| f["path"].as_str().unwrap())
        .collect();
    assert!(
        names.contains(&"manifest.json") && names.contains(&"config.json"),
        "{names:?}"
    );
    assert!(
        gateway.get("/small/resolve/main/manifest.json").1
            == fs::read(finished().join("run/checkpoints/4/manifest.json")).unwrap()
    );

    assert_error(
        &gateway.get("/large/resolve/main/config.json"),
        "404",
        "RepoNotFound",
    );
    assert_error(
        &gateway.get("/small/resolve/v3/config.json"),
        "404",
        "RevisionNotFound",
    );
    assert_error(
        &gateway.get("/small/resolve/main/../roster.json"),
        "404",
        "EntryNotFound",
    );
    assert_error(
        &gateway.get("/small/resolve/main/..%2Froster.json"),
        "404",
        "EntryNotFound",
    );
    let (head, _) = gateway.request("PUT", "/small/resolve/main/config.json", "");
    assert!(head.starts_with("HTTP/1.1 405 "), "{head}");
}

#[test]
fn ranges_and_conditional_requests_follow_http() {
    let gateway = Gateway::start(finished(), &["--run", "run"]);
    let path = "/small/resolve/v4/model.safetensors";
    let whole = fs::read(finished().join("run/checkpoints/4/model.safetensors")).unwrap();
    let (head, body) = gateway.request("HEAD", path, "");
    let (etag, size) = (field(&head, "ETag").to_owned(), whole.len().to_string());
    assert!(body.is_empty());
    for name in ["Content-Length", "X-Linked-Size"] {
        assert_eq!(field(&head, name), size);
    }
    assert_eq!(field(&head, "X-Linked-Etag"), etag);
    for (range, part) in [
        ("bytes=0-0", 0..1),
        ("bytes=100-299", 100..300),
        ("bytes=-7", whole.len() - 7..whole.len()),
        ("bytes=9000-", 9_000..whole.len()),
    ] {
        let (head, body) = gateway.request("GET", path, &format!("Range: {range}\r\n"));
        assert!(head.starts_with("HTTP/1.1 206 "), "{head}");
        let shown = format!("bytes {}-{}/{size}", part.start, part.end - 1);
        assert_eq!(field(&head, "Content-Range"), shown);
        assert!(body == whole[part], "{range}");
    }
    let (head, _) = gateway.request("GET", path, &format!("Range: bytes={size}-\r\n"));
    assert!(head.starts_with("HTTP/1.1 416 "), "{head}");
    assert_eq!(field(&head, "Content-Range"), format!("bytes */{size}"));
    let (head, body) = gateway.request("GET", path, &format!("If-None-Match: \"x\", {etag}\r\n"));
    assert!(
        head.starts_with("HTTP/1.1 304 ") && body.is_empty(),
        "{head}"
    );
    let other = "Range: bytes=5-\r\nIf-Range: \"other\"\r\n";
    assert!(
        gateway.request("GET", path, other).1 == whole,
        "a range of other content is not sent"
    );
    let same = format!("Range: bytes=5-\r\nIf-Range: {etag}\r\n");
    assert!(gateway.request("GET", path, &same).1 == whole[5..]);
}

#[test]
fn muster_model_pull_fetches_a_served_model_that_verifies() {
    let folder = tempfile::tempdir().unwrap();
    let gateway = Gateway::start(finished(), &["--run", "run"]);
    let endpoint = format!("http://{}", gateway.address);
    let arguments = [
        "model",
        "pull",
        "muster/small",
        "--revision",
        "v2",
        "--endpoint",
        &endpoint,
        "--cache",
        "cache",
        "--out",
        "out",
    ];
    success(&muster(folder.path(), &arguments));
    let (out, checkpoint) = (
        folder.path().join("out"),
        finished().join("run/checkpoints/2"),
    );
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        assert!(
            fs::read(out.join(name)).unwrap() == fs::read(checkpoint.join(name)).unwrap(),
            "{name}"
        );
    }
    success(&muster(
        folder.path(),
        &["generate", "--model", "out", "--prompt", "1+2="],
    ));
    // With its manifest, the folder is a snapshot.
    fs::write(
        out.join("manifest.json"),
        gateway.get("/small/resolve/v2/manifest.json").1,
    )
    .unwrap();
    let arguments = ["snapshot", "verify", text(&out), "--run", "run"];
    success(&muster(finished(), &arguments));
}

#[test]
fn only_files_signed_by_the_runs_learner_are_served() {
    let folder = tempfile::tempdir().unwrap();
    let out = pulled(folder.path());
    let out = text(&out);
    let verified = muster(
        finished(),
        &["snapshot", "verify", out, "--run", "run", "--json"],
    );
    let learner = json_lines(&success(&verified))[0]["learner"]
        .as_str()
        .unwrap()
        .to_owned();
    let serve = |learner: &str| {
        let arguments = [
            "snapshot",
            "serve",
            out,
            "--learner",
            learner,
            "--listen",
            "127.0.0.1:0",
        ];
        muster(folder.path(), &arguments)
    };
    assert!(refusal(&serve(&"5".repeat(64))).contains("no version to serve"));

    let path = Path::new(out).join("model.safetensors");
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    fs::write(&path, &bad).unwrap();
    let said = refusal(&serve(&learner));
    assert!(
        said.contains("model.safetensors") && said.contains(".."),
        "{said}"
    );

    fs::write(&path, &good).unwrap();
    let gateway = Gateway::start(folder.path(), &[out, "--learner", &learner]);
    let weights = "/small/resolve/v4/model.safetensors";
    assert!(gateway.get(weights).1 == good);
    // The file changes after the gateway has checked it.
    fs::write(&path, &bad).unwrap();
    let (head, body) = gateway.get(weights);
    assert!(!head.starts_with("HTTP/1.1 200 ") && body != bad, "{head}");
    assert_error(&(head, body), "502", "Refused");
}

#[test]
fn a_live_runs_versions_are_pulled_and_served() {
    let live = LiveRun::start();
    let arguments = [
        "--creds",
        "run/credentials/evaluator.json",
        "--cache",
        "kept",
        "--keep",
        "1",
    ];
    let gateway = Gateway::start(live.folder(), &arguments);
    let info = gateway.json("/api/models/small");
    let version = info["policy_version"].as_u64().unwrap();
    let (head, body) = gateway.get(&format!(
        "/small/resolve/{}/model.safetensors",
        info["sha"].as_str().unwrap()
    ));
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert_eq!(
        field(&head, "ETag"),
        format!("\"{}\"", hex::encode(Sha256::digest(&body)))
    );
    live.wait_for("a later version", || {
        gateway.json("/api/models/small")["policy_version"]
            .as_u64()
            .unwrap()
            > version
    });
    assert_error(
        &gateway.get("/small/resolve/v999999/config.json"),
        "404",
        "RevisionNotFound",
    );
}
