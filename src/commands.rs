//! The command line: the commands, the arguments that several of them share, and logs.

mod critic;
mod ctl;
mod dispatch;
mod doctor;
mod eval;
mod generate;
mod kernels;
mod learner;
mod local;
mod logging;
mod logprobs;
mod member_args;
mod model;
mod rewards;
mod rollout;
mod runtime;
mod seed;
pub(crate) mod snapshot;
mod status;
mod trainer;
mod warmup;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// An asynchronous RL post-training swarm.
#[derive(Debug, Parser)]
#[command(name = "muster", version, about)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the whole swarm on this machine and watch held-out accuracy rise; the same command resumes
    Local(local::LocalArgs),
    /// Train a small starting policy from scratch, by supervision
    Warmup(warmup::WarmupArgs),
    /// Run dispatch and the trainer on a NATS server that runs already
    Learner(learner::LearnerArgs),
    /// Run dispatch alone: tickets, leases, admission, critiques
    Dispatch(dispatch::DispatchArgs),
    /// Run the trainer alone: batches, steps, versions
    Trainer(trainer::TrainerArgs),
    /// Run a worker: it answers tickets with the current policy
    Rollout(rollout::RolloutArgs),
    /// Run a critic: it computes rewards and audits answers
    Critic(critic::CriticArgs),
    /// Run a seeder: it passes weights on to other peers
    Seed(seed::SeedArgs),
    /// Measure accuracy on the held-out set, of a model folder or of a run's versions
    Eval(eval::EvalArgs),
    /// List a run's versions; pull, verify or serve them as Hugging Face folders
    Snapshot(snapshot::SnapshotArgs),
    /// Check a reward before you train on it
    Rewards(rewards::RewardsArgs),
    /// Answer a prompt with a model folder
    Generate(generate::GenerateArgs),
    /// Print the log-probabilities that a model folder gives to tokens
    Logprobs(logprobs::LogprobsArgs),
    /// Import a model from a GGUF file, or pull one from a hub
    Model(model::ModelArgs),
    /// Show the state of a run, or the life of one of its groups
    Status(status::StatusArgs),
    /// Pause, resume or stop a run
    Ctl(ctl::CtlArgs),
    /// Check whether this machine has what Muster needs, and how fast it is
    Doctor(doctor::DoctorArgs),
}

/// Runs a command.
///
/// # Errors
/// The command failed; the error says how to mend it.
pub fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Command::Local(args) => local::run(args),
        Command::Warmup(args) => in_process(async { warmup::run(&args) }),
        Command::Learner(args) => learner::run(args),
        Command::Dispatch(args) => in_process(dispatch::run(args)),
        Command::Trainer(args) => in_process(trainer::run(args)),
        Command::Rollout(args) => in_process(rollout::run(args)),
        Command::Critic(args) => in_process(critic::run(args)),
        Command::Seed(args) => in_process(seed::run(args)),
        Command::Eval(args) => in_process(eval::run(args)),
        Command::Snapshot(args) => in_process(snapshot::run(args)),
        Command::Rewards(args) => rewards::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Logprobs(args) => logprobs::run(&args),
        Command::Model(args) => model::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Ctl(args) => in_process(ctl::run(args)),
        Command::Doctor(args) => doctor::run(&args),
    }
}

/// Runs a role to its end on a runtime of its own.
fn in_process(role: impl Future<Output = Result<()>>) -> Result<()> {
    logging::to_stderr();
    runtime::start()?.block_on(role)
}
