//! Opens the device that a configuration names, and tells its free memory.

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
        /// Name in the configuration.
        device: String,
        /// Message of the driver.
        reason: String,
    },
}

/// Opens the device that a configuration names: `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// If the name is unknown, the backend is not built in, or the device does not open.
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

/// Assumed free memory if the system does not tell.
const UNKNOWN_FREE_BYTES: u64 = 2 << 30;

/// Free memory of a device, in bytes.
pub(crate) fn free_bytes(device: &Device) -> u64 {
    let known = match device {
        Device::Cpu => available_memory(),
        #[cfg(feature = "cuda")]
        Device::Cuda(cuda) => cuda
            .cuda_stream()
            .context()
            .mem_get_info()
            .ok()
            .map(|(free, _)| free as u64),
        _ => None,
    };
    known.unwrap_or(UNKNOWN_FREE_BYTES)
}

/// Available memory of the system, limited by the rest of this process's cgroup.
fn available_memory() -> Option<u64> {
    let system = kib_of(
        &std::fs::read_to_string("/proc/meminfo").ok()?,
        "MemAvailable:",
    )? << 10;
    let number = |name: &str| {
        let text = std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let cgroup = match (number("memory.max"), number("memory.current")) {
        (Some(most), Some(used)) => most.saturating_sub(used),
        _ => u64::MAX, // no limit, or no cgroups
    };
    Some(system.min(cgroup))
}

fn kib_of(meminfo: &str, key: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
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

    #[test]
    fn free_memory_is_read_in_bytes() {
        let text = "MemTotal:  9 kB\nMemAvailable:   24576 kB\n";
        assert_eq!(kib_of(text, "MemAvailable:"), Some(24_576));
        assert_eq!(kib_of("MemAvailable: many", "MemAvailable:"), None);
        assert!(free_bytes(&Device::Cpu) > 1 << 20);
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn cuda_without_its_feature_says_what_to_do() {
        let error = device("cuda:0").unwrap_err().to_string();
        assert!(error.contains("--features cuda"), "{error}");
    }
}
