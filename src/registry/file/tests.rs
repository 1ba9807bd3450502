//! Tests of the module above.

use super::*;
use crate::identity::{Algorithm, PrivateKey};
use crate::registry::Refusal;
use crate::tls::judge::tests::{ca, revoking};
use std::os::unix::fs::symlink;
use tempfile::TempDir;
use tokio::sync::mpsc;

const DEADLINE: Duration = Duration::from_secs(120);

/// From where keys are shown, where it does not matter.
const FROM: std::net::IpAddr = std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

struct Tree(TempDir);

impl Tree {
    fn new() -> Self {
        let tree = Self(tempfile::tempdir().expect("temporary directory"));
        tree.folder("organisations");
        tree
    }

    /// A small registry in good order, with its agent's key.
    fn good() -> (Self, PublicKey) {
        let tree = Self::new();
        let key = tree.key("organisations/acme/agents/prod-eu/2026-11.pub");
        tree.key("organisations/acme/principals/ci/laptop.pub");
        tree.write("organisations/acme/principals/ci.toml", "agents = [\"prod-*\"]\n");
        (tree, key)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    fn folder(&self, path: &str) {
        std::fs::create_dir_all(self.path(path)).expect("create folder");
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().expect("parent")).expect("create folder");
        std::fs::write(path, text).expect("write file");
    }

    fn key(&self, path: &str) -> PublicKey {
        let key = PrivateKey::generate(Algorithm::Ed25519).public();
        self.write(path, &key.to_openssh());
        key
    }

    fn load(&self) -> Result<Snapshot, Faults> {
        load(self.0.path())
    }
}

/// The reports of a registry that is being watched.
struct Watched {
    files: Arc<Files>,
    reports: mpsc::Receiver<Reload>,
    tasks: Tasks,
}

impl Watched {
    fn start(dir: &Path, told: bool) -> Self {
        Self::reminding(dir, told, Duration::from_secs(3600))
    }

    fn reminding(dir: &Path, told: bool, remind: Duration) -> Self {
        let poll = if told { Duration::from_secs(3600) } else { Duration::from_millis(10) };
        Self::at(dir, Pace { told, poll, settle: Duration::from_millis(10), remind })
    }

    fn at(dir: &Path, pace: Pace) -> Self {
        let files = Files::open(dir.to_owned()).expect("a good registry");
        let tasks = Tasks::new();
        let (sender, reports) = mpsc::channel(16);
        let (watching, group) = (Arc::clone(&files), tasks.clone());
        tasks.spawn(async move {
            watching.watch_at(pace, group, move |reload| sender.try_send(reload).expect("room")).await;
        });
        Self { files, reports, tasks }
    }

    async fn next(&mut self) -> Reload {
        tokio::time::timeout(DEADLINE, self.reports.recv()).await.expect("a report in time").expect("a report")
    }

    /// The next state that is taken over; states in between, which a slow writer makes, may be refused.
    async fn accepted(&mut self) -> Reload {
        loop {
            if let accepted @ Reload::Accepted { .. } = self.next().await {
                return accepted;
            }
        }
    }

    async fn stop(self) {
        assert!(self.tasks.drain(DEADLINE).await);
    }
}

fn knows(files: &Files, key: &PublicKey) -> Result<(), Refusal> {
    let name = "acme/prod-eu".parse().expect("a name");
    files.current().agent(&name, &key.fingerprint(), [127, 0, 0, 1].into(), Timestamp::now())
}

