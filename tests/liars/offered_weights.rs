//! The objects that the trainer of a test offers. Tests that are not about transfer fetch them from memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;

use muster_broadcaster::store::StoreError;
use muster_broadcaster::{FetchError, ObjectSource, Swarm};
use muster_protocol::id::{ObjectId, PolicyVersion};
use muster_protocol::message::version::{Content, Object};

use crate::memory_objects::MemoryObjects;

/// Keeps the anchors, and passes every object to the peer-to-peer swarm, or to memory without one.
#[derive(Debug, Default)]
pub struct OfferedWeights {
    objects: MemoryObjects,
    anchors: Mutex<BTreeMap<PolicyVersion, (ObjectId, Bytes)>>,
    swarm: Option<Swarm>,
}

impl OfferedWeights {
    pub fn new(swarm: Option<Swarm>) -> Arc<Self> {
        Arc::new(Self {
            swarm,
            ..Self::default()
        })
    }

    /// The weights of every version, with the id of their object.
    pub fn anchors(&self) -> BTreeMap<PolicyVersion, (ObjectId, Bytes)> {
        self.anchors.lock().unwrap().clone()
    }

    fn inner(&self) -> &dyn ObjectSource {
        match &self.swarm {
            Some(swarm) => swarm,
            None => &self.objects,
        }
    }
}

#[async_trait]
impl ObjectSource for OfferedWeights {
    async fn fetch(&self, object: &Object) -> Result<Bytes, FetchError> {
        self.inner().fetch(object).await
    }

    async fn offer(&self, object: &Object, bytes: Bytes) -> Result<(), StoreError> {
        if let Content::Anchor { .. } = object.content {
            let anchor = (object.id(), bytes.clone());
            self.anchors.lock().unwrap().insert(object.version, anchor);
        }
        self.inner().offer(object, bytes).await
    }

    fn keep_for(&self, object: &Object, version: PolicyVersion) {
        self.inner().keep_for(object, version);
    }

    fn uploaded_bytes(&self) -> u64 {
        self.inner().uploaded_bytes()
    }
}
