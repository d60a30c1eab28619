//! Versions of the weights: what one is, and how a member reaches the next.
//!
//! * [`state`] defines the root that the learner signs, and checks bytes against it.
//! * [`route`] finds the objects that lead to a state with the fewest bytes; pure.
//! * [`adopt`] takes over one version: open its announcement, fetch, apply, check.
//! * [`squash`] decides which member makes which delta over several versions, pure; [`squasher`] makes them.

pub mod adopt;
pub(crate) mod adoptions;
pub mod route;
pub mod squash;
pub mod squasher;
pub mod state;
