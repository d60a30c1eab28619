//! Behaviours of the whole swarm.