#[test]
fn reads_what_the_design_shows() {
    let (tree, key) = Tree::good();
    let old = tree.key("organisations/acme/agents/prod-eu/2025.pem");
    tree.write(
        "organisations/acme/agents/prod-eu/2025.toml",
        "expires = 2026-12-01T00:00:00Z\nrevoked = true\ncomment = \"lost\"\n",
    );
    tree.write("organisations/acme.toml", "accept_from = [\"10.0.0.0/8\"]\n");
    tree.write(
        "organisations/acme/agents/prod-eu.toml",
        "description = \"Frankfurt\"\naccept_from = [\"10.1.0.0/16\", \"2001:db8::/32\"]\n",
    );
    tree.write(
        "organisations/acme/principals/ci.toml",
        "agents = [\"prod-*\"]\ntargets = [\"db:5432\", \"web:*\"]\nexpires = 2027-01-01T00:00:00Z\naccept_from = [\"::ffff:10.2.0.0/112\"]\n",
    );
    tree.write("organisations/acme/agents/keyless.toml", "");
    tree.write("organisations/README.md", "# Words");
    tree.write("organisations/acme/.gitkeep", "");
    tree.folder(".git/objects");
    tree.folder("organisations/globex");

    let snapshot = tree.load().expect("in good order");
    let acme = &snapshot.organisations()[&"acme".parse().expect("an id")];
    let agent = &acme.agents[&"prod-eu".parse().expect("an id")];
    assert_eq!(agent.description.as_deref(), Some("Frankfurt"));
    let keys: Vec<_> = agent.keys.iter().map(|key| key.key.clone()).collect();
    assert_eq!(keys, [old, key]);
    assert!(agent.keys[0].revoked && !agent.keys[1].revoked);
    assert_eq!(agent.keys[0].comment.as_deref(), Some("lost"));
    assert_eq!(agent.keys[0].expires.map(|at| at.to_string()).as_deref(), Some("2026-12-01T00:00:00Z"));
    let ci = &acme.principals[&"ci".parse().expect("an id")];
    assert_eq!(ci.keys.len(), 1);
    assert_eq!(ci.grant.targets.as_ref().map(Vec::len), Some(2));
    assert!(ci.expires.is_some());
    for (accept_from, inside, outside) in [
        (&acme.accept_from, "10.9.0.1", "11.0.0.1"),
        (&agent.accept_from, "10.1.0.1", "10.2.0.1"),
        (&ci.accept_from, "10.2.0.1", "10.1.0.1"),
    ] {
        let networks = accept_from.as_ref().expect("networks");
        assert!(networks.contain(inside.parse().expect("an address")), "{networks:?}");
        assert!(!networks.contain(outside.parse().expect("an address")), "{networks:?}");
    }
    assert!(acme.agents[&"keyless".parse().expect("an id")].accept_from.is_none());
    assert!(acme.agents[&"keyless".parse().expect("an id")].keys.is_empty());
    assert_eq!(snapshot.organisations().len(), 2);
}

