//! The optimizer's state as one safetensors file: `values.N`, `first.N` and `second.N` for each parameter N, all float32,
//! with the configuration, the update count and a BLAKE3 of the data in the header.

use std::io;
use std::path::Path;
use std::sync::Arc;

use safetensors::tensor::SafeTensors;

use super::{Master, OptimizerError};
use crate::config::Config;
use crate::disk::WEIGHTS_BYTES_MAX;
use crate::disk::{read_file, write_atomically};
use crate::layout::Layout;
use crate::weights::{HeaderTensor, Storage, write_header};

/// Name and version of the format.
const FORMAT: &str = "muster-optimizer-v1";

/// Floats turned to bytes at once.
const CHUNK: usize = 1 << 14;

const SECTIONS: [&str; 3] = ["values", "first", "second"];

impl Master {
    /// Writes weights, moments and update count to one file, atomically.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), OptimizerError> {
        let sections = [&self.values, &self.first, &self.second];
        let mut hasher = blake3::Hasher::new();
        // Hashing cannot fail, and a file that was not written is reported below.
        for_each_chunk(&sections, |bytes| {
            hasher.update(bytes);
            Ok(())
        })
        .ok();
        let digest = hasher.finalize().to_hex();
        let config = self.config.to_json(Storage::F32.torch_name());
        let updates = self.updates.to_string();
        let metadata = [
            ("format", FORMAT),
            ("updates", &updates),
            ("blake3", digest.as_str()),
            ("config", &config),
        ];
        let parameters = self.layout.parameters();
        let section_bytes = self.layout.len() * 4;
        let names: Vec<String> = SECTIONS
            .iter()
            .flat_map(|section| {
                parameters
                    .iter()
                    .map(move |p| format!("{section}.{}", p.name))
            })
            .collect();
        let tensors = names.iter().enumerate().map(|(index, name)| {
            let parameter = &parameters[index % parameters.len()];
            let start = index / parameters.len() * section_bytes + parameter.offset * 4;
            let offsets = start..start + parameter.len() * 4;
            HeaderTensor {
                name,
                storage: Storage::F32,
                shape: &parameter.shape,
                offsets,
            }
        });
        let header = write_header(&metadata, tensors);
        write_atomically(path, |file| {
            file.write_all(&header)?;
            for_each_chunk(&sections, |bytes| file.write_all(bytes))
        })?;
        Ok(())
    }

    /// Reads a file written by [`Master::save`].
    ///
    /// # Errors
    /// If the file is missing, truncated or damaged.
    pub fn load(path: &Path) -> Result<Self, OptimizerError> {
        let hint = "a checkpoint that can be resumed holds the optimizer's state";
        let bytes = read_file(path, WEIGHTS_BYTES_MAX, hint)?;
        restore(&bytes).map_err(|reason| OptimizerError::Damaged {
            path: path.display().to_string(),
            reason,
        })
    }
}

fn for_each_chunk(
    sections: &[&Vec<f32>; 3],
    mut each: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(CHUNK * 4);
    for section in sections {
        for chunk in section.chunks(CHUNK) {
            bytes.clear();
            bytes.extend(chunk.iter().flat_map(|value| value.to_le_bytes()));
            each(&bytes)?;
        }
    }
    Ok(())
}

fn restore(bytes: &[u8]) -> Result<Master, String> {
    let (header_bytes, metadata) =
        SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
    let data = bytes.get(header_bytes + 8..).unwrap_or_default();
    let fields = metadata.metadata().as_ref();
    let field = |key: &str| {
        let value = fields.and_then(|fields| fields.get(key));
        value.ok_or_else(|| format!("the header lacks `{key}`"))
    };
    if field("format")? != FORMAT {
        return Err(format!(
            "its format is `{}`, not `{FORMAT}`",
            field("format")?
        ));
    }
    let config = Config::parse(field("config")?).map_err(|error| error.to_string())?;
    let updates = field("updates")?
        .parse()
        .map_err(|_| "the update count is not a number".to_owned())?;
    let layout = Arc::new(Layout::new(&config));
    let section_bytes = layout.len() * 4;
    if data.len() != section_bytes * SECTIONS.len() {
        let expected = section_bytes * SECTIONS.len();
        return Err(format!(
            "it has {} bytes of data instead of {expected}",
            data.len()
        ));
    }
    if blake3::hash(data).to_hex().as_str() != field("blake3")? {
        return Err("its BLAKE3 does not match its contents".to_owned());
    }
    let section = |index: usize| -> Vec<f32> {
        let section = &data[index * section_bytes..(index + 1) * section_bytes];
        section
            .as_chunks()
            .0
            .iter()
            .map(|&value| f32::from_le_bytes(value))
            .collect()
    };
    let (values, first, second) = (section(0), section(1), section(2));
    Ok(Master {
        config,
        layout,
        values,
        first,
        second,
        updates,
    })
}
