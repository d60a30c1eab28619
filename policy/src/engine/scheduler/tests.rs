use proptest::prelude::*;

use super::*;

const BLOCK: usize = 4;

/// A memory that records writes in the place of keys and values: each cell is a digest of its weights
/// and of the text up to its position. A feed may read only its own text.
struct Memory {
    cells: Vec<Option<u64>>,
}

fn digests(weights_id: WeightsId, text: &[u32]) -> Vec<u64> {
    let mix = |hash: u64, value: u64| {
        (hash ^ value)
            .wrapping_mul(0x0100_0000_01B3)
            .rotate_left(17)
    };
    let start = mix(0xCBF2_9CE4, weights_id + 1);
    text.iter()
        .scan(start, |hash, token| {
            *hash = mix(*hash, u64::from(*token) + 7);
            Some(*hash)
        })
        .collect()
}

impl Memory {
    fn new(blocks: usize) -> Self {
        Self {
            cells: vec![None; blocks * BLOCK],
        }
    }

    fn cell(&mut self, table: &[BlockId], position: usize) -> &mut Option<u64> {
        &mut self.cells[table[position / BLOCK] as usize * BLOCK + position % BLOCK]
    }

    /// `text` — of the feed's owner
    fn run(&mut self, feed: &Feed, text: &[u32], written: &mut Vec<BlockId>) {
        let expected = digests(feed.weights_id, text);
        let end = feed.position + feed.tokens.len();
        assert_eq!(feed.tokens, text[feed.position..end]);
        for (position, digest) in expected.iter().enumerate().take(feed.position) {
            let found = *self.cell(&feed.table, position);
            assert_eq!(found, Some(*digest), "a foreign cell at {position}");
        }
        for (position, digest) in expected.iter().enumerate().take(end).skip(feed.position) {
            *self.cell(&feed.table, position) = Some(*digest);
        }
        for block in feed.position / BLOCK..end.div_ceil(BLOCK) {
            let block = feed.table[block];
            assert!(!written.contains(&block), "two write block {block}");
            written.push(block);
        }
    }
}

#[derive(Debug, Clone)]
struct Job {
    prompt: Arc<[u32]>,
    answer: usize,
    /// Step before which it is submitted.
    at: usize,
    in_flight: bool,
}

/// Tokens that each job has drawn, and the weights it runs under.
struct Simulation {
    scheduler: Scheduler,
    memory: Memory,
    texts: BTreeMap<Sequence, (WeightsId, Vec<u32>)>,
    done: BTreeMap<Sequence, Vec<u32>>,
}

impl Simulation {
    fn new(limits: Limits) -> Self {
        Self {
            scheduler: Scheduler::new(limits),
            memory: Memory::new(limits.blocks),
            texts: BTreeMap::new(),
            done: BTreeMap::new(),
        }
    }

    /// Runs one plan and checks every feed. Draws depend on text and sequence alone.
    fn step(&mut self, jobs: &[Job]) {
        let plan = self.scheduler.plan();
        for (from, to) in plan.copies {
            let from = from as usize * BLOCK;
            self.memory
                .cells
                .copy_within(from..from + BLOCK, to as usize * BLOCK);
        }
        let mut written = Vec::new();
        let mut drawn = Vec::new();
        for feed in &plan.feeds {
            let end = feed.position + feed.tokens.len();
            let owner = self.texts.iter().find(|(sequence, (weights_id, text))| {
                *weights_id == feed.weights_id
                    && text.len() >= end
                    && text[feed.position..end] == feed.tokens
                    && (feed.draws.is_empty() || feed.draws.contains(sequence))
                    && self.starts_alike(feed, *weights_id, text)
            });
            let text = owner
                .expect("every feed belongs to an unfinished text")
                .1
                .1
                .clone();
            self.memory.run(feed, &text, &mut written);
            for sequence in &feed.draws {
                let own = &self.texts[sequence].1;
                assert_eq!(own.len(), end, "a draw before the text was read");
                assert_eq!(own[..end], text[..end]);
                drawn.push(*sequence);
            }
        }
        for sequence in drawn {
            let job = &jobs[sequence as usize];
            let text = &mut self.texts.get_mut(&sequence).unwrap().1;
            let token = (text.len() as u32 * 31 + sequence as u32) % 3;
            text.push(token);
            if text.len() == job.prompt.len() + job.answer {
                self.scheduler.end(sequence);
                let (_, text) = self.texts.remove(&sequence).unwrap();
                self.done.insert(sequence, text);
            } else {
                self.scheduler.drew(sequence, token);
            }
        }
        assert!(self.scheduler.blocks_are_counted());
    }

    /// Whether the cells before a feed are those of this text.
    fn starts_alike(&self, feed: &Feed, weights_id: WeightsId, text: &[u32]) -> bool {
        let expected = digests(weights_id, text);
        (0..feed.position).all(|position| {
            let block = feed.table[position / BLOCK] as usize;
            self.memory.cells[block * BLOCK + position % BLOCK] == Some(expected[position])
        })
    }
}