#[test]
fn every_kind_of_fault_is_found() {
    let private = "-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n";
    let good = PrivateKey::generate(Algorithm::Ed25519).public().to_openssh();
    for (path, text, file, problem) in [
        ("organisations/Acme/agents/.k", "", "organisations/Acme", "organisation ids are"),
        ("organisations/a_b/.k", "", "organisations/a_b", "organisation ids are"),
        ("organisations/acme/agents/-x/.k", "", "agents/-x", "agent ids are"),
        ("organisations/acme/agents/X.toml", "", "agents/X.toml", "agent ids are"),
        ("organisations/acme/principals/a b/.k", "", "principals/a b", "principal ids are"),
        ("organisations/acme/machines/.k", "", "acme/machines", "this folder does not belong here"),
        ("organisations/acne.toml", "", "organisations/acne.toml", "no folder of this name beside it"),
        ("organisations/notes.txt", "", "organisations/notes.txt", "this file does not belong here"),
        ("organisations/Acme.toml", "", "organisations/Acme.toml", "organisation ids are"),
        ("organisations/acme.toml", "agents = []", "organisations/acme.toml:1", "agents: unknown key"),
        ("organisations/acme.toml", "accept_from = []", "acme.toml:1", "at least one element"),
        ("organisations/acme.toml", "accept_from = [\"10.0.0.1\"]", "acme.toml:1", "write 10.0.0.1/32"),
        ("organisations/acme/agents/prod-eu.toml", "accept_from = []", "prod-eu.toml:1", "at least one element"),
        ("organisations/acme/agents/prod-eu.toml", "accept_from = \"*\"", "prod-eu.toml:1", "a list is wanted"),
        (
            "organisations/acme/principals/ci.toml",
            "agents = [\"*\"]\naccept_from = [\"10.1.0.0/8\"]",
            "ci.toml:2",
            "accept_from[0]: 10.1.0.0/8 has bits beyond its prefix: write 10.0.0.0/8",
        ),
        ("stray.txt", "", "stray.txt", "this file does not belong here"),
        ("organisations/acme/agents/prod-eu/notes.txt", "", "notes.txt", "does not belong here"),
        ("organisations/acme/agents/prod-eu/deep/x.pub", &good, "prod-eu/deep", "does not belong here"),
        ("organisations/acme/agents/loose.pub", &good, "agents/loose.pub", "does not belong here"),
        ("organisations/acme/agents/prod-eu/x.pub", "", "x.pub", "this is empty"),
        ("organisations/acme/agents/prod-eu/x.pub", "ssh-ed25519 AAAA", "x.pub", "this looks like an OpenSSH"),
        (
            "organisations/acme/agents/prod-eu/x.pub",
            private,
            "x.pub",
            "this is a private key where a public key belongs",
        ),
        ("organisations/acme/agents/prod-eu/2026-11.pem", &good, "2026-11.pub", "the same name as 2026-11.pem"),
        ("organisations/acme/agents/prod-eu/2027.toml", "", "2027.toml", "no key of this name beside it"),
        (
            "organisations/acme/agents/prod-eu/2026-11.toml",
            "expire = 2027-01-01T00:00:00Z",
            "2026-11.toml:1",
            "expire: unknown key: did you mean expires?",
        ),
        ("organisations/acme/agents/prod-eu/2026-11.toml", "revoked = 1", "2026-11.toml:1", "true or false"),
        ("organisations/acme/agents/prod-eu.toml", "agents = []", "prod-eu.toml:1", "agents: unknown key"),
        ("organisations/acme/agents/prod-eu.toml", "description =", "prod-eu.toml:1", "not TOML"),
        ("organisations/acme/principals/ci.toml", "", "ci.toml", "agents: this key is missing"),
        ("organisations/acme/principals/ci.toml", "agents = \"*\"", "ci.toml:1", "a list is wanted"),
        ("organisations/acme/principals/ci.toml", "agents = [\"A\"]", "ci.toml:1", "agents[0]: patterns for ids are"),
        (
            "organisations/acme/principals/ci.toml",
            "agents = [\"*\"]\ntargets = [\"*:443\"]",
            "ci.toml:2",
            "targets[0]: the host of this target cannot be used: the last label must be spelt out",
        ),
        (
            "organisations/acme/principals/ci.toml",
            "agents = [\"*\"]\nexpires = \"tomorrow\"",
            "ci.toml:2",
            "expires: a date and time",
        ),
        (
            "organisations/acme/principals/ci.toml",
            "agents = [\"*\"]\nnot_before = 2027-01-01T00:00:00Z\nexpires = 2027-01-01T00:00:00Z",
            "ci.toml:3",
            "expires: it would never hold",
        ),
        ("organisations/acme/principals/new/x.pub", &good, "principals/new.toml", "missing: it says which agents"),
    ] {
        let (tree, _) = Tree::good();
        tree.write(path, text);
        let faults = tree.load().expect_err(path).to_string();
        assert!(faults.lines().any(|line| line.contains(file) && line.contains(problem)), "{path}: {faults}");
        assert!(!faults.contains("AAAA"), "{path}: {faults}");
    }
}

#[test]
fn a_key_counts_between_its_dates() {
    let (tree, key) = Tree::good();
    let about = "organisations/acme/agents/prod-eu/2026-11.toml";
    tree.write(about, "not_before = 2027-01-01T00:00:00Z\nexpires = 2027-02-01T00:00:00Z\n");
    let snapshot = tree.load().expect("in good order");
    let name = "acme/prod-eu".parse().expect("a name");
    let of = |now: &str| snapshot.agent(&name, &key.fingerprint(), FROM, now.parse().expect(now));
    assert_eq!(of("2026-12-31T23:59:59Z"), Err(Refusal::NotYetValid));
    assert_eq!(of("2027-01-01T00:00:00Z"), Ok(()));
    assert_eq!(of("2027-02-01T00:00:00Z"), Err(Refusal::Expired));
    let within = |since: &str, now: &str| snapshot.expires_within(since.parse().expect(since), now.parse().expect(now));
    assert!(within("2026-12-31T23:59:59Z", "2027-01-01T00:00:00Z"));
    assert!(!within("2027-01-01T00:00:00Z", "2027-01-31T00:00:00Z"));
    assert!(within("2027-01-31T00:00:00Z", "2027-02-01T00:00:00Z"));
    for expires in ["2027-01-01T00:00:00Z", "2026-01-01T00:00:00Z"] {
        tree.write(about, &format!("expires = {expires}\nnot_before = 2027-01-01T00:00:00Z\n"));
        let faults = tree.load().expect_err("it never counts").to_string();
        assert!(faults.contains("2026-11.toml:1: expires: it must lie after not_before"), "{faults}");
    }
}

