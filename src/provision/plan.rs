//! What has to be done: wanted × observed → steps. No I/O, and no secret: where a password or its verifier will stand,
//! the steps only say so.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde_json::{Value, json};

use super::{Database, Extension, Grant, Grantee, Output, Privilege, Resources, SetId};
use crate::postgres::{Identifier, quote_identifier, quote_literal};

/// What the instance and the output hold of what is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// The server's version as it numbers them: 150004 for 15.4.
    pub version: u32,
    /// Who is looking.
    pub admin: Admin,
    /// The roles that the resources name, as far as they exist.
    pub roles: BTreeMap<Identifier, FoundRole>,
    /// The databases that the resources name, templates included, as far as they exist.
    pub databases: BTreeMap<Identifier, FoundDatabase>,
    /// What the output file holds, by role.
    pub kept: BTreeMap<Identifier, Kept>,
}

/// The administrator, as the server sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admin {
    /// Its name there.
    pub name: Identifier,
    /// Whether it may do everything.
    pub superuser: bool,
    /// Whether it may make roles.
    pub createrole: bool,
    /// Whether it may make databases.
    pub createdb: bool,
    /// Whether it has the rights of the roles that it is a member of; before PostgreSQL 16 it is the role's own trait.
    pub inherit: bool,
}

/// A role that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundRole {
    /// Its comment.
    pub comment: Option<String>,
    /// Whether it can log in.
    pub can_login: bool,
    /// Whether the administrator has its rights, and may give things to it.
    pub usable: bool,
    /// Roles that it is a direct member of.
    pub member_of: BTreeSet<String>,
    /// What became of a login with the kept password.
    pub login: LoginTrial,
}

/// What became of a login with a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoginTrial {
    /// Not tried: there is no password to try, or nothing depends on it.
    Untried,
    /// The password is right.
    Right,
    /// The password is wrong.
    Wrong,
    /// The server does not let this role log in from where the agent is; the password was not looked at.
    Barred,
}

/// A database that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundDatabase {
    /// Its owner.
    pub owner: String,
    /// Its encoding.
    pub encoding: String,
    /// How many connections it takes; -1 for any number, -2 if the server gave up half-way through dropping it.
    pub connection_limit: i32,
    /// Whether it takes connections at all.
    pub open: bool,
    /// Who may do what with it; `None` is PUBLIC.
    pub acl: Acl,
    /// What is in it, if that was looked at.
    pub inside: Option<Inside>,
}

/// Who may do what; `None` is PUBLIC. Privileges as SQL spells them.
pub type Acl = BTreeSet<(Option<String>, String)>;

/// What is in a database, as far as the resources are concerned.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Inside {
    /// Extensions, with schema and version.
    pub extensions: BTreeMap<String, (String, String)>,
    /// Schemas, with who may do what.
    pub schemas: BTreeMap<String, Acl>,
}

/// What the output file holds for a role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Kept {
    /// A password.
    pub password: bool,
    /// A password that is about to replace it.
    pub next: bool,
    /// Less than one entry for each of its databases.
    pub incomplete: bool,
}

/// What has to be done.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Why nothing at all may be done; one sentence each.
    pub conflicts: Vec<String>,
    /// Roles, databases, what is in them: done first, until nothing is left of it.
    pub structure: Vec<Step>,
    /// Passwords and the output: done last, once.
    pub credentials: Vec<Step>,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Statements; if several, in one transaction.
    Sql(Sql),
    /// Make a password, and write it to the output file: as the one, or as the next.
    Generate {
        /// Whose.
        role: Identifier,
        /// Whether one that may be in use is kept beside it, until the server has the new one.
        next: bool,
    },
    /// Give the server the verifier of the next password, or where there is none, of the one.
    SetPassword {
        /// Whose.
        role: Identifier,
        /// A statement that goes into the same transaction.
        mark: Option<String>,
    },
    /// Make the next password the one, in the output file.
    Promote {
        /// Whose.
        role: Identifier,
    },
    /// Write the output file, of which something is missing.
    Write,
    /// Print the credentials.
    Print,
    /// Remove the entries from the output file.
    Forget,
}

/// Statements for one database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sql {
    /// In which database; `None` for the one that the administrator logs in to.
    pub database: Option<Identifier>,
    /// The statements.
    pub statements: Vec<String>,
    /// Whether it may take long: a whole database is copied or dropped.
    pub long: bool,
}

