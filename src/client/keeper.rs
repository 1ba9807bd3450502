//! Keeping a session: one that was lost, or whose server goes away, is made anew when the next connection needs it.

use std::sync::Arc;

use tokio::sync::Mutex;
use tokio::time::Instant;
use tracing::{debug, info};

use super::Config;
use super::session::{self, OpenError, Session, SessionError};
use crate::backoff::Backoff;
use crate::chain::Chain;
use crate::limits;
use crate::secret;
use crate::target::Target;
use crate::task::Tasks;
use crate::tunnel::ssh::{self, Channel, LoginError};

/// Why a connection did not come about: what whoever asked for it may be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    NotAllowed,
    NotAvailable,
    /// The server, or the session, has no room now.
    Busy,
    /// There is no session, and none can be had.
    NoSession,
    Timeout,
}

impl Cause {
    fn of(error: &OpenError) -> Self {
        match error {
            OpenError::NotAllowed { .. } => Self::NotAllowed,
            OpenError::NotAvailable { .. } => Self::NotAvailable,
            OpenError::Draining { .. } => Self::Busy,
            OpenError::Open { .. } => Self::NoSession,
            OpenError::Timeout { .. } => Self::Timeout,
        }
    }
}

/// A connection that did not come about.
pub(super) struct Unopened {
    pub(super) cause: Cause,
    /// All that is known of it.
    pub(super) why: String,
}

impl From<OpenError> for Unopened {
    fn from(error: OpenError) -> Self {
        Self { cause: Cause::of(&error), why: Chain(&error).to_string() }
    }
}

/// The session of all forwards of a command.
pub(super) struct Keeper {
    config: Config,
    held: Mutex<Held>,
    tasks: Tasks,
}

/// The session in use, and when another may be made.
struct Held {
    session: Arc<Session>,
    since: Instant,
    /// Set when the gateway has refused a forward because it goes away.
    spent: bool,
    backoff: Backoff,
    /// No login before this.
    not_before: Instant,
    /// Why the last one failed.
    failed: String,
}

impl Held {
    fn new(session: Session) -> Self {
        let now = Instant::now();
        let backoff = Backoff::new(limits::RECONNECT_FIRST, limits::RECONNECT_CAP);
        Self { session: Arc::new(session), since: now, spent: false, backoff, not_before: now, failed: String::new() }
    }

    /// The session is of no more use. One that was good for long is replaced at once; one that was not, after a wait, so that
    /// a gateway that always says so is not asked ever faster.
    fn give_up(&mut self) {
        let now = Instant::now();
        if now.duration_since(self.since) >= limits::LINK_PROVED {
            self.backoff.reset();
        } else {
            self.not_before = now + self.backoff.fail(secret::random_u32());
            self.failed = "the last session ended soon after it was made".to_owned();
        }
        self.spent = true;
    }
}

impl Keeper {
    pub(super) fn new(config: Config, session: Session, tasks: &Tasks) -> Self {
        Self { config, held: Mutex::new(Held::new(session)), tasks: tasks.clone() }
    }

    pub(super) fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    /// Ends the session in use.
    pub(super) async fn close(&self) {
        let session = self.held.lock().await.session.clone();
        session.close().await;
    }

    /// The session, made anew if it was lost or is `not` to be used any more. Attempts that fail are made again, at growing
    /// intervals for all who wait together, for as long as a connection can be asked to wait.
    async fn session(&self, not: Option<&Arc<Session>>) -> Result<Arc<Session>, String> {
        let deadline = Instant::now() + limits::RELOGIN_PATIENCE;
        loop {
            let mut held = self.held.lock().await;
            let unwanted = not.is_some_and(|not| Arc::ptr_eq(not, &held.session));
            if !held.spent && (held.session.is_gone() || unwanted) {
                held.give_up();
            }
            if !held.spent {
                return Ok(held.session.clone());
            }
            let wait = held.not_before;
            if wait >= deadline {
                return Err(held.failed.clone());
            }
            if wait > Instant::now() {
                drop(held);
                tokio::time::sleep_until(wait).await;
                continue;
            }
            info!("{}: the session has ended; logging in again", self.config.server);
            match session::connect(&self.config, &self.tasks).await {
                Ok(session) => {
                    held.session = Arc::new(session);
                    held.since = Instant::now();
                    held.spent = false;
                    return Ok(held.session.clone());
                }
                Err(error) => {
                    held.not_before = Instant::now() + held.backoff.fail(secret::random_u32());
                    held.failed = Chain(&error).to_string();
                    // A gateway that is being started again answers soon. One with another key, or that does not know ours,
                    // says what has to be mended.
                    let final_word = matches!(
                        error,
                        SessionError::HostKey { .. }
                            | SessionError::Certificate { .. }
                            | SessionError::Login { source: LoginError::Refused { .. }, .. }
                    );
                    if final_word {
                        return Err(held.failed.clone());
                    }
                    debug!(error = held.failed, "could not log in again; trying once more");
                }
            }
        }
    }

    /// A channel to `target`, and the session that it belongs to. Where the gateway goes away before it has answered, the
    /// next one is asked, once: nothing has been sent yet.
    pub(super) async fn open(&self, target: &Target, client: &str) -> Result<(Arc<Session>, Channel), Unopened> {
        let lost = |why| Unopened { cause: Cause::NoSession, why };
        let session = self.session(None).await.map_err(lost)?;
        match session.open(target, client).await {
            Ok(channel) => Ok((session, channel)),
            Err(OpenError::Draining { .. } | OpenError::Open { source: ssh::OpenError::Gone, .. }) => {
                debug!("the session has ended before it gave an answer; asking once more");
                let session = self.session(Some(&session)).await.map_err(lost)?;
                let channel = session.open(target, client).await?;
                Ok((session, channel))
            }
            Err(error) => Err(error.into()),
        }
    }
}
