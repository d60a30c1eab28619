//! The walls of the house, held against the code: who may import whom, where the unsafe code and the system calls are,
//! what decides without acting, and that everything is built once. ARCHITECTURE.md says why each wall stands.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

#[path = "architecture/modules.rs"]
mod modules;

use modules::Modules;

/// Each crate and the crates of ours that it may import, in the order of the table in ARCHITECTURE.md.
const IMPORTS: &[(&str, &[&str])] = &[
    ("muster-protocol", &[]),
    ("muster-policy", &[]),
    ("muster-broadcaster", &["muster-protocol"]),
    ("muster-dispatch", &["muster-protocol"]),
    (
        "muster-rollout",
        &["muster-broadcaster", "muster-policy", "muster-protocol"],
    ),
    (
        "muster-rewards",
        &["muster-broadcaster", "muster-policy", "muster-protocol"],
    ),
    (
        "muster-learner",
        &["muster-broadcaster", "muster-policy", "muster-protocol"],
    ),
    ("muster-monitor", &["muster-protocol"]),
    (
        "muster-hub",
        &["muster-broadcaster", "muster-policy", "muster-protocol"],
    ),
    (
        "muster-bench",
        &[
            "muster-broadcaster",
            "muster-monitor",
            "muster-policy",
            "muster-protocol",
            "muster-rollout",
        ],
    ),
    (
        "muster",
        &[
            "muster-broadcaster",
            "muster-dispatch",
            "muster-hub",
            "muster-learner",
            "muster-monitor",
            "muster-policy",
            "muster-protocol",
            "muster-rewards",
            "muster-rollout",
        ],
    ),
];

/// What a crate may not reach, even through others, in its normal build.
const UNREACHABLE: &[(&str, &[&str])] = &[
    // The model is computed on threads of its own and knows no network.
    (
        "muster-policy",
        &["tokio", "async-nats", "socket2", "mio", "rustls"],
    ),
    // What people look at is drawn without a model, and the shipped binary opens no raw socket.
    ("muster-monitor", &["candle-core", "gemm", "tokenizers"]),
    ("muster", &["muster-bench"]),
    // Messages and bytes, never tensors.
    ("muster-protocol", &["candle-core", "gemm", "tokenizers"]),
    ("muster-broadcaster", &["candle-core", "gemm", "tokenizers"]),
    ("muster-dispatch", &["candle-core", "gemm", "tokenizers"]),
];

/// Names of folders in which code without a home collects: a helper lives with its first user.
const DRAWERS: [&str; 6] = ["common", "core", "helpers", "shared", "util", "utils"];

/// The files that hold unsafe code, and what for.
const UNSAFE_FILES: &[(&str, &str)] = &[
    (
        "bench/src/broadcast/frames.rs",
        "no safe call binds a socket to a network device's frames",
    ),
    (
        "broadcaster/src/codec/wide.rs",
        "a loop compiled for wider vectors is called after the processor was asked for them",
    ),
    (
        "broadcaster/src/transport/tcp/options.rs",
        "two options of sockets that no library knows",
    ),
    ("broadcaster/tests/appetite.rs", "an allocator that counts"),
    (
        "policy/src/engine/executor/fused.rs",
        "threads use one cache, each the blocks that no other thread writes",
    ),
    (
        "policy/src/kernels/fused/cache.rs",
        "threads use blocks of one memory, each those that no other writes",
    ),
    (
        "policy/src/kernels/matmul.rs",
        "the matrix product of the `gemm` crate takes pointers and strides",
    ),
    (
        "policy/src/kernels/fused/memory.rs",
        "elements that several threads write, each its own, which no slice can say",
    ),
    (
        "policy/src/kernels/fused/panels.rs",
        "threads write columns of one matrix, each its own, which no slice can say; and fill memory that the system cleared",
    ),
    (
        "policy/src/kernels/threads.rs",
        "a loop's body borrows from its caller while other threads run it",
    ),
    (
        "policy/src/kernels/simd.rs",
        "a function compiled for wider vectors is called after the processor was asked for them",
    ),
    (
        "policy/src/weights/mapping.rs",
        "no type says that nobody changes a file while it is mapped",
    ),
    (
        "protocol/src/os.rs",
        "what runs between fork and exec, and a signal to a child that was not waited for",
    ),
];

/// The files that call the operating system through `nix`, each for one kind of thing.
const SYSTEM_FILES: &[&str] = &[
    "bench/src/broadcast/frames.rs",
    "broadcaster/src/store/disk.rs",
    "broadcaster/src/transport/tcp/options.rs",
    "monitor/src/machine.rs",
    "protocol/src/os.rs",
    "src/machine.rs",
];

