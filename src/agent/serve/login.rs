//! The login of a gateway at an agent that has dialled it.
//!
//! Promised: what a gateway logs in with is judged by what holds at that moment; where nobody has logged in by the deadline there
//! is no session, and the error says which key was refused, and why.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use jiff::Timestamp;
use tokio::time::{Instant, timeout, timeout_at};

use super::LinkError;
use crate::agent::live::State;
use crate::identity::{AgentName, Certificate, Credential, OrganisationId, PrivateKey, PublicKey};
use crate::limits;
use crate::task::Tasks;
use crate::tunnel::connect::url::GatewayUrl;
use crate::tunnel::ssh::{self, Flow, HandshakeError, Login, RunError, Server, ServerOptions};
use crate::tunnel::stream::Stream;

/// An agent that has said who it is, and waits for the gateway's login.
pub(in crate::agent) struct Coming<'a> {
    pub(in crate::agent) name: &'a AgentName,
    pub(in crate::agent) gateway: &'a GatewayUrl,
    /// What it has said.
    pub(in crate::agent) line: String,
    /// What the gateway has said.
    pub(in crate::agent) head: Bytes,
    /// The host key.
    pub(in crate::agent) key: &'a PrivateKey,
    /// How many channels there may be, and how many of them that are still being opened.
    pub(in crate::agent) bounds: (usize, usize),
    pub(in crate::agent) deadline: Instant,
}

impl Coming<'_> {
    /// Shakes hands and waits for the login, which is judged by what holds at that moment. Yields what the gateway has logged in
    /// with. The session is cut where there is none.
    pub(in crate::agent) async fn log_in(
        self,
        stream: Stream,
        current: impl Fn() -> Arc<State> + Send + 'static,
        tasks: &Tasks,
    ) -> Result<(Server, Credential), LinkError> {
        let Self { name, gateway, line, head, key, bounds: (channels, opens), deadline } = self;
        let logins = Arc::new(Mutex::new(Logins::default()));
        let organisation = name.organisation.clone();
        let login = OrchestratorLogin { current: Box::new(current), organisation, logins: logins.clone() };
        let options = ServerOptions {
            line,
            said: true,
            head,
            key: key.clone(),
            certificate: None,
            control_channel: true,
            keepalive: limits::LINK_KEEPALIVE,
            keepalive_max: 1,
            flow: Flow::Credit,
            channels,
            opens,
        };
        let server = ssh::serve(stream, options, login, tasks)
            .await
            .map_err(|source| LinkError::Handshake { gateway: gateway.clone(), source })?;
        let (logged_in, switch) = (server.logged_in.clone(), server.control.clone());
        let cut = switch.cut_on_drop();
        let ended = tokio::select! {
            outcome = timeout_at(deadline, logged_in.cancelled()) => match outcome {
                Ok(()) => false,
                Err(_) => return Err(LinkError::LoginTimeout { gateway: gateway.clone() }),
            },
            () = switch.gone().cancelled() => true,
        };
        {
            let logins = logins.lock().unwrap_or_else(PoisonError::into_inner);
            match (&logins.accepted, &logins.refused) {
                (Some(orchestrator), _) if !ended => {
                    let accepted = orchestrator.clone();
                    drop(logins);
                    cut.disarm();
                    return Ok((server, accepted));
                }
                (_, Some((reason, key))) => {
                    return Err(LinkError::LoginRefused {
                        gateway: gateway.clone(),
                        organisation: name.organisation.to_string(),
                        reason,
                        key: key.clone(),
                    });
                }
                _ => {}
            }
        }
        let (_, _, running) = server.split();
        Err(match timeout(limits::GOODBYE_PATIENCE, running.ended()).await {
            Ok(Err(RunError::Ssh(source))) => {
                LinkError::Handshake { gateway: gateway.clone(), source: HandshakeError::Ssh(source) }
            }
            _ => LinkError::KeyNotAccepted {
                gateway: gateway.clone(),
                key: key.public().fingerprint(),
                agent: name.to_string(),
            },
        })
    }
}

#[derive(Default)]
struct Logins {
    /// What the orchestrator has logged in with.
    accepted: Option<Credential>,
    /// Why the last login was refused, and which key it was.
    refused: Option<(&'static str, String)>,
}

struct OrchestratorLogin {
    /// What holds at the moment.
    current: Box<dyn Fn() -> Arc<State> + Send>,
    organisation: OrganisationId,
    logins: Arc<Mutex<Logins>>,
}

impl OrchestratorLogin {
    fn knows(&self, user: &str, credential: &Credential) -> bool {
        let organisation = &self.organisation;
        let reason = if user == organisation.as_str() {
            // Behind a proxy nobody can tell where the gateway is.
            match (self.current)().orchestrator(organisation, credential, None, Timestamp::now()) {
                Ok(_) => return true,
                Err(reason) => reason,
            }
        } else {
            "other_organisation"
        };
        self.refuse(reason, credential.key().to_string());
        false
    }

    fn lets_in(&self, user: &str, credential: Credential) -> bool {
        let known = self.knows(user, &credential);
        if known {
            self.logins.lock().unwrap_or_else(PoisonError::into_inner).accepted = Some(credential);
        }
        known
    }

    /// A gateway shows the bare key after the certificate; what was wrong with that tells more.
    fn refuse(&self, reason: &'static str, key: String) {
        let mut logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
        let certified = logins
            .refused
            .as_ref()
            .is_some_and(|(last, shown)| last.starts_with("certificate_") && *shown == key && reason == "unknown_key");
        if !certified {
            logins.refused = Some((reason, key));
        }
    }
}

impl Login for OrchestratorLogin {
    fn offered(&mut self, user: &str, key: &PublicKey) -> bool {
        let organisation = &self.organisation;
        // The key may turn out to be that of a certificate.
        let certifiable = user == organisation.as_str() && (self.current)().has_authority(organisation);
        certifiable || self.knows(user, &Credential::Key(key.fingerprint()))
    }

    fn verified(&mut self, user: &str, key: &PublicKey) -> bool {
        self.lets_in(user, Credential::Key(key.fingerprint()))
    }

    fn certified(&mut self, user: &str, certificate: &Certificate) -> bool {
        self.lets_in(user, Credential::Certificate(certificate.clone()))
    }

    fn unfit(&mut self, _user: &str, why: &'static str) {
        self.refuse(why, "not given".to_owned());
    }
}
