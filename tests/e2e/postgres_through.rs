//! The main job: a real PostgreSQL that only the agent reaches, used and provisioned through the tunnel.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use crate::connect_door::tls_plan;
use crate::harness::{Side, Site, caponier, free_port, run, run_for, within};
use crate::postgres::{Postgres, SUPERUSER_PASSWORD, bin_directories};

/// The name in the server's certificate, which leads to it too.
const HOST: &str = "localhost";

/// What moves hundreds of megabytes may take longer than other things.
const LONG: Duration = Duration::from_secs(300);

/// A site whose agent allows the server by its name, with a loopback door to it.
async fn site(server: &Postgres) -> Site {
    let port = server.address.port();
    Site::plan()
        .rule(&format!("name = \"db\"\nhosts = [\"{HOST}\"]\nwithin = [\"127.0.0.0/8\"]\nports = [{port}]"))
        .door(format!("{HOST}:{port}"))
        .start()
        .await
}

/// A program of PostgreSQL that connects to `address` and insists on the server's certificate.
fn client(server: &Postgres, program: &str, address: SocketAddr, user: &str, password: &str) -> Command {
    let mut command = Command::new(bin_directories()[0].join(program));
    command.env_clear().env("PGHOST", HOST).env("PGHOSTADDR", address.ip().to_string());
    command.env("PGPORT", address.port().to_string()).env("PGUSER", user).env("PGPASSWORD", password);
    command.env("PGSSLMODE", "verify-full").env("PGSSLROOTCERT", server.ca_file()).env("PGCONNECT_TIMEOUT", "30");
    command
}

fn admin(server: &Postgres, program: &str, address: SocketAddr) -> Command {
    client(server, program, address, "postgres", SUPERUSER_PASSWORD)
}

