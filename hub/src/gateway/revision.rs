//! The revision in an address, which names a version. Pure.

use std::str::FromStr;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Revision {
    /// The newest available version: `latest`, or `main`.
    Latest,
    /// The number of steps: `v12` or `12`.
    Number(u64),
    /// The root of the weights, 64 hexadecimal digits.
    Root(String),
    /// The commit, 40 hexadecimal digits. Only a commit names every byte.
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
