//! The transfer of objects: fetches take a while and some fail. The members verify what they fetch, as in a real swarm.

use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use rand::Rng;
use rand::rngs::StdRng;

use muster_broadcaster::{FetchError, ObjectSource};
use muster_protocol::message::version::Object;

use crate::memory_objects::MemoryObjects;

/// Share of fetches that fail.
const FAILURES: f64 = 0.02;

/// One member's access to the objects.
#[derive(Debug)]
pub struct UnreliableSource {
    pub objects: MemoryObjects,
    pub rng: Mutex<StdRng>,
}

#[async_trait]
impl ObjectSource for UnreliableSource {
    async fn fetch(&self, object: &Object) -> Result<Bytes, FetchError> {
        let (millis, fails) = {
            let mut rng = self.rng.lock().unwrap();
            (rng.random_range(5..100), rng.random::<f64>() < FAILURES)
        };
        tokio::time::sleep(Duration::from_millis(millis)).await;
        let id = object.id();
        let found = self.objects.fetch(object).await.ok().filter(|_| !fails);
        found.ok_or_else(|| FetchError::Stalled {
            object: id,
            held: 0,
            shards: 1,
            waited_ms: millis,
            peers: 1,
            last: "the simulated fetch failed".to_owned(),
        })
    }
}