/// Files that decide: values, the time and seeded chance in, values out. The shells beside them act.
const DECIDING: &[&str] = &[
    "broadcaster/src/swarm/plan.rs",
    "broadcaster/src/swarm/plan/exchange.rs",
    "broadcaster/src/swarm/plan/requests.rs",
    "broadcaster/src/swarm/uploads.rs",
    "dispatch/src/admission.rs",
    "dispatch/src/audit.rs",
    "dispatch/src/reviews.rs",
    "dispatch/src/overlay.rs",
    "dispatch/src/state.rs",
    "dispatch/src/state/leasing.rs",
    "dispatch/src/tickets.rs",
    "dispatch/src/waiting.rs",
    "dispatch/src/conduct.rs",
    "learner/src/advantage.rs",
    "learner/src/resolver.rs",
    "policy/src/engine/blocks.rs",
    "policy/src/engine/plan.rs",
    "policy/src/engine/scheduler.rs",
    "policy/src/engine/scheduler/memory.rs",
    "policy/src/engine/stops.rs",
    "policy/src/sampling.rs",
    "rewards/src/critic/findings.rs",
    "rollout/src/capacity.rs",
];

/// What a deciding file may not say, and why.
const ACTING: &[(&str, &str)] = &[
    ("async fn", "a decision waits for nothing"),
    ("tokio::", "a decision waits for nothing"),
    ("Instant::now", "the time is an argument"),
    ("SystemTime", "the time is an argument"),
    ("rand::random", "chance is seeded and an argument"),
    ("thread_rng", "chance is seeded and an argument"),
    ("HashMap", "the order of a hash map differs from run to run"),
    ("HashSet", "the order of a hash set differs from run to run"),
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn cargo(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO"))
        .args(arguments)
        .current_dir(root())
        .output()
        .expect("cargo runs, since it runs this test");
    assert!(
        output.status.success(),
        "cargo {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Every crate of the workspace with the crates of ours that it names, whatever for.
fn imports() -> BTreeMap<String, BTreeSet<String>> {
    let text = cargo(&["metadata", "--format-version=1", "--no-deps", "--offline"]);
    let metadata: Value = serde_json::from_str(&text).unwrap();
    let name = |value: &Value| value["name"].as_str().unwrap().to_owned();
    let packages = metadata["packages"].as_array().unwrap().iter();
    let imports = packages.map(|package| {
        let dependencies = package["dependencies"].as_array().unwrap().iter();
        let ours = dependencies.filter(|dependency| dependency["path"].is_string());
        (name(package), ours.map(name).collect())
    });
    imports.collect()
}

/// The project's own Rust files outside of build folders, relative to the root.
fn sources() -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![root()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() && !name.starts_with('.') && name != "target" && name != "runs" {
                folders.push(path);
            } else if name.ends_with(".rs") {
                files.push(path.strip_prefix(root()).unwrap().to_owned());
            }
        }
    }
    files.sort();
    files
}

/// A file's code, without comments and without the items that only tests have.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(root().join(path))
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let lines = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default());
    without_tests(&lines.collect::<Vec<_>>().join("\n"))
}

/// Leaves out each item under `#[cfg(test)]`: up to its `;`, or to the brace that closes its body.
fn without_tests(code: &str) -> String {
    let mut parts = code.split("#[cfg(test)]");
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let mut depth = 0_usize;
        let end = part.char_indices().find(|(_, c)| {
            match c {
                '{' => depth += 1,
                '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            depth == 0 && matches!(c, '}' | ';')
        });
        kept.push_str(end.map_or("", |(at, _)| &part[at + 1..]));
    }
    kept
}

#[test]
fn what_follows_the_tests_of_a_file_is_seen() {
    let code = "fn a() {}\n#[cfg(test)]\nmod tests { fn t() { {} } }\nfn b() {}\n#[cfg(test)]\nuse x::y;\nfn c() {}";
    let seen = without_tests(code);
    assert!(!seen.contains("fn t") && !seen.contains("x::y"), "{seen}");
    assert!(seen.contains("fn b") && seen.contains("fn c"), "{seen}");
}

#[test]
fn no_modules_use_one_another_in_a_circle() {
    let mut crates: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for path in sources().iter().filter(|path| is_shipped(path)) {
        let text = path.to_str().unwrap();
        if let Some((name, file)) = text.split_once("src/") {
            let files = crates.entry(name.to_owned()).or_default();
            files.insert(file.to_owned(), code(path));
        }
    }
    assert!(
        crates.len() >= 11,
        "every crate was found: {:?}",
        crates.keys()
    );
    for (name, files) in crates {
        let circles = Modules::of_crate(&files).circles();
        assert!(circles.is_empty(), "{name}src/ has circles: {circles:#?}");
    }
}

