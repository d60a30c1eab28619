//! A version with its weights in several files is pulled, verified, loaded, served, and pulled again by a hub's client.

use std::fs;
use std::path::Path;

use super::harness::{refusal, success, text};
use super::muster;
use super::runs::{finished, json_lines, pulled};
use super::serve::Gateway;

/// The newest checkpoint, pulled with its weights split over several files.
fn split(into: &Path) -> String {
    let out = into.join("split").to_str().unwrap().to_owned();
    let arguments = [
        "snapshot",
        "pull",
        "--run",
        "run",
        "--file-bytes-max",
        "16384",
        "--out",
        &out,
    ];
    success(&muster(finished(), &arguments));
    let index = into.join("split/model.safetensors.index.json");
    assert!(index.is_file() && !into.join("split/model.safetensors").exists());
    out
}

fn logprobs(model: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens.jsonl");
    fs::write(&tokens, "{\"tokens\": [5, 7, 2, 9, 11, 3]}\n").unwrap();
    let arguments = [
        "logprobs",
        "--model",
        model,
        "--tokens",
        tokens.to_str().unwrap(),
    ];
    success(&muster(folder.path(), &arguments))
}

#[test]
fn weights_in_several_files_verify_and_give_the_same_log_probs() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, split) = (pulled(folder.path()), split(folder.path()));
    let arguments = ["snapshot", "verify", &split, "--run", "run", "--json"];
    let report = &json_lines(&success(&muster(finished(), &arguments)))[0];
    let files = report["files"].as_object().unwrap();
    let weights = files.iter().filter(|(name, _)| name.ends_with("tensors"));
    let sizes: Vec<u64> = weights.map(|(_, bytes)| bytes.as_u64().unwrap()).collect();
    assert!(
        sizes.len() > 1 && sizes.iter().all(|bytes| *bytes <= 16_384),
        "{sizes:?}"
    );
    assert_eq!(logprobs(&split), logprobs(text(&whole)));
    let second = Path::new(&split).join(format!("model-00002-of-{:05}.safetensors", sizes.len()));
    let mut bytes = fs::read(&second).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&second, bytes).unwrap();
    let said = refusal(&muster(finished(), &arguments));
    assert!(
        said.contains("model-00002-of-") && said.contains(".."),
        "{said}"
    );
}

#[test]
fn weights_in_several_files_are_served_and_pulled() {
    let folder = tempfile::tempdir().unwrap();
    let split = split(folder.path());
    let arguments = ["snapshot", "verify", &split, "--run", "run", "--json"];
    let report = &json_lines(&success(&muster(finished(), &arguments)))[0];
    let learner = report["learner"].as_str().unwrap();
    let gateway = Gateway::start(folder.path(), &[&split, "--learner", learner]);
    let files = report["files"].as_object().unwrap().keys();
    for name in files.map(String::as_str).chain(["manifest.json"]) {
        let (head, body) = gateway.get(&format!("/small/resolve/latest/{name}"));
        assert!(head.starts_with("HTTP/1.1 200 "), "{name}: {head}");
        assert!(
            body == fs::read(Path::new(&split).join(name)).unwrap(),
            "{name}"
        );
    }
    let endpoint = format!("http://{}", gateway.address());
    let arguments = [
        "model",
        "pull",
        "muster/small",
        "--endpoint",
        &endpoint,
        "--cache",
        "cache",
        "--out",
        "out",
    ];
    success(&muster(folder.path(), &arguments));
    let out = folder.path().join("out");
    assert_eq!(logprobs(text(&out)), logprobs(&split));
}