/// The answer to one query by psql.
async fn query(command: &mut Command, database: &str, sql: &str) -> String {
    run(command.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", sql])).await.done().trim().to_owned()
}

#[tokio::test]
async fn a_dump_of_200_megabytes_and_its_restore_are_equal() {
    let server = Postgres::start(HOST).await;
    let site = site(&server).await;
    server.run("postgres", &["CREATE DATABASE source", "CREATE DATABASE restored"]).await;
    server
        .run(
            "source",
            &[
                "CREATE EXTENSION pgcrypto",
                "CREATE TABLE noise AS SELECT id, gen_random_bytes(1000) AS bytes FROM generate_series(1, 105000) id",
                "ALTER TABLE noise ADD PRIMARY KEY (id)",
            ],
        )
        .await;
    let (ssh, through_ssh) = site.local_forward(format!("{HOST}:{}", server.address.port())).await;
    let file = site.path().join("dump");
    let begun = Instant::now();
    let mut dump = admin(&server, "pg_dump", through_ssh);
    run_for(LONG, dump.args(["-Fc", "-Z0", "-d", "source", "-f"]).arg(&file)).await.done();
    let size = fs::metadata(&file).expect("a dump").len();
    assert!(size > 200_000_000, "only {size} bytes");
    eprintln!("dumped {size} bytes through ssh -L in {:?}", begun.elapsed());
    let begun = Instant::now();
    let mut restore = admin(&server, "pg_restore", site.doors[0]);
    run_for(LONG, restore.args(["--exit-on-error", "-d", "restored"]).arg(&file)).await.done();
    eprintln!("restored them through the loopback door in {:?}", begun.elapsed());

    let sum = "SELECT count(*) || ' ' || md5(string_agg(md5(id || bytes::text), '' ORDER BY id)) FROM noise";
    let mut sums = Vec::new();
    for database in ["source", "restored"] {
        sums.push(server.superuser(database).await.query_one(sum, &[]).await.expect("a sum").get::<_, String>(0));
    }
    assert!(sums[0].starts_with("105000 "), "{sums:?}");
    assert_eq!(sums[0], sums[1]);
    drop(ssh);
    for (door, field) in [("ssh", "from_target"), ("local", "to_target")] {
        let carried: u64 = site
            .records(Side::Gateway, &json!({"event": "forward.ended", "door": door}))
            .iter()
            .map(|record| record[field].as_u64().expect("bytes"))
            .sum();
        assert!(carried > 200_000_000, "{door}: {carried}");
    }
    site.stop().await;
}

#[tokio::test]
async fn copy_carries_the_same_rows_both_ways_at_once() {
    let server = Postgres::start(HOST).await;
    let site = site(&server).await;
    server
        .run(
            "postgres",
            &[
                "CREATE TABLE a AS SELECT id, md5(id::text) || E'\\t\\\\\\n' AS text FROM generate_series(1, 200000) id",
                "CREATE TABLE b (LIKE a)",
            ],
        )
        .await;
    let (ssh, through_ssh) = site.local_forward(format!("{HOST}:{}", server.address.port())).await;
    let mut columns = Vec::new();
    for (address, format) in [(through_ssh, "text"), (site.doors[0], "binary")] {
        // Out of the one and into the other over two forwards, with nothing but a pipe between them.
        let copy = |sql: String| {
            let mut psql = admin(&server, "psql", address);
            psql.args(["-Xq", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-c", &sql]).kill_on_drop(true);
            psql
        };
        let mut out = copy(format!("COPY a TO STDOUT (FORMAT {format})")).stdout(Stdio::piped()).spawn().expect("psql");
        let pipe: Stdio = out.stdout.take().expect("its output").try_into().expect("a pipe");
        let mut into = copy(format!("COPY b FROM STDIN (FORMAT {format})")).stdin(pipe).spawn().expect("psql");
        for (psql, what) in [(&mut out, "the way out"), (&mut into, "the way in")] {
            assert!(within(what, psql.wait()).await.expect("its status").success(), "{what}");
        }
        let equal = "SELECT count(*) FROM (SELECT * FROM a EXCEPT ALL SELECT * FROM b) it";
        assert_eq!(query(&mut admin(&server, "psql", address), "postgres", equal).await, "0");
        columns.push(query(&mut admin(&server, "psql", address), "postgres", "SELECT count(*) FROM b").await);
        server.run("postgres", &["TRUNCATE b"]).await;
    }
    assert_eq!(columns, ["200000", "200000"]);
    drop(ssh);
    site.stop().await;
}

#[tokio::test]
async fn a_query_of_a_minute_outlasts_the_keepalives() {
    let server = Postgres::start(HOST).await;
    let site = site(&server).await;
    let (ssh, through_ssh) = site.local_forward(format!("{HOST}:{}", server.address.port())).await;
    let sleep = async |address: SocketAddr| {
        let mut psql = admin(&server, "psql", address);
        let arguments = ["-XAtq", "-d", "postgres", "-c", "SELECT 'slept' || pg_sleep(61)::text"];
        run_for(LONG, psql.args(arguments)).await.done()
    };
    let slept = tokio::join!(sleep(through_ssh), sleep(site.doors[0]));
    assert_eq!(slept, ("slept\n".to_owned(), "slept\n".to_owned()));
    // Nothing was replaced meanwhile.
    assert_eq!(site.records(Side::Gateway, &json!({"event": "link.up"})).len(), 1);
    assert_eq!(site.records(Side::Gateway, &json!({"event": "auth.accepted"})).len(), 1);
    drop(ssh);
    site.stop().await;
}

/// What is to be provisioned, and how.
struct Job<'a> {
    server: &'a Postgres,
    site: &'a Site,
    file: PathBuf,
}

impl<'a> Job<'a> {
    fn new(server: &'a Postgres, site: &'a Site) -> Self {
        let port = server.address.port();
        let text = format!(
            "[provision]\ngateway = \"ssh://{}\"\nagent = \"acme/prod-eu\"\nidentity = \"provisioner\"\n\
             known_hosts = \"known_hosts\"\noutput = \"credentials.json\"\n\
             [instance]\nhost = \"{HOST}\"\nport = {port}\nuser = \"postgres\"\nca_file = \"{}\"\n\
             [[database]]\nname = \"orders\"\n\
             [[database.extension]]\nname = \"pgcrypto\"\nschema = \"extensions\"\n\
             [[database.grant]]\nrole = \"reader\"\nprivileges = [\"connect\"]\n\
             [[role]]\nname = \"reader\"\n",
            site.address,
            server.ca_file().display()
        );
        let file = site.path().join("resources.toml");
        fs::write(&file, text).expect("written");
        Self { server, site, file }
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = caponier();
        command.args(["provision", verb, "-f"]).arg(&self.file).env("CAPONIER_DATABASE_PASSWORD", SUPERUSER_PASSWORD);
        command
    }

    fn output(&self) -> PathBuf {
        self.site.path().join("credentials.json")
    }

    fn credentials(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.output()).expect("credentials");
        serde_json::from_str::<Value>(&text).expect("JSON").as_array().expect("an array").clone()
    }

    /// That each credential of the output logs in at `address`.
    async fn credentials_log_in(&self, address: SocketAddr) {
        let credentials = self.credentials();
        assert_eq!(credentials.len(), 2, "{credentials:?}");
        for entry in credentials {
            let text = |field: &str| entry[field].as_str().unwrap_or_else(|| panic!("no {field} in {entry}"));
            assert_eq!((text("host"), &entry["port"]), (HOST, &json!(self.server.address.port())));
            let mut psql = client(self.server, "psql", address, text("username"), text("password"));
            assert_eq!(query(&mut psql, text("name"), "SELECT current_user").await, text("username"));
        }
    }
}

#[tokio::test]
async fn provisions_inside_tls_too_and_by_no_gateway_that_it_cannot_verify() {
    let server = Postgres::start(HOST).await;
    let (plan, _) = tls_plan().await;
    let port = server.address.port();
    let site = plan
        .rule(&format!("name = \"db\"\nhosts = [\"{HOST}\"]\nwithin = [\"127.0.0.0/8\"]\nports = [{port}]"))
        .start()
        .await;
    let job = Job::new(&server, &site);
    let plain = fs::read_to_string(&job.file).expect("resources");
    let ssh = format!("gateway = \"ssh://{}\"", site.address);
    for transport in ["tls", "wss"] {
        let inside = format!("gateway = \"{transport}://localhost:{}\"", site.address.port());
        let trusted = format!("{inside}\ntls_ca_file = \"gateway-ca.pem\"");
        let known = format!("known_hosts = \"known_{transport}\"");
        // The key is the same, by whatever name the gateway is called.
        let keys = fs::read_to_string(site.path().join("known_hosts")).expect("known hosts");
        let key = keys.lines().next().and_then(|line| line.split_once(' ')).expect("a line").1;
        let hosts = format!("[localhost]:{} {key}\n", site.address.port());
        fs::write(site.path().join(format!("known_{transport}")), hosts).expect("written");
        let plain = plain.replace("known_hosts = \"known_hosts\"", &known);

        fs::write(&job.file, plain.replace(&ssh, &inside)).expect("written");
        let said = run(&mut job.command("apply")).await;
        assert_eq!(said.code(), 1, "{said:?}");
        assert!(said.stderr.contains("could not make TLS with gateway"), "{said:?}");
        assert!(!job.output().exists());

        fs::write(&job.file, plain.replace(&ssh, &trusted)).expect("written");
        run(&mut job.command("apply")).await.done();
        job.credentials_log_in(server.address).await;
        run(&mut job.command("destroy")).await.done();
        site.record(Side::Gateway, json!({"event": "auth.accepted", "transport": transport})).await;
    }
    site.stop().await;
}

#[tokio::test]
async fn provisions_through_the_tunnel_and_the_new_role_logs_in() {
    let server = Postgres::start(HOST).await;
    let site = site(&server).await;
    let (ssh, through_ssh) = site.local_forward(format!("{HOST}:{}", server.address.port())).await;
    let job = Job::new(&server, &site);
    let planned = run(&mut job.command("plan")).await.done();
    assert!(planned.contains("orders") && planned.contains("reader"), "{planned}");
    assert!(!job.output().exists(), "a plan does nothing");

    let applied = run(&mut job.command("apply")).await;
    assert_eq!((applied.code(), applied.stdout.as_str()), (0, ""), "{applied:?}");
    assert_eq!(fs::metadata(job.output()).expect("credentials").permissions().mode() & 0o777, 0o600);
    job.credentials_log_in(through_ssh).await;
    let mut psql = Command::new("true");
    for entry in job.credentials() {
        let password = entry["password"].as_str().expect("a password").to_owned();
        for place in [&applied.stderr, &planned, &server.log(), &format!("{:?}", site.trail(Side::Gateway))] {
            assert!(!place.contains(&password), "a password stands in {place}");
        }
        if entry["username"] == "orders" {
            psql = client(&server, "psql", through_ssh, "orders", &password);
        }
    }
    query(&mut psql, "orders", "CREATE SCHEMA mine; CREATE TABLE mine.t AS SELECT extensions.gen_random_uuid()").await;

    // What is there already is left as it is.
    let before = fs::read(job.output()).expect("credentials");
    let again = run(&mut job.command("apply")).await;
    assert_eq!(again.code(), 0, "{again:?}");
    assert!(again.stderr.contains("done: 0 step(s) taken"), "{again:?}");
    assert_eq!(fs::read(job.output()).expect("credentials"), before);

    // The same through `caponier forward`, which insists on the gateway's key too.
    let port = free_port();
    let mut forward = caponier();
    forward.args(["forward", "--gateway", &format!("ssh://{}", site.address), "--agent", "acme/prod-eu"]);
    forward.arg("--identity").arg(site.path().join("provisioner"));
    forward.arg("--known-hosts").arg(site.path().join("known_hosts"));
    forward.args(["-L", &format!("{port}:{HOST}:{}", server.address.port())]);
    let mut forward = site.background("forward", forward);
    forward.says("listening 127.").await;
    job.credentials_log_in(SocketAddr::from(([127, 0, 0, 1], port))).await;
    assert_eq!(forward.stop().await, Some(0));

    for _ in 0..2 {
        let destroyed = run(&mut job.command("destroy")).await;
        assert_eq!(destroyed.code(), 0, "{destroyed:?}");
        assert!(!job.output().exists());
    }
    let left = "SELECT count(*) FROM (SELECT datname FROM pg_database UNION ALL SELECT rolname FROM pg_roles) AS it(name) \
                WHERE name IN ('orders', 'reader')";
    assert_eq!(query(&mut admin(&server, "psql", through_ssh), "postgres", left).await, "0");

    // Every step of that is on record as the provisioner's.
    let opened = site.records(Side::Agent, &json!({"event": "forward.open", "principal": "provisioner", "rule": "db"}));
    assert!(opened.len() > 10, "{}", opened.len());
    drop((ssh, forward));
    site.stop().await;
}

#[tokio::test]
async fn a_gateway_or_database_that_is_not_who_it_should_be_gets_no_password() {
    let server = Postgres::start(HOST).await;
    let site = site(&server).await;
    let job = Job::new(&server, &site);
    let good = fs::read_to_string(&job.file).expect("resources");
    site.key("other");
    let other = format!("[127.0.0.1]:{} {}\n", site.address.port(), site.public("other"));
    fs::write(site.path().join("other_hosts"), other).expect("written");
    let ca = rcgen::KeyPair::generate().expect("a key");
    let certificate = rcgen::CertificateParams::new(Vec::new()).expect("parameters").self_signed(&ca).expect("made");
    fs::write(site.path().join("other-ca.pem"), certificate.pem()).expect("written");
    let own_ca = server.ca_file().display().to_string();
    for (from, to, code, words) in [
        ("known_hosts = \"known_hosts\"", "known_hosts = \"other_hosts\"", 1, "which is not the one pinned"),
        ("known_hosts = \"known_hosts\"", "known_hosts = \"absent\"", 2, "absent"),
        ("known_hosts = \"known_hosts\"", "", 2, "provision"),
        ("identity = \"provisioner\"", "identity = \"other\"", 1, "did not let key"),
        ("[[database]]", "tls_name = \"other.internal\"\n[[database]]", 1, "other.internal"),
        (own_ca.as_str(), "other-ca.pem", 1, "certificate"),
    ] {
        fs::write(&job.file, good.replacen(from, to, 1)).expect("written");
        let said = run(&mut job.command("apply")).await;
        assert_eq!((said.code(), said.stdout.as_str()), (code, ""), "{to}: {said:?}");
        assert!(said.stderr.contains(words), "{to}: {said:?}");
        assert!(!said.stderr.contains(SUPERUSER_PASSWORD), "{said:?}");
        assert!(!job.output().exists());
    }
    assert!(!server.log().contains("connection authenticated"), "{}", server.log());
    site.stop().await;
}

#[tokio::test]
async fn an_apply_that_is_killed_anywhere_is_completed_by_the_next() {
    let server = Postgres::start(HOST).await;
    let site = site(&server).await;
    let job = Job::new(&server, &site);
    let said = run(&mut job.command("apply")).await;
    assert_eq!(said.code(), 0, "{said:?}");
    let lines = said.stderr.lines().count();
    assert!(lines > 20, "{said:?}");
    run(&mut job.command("destroy")).await.done();
    for moment in (1..lines).step_by(3) {
        let mut apply = job.command("apply").kill_on_drop(true).stderr(Stdio::piped()).spawn().expect("caponier runs");
        // Each line announces a step; the kill comes while that is being done.
        let mut progress = BufReader::new(apply.stderr.take().expect("its progress")).lines();
        for _ in 0..moment {
            within("a line", progress.next_line()).await.expect("read").expect("a line");
        }
        apply.kill().await.expect("killed");
        let rerun = run(&mut job.command("apply")).await;
        assert_eq!(rerun.code(), 0, "after a kill at {moment} of {lines}: {rerun:?}");
        job.credentials_log_in(site.doors[0]).await;
        let third = run(&mut job.command("apply")).await;
        assert!(third.stderr.contains("done: 0 step(s) taken"), "after {moment}: {third:?}");
        run(&mut job.command("destroy")).await.done();
        let left: Vec<_> = fs::read_dir(site.path())
            .expect("the folder")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .filter(|name| name.contains("credentials"))
            .collect();
        assert_eq!(left, Vec::<String>::new(), "after {moment}");
    }
    site.stop().await;
}