/// What a role's comment says if the role is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Password {
    /// Nobody was given the role's password yet.
    Pending,
    /// Somebody was.
    Delivered,
}

/// What is to be done to make the instance hold `resources`. With `rotate`, every password that has been handed over is
/// replaced.
#[must_use]
pub fn plan(resources: &Resources, observed: &Observed, rotate: bool) -> Plan {
    let mut planner = Planner::new(resources, observed);
    planner.administrator();
    let states = planner.roles();
    for role in &resources.roles {
        planner.memberships(&role.name, &role.member_of);
    }
    for database in &resources.databases {
        planner.database(database);
    }
    for (role, state) in states {
        match resources.output {
            Output::File(_) => planner.kept_password(role, state, rotate),
            Output::Stdout => planner.printed_password(role, state, rotate),
        }
    }
    planner.finish()
}

/// What is to be done to take `resources` away again.
#[must_use]
pub fn plan_destroy(resources: &Resources, observed: &Observed) -> Plan {
    let mut planner = Planner::new(resources, observed);
    planner.too_old();
    let mut drops = Vec::new();
    for database in &resources.databases {
        let Some(found) = observed.databases.get(&database.name) else { continue };
        if planner.owned(database, found) {
            drops.push(format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", quote_identifier(&database.name)));
        }
    }
    let roles: Vec<_> = resources.logins().into_iter().filter(|role| observed.roles.contains_key(*role)).collect();
    for role in &roles {
        if planner.ours(role).is_some() && !drops.is_empty() {
            // To drop a database, and to end the sessions in it, one needs the rights of its owner and of their roles.
            planner.make_usable(role);
        }
    }
    for drop in drops {
        planner.plan.structure.push(Step::Sql(Sql { database: None, statements: vec![drop], long: true }));
    }
    for role in roles {
        planner.run(None, vec![format!("DROP ROLE IF EXISTS {}", quote_identifier(role))]);
    }
    if !observed.kept.is_empty() {
        planner.plan.credentials.push(Step::Forget);
    }
    planner.finish()
}

struct Planner<'a> {
    resources: &'a Resources,
    observed: &'a Observed,
    plan: Plan,
    /// What comes after [`Step::Print`].
    afterwards: Vec<Step>,
}

impl<'a> Planner<'a> {
    fn new(resources: &'a Resources, observed: &'a Observed) -> Self {
        let conflicts = resources.faults().into_iter().map(|(key, problem)| format!("{key}: {problem}")).collect();
        Self { resources, observed, plan: Plan { conflicts, ..Plan::default() }, afterwards: Vec::new() }
    }

    fn finish(mut self) -> Plan {
        self.plan.credentials.append(&mut self.afterwards);
        self.plan.conflicts.dedup();
        self.plan
    }

    fn conflict(&mut self, text: String) {
        if !self.plan.conflicts.contains(&text) {
            self.plan.conflicts.push(text);
        }
    }

    fn run(&mut self, database: Option<&Identifier>, statements: Vec<String>) {
        self.plan.structure.push(Step::Sql(Sql { database: database.cloned(), statements, long: false }));
    }

    fn too_old(&mut self) {
        if self.observed.version < OLDEST {
            let version = self.observed.version;
            self.conflict(format!(
                "the server is PostgreSQL {}.{}; {} is the oldest that is supported",
                version / 10_000,
                version % 10_000,
                OLDEST / 10_000
            ));
        }
    }

    /// Whether the administrator can do what will be asked of it.
    fn administrator(&mut self) {
        self.too_old();
        let admin = &self.observed.admin;
        if admin.superuser {
            return;
        }
        let name = quote_identifier(&admin.name);
        if !admin.createrole {
            self.conflict(format!(
                "the administrator {name} may not make roles; as a superuser: ALTER ROLE {name} CREATEROLE"
            ));
        }
        if !admin.createdb && self.resources.databases.iter().any(|it| !self.observed.databases.contains_key(&it.name))
        {
            self.conflict(format!(
                "the administrator {name} may not make databases; as a superuser: ALTER ROLE {name} CREATEDB"
            ));
        }
        if !admin.inherit && self.observed.version < SET_OPTION {
            self.conflict(format!(
                "the administrator {name} is NOINHERIT, and so has no rights on what it makes for others; as a \
                 superuser: ALTER ROLE {name} INHERIT"
            ));
        }
    }

