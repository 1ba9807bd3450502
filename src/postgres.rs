//! Speaking to a PostgreSQL server over a stream that somebody else opened, and writing names and texts into SQL.
//!
//! Promised: a connection is encrypted and verified, or in clear because that was asked for; it never falls from one to
//! the other. Every login and every call has a deadline of ours, since the library's own count only for connections it
//! makes itself. The server is the far side: what it says about a failure is kept to one line without control
//! characters before anybody prints it.
//!
//! There is one function that quotes a name and one that quotes a text, and a name is checked before it can be quoted.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_postgres::config::SslMode;
use tokio_postgres::tls::{NoTls, TlsConnect};
use tokio_postgres::{Client, Config, Connection};

use crate::chain::Chain;
use crate::limits::{DATABASE_GOODBYE, DATABASE_LOGIN_TIMEOUT};
use crate::secret::Secret;
use crate::task::Tasks;

/// A name that can stand in SQL: 1 to 63 bytes, without control characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identifier(Box<str>);

/// Why a name is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing there.
    #[error("the name is empty")]
    Empty,
    /// PostgreSQL would cut it off, and two names could become one.
    #[error("the name is longer than 63 bytes; PostgreSQL would cut it off")]
    TooLong,
    /// NUL ends a name in the protocol; other control characters have no business in logs.
    #[error("the name has a control character")]
    Control,
    /// Client programs would not take it for a name.
    #[error(
        "client programs would take the name for an option or a connection string (it begins with '-', or has '=' or '://')"
    )]
    Misleading,
    /// It belongs to PostgreSQL, or to a provider that runs it.
    #[error("the name is reserved by PostgreSQL, or by a provider that runs it")]
    Reserved,
}

impl Identifier {
    /// Checks the name of something that may exist already.
    ///
    /// # Errors
    /// If the name is empty, longer than 63 bytes, or has control characters.
    pub fn new(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > NAME_MAX {
            return Err(NameError::TooLong);
        }
        if text.chars().any(char::is_control) {
            return Err(NameError::Control);
        }
        Ok(Self(text.into()))
    }

    /// Checks the name of a database or role that is to be made: as [`Identifier::new`], and besides that neither
    /// reserved nor one that client programs (`psql -d NAME`) would read as something else.
    ///
    /// # Errors
    /// If the name cannot be safe.
    pub fn fresh(text: &str) -> Result<Self, NameError> {
        let name = Self::new(text)?;
        if text.starts_with('-') || text.contains('=') || text.contains("://") {
            return Err(NameError::Misleading);
        }
        let lower = text.to_ascii_lowercase();
        if RESERVED.contains(&lower.as_str()) || RESERVED_PREFIXES.iter().any(|prefix| lower.starts_with(prefix)) {
            return Err(NameError::Reserved);
        }
        Ok(name)
    }

    /// The name, unquoted.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Identifier {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::new(text)
    }
}

impl fmt::Display for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name as it stands in SQL, in double quotes; the one way names get there.
#[must_use]
pub fn quote_identifier(name: &Identifier) -> String {
    format!("\"{}\"", name.0.replace('"', "\"\""))
}

/// The text as it stands in SQL, in single quotes; the one way texts get there. With a backslash in it the `E''` form is
/// used, which means the same whatever `standard_conforming_strings` says. A NUL cannot be carried by the protocol, and
/// the library refuses to send one.
#[must_use]
pub fn quote_literal(text: &str) -> String {
    let doubled = text.replace('\'', "''");
    if doubled.contains('\\') { format!("E'{}'", doubled.replace('\\', "\\\\")) } else { format!("'{doubled}'") }
}

/// Who logs in, and where to.
#[derive(Debug, Clone, Copy)]
pub struct Login<'a> {
    /// The role.
    pub user: &'a str,
    /// Its password, where the server asks for one.
    pub password: Option<&'a Secret<String>>,
    /// The database.
    pub database: &'a str,
}

/// Why a login or a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The server refused, with the code (SQLSTATE) and text it gave.
    #[error("the server answered {code}: {text}")]
    Server {
        /// Five characters; PostgreSQL's documentation, appendix A.
        code: String,
        /// Message, detail and hint, in one line.
        text: String,
    },
    /// The connection failed, or what came over it made no sense.
    #[error("the connection to the database failed")]
    Connection(#[source] tokio_postgres::Error),
    /// It took too long.
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
}

impl Failure {
    /// The server's code, if it was the server that refused.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Server { code, .. } => Some(code),
            Self::Connection(_) | Self::Timeout(_) => None,
        }
    }
}

impl From<tokio_postgres::Error> for Failure {
    fn from(error: tokio_postgres::Error) -> Self {
        let Some(database) = error.as_db_error() else { return Self::Connection(error) };
        let mut text = database.message().to_owned();
        for more in [database.detail(), database.hint()].into_iter().flatten() {
            text.push_str("; ");
            text.push_str(more);
        }
        let text = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(SERVER_TEXT_MAX).collect();
        Self::Server { code: database.code().code().to_owned(), text }
    }
}

