use std::io::Read as _;

use super::*;
use crate::version::state::tensor_spans;

/// A safetensors file with these tensors in the order given; `note` makes its header another one than would be written here.
fn image(tensors: &[(String, &str, u64)], note: &str, spaces: usize) -> Vec<u8> {
    let mut header = format!(r#"{{"__metadata__":{{"format":"pt","note":"{note}"}}"#);
    let mut data = 0;
    for (name, dtype, elements) in tensors {
        let end = data + elements * if *dtype == "F32" { 4 } else { 2 };
        header += &format!(
            r#", "{name}":{{"dtype":"{dtype}","shape":[{elements}],"data_offsets":[{data},{end}]}}"#
        );
        data = end;
    }
    header += "}";
    header += &" ".repeat(spaces);
    let mut bytes = vec![0; data as usize];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    [
        &(header.len() as u64).to_le_bytes()[..],
        header.as_bytes(),
        &bytes,
    ]
    .concat()
}

/// Tensors not in the order of their names, one larger than the others together.
fn sample() -> Fixture {
    let tensors = [("w", 900), ("a", 300), ("z", 9_000), ("b", 200), ("c", 100)];
    let tensors = tensors.map(|(name, elements)| (name.to_owned(), "BF16", elements));
    Fixture {
        file_bytes_max: 2_000,
        ..Fixture::of(image(&tensors, "", 3))
    }
}

fn names_in(folder: &Path) -> Vec<String> {
    let found = disk::list_folder(folder, 500).unwrap();
    found.into_iter().map(|entry| entry.name).collect()
}

/// Whether an error names the file and a range with this byte in it.
fn names_byte(error: &SnapshotError, name: &str, at: u64) -> bool {
    match error {
        SnapshotError::Differs { file, range, .. } => file == name && range.contains(&at),
        SnapshotError::Manifest { bytes, .. } => name == MANIFEST_FILE && at < *bytes,
        _ => false,
    }
}

#[test]
fn weights_over_the_limit_are_several_files_with_an_index() {
    let fixture = sample();
    let (_parent, folder) = fixture.written();
    let expected = [
        "config.json",
        "manifest.json",
        "model-00001-of-00004.safetensors",
        "model-00002-of-00004.safetensors",
        "model-00003-of-00004.safetensors",
        "model-00004-of-00004.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ];
    assert_eq!(names_in(&folder), expected);
    let report = fixture.verify(&folder).unwrap();
    assert_eq!(report.files.len(), 7);
    let signed = signed_contents(&folder, &fixture.learner.peer_id(), &fixture.run).unwrap();
    assert_eq!(signed, report);
    let weights: u64 = report
        .files
        .iter()
        .filter(|(name, _)| name.ends_with("tensors"))
        .map(|(_, bytes)| bytes)
        .sum();
    assert_eq!(weights_bytes(&folder).unwrap(), weights);
    let manifest = std::fs::read(folder.join(MANIFEST_FILE)).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    assert_eq!(manifest["format"], "muster-snapshot-v2");
    assert_eq!(manifest["weights"]["split"]["files"][3]["tensors"], 2);
}

#[test]
fn a_flipped_byte_is_named_by_file_bytes_and_tensor() {
    let fixture = sample();
    let (_parent, folder) = fixture.written();
    let path = folder.join("model-00003-of-00004.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[9_000] ^= 4;
    std::fs::write(&path, &bytes).unwrap();
    let error = fixture.verify(&folder).unwrap_err();
    assert!(names_byte(
        &error,
        "model-00003-of-00004.safetensors",
        9_000
    ));
    let SnapshotError::Differs { range, place, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(range.end - range.start, 4_096, "{error}");
    assert_eq!(place, " (tensor `z`)");
    bytes[9_000] ^= 4;
    bytes[50] ^= 4;
    std::fs::write(&path, &bytes).unwrap();
    let error = fixture.verify(&folder).unwrap_err().to_string();
    let expected = "file model-00003-of-00004.safetensors differs from its signed hash in bytes 50..51 (header)";
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn missing_extra_truncated_and_swapped_files_are_named() {
    let fixture = sample();
    let broken = |break_it: &dyn Fn(&Path)| {
        let (_parent, folder) = fixture.written();
        break_it(&folder);
        fixture.verify(&folder).unwrap_err().to_string()
    };
    let second = "model-00002-of-00004.safetensors";
    let missing = broken(&|folder| std::fs::remove_file(folder.join(second)).unwrap());
    let expected = format!("file {second} is missing");
    assert!(missing.starts_with(&expected), "{missing}");
    let missing = broken(&|folder| std::fs::remove_file(folder.join(INDEX_FILE)).unwrap());
    let expected = format!("file {INDEX_FILE} is missing");
    assert!(missing.starts_with(&expected), "{missing}");
    for extra in ["model-00005-of-00004.safetensors", WEIGHTS_FILE] {
        let said = broken(&|folder| std::fs::write(folder.join(extra), b"").unwrap());
        let expected = format!("{extra} does not belong");
        assert!(said.starts_with(&expected), "{said}");
    }
    let truncated = broken(&|folder| {
        let bytes = std::fs::read(folder.join(second)).unwrap();
        std::fs::write(folder.join(second), &bytes[..bytes.len() - 1]).unwrap();
    });
    assert!(
        truncated.starts_with(&format!("file {second} has ")),
        "{truncated}"
    );
}

#[test]
fn files_of_one_size_that_are_swapped_are_named() {
    let tensors = ["a", "b", "c"].map(|name| (name.to_owned(), "F32", 100));
    let mut fixture = Fixture::of(image(&tensors, "", 0));
    fixture.file_bytes_max = 600;
    let (_parent, folder) = fixture.written();
    let path = |n: u32| folder.join(format!("model-0000{n}-of-00003.safetensors"));
    std::fs::rename(path(1), folder.join("aside")).unwrap();
    std::fs::rename(path(2), path(1)).unwrap();
    std::fs::rename(folder.join("aside"), path(2)).unwrap();
    let error = fixture.verify(&folder).unwrap_err();
    let SnapshotError::Differs { file, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(file, "model-00001-of-00003.safetensors");
}

#[test]
fn a_header_that_is_not_the_described_one_is_the_manifests_fault() {
    let fixture = sample();
    let (_parent, folder) = fixture.written();
    let path = folder.join(MANIFEST_FILE);
    let intact = std::fs::read_to_string(&path).unwrap();
    let other = intact.replacen(r#"\"format\":\"pt\""#, r#"\"format\":\"tp\""#, 1);
    assert_ne!(other, intact);
    std::fs::write(&path, other).unwrap();
    let error = fixture.verify(&folder).unwrap_err();
    assert!(matches!(error, SnapshotError::Manifest { .. }), "{error}");
}

#[test]
fn a_copy_in_other_files_is_the_same_snapshot_and_one_back_has_the_same_bytes() {
    let fixture = Fixture {
        file_bytes_max: FILE_BYTES_MAX,
        ..sample()
    };
    let (parent, whole) = fixture.written();
    let trust = (&fixture.learner.peer_id(), &fixture.run);
    let (split, back) = (parent.path().join("split"), parent.path().join("back"));
    let copied = copy(&whole, &split, trust, 2_000, Existing::Refuse).unwrap();
    assert_eq!(copied, fixture.verify(&split).unwrap());
    assert!(copied.files.contains_key(INDEX_FILE));
    let (_other_parent, direct) = sample_like(&fixture).written();
    assert_eq!(names_in(&split), names_in(&direct));
    for name in names_in(&split) {
        let read = |folder: &Path| std::fs::read(folder.join(&name)).unwrap();
        assert!(read(&split) == read(&direct), "{name}");
    }
    copy(&split, &back, trust, FILE_BYTES_MAX, Existing::Refuse).unwrap();
    assert_eq!(names_in(&back), names_in(&whole));
    for name in names_in(&back) {
        let read = |folder: &Path| std::fs::read(folder.join(&name)).unwrap();
        assert!(read(&back) == read(&whole), "{name}");
    }
}

/// The same snapshot, to be written in small files.
fn sample_like(fixture: &Fixture) -> Fixture {
    Fixture {
        file_bytes_max: 2_000,
        ..fixture.clone()
    }
}

#[test]
fn a_copy_of_what_does_not_hold_is_not_made() {
    let fixture = sample();
    let (parent, folder) = fixture.written();
    let path = folder.join("model-00001-of-00004.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let trust = (&fixture.learner.peer_id(), &fixture.run);
    let out = parent.path().join("out");
    let error = copy(&folder, &out, trust, 1 << 20, Existing::Refuse).unwrap_err();
    assert!(matches!(error, SnapshotError::Differs { .. }), "{error}");
    assert_eq!(names_in(parent.path()), ["7"]);
}

#[test]
fn more_files_than_a_folder_may_have_are_refused() {
    let tensors: Vec<_> = (0..=FOLDER_FILES_MAX)
        .map(|n| (format!("t{n}"), "F32", 8))
        .collect();
    let mut fixture = Fixture::of(image(&tensors, "", 0));
    fixture.file_bytes_max = 1;
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("7");
    let error = write(&folder, &fixture.contents(), Existing::Refuse).unwrap_err();
    let expected =
        "cannot be put in files of 1 bytes (they need more than 100 files): allow larger files";
    assert!(error.to_string().ends_with(expected), "{error}");
    assert!(!folder.exists());
    fixture.file_bytes_max = 250;
    write(&folder, &fixture.contents(), Existing::Refuse).unwrap();
    fixture.verify(&folder).unwrap();
}

#[test]
fn a_version_that_names_a_file_of_weights_among_the_others_is_refused_where_they_would_meet() {
    for name in ["model-00002-of-00004.safetensors", INDEX_FILE] {
        let mut fixture = sample();
        let mut version = fixture.version.body.clone();
        version.files[0].name = name.to_owned();
        fixture.version = seal(&fixture.learner, &fixture.run, 3, version).unwrap();
        let config = fixture.files.remove("config.json").unwrap();
        fixture.files.insert(name.to_owned(), config);
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("7");
        let written = write(&folder, &fixture.contents(), Existing::Refuse);
        assert!(matches!(written, Err(SnapshotError::Manifest { .. })));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_split_verifies_joins_to_the_image_and_lets_no_flipped_bit_pass(
        tensors in proptest::collection::btree_map("[a-z.]{1,9}", (any::<bool>(), 1u64..3_000), 1..8),
        order in any::<u64>(),
        spaces in 0usize..9,
        limit in 100u64..20_000,
        position in any::<prop::sample::Index>(),
        bit in 0u8..8,
    ) {
        let mut tensors: Vec<_> = tensors
            .into_iter()
            .map(|(name, (wide, elements))| (name, if wide { "F32" } else { "BF16" }, elements))
            .collect();
        let turn = order as usize % tensors.len();
        tensors.rotate_left(turn);
        let fixture = Fixture { file_bytes_max: limit, ..Fixture::of(image(&tensors, "é\\n", spaces)) };
        let (_parent, folder) = fixture.written();
        let report = fixture.verify(&folder).unwrap();
        let statements = Statements::read(&folder, &fixture.learner.peer_id(), &fixture.run).unwrap();
        let files = statements.weight_files();
        let mut joined = Vec::new();
        Joined::new(&folder, statements.split.as_ref(), &files).read_to_end(&mut joined).unwrap();
        prop_assert!(joined == fixture.weights);
        for file in statements.split.iter().flat_map(|split| &split.files) {
            prop_assert!(file.bytes() <= limit || file.tensors == 1);
            let bytes = std::fs::read(folder.join(&file.name)).unwrap();
            prop_assert_eq!(tensor_spans(&bytes).unwrap().len(), file.tensors);
        }
        for name in report.files.keys().map(String::as_str).chain([MANIFEST_FILE]) {
            let path = folder.join(name);
            let intact = std::fs::read(&path).unwrap();
            let at = position.index(intact.len());
            let mut flipped = intact.clone();
            flipped[at] ^= 1 << bit;
            std::fs::write(&path, flipped).unwrap();
            let error = fixture.verify(&folder).unwrap_err();
            prop_assert!(names_byte(&error, name, at as u64), "{} at {}: {}", name, at, error);
            std::fs::write(&path, intact).unwrap();
        }
        prop_assert!(fixture.verify(&folder).is_ok());
    }

    #[test]
    fn a_manifest_that_lies_about_the_files_is_refused(
        counts in proptest::collection::vec(prop_oneof![0usize..4, any::<usize>()], 0..6),
        header in prop_oneof![Just(None), ".{0,200}".prop_map(Some)],
        hashes in 0usize..7,
    ) {
        let fixture = sample();
        let (_parent, folder) = fixture.written();
        let path = folder.join(MANIFEST_FILE);
        let intact = std::fs::read(&path).unwrap();
        let mut manifest: serde_json::Value = serde_json::from_slice(&intact).unwrap();
        let split = &mut manifest["weights"]["split"];
        let honest = split["files"].as_array().unwrap().iter().map(|file| file["tensors"].as_u64().unwrap() as usize);
        prop_assume!(!(hashes == 5 && header.is_none() && honest.eq(counts.iter().copied())));
        split["files"] = counts.iter().map(|n| serde_json::json!({"name": "x", "bytes": 1, "tensors": n})).collect();
        if let Some(header) = header {
            split["header"] = header.into();
        }
        let held = split["hashes"].as_array_mut().unwrap();
        let first = held[0].clone();
        held.resize(hashes, first);
        std::fs::write(&path, serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
        prop_assert!(fixture.verify(&folder).is_err());
    }
}
