//! The one place where a device is asked for.

use candle_core::Device;

/// Why a device cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// Neither `cpu` nor `cuda:N`.
    #[error("device `{0}` is unknown; write `cpu` or `cuda:N`")]
    Unknown(String),
    /// This binary has no CUDA backend.
    #[error("device `{0}` needs a binary built with `--features cuda`; use `cpu` with this one")]
    NotBuilt(String),
    /// The driver refused.
    #[error("device `{device}` cannot be opened: {reason}; check the driver, or use `cpu`")]
    Unavailable {
        /// What was asked for.
        device: String,
        /// What the driver said.
        reason: String,
    },
}

/// Opens the device that a configuration names: `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// When the name is unknown, the backend is not built in, or the device does not open.
pub fn device(name: &str) -> Result<Device, DeviceError> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let ordinal = match name.strip_prefix("cuda") {
        Some("") => Some(0),
        Some(rest) => rest
            .strip_prefix(':')
            .and_then(|number| number.parse::<usize>().ok()),
        None => None,
    };
    let Some(ordinal) = ordinal else {
        return Err(DeviceError::Unknown(name.to_owned()));
    };
    if !cfg!(feature = "cuda") {
        return Err(DeviceError::NotBuilt(name.to_owned()));
    }
    Device::new_cuda(ordinal).map_err(|error| DeviceError::Unavailable {
        device: name.to_owned(),
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_opens_and_other_names_are_refused() {
        assert!(device("cpu").unwrap().is_cpu());
        for name in ["tpu", "cuda:x", "cuda0", ""] {
            assert_eq!(
                device(name).unwrap_err(),
                DeviceError::Unknown(name.to_owned())
            );
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn cuda_without_its_feature_says_what_to_do() {
        let error = device("cuda:0").unwrap_err().to_string();
        assert!(error.contains("--features cuda"), "{error}");
    }
}
