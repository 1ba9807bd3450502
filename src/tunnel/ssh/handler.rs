//! The callbacks of the SSH library, turned into events. They decide nothing but what is refused to everybody, and wait for
//! nothing; what the library would accept by default is refused here in so many words.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use russh::keys::{Algorithm, PublicKeyOrCertificate};
use russh::server::{Auth, PublicKeyOffer, VerifiedPublicKey};
use russh::{Channel, ChannelId, ChannelOpenFailure, Error, Pty, Sig, client, server};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{
    Control, ControlChannel, Failures, Half, HostCertificateCheck, HostKeyCheck, Login, Misconduct, NOT_ALLOWED,
    NOT_ALLOWED_TEXT, Opening, Over, Report, Violation,
};
use crate::identity::{Certificate, PublicKey};
use crate::limits;
use crate::task::Tasks;
use crate::tunnel::wire;

/// What became of the server's host key.
pub(super) enum HostKey {
    Unseen,
    Refused,
    Accepted(PublicKey),
    /// It may have been accepted, but the key exchange was not strict.
    NotStrict,
}

pub(super) struct Client {
    pub(super) check: HostKeyCheck,
    pub(super) check_certificate: Option<HostCertificateCheck>,
    /// Whether the peer has to keep to strict key exchange (OpenSSH's PROTOCOL §1.10). The library offers it and does not
    /// demand it; a stock peer may lack it, and loses nothing by that with the ciphers that are left.
    pub(super) strict: bool,
    pub(super) host_key: Arc<Mutex<HostKey>>,
    pub(super) failures: Failures,
    pub(super) report: Report,
    pub(super) control: Control,
    pub(super) violations: usize,
}

impl Client {
    async fn refuse(&mut self, reply: client::ChannelOpenHandle, kind: &'static str) -> Result<(), Error> {
        reply.reject(ChannelOpenFailure::AdministrativelyProhibited).await;
        self.violated(kind);
        Ok(())
    }

    /// Reports a violation. A peer that goes on with them is cut, so that it can neither flood what they are reported to nor
    /// use up what others may report there.
    fn violated(&mut self, kind: &'static str) {
        self.violations += 1;
        if self.violations <= limits::VIOLATIONS_PER_SESSION {
            (self.report)(Violation::OpenedChannel(kind));
        } else {
            self.control.cut();
        }
    }
}

impl client::Handler for Client {
    type Error = Error;

    async fn check_server_key(&mut self, key: &PublicKeyOrCertificate) -> Result<bool, Error> {
        let plain = |key: russh::keys::PublicKey| PublicKey::from_ssh(key).ok().filter(|key| (self.check)(key));
        let accepted = match (key, &self.check_certificate) {
            (PublicKeyOrCertificate::PublicKey { key, .. }, _) => plain(key.clone()),
            (PublicKeyOrCertificate::Certificate(whole), Some(check)) => {
                let certified = Certificate::from_ssh(whole).ok().filter(|certificate| check(certificate));
                // The exchange was signed with the bare key, which may be known for itself.
                certified
                    .map(|certificate| certificate.subject().clone())
                    .or_else(|| plain(whole.public_key().clone().into()))
            }
            // A host certificate would let a CA say who an agent is; there only the registry does.
            (PublicKeyOrCertificate::Certificate(_), None) => None,
        };
        let judged = accepted.is_some();
        *self.host_key.lock().unwrap_or_else(PoisonError::into_inner) =
            accepted.map_or(HostKey::Refused, HostKey::Accepted);
        Ok(judged)
    }

    async fn kex_done(
        &mut self,
        _secret: Option<&[u8]>,
        names: &russh::Names,
        _session: &mut client::Session,
    ) -> Result<(), Error> {
        if self.strict && !names.strict_kex() {
            *self.host_key.lock().unwrap_or_else(PoisonError::into_inner) = HostKey::NotStrict;
            return Err(Error::Kex);
        }
        Ok(())
    }

