//! A version whose weights are in several files: pulled, verified, loaded, served, pulled again by a hub's client.

use std::fs;
use std::path::Path;

use super::serve::Gateway;
use super::{finished, json_lines, muster, refusal, result};

/// The newest checkpoint, split in files that hold a part of it each.
fn split(into: &Path) -> String {
    let out = into.join("split").to_str().unwrap().to_owned();
    let words = [
        "snapshot",
        "pull",
        "--run",
        "run",
        "--file-bytes-max",
        "16384",
        "--out",
        &out,
    ];
    result(&muster(finished(), &words));
    let index = into.join("split/model.safetensors.index.json");
    assert!(index.is_file() && !into.join("split/model.safetensors").exists());
    out
}

fn logprobs(model: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens.jsonl");
    fs::write(&tokens, "{\"tokens\": [5, 7, 2, 9, 11, 3]}\n").unwrap();
    let words = [
        "logprobs",
        "--model",
        model,
        "--tokens",
        tokens.to_str().unwrap(),
    ];
    result(&muster(folder.path(), &words))
}

#[test]
fn weights_in_several_files_verify_and_give_the_same_log_probs() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, split) = (super::pulled(folder.path()), split(folder.path()));
    let words = ["snapshot", "verify", &split, "--run", "run", "--json"];
    let report = &json_lines(&result(&muster(finished(), &words)))[0];
    let files = report["files"].as_object().unwrap();
    let weights = files.iter().filter(|(name, _)| name.ends_with("tensors"));
    let sizes: Vec<u64> = weights.map(|(_, bytes)| bytes.as_u64().unwrap()).collect();
    assert!(
        sizes.len() > 1 && sizes.iter().all(|bytes| *bytes <= 16_384),
        "{sizes:?}"
    );
    assert_eq!(logprobs(&split), logprobs(whole.to_str().unwrap()));
    let second = Path::new(&split).join(format!("model-00002-of-{:05}.safetensors", sizes.len()));
    let mut bytes = fs::read(&second).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&second, bytes).unwrap();
    let said = refusal(&muster(finished(), &words));
    assert!(
        said.contains("model-00002-of-") && said.contains(".."),
        "{said}"
    );
}

#[test]
fn weights_in_several_files_are_served_and_pulled_from_there() {
    let folder = tempfile::tempdir().unwrap();
    let split = split(folder.path());
    let words = ["snapshot", "verify", &split, "--run", "run", "--json"];
    let report = &json_lines(&result(&muster(finished(), &words)))[0];
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
    let words = [
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
    result(&muster(folder.path(), &words));
    let out = folder.path().join("out");
    assert_eq!(logprobs(out.to_str().unwrap()), logprobs(&split));
}
