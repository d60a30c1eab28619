//! The weight files of a Hugging Face folder: one `model.safetensors`, or several listed in
//! `model.safetensors.index.json`, mapped into memory while they are read.
//!
//! Knows which file holds which tensor, not what tensors mean. Invariant: no name in the index leads out of the folder,
//! and every file holds exactly the tensors that the index lists for it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::error::WeightsError;
use super::header::read_header;
use super::mapping::Mapping;
use crate::disk::{DiskError, WEIGHTS_BYTES_MAX, read_file};

/// The file of a model that is not split.
const SINGLE: &str = "model.safetensors";

/// The list of files of a model that is split.
const INDEX: &str = "model.safetensors.index.json";

/// Largest index read: the longest published ones have a few megabytes.
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// Most files accepted: the largest models have a few hundred.
const FILES_MAX: usize = 4096;

/// Longest file name accepted, as in most file systems.
const FILE_NAME_BYTES_MAX: usize = 255;

const HINT: &str = "a model folder holds config.json, model.safetensors (or an index and its files) and tokenizer.json";

#[derive(Debug)]
pub(crate) struct WeightFiles {
    files: Vec<Mapping>,
}

/// The part of an index that is read.
#[derive(Deserialize)]
struct Index {
    weight_map: WeightMap,
}

/// Tensors and their files as a list, in which a tensor listed twice is visible.
struct WeightMap(Vec<(String, String)>);

