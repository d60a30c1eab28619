//! The commands: what each takes, and where it is carried out.

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
    /// Train a small starting policy from scratch by supervision
    Warmup(warmup::WarmupArgs),
    /// Run dispatch and the trainer, and a NATS server unless one is named
    Learner(learner::LearnerArgs),
    /// Dispatch alone: tickets, leases, intake
    Dispatch(dispatch::DispatchArgs),
    /// The trainer alone: batches, steps, versions
    Trainer(trainer::TrainerArgs),
    /// A worker: answers tickets with the current policy
    Rollout(rollout::RolloutArgs),
    /// A critic: computes rewards and re-checks answers
    Critic(critic::CriticArgs),
    /// A seeder: passes weights on
    Seed(seed::SeedArgs),
    /// Accuracy on the held-out set, of a folder or of a run as it goes
    Eval(eval::EvalArgs),
    /// List a run's versions, pull one as a Hugging Face folder, verify one
    Snapshot(snapshot::SnapshotArgs),
    /// Try a reward before anybody trains on it
    Rewards(rewards::RewardsArgs),
    /// Answer a prompt with a model folder
    Generate(generate::GenerateArgs),
    /// Log-probabilities that a model folder gives to tokens
    Logprobs(logprobs::LogprobsArgs),
    /// Bring a model from elsewhere: import a GGUF file, pull from a hub
    Model(model::ModelArgs),
    /// One screenful about a run, from its directory
    Status(status::StatusArgs),
    /// Pause, resume or stop a run
    Ctl(ctl::CtlArgs),
    /// Whether this machine has what Muster needs
    Doctor(doctor::DoctorArgs),
}

/// Carries out a command.
///
/// # Errors
/// What the command could not do, in words that name the way out.
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