#[test]
fn a_key_that_is_called_like_a_readme_is_a_key() {
    let (tree, _) = Tree::good();
    let key = tree.key("organisations/acme/agents/prod-eu/README.pub");
    tree.write("organisations/acme/agents/prod-eu/README.md", "# Words");
    tree.write("organisations/acme/README", "Words");
    let snapshot = tree.load().expect("in good order");
    let name = "acme/prod-eu".parse().expect("a name");
    assert_eq!(snapshot.agent(&name, &key.fingerprint(), FROM, Timestamp::now()), Ok(()));
    tree.write("organisations/acme/agents/prod-eu/README.pub", "");
    assert!(tree.load().is_err(), "an empty key is a fault, whatever it is called");
}

/// The clock of a file system need not move between two changes, and the system need not tell of the second.
#[tokio::test]
async fn a_change_that_leaves_sizes_and_times_alone_is_found() {
    let (tree, key) = Tree::good();
    let about = "organisations/acme/agents/prod-eu/2026-11.toml";
    tree.write(about, "revoked = false\n");
    let mut watched = Watched::start(tree.0.path(), false);
    tree.write(about, "revoked = true \n");
    watched.accepted().await;
    assert_eq!(knows(&watched.files, &key), Err(Refusal::Revoked));
    watched.stop().await;
    let mut seen = Seen { signature: 1, since: Instant::now(), confirmed: false };
    assert!(!seen.is_doubtful(), "it was just read");
    seen.since -= FILE_CLOCK;
    assert!(seen.is_doubtful(), "it is read once more, though it looks the same");
    seen.confirmed = true;
    assert!(!seen.is_doubtful());
}

#[test]
fn faults_of_all_files_are_told_at_once() {
    let (tree, _) = Tree::good();
    tree.write("organisations/acme/agents/X/a.pub", "");
    tree.write("organisations/acme/agents/prod-eu/b.pub", "b");
    tree.write("organisations/acme/principals/ci.toml", "agents = [1, 2]\nwhat = 1\n");
    let faults = tree.load().expect_err("faults");
    assert_eq!(faults.iter().count(), 5, "{faults}");
}

#[test]
fn a_key_has_one_holder_in_an_organisation() {
    for (other, refused) in [
        ("organisations/acme/agents/prod-eu/again.pub", true),
        ("organisations/acme/agents/prod-us/2026.pub", true),
        ("organisations/acme/principals/ci/agents-key.pub", true),
        ("organisations/globex/agents/prod-eu/2026.pub", false),
    ] {
        let (tree, key) = Tree::good();
        tree.write(other, &key.to_openssh());
        match tree.load() {
            Ok(_) => assert!(!refused, "{other}"),
            Err(faults) => {
                assert!(refused, "{other}: {faults}");
                assert!(faults.to_string().contains("a key has one holder"), "{faults}");
                assert!(faults.to_string().contains("2026-11.pub"), "{faults}");
            }
        }
    }
    let (tree, key) = Tree::good();
    tree.write("organisations/acme/principals/dev/x.pub", &key.to_openssh());
    tree.write("organisations/acme/principals/dev.toml", "agents = []");
    assert!(tree.load().is_err());
}

