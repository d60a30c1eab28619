use muster_protocol::envelope::seal;
use muster_protocol::id::{DescriptorHash, Generation, PolicyVersion};
use muster_protocol::identity::Identity;
use muster_protocol::message::version::{Content, FileEntry, state_root};
use proptest::prelude::*;

use super::names::DOWNLOADER_FOLDER;
use super::*;
use crate::store::object::describe_object;
use crate::version::state::describe_state;

mod split;

/// Everything that a snapshot is made of.
#[derive(Clone)]
struct Fixture {
    run: RunId,
    learner: Identity,
    version: Signed<Version>,
    anchor: Signed<Object>,
    weights: Vec<u8>,
    files: BTreeMap<String, Bytes>,
    file_bytes_max: u64,
}

impl Fixture {
    fn new() -> Self {
        Self::of(safetensors())
    }

    fn of(weights: Vec<u8>) -> Self {
        let learner = Identity::generate();
        let files: BTreeMap<String, Bytes> = BTreeMap::from([
            (
                "config.json".to_owned(),
                Bytes::from_static(br#"{"model_type":"qwen2"}"#),
            ),
            (
                "tokenizer.json".to_owned(),
                Bytes::from_static(br#"{"version":"1.0"}"#),
            ),
        ]);
        let version = version_of(&weights, &files);
        let run: RunId = "test".parse().unwrap();
        let content = Content::Anchor { root: version.root };
        let anchor = describe_object(content, version.version, &weights).unwrap();
        let version = seal(&learner, &run, 1, version).unwrap();
        let anchor = seal(&learner, &run, 2, anchor).unwrap();
        Self {
            run,
            learner,
            version,
            anchor,
            weights,
            files,
            file_bytes_max: FILE_BYTES_MAX,
        }
    }

    fn contents(&self) -> Contents<'_> {
        Contents {
            run: &self.run,
            version: &self.version,
            anchor: &self.anchor,
            weights: &self.weights,
            files: &self.files,
            file_bytes_max: self.file_bytes_max,
        }
    }

    fn verify(&self, folder: &Path) -> Result<Report, SnapshotError> {
        verify(folder, &self.learner.peer_id(), &self.run)
    }

    /// A folder with the snapshot in it.
    fn written(&self) -> (tempfile::TempDir, std::path::PathBuf) {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("7");
        write(&folder, &self.contents(), Existing::Refuse).unwrap();
        (parent, folder)
    }
}

fn safetensors() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[40,64],"data_offsets":[0,10240]},"b":{"dtype":"BF16","shape":[100],"data_offsets":[10240,10440]}}"#;
    let mut data = vec![0; 10_440];
    blake3::Hasher::new().finalize_xof().fill(&mut data);
    [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        &data,
    ]
    .concat()
}

fn version_of(weights: &[u8], files: &BTreeMap<String, Bytes>) -> Version {
    let (parameters, part) = describe_state(weights).unwrap();
    let entry = |(name, bytes): (&String, &Bytes)| FileEntry {
        name: name.clone(),
        bytes: bytes.len() as u64,
        hash: ContentHash::of(bytes),
    };
    Version {
        descriptor: DescriptorHash([4; 32]),
        generation: Generation(1),
        version: PolicyVersion(7),
        parent: None,
        parameters,
        parts: vec![part],
        root: state_root(&[part]),
        files: files.iter().map(entry).collect(),
    }
}

#[test]
fn a_snapshot_that_is_written_verifies() {
    let fixture = Fixture::new();
    let (_parent, folder) = fixture.written();
    let report = fixture.verify(&folder).unwrap();
    assert_eq!(report.version, fixture.version.body.reference());
    assert_eq!(report.files.len(), 3);
    let manifest = std::fs::read_to_string(folder.join(MANIFEST_FILE)).unwrap();
    let readable: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(readable["policy_version"], 7);
    // Folders that were made before there were others stay as they are.
    assert_eq!(readable["format"], "muster-snapshot-v1");
    assert!(readable["weights"].get("split").is_none());
    assert_eq!(readable["root"], fixture.version.body.root.to_string());
    assert_eq!(readable["parameters"][0]["name"], "a");
}

#[test]
fn a_flipped_byte_of_the_weights_is_named_by_file_bytes_and_tensor() {
    let fixture = Fixture::new();
    let (_parent, folder) = fixture.written();
    let mut weights = fixture.weights.clone();
    weights[5_000] ^= 1;
    std::fs::write(folder.join(WEIGHTS_FILE), weights).unwrap();
    let error = fixture.verify(&folder).unwrap_err();
    let expected =
        "file model.safetensors differs from its signed hash in bytes 4096..8192 (tensor `a`)";
    assert!(error.to_string().starts_with(expected), "{error}");
}

#[test]
fn missing_extra_truncated_and_unreachable_files_are_named() {
    let fixture = Fixture::new();
    let broken = |break_it: &dyn Fn(&Path)| {
        let (_parent, folder) = fixture.written();
        break_it(&folder);
        fixture.verify(&folder).unwrap_err().to_string()
    };
    let missing = broken(&|folder| std::fs::remove_file(folder.join("config.json")).unwrap());
    assert!(
        missing.starts_with("file config.json is missing"),
        "{missing}"
    );
    let extra = broken(&|folder| std::fs::write(folder.join("more.py"), b"").unwrap());
    assert!(extra.starts_with("more.py does not belong"), "{extra}");
    let truncated = broken(&|folder| {
        std::fs::write(folder.join(WEIGHTS_FILE), &fixture.weights[..9_000]).unwrap();
    });
    assert!(
        truncated.starts_with("file model.safetensors has 9000 bytes"),
        "{truncated}"
    );
    let linked = broken(&|folder| {
        std::fs::remove_file(folder.join("config.json")).unwrap();
        std::os::unix::fs::symlink("nowhere", folder.join("config.json")).unwrap();
    });
    assert!(
        linked.starts_with("config.json does not belong"),
        "{linked}"
    );
    let unsigned = broken(&|folder| std::fs::remove_file(folder.join(MANIFEST_FILE)).unwrap());
    assert!(
        unsigned.starts_with("file manifest.json is missing"),
        "{unsigned}"
    );
}

