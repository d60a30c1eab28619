//! The bounds of everything that crosses a process boundary, each with its reason.

/// The version of the protocol that this build writes. A changed form of any message is a new version.
pub(crate) const PROTOCOL_VERSION: u16 = 2;

/// The versions of the protocol that this build reads, newest last.
pub const PROTOCOL_VERSIONS: &[u16] = &[PROTOCOL_VERSION];

/// Largest envelope of a group: 8 rollouts of 8,192 tokens with log-probs and commitments compress to about 750 KB;
/// over four times that, and half of the server's `max_payload`.
pub const GROUP_BYTES_MAX: usize = 4 << 20;

/// Largest envelope that carries a group (critique lease, joined group): the group and 1 MiB for the rest.
pub const CARRIER_BYTES_MAX: usize = GROUP_BYTES_MAX + (1 << 20);

/// Largest envelope of anything else: NATS carries manifests and announcements, never weights.
pub const STATEMENT_BYTES_MAX: usize = 64 << 10;

/// Largest batch manifest: 4,096 groups of under 256 bytes each.
pub const MANIFEST_BYTES_MAX: usize = 1 << 20;

/// Largest signed version: a parameter table of 4,096 tensors of under 256 bytes each.
pub(crate) const VERSION_BYTES_MAX: usize = 1 << 20;

/// Largest ratio of decompressed to compressed size: well-formed groups compress threefold, manifests tenfold.
pub(crate) const INFLATION_MAX: usize = 16;

/// The server's `max_payload`; the server warns above 8 MiB.
pub const PAYLOAD_BYTES_MAX: usize = 8 << 20;

/// Most rollouts in a group.
pub(crate) const GROUP_SIZE_MAX: u32 = 256;

/// Most tokens of a prompt and its answer together, before a model's own limit.
pub(crate) const ROLLOUT_TOKENS_MAX: usize = 131_072;

/// Most segments of a rollout: one per turn of a long conversation with tools.
pub(crate) const SEGMENTS_MAX: usize = 256;

/// Most stop ids of a ticket.
pub(crate) const STOP_IDS_MAX: usize = 64;

/// Most stop strings of a ticket: a worker searches for each of them after every token.
pub const STOP_STRINGS_MAX: usize = 16;

/// Longest stop string in bytes: a line of text.
pub const STOP_STRING_BYTES_MAX: usize = 256;

/// Most versions that a critic lists as held.
pub(crate) const HELD_VERSIONS_MAX: usize = 64;

/// Most reward components of one rollout.
pub const REWARD_COMPONENTS_MAX: usize = 64;

/// Most findings of one verdict. The first ones decide; the rest repeat them.
pub const FINDINGS_MAX: usize = 32;

/// Most peers in one reply: peers form a bounded overlay, not a mesh.
pub const PEERS_MAX: usize = 64;

/// Most squashed deltas in one reply: two for each of the sixteen short and four long strides within the versions that dispatch
/// remembers, and some room. 64 descriptions of 64 KiB fit into one message.
pub const SQUASHED_MAX: usize = 64;

/// Longest free text in a message (reasons, names), in bytes.
pub const TEXT_BYTES_MAX: usize = 1_024;

/// Longest prompt or gold text, in bytes: both travel to critics. Also checked when a task is read.
pub const GOLD_BYTES_MAX: usize = 64 << 10;

/// Messages held for a slow reader. Beyond it a subscription drops the oldest, and a server of requests drops the newest.
pub(crate) const INBOX_MESSAGES_MAX: usize = 4_096;