#[test]
fn special_files_and_broken_links_are_faults() {
    let (tree, _) = Tree::good();
    symlink("nowhere", tree.path("organisations/acme/agents/prod-eu/x.pub")).expect("link");
    assert!(tree.load().expect_err("a broken link").to_string().contains("x.pub: cannot be read"));

    let (tree, _) = Tree::good();
    let _socket = std::os::unix::net::UnixListener::bind(tree.path("organisations/acme/agents/prod-eu/x.pub"));
    assert!(tree.load().expect_err("a socket").to_string().contains("neither a file nor a folder"));

    let (tree, _) = Tree::good();
    symlink("..", tree.path("organisations/acme/agents/loop")).expect("link");
    assert!(tree.load().is_err());
    let _ = signature(tree.0.path());
}

#[test]
fn a_folder_that_is_no_registry_is_refused() {
    let empty = tempfile::tempdir().expect("temporary directory");
    assert!(load(empty.path()).expect_err("empty").to_string().contains("this is no registry"));
    assert!(Files::open(empty.path().join("absent")).expect_err("absent").to_string().contains("cannot be read"));
    assert!(Tree::new().load().expect("an empty registry").organisations().is_empty());
}

#[tokio::test]
async fn a_change_is_taken_over_when_the_system_tells_of_it() {
    let (tree, old) = Tree::good();
    let mut watched = Watched::start(tree.0.path(), true);
    let mut changed = watched.files.changed();
    assert_eq!(knows(&watched.files, &old), Ok(()));

    let new = tree.key("organisations/acme/agents/prod-eu/2027.pub");
    let Reload::Accepted { organisations: 1, agents: 1, principals: 1, keys: 3 } = watched.accepted().await else {
        panic!("a third key");
    };
    assert_eq!((knows(&watched.files, &old), knows(&watched.files, &new)), (Ok(()), Ok(())));
    tokio::time::timeout(DEADLINE, changed.changed()).await.expect("in time").expect("changed");

    std::fs::remove_file(tree.path("organisations/acme/agents/prod-eu/2026-11.pub")).expect("remove");
    watched.accepted().await;
    assert_eq!(knows(&watched.files, &old), Err(Refusal::UnknownKey));

    tree.write("organisations/acme/agents/prod-eu/2027.toml", "revoked = true");
    watched.accepted().await;
    assert_eq!(knows(&watched.files, &new), Err(Refusal::Revoked));

    let deep = tree.key("organisations/globex/agents/prod-eu/2027.pub");
    watched.accepted().await;
    assert_eq!(knows(&watched.files, &deep), Err(Refusal::OtherOrganisation));
    watched.stop().await;
}

#[tokio::test]
async fn a_faulty_state_keeps_the_last_good_one() {
    for told in [true, false] {
        let (tree, key) = Tree::good();
        let mut watched = Watched::start(tree.0.path(), told);
        let mut changed = watched.files.changed();
        changed.mark_unchanged();

        tree.write("organisations/acme/agents/prod-eu/broken.pub", "not a key");
        std::fs::remove_file(tree.path("organisations/acme/agents/prod-eu/2026-11.pub")).expect("remove");
        // The file may be seen between being made and being written, which is another fault.
        let mut faults = String::new();
        while !(faults.contains("broken.pub") && faults.lines().count() == 1) {
            let Reload::Rejected(found) = watched.next().await else { panic!("rejected") };
            faults = found.to_string();
        }
        assert_eq!(knows(&watched.files, &key), Ok(()));
        assert!(!changed.has_changed().expect("watched"));

        std::fs::remove_file(tree.path("organisations/acme/agents/prod-eu/broken.pub")).expect("remove");
        watched.accepted().await;
        assert_eq!(knows(&watched.files, &key), Err(Refusal::UnknownKey));
        assert!(changed.has_changed().expect("watched"));
        watched.stop().await;
    }
}

#[tokio::test]
async fn a_revocation_that_a_faulty_state_holds_up_is_told_more_than_once() {
    let (tree, key) = Tree::good();
    let mut watched = Watched::reminding(tree.0.path(), false, Duration::from_millis(50));
    tree.write("organisations/acme/agents/prod-eu/2026-11.toml", "revoked = true");
    tree.write("organisations/stray.txt", "x");
    // Between the two writes the revocation may have been taken over alone; and to read a file may take longer than the pace of
    // the reminders, which is said as well.
    let reminds =
        |reload: Reload| matches!(reload, Reload::Rejected(faults) if faults.to_string().contains("stray.txt"));
    let mut told = 0;
    while told < 3 {
        told += usize::from(reminds(watched.next().await));
    }
    std::fs::remove_file(tree.path("organisations/stray.txt")).expect("remove");
    watched.accepted().await;
    assert_eq!(knows(&watched.files, &key), Err(Refusal::Revoked));
    tokio::time::sleep(Duration::from_millis(200)).await;
    while let Ok(report) = watched.reports.try_recv() {
        assert!(!reminds(report), "a good state needs no reminder");
    }
    watched.stop().await;
}

