//! The graph of a crate's modules, read from its source text: which module uses an item of which other one, and the circles
//! in it. A re-export is no use: a path through `pub use` counts as a use of the module that defines the item, so that a
//! folder's head may declare its parts and show their items.

use std::collections::{BTreeMap, BTreeSet};

/// A module's path below its crate; empty for the root.
type Module = Vec<String>;

/// Deepest chain of re-exports that is followed.
const REEXPORTS_MAX: usize = 8;

/// The modules of one crate.
#[derive(Default)]
pub(crate) struct Modules {
    files: BTreeMap<Module, Source>,
}

/// A module's text as far as it matters here.
#[derive(Default)]
struct Source {
    /// Paths that its code uses, relative to the crate.
    uses: Vec<Vec<String>>,
    /// Name of each re-exported item, with the path that it stands for.
    reexports: Vec<(String, Vec<String>)>,
}

impl Modules {
    /// The crate whose files have these paths below `src/` and this code, without comments and tests.
    pub(crate) fn of_crate(files: &BTreeMap<String, String>) -> Self {
        let texts: BTreeMap<Module, &String> = files
            .iter()
            .map(|(path, text)| (module_of(path), text))
            .collect();
        let mut modules = Self::default();
        for (module, text) in &texts {
            let children = texts
                .keys()
                .filter(|other| other.len() == module.len() + 1 && other.starts_with(module));
            let children: Vec<&str> = children
                .filter_map(|child| child.last().map(String::as_str))
                .collect();
            modules
                .files
                .insert(module.clone(), Source::read(text, module, &children));
        }
        modules
    }

    /// Each group of modules that use one another in a circle, by name.
    pub(crate) fn circles(&self) -> Vec<BTreeSet<String>> {
        let edges: BTreeMap<&Module, BTreeSet<Module>> = self
            .files
            .keys()
            .map(|module| (module, self.used_by(module)))
            .collect();
        let reached = |from: &Module| {
            let mut seen: BTreeSet<Module> = BTreeSet::new();
            let mut waiting = vec![from.clone()];
            while let Some(module) = waiting.pop() {
                for next in edges.get(&module).into_iter().flatten() {
                    if seen.insert(next.clone()) {
                        waiting.push(next.clone());
                    }
                }
            }
            seen
        };
        let reach: BTreeMap<&Module, BTreeSet<Module>> = self
            .files
            .keys()
            .map(|module| (module, reached(module)))
            .collect();
        let mut circles = BTreeSet::new();
        for (module, reached) in &reach {
            let circle: BTreeSet<String> = reached
                .iter()
                .filter(|other| reach[*other].contains(*module))
                .map(|module| format!("crate::{}", module.join("::")))
                .collect();
            if circle.len() > 1 {
                circles.insert(circle);
            }
        }
        circles.into_iter().collect()
    }

    fn used_by(&self, module: &Module) -> BTreeSet<Module> {
        let uses = self.files[module].uses.iter();
        let mut used: BTreeSet<Module> =
            uses.map(|path| self.resolve(path, REEXPORTS_MAX)).collect();
        used.remove(module);
        used
    }

    /// The module that defines what `path` names.
    fn resolve(&self, path: &[String], depth: usize) -> Module {
        let mut module = Module::new();
        let mut rest = path.iter();
        for segment in rest.by_ref() {
            let mut child = module.clone();
            child.push(segment.clone());
            if self.files.contains_key(&child) {
                module = child;
                continue;
            }
            let reexports = &self.files[&module].reexports;
            let found = reexports.iter().find(|(name, _)| name == segment);
            return match found {
                Some((_, target)) if depth > 0 => {
                    let path: Vec<String> = target.iter().chain(rest).cloned().collect();
                    self.resolve(&path, depth - 1)
                }
                _ => module,
            };
        }
        module
    }
}

impl Source {
    fn read(text: &str, module: &Module, children: &[&str]) -> Self {
        let mut source = Self::default();
        let tokens = tokens(text);
        let mut at = 0;
        while at < tokens.len() {
            let is_path_start = at == 0 || tokens[at - 1] != "::";
            let base = match tokens[at] {
                "crate" => Some(Module::new()),
                "self" => Some(module.clone()),
                "super" => Some(parent(module)),
                child if children.contains(&child) => Some(module.clone()),
                _ => None,
            };
            let Some(base) = base.filter(|_| is_path_start && tokens.get(at + 1) == Some(&"::"))
            else {
                at += 1;
                continue;
            };
            let is_child = children.contains(&tokens[at]);
            let mut paths = Vec::new();
            let start = if is_child { at } else { at + 2 };
            let end = tree(&tokens, start, &base, &mut paths);
            if is_reexport(&tokens, at) {
                source.reexports.extend(paths);
            } else {
                source.uses.extend(paths.into_iter().map(|(_, path)| path));
            }
            at = end.max(at + 1);
        }
        source
    }
}

