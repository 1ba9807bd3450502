//! Making databases, roles and grants on a PostgreSQL instance, and taking them away again.
//!
//! What is wanted is a [`Resources`]; what is there is an [`Observed`](plan::Observed). [`plan`] compares the two without
//! doing anything, [`apply`] looks and does. Promised:
//!
//! * **Ours is what a role of ours owns.** A role is ours if its comment says so, with this set's id; role and comment
//!   come into being in one transaction, before the database that the role will own. Whatever has one of the wanted
//!   names and is not ours is a conflict: nothing at all is changed, neither to take it over nor to drop it.
//! * **Safe to kill at any point.** Every statement leaves a state that the next run understands and completes.
//! * **A password is kept before it counts.** It is durable in the output file before the server gets it, and the server
//!   only ever gets a SCRAM verifier. The role's comment says whether its password has been handed over (`password
//!   delivered`): before that a new one can be made freely, after that only on request (`rotate`), since somebody may
//!   be using it. So a lost output file is an error and never a silent change of password.
//! * **Others cannot connect.** PUBLIC loses CONNECT and TEMPORARY on a new database before it accepts connections at
//!   all, unless the resources grant them to `public`.
//!
//! What is no longer named in the resources is left as it is; only `destroy` takes away, and only what is named.

pub mod apply;
pub mod output;
pub mod plan;

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use tokio::io::{AsyncRead, AsyncWrite};

pub use apply::{Event, Outcome, Progress, ProvisionError, apply, destroy, observe};
pub use plan::{Observed, Plan, plan, plan_destroy};

use crate::postgres::Identifier;
use crate::secret::Secret;
use crate::target::Target;

/// How a connection to the instance is made; implemented above, where the links are.
pub trait Connect: Send + Sync {
    /// What a connection is.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Opens a new connection to `target`, as seen from the agent. Called once per database that is looked at, and once
    /// per login that is tried.
    fn connect(
        &self,
        target: &Target,
    ) -> impl Future<Output = Result<Self::Stream, Box<dyn Error + Send + Sync>>> + Send;
}

/// Everything that is wanted on one instance.
#[derive(Debug, Clone)]
pub struct Resources {
    /// Whose these are: stands in the comment of every role. Two sets on one instance need different ids.
    pub id: SetId,
    /// Where.
    pub instance: Instance,
    /// Databases, each with an owner that can log in.
    pub databases: Vec<Database>,
    /// Further roles that can log in.
    pub roles: Vec<Role>,
    /// Where the credentials go.
    pub output: Output,
}

/// A server, and who makes the changes there.
#[derive(Debug, Clone)]
pub struct Instance {
    /// Its address as seen from the agent; also what the output names.
    pub target: Target,
    /// The database to log in to for what concerns no other.
    pub database: Identifier,
    /// The administrator: a superuser, or a role with CREATEROLE and CREATEDB.
    pub user: Identifier,
    /// The administrator's password, where the server asks for one.
    pub password: Option<Secret<String>>,
    /// What is appended to the name of whoever logs in, where a proxy before the server tells servers apart by it: `@` and the
    /// server's name. The roles have their names without it.
    pub login_suffix: Option<String>,
    /// Encryption.
    pub tls: Tls,
}

impl Instance {
    /// The name by which a role logs in.
    #[must_use]
    pub fn login(&self, role: &Identifier) -> String {
        format!("{role}{}", self.login_suffix.as_deref().unwrap_or_default())
    }
}

/// How the connection is protected between us and the database; the tunnel does not know about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tls {
    /// Not at all.
    Disable,
    /// With a certificate that is verified against its authority and its name.
    VerifyFull {
        /// The name in the certificate; without it, the instance's host.
        name: Option<String>,
        /// The only authorities that count; without it, the system's.
        ca_file: Option<PathBuf>,
    },
}

/// A database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Database {
    /// Its name.
    pub name: Identifier,
    /// The role that owns it and logs in to it.
    pub owner: Identifier,
    /// What it is copied from; only when it is made.
    pub template: Option<Identifier>,
    /// Its encoding, as PostgreSQL calls it (`UTF8`); only when it is made.
    pub encoding: Option<String>,
    /// How many connections it takes; -1 for any number. Not touched if not given.
    pub connection_limit: Option<i32>,
    /// Extensions in it, in the order in which they are made.
    pub extensions: Vec<Extension>,
    /// What others may do with it.
    pub grants: Vec<Grant>,
}

/// An extension of a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extension {
    /// Its name.
    pub name: Identifier,
    /// The schema that holds its objects; made if need be. Without it, what the extension says, or `public`.
    pub schema: Option<Identifier>,
    /// Its version. Without it, the server's default when it is made, and never changed after.
    pub version: Option<String>,
}

/// A grant on a database, or on a schema in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// To whom.
    pub to: Grantee,
    /// On which schema, made if need be; without it, on the database itself.
    pub schema: Option<Identifier>,
    /// What.
    pub privileges: Vec<Privilege>,
}

/// Who gets a grant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Grantee {
    /// Everybody (`PUBLIC`).
    Public,
    /// One role: of this set, or one that exists.
    Role(Identifier),
}

/// What can be granted here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Privilege {
    /// Connect to a database.
    Connect,
    /// Make temporary tables in a database.
    Temporary,
    /// Make schemas in a database, or objects in a schema.
    Create,
    /// Use the objects in a schema.
    Usage,
}

/// A role that can log in and owns no database of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Role {
    /// Its name.
    pub name: Identifier,
    /// Roles that it becomes a member of: of this set, or ones that exist.
    pub member_of: Vec<Identifier>,
}

