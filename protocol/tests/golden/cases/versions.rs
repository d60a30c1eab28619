//! Golden messages about versions and the objects that carry them.

use muster_protocol::id::{ContentHash, DescriptorHash, Generation, PolicyVersion, StateRoot};
use muster_protocol::message::version::{
    Announcement, Codec, Content, Dtype, FileEntry, Object, Parameter, Part, PartKind, Version,
    state_root,
};

use super::{bytes_of, envelope};

pub fn version() -> Version {
    let parameter = |name: &str, shape: &[u64], dtype, stage| Parameter {
        name: name.to_owned(),
        shape: shape.to_vec(),
        dtype,
        stage,
    };
    let part = |kind, name| Part {
        kind,
        root: ContentHash(bytes_of(name)),
    };
    let parts = vec![
        part(PartKind::Base, "base"),
        part(PartKind::Adapter, "adapter"),
    ];
    Version {
        descriptor: DescriptorHash(bytes_of("descriptor")),
        generation: Generation(3),
        version: PolicyVersion(6),
        parent: Some(StateRoot(bytes_of("state"))),
        parameters: vec![
            parameter("embed", &[16, 96], Dtype::Bf16, 0),
            parameter("norm", &[96], Dtype::F32, 1),
            parameter("head", &[300, 2], Dtype::F16, 1),
        ],
        root: state_root(&parts),
        parts,
        files: vec![FileEntry {
            name: "config.json".to_owned(),
            bytes: 612,
            hash: ContentHash(bytes_of("config.json")),
        }],
    }
}

pub fn objects() -> Vec<(&'static str, Object)> {
    let object = |content| Object {
        content,
        version: PolicyVersion(6),
        bytes: 5_000,
        codec: match content {
            Content::Delta { .. } => Codec::Delta,
            Content::Anchor { .. } | Content::File { .. } => Codec::Raw,
        },
        shard_bytes: 4_096,
        shards: vec![
            ContentHash(bytes_of("shard 0")),
            ContentHash(bytes_of("shard 1")),
        ],
    };
    let anchor = Content::Anchor {
        root: StateRoot(bytes_of("state")),
    };
    let delta = Content::Delta {
        from: StateRoot(bytes_of("older state")),
        to: StateRoot(bytes_of("state")),
    };
    let file = Content::File {
        hash: ContentHash(bytes_of("config.json")),
    };
    vec![
        ("anchor", object(anchor)),
        ("delta", object(delta)),
        ("file", object(file)),
    ]
}

pub fn announcement() -> Announcement {
    Announcement {
        version: envelope("version").into_vec(),
        objects: vec![envelope("anchor"), envelope("file")],
    }
}
