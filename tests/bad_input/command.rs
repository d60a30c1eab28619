//! The binary as a user runs it, and what a refusal must look like.

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// How long a run may take to begin on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);
/// How often it is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// The binary with some words.
pub fn muster(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_muster"));
    command
        .args(words)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::null());
    command
}

/// The one sentence by which the binary refuses. Logs may precede it; nothing follows.
pub fn refusal(words: &[&str]) -> String {
    refusal_after(words, || true)
}

/// The one sentence by which the binary ends after `spoil` has done its work, which it is called for until it returns true.
pub fn refusal_after(words: &[&str], mut spoil: impl FnMut() -> bool) -> String {
    let mut command = muster(words);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let start = Instant::now();
    while !spoil() {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "{words:?} ended before it was spoilt");
        assert!(start.elapsed() < PATIENCE, "{words:?} cannot be spoilt");
        std::thread::sleep(LOOK_AGAIN);
    }
    let Output {
        status,
        stdout,
        stderr,
    } = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{words:?} said {stderr}");
    assert!(stdout.is_empty(), "{words:?} printed results: {stdout:?}");
    assert!(!stderr.contains("panicked"), "{words:?}: {stderr}");
    let sentences: Vec<&str> = stderr
        .lines()
        .filter_map(|line| line.strip_prefix("muster: "))
        .collect();
    let [sentence] = sentences.as_slice() else {
        panic!("{words:?} ended in {} sentences: {stderr}", sentences.len());
    };
    assert!(
        stderr.trim_end().ends_with(sentence),
        "more follows: {stderr}"
    );
    assert!(!sentence.ends_with('.'), "{sentence}");
    assert!(
        sentence.chars().next().is_some_and(|c| !c.is_uppercase()),
        "{sentence}"
    );
    (*sentence).to_owned()
}

/// Wrong words on the command line.
pub fn usage_error(words: &[&str]) {
    let found = muster(words).output().unwrap();
    assert_eq!(found.status.code(), Some(2), "{words:?}");
    assert!(found.stdout.is_empty());
}
