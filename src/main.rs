//! Muster: an asynchronous RL post-training swarm in one binary.
//!
//! The command line connects roles and decides nothing. Each command has a file under `commands/`. The other files are what
//! commands share: configuration, run directory, a member's connections, child processes.
#![allow(unreachable_pub)] // a binary has no outside: `pub` here means "for the other modules"
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod commands;
mod config;
mod descriptor;
mod evaluate;
mod machine;
mod member;
mod prompts;
mod run_dir;
mod signals;
mod start_model;
mod supervisor;

use std::process::ExitCode;

use clap::Parser;

/// Training passes allocate and free large buffers all the time. The system's allocator would return them to the kernel and
/// pay for page faults each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    muster_monitor::machine::small_pages();
    let cli = commands::Cli::parse();
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("muster: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes as one line. A cause whose text is there already is left out.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string().replace('\n', " ");
        if line.contains(&text) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&text);
    }
    line
}
