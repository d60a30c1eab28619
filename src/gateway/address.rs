//! What an HTTP path asks for, in the addresses of a model hub. Pure; knows nothing of HTTP but its paths.

use std::str::FromStr;

/// The owner under which a run may be named, for tools that want one in front of every model.
const OWNER: &str = "muster";

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address<'a> {
    /// What can be had here.
    Home,
    /// A version and the names of its files.
    Model { run: &'a str, revision: &'a str },
    /// A version's files with their sizes and hashes.
    Tree { run: &'a str, revision: &'a str },
    /// A file.
    File {
        run: &'a str,
        revision: &'a str,
        file: &'a str,
    },
}

impl<'a> Address<'a> {
    /// Reads a path. `None` when it is no address here.
    pub(crate) fn parse(path: &'a str) -> Option<Self> {
        let segments: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
        match segments[..] {
            [""] => Some(Self::Home),
            ["api", "models", ref rest @ ..] => Self::of_model(without_owner(rest)),
            ref rest => match *without_owner(rest) {
                [run, "resolve", revision, file] => Some(Self::File {
                    run,
                    revision,
                    file,
                }),
                _ => None,
            },
        }
    }

    fn of_model(segments: &[&'a str]) -> Option<Self> {
        match *segments {
            [run] => Some(Self::Model {
                run,
                revision: "main",
            }),
            [run, "revision", revision] => Some(Self::Model { run, revision }),
            [run, "tree", revision] => Some(Self::Tree { run, revision }),
            _ => None,
        }
    }
}

/// Nobody's first word is the owner unless a run follows: a run may have that name too.
fn without_owner<'s, 'a>(segments: &'s [&'a str]) -> &'s [&'a str] {
    match segments {
        [OWNER, "resolve" | "revision" | "tree", ..] | [OWNER] => segments,
        [OWNER, rest @ ..] => rest,
        _ => segments,
    }
}

/// A version as an evaluator names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Revision {
    /// The newest that is here: `latest`, or `main` as hubs have it.
    Latest,
    /// By the number of steps: `v12` or `12`.
    Number(u64),
    /// By the root of its weights, 64 hexadecimal digits.
    Root(String),
    /// By its commit, 40 hexadecimal digits: of all revisions the only one that names every byte.
    Commit(String),
}

impl FromStr for Revision {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let is_hex = text.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'));
        match text {
            "latest" | "main" => Ok(Self::Latest),
            _ if is_hex && text.len() == 40 => Ok(Self::Commit(text.to_owned())),
            _ if is_hex && text.len() == 64 => Ok(Self::Root(text.to_owned())),
            _ => {
                let digits = text.strip_prefix('v').unwrap_or(text);
                let is_number = digits.chars().all(|c| c.is_ascii_digit());
                let number = digits.parse().ok().filter(|_| is_number);
                number.map(Self::Number).ok_or(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hubs_paths_are_read_with_and_without_an_owner() {
        let file = Some(Address::File {
            run: "sums",
            revision: "v12",
            file: "config.json",
        });
        assert_eq!(Address::parse("/sums/resolve/v12/config.json"), file);
        assert_eq!(Address::parse("/muster/sums/resolve/v12/config.json"), file);
        let model = |revision| {
            Some(Address::Model {
                run: "sums",
                revision,
            })
        };
        assert_eq!(Address::parse("/api/models/sums"), model("main"));
        assert_eq!(
            Address::parse("/api/models/muster/sums/revision/latest"),
            model("latest")
        );
        let tree = Some(Address::Tree {
            run: "sums",
            revision: "main",
        });
        assert_eq!(Address::parse("/api/models/sums/tree/main"), tree);
        let muster = Some(Address::File {
            run: "muster",
            revision: "main",
            file: "a",
        });
        assert_eq!(Address::parse("/muster/resolve/main/a"), muster);
        assert_eq!(Address::parse("/"), Some(Address::Home));
    }

    #[test]
    fn other_paths_ask_for_nothing() {
        for path in [
            "",
            "sums/resolve/v12/a",
            "/sums",
            "/sums/resolve/v12",
            "/sums/resolve/v12/",
            "/sums/resolve/v12/a/b",
            "/sums/resolve/v12/../a",
            "/api/models",
            "/api/models/sums/revision",
            "/api/models/a/b/c/d",
            "//",
        ] {
            let asked = Address::parse(path);
            let is_nameless = matches!(asked, Some(Address::File { file: "", .. }));
            assert!(asked.is_none() || is_nameless, "{path}: {asked:?}");
        }
    }

    #[test]
    fn a_revision_is_a_number_a_root_a_commit_or_the_newest() {
        let read = |text: &str| text.parse::<Revision>();
        assert_eq!(read("latest"), Ok(Revision::Latest));
        assert_eq!(read("main"), Ok(Revision::Latest));
        assert_eq!(read("v12"), Ok(Revision::Number(12)));
        assert_eq!(read("12"), Ok(Revision::Number(12)));
        let (commit, root) = ("0a".repeat(20), "1b".repeat(32));
        assert_eq!(read(&commit), Ok(Revision::Commit(commit.clone())));
        assert_eq!(read(&root), Ok(Revision::Root(root.clone())));
        for text in [
            "",
            "v",
            "+1",
            "v-1",
            "0x1",
            "newest",
            "99999999999999999999",
            "é",
        ] {
            assert_eq!(read(text), Err(()), "{text}");
        }
    }
}