fn is_shipped(path: &Path) -> bool {
    let text = path.to_str().unwrap();
    !text.contains("/tests/")
        && !text.contains("tests.rs")
        && !text.starts_with("tests/")
        && !text.contains("/examples/")
}

#[test]
fn crates_import_one_another_exactly_as_the_table_says() {
    let expected: BTreeMap<String, BTreeSet<String>> = IMPORTS
        .iter()
        .map(|(name, imports)| {
            let imports = imports.iter().map(|import| (*import).to_owned());
            ((*name).to_owned(), imports.collect())
        })
        .collect();
    assert_eq!(imports(), expected);
}

#[test]
fn the_table_of_crates_in_the_documentation_is_this_one() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    for &(name, imports) in IMPORTS {
        let short = |name: &str| match name.strip_prefix("muster-") {
            Some(short) => format!("`{short}`"),
            None => "`muster`".to_owned(),
        };
        let row = text
            .lines()
            .find(|line| line.starts_with(&format!("| {} |", short(name))))
            .unwrap_or_else(|| panic!("ARCHITECTURE.md has no row for {name}"));
        let last = row.trim_end_matches('|').rsplit('|').next().unwrap();
        let named: BTreeSet<&str> = last.split('`').skip(1).step_by(2).collect();
        let expected: BTreeSet<&str> = imports
            .iter()
            .map(|import| import.trim_start_matches("muster-"))
            .collect();
        assert_eq!(named, expected, "the row of {name}");
    }
}

#[test]
fn no_crate_reaches_what_it_must_not_know() {
    for &(name, forbidden) in UNREACHABLE {
        let tree = cargo(&[
            "tree",
            "--offline",
            "--package",
            name,
            "--edges=normal",
            "--prefix=none",
            "--format={p}",
        ]);
        let reached: BTreeSet<&str> = tree
            .lines()
            .filter_map(|line| line.split(' ').next())
            .collect();
        assert!(reached.contains(name), "cargo tree names {name} itself");
        for crate_name in forbidden {
            assert!(!reached.contains(crate_name), "{name} reaches {crate_name}");
        }
    }
}

/// Every crate with its version and features, as `cargo` would build it for `arguments`.
fn features(arguments: &[&str]) -> BTreeSet<String> {
    let common = [
        "tree",
        "--offline",
        "--prefix=none",
        "--no-dedupe",
        "--format={p} {f}",
    ];
    let tree = cargo(&[&common[..], arguments].concat());
    tree.lines().map(|line| line.trim().to_owned()).collect()
}

#[test]
fn the_binary_and_the_tests_share_one_set_of_features() {
    let tests = features(&["--workspace", "--edges=normal,build,dev"]);
    let binary = features(&["--package=muster", "--edges=normal,build"]);
    let apart: Vec<&String> = binary.difference(&tests).collect();
    assert!(apart.is_empty(), "built twice: {apart:?}");
}

#[test]
fn no_folder_is_a_drawer_for_code_without_a_home() {
    for path in sources() {
        let drawer = path
            .parent()
            .into_iter()
            .flat_map(Path::components)
            .find(|part| DRAWERS.iter().any(|drawer| part.as_os_str() == *drawer));
        assert!(drawer.is_none(), "{}: {drawer:?}", path.display());
    }
}

#[test]
fn unsafe_code_is_only_where_the_list_says_why() {
    let found: BTreeSet<String> = sources()
        .into_iter()
        .filter(|path| {
            let code = code(path);
            path != Path::new("tests/architecture.rs")
                && (code.contains("unsafe {") || code.contains("unsafe fn"))
        })
        .map(|path| path.display().to_string())
        .collect();
    let expected: BTreeSet<String> = UNSAFE_FILES
        .iter()
        .map(|(path, _)| (*path).to_owned())
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn the_operating_system_is_called_only_from_the_files_listed() {
    let found: Vec<String> = sources()
        .into_iter()
        .filter(|path| is_shipped(path))
        .filter(|path| {
            let code = code(path);
            // `std::os::unix` reads the same at its end, and a signal's name is a value that may be passed around.
            code.replace("unix::", "")
                .replace("nix::sys::signal::Signal;", "")
                .contains("nix::")
        })
        .map(|path| path.display().to_string())
        .collect();
    assert_eq!(found, SYSTEM_FILES);
}

#[test]
fn what_decides_does_not_act() {
    for path in DECIDING {
        let code = code(Path::new(path));
        for (word, reason) in ACTING {
            assert!(!code.contains(word), "{path} says `{word}`: {reason}");
        }
    }
}

#[test]
fn queues_have_bounds() {
    for path in sources().iter().filter(|path| is_shipped(path)) {
        let code = code(path);
        assert!(
            !code.contains("unbounded"),
            "{} has a queue without a bound",
            path.display()
        );
    }
}
