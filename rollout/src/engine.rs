//! The policy as an answerer: every rollout of every lease decodes together, on a thread of its own.

use std::sync::Arc;

use async_trait::async_trait;

use muster_broadcaster::follower::Held;
use muster_policy::{
    Completion, Config, Device, EngineConfig, Finish, GenerationRequest, Image, KernelSet, Policy,
    Sampling, generate,
};
use muster_protocol::message::group::{FinishReason, Rollout};
use muster_protocol::message::lease::Lease;

use crate::answerer::{AnswerError, Answerer};

/// A policy that answers.
#[derive(Debug)]
pub struct PolicyAnswerer {
    config: Config,
    kernels: KernelSet,
    device: Device,
    engine: EngineConfig,
    policy: Option<Policy>,
}

impl PolicyAnswerer {
    /// An answerer for models of this shape, without weights yet.
    pub fn new(config: Config, kernels: KernelSet, device: Device, engine: EngineConfig) -> Self {
        Self {
            config,
            kernels,
            device,
            engine,
            policy: None,
        }
    }
}

fn failed(error: impl std::fmt::Display) -> AnswerError {
    AnswerError(error.to_string())
}

#[async_trait]
impl Answerer for PolicyAnswerer {
    async fn adopt(&mut self, held: &Held) -> Result<(), AnswerError> {
        let (config, kernels) = (self.config.clone(), self.kernels);
        let (device, image) = (self.device.clone(), held.image.clone());
        let built = tokio::task::spawn_blocking(move || {
            let image = Image::parse(&config, &image).map_err(failed)?;
            Policy::from_image(&config, &image, kernels, &device).map_err(failed)
        });
        self.policy = Some(built.await.map_err(failed)??);
        Ok(())
    }

    async fn answer(&mut self, leases: &[Lease]) -> Result<Vec<Vec<Rollout>>, AnswerError> {
        let policy = self
            .policy
            .clone()
            .ok_or_else(|| failed("no weights were adopted yet"))?;
        let engine = self.engine.clone();
        let requests: Vec<GenerationRequest> = leases.iter().flat_map(requests_of).collect();
        let generated = tokio::task::spawn_blocking(move || generate(&policy, &engine, requests));
        let mut completions = generated
            .await
            .map_err(failed)?
            .map_err(failed)?
            .into_iter();
        let groups = leases.iter().map(|lease| {
            let count = lease.rollouts.count as usize;
            completions
                .by_ref()
                .take(count)
                .map(|completion| rollout_of(lease, completion))
                .collect()
        });
        Ok(groups.collect())
    }
}

fn requests_of(lease: &Lease) -> Vec<GenerationRequest> {
    let ticket = &lease.ticket;
    let prompt: Arc<[u32]> = ticket.prompt.as_slice().into();
    let stop_ids: Arc<[u32]> = ticket.sampling.stop_ids.as_slice().into();
    let numbers = lease.rollouts.first..lease.rollouts.first + lease.rollouts.count;
    let request = |rollout| {
        let sampling = Sampling::Prescribed {
            seed: lease.seed,
            rollout,
            temperature: ticket.sampling.temperature,
        };
        let max_tokens = ticket.sampling.tokens_max as usize;
        GenerationRequest::new(prompt.clone(), max_tokens, stop_ids.clone(), sampling)
    };
    numbers.map(request).collect()
}

fn rollout_of(lease: &Lease, completion: Completion) -> Rollout {
    let finish = match completion.finish {
        Finish::Stop(_) | Finish::StopString(_) => FinishReason::Stop,
        Finish::Length => FinishReason::Length,
    };
    let (prompt, version) = (lease.ticket.prompt.clone(), lease.version.version);
    Rollout::single_turn(
        prompt,
        completion.tokens,
        version,
        completion.logprobs,
        finish,
    )
}