/// Where the credentials go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Into a file that only its owner can read.
    File(PathBuf),
    /// To whoever reads our standard output. A password can be given out once only; later runs say `null`.
    Stdout,
}

/// Names a set of resources: 1 to 127 of a-z, 0-9, `-`, `_`, `.` and `/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetId(Box<str>);

/// Why a text names no set of resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the id of a set of resources is 1 to 127 of a-z, 0-9, '-', '_', '.' and '/'")]
pub struct SetIdError;

/// Why a text names no privilege.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a privilege is one of connect, temporary, create (on a database), usage, create (on a schema)")]
pub struct PrivilegeError;

impl Resources {
    /// The roles that log in: the owners, then the others; each once.
    #[must_use]
    pub fn logins(&self) -> Vec<&Identifier> {
        let mut seen = BTreeSet::new();
        let owners = self.databases.iter().map(|database| &database.owner);
        owners.chain(self.roles.iter().map(|role| &role.name)).filter(|name| seen.insert(*name)).collect()
    }

    /// What the output lists: for each database its owner, for each further role the first database that grants it
    /// CONNECT, if any does.
    #[must_use]
    pub fn accounts(&self) -> Vec<(Option<&Identifier>, &Identifier)> {
        let owners = self.databases.iter().map(|database| (Some(&database.name), &database.owner));
        let others = self.roles.iter().map(|role| {
            let opens = |grant: &Grant| {
                grant.schema.is_none()
                    && grant.to == Grantee::Role(role.name.clone())
                    && grant.privileges.contains(&Privilege::Connect)
            };
            let database = self.databases.iter().find(|database| database.grants.iter().any(opens));
            (database.map(|database| &database.name), &role.name)
        });
        owners.chain(others).collect()
    }

    /// What is wrong with the resources in themselves: each text with the key it belongs to.
    #[must_use]
    pub fn faults(&self) -> Vec<(String, String)> {
        let mut faults = Vec::new();
        if self.databases.is_empty() && self.roles.is_empty() {
            faults
                .push(("database".to_owned(), "neither a database nor a role is named; there is nothing to do".into()));
        }
        let mut names = BTreeSet::new();
        for (index, database) in self.databases.iter().enumerate() {
            let at = format!("database[{index}]");
            if !names.insert(&database.name) {
                faults.push((format!("{at}.name"), format!("there are two databases {:?}", database.name.as_str())));
            }
            if database.name == self.instance.database {
                faults.push((format!("{at}.name"), "it is also the instance's own database".into()));
            }
            if database.owner == self.instance.user {
                faults.push((format!("{at}.owner"), "it is also the administrator".into()));
            }
            if database.connection_limit.is_some_and(|limit| limit < -1) {
                faults.push((format!("{at}.connection_limit"), "it is neither -1 (any number) nor 0 or more".into()));
            }
            let mut extensions = BTreeSet::new();
            for (number, extension) in database.extensions.iter().enumerate() {
                if !extensions.insert(&extension.name) {
                    faults.push((format!("{at}.extension[{number}].name"), "the extension is named twice".into()));
                }
            }
            for (number, grant) in database.grants.iter().enumerate() {
                let at = format!("{at}.grant[{number}].privileges");
                if grant.privileges.is_empty() {
                    faults.push((at.clone(), "no privilege is named".into()));
                }
                for privilege in &grant.privileges {
                    let (fits, whole) = match grant.schema {
                        Some(_) => (matches!(privilege, Privilege::Usage | Privilege::Create), "a schema"),
                        None => (*privilege != Privilege::Usage, "a database"),
                    };
                    if !fits {
                        faults.push((at.clone(), format!("{whole} has no privilege {privilege}")));
                    }
                }
            }
        }
        let mut names = BTreeSet::new();
        for (index, role) in self.roles.iter().enumerate() {
            let at = format!("role[{index}]");
            if !names.insert(&role.name) {
                faults.push((format!("{at}.name"), format!("there are two roles {:?}", role.name.as_str())));
            }
            if self.databases.iter().any(|database| database.owner == role.name) {
                faults.push((format!("{at}.name"), "it is also the owner of a database, which is made with it".into()));
            }
            if role.name == self.instance.user {
                faults.push((format!("{at}.name"), "it is also the administrator".into()));
            }
            if role.member_of.contains(&role.name) {
                faults.push((format!("{at}.member_of"), "a role cannot be a member of itself".into()));
            }
        }
        faults
    }
}

impl SetId {
    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SetId {
    type Err = SetIdError;

    fn from_str(text: &str) -> Result<Self, SetIdError> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.' | b'/');
        if text.is_empty() || text.len() > 127 || !text.bytes().all(allowed) {
            return Err(SetIdError);
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for SetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Privilege {
    type Err = PrivilegeError;

    fn from_str(text: &str) -> Result<Self, PrivilegeError> {
        Ok(match text {
            "connect" => Self::Connect,
            "temporary" => Self::Temporary,
            "create" => Self::Create,
            "usage" => Self::Usage,
            _ => return Err(PrivilegeError),
        })
    }
}

impl fmt::Display for Privilege {
    /// As SQL spells it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "CONNECT",
            Self::Temporary => "TEMPORARY",
            Self::Create => "CREATE",
            Self::Usage => "USAGE",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_ids_stay_within_a_comment() {
        let long = "a".repeat(128);
        for text in ["", "a b", "a,b", "A", "ä", "a\n", "a'", long.as_str()] {
            assert!(text.parse::<SetId>().is_err(), "{text:?}");
        }
        assert!("acme/prod-eu".parse::<SetId>().is_ok());
    }
}