#[test]
fn a_folder_of_links_as_downloaders_make_it_is_verified_through_them() {
    let fixture = Fixture::new();
    let (parent, folder) = fixture.written();
    let blob = parent.path().join("blob");
    std::fs::rename(folder.join(WEIGHTS_FILE), &blob).unwrap();
    std::os::unix::fs::symlink("../blob", folder.join(WEIGHTS_FILE)).unwrap();
    std::fs::create_dir(folder.join(DOWNLOADER_FOLDER)).unwrap();
    let report = fixture.verify(&folder).unwrap();
    assert_eq!(report.statement, fixture.version.hash());
    let mut bad = fixture.weights.clone();
    bad[10_500] ^= 1;
    std::fs::write(&blob, bad).unwrap();
    let error = fixture.verify(&folder).unwrap_err();
    assert!(matches!(error, SnapshotError::Differs { .. }), "{error}");
    std::fs::create_dir(folder.join("more")).unwrap();
    let error = fixture.verify(&folder).unwrap_err();
    assert!(matches!(error, SnapshotError::Unexpected { .. }), "{error}");
}

#[test]
fn a_manifest_signed_by_another_key_or_for_another_run_is_refused() {
    let fixture = Fixture::new();
    let (_parent, folder) = fixture.written();
    let stranger = Identity::generate().peer_id();
    let error = verify(&folder, &stranger, &fixture.run).unwrap_err();
    assert!(matches!(error, SnapshotError::Author { .. }), "{error}");
    let error = verify(
        &folder,
        &fixture.learner.peer_id(),
        &"other".parse().unwrap(),
    )
    .unwrap_err();
    assert!(error.to_string().contains("run `test`"), "{error}");
}

#[test]
fn weights_of_another_version_are_not_written() {
    let mut fixture = Fixture::new();
    let at = fixture.weights.len() - 1;
    fixture.weights[at] ^= 1;
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("7");
    let error = write(&folder, &fixture.contents(), Existing::Refuse).unwrap_err();
    assert!(matches!(error, SnapshotError::Differs { .. }), "{error}");
    assert!(!folder.exists());
}

#[test]
fn files_that_are_wrong_missing_or_not_named_are_not_written() {
    let parent = tempfile::tempdir().unwrap();
    let attempt = |change: &dyn Fn(&mut BTreeMap<String, Bytes>)| {
        let mut fixture = Fixture::new();
        change(&mut fixture.files);
        write(
            &parent.path().join("7"),
            &fixture.contents(),
            Existing::Refuse,
        )
        .unwrap_err()
    };
    let missing = attempt(&|files| drop(files.remove("config.json")));
    assert!(matches!(missing, SnapshotError::Missing { .. }));
    let wrong =
        attempt(&|files| drop(files.insert("config.json".to_owned(), Bytes::from_static(b"{}"))));
    assert!(matches!(wrong, SnapshotError::Size { .. }));
    let unnamed = attempt(&|files| drop(files.insert("run.py".to_owned(), Bytes::new())));
    assert!(matches!(unnamed, SnapshotError::Unexpected { .. }));
}

#[test]
fn a_version_that_names_the_manifest_as_a_file_is_refused() {
    let mut fixture = Fixture::new();
    let mut version = fixture.version.body.clone();
    version.files[0].name = MANIFEST_FILE.to_owned();
    fixture.version = seal(&fixture.learner, &fixture.run, 3, version).unwrap();
    let parent = tempfile::tempdir().unwrap();
    let written = write(
        &parent.path().join("7"),
        &fixture.contents(),
        Existing::Refuse,
    );
    assert!(matches!(written, Err(SnapshotError::Manifest { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_flipped_bit_in_any_file_survives(position: prop::sample::Index, bit in 0u8..8) {
        let fixture = Fixture::new();
        let (_parent, folder) = fixture.written();
        for file in [WEIGHTS_FILE, MANIFEST_FILE, "config.json", "tokenizer.json"] {
            let path = folder.join(file);
            let intact = std::fs::read(&path).unwrap();
            let mut flipped = intact.clone();
            flipped[position.index(intact.len())] ^= 1 << bit;
            std::fs::write(&path, flipped).unwrap();
            let error = fixture.verify(&folder).unwrap_err().to_string();
            prop_assert!(error.contains(file) && error.contains("bytes"), "{}: {}", file, error);
            std::fs::write(&path, intact).unwrap();
        }
        prop_assert!(fixture.verify(&folder).is_ok());
    }

    #[test]
    fn a_manifest_of_garbage_is_refused(garbage in proptest::collection::vec(any::<u8>(), 0..500)) {
        let fixture = Fixture::new();
        let (_parent, folder) = fixture.written();
        std::fs::write(folder.join(MANIFEST_FILE), garbage).unwrap();
        prop_assert!(fixture.verify(&folder).is_err());
    }
}