#[tokio::test]
async fn going_back_to_the_last_good_state_is_said() {
    let (tree, key) = Tree::good();
    let mut watched = Watched::start(tree.0.path(), true);
    tree.write("organisations/stray.txt", "x");
    assert!(matches!(watched.next().await, Reload::Rejected(_)));
    std::fs::remove_file(tree.path("organisations/stray.txt")).expect("remove");
    assert!(matches!(watched.next().await, Reload::Accepted { keys: 2, .. }));
    assert_eq!(knows(&watched.files, &key), Ok(()));
    watched.stop().await;
}

#[tokio::test]
async fn changes_are_found_by_looking_too() {
    let (tree, _) = Tree::good();
    let mut watched = Watched::start(tree.0.path(), false);
    let new = tree.key("organisations/acme/agents/prod-eu/2027.pub");
    assert!(matches!(watched.accepted().await, Reload::Accepted { keys: 3, .. }));
    assert_eq!(knows(&watched.files, &new), Ok(()));
    watched.stop().await;
}

#[tokio::test]
async fn whoever_asks_has_it_read_again() {
    let (tree, _) = Tree::good();
    // Nobody tells of changes, and the next look of its own is far away.
    let far = Duration::from_secs(3600);
    let pace = Pace { told: false, poll: far, settle: Duration::from_millis(10), remind: far };
    let mut watched = Watched::at(tree.0.path(), pace);
    // The first one may be found by the look at the start.
    for year in 2027..2030 {
        let new = tree.key(&format!("organisations/acme/agents/prod-eu/{year}.pub"));
        watched.files.look_again();
        watched.accepted().await;
        assert_eq!(knows(&watched.files, &new), Ok(()));
    }
    watched.stop().await;
}

#[tokio::test]
async fn a_registry_that_goes_away_keeps_the_last_good_state() {
    let (tree, key) = Tree::good();
    let away = tree.path("away");
    let mut watched = Watched::start(&tree.path(""), false);
    std::fs::rename(tree.path("organisations"), &away).expect("rename");
    let Reload::Rejected(_) = watched.next().await else { panic!("rejected") };
    assert_eq!(knows(&watched.files, &key), Ok(()));
    std::fs::rename(&away, tree.path("organisations")).expect("rename");
    watched.accepted().await;
    assert_eq!(knows(&watched.files, &key), Ok(()));
    watched.stop().await;
}

#[tokio::test]
async fn a_tree_swapped_by_a_link_is_one_change() {
    for told in [true, false] {
        let tree = Tree(tempfile::tempdir().expect("temporary directory"));
        let state = |name: &str| {
            tree.key(&format!("{name}/organisations/acme/principals/ci/x.pub"));
            tree.write(&format!("{name}/organisations/acme/principals/ci.toml"), "agents = [\"*\"]");
            tree.key(&format!("{name}/organisations/acme/agents/prod-eu/x.pub"))
        };
        let old = state("..2026_11_01");
        symlink("..2026_11_01", tree.path("..data")).expect("link");
        symlink("..data/organisations", tree.path("organisations")).expect("link");
        let mut watched = Watched::start(tree.0.path(), told);
        assert_eq!(knows(&watched.files, &old), Ok(()));

        for round in 0..3 {
            let name = format!("..2026_11_02_{round}");
            let new = state(&name);
            symlink(&name, tree.path("..data_tmp")).expect("link");
            std::fs::rename(tree.path("..data_tmp"), tree.path("..data")).expect("rename");
            assert!(matches!(watched.next().await, Reload::Accepted { keys: 2, .. }));
            assert_eq!(knows(&watched.files, &new), Ok(()));
            assert_eq!(knows(&watched.files, &old), Err(Refusal::UnknownKey));
        }
        watched.stop().await;
    }
}