/// Runs jobs to their end; new weights come every `swap_every` steps, four times.
fn run(jobs: &[Job], limits: Limits, swap_every: usize) -> (Simulation, usize) {
    let mut simulation = Simulation::new(limits);
    let (mut weights_id, mut steps) = (0, 0);
    let work: usize = jobs.iter().map(|job| job.prompt.len() + job.answer).sum();
    while simulation.done.len() < jobs.len() {
        for (sequence, job) in (0..).zip(jobs).filter(|(_, job)| job.at == steps) {
            simulation
                .scheduler
                .submit(sequence, weights_id, Arc::clone(&job.prompt));
            simulation
                .texts
                .insert(sequence, (weights_id, job.prompt.to_vec()));
        }
        if weights_id < 4 && steps % swap_every == swap_every - 1 {
            weights_id += 1;
            for (sequence, (own, _)) in &mut simulation.texts {
                if jobs[*sequence as usize].in_flight {
                    *own = weights_id;
                    simulation.scheduler.change_weights(*sequence, weights_id);
                }
            }
            for old in 0..weights_id {
                if !simulation.scheduler.uses_weights(old) {
                    simulation.scheduler.forget_weights(old);
                }
            }
        }
        simulation.step(jobs);
        steps += 1;
        // The oldest request advances with every step, so the steps are bounded by the tokens, read again at every swap.
        assert!(steps < 200 + work * 6, "a row starves");
    }
    (simulation, steps)
}

fn jobs() -> impl Strategy<Value = Vec<Job>> {
    let prompts = prop::collection::vec(prop::collection::vec(0u32..2, 1..18), 1..4);
    prompts.prop_flat_map(|prompts| {
        let prompts: Vec<Arc<[u32]>> = prompts.into_iter().map(Into::into).collect();
        let count = prompts.len();
        let job = (0..count, 1usize..12, 0usize..20, any::<bool>());
        prop::collection::vec(job, 1..16).prop_map(move |jobs| {
            let job = |(prompt, answer, at, in_flight): (usize, usize, usize, bool)| Job {
                prompt: Arc::clone(&prompts[prompt]),
                answer,
                at,
                in_flight,
            };
            jobs.into_iter().map(job).collect()
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_block_is_lost_or_shared_wrongly_and_no_row_starves(
        jobs in jobs(), slots in 1usize..9, chunk_tokens in 1usize..20, spare in 0usize..20, swap_every in 6usize..40,
    ) {
        let longest = jobs.iter().map(|job| job.prompt.len() + job.answer - 1).max().unwrap();
        let blocks = longest.div_ceil(BLOCK) + spare;
        let limits = Limits { slots, chunk_tokens, blocks, block: BLOCK };
        let (simulation, _) = run(&jobs, limits, swap_every);
        // Draws depend on text and sequence alone, so every budget must give what an unbounded one gives.
        let wide = Limits { slots: 64, chunk_tokens: 4096, blocks: 4096, block: BLOCK };
        let (expected, _) = run(&jobs, wide, usize::MAX);
        prop_assert_eq!(&simulation.done, &expected.done);
        let mut scheduler = simulation.scheduler;
        while scheduler.drop_idle_prefix() {}
        prop_assert_eq!(scheduler.blocks.free(), blocks);
        prop_assert!(scheduler.prefixes.is_empty() && scheduler.rows.is_empty());
    }
}

fn limits(slots: usize, blocks: usize) -> Limits {
    Limits {
        slots,
        chunk_tokens: 1024,
        blocks,
        block: BLOCK,
    }
}

fn group(prompt: usize, answer: usize, size: usize) -> Vec<Job> {
    let prompt: Arc<[u32]> = (0..prompt as u32).collect();
    let job = Job {
        prompt,
        answer,
        at: 0,
        in_flight: false,
    };
    vec![job; size]
}

#[test]
fn a_groups_prompt_is_read_once() {
    let (simulation, _) = run(&group(64, 3, 8), limits(8, 1000), usize::MAX);
    let stats = simulation.scheduler.stats();
    assert_eq!(stats.read_tokens, 64);
    assert_eq!(stats.decoded_tokens, 8 * 2);
    // Late rows feed the last token of the prompt again, and no more.
    let (simulation, _) = run(&group(64, 3, 8), limits(2, 1000), usize::MAX);
    assert_eq!(simulation.scheduler.stats().read_tokens, 64 + 6);
}

#[test]
fn the_youngest_row_is_preempted_when_blocks_run_out_and_every_row_ends() {
    let jobs = group(8, 24, 4);
    let (simulation, _) = run(&jobs, limits(4, 16), usize::MAX);
    let stats = simulation.scheduler.stats();
    assert!(stats.preemptions > 0, "{stats:?}");
    let (roomy, _) = run(&jobs, limits(4, 64), usize::MAX);
    assert_eq!(roomy.scheduler.stats().preemptions, 0);
}

#[test]
fn a_long_prompt_is_read_in_pieces_while_others_decode() {
    let mut jobs = group(4, 40, 1);
    jobs.push(Job {
        prompt: (100..400).collect(),
        answer: 1,
        at: 3,
        in_flight: false,
    });
    let bounded = Limits {
        chunk_tokens: 16,
        ..limits(2, 1000)
    };
    let mut simulation = Simulation::new(bounded);
    for (sequence, job) in (0..).zip(&jobs) {
        simulation
            .scheduler
            .submit(sequence, 0, Arc::clone(&job.prompt));
        simulation.texts.insert(sequence, (0, job.prompt.to_vec()));
    }
    simulation.step(&jobs);
    for _ in 0..10 {
        let before = simulation.scheduler.stats();
        simulation.step(&jobs);
        let after = simulation.scheduler.stats();
        assert_eq!(after.read_tokens - before.read_tokens, 16);
        assert_eq!(after.decoded_tokens - before.decoded_tokens, 1);
    }
}

#[test]
fn whole_blocks_common_to_two_prompts_are_shared() {
    let mut jobs = group(40, 2, 1);
    let mut other: Vec<u32> = (0..30).collect();
    other.extend([900, 901]);
    jobs.push(Job {
        prompt: other.into(),
        answer: 2,
        at: 2,
        in_flight: false,
    });
    let (simulation, _) = run(&jobs, limits(4, 1000), usize::MAX);
    assert_eq!(simulation.scheduler.stats().read_tokens, 40 + 32 - 28);
}
