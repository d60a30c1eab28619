//! Where the trainer of a test hands its weights to, and the tests that are not about transfer take them from.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;

use muster_broadcaster::{FetchError, ObjectSource, Swarm};
use muster_learner::trainer::announce::Outlet;
use muster_protocol::id::{ObjectId, PolicyVersion};
use muster_protocol::message::version::{Content, Object};

/// Every object that was offered, in memory; passed on to the swarm of peers where there is one.
#[derive(Debug, Default)]
pub struct Shelf {
    objects: Mutex<BTreeMap<ObjectId, Bytes>>,
    anchors: Mutex<BTreeMap<PolicyVersion, (ObjectId, Bytes)>>,
    swarm: Option<Swarm>,
}

impl Shelf {
    pub fn new(swarm: Option<Swarm>) -> Arc<Self> {
        Arc::new(Self {
            swarm,
            ..Self::default()
        })
    }

    /// The weights of every version, with the object that they travelled as.
    pub fn anchors(&self) -> BTreeMap<PolicyVersion, (ObjectId, Bytes)> {
        self.anchors.lock().unwrap().clone()
    }
}

#[async_trait]
impl Outlet for Shelf {
    async fn offer(&self, object: &Object, bytes: Bytes) -> Result<(), String> {
        let id = object.id();
        if let Content::Anchor { .. } = object.content {
            let anchor = (id, bytes.clone());
            self.anchors.lock().unwrap().insert(object.version, anchor);
        }
        match &self.swarm {
            Some(swarm) => Outlet::offer(swarm, object, bytes).await,
            None => {
                self.objects.lock().unwrap().insert(id, bytes);
                Ok(())
            }
        }
    }

    fn keep_for(&self, object: &Object, version: PolicyVersion) {
        match &self.swarm {
            Some(swarm) => Outlet::keep_for(swarm, object, version),
            None => assert!(self.objects.lock().unwrap().contains_key(&object.id())),
        }
    }

    fn uploaded(&self) -> u64 {
        self.swarm.as_ref().map_or(0, Outlet::uploaded)
    }
}

#[async_trait]
impl ObjectSource for Shelf {
    async fn fetch(&self, object: &Object) -> Result<Bytes, FetchError> {
        let found = self.objects.lock().unwrap().get(&object.id()).cloned();
        found.ok_or(FetchError::Stopped)
    }
}