#[tokio::test]
async fn an_expiry_counts_as_a_change() {
    let (tree, key) = Tree::good();
    let soon = Timestamp::now() + Duration::from_secs(2);
    tree.write("organisations/acme/agents/prod-eu/2026-11.toml", &format!("expires = {soon}"));
    let watched = Watched::start(tree.0.path(), false);
    let mut changed = watched.files.changed();
    changed.mark_unchanged();
    tokio::time::timeout(DEADLINE, changed.changed()).await.expect("in time").expect("changed");
    assert_eq!(knows(&watched.files, &key), Err(Refusal::Expired));
    watched.stop().await;
}

#[test]
fn client_cas_and_what_they_revoke_are_read() {
    let (tree, _) = Tree::good();
    let [one, two] = ["one", "two"].map(ca);
    tree.write("organisations/acme.toml", "client_auth = \"strict\"\n");
    tree.write("organisations/acme/client-ca/pki.pem", &one.pem());
    tree.write("organisations/acme/client-ca/pki.crl", &revoking(&one, &[7], "2036-01-01T00:00:00Z"));
    tree.write("organisations/acme/client-ca/old.pem", &two.pem());
    tree.write("organisations/acme/agents/prod-eu/client-ca/own.pem", &two.pem());
    tree.write("organisations/acme/agents/prod-eu.toml", "certificate_names = [\"eu.example\", \"Agent EU\"]\n");
    let snapshot = tree.load().expect("in order");
    let acme = &snapshot.organisations()[&"acme".parse().expect("an id")];
    assert_eq!(acme.client_auth, ClientAuth::Strict);
    assert_eq!(acme.client_trust.ends().count(), 3);
    let agent = &acme.agents[&"prod-eu".parse().expect("an id")];
    assert_eq!(agent.certificate_names, ["eu.example", "Agent EU"]);
    assert_eq!(agent.client_trust.as_ref().map(|trust| trust.ends().count()), Some(1));
    assert_eq!(agent.keys.len(), 1, "its keys are beside the folder");
    // Another list is another state, and its end is a moment at which all is judged again.
    assert!(snapshot.expires_within(
        "2035-12-31T00:00:00Z".parse().expect("a time"),
        "2036-01-02T00:00:00Z".parse().expect("a time")
    ));
    tree.write("organisations/acme/client-ca/pki.crl", &revoking(&one, &[7, 8], "2036-01-01T00:00:00Z"));
    assert_ne!(tree.load().expect("in order"), snapshot);
}

#[test]
fn every_fault_of_client_cas_is_found() {
    let [one, two] = ["one", "two"].map(ca);
    let list = revoking(&two, &[], "2036-01-01T00:00:00Z");
    let ca_file = "organisations/acme/client-ca/pki.pem";
    let list_file = "organisations/acme/client-ca/pki.crl";
    let about = "organisations/acme.toml";
    let agent = "organisations/acme/agents/prod-eu.toml";
    for (files, at, problem) in [
        (vec![(about, "client_auth = \"strict\"".to_owned())], about, "without a CA"),
        (vec![(about, "client_auth = \"loose\"".to_owned())], about, "without a CA"),
        (vec![(about, "client_auth = \"on\"".to_owned())], about, "one of \"off\", \"loose\", \"strict\""),
        (vec![(ca_file, String::new())], ca_file, "holds no PEM certificate"),
        (vec![(ca_file, one.pem() + &one.key().serialize_pem())], ca_file, "holds a private key"),
        (vec![(list_file, list.clone())], list_file, "no certificate of a CA of this name"),
        (vec![(ca_file, one.pem()), (list_file, list)], list_file, "no revocation list of an authority"),
        (vec![(ca_file, one.pem()), (list_file, "garbage".to_owned())], list_file, "BEGIN X509 CRL"),
        (vec![("organisations/acme/client-ca/pki.der", "x".to_owned())], "client-ca/pki.der", "does not belong here"),
        (vec![("organisations/acme/client-ca/README", "x".to_owned())], "client-ca", "no certificate of a CA in it"),
        (vec![("organisations/acme/principals/ci/client-ca/x.pem", one.pem())], "ci/client-ca", "does not belong here"),
        (vec![(agent, "certificate_names = [\"*.example\"]".to_owned())], agent, "neither a pattern"),
        (vec![(agent, "certificate_names = [\"caponier://acme/agents/x\"]".to_owned())], agent, "nor a URI"),
        (vec![(agent, "certificate_names = [\" a\"]".to_owned())], agent, "a DNS name or a common name"),
        (
            vec![
                (agent, "certificate_names = [\"a.example\"]".to_owned()),
                (
                    "organisations/acme/principals/ci.toml",
                    "agents = []\ncertificate_names = [\"A.example\"]".to_owned(),
                ),
            ],
            "principals/ci.toml",
            "a name has one holder",
        ),
    ] {
        let (tree, _) = Tree::good();
        for (file, text) in files {
            tree.write(file, &text);
        }
        let faults = tree.load().expect_err(problem).to_string();
        assert!(faults.contains(at) && faults.contains(problem), "{problem} at {at}: {faults}");
    }
    // Where each agent has its own, the organisation needs none.
    let (tree, _) = Tree::good();
    tree.write(about, "client_auth = \"strict\"");
    tree.write("organisations/acme/agents/prod-eu/client-ca/own.pem", &one.pem());
    assert!(tree.load().is_ok());
}

