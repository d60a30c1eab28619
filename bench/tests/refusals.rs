//! What `muster-bench` refuses before it measures.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn bench(folder: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_muster-bench"))
        .args(words)
        .current_dir(folder)
        .output()
        .unwrap()
}

fn refusal(folder: &Path, words: &[&str]) -> String {
    let output = bench(folder, words);
    assert_eq!(output.status.code(), Some(1), "{words:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_folder_with_earlier_runs_is_not_measured() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("runs/old")).unwrap();
    let words = ["quickstart", "--seeds", "1", "--dir", "runs"];
    let refusal = refusal(folder.path(), &words);
    assert!(
        refusal.contains("name a new folder with --dir"),
        "{refusal}"
    );
}

#[test]
fn a_missing_muster_program_is_named_before_any_run() {
    let folder = tempfile::tempdir().unwrap();
    let words = ["quickstart", "--seeds", "1", "--muster", "nowhere"];
    let refusal = refusal(folder.path(), &words);
    assert!(
        refusal.contains("nowhere is missing: build it"),
        "{refusal}"
    );
}

#[cfg(not(feature = "nat"))]
#[test]
fn a_build_without_quic_names_the_feature() {
    let folder = tempfile::tempdir().unwrap();
    let refusal = refusal(folder.path(), &["broadcast", "--transport", "quic"]);
    assert!(refusal.contains("--features nat"), "{refusal}");
}

#[test]
fn unknown_choices_are_wrong_usage() {
    let folder = tempfile::tempdir().unwrap();
    for words in [
        ["quickstart", "--control", "permuted"],
        ["quickstart", "--seeds", "one"],
    ] {
        assert_eq!(
            bench(folder.path(), &words).status.code(),
            Some(2),
            "{words:?}"
        );
    }
}
