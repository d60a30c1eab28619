//! Where weights lie: the trainer puts objects on a shelf, members take them from there after a while, and not always at
//! the first attempt. What is taken is verified by whoever takes it, as in a real swarm.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use rand::Rng;
use rand::rngs::StdRng;

use muster_broadcaster::{FetchError, ObjectSource};
use muster_learner::trainer::announce::Outlet;
use muster_protocol::id::{ObjectId, PolicyVersion};
use muster_protocol::message::version::Object;

/// Share of fetches that fail.
const FAILURES: f64 = 0.02;

#[derive(Debug, Clone, Default)]
pub struct Shelf {
    objects: Arc<Mutex<BTreeMap<ObjectId, Bytes>>>,
}

#[async_trait]
impl Outlet for Shelf {
    async fn offer(&self, object: &Object, bytes: Bytes) -> Result<(), String> {
        self.objects.lock().unwrap().insert(object.id(), bytes);
        Ok(())
    }

    fn keep_for(&self, object: &Object, _version: PolicyVersion) {
        // A shelf lets nothing go.
        assert!(self.objects.lock().unwrap().contains_key(&object.id()));
    }

    fn uploaded(&self) -> u64 {
        0
    }
}

/// A member's way to the shelf.
#[derive(Debug)]
pub struct Reach {
    pub shelf: Shelf,
    pub chance: Mutex<StdRng>,
}

#[async_trait]
impl ObjectSource for Reach {
    async fn fetch(&self, object: &Object) -> Result<Bytes, FetchError> {
        let (millis, fails) = {
            let mut chance = self.chance.lock().unwrap();
            (
                chance.random_range(5..100),
                chance.random::<f64>() < FAILURES,
            )
        };
        tokio::time::sleep(Duration::from_millis(millis)).await;
        let id = object.id();
        let found = self.shelf.objects.lock().unwrap().get(&id).cloned();
        found.filter(|_| !fails).ok_or_else(|| FetchError::Stalled {
            object: id,
            held: 0,
            shards: 1,
            waited_ms: millis,
            peers: 1,
            last: "the shelf was out of reach".to_owned(),
        })
    }
}