/// Logs in over `stream`: inside TLS if `tls` says how, which is then required of the server, else in clear. The
/// connection's task belongs to `tasks`; it ends when the client is dropped, or when they are stopped.
///
/// In clear a server can ask for the password itself; use it only where the way to the server is trusted.
///
/// # Errors
/// If the server cannot be understood, its certificate does not hold, or it refuses the login; after
/// [`DATABASE_LOGIN_TIMEOUT`] in any case.
pub async fn open<S, T>(stream: S, tls: Option<T>, login: Login<'_>, tasks: &Tasks) -> Result<Client, Failure>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    T: TlsConnect<S>,
    T::Stream: Send + 'static,
{
    let mut config = Config::new();
    config.user(login.user).dbname(login.database).application_name("caponier");
    if let Some(password) = login.password {
        config.password(password.expose());
    }
    // `Prefer` is the library's default: it goes on in clear when the server, or whoever sits in between, says no.
    config.ssl_mode(if tls.is_some() { SslMode::Require } else { SslMode::Disable });
    let login = async {
        match tls {
            Some(tls) => {
                let (client, connection) = config.connect_raw(stream, tls).await?;
                drive(connection, tasks);
                Ok(client)
            }
            None => {
                let (client, connection) = config.connect_raw(stream, NoTls).await?;
                drive(connection, tasks);
                Ok(client)
            }
        }
    };
    within(DATABASE_LOGIN_TIMEOUT, login).await
}

/// Waits for a call to the server, at most for `limit`.
///
/// # Errors
/// What the call says, or that it took too long.
pub async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(limit, call).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Failure::Timeout(limit)),
    }
}

fn drive<S, T>(connection: Connection<S, T>, tasks: &Tasks)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let stop = tasks.stopping().clone();
    tasks.spawn(async move {
        let mut connection = std::pin::pin!(connection);
        let result = match stop.run_until_cancelled(connection.as_mut()).await {
            Some(result) => result,
            // The client is gone as well, and the server is told so.
            None => tokio::time::timeout(DATABASE_GOODBYE, connection).await.unwrap_or(Ok(())),
        };
        if let Err(error) = result {
            // It also reaches whoever waits for an answer, as a closed connection.
            tracing::debug!(error = %Chain(&error), "a database connection failed");
        }
    });
}

/// Longest name, in bytes: PostgreSQL's NAMEDATALEN less its NUL.
pub const NAME_MAX: usize = 63;

/// How much of a server's explanation is kept, in characters.
const SERVER_TEXT_MAX: usize = 2_000;

/// Names of databases and roles that are the system's own, or a provider's; also those that SQL does not take for roles.
const RESERVED: &[&str] = &[
    "postgres",
    "template0",
    "template1",
    "public",
    "none",
    "current_user",
    "current_role",
    "session_user",
    "rdsadmin",
    "rdsrepladmin",
    "rdstopmgr",
    "azuresu",
    "azure_sys",
    "azure_maintenance",
    "replication",
];

/// Beginnings of such names.
const RESERVED_PREFIXES: &[&str] = &["pg_", "rds_", "azure_pg_", "cloudsql", "alloydb"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_names_that_cannot_be_safe() {
        let long = "a".repeat(64);
        let long_in_bytes = "ä".repeat(32);
        for (name, error) in [
            ("", NameError::Empty),
            (long.as_str(), NameError::TooLong),
            (long_in_bytes.as_str(), NameError::TooLong),
            ("a\0b", NameError::Control),
            ("a\nb", NameError::Control),
            ("a\u{9b}b", NameError::Control),
        ] {
            assert_eq!(Identifier::new(name), Err(error), "{name:?}");
            assert_eq!(Identifier::fresh(name), Err(error), "{name:?}");
        }
        for name in ["-f", "dbname=x", "host=evil user=root", "postgres://evil/", "postgresql://evil"] {
            assert_eq!(Identifier::fresh(name), Err(NameError::Misleading), "{name}");
        }
        for name in [
            "postgres",
            "Postgres",
            "template0",
            "template1",
            "public",
            "PUBLIC",
            "none",
            "pg_monitor",
            "PG_x",
            "rds_superuser",
            "rdsadmin",
            "cloudsqlsuperuser",
            "azure_pg_admin",
            "azuresu",
            "alloydbadmin",
        ] {
            assert_eq!(Identifier::fresh(name), Err(NameError::Reserved), "{name}");
            assert!(Identifier::new(name).is_ok(), "{name} may exist");
        }
        assert!(Identifier::fresh(&"a".repeat(63)).is_ok());
        assert!(Identifier::fresh("orders").is_ok());
        assert!(Identifier::fresh("my \"odd\" näme; drop").is_ok());
    }

    #[test]
    fn quotes_names() {
        for (name, quoted) in [
            ("orders", r#""orders""#),
            ("Orders", r#""Orders""#),
            (r#"a"b"#, r#""a""b""#),
            (r#"""#, r#""""""#),
            (r#"x"; DROP DATABASE postgres; --"#, r#""x""; DROP DATABASE postgres; --""#),
            (r"a\b", r#""a\b""#),
            ("a'b", r#""a'b""#),
        ] {
            assert_eq!(quote_identifier(&Identifier::new(name).expect(name)), quoted);
        }
    }

    #[test]
    fn quotes_texts() {
        for (text, quoted) in [
            ("", "''"),
            ("a", "'a'"),
            ("a'b", "'a''b'"),
            ("'; DROP ROLE x; --", "'''; DROP ROLE x; --'"),
            (r"a\b", r"E'a\\b'"),
            (r"\'", r"E'\\'''"),
            ("SCRAM-SHA-256$4096:a+/=$b:c", "'SCRAM-SHA-256$4096:a+/=$b:c'"),
        ] {
            assert_eq!(quote_literal(text), quoted);
        }
    }

    proptest::proptest! {
        #[test]
        fn a_quoted_name_reads_back_as_itself(text in "\\PC{1,15}") {
            let quoted = quote_identifier(&Identifier::new(&text).expect("printable"));
            let inner = quoted.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).expect("quotes");
            proptest::prop_assert_eq!(inner.replace("\"\"", "\0").contains('"'), false);
            proptest::prop_assert_eq!(inner.replace("\"\"", "\""), text);
        }
    }
}
