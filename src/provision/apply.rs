//! Looking at the instance, and carrying a plan out.
//!
//! One run at a time: a lock at the server keeps a second one waiting that logs in to the same database of the instance,
//! and a lock beside the output file one that writes the same file, on whichever instance. Before anything is done, and before every single
//! statement and every change of the output file, the caller is told, and may say stop; what was done until then is a
//! state that the next run completes.
//!
//! Sessions in a database that belongs to somebody else look for functions and operators in `pg_catalog` alone, so that
//! nothing its owner put there is ever run with the administrator's rights.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Client;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres_rustls::MakeRustlsConnect;

use super::output::{self, Accounts, OutputError};
use super::plan::{
    Acl, Admin, FoundDatabase, FoundRole, Inside, LoginTrial, Observed, Password, Plan, Sql, Step, mark, plan,
    plan_destroy, set_password,
};
use super::{Connect, Database, Grantee, Instance, Output, Resources, Tls};
use crate::limits::{
    DATABASE_COPY_TIMEOUT, DATABASE_LOCK_TIMEOUT, DATABASE_STATEMENT_TIMEOUT, OPEN_TIMEOUT, OUTPUT_LOCK_RETRY,
    PASSWORD_LENGTH, PROVISION_ROUNDS, STOP_GRACE,
};
use crate::postgres::{self, Failure, Identifier, Login, quote_identifier};
use crate::secret::{Secret, random_url_safe};
use crate::task::Tasks;
use crate::tls::{self, TlsError};

/// What is about to happen. Its text has no secret in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'a> {
    /// A login of the administrator to a database.
    Connect {
        /// Which.
        database: &'a Identifier,
    },
    /// A statement.
    Statement {
        /// Where.
        database: &'a Identifier,
        /// The statement, without verifiers.
        text: &'a str,
    },
    /// Writing new content beside the output file.
    Stage,
    /// Putting it in the file's place.
    Replace,
    /// Removing the file, of which nothing is left.
    Remove,
    /// Printing the credentials.
    Print,
    /// A login with a password that was kept or set.
    Try {
        /// Whose.
        role: &'a Identifier,
    },
    /// Something the reader should know; nothing happens.
    Note {
        /// In a sentence.
        text: &'a str,
    },
}

impl fmt::Display for Event<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect { database } => write!(f, "logging in to the database {}", quote_identifier(database)),
            Self::Statement { database, text } => write!(f, "{}: {text}", quote_identifier(database)),
            Self::Stage => f.write_str("writing the output file"),
            Self::Replace => f.write_str("putting the output file in its place"),
            Self::Remove => f.write_str("removing the output file"),
            Self::Print => f.write_str("printing the credentials"),
            Self::Try { role } => write!(f, "trying to log in as {}", quote_identifier(role)),
            Self::Note { text } => write!(f, "note: {text}"),
        }
    }
}

/// Hears of every event before it happens; [`ControlFlow::Break`] stops the run there.
pub type Progress<'a> = dyn FnMut(&Event<'_>) -> ControlFlow<()> + Send + 'a;

/// What a run did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The steps that were taken.
    pub steps: usize,
}

