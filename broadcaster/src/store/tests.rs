use muster_protocol::id::{ContentHash, StateRoot};

use super::*;
use crate::store::object::describe_object;

fn bytes_of(seed: u8, length: usize) -> Bytes {
    let mut bytes = vec![0; length];
    blake3::Hasher::new()
        .update(&[seed])
        .finalize_xof()
        .fill(&mut bytes);
    bytes.into()
}

fn anchor(version: u64, length: usize) -> (Object, Bytes) {
    let bytes = bytes_of(version as u8, length);
    let content = Content::Anchor {
        root: StateRoot([version as u8; 32]),
    };
    (
        describe_object(content, PolicyVersion(version), &bytes).unwrap(),
        bytes,
    )
}

fn in_memory(bytes_max: u64, versions_kept: usize) -> Store {
    Store::open(StoreConfig {
        directory: None,
        bytes_max,
        versions_kept,
    })
    .unwrap()
}

fn shard_of(object: &Object, bytes: &Bytes, shard: u32) -> Bytes {
    let range = shard_range(object, shard).unwrap();
    bytes.slice(range.start as usize..range.end as usize)
}

#[test]
fn an_object_is_whole_once_its_last_shard_is_in() {
    let store = in_memory(1 << 20, 4);
    let (object, bytes) = anchor(1, 10_000);
    let id = store.admit(&object).unwrap();
    for shard in [2, 0, 1] {
        assert_eq!(store.whole(&id), None);
        let slice = shard_of(&object, &bytes, shard);
        assert_eq!(
            store.insert(&id, shard, slice.clone()).unwrap(),
            Inserted::New
        );
        assert_eq!(
            store.insert(&id, shard, slice.clone()).unwrap(),
            Inserted::Duplicate
        );
        assert_eq!(store.shard(&id, shard), Some(slice));
    }
    assert_eq!(store.whole(&id), Some(bytes));
}

#[test]
fn what_is_not_the_shard_is_refused_and_not_held() {
    let store = in_memory(1 << 20, 4);
    let (object, bytes) = anchor(1, 10_000);
    let id = store.admit(&object).unwrap();
    let wrong = shard_of(&object, &bytes, 1);
    assert!(matches!(
        store.insert(&id, 0, wrong),
        Err(StoreError::Content(_))
    ));
    assert!(matches!(
        store.insert(&id, 9, bytes.clone()),
        Err(StoreError::Content(_))
    ));
    assert!(store.offer(&object, bytes.slice(1..)).is_err());
    assert_eq!(store.held(&id).unwrap().count(), 0);
    assert!(matches!(
        store.insert(&ObjectId([0; 32]), 0, bytes),
        Err(StoreError::Unknown { .. })
    ));
}

#[test]
fn the_last_versions_and_what_is_pinned_stay() {
    let store = in_memory(1 << 20, 2);
    let (first, bytes) = anchor(1, 5_000);
    let pinned = store.offer(&first, bytes).unwrap();
    assert!(store.pin(&pinned));
    for version in 2..=4 {
        let (object, bytes) = anchor(version, 5_000);
        store.offer(&object, bytes).unwrap();
    }
    let mut expected = [1, 3, 4].map(|version| anchor(version, 5_000).0.id());
    expected.sort();
    assert_eq!(store.objects(), expected);
    store.unpin(&pinned);
    let (object, bytes) = anchor(5, 5_000);
    store.offer(&object, bytes).unwrap();
    assert_eq!(store.objects().len(), 2);
}

#[test]
fn a_file_outlives_the_version_that_it_came_with() {
    let store = in_memory(1 << 20, 1);
    let bytes = bytes_of(9, 300);
    let content = Content::File {
        hash: ContentHash::of(&bytes),
    };
    let file = describe_object(content, PolicyVersion(0), &bytes).unwrap();
    let id = store.offer(&file, bytes).unwrap();
    for version in 1..=3 {
        let (object, bytes) = anchor(version, 5_000);
        store.offer(&object, bytes).unwrap();
    }
    assert!(store.whole(&id).is_some());
    assert_eq!(store.objects().len(), 2);
}

#[test]
fn the_bound_in_bytes_holds_and_names_what_to_raise() {
    let store = in_memory(12_000, 4);
    for version in 1..=3 {
        let (object, bytes) = anchor(version, 5_000);
        store.offer(&object, bytes).unwrap();
        assert!(store.bytes() <= 12_000);
    }
    store.objects().iter().for_each(|id| assert!(store.pin(id)));
    let (object, bytes) = anchor(4, 5_000);
    let error = store.offer(&object, bytes).unwrap_err();
    assert!(matches!(
        error,
        StoreError::NoRoom {
            needed: 5_000,
            pinned: 10_000,
            ..
        }
    ));
    assert!(error.to_string().contains("bytes_max"));
}

#[test]
fn a_restart_goes_on_with_the_shards_that_are_whole() {
    let folder = tempfile::tempdir().unwrap();
    let directory = Some(folder.path().to_owned());
    let config = StoreConfig {
        directory,
        bytes_max: 1 << 20,
        versions_kept: 4,
    };
    let (object, bytes) = anchor(1, 20_000);
    let (complete, whole) = anchor(2, 9_000);
    let id = object.id();
    {
        let store = Store::open(config.clone()).unwrap();
        store.admit(&object).unwrap();
        for shard in [0, 2, 3] {
            store
                .insert(&id, shard, shard_of(&object, &bytes, shard))
                .unwrap();
        }
        store.offer(&complete, whole.clone()).unwrap();
    }
    let torn = folder.path().join(id.to_string()).join("2");
    std::fs::write(&torn, b"half").unwrap();
    std::fs::create_dir(folder.path().join("rubbish")).unwrap();
    let store = Store::open(config).unwrap();
    assert_eq!(store.held(&id).unwrap().iter().collect::<Vec<_>>(), [0, 3]);
    assert_eq!(store.whole(&complete.id()), Some(whole));
    assert!(!torn.exists() && !folder.path().join("rubbish").exists());
}

#[test]
fn a_dropped_object_leaves_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let directory = Some(folder.path().to_owned());
    let store = Store::open(StoreConfig {
        directory,
        bytes_max: 1 << 20,
        versions_kept: 1,
    })
    .unwrap();
    for version in 1..=3 {
        let (object, bytes) = anchor(version, 5_000);
        store.offer(&object, bytes).unwrap();
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}