    async fn channel_open_failure(
        &mut self,
        _channel: ChannelId,
        _reason: ChannelOpenFailure,
        description: &str,
        _language: &str,
        _session: &mut client::Session,
    ) -> Result<(), Error> {
        // Only for opens that wait for it, so that a peer cannot fill the map.
        if let Some((forward, words)) = wire::parse_refusal(description)
            && let Some(place) = self.failures.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&forward)
        {
            *place = words;
        }
        Ok(())
    }

    async fn data(&mut self, _channel: ChannelId, data: &[u8], _session: &mut client::Session) -> Result<(), Error> {
        self.control.received(data.len());
        Ok(())
    }

    async fn should_accept_unknown_server_channel(&mut self, _id: ChannelId, _kind: &str) -> bool {
        self.violated("unknown");
        false
    }

    async fn server_channel_open_forwarded_tcpip(
        &mut self,
        _channel: Channel<client::Msg>,
        _address: &str,
        _port: u32,
        _originator: &str,
        _originator_port: u32,
        reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), Error> {
        self.refuse(reply, "forwarded-tcpip").await
    }

    async fn server_channel_open_forwarded_streamlocal(
        &mut self,
        _channel: Channel<client::Msg>,
        _path: &str,
        reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), Error> {
        self.refuse(reply, "forwarded-streamlocal@openssh.com").await
    }

    async fn server_channel_open_agent_forward(
        &mut self,
        _channel: Channel<client::Msg>,
        reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), Error> {
        self.refuse(reply, "auth-agent@openssh.com").await
    }

    async fn server_channel_open_unknown(
        &mut self,
        _channel: Channel<client::Msg>,
        reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), Error> {
        self.refuse(reply, "unknown").await
    }

    async fn server_channel_open_session(
        &mut self,
        _channel: Channel<client::Msg>,
        reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), Error> {
        self.refuse(reply, "session").await
    }

    async fn server_channel_open_direct_tcpip(
        &mut self,
        _channel: Channel<client::Msg>,
        _host: &str,
        _port: u32,
        _originator: &str,
        _originator_port: u32,
        reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), Error> {
        self.refuse(reply, "direct-tcpip").await
    }

    async fn server_channel_open_direct_streamlocal(
        &mut self,
        _channel: Channel<client::Msg>,
        _path: &str,
        reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), Error> {
        self.refuse(reply, "direct-streamlocal@openssh.com").await
    }

    async fn server_channel_open_x11(
        &mut self,
        _channel: Channel<client::Msg>,
        _originator: &str,
        _originator_port: u32,
        reply: client::ChannelOpenHandle,
        _session: &mut client::Session,
    ) -> Result<(), Error> {
        self.refuse(reply, "x11").await
    }
}

pub(super) struct BoxedServer {
    pub(super) login: Box<dyn Login>,
    pub(super) logged_in: CancellationToken,
    pub(super) opens: mpsc::Sender<Opening>,
    pub(super) pending: Arc<Semaphore>,
    pub(super) channels: Arc<Semaphore>,
    pub(super) control_sender: Option<oneshot::Sender<ControlChannel>>,
    /// The session channel, and what grants it the subsystem.
    pub(super) session: Option<(ChannelId, CancellationToken)>,
    /// How many keys were acknowledged before anything was signed, which the library does not count.
    pub(super) probes: usize,
    pub(super) misconduct: Arc<Misconduct>,
    pub(super) control: Control,
    pub(super) tasks: Tasks,
}

impl BoxedServer {
    /// The key, where it is of a kind that may log in at all.
    fn fit(&mut self, user: &str, key: &russh::keys::PublicKey, algorithm: &Algorithm) -> Option<PublicKey> {
        if matches!(algorithm, Algorithm::Rsa { hash: None }) {
            self.login.unfit(user, "sha1_signature");
            return None;
        }
        match PublicKey::from_ssh(key.clone()) {
            Ok(key) => Some(key),
            Err(_) => {
                self.login.unfit(user, "weak_key");
                None
            }
        }
    }

    async fn prohibit(&mut self, reply: server::ChannelOpenHandle, what: &'static str) -> Result<(), Error> {
        debug!(channel = what, "refused a channel");
        self.misconduct.refused(what);
        // The code of RFC 4254 §5.1, with a text of ours.
        let (code, reason) = (NOT_ALLOWED, NOT_ALLOWED_TEXT.to_owned());
        reply.reject(ChannelOpenFailure::Other { code, reason }).await;
        Ok(())
    }