    /// Plans the roles; returns those that log in, with the state of their passwords.
    fn roles(&mut self) -> Vec<(&'a Identifier, Password)> {
        let resources = self.resources;
        let mut states = Vec::new();
        for role in resources.logins() {
            let state = match self.observed.roles.get(role) {
                None => {
                    let name = quote_identifier(role);
                    self.run(
                        None,
                        vec![
                            format!("CREATE ROLE {name} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE"),
                            comment(role, &resources.id, Password::Pending),
                        ],
                    );
                    Password::Pending
                }
                Some(found) => {
                    let can_login = found.can_login;
                    let Some(state) = self.ours(role) else { continue };
                    if !can_login {
                        let name = quote_identifier(role);
                        self.conflict(format!(
                            "somebody took the role {name} its login; to give it back: ALTER ROLE {name} LOGIN"
                        ));
                    }
                    state
                }
            };
            if resources.databases.iter().any(|database| database.owner == *role) {
                self.make_usable(role);
            }
            states.push((role, state));
        }
        states
    }

    /// The state of the password of a role that exists, if the role is ours; else it is a conflict.
    fn ours(&mut self, role: &Identifier) -> Option<Password> {
        let found = self.observed.roles.get(role)?;
        let name = quote_identifier(role);
        match mark(found.comment.as_deref()) {
            Some((id, state)) if id == self.resources.id.as_str() => return Some(state),
            Some((id, _)) => self.conflict(format!(
                "the role {name} exists and belongs to another set of resources, {id:?}; choose another name"
            )),
            None => self.conflict(format!(
                "the role {name} exists and was not made by caponier; it is not taken over: choose another name"
            )),
        }
        None
    }

    /// Lets the administrator act for `role`, unless it can.
    fn make_usable(&mut self, role: &Identifier) {
        let usable = self.observed.roles.get(role).is_some_and(|found| found.usable);
        if self.observed.admin.superuser || usable {
            return;
        }
        // From PostgreSQL 16 on, whoever makes a role may grant it, also to itself, but has neither its rights
        // (INHERIT) nor the right to make it the owner of something (SET).
        let options = if self.observed.version >= SET_OPTION { " WITH INHERIT TRUE, SET TRUE" } else { "" };
        let (role, admin) = (quote_identifier(role), quote_identifier(&self.observed.admin.name));
        self.run(None, vec![format!("GRANT {role} TO {admin}{options}")]);
    }

    fn memberships(&mut self, role: &Identifier, groups: &[Identifier]) {
        let observed = self.observed;
        for group in groups {
            if !self.known(group) {
                self.conflict(format!(
                    "the role {} does not exist; {} cannot be a member of it",
                    quote_identifier(group),
                    quote_identifier(role)
                ));
            }
            let member = observed.roles.get(role).is_some_and(|found| found.member_of.contains(group.as_str()));
            if !member {
                self.run(None, vec![format!("GRANT {} TO {}", quote_identifier(group), quote_identifier(role))]);
            }
        }
    }

    /// Whether a role exists, or will.
    fn known(&self, role: &Identifier) -> bool {
        self.observed.roles.contains_key(role) || self.resources.logins().contains(&role)
    }

    /// Whether a database that exists is ours; else it is a conflict.
    fn owned(&mut self, database: &Database, found: &FoundDatabase) -> bool {
        let name = quote_identifier(&database.name);
        if found.owner == database.owner.as_str() && self.observed.roles.contains_key(&database.owner) {
            return self.ours(&database.owner).is_some();
        }
        self.conflict(format!(
            "the database {name} exists and belongs to the role {:?} instead of {}; it is neither taken over nor dropped",
            found.owner,
            quote_identifier(&database.owner)
        ));
        false
    }

    fn database(&mut self, database: &Database) {
        let observed = self.observed;
        let name = quote_identifier(&database.name);
        let found = observed.databases.get(&database.name);
        for grant in &database.grants {
            if let Grantee::Role(role) = &grant.to
                && !self.known(role)
            {
                self.conflict(format!("the role {} does not exist; it is granted {name}", quote_identifier(role)));
            }
        }
        match found {
            None => self.create_database(database),
            Some(found) => {
                if !self.owned(database, found) {
                    return;
                }
                if found.connection_limit == HALF_DROPPED {
                    self.conflict(format!(
                        "the database {name} was half dropped when the server stopped; finish it: DROP DATABASE {name}"
                    ));
                    return;
                }
                if let Some(encoding) = &database.encoding
                    && !same_encoding(encoding, &found.encoding)
                {
                    self.conflict(format!(
                        "the database {name} has the encoding {}, not {encoding}; that cannot be changed",
                        found.encoding
                    ));
                }
                if let Some(limit) = database.connection_limit
                    && limit != found.connection_limit
                {
                    self.run(None, vec![format!("ALTER DATABASE {name} CONNECTION LIMIT {limit}")]);
                }
            }
        }
        self.database_acl(database, found.map(|found| &found.acl));
        if !found.is_some_and(|found| found.open) {
            self.run(None, vec![format!("ALTER DATABASE {name} ALLOW_CONNECTIONS true")]);
        }
        self.inside(database, found.and_then(|found| found.inside.as_ref()));
    }

