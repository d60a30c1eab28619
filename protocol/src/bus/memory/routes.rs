//! The listeners of each subject, in a tree of tokens: finding them costs the depth of the subject, not the number of
//! listeners. In a pattern `*` stands for one token and `>` for one or more at the end, as on the server.

use std::collections::{BTreeMap, BTreeSet};

use crate::subject::Subject;

/// Listeners by pattern.
#[derive(Debug, Default)]
pub(super) struct Routes {
    root: Node,
}

#[derive(Debug, Default)]
struct Node {
    here: BTreeSet<u64>,
    rest: BTreeSet<u64>,
    any: Option<Box<Node>>,
    tokens: BTreeMap<String, Node>,
}

impl Routes {
    /// Adds a listener.
    pub(super) fn insert(&mut self, pattern: &Subject, listener: u64) {
        let mut node = &mut self.root;
        for token in pattern.as_str().split('.') {
            node = match token {
                ">" => {
                    node.rest.insert(listener);
                    return;
                }
                "*" => node.any.get_or_insert_default(),
                token => node.tokens.entry(token.to_owned()).or_default(),
            };
        }
        node.here.insert(listener);
    }

    /// Removes a listener from the pattern it was added with.
    pub(super) fn remove(&mut self, pattern: &Subject, listener: u64) {
        let tokens: Vec<&str> = pattern.as_str().split('.').collect();
        self.root.remove(&tokens, listener);
    }

    /// Every listener of `subject`, in the order of their numbers.
    pub(super) fn matching(&self, subject: &Subject) -> BTreeSet<u64> {
        let tokens: Vec<&str> = subject.as_str().split('.').collect();
        let mut found = BTreeSet::new();
        self.root.collect(&tokens, &mut found);
        found
    }
}

impl Node {
    fn collect(&self, tokens: &[&str], found: &mut BTreeSet<u64>) {
        let Some((token, tail)) = tokens.split_first() else {
            found.extend(&self.here);
            return;
        };
        found.extend(&self.rest);
        if let Some(any) = &self.any {
            any.collect(tail, found);
        }
        if let Some(node) = self.tokens.get(*token) {
            node.collect(tail, found);
        }
    }

    /// Removes the listener and the branches that become empty, so that churn does not grow the tree.
    fn remove(&mut self, tokens: &[&str], listener: u64) {
        match tokens.split_first() {
            None => {
                self.here.remove(&listener);
            }
            Some((&">", _)) => {
                self.rest.remove(&listener);
            }
            Some((&"*", tail)) => {
                if let Some(any) = &mut self.any {
                    any.remove(tail, listener);
                    if any.is_empty() {
                        self.any = None;
                    }
                }
            }
            Some((token, tail)) => {
                if let Some(node) = self.tokens.get_mut(*token) {
                    node.remove(tail, listener);
                    if node.is_empty() {
                        self.tokens.remove(*token);
                    }
                }
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.here.is_empty() && self.rest.is_empty() && self.any.is_none() && self.tokens.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn subject(text: &str) -> Subject {
        Subject::from(text.to_owned())
    }

    #[test]
    fn a_tree_is_empty_after_its_last_listener_left() {
        let mut routes = Routes::default();
        for (listener, pattern) in ["a.b", "a.*", "a.>", "*.b"].iter().enumerate() {
            routes.insert(&subject(pattern), listener as u64);
        }
        assert_eq!(
            routes.matching(&subject("a.b")),
            BTreeSet::from([0, 1, 2, 3])
        );
        assert_eq!(routes.matching(&subject("a")), BTreeSet::new());
        for (listener, pattern) in ["a.b", "a.*", "a.>", "*.b"].iter().enumerate() {
            routes.remove(&subject(pattern), listener as u64);
        }
        assert!(routes.root.is_empty());
    }

    proptest! {
        #[test]
        fn the_tree_finds_exactly_the_patterns_that_cover_a_subject(
            patterns in prop::collection::vec("[abc*](\\.[abc*]){0,2}(\\.>)?", 1..8),
            heard in "[abc](\\.[abc]){0,3}",
        ) {
            let mut routes = Routes::default();
            let mut expected = BTreeSet::new();
            for (listener, pattern) in patterns.iter().enumerate() {
                routes.insert(&subject(pattern), listener as u64);
                if subject(pattern).covers(&subject(&heard)) {
                    expected.insert(listener as u64);
                }
            }
            prop_assert_eq!(routes.matching(&subject(&heard)), expected);
        }
    }
}