    fn refuse_request(channel: ChannelId, what: &'static str, session: &mut server::Session) -> Result<(), Error> {
        debug!(request = what, "refused a channel request");
        session.channel_failure(channel)
    }
}

impl server::Handler for BoxedServer {
    type Error = Error;

    async fn auth_publickey_offered(&mut self, user: &str, offer: PublicKeyOffer<'_>) -> Result<Auth, Error> {
        if self.probes >= limits::LOGIN_PROBES {
            // As any other refusal, of which the library counts as many as there may be attempts.
            self.login.unfit(user, "too_many_probes");
            return Ok(Auth::reject());
        }
        let fit = self.fit(user, offer.public_key, offer.algorithm);
        let accepted = fit.is_some_and(|key| self.login.offered(user, &key));
        self.probes += usize::from(accepted);
        Ok(if accepted { Auth::Accept } else { Auth::reject() })
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Error> {
        let fit = self.fit(user, key.public_key, key.algorithm);
        let accepted = fit.is_some_and(|key| self.login.verified(user, &key));
        Ok(if accepted { Auth::Accept } else { Auth::reject() })
    }

    async fn auth_openssh_certificate(&mut self, user: &str, whole: &russh::keys::Certificate) -> Result<Auth, Error> {
        let accepted = match Certificate::from_ssh(whole) {
            Ok(certificate) => self.login.certified(user, &certificate),
            Err(error) => {
                self.login.unfit(user, error.reason());
                false
            }
        };
        Ok(if accepted { Auth::Accept } else { Auth::reject() })
    }

    async fn auth_password(&mut self, user: &str, _password: &str) -> Result<Auth, Error> {
        self.login.unfit(user, "password");
        Ok(Auth::reject())
    }

    async fn data(&mut self, _channel: ChannelId, data: &[u8], _session: &mut server::Session) -> Result<(), Error> {
        self.control.received(data.len());
        Ok(())
    }

    async fn auth_succeeded(&mut self, _session: &mut server::Session) -> Result<(), Error> {
        self.control.know();
        self.logged_in.cancel();
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<server::Msg>,
        host: &str,
        port: u32,
        originator: &str,
        _originator_port: u32,
        reply: server::ChannelOpenHandle,
        _session: &mut server::Session,
    ) -> Result<(), Error> {
        let slot = self.channels.clone().try_acquire_owned().ok();
        let pending = self.pending.clone().try_acquire_owned().ok();
        let over = match (&slot, &pending) {
            (None, _) => Some(Over::Channels),
            (_, None) => Some(Over::Opens),
            _ => None,
        };
        let opening = Opening {
            host: host.to_owned(),
            port,
            originator: originator.to_owned(),
            over,
            channel: Some(channel.split()),
            reply: Some(reply),
            slot: slot.filter(|_| over.is_none()),
            _pending: pending,
            control: self.control.clone(),
            tasks: self.tasks.clone(),
        };
        // Where the queue is full or the session is being left, the opening comes back and is refused by being dropped.
        match self.opens.try_send(opening) {
            Err(TrySendError::Full(_)) => {
                debug!("refused a forward: more opens are waiting than this session may have");
                self.misconduct.opens.fetch_add(1, Ordering::Relaxed);
            }
            // How many may be asked for in a second has a bound of its own.
            _ => self.control.earn(limits::PACKETS_PER_OPEN),
        }
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<server::Msg>,
        reply: server::ChannelOpenHandle,
        _session: &mut server::Session,
    ) -> Result<(), Error> {
        let Some(sender) = self.control_sender.take() else { return self.prohibit(reply, "session").await };
        let granted = CancellationToken::new();
        self.session = Some((channel.id(), granted.clone()));
        reply.accept().await;
        let (reader, writer) = channel.split();
        let channel =
            super::Channel::new(reader, Half::Server(writer), super::Flow::Plain, &self.control, &self.tasks, None);
        // At once and not with the subsystem: what nobody reads holds up the session. A receiver that is gone means a session
        // that is being left: dropping the channel closes it.
        drop(sender.send(ControlChannel { channel, granted }));
        Ok(())
    }

    async fn subsystem_request(
        &mut self,
        id: ChannelId,
        name: &str,
        session: &mut server::Session,
    ) -> Result<(), Error> {
        match self.session.take_if(|(session, _)| *session == id && name == wire::CONTROL_SUBSYSTEM) {
            Some((_, granted)) => {
                session.channel_success(id)?;
                granted.cancel();
                Ok(())
            }
            None => Self::refuse_request(id, "subsystem", session),
        }
    }

    async fn channel_open_x11(
        &mut self,
        _channel: Channel<server::Msg>,
        _originator: &str,
        _originator_port: u32,
        reply: server::ChannelOpenHandle,
        _session: &mut server::Session,
    ) -> Result<(), Error> {
        self.prohibit(reply, "x11").await
    }

    async fn channel_open_forwarded_tcpip(
        &mut self,
        _channel: Channel<server::Msg>,
        _host: &str,
        _port: u32,
        _originator: &str,
        _originator_port: u32,
        reply: server::ChannelOpenHandle,
        _session: &mut server::Session,
    ) -> Result<(), Error> {
        self.prohibit(reply, "forwarded-tcpip").await
    }

    async fn channel_open_direct_streamlocal(
        &mut self,
        _channel: Channel<server::Msg>,
        _path: &str,
        reply: server::ChannelOpenHandle,
        _session: &mut server::Session,
    ) -> Result<(), Error> {
        self.prohibit(reply, "direct-streamlocal@openssh.com").await
    }

    async fn pty_request(
        &mut self,
        channel: ChannelId,
        _term: &str,
        _columns: u32,
        _rows: u32,
        _width: u32,
        _height: u32,
        _modes: &[(Pty, u32)],
        session: &mut server::Session,
    ) -> Result<(), Error> {
        Self::refuse_request(channel, "pty-req", session)
    }

    async fn x11_request(
        &mut self,
        channel: ChannelId,
        _single: bool,
        _protocol: &str,
        _cookie: &str,
        _screen: u32,
        session: &mut server::Session,
    ) -> Result<(), Error> {
        Self::refuse_request(channel, "x11-req", session)
    }

    async fn env_request(
        &mut self,
        channel: ChannelId,
        _name: &str,
        _value: &str,
        session: &mut server::Session,
    ) -> Result<(), Error> {
        Self::refuse_request(channel, "env", session)
    }

    async fn shell_request(&mut self, channel: ChannelId, session: &mut server::Session) -> Result<(), Error> {
        Self::refuse_request(channel, "shell", session)
    }

    async fn exec_request(
        &mut self,
        channel: ChannelId,
        _command: &[u8],
        session: &mut server::Session,
    ) -> Result<(), Error> {
        Self::refuse_request(channel, "exec", session)
    }

    async fn window_change_request(
        &mut self,
        channel: ChannelId,
        _columns: u32,
        _rows: u32,
        _width: u32,
        _height: u32,
        session: &mut server::Session,
    ) -> Result<(), Error> {
        Self::refuse_request(channel, "window-change", session)
    }

    async fn signal(&mut self, channel: ChannelId, _signal: Sig, session: &mut server::Session) -> Result<(), Error> {
        Self::refuse_request(channel, "signal", session)
    }

    async fn agent_request(&mut self, _channel: ChannelId, _session: &mut server::Session) -> Result<bool, Error> {
        Ok(false)
    }

    async fn tcpip_forward(
        &mut self,
        _address: &str,
        _port: &mut u32,
        _session: &mut server::Session,
    ) -> Result<bool, Error> {
        Ok(false)
    }

    async fn cancel_tcpip_forward(
        &mut self,
        _address: &str,
        _port: u32,
        _session: &mut server::Session,
    ) -> Result<bool, Error> {
        Ok(false)
    }

    async fn streamlocal_forward(&mut self, _path: &str, _session: &mut server::Session) -> Result<bool, Error> {
        Ok(false)
    }

    async fn cancel_streamlocal_forward(&mut self, _path: &str, _session: &mut server::Session) -> Result<bool, Error> {
        Ok(false)
    }
}