    fn create_database(&mut self, database: &Database) {
        let name = quote_identifier(&database.name);
        let mut statement = format!("CREATE DATABASE {name} OWNER {}", quote_identifier(&database.owner));
        if let Some(template) = &database.template {
            if !self.observed.databases.contains_key(template) {
                self.conflict(format!("the template {} of {name} does not exist", quote_identifier(template)));
            }
            statement.push_str(&format!(" TEMPLATE {}", quote_identifier(template)));
        } else if database.encoding.is_some() {
            // Any other template insists on its own encoding.
            statement.push_str(" TEMPLATE template0");
        }
        if let Some(encoding) = &database.encoding {
            statement.push_str(&format!(" ENCODING {}", quote_literal(encoding)));
        }
        if let Some(limit) = database.connection_limit {
            statement.push_str(&format!(" CONNECTION LIMIT {limit}"));
        }
        // Closed until PUBLIC has lost the right to connect, which it has in every new database: a copied template may
        // hold data.
        statement.push_str(" ALLOW_CONNECTIONS false");
        self.plan.structure.push(Step::Sql(Sql { database: None, statements: vec![statement], long: true }));
    }

    fn database_acl(&mut self, database: &Database, found: Option<&Acl>) {
        let name = quote_identifier(&database.name);
        let (everybody, others): (Vec<&Grant>, Vec<&Grant>) = database
            .grants
            .iter()
            .filter(|grant| grant.schema.is_none())
            .partition(|grant| grant.to == Grantee::Public);
        let wanted = |privilege| everybody.iter().any(|grant| grant.privileges.contains(privilege));
        let has = |privilege: &Privilege| found.is_none_or(|acl| acl.contains(&(None, privilege.to_string())));
        let revoked: Vec<_> = [Privilege::Connect, Privilege::Temporary]
            .iter()
            .filter(|privilege| has(privilege) && !wanted(privilege))
            .map(Privilege::to_string)
            .collect();
        if !revoked.is_empty() {
            self.run(None, vec![format!("REVOKE {} ON DATABASE {name} FROM PUBLIC", revoked.join(", "))]);
        }
        let fresh = [(None, "CONNECT".to_owned()), (None, "TEMPORARY".to_owned())].into();
        for grant in everybody.into_iter().chain(others) {
            self.grant(None, &format!("DATABASE {name}"), grant, found.unwrap_or(&fresh));
        }
    }

    fn grant(&mut self, database: Option<&Identifier>, on: &str, grant: &Grant, acl: &Acl) {
        let (who, to) = match &grant.to {
            Grantee::Public => (None, "PUBLIC".to_owned()),
            Grantee::Role(role) => (Some(role.to_string()), quote_identifier(role)),
        };
        let mut missing: Vec<_> = grant.privileges.iter().map(Privilege::to_string).collect();
        missing.retain(|privilege| !acl.contains(&(who.clone(), privilege.clone())));
        if !missing.is_empty() {
            self.run(database, vec![format!("GRANT {} ON {on} TO {to}", missing.join(", "))]);
        }
    }