impl WeightFiles {
    /// Maps the files of a folder. As in transformers, the single file wins over an index.
    pub(crate) fn open(folder: &Path) -> Result<Self, WeightsError> {
        match Mapping::open(&folder.join(SINGLE), WEIGHTS_BYTES_MAX, HINT) {
            Ok(file) => return Ok(Self { files: vec![file] }),
            Err(DiskError::Missing { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let text = match read_file(&folder.join(INDEX), INDEX_BYTES_MAX, HINT) {
            Ok(text) => text,
            // Most models have the single file, so the error names that one.
            Err(DiskError::Missing { .. }) => {
                return Err(DiskError::Missing {
                    path: folder.join(SINGLE),
                    hint: HINT,
                }
                .into());
            }
            Err(error) => return Err(error.into()),
        };
        let mut files = Vec::new();
        for (name, tensors) in tensors_by_file(&text)? {
            let file = Mapping::open(&folder.join(&name), WEIGHTS_BYTES_MAX, HINT)?;
            refuse_other_tensors(&name, &file, &tensors)?;
            files.push(file);
        }
        Ok(Self { files })
    }

    /// Frees the memory of the pages read so far: see [`Mapping::free_pages`].
    pub(crate) fn free_pages(&self) {
        self.files.iter().for_each(Mapping::free_pages);
    }

    /// The bytes of each file.
    pub(crate) fn bytes(&self) -> Vec<&[u8]> {
        self.files.iter().map(|file| &**file).collect()
    }
}

/// The files that a `model.safetensors.index.json` lists, so that a client can fetch them.
///
/// # Errors
/// When the text is not an index, or lists a name that leads out of the folder.
pub fn weight_file_names(index: &[u8]) -> Result<Vec<String>, WeightsError> {
    Ok(tensors_by_file(index)?.into_keys().collect())
}

fn tensors_by_file(index: &[u8]) -> Result<BTreeMap<String, BTreeSet<String>>, WeightsError> {
    let index: Index =
        serde_json::from_slice(index).map_err(|error| WeightsError::Index(error.to_string()))?;
    let mut files: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut tensors = BTreeSet::new();
    for (tensor, file) in index.weight_map.0 {
        if !is_weight_file_name(&file) {
            return Err(WeightsError::FileName {
                file: file.chars().take(80).collect(),
            });
        }
        if !tensors.insert(tensor.clone()) {
            return Err(WeightsError::Duplicate { tensor });
        }
        files.entry(file).or_default().insert(tensor);
    }
    if files.is_empty() || files.len() > FILES_MAX {
        let problem = format!(
            "it lists {} files, but 1 to {FILES_MAX} can be read",
            files.len()
        );
        return Err(WeightsError::Index(problem));
    }
    Ok(files)
}

/// Whether `name` is a safetensors file directly within the folder.
fn is_weight_file_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    name.len() <= FILE_NAME_BYTES_MAX
        && name.chars().all(allowed)
        && !name.starts_with('.')
        && name.ends_with(".safetensors")
}

fn refuse_other_tensors(
    name: &str,
    file: &[u8],
    expected: &BTreeSet<String>,
) -> Result<(), WeightsError> {
    let (metadata, _) = read_header(file)?;
    let found: BTreeSet<String> = metadata.tensors().into_keys().collect();
    match found.symmetric_difference(expected).next() {
        None => Ok(()),
        Some(tensor) => Err(WeightsError::Misplaced {
            tensor: tensor.clone(),
            file: name.to_owned(),
        }),
    }
}

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = WeightMap;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a map from tensors to file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(WeightMap(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::{Dtype, TensorView};
    use serde_json::{Value, json};

    use super::*;
    use crate::config::Config;
    use crate::kernels::KernelSet;
    use crate::policy::{Policy, read_model};
    use crate::testing::{families, image, tiny, untied};
    use crate::weights::{Image, Storage};

    /// A model split over several files, as transformers writes large ones; the tensors are dealt out in turn.
    struct Split {
        folder: tempfile::TempDir,
        index: Value,
    }

    impl Split {
        fn of(config: &Config, image: &Image, files: usize) -> Self {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("config.json"), config.to_json("float32")).unwrap();
            let mut index = json!({ "metadata": { "total_size": 1 }, "weight_map": {} });
            for file in 0..files {
                let name = format!("model-{:05}-of-{files:05}.safetensors", file + 1);
                let entries = image.tensors().iter().skip(file).step_by(files);
                let views = entries.map(|entry| {
                    index["weight_map"][&entry.name] = json!(name);
                    let dtype = match entry.storage {
                        Storage::F32 => Dtype::F32,
                        Storage::Bf16 => Dtype::BF16,
                    };
                    let data = &image.bytes()[entry.bytes.clone()];
                    (
                        entry.name.clone(),
                        TensorView::new(dtype, entry.shape.clone(), data).unwrap(),
                    )
                });
                let views: Vec<_> = views.collect();
                let bytes = safetensors::serialize(views, None).unwrap();
                std::fs::write(folder.path().join(&name), bytes).unwrap();
            }
            let split = Self { folder, index };
            split.write(&split.index.to_string());
            split
        }

        fn write(&self, index: &str) {
            std::fs::write(self.folder.path().join(INDEX), index).unwrap();
        }

        fn read(&self) -> Result<Image, String> {
            read_model(self.folder.path())
                .map(|(_, image)| image)
                .map_err(|error| error.to_string())
        }

        /// The error once `change` was made to the index.
        fn refused(&self, change: impl Fn(&mut Value)) -> String {
            let mut index = self.index.clone();
            change(&mut index);
            self.write(&index.to_string());
            self.read().unwrap_err()
        }
    }

    #[test]
    fn a_model_split_over_files_gives_the_same_image() {
        for config in families() {
            let image = image(&config, 1);
            let split = Split::of(&config, &image, 3);
            assert_eq!(split.read().unwrap().bytes(), image.bytes());
            Policy::load(
                split.folder.path(),
                KernelSet::Fused,
                &crate::Device::Cpu,
                &crate::Threads::one(),
            )
            .unwrap();
        }
    }

    #[test]
    fn the_single_file_wins_over_an_index() {
        let (ours, other) = (image(&tiny(), 1), image(&tiny(), 2));
        let split = Split::of(&tiny(), &other, 2);
        std::fs::write(split.folder.path().join(SINGLE), ours.bytes()).unwrap();
        assert_eq!(split.read().unwrap().bytes(), ours.bytes());
    }

    #[test]
    fn a_name_that_leads_out_of_the_folder_is_refused() {
        let split = Split::of(&untied(), &image(&untied(), 1), 2);
        for name in [
            "../model.safetensors",
            "/etc/model.safetensors",
            "a/b.safetensors",
            "a\\b.safetensors",
            "..safetensors",
            "model.bin",
            "",
        ] {
            let error = split.refused(|index| index["weight_map"]["lm_head.weight"] = json!(name));
            assert!(error.contains("index") && error.contains(name), "{error}");
        }
    }

    #[test]
    fn missing_duplicate_and_misplaced_tensors_are_refused_by_name() {
        let split = Split::of(&untied(), &image(&untied(), 1), 2);
        let names = |index: &mut Value| index["weight_map"].as_object().unwrap().clone();
        let head = "lm_head.weight";
        let error = split.refused(|index| {
            index["weight_map"].as_object_mut().unwrap().remove(head);
        });
        assert!(error.contains(head), "{error}");
        let error = split.refused(|index| {
            let other = names(index)
                .into_iter()
                .find(|(_, file)| *file != index["weight_map"][head]);
            index["weight_map"][head] = other.unwrap().1;
        });
        assert!(
            error.contains("tensor `") && error.contains("index"),
            "{error}"
        );
        let error = split.refused(|index| {
            index["weight_map"]["model.extra.weight"] = index["weight_map"][head].clone();
        });
        assert!(error.contains("model.extra.weight"), "{error}");
        let text = split.index.to_string();
        let duplicate = text.replacen(
            "\"weight_map\":{",
            "\"weight_map\":{\"lm_head.weight\":\"x.safetensors\",",
            1,
        );
        split.write(&duplicate);
        assert!(split.read().unwrap_err().contains("lm_head.weight"));
        for index in [
            "{",
            "{}",
            "{\"weight_map\": {}}",
            "{\"weight_map\": {\"a\": 1}}",
        ] {
            split.write(index);
            assert!(split.read().unwrap_err().contains("index"), "{index}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let split = Split::of(&tiny(), &image(&tiny(), 1), 2);
        let name = "model-00002-of-00002.safetensors";
        std::fs::remove_file(split.folder.path().join(name)).unwrap();
        let error = split.read().unwrap_err();
        assert!(error.contains(&format!("{name} is missing")), "{error}");
        std::fs::remove_file(split.folder.path().join(INDEX)).unwrap();
        assert!(
            split
                .read()
                .unwrap_err()
                .contains("model.safetensors is missing")
        );
    }
}
