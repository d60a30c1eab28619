//! How weights travel: versions are described and signed, cut into shards, passed from peer to peer, and stored as folders.
//!
//! * [`version`] defines the root that covers a version, finds the objects that lead to it, and takes it over.
//! * [`codec`] makes and applies lossless deltas between versions. Pure.
//! * [`store`] cuts objects into shards, verifies shards, and holds them in memory and on disk.
//! * [`swarm`] exchanges objects with other peers; [`swarm::plan`] (download) and [`swarm::uploads`] decide, both pure.
//! * [`transport`] connects two peers: frames, handshake, TCP, and QUIC through home routers.
//! * [`follower`] takes over each new version of a run.
//! * [`snapshot`] writes and verifies a Hugging Face folder.
//!
//! Moves bytes, never tensors: this crate does not know what a tensor means.
//!
//! # Deltas
//!
//! A delta turns one version's safetensors file into the next, losslessly. The encoder cuts a file in slices of 4 Mi
//! elements and codes each slice by the method that takes the fewest bytes: nothing, a patch, byte planes of the XOR under
//! zstd, or the bytes as they are. The patch uses the parent, which the receiver has: an optimizer step moves small weights
//! and leaves large ones in place, so a change is coded as the number of weights *of the same exponent* passed since the
//! last change, and the signed number of units in the last place. Both are tokens under an asymmetric numeral system. A
//! delta may be hostile: the decoder allocates no more than the parent's size asks for, and a peer believes the result only
//! if its root is the one that the learner signed.
//!
//! The learner makes a delta from each version to the next while it is smaller than `learner.broadcast.delta_fraction_max`
//! of the weights, and an anchor every `anchor_every` versions or where there is no such delta. It announces a version with
//! the last anchor and every delta since, so a peer can reach the version from nothing. A follower takes the route of fewest
//! bytes from the weights that it holds. If a delta does not arrive, or leads to other weights than it says, the follower
//! takes the next best route.
//!
//! Members also make deltas over several versions for late peers, from 4 and from 16 versions before. By a hash of step and
//! member each member knows its turn ([`version::squash`]). A member signs the description with its own key; dispatch passes
//! descriptions on and believes none. If such a delta leads to other weights, the follower finds its maker by going the
//! route again, root by root, and ignores the maker's descriptions from then on.
//!
//! # Snapshots
//!
//! A snapshot is a Hugging Face folder with a manifest that holds the learner's signed version and the signed description of
//! one safetensors file. `verify` writes everything else in the manifest again and compares. Weights above a size limit lie
//! in several files, a view of the one signed file: the headers and the index follow from the signed header and the number
//! of tensors in each file. `verify` reads the weights shard by shard, and looks at a header only after its shards were
//! right.
//!
//! # From peer to peer
//!
//! A shard has 64 KiB to 1 MiB, and a peer passes it on only when it is whole and verified. Two shards leave a peer at once,
//! to the peers that have waited longest, so that shards arrive one after the other. A slow shard gives its slot back.
//! Connections over paths of 10 ms and more use BBR where the kernel has it, shorter ones CUBIC, since there BBR overfills
//! the queues of home links.
//!
//! A [`transport`] dials a peer's record, accepts, and tells what to announce. Each peer proves its key over the streams,
//! whatever carries them. With the feature `nat`, QUIC through home routers is tried after TCP; its endpoint's key is
//! derived from the machine's seed and named in the signed record. A peer uses only the relays configured on its machine,
//! never one that a record names.
//!
//! Up to 65 peers know one another; of more, each knows eight, chosen by dispatch. A peer asks for at most twelve shards at
//! once, the rarest first. A request that takes four times as long as usual is doubled elsewhere. A fetch ends when no peer
//! holds what is missing, when all fetching peers are stuck, or when the peers that promise deliver nothing; its follower
//! then goes on to a newer version.
//!
//! The learner sends each shard once. It sends a second copy only to a peer that has had nothing from others for a while. It
//! sees from other peers' requests whose shards were passed on: a peer that keeps its shards waits while others ask
//! ([`swarm::uploads`]).
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod blocking;
pub mod codec;
pub mod follower;
pub mod snapshot;
pub mod store;
pub mod swarm;
pub mod transport;
pub mod version;

pub use swarm::{FetchError, ObjectSource, Swarm, SwarmConfig, SwarmError};
