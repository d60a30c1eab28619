//! Maps with a largest size.
//!
//! A `BTreeMap` with a search for the oldest entry, and not the `lru` crate: only a new key in a full map searches, which
//! happens once per object or peer, and these maps are read in the order of their keys.

use std::collections::BTreeMap;

/// Makes room for `key` in a map of at most `limit` entries: removes the entry with the smallest `age` if the map is full and
/// `key` is not in it.
pub(crate) fn make_room<K: Ord + Copy, V, A: Ord>(
    map: &mut BTreeMap<K, V>,
    key: &K,
    limit: usize,
    age: impl Fn(&V) -> A,
) {
    if map.len() < limit || map.contains_key(key) {
        return;
    }
    let oldest = map.iter().min_by_key(|(_, value)| age(value));
    if let Some(oldest) = oldest.map(|(key, _)| *key) {
        map.remove(&oldest);
    }
    debug_assert!(map.len() < limit, "a bounded map has room for one more");
}