    /// Schemas, extensions and grants on schemas. What a template brings along is not known before the database exists;
    /// the statements do no harm if it is there, and the next round finds what differs.
    fn inside(&mut self, database: &Database, found: Option<&Inside>) {
        let at = Some(&database.name);
        let schemas = database.extensions.iter().filter_map(|extension| extension.schema.as_ref());
        let schemas = schemas.chain(database.grants.iter().filter_map(|grant| grant.schema.as_ref()));
        let mut seen = BTreeSet::new();
        for schema in schemas.filter(|schema| seen.insert(*schema)) {
            let there = match found {
                Some(inside) => inside.schemas.contains_key(schema.as_str()),
                None => ["public", "pg_catalog"].contains(&schema.as_str()),
            };
            if !there {
                let owner = quote_identifier(&database.owner);
                let schema = quote_identifier(schema);
                self.run(at, vec![format!("CREATE SCHEMA IF NOT EXISTS {schema} AUTHORIZATION {owner}")]);
            }
        }
        for extension in &database.extensions {
            match found.and_then(|inside| inside.extensions.get(extension.name.as_str())) {
                None => self.create_extension(database, extension),
                Some((schema, version)) => self.keep_extension(database, extension, schema, version),
            }
        }
        let none = Acl::new();
        for grant in &database.grants {
            if let Some(schema) = &grant.schema {
                let acl = found.and_then(|inside| inside.schemas.get(schema.as_str())).unwrap_or(&none);
                self.grant(at, &format!("SCHEMA {}", quote_identifier(schema)), grant, acl);
            }
        }
    }

    fn create_extension(&mut self, database: &Database, extension: &Extension) {
        let mut statement = format!("CREATE EXTENSION IF NOT EXISTS {}", quote_identifier(&extension.name));
        let mut statements = Vec::new();
        match &extension.schema {
            Some(schema) => statement.push_str(&format!(" SCHEMA {}", quote_identifier(schema))),
            // Our sessions look nowhere but in pg_catalog, where nothing of a user's belongs.
            None => statements.push("SET LOCAL search_path = public".to_owned()),
        }
        if let Some(version) = &extension.version {
            statement.push_str(&format!(" VERSION {}", quote_literal(version)));
        }
        statements.push(statement);
        self.plan.structure.push(Step::Sql(Sql { database: Some(database.name.clone()), statements, long: true }));
    }

    fn keep_extension(&mut self, database: &Database, extension: &Extension, schema: &str, version: &str) {
        let name = quote_identifier(&extension.name);
        if let Some(wanted) = &extension.schema
            && wanted.as_str() != schema
        {
            self.conflict(format!(
                "the extension {name} of the database {} is in the schema {schema:?}, not in {}; move it by hand, or \
                 name the schema it is in",
                quote_identifier(&database.name),
                quote_identifier(wanted)
            ));
        }
        if let Some(wanted) = &extension.version
            && wanted != version
        {
            let statements = vec![format!("ALTER EXTENSION {name} UPDATE TO {}", quote_literal(wanted))];
            self.plan.structure.push(Step::Sql(Sql { database: Some(database.name.clone()), statements, long: true }));
        }
    }

    /// A password that goes into the output file.
    fn kept_password(&mut self, role: &Identifier, state: Password, rotate: bool) {
        let kept = self.observed.kept.get(role).copied().unwrap_or_default();
        let mark = (state == Password::Pending).then(|| comment(role, &self.resources.id, Password::Delivered));
        let set = Step::SetPassword { role: role.clone(), mark };
        let promote = Step::Promote { role: role.clone() };
        let steps = &mut self.plan.credentials;
        if kept.next {
            // A rotation was begun. Whether the server has the new password already does not matter.
            steps.extend([set, promote]);
        } else if rotate && (kept.password || state == Password::Delivered) {
            steps.extend([Step::Generate { role: role.clone(), next: true }, set, promote]);
        } else if kept.password {
            if kept.incomplete {
                steps.push(Step::Write);
            }
            let login = self.observed.roles.get(role).map_or(LoginTrial::Untried, |found| found.login);
            if state == Password::Pending || login == LoginTrial::Wrong {
                steps.push(set);
            }
        } else if state == Password::Pending {
            steps.extend([Step::Generate { role: role.clone(), next: false }, set]);
        } else {
            self.conflict(format!(
                "the password of the role {} was handed over, but the output file does not hold it: put the file back, \
                 or make new passwords with --rotate",
                quote_identifier(role)
            ));
        }
    }

    /// A password that is printed, once. It counts as handed over only after that.
    fn printed_password(&mut self, role: &Identifier, state: Password, rotate: bool) {
        let id = &self.resources.id;
        let sql = |state| Step::Sql(Sql { database: None, statements: vec![comment(role, id, state)], long: false });
        if self.afterwards.is_empty() {
            self.afterwards.push(Step::Print);
        }
        if state == Password::Delivered && !rotate {
            return;
        }
        if state == Password::Delivered {
            self.plan.credentials.push(sql(Password::Pending));
        }
        let role = role.clone();
        self.plan.credentials.push(Step::Generate { role: role.clone(), next: false });
        self.plan.credentials.push(Step::SetPassword { role, mark: None });
        self.afterwards.push(sql(Password::Delivered));
    }
}