/// Reads a tree of paths below `base`: for each leaf its name in the module and its path. Returns where the tree ends.
fn tree(
    tokens: &[&str],
    start: usize,
    base: &[String],
    found: &mut Vec<(String, Vec<String>)>,
) -> usize {
    let mut path = base.to_vec();
    let mut at = start;
    loop {
        match tokens.get(at) {
            Some(&"{") => {
                at += 1;
                while let Some(token) = tokens.get(at) {
                    match *token {
                        "}" => return at + 1,
                        "," => at += 1,
                        _ => at = tree(tokens, at, &path, found).max(at + 1),
                    }
                }
                return at;
            }
            Some(&"super") => {
                path.pop();
            }
            Some(&"self") => {}
            Some(&"*") => path.push("*".to_owned()),
            Some(word) if is_word(word) => path.push((*word).to_owned()),
            _ => return at,
        }
        at += 1;
        if tokens.get(at) == Some(&"::") {
            at += 1;
            continue;
        }
        let mut name = path.last().cloned().unwrap_or_default();
        if tokens.get(at) == Some(&"as") {
            name = tokens.get(at + 1).map_or(name, |name| (*name).to_owned());
            at += 2;
        }
        found.push((name, path));
        return at;
    }
}

/// Whether the path at `at` stands in a `pub use` or `pub(…) use`.
fn is_reexport(tokens: &[&str], at: usize) -> bool {
    let before = &tokens[at.saturating_sub(6)..at];
    let Some(last_use) = before.iter().rposition(|token| *token == "use") else {
        return false;
    };
    let between = &before[last_use + 1..];
    let head = &before[..last_use];
    between.is_empty() && matches!(head.last(), Some(&"pub" | &")"))
}

fn parent(module: &Module) -> Module {
    module[..module.len().saturating_sub(1)].to_vec()
}

fn is_word(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Words, `::` and single other characters.
fn tokens(text: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = match first {
            c if c.is_alphanumeric() || c == '_' => rest
                .find(|c: char| !(c.is_alphanumeric() || c == '_'))
                .unwrap_or(rest.len()),
            ':' if rest.starts_with("::") => 2,
            c => c.len_utf8(),
        };
        let (token, after) = rest.split_at(length);
        tokens.push(token);
        rest = after.trim_start();
    }
    tokens
}

fn module_of(path: &str) -> Module {
    let path = path.trim_end_matches(".rs").trim_end_matches("/mod");
    let is_root = path == "lib" || path == "main";
    let parts = path.split('/').filter(|_| !is_root);
    parts.map(str::to_owned).collect()
}

#[test]
fn a_planted_circle_is_found() {
    let files = |pairs: &[(&str, &str)]| {
        let pairs = pairs
            .iter()
            .map(|(path, text)| ((*path).to_owned(), (*text).to_owned()));
        Modules::of_crate(&pairs.collect()).circles()
    };
    let straight = [
        ("lib.rs", "mod a; pub use a::b::Leaf; pub use a::A;"),
        (
            "a.rs",
            "mod b; pub use b::Leaf; use crate::c::C; pub struct A(Leaf);",
        ),
        ("a/b.rs", "pub struct Leaf;"),
        ("c.rs", "use crate::{Leaf as L}; pub struct C(L);"),
    ];
    assert!(files(&straight).is_empty(), "{:?}", files(&straight));
    let mut through_parent = straight;
    through_parent[2].1 = "use super::A; pub struct Leaf;";
    through_parent[1].1 = "mod b; fn f() -> b::Leaf { b::Leaf }";
    assert_eq!(files(&through_parent).len(), 1);
    let mut through_reexport = straight;
    through_reexport[3].1 = "use crate::{A}; pub struct C(A);";
    assert_eq!(files(&through_reexport).len(), 1);
    let mut in_a_body = straight;
    in_a_body[2].1 = "pub struct Leaf; fn f() { crate::c::g(); }";
    assert_eq!(files(&in_a_body).len(), 1);
}