#[test]
fn keys_that_sign_tokens_say_for_whom_and_are_nothing_else() {
    let (tree, agent) = Tree::good();
    let key = tree.key("organisations/acme/token-keys/ci.pub");
    tree.write(
        "organisations/acme/token-keys/ci.toml",
        "principals = [\"ci\", \"build-*\"]\nrevoked_tokens = [\"one\", \"two\"]\nexpires = 2027-01-01T00:00:00Z\n",
    );
    tree.write("organisations/acme/principals/ci.toml", "agents = [\"prod-*\"]\nrevoked_tokens = [\"three\"]\n");
    let snapshot = tree.load().expect("in good order");
    let acme = &snapshot.organisations()[&"acme".parse().expect("an id")];
    let [token_key] = &acme.token_keys[..] else { panic!("{:?}", acme.token_keys) };
    assert_eq!((&token_key.registered.key, token_key.revoked_tokens.len()), (&key, 2));
    assert!(token_key.registered.expires.is_some());
    assert_eq!(acme.principals[&"ci".parse().expect("an id")].revoked_tokens.len(), 1);

    let rsa = "ssh-keygen -q -t ecdsa -N '' -f key && cat key.pub";
    let other = std::process::Command::new("sh").args(["-c", rsa]).current_dir(tree.path("")).output();
    let other = String::from_utf8(other.expect("ssh-keygen runs").stdout).expect("text");
    let agent = agent.to_openssh();
    for (pub_key, toml, problem) in [
        (None, None, "for which principals this key may sign"),
        (None, Some(""), "principals"),
        (None, Some("principals = []"), "principals"),
        (None, Some("principals = [\"CI\"]"), "patterns"),
        (None, Some("principals = [\"ci\"]\nrevoked_tokens = [\"a b\"]"), "a token's id"),
        (None, Some("principals = [\"ci\"]\nrevoked_tokens = \"one\""), "a list is wanted"),
        (None, Some("principals = [\"ci\"]\nagents = [\"*\"]"), "agents"),
        (Some(&other), Some("principals = [\"ci\"]"), "Ed25519"),
        (Some(&agent), Some("principals = [\"ci\"]"), "a key has one holder"),
    ] {
        let (tree, _) = Tree::good();
        match pub_key {
            Some(text) => {
                tree.write("organisations/acme/token-keys/ci.pub", text);
                tree.write("organisations/acme/agents/prod-eu/two.pub", &agent);
            }
            None => drop(tree.key("organisations/acme/token-keys/ci.pub")),
        }
        toml.inspect(|toml| tree.write("organisations/acme/token-keys/ci.toml", toml));
        let faults = tree.load().expect_err(problem).to_string();
        assert!(faults.contains(problem), "{problem}: {faults}");
    }
}