impl Plan {
    /// Whether there is nothing to do (printing what is known aside).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.conflicts.is_empty()
            && self.structure.is_empty()
            && self.credentials.iter().all(|step| *step == Step::Print)
    }

    /// All steps in their order.
    pub fn steps(&self) -> impl Iterator<Item = &Step> {
        self.structure.iter().chain(&self.credentials)
    }

    /// The plan for a program: `{"conflicts": […], "steps": [{"database", "statements", "action"}]}`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let steps: Vec<_> = self.steps().map(Step::to_json).collect();
        json!({ "conflicts": self.conflicts, "steps": steps })
    }
}

impl fmt::Display for Plan {
    /// One line for each conflict and step.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for conflict in &self.conflicts {
            writeln!(f, "conflict: {conflict}")?;
        }
        for step in self.steps() {
            writeln!(f, "{step}")?;
        }
        if self.is_empty() {
            writeln!(f, "nothing to do")?;
        }
        Ok(())
    }
}

impl Step {
    fn to_json(&self) -> Value {
        match self {
            Self::Sql(sql) => json!({
                "database": sql.database.as_ref().map(Identifier::as_str),
                "statements": sql.statements,
            }),
            Self::SetPassword { role, mark } => {
                let statements: Vec<_> =
                    [Some(set_password(role, HIDDEN)), mark.clone()].into_iter().flatten().collect();
                json!({ "database": null, "statements": statements })
            }
            action => json!({ "action": action.to_string() }),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sql(sql) => {
                if let Some(database) = &sql.database {
                    write!(f, "in {}: ", quote_identifier(database))?;
                }
                write!(f, "{};", sql.statements.join("; "))
            }
            Self::Generate { role, next } => {
                let kind = if *next { "new password beside the old one" } else { "password" };
                write!(f, "make a {kind} for {}, and keep it", quote_identifier(role))
            }
            Self::SetPassword { role, mark } => {
                write!(f, "{};", set_password(role, HIDDEN))?;
                mark.as_ref().map_or(Ok(()), |mark| write!(f, " {mark};"))
            }
            Self::Promote { role } => {
                write!(f, "replace the old password of {} by the new one in the output file", quote_identifier(role))
            }
            Self::Write => f.write_str("write the output file, of which something is missing"),
            Self::Print => f.write_str("print the credentials"),
            Self::Forget => f.write_str("remove the entries from the output file"),
        }
    }
}

/// Gives the server a verifier.
pub(super) fn set_password(role: &Identifier, verifier: &str) -> String {
    format!("ALTER ROLE {} PASSWORD {}", quote_identifier(role), quote_literal(verifier))
}

/// The statement that marks a role as ours.
fn comment(role: &Identifier, id: &SetId, state: Password) -> String {
    let state = match state {
        Password::Pending => "pending",
        Password::Delivered => "delivered",
    };
    let text = format!("{MARK}{id}{MARK_PASSWORD}{state}");
    format!("COMMENT ON ROLE {} IS {}", quote_identifier(role), quote_literal(&text))
}

/// Reads a mark: whose, and the state of the password.
pub(super) fn mark(comment: Option<&str>) -> Option<(&str, Password)> {
    let (id, state) = comment?.strip_prefix(MARK)?.split_once(MARK_PASSWORD)?;
    let state = match state {
        "pending" => Password::Pending,
        "delivered" => Password::Delivered,
        _ => return None,
    };
    Some((id, state))
}

/// PostgreSQL takes `utf-8` and `UTF8` for the same.
fn same_encoding(one: &str, other: &str) -> bool {
    let plain = |text: &str| -> String {
        text.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
    };
    plain(one) == plain(other)
}

/// How a comment of ours begins; the set's id follows.
const MARK: &str = "caponier: managed by ";

/// What stands between the set's id and the state of the password.
const MARK_PASSWORD: &str = ", password ";

/// What stands for a verifier wherever a statement is shown.
const HIDDEN: &str = "(hidden)";

/// The oldest server that is supported: `DROP DATABASE … WITH (FORCE)` and trusted extensions came with it.
const OLDEST: u32 = 130_000;

/// The version from which on a grant of a role says whether it carries SET and INHERIT.
const SET_OPTION: u32 = 160_000;

/// What `datconnlimit` says of a database whose dropping was interrupted.
const HALF_DROPPED: i32 = -2;

#[cfg(test)]
mod tests;
