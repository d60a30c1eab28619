//! A machine's identity: one secret seed, and a key derived from it for each purpose.
//!
//! The keys are separate, so that a nonce which a NATS server or a peer makes us sign can never be read as a statement.

use std::fmt;

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};

use crate::id::PeerId;

/// Labels of the derived keys (BLAKE3 `derive_key`): changing one changes every identity.
const LOGIN_CONTEXT: &str = "muster 2026-11 nats login key v1";
const STATEMENT_CONTEXT: &str = "muster 2026-11 statement key v1";
const HANDSHAKE_CONTEXT: &str = "muster 2026-11 peer handshake key v1";
const TRANSPORT_CONTEXT: &str = "muster 2026-11 peer transport key v1";

/// The secret that a machine keeps in a file with mode 0600.
#[derive(Clone)]
pub struct MachineSeed([u8; 32]);

impl MachineSeed {
    /// A new seed from the operating system.
    pub fn generate() -> Self {
        Self(rand::random())
    }

    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The secret, for the file that stores it.
    pub fn secret_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for MachineSeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MachineSeed(secret)")
    }
}

/// A machine's keys.
#[derive(Clone)]
pub struct Identity {
    login: [u8; 32],
    statement: SigningKey,
    handshake: SigningKey,
    transport: [u8; 32],
}

impl Identity {
    pub fn from_seed(seed: &MachineSeed) -> Self {
        let derive = |context| blake3::derive_key(context, &seed.0);
        Self {
            login: derive(LOGIN_CONTEXT),
            statement: SigningKey::from_bytes(&derive(STATEMENT_CONTEXT)),
            handshake: SigningKey::from_bytes(&derive(HANDSHAKE_CONTEXT)),
            transport: derive(TRANSPORT_CONTEXT),
        }
    }

    /// A new identity, for tests and for machines that join.
    pub fn generate() -> Self {
        Self::from_seed(&MachineSeed::generate())
    }

    /// The key under which this machine's statements are verified: its name in every message.
    pub fn peer_id(&self) -> PeerId {
        PeerId(self.statement.verifying_key().to_bytes())
    }

    /// The public key that peers verify in a connection's handshake.
    pub fn handshake_id(&self) -> PeerId {
        PeerId(self.handshake.verifying_key().to_bytes())
    }

    /// The NATS user: an nkey's public form, `U…`.
    pub fn login_user(&self) -> String {
        self.login_pair().public_key()
    }

    /// The NATS user's secret, `SU…`, handed to the client library.
    ///
    /// # Errors
    /// When the key library refuses its own key.
    pub fn login_seed(&self) -> Result<String, nkeys::error::Error> {
        self.login_pair().seed()
    }

    #[allow(clippy::expect_used)]
    fn login_pair(&self) -> nkeys::KeyPair {
        nkeys::KeyPair::new_from_raw(nkeys::KeyPairType::User, self.login)
            .expect("any 32 bytes are the seed of an ed25519 user key")
    }

    /// The seed of an ed25519 key for a transport that manages its own keys. The transport decides what that key signs, so it
    /// differs from the others.
    pub fn transport_secret(&self) -> &[u8; 32] {
        &self.transport
    }

    /// Signs a statement. Only [`crate::envelope`] calls it, with its own domain label in front.
    pub(crate) fn sign_statement(&self, message: &[u8]) -> [u8; 64] {
        self.statement.sign(message).to_bytes()
    }

    /// Signs a challenge in a peer's handshake.
    pub fn sign_handshake(&self, message: &[u8]) -> [u8; 64] {
        self.handshake.sign(message).to_bytes()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.peer_id().short())
    }
}

/// A secret for another purpose: BLAKE3 `derive_key` under `context`.
pub fn derive_secret(context: &str, seed: &[u8; 32]) -> [u8; 32] {
    blake3::derive_key(context, seed)
}

/// Whether `signature` over `message` was made by `author`. Strict: no malleable forms, no weak keys.
pub fn is_signed_by(author: &PeerId, message: &[u8], signature: &[u8; 64]) -> bool {
    VerifyingKey::from_bytes(&author.0)
        .and_then(|key| key.verify_strict(message, &Signature::from_bytes(signature)))
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_gives_three_different_stable_keys() {
        let identity = Identity::from_seed(&MachineSeed::from_bytes([3; 32]));
        let again = Identity::from_seed(&MachineSeed::from_bytes([3; 32]));
        assert_eq!(identity.peer_id(), again.peer_id());
        assert_eq!(identity.login_user(), again.login_user());
        assert_ne!(identity.peer_id(), identity.handshake_id());
        assert!(identity.login_user().starts_with('U'));
    }

    #[test]
    fn a_handshake_signature_is_not_a_statement() {
        let identity = Identity::generate();
        let signature = identity.sign_handshake(b"nonce");
        assert!(is_signed_by(&identity.handshake_id(), b"nonce", &signature));
        assert!(!is_signed_by(&identity.peer_id(), b"nonce", &signature));
    }
}
