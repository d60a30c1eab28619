//! Keeps the objects of a run in memory, for tests that are not about transfer.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;

use muster_broadcaster::store::StoreError;
use muster_broadcaster::{FetchError, ObjectSource};
use muster_protocol::id::{ObjectId, PolicyVersion};
use muster_protocol::message::version::Object;

/// Every object that the trainer has offered; clones share the objects.
#[derive(Debug, Clone, Default)]
pub struct MemoryObjects {
    objects: Arc<Mutex<BTreeMap<ObjectId, Bytes>>>,
}

#[async_trait]
impl ObjectSource for MemoryObjects {
    async fn fetch(&self, object: &Object) -> Result<Bytes, FetchError> {
        let found = self.objects.lock().unwrap().get(&object.id()).cloned();
        found.ok_or(FetchError::Stopped)
    }

    async fn offer(&self, object: &Object, bytes: Bytes) -> Result<(), StoreError> {
        self.objects.lock().unwrap().insert(object.id(), bytes);
        Ok(())
    }

    /// Objects are never dropped, so that there is only the caller's order to check.
    fn keep_for(&self, object: &Object, _version: PolicyVersion) {
        let is_offered = self.objects.lock().unwrap().contains_key(&object.id());
        assert!(is_offered, "kept before it was offered");
    }
}
