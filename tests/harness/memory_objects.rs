//! Keeps the objects of a run in memory, for tests that are not about transfer.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;

use muster_learner::trainer::announce::Outlet;
use muster_protocol::id::{ObjectId, PolicyVersion};
use muster_protocol::message::version::Object;

/// Every object that the trainer has offered; clones share the objects.
#[derive(Debug, Clone, Default)]
pub struct MemoryObjects {
    objects: Arc<Mutex<BTreeMap<ObjectId, Bytes>>>,
}

impl MemoryObjects {
    pub fn get(&self, id: &ObjectId) -> Option<Bytes> {
        self.objects.lock().unwrap().get(id).cloned()
    }
}

#[async_trait]
impl Outlet for MemoryObjects {
    async fn offer(&self, object: &Object, bytes: Bytes) -> Result<(), String> {
        self.objects.lock().unwrap().insert(object.id(), bytes);
        Ok(())
    }

    /// Objects are never dropped, so that there is only the caller's order to check.
    fn keep_for(&self, object: &Object, _version: PolicyVersion) {
        assert!(
            self.get(&object.id()).is_some(),
            "kept before it was offered"
        );
    }

    fn uploaded(&self) -> u64 {
        0
    }
}
