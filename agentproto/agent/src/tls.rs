//! Which targets this agent trusts; the TLS itself is `stillpoint_agentproto::tls`.

use std::sync::{Arc, PoisonError, RwLock};

use rustls::{ClientConfig, Error, ServerConfig};
use stillpoint_agentproto::Fingerprint;
pub(crate) use stillpoint_agentproto::tls::{Exactly, Pins, fingerprint, server_name};

use crate::state::Identity;

/// The enrolled targets; changes while the agent runs.
#[derive(Debug, Default)]
pub(crate) struct Enrolled(RwLock<Vec<Fingerprint>>);

impl Enrolled {
    /// Trusts exactly these from now on.
    pub(crate) fn set(&self, pins: Vec<Fingerprint>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = pins;
    }
}

impl Pins for Enrolled {
    fn accepts(&self, fingerprint: Fingerprint) -> bool {
        let pins = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let is_known = pins.contains(&fingerprint);
        if !is_known {
            tracing::debug!(%fingerprint, "a peer with a key that is not pinned here");
        }
        is_known
    }
}

/// For the registration channel: this agent is the TLS client.
pub(crate) fn client(identity: &Identity, pins: Arc<dyn Pins>) -> Result<Arc<ClientConfig>, Error> {
    stillpoint_agentproto::tls::client(&identity.certificate, &identity.key, pins)
}

/// For snapshot channels: this agent is the TLS server.
pub(crate) fn server(identity: &Identity, pins: Arc<dyn Pins>) -> Result<Arc<ServerConfig>, Error> {
    stillpoint_agentproto::tls::server(&identity.certificate, &identity.key, pins)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::StateDir;
    use rustls::{ClientConnection, ServerConnection};

    fn identity() -> Identity {
        let dir = tempfile::tempdir().expect("a temporary directory");
        StateDir::open(dir.path())
            .expect("a state directory")
            .identity()
            .expect("an identity")
    }

    fn pin(identity: &Identity) -> Arc<dyn Pins> {
        Arc::new(Exactly(
            fingerprint(&identity.certificate).expect("our own certificate"),
        ))
    }

    /// Runs a whole handshake in memory.
    fn handshake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Result<(), Error> {
        let mut client = ClientConnection::new(client, server_name())?;
        let mut server = ServerConnection::new(server)?;
        for _ in 0..10 {
            let mut wire = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut wire).expect("into memory");
            }
            server.read_tls(&mut wire.as_slice()).expect("from memory");
            server.process_new_packets()?;
            let mut wire = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut wire).expect("into memory");
            }
            client.read_tls(&mut wire.as_slice()).expect("from memory");
            client.process_new_packets()?;
        }
        assert!(!client.is_handshaking() && !server.is_handshaking());
        assert_eq!(client.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
        Ok(())
    }

    #[test]
    fn pinned_peers_meet_and_others_do_not() {
        let (agent, target, stranger) = (identity(), identity(), identity());
        let dial = |who: &Identity, pins| client(who, pins).expect("a client");
        let listen = |who: &Identity, pins| server(who, pins).expect("a server");
        handshake(dial(&agent, pin(&target)), listen(&target, pin(&agent))).expect("both pinned");
        handshake(dial(&agent, pin(&stranger)), listen(&target, pin(&agent))).expect_err("a wrong server");
        handshake(dial(&stranger, pin(&target)), listen(&target, pin(&agent))).expect_err("a wrong client");
    }

    #[test]
    fn a_stolen_certificate_without_its_key_is_refused() {
        let (agent, target, thief) = (identity(), identity(), identity());
        let stolen = Identity {
            agent_id: agent.agent_id,
            certificate: target.certificate.clone(),
            key: thief.key.clone_key(),
        };
        // rustls itself refuses to pair them; were it not so, the handshake's signature would be wrong.
        let pins: Arc<dyn Pins> = pin(&agent);
        assert!(server(&stolen, pins).is_err());
    }

    #[test]
    fn enrolled_pins_change_while_running() {
        let enrolled = Enrolled::default();
        assert!(!enrolled.accepts(Fingerprint([1; 32])));
        enrolled.set(vec![Fingerprint([1; 32])]);
        assert!(enrolled.accepts(Fingerprint([1; 32])));
        enrolled.set(Vec::new());
        assert!(!enrolled.accepts(Fingerprint([1; 32])));
    }
}
