//! A server that leads to targets: which, and as whom we come.

use std::fmt;
use std::str::FromStr;

use crate::identity::{AgentName, PrincipalId};
use crate::target::Target;
use crate::tunnel::connect::url::GatewayUrl;

/// A server that leads to targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Server {
    /// A gateway of ours.
    Gateway {
        /// Where.
        url: GatewayUrl,
        /// Which agent's targets are wanted.
        agent: AgentName,
    },
    /// An SSH server that forwards: an agent that listens, or any other.
    Bastion {
        /// Where.
        endpoint: Target,
        /// As whom; at an agent, for which organisation.
        user: User,
        /// For whom our key speaks; only an agent has an ear for that.
        principal: Option<PrincipalId>,
    },
}

impl Server {
    /// Where it is.
    #[must_use]
    pub fn target(&self) -> &Target {
        match self {
            Self::Gateway { url, .. } => url.target(),
            Self::Bastion { endpoint, .. } => endpoint,
        }
    }

    /// The gateway's URL, where it is one.
    #[must_use]
    pub fn url(&self) -> Option<&GatewayUrl> {
        match self {
            Self::Gateway { url, .. } => Some(url),
            Self::Bastion { .. } => None,
        }
    }

    /// The name that we log in with.
    #[must_use]
    pub fn user(&self) -> String {
        match self {
            Self::Gateway { agent, .. } => agent.to_string(),
            Self::Bastion { user, .. } => user.0.clone(),
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gateway { url, .. } => write!(f, "gateway {url}"),
            Self::Bastion { endpoint, .. } => write!(f, "SSH server {endpoint}"),
        }
    }
}

/// A user at a bastion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User(String);

/// Why this is no user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a user is 1 to {USER_MAX} characters without spaces and control characters")]
pub struct UserError;

impl FromStr for User {
    type Err = UserError;

    fn from_str(text: &str) -> Result<Self, UserError> {
        let fits = |c: char| !c.is_control() && !c.is_whitespace();
        if text.is_empty() || text.len() > USER_MAX || !text.chars().all(fits) {
            return Err(UserError);
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The port of SSH (RFC 4253 §4.2).
pub const SSH_PORT: u16 = 22;

/// What PAM and directories take at most.
const USER_MAX: usize = 255;