/// Why provisioning failed.
#[derive(Debug, thiserror::Error)]
pub enum ProvisionError {
    /// Something is in the way; nothing was changed.
    #[error("nothing was changed, because of {}: {}", if .0.len() == 1 { "a conflict" } else { "conflicts" }, .0.join("; "))]
    Conflicts(Vec<String>),
    /// Something that a template brought along is in the way, which shows only once the database is there.
    #[error("could not go on, because of a conflict: {}; what was done until then stays, and another run goes on from there", .0.join("; "))]
    Blocked(Vec<String>),
    /// TLS could not be set up.
    #[error("could not set TLS up for the database")]
    Tls(#[source] TlsError),
    /// No connection to the instance.
    #[error("could not reach {target}")]
    Reach {
        /// The instance.
        target: String,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// No login.
    #[error("could not log in as {login}{hint}")]
    Login {
        /// As whom, to which database, and where.
        login: String,
        /// What could be done.
        hint: &'static str,
        /// Why.
        #[source]
        source: Failure,
    },
    /// The instance could not be looked at.
    #[error("could not find out about {what}")]
    Observe {
        /// What about.
        what: &'static str,
        /// Why.
        #[source]
        source: Failure,
    },
    /// The server has a name that we could not use.
    #[error("the server reports a name that is none")]
    Name(#[source] postgres::NameError),
    /// Another run is under way.
    #[error("another provisioning run has been at work on this instance for {} s; try again when it has ended", DATABASE_LOCK_TIMEOUT.as_secs())]
    Busy,
    /// Another run, perhaps on another instance, writes the same output file.
    #[error("another provisioning run has been using the output file {} for {} s; try again when it has ended", .0.display(), DATABASE_LOCK_TIMEOUT.as_secs())]
    OutputBusy(PathBuf),
    /// A statement failed.
    #[error("could not run {statement:?} in the database {database}{hint}; run it again when that is settled")]
    Statement {
        /// The statement, without verifiers.
        statement: String,
        /// Where.
        database: String,
        /// What could be done.
        hint: &'static str,
        /// Why.
        #[source]
        source: Failure,
    },
    /// The server confirms changes that are not there afterwards.
    #[error("the server confirmed these changes but does not have them; does the administrator lack a right? {}", .0.join(" "))]
    NotKept(Vec<String>),
    /// A password that was just set is refused.
    #[error(
        "the password of {0} was set, but the server refuses a login with it; does another authentication method apply to it (pg_hba.conf), or has the role expired (VALID UNTIL)?"
    )]
    PasswordRefused(String),
    /// The output file.
    #[error("the credentials are not safely kept")]
    Output(#[source] OutputError),
    /// Standard output.
    #[error("could not print the credentials; run it again, and it prints new passwords")]
    Print(#[source] io::Error),
    /// The caller said so.
    #[error("stopped; run it again to complete what was begun")]
    Stopped,
}

/// Finds out what of `resources` the instance and the output hold. Changes nothing.
///
/// # Errors
/// If the instance cannot be reached or looked at, or the output file cannot be read.
pub async fn observe<C: Connect>(
    connect: &C,
    resources: &Resources,
    progress: &mut Progress<'_>,
) -> Result<Observed, ProvisionError> {
    with_session(connect, resources, progress, async |session| {
        let accounts = session.accounts()?;
        session.observe(&accounts).await
    })
    .await
}

/// Makes the instance hold `resources`, and the output their credentials; where the output is standard output, they are
/// written to `print`. With `rotate`, every password that has been handed over is replaced.
///
/// # Errors
/// If something is in the way, or anything fails. Only after [`ProvisionError::Conflicts`] is it certain that nothing
/// was changed; after any other error, another run completes what was begun.
pub async fn apply<C: Connect>(
    connect: &C,
    resources: &Resources,
    rotate: bool,
    print: &mut (dyn Write + Send),
    progress: &mut Progress<'_>,
) -> Result<Outcome, ProvisionError> {
    with_session(connect, resources, progress, async |session| {
        let _lock = session.lock_output().await?;
        session.lock().await?;
        let mut accounts = session.accounts()?;
        if let Output::File(path) = &resources.output {
            output::probe(path).map_err(ProvisionError::Output)?;
        }
        let (mut taken, plan) = session.settle(&accounts, |observed| plan(resources, observed, rotate)).await?;
        for step in &plan.credentials {
            session.credentials(step, &mut accounts, print).await?;
            taken += 1;
        }
        session.check(&plan, &accounts).await?;
        Ok(Outcome { steps: taken })
    })
    .await
}

/// Takes `resources` away again: the databases and roles that are named there and ours, and their entries in the output.
///
/// # Errors
/// As [`apply`].
pub async fn destroy<C: Connect>(
    connect: &C,
    resources: &Resources,
    progress: &mut Progress<'_>,
) -> Result<Outcome, ProvisionError> {
    with_session(connect, resources, progress, async |session| {
        let _lock = match session.lock_output().await {
            // Without the directory there is no file, and nothing to take out of it.
            Err(ProvisionError::Output(OutputError::Write { source, .. }))
                if source.kind() == io::ErrorKind::NotFound =>
            {
                None
            }
            lock => lock?,
        };
        session.lock().await?;
        if let Output::File(path) = &resources.output {
            output::tidy(path).map_err(ProvisionError::Output)?;
        }
        let mut accounts = session.accounts()?;
        let (mut taken, plan) = session.settle(&accounts, |observed| plan_destroy(resources, observed)).await?;
        for step in &plan.credentials {
            session.credentials(step, &mut accounts, &mut io::sink()).await?;
            taken += 1;
        }
        Ok(Outcome { steps: taken })
    })
    .await
}

/// Runs `work` with a session, and waits for its connections to end whatever comes of it.
async fn with_session<'a, C: Connect, T>(
    connect: &'a C,
    resources: &'a Resources,
    progress: &'a mut Progress<'_>,
    work: impl AsyncFnOnce(&mut Session<'a, '_, C>) -> Result<T, ProvisionError>,
) -> Result<T, ProvisionError> {
    let tls = match &resources.instance.tls {
        Tls::Disable => None,
        Tls::VerifyFull { name, ca_file } => {
            let config = tls::client(ca_file.as_deref()).map_err(ProvisionError::Tls)?;
            let name = name.clone().unwrap_or_else(|| resources.instance.target.host.to_string());
            Some((MakeRustlsConnect::new(Arc::unwrap_or_clone(config)), name))
        }
    };
    let tasks = Tasks::new();
    let mut session =
        Session { connect, resources, tls, tasks: tasks.clone(), role: None, main: None, other: None, progress };
    let result = work(&mut session).await;
    drop(session);
    tasks.drain(STOP_GRACE).await;
    result
}

struct Session<'a, 'p, C> {
    connect: &'a C,
    resources: &'a Resources,
    /// How to encrypt, and the name to verify.
    tls: Option<(MakeRustlsConnect, String)>,
    tasks: Tasks,
    /// What the administrator is in the instance's own database, once that is known; and so everywhere.
    role: Option<Identifier>,
    /// The administrator's connection to the instance's own database.
    main: Option<Client>,
    /// Its connection to one other database; never more than one, and none while databases are copied or dropped.
    other: Option<(Identifier, Client)>,
    progress: &'a mut Progress<'p>,
}

impl<C: Connect> Session<'_, '_, C> {
    fn tell(&mut self, event: &Event<'_>) -> Result<(), ProvisionError> {
        match (self.progress)(event) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(ProvisionError::Stopped),
        }
    }

    fn accounts(&self) -> Result<Accounts, ProvisionError> {
        match &self.resources.output {
            Output::File(path) => Accounts::read(path).map_err(ProvisionError::Output),
            Output::Stdout => Ok(Accounts::default()),
        }
    }

    async fn open(&self, login: Login<'_>) -> Result<Result<Client, Failure>, ProvisionError> {
        let target = &self.resources.instance.target;
        let unreachable = |source| ProvisionError::Reach { target: target.to_string(), source };
        let stream = tokio::time::timeout(OPEN_TIMEOUT, self.connect.connect(target))
            .await
            .unwrap_or_else(|_| Err(format!("no connection within {} s", OPEN_TIMEOUT.as_secs()).into()))
            .map_err(unreachable)?;
        let tls = self.tls.clone().map(|(mut make, name)| {
            let Ok(tls) = MakeTlsConnect::<C::Stream>::make_tls_connect(&mut make, &name);
            tls
        });
        Ok(postgres::open(stream, tls, login, &self.tasks).await)
    }

    /// The administrator's connection to `database`, or to the instance's own.
    async fn client(&mut self, database: Option<&Identifier>) -> Result<&Client, ProvisionError> {
        let instance = &self.resources.instance;
        match database {
            None => {
                self.other = None;
                if self.main.is_none() {
                    self.main = Some(self.administrator(&instance.database).await?);
                }
            }
            Some(database) => {
                if self.other.as_ref().is_none_or(|(open, _)| open != database) {
                    self.other = None;
                    self.other = Some((database.clone(), self.administrator(database).await?));
                }
            }
        }
        let client = match database {
            None => self.main.as_ref(),
            Some(_) => self.other.as_ref().map(|(_, client)| client),
        };
        #[expect(clippy::expect_used, reason = "it was set above")]
        Ok(client.expect("a connection"))
    }

    async fn administrator(&mut self, database: &Identifier) -> Result<Client, ProvisionError> {
        self.tell(&Event::Connect { database })?;
        let instance = &self.resources.instance;
        let failed = |source: Failure| {
            let hint = login_hint(&source, instance.password.is_some());
            instance.login_failed(&instance.user, database, hint, source)
        };
        let user = instance.login(&instance.user);
        let login = Login { user: &user, password: instance.password.as_ref(), database: database.as_str() };
        let client = self.open(login).await?.map_err(failed)?;
        // First of all, and without calling any function: from here on names mean PostgreSQL's own things only. A
        // lock is waited for at the server, which can say what it waits for; the rest is under our own deadlines.
        let mut setup = format!(
            "SET search_path = pg_catalog; SET standard_conforming_strings = on; SET statement_timeout = 0; \
             SET lock_timeout = {}; SET idle_in_transaction_session_timeout = 0; \
             SET default_transaction_read_only = off",
            DATABASE_LOCK_TIMEOUT.as_millis()
        );
        // A database's owner can also give sessions in it another role to begin with.
        if let Some(role) = &self.role {
            setup.push_str(&format!("; SET ROLE {}", quote_identifier(role)));
        }
        postgres::within(DATABASE_STATEMENT_TIMEOUT, client.batch_execute(&setup)).await.map_err(failed)?;
        Ok(client)
    }

    /// Keeps other runs from the output file, if there is to be one.
    async fn lock_output(&self) -> Result<Option<output::Lock>, ProvisionError> {
        let Output::File(path) = &self.resources.output else { return Ok(None) };
        let deadline = Instant::now() + DATABASE_LOCK_TIMEOUT;
        loop {
            if let Some(lock) = output::Lock::take(path).map_err(ProvisionError::Output)? {
                return Ok(Some(lock));
            }
            if Instant::now() >= deadline {
                return Err(ProvisionError::OutputBusy(path.clone()));
            }
            tokio::time::sleep(OUTPUT_LOCK_RETRY).await;
        }
    }

    /// Keeps other runs waiting until the connection ends.
    async fn lock(&mut self) -> Result<(), ProvisionError> {
        let client = self.client(None).await?;
        let limit = DATABASE_LOCK_TIMEOUT + DATABASE_STATEMENT_TIMEOUT;
        let locked = postgres::within(limit, client.query("SELECT pg_advisory_lock($1)", &[&LOCK])).await;
        match locked {
            Ok(_) => Ok(()),
            Err(failure) if failure.code() == Some(LOCK_NOT_AVAILABLE) => Err(ProvisionError::Busy),
            Err(source) => Err(ProvisionError::Observe { what: "other provisioning runs", source }),
        }
    }

    /// Looks, plans and changes, until no structure is left to change. Returns how many steps that took, and the last
    /// plan, whose credentials are still to be done.
    async fn settle(
        &mut self,
        accounts: &Accounts,
        plan: impl Fn(&Observed) -> Plan,
    ) -> Result<(usize, Plan), ProvisionError> {
        let mut taken = 0;
        for _ in 0..PROVISION_ROUNDS {
            let observed = self.observe(accounts).await?;
            let plan = plan(&observed);
            if !plan.conflicts.is_empty() {
                let error = if taken == 0 { ProvisionError::Conflicts } else { ProvisionError::Blocked };
                return Err(error(plan.conflicts));
            }
            if plan.structure.is_empty() {
                return Ok((taken, plan));
            }
            for step in &plan.structure {
                if let Step::Sql(sql) = step {
                    self.run(sql).await?;
                    taken += 1;
                }
            }
        }
        let observed = self.observe(accounts).await?;
        Err(ProvisionError::NotKept(plan(&observed).structure.iter().map(Step::to_string).collect()))
    }

    async fn run(&mut self, sql: &Sql) -> Result<(), ProvisionError> {
        let limit = if sql.long { DATABASE_COPY_TIMEOUT } else { DATABASE_STATEMENT_TIMEOUT };
        let statements: Vec<_> = sql.statements.iter().map(|it| (it.clone(), it.clone())).collect();
        self.transaction(sql.database.as_ref(), &statements, limit).await
    }

    /// Runs statements, given with the form in which they may be shown; several of them in one transaction.
    async fn transaction(
        &mut self,
        database: Option<&Identifier>,
        statements: &[(String, String)],
        limit: Duration,
    ) -> Result<(), ProvisionError> {
        let alone = statements.len() == 1;
        let own = |text: &str| (text.to_owned(), text.to_owned());
        let begin = (!alone).then(|| own("BEGIN"));
        let commit = (!alone).then(|| own("COMMIT"));
        for (statement, shown) in begin.iter().chain(statements).chain(&commit) {
            let name = database.unwrap_or(&self.resources.instance.database);
            self.tell(&Event::Statement { database: name, text: shown })?;
            let client = self.client(database).await?;
            if let Err(source) = postgres::within(limit, client.batch_execute(statement)).await {
                return Err(ProvisionError::Statement {
                    statement: shown.clone(),
                    database: quote_identifier(name),
                    hint: statement_hint(&source, shown),
                    source,
                });
            }
        }
        Ok(())
    }

    async fn credentials(
        &mut self,
        step: &Step,
        accounts: &mut Accounts,
        print: &mut (dyn Write + Send),
    ) -> Result<(), ProvisionError> {
        let resources = self.resources;
        match step {
            Step::Sql(sql) => self.run(sql).await,
            Step::Generate { role, next } => {
                let made = random_url_safe(PASSWORD_LENGTH);
                let old = accounts.password(resources, role).cloned();
                match next {
                    true => accounts.set(resources, role, old.as_ref(), Some(&made)),
                    false => accounts.set(resources, role, Some(&made), None),
                }
                self.write(accounts)
            }
            Step::SetPassword { role, mark } => {
                let password = accounts.next(resources, role).or_else(|| accounts.password(resources, role));
                let Some(password) = password else { return Ok(()) };
                let verifier = Secret::new(postgres_protocol::password::scram_sha_256(password.expose().as_bytes()));
                let mut statements = vec![(set_password(role, verifier.expose()), set_password(role, "(hidden)"))];
                statements.extend(mark.iter().map(|mark| (mark.clone(), mark.clone())));
                self.transaction(None, &statements, DATABASE_STATEMENT_TIMEOUT).await
            }
            Step::Promote { role } => {
                let next = accounts.next(resources, role).cloned();
                accounts.set(resources, role, next.as_ref(), None);
                self.write(accounts)
            }
            Step::Write => {
                for role in resources.logins() {
                    let (password, next) =
                        (accounts.password(resources, role).cloned(), accounts.next(resources, role).cloned());
                    if password.is_some() || next.is_some() {
                        accounts.set(resources, role, password.as_ref(), next.as_ref());
                    }
                }
                self.write(accounts)
            }
            Step::Print => {
                let mut shown = Accounts::default();
                for role in resources.logins() {
                    shown.set(resources, role, accounts.password(resources, role), None);
                }
                self.tell(&Event::Print)?;
                let text = shown.to_text();
                print.write_all(text.expose().as_bytes()).and_then(|()| print.flush()).map_err(ProvisionError::Print)
            }
            Step::Forget => {
                for role in resources.logins() {
                    accounts.forget(resources, role);
                }
                self.write(accounts)
            }
        }
    }

    /// Writes the output file, if there is to be one. Blocks the thread for as long as the disk takes: nothing else is
    /// under way, and the tunnel can do without us for that long.
    fn write(&mut self, accounts: &Accounts) -> Result<(), ProvisionError> {
        let Output::File(path) = &self.resources.output else { return Ok(()) };
        if accounts.is_empty() {
            self.tell(&Event::Remove)?;
            return output::remove(path).map_err(ProvisionError::Output);
        }
        self.tell(&Event::Stage)?;
        let staged = accounts.stage(path).map_err(ProvisionError::Output)?;
        self.tell(&Event::Replace)?;
        staged.commit().map_err(ProvisionError::Output)
    }

    /// Logs in with each password that was just set.
    async fn check(&mut self, plan: &Plan, accounts: &Accounts) -> Result<(), ProvisionError> {
        for step in &plan.credentials {
            let Step::SetPassword { role, .. } = step else { continue };
            match self.attempt(role, accounts).await? {
                LoginTrial::Wrong => return Err(ProvisionError::PasswordRefused(quote_identifier(role))),
                LoginTrial::Barred => {
                    let role = quote_identifier(role);
                    let text = format!(
                        "the server lets {role} not log in from where the agent is (pg_hba.conf, or a connection limit); \
                         the password could not be tried"
                    );
                    self.tell(&Event::Note { text: &text })?;
                }
                LoginTrial::Right | LoginTrial::Untried => (),
            }
        }
        Ok(())
    }

    /// Logs in as `role` with its kept password.
    async fn attempt(&mut self, role: &Identifier, accounts: &Accounts) -> Result<LoginTrial, ProvisionError> {
        let resources = self.resources;
        let Some(password) = accounts.password(resources, role) else { return Ok(LoginTrial::Untried) };
        self.tell(&Event::Try { role })?;
        let mut account = resources.accounts().into_iter().filter(|(_, owner)| *owner == role);
        let database = account.find_map(|(name, _)| name).unwrap_or(&resources.instance.database);
        let user = resources.instance.login(role);
        let login = Login { user: &user, password: Some(password), database: database.as_str() };
        let failure = match self.open(login).await? {
            Ok(_) => return Ok(LoginTrial::Right),
            Err(failure) => failure,
        };
        match failure.code() {
            Some("28P01") => Ok(LoginTrial::Wrong),
            // No line in pg_hba.conf; too many connections, which may have been said before looking at the password.
            Some("28000" | "53300") => Ok(LoginTrial::Barred),
            // Said only after the password was found right: no CONNECT, no such database, or one that is closed.
            Some("42501" | "3D000" | "55000") => Ok(LoginTrial::Right),
            _ => Err(resources.instance.login_failed(role, database, "", failure)),
        }
    }

    async fn observe(&mut self, accounts: &Accounts) -> Result<Observed, ProvisionError> {
        let resources = self.resources;
        let (version, admin) = observe_admin(self.client(None).await?).await?;
        self.role = Some(admin.name.clone());
        let roles = observe_roles(self.client(None).await?, resources, version).await?;
        let databases = observe_databases(self.client(None).await?, resources).await?;
        let kept =
            resources.logins().into_iter().filter_map(|role| Some((role.clone(), accounts.kept(resources, role)?)));
        let mut observed = Observed { version, admin, roles, databases, kept: kept.collect() };
        for database in &resources.databases {
            let ours = self.state(&observed, &database.owner).is_some();
            let Some(found) = observed.databases.get_mut(&database.name) else { continue };
            let concerned =
                !database.extensions.is_empty() || database.grants.iter().any(|grant| grant.schema.is_some());
            if ours && concerned && found.open && found.owner == database.owner.as_str() && found.connection_limit != -2
            {
                found.inside = Some(observe_inside(self.client(Some(&database.name)).await?, database).await?);
            }
        }
        self.other = None;
        for role in resources.logins() {
            let delivered = self.state(&observed, role) == Some(Password::Delivered);
            let settled = observed.kept.get(role).is_some_and(|kept| kept.password && !kept.next);
            if delivered && settled && observed.roles.get(role).is_some_and(|found| found.can_login) {
                let login = self.attempt(role, accounts).await?;
                if let Some(found) = observed.roles.get_mut(role) {
                    found.login = login;
                }
            }
        }
        Ok(observed)
    }

    /// The state of a role's password, if the role is there and ours.
    fn state(&self, observed: &Observed, role: &Identifier) -> Option<Password> {
        let (id, state) = mark(observed.roles.get(role)?.comment.as_deref())?;
        (id == self.resources.id.as_str()).then_some(state)
    }
}

impl Instance {
    fn login_failed(
        &self,
        user: &Identifier,
        database: &Identifier,
        hint: &'static str,
        source: Failure,
    ) -> ProvisionError {
        let (quoted, database) = (quote_identifier(user), quote_identifier(database));
        let login = match self.login_suffix {
            Some(_) => self.login(user),
            None => quoted.to_string(),
        };
        ProvisionError::Login { login: format!("{login} to the database {database} at {}", self.target), hint, source }
    }
}

async fn observe_admin(client: &Client) -> Result<(u32, Admin), ProvisionError> {
    let query = "SELECT current_setting('server_version_num')::int4, current_user::text, rolsuper, rolcreaterole, \
                 rolcreatedb, rolinherit FROM pg_roles WHERE rolname = current_user";
    let failed = |source| ProvisionError::Observe { what: "the server and its administrator", source };
    let row = postgres::within(DATABASE_STATEMENT_TIMEOUT, client.query_one(query, &[])).await.map_err(failed)?;
    let version: i32 = row.get(0);
    let admin = Admin {
        name: Identifier::new(row.get(1)).map_err(ProvisionError::Name)?,
        superuser: row.get(2),
        createrole: row.get(3),
        createdb: row.get(4),
        inherit: row.get(5),
    };
    Ok((version.unsigned_abs(), admin))
}

async fn observe_roles(
    client: &Client,
    resources: &Resources,
    version: u32,
) -> Result<BTreeMap<Identifier, FoundRole>, ProvisionError> {
    let mut names: Vec<&str> = resources.logins().into_iter().map(Identifier::as_str).collect();
    names.extend(resources.roles.iter().flat_map(|role| &role.member_of).map(Identifier::as_str));
    for grant in resources.databases.iter().flat_map(|database| &database.grants) {
        if let Grantee::Role(role) = &grant.to {
            names.push(role.as_str());
        }
    }
    // The right to make a role the owner of something is one of its own from PostgreSQL 16 on.
    let act = if version >= 160_000 { "SET" } else { "MEMBER" };
    let query = "SELECT r.rolname::text, r.rolcanlogin, shobj_description(r.oid, 'pg_authid'), \
                 pg_has_role(current_user, r.oid, 'USAGE') AND pg_has_role(current_user, r.oid, $2::text), \
                 ARRAY(SELECT g.rolname::text FROM pg_auth_members m JOIN pg_roles g ON g.oid = m.roleid \
                 WHERE m.member = r.oid) FROM pg_roles r WHERE r.rolname::text = ANY($1::text[])";
    let failed = |source| ProvisionError::Observe { what: "the roles", source };
    let rows =
        postgres::within(DATABASE_STATEMENT_TIMEOUT, client.query(query, &[&names, &act])).await.map_err(failed)?;
    let role = |row: &tokio_postgres::Row| {
        let found = FoundRole {
            can_login: row.get(1),
            comment: row.get(2),
            usable: row.get(3),
            member_of: row.get::<_, Vec<String>>(4).into_iter().collect(),
            login: LoginTrial::Untried,
        };
        Ok((Identifier::new(row.get(0)).map_err(ProvisionError::Name)?, found))
    };
    rows.iter().map(role).collect()
}

async fn observe_databases(
    client: &Client,
    resources: &Resources,
) -> Result<BTreeMap<Identifier, FoundDatabase>, ProvisionError> {
    let databases = &resources.databases;
    let names = databases.iter().flat_map(|it| [Some(&it.name), it.template.as_ref()]);
    let names: Vec<&str> = names.flatten().map(Identifier::as_str).collect();
    let failed = |source| ProvisionError::Observe { what: "the databases", source };
    let query = "SELECT datname::text, pg_get_userbyid(datdba)::text, pg_encoding_to_char(encoding)::text, \
                 datconnlimit, datallowconn FROM pg_database WHERE datname::text = ANY($1::text[])";
    let rows = postgres::within(DATABASE_STATEMENT_TIMEOUT, client.query(query, &[&names])).await.map_err(failed)?;
    let mut found = BTreeMap::new();
    for row in rows {
        let name = Identifier::new(row.get(0)).map_err(ProvisionError::Name)?;
        found.insert(
            name,
            FoundDatabase {
                owner: row.get(1),
                encoding: row.get(2),
                connection_limit: row.get(3),
                open: row.get(4),
                acl: Acl::new(),
                inside: None,
            },
        );
    }
    let query = "SELECT d.datname::text, CASE WHEN a.grantee <> 0 THEN pg_get_userbyid(a.grantee)::text END, \
                 a.privilege_type FROM pg_database d, aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) a \
                 WHERE d.datname::text = ANY($1::text[])";
    let rows = postgres::within(DATABASE_STATEMENT_TIMEOUT, client.query(query, &[&names])).await.map_err(failed)?;
    for row in rows {
        let name = Identifier::new(row.get(0)).map_err(ProvisionError::Name)?;
        if let Some(database) = found.get_mut(&name) {
            database.acl.insert((row.get(1), row.get(2)));
        }
    }
    Ok(found)
}

async fn observe_inside(client: &Client, database: &Database) -> Result<Inside, ProvisionError> {
    let failed = |source| ProvisionError::Observe { what: "the extensions and schemas of a database", source };
    let mut inside = Inside::default();
    let names: Vec<&str> = database.extensions.iter().map(|extension| extension.name.as_str()).collect();
    let query = "SELECT e.extname::text, n.nspname::text, e.extversion FROM pg_extension e \
                 JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname::text = ANY($1::text[])";
    let rows = postgres::within(DATABASE_STATEMENT_TIMEOUT, client.query(query, &[&names])).await.map_err(failed)?;
    for row in rows {
        inside.extensions.insert(row.get(0), (row.get(1), row.get(2)));
    }
    let schemas = database.extensions.iter().filter_map(|extension| extension.schema.as_ref());
    let schemas = schemas.chain(database.grants.iter().filter_map(|grant| grant.schema.as_ref()));
    let names: Vec<&str> = schemas.map(Identifier::as_str).collect();
    let query = "SELECT n.nspname::text, CASE WHEN a.grantee <> 0 THEN pg_get_userbyid(a.grantee)::text END, \
                 a.privilege_type FROM pg_namespace n \
                 LEFT JOIN LATERAL aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) a ON true \
                 WHERE n.nspname::text = ANY($1::text[])";
    let rows = postgres::within(DATABASE_STATEMENT_TIMEOUT, client.query(query, &[&names])).await.map_err(failed)?;
    for row in rows {
        let acl = inside.schemas.entry(row.get(0)).or_default();
        if let Some(privilege) = row.get::<_, Option<String>>(2) {
            acl.insert((row.get(1), privilege));
        }
    }
    Ok(inside)
}

fn login_hint(failure: &Failure, password: bool) -> &'static str {
    match failure.code() {
        Some("28P01") if password => "; check the administrator's password",
        Some("28000") => "; does pg_hba.conf admit it from the agent's address, with or without TLS as configured?",
        Some("3D000") => "; the database does not exist, name another as instance.database",
        _ if !password => "; no password is configured: set CAPONIER_DATABASE_PASSWORD, or instance.password_file",
        _ => "",
    }
}

fn statement_hint(failure: &Failure, statement: &str) -> &'static str {
    let is = |beginning: &str| statement.starts_with(beginning);
    match failure.code() {
        Some("55006") if is("CREATE DATABASE") => {
            " (other sessions use the template: end them, or name a template that nobody uses)"
        }
        Some("42501" | "55006") if is("DROP DATABASE") => {
            " (sessions of other roles are in it: end them, or as a superuser GRANT pg_signal_backend to the administrator)"
        }
        Some("2BP01") if is("DROP ROLE") => {
            " (it still owns things, or has rights, outside of the databases that are named: look at them, then \
             REASSIGN OWNED or DROP OWNED there)"
        }
        Some("42501") if is("CREATE EXTENSION") => {
            " (it is not a trusted one: a superuser must make it, in this database or in the template)"
        }
        Some("42501") => " (the administrator lacks a right: it must be a superuser, or have made the role itself)",
        Some(LOCK_NOT_AVAILABLE) => " (something else holds a lock)",
        _ => "",
    }
}

/// What runs lock against each other: "caponier" in ASCII.
const LOCK: i64 = 0x6361_706f_6e69_6572;

/// The server's code for a lock that was waited for too long.
const LOCK_NOT_AVAILABLE: &str = "55P03";
