//! Tests of the module above.

use super::*;
use crate::limits::FAULTS_MAX;
use crate::target::Target;
use proptest::prelude::*;

fn parse(text: &str) -> Document {
    Document::parse(Path::new("agent.toml"), text).expect("TOML")
}

fn variables(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn lines(faults: &Faults) -> Vec<String> {
    faults.to_string().lines().map(str::to_owned).collect()
}

#[test]
fn reports_every_fault_with_its_line() {
    let document = parse(
        "[agent]\n\
             id = \"A B\"\n\
             hots_key = \"x\"\n\
             wholly-other = 1\n\
             port = 70000\n\
             alive = \"yes\"\n\
             when = 2027-01-31T00:00:00\n\
             \n\
             [[organisation]]\n\
             id = \"acme\"\n\
             [[organisation.allow]]\n\
             targets = [\n\
             \"db:5432\",\n\
             \"db\",\n\
             1,\n\
             ]\n\
             [[organisation.allow]]\n\
             targets = []\n\
             [strange]\n\
             inner = 1\n",
    );
    let root = document.root();
    let agent = root.required_table("agent").expect("agent");
    assert!(agent.required("id").and_then(|item| item.parse::<crate::identity::AgentId>()).is_none());
    assert!(agent.required("host_key").is_none());
    assert!(agent.optional("port").and_then(|item| item.integer::<u16>(1..=65_535)).is_none());
    assert!(agent.optional("alive").and_then(|item| item.boolean()).is_none());
    assert!(agent.optional("when").and_then(|item| item.timestamp()).is_none());
    for organisation in root.tables("organisation") {
        assert_eq!(organisation.required("id").and_then(|item| item.string()), Some("acme"));
        for rule in organisation.tables("allow") {
            let targets = rule.required("targets").and_then(|item| item.list(Item::parse::<Target>));
            assert!(targets.is_none());
        }
    }
    let faults = document.finish(Some(())).expect_err("faults");
    assert_eq!(
        lines(&faults),
        [
            "agent.toml:1: agent.host_key: this key is missing",
            "agent.toml:2: agent.id: agent ids are 1 to 63 of a-z, 0-9 and '-', and begin and end with a letter or \
                 digit",
            "agent.toml:3: agent.hots_key: unknown key: did you mean host_key?",
            "agent.toml:4: agent.wholly-other: unknown key: accepted here are alive, host_key, id, port, when",
            "agent.toml:5: agent.port: a whole number from 1 to 65535 is wanted",
            "agent.toml:6: agent.alive: true or false is wanted, and this is a string",
            "agent.toml:7: agent.when: a date and time with an offset from UTC is wanted, such as \
                 2027-01-31T12:00:00Z",
            "agent.toml:14: organisation[0].allow[0].targets[1]: the port is not a number from 1 to 65535",
            "agent.toml:15: organisation[0].allow[0].targets[2]: a string is wanted, and this is a whole number",
            "agent.toml:18: organisation[0].allow[1].targets: at least one element is wanted",
            "agent.toml:19: strange: unknown key: accepted here are agent, organisation",
        ]
    );
}

#[test]
fn reports_every_syntax_error() {
    let text = "[agent]\nid = \nkey = \"a\"\nkey = \"b\"\n[agent]\n= 1\n";
    let faults = Document::parse(Path::new("a.toml"), text).expect_err("faults");
    let found: Vec<_> = faults.iter().map(|fault| fault.line).collect();
    for line in [2, 4, 5, 6] {
        assert!(found.contains(&Some(line)), "{line}: {faults}");
    }
    assert!(faults.to_string().contains("a.toml:4: not TOML: duplicate key"), "{faults}");
}

#[test]
fn a_wrong_type_is_said_once() {
    let document = parse("agent = 1\norganisation = { id = \"x\" }\n[log.format]\nstrange = 1\n");
    let root = document.root();
    assert!(root.required_table("agent").is_none());
    assert!(root.tables("organisation").is_empty());
    let log = root.required_table("log").expect("log");
    assert!(log.optional("format").and_then(|item| item.string()).is_none());
    assert_eq!(
        lines(&document.finish(Some(())).expect_err("faults")),
        [
            "agent.toml:1: agent: a table is wanted, and this is a whole number",
            "agent.toml:2: organisation: a list of tables is wanted: write [[organisation]]",
            "agent.toml:3: log.format: a string is wanted, and this is a table",
        ]
    );
}

#[test]
fn gives_the_value_back_if_all_is_well() {
    let document = parse(
        "key = \"k.pem\"\nwhen = 2027-01-31T12:00:00+01:00\nbig = 0xff\nformat = \"json\"\non = true\nlist = [1, 2]\n",
    );
    let root = document.root();
    assert_eq!(root.required("key").and_then(|item| item.path()), Some("k.pem".into()));
    let when = root.required("when").and_then(|item| item.timestamp()).map(|when| when.to_string());
    assert_eq!(when.as_deref(), Some("2027-01-31T11:00:00Z"));
    assert_eq!(root.required("big").and_then(|item| item.integer::<u8>(0..=255)), Some(255));
    assert_eq!(root.required("format").and_then(|item| item.choice(&[("text", 1), ("json", 2)])), Some(2));
    assert_eq!(root.required("on").and_then(|item| item.boolean()), Some(true));
    let list = root.required("list").and_then(|item| item.list(|item| item.integer::<u8>(0..=9)));
    assert_eq!(list, Some(vec![1, 2]));
    assert!(root.optional("absent").is_none());
    assert_eq!(document.finish(Some(7)), Ok(7));
}

#[test]
fn paths_start_at_the_file() {
    let document = Document::parse(Path::new("/etc/caponier/agent.toml"), "a = \"k\"\nb = \"/k\"").expect("TOML");
    assert_eq!(document.root().required("a").and_then(|item| item.path()), Some("/etc/caponier/k".into()));
    assert_eq!(document.root().required("b").and_then(|item| item.path()), Some("/k".into()));
}

#[test]
fn nothing_made_and_nothing_wrong_is_still_no_success() {
    assert!(parse("").finish(None::<()>).is_err());
}

#[test]
fn the_environment_takes_precedence() {
    let mut document = parse("[agent]\nid = \"file\"\nport = 1\n[[organisation]]\nid = \"a\"\n");
    document.overlay_environment(
        "CAPONIER",
        variables(&[
            ("CAPONIER_AGENT__ID", "variable"),
            ("CAPONIER_AGENT__PORT", "2"),
            ("CAPONIER_AGENT__ON", "true"),
            ("CAPONIER_ORGANISATION__0__ID", "b"),
            ("CAPONIER_ORGANISATION__1__ID", "c"),
            ("CAPONIER_AGENT__LISTEN__0", "x"),
            ("CAPONIER_AGENT__LISTEN__1", "y"),
            ("CAPONIER_NEW__KEY", "z"),
            ("CAPONIER_SERVICE_HOST", "10.0.0.1"),
            ("OTHER_AGENT__ID", "other"),
        ]),
    );
    document.overlay("agent", "proxy", "AGENT_PROXY", "http://proxy:3128".to_owned());
    let root = document.root();
    let agent = root.required_table("agent").expect("agent");
    assert_eq!(agent.required("id").and_then(|item| item.string()), Some("variable"));
    assert_eq!(agent.required("port").and_then(|item| item.integer::<u16>(1..=9)), Some(2));
    assert_eq!(agent.required("on").and_then(|item| item.boolean()), Some(true));
    assert_eq!(agent.required("proxy").and_then(|item| item.string()), Some("http://proxy:3128"));
    let listen = agent.required("listen").and_then(|item| item.list(Item::string));
    assert_eq!(listen, Some(vec!["x", "y"]));
    let ids: Vec<_> = root.tables("organisation").iter().filter_map(|table| table.required("id")?.string()).collect();
    assert_eq!(ids, ["b", "c"]);
    let new = root.required_table("new").and_then(|table| table.required("key")?.string());
    assert_eq!(new, Some("z"));
    assert_eq!(document.finish(Some(())), Ok(()));
}

#[test]
fn faults_of_the_environment_name_the_variable() {
    let mut document = parse("[agent]\nid = \"file\"\nports = [1]\n");
    document.overlay_environment(
        "CAPONIER",
        variables(&[
            ("CAPONIER_AGENT__ID", "Not An Id"),
            ("CAPONIER_AGENT__HOTS_KEY", "hunter2"),
            ("CAPONIER_AGENT__PORTS", "1,2"),
            ("CAPONIER_AGENT__LIST", "1,2"),
            ("CAPONIER_AGENT__PORTS__5", "1"),
            ("CAPONIER_AGENT__ID__X", "1"),
            ("CAPONIER_AGENT__PORT", "many"),
            ("CAPONIER_AGENT_HOST_KEY", "key"),
            ("CAPONIER_WRONG__KEY", "1"),
        ]),
    );
    let root = document.root();
    let agent = root.required_table("agent").expect("agent");
    assert!(agent.required("id").and_then(|item| item.parse::<crate::identity::AgentId>()).is_none());
    assert!(agent.optional("host_key").is_none());
    assert!(agent.optional("ports").is_some());
    assert!(agent.optional("list").and_then(|item| item.list(Item::string)).is_none());
    assert!(agent.optional("port").and_then(|item| item.integer::<u16>(1..=65_535)).is_none());
    let faults = document.finish(Some(())).expect_err("faults").to_string();
    for expected in [
        "agent.toml: agent.id (set by CAPONIER_AGENT__ID): agent ids are",
        "agent.toml: agent.hots_key (set by CAPONIER_AGENT__HOTS_KEY): unknown key: did you mean host_key?",
        "agent.toml: agent.ports (set by CAPONIER_AGENT__PORTS): only single values",
        "agent.toml: agent.list (set by CAPONIER_AGENT__LIST): a list is wanted: set its elements as \
             CAPONIER_AGENT__LIST__0",
        "agent.toml: agent.ports[5] (set by CAPONIER_AGENT__PORTS__5): this variable names an element, but",
        "agent.toml: agent.id.x (set by CAPONIER_AGENT__ID__X): this variable names a key where there is no table",
        "agent.toml: agent.port (set by CAPONIER_AGENT__PORT): a whole number from 1 to 65535 is wanted",
        "agent.toml: agent.host_key (set by CAPONIER_AGENT_HOST_KEY): this variable sets nothing: write \
             CAPONIER_AGENT__HOST_KEY",
        "agent.toml: wrong (set by CAPONIER_WRONG__KEY): unknown key",
    ] {
        assert!(faults.contains(expected), "{expected}\n---\n{faults}");
    }
    assert!(!faults.contains("hunter2"));
}

#[test]
fn values_are_not_shown() {
    let document = parse("password = \"hunter2\"\n");
    let root = document.root();
    let item = root.required("password").expect("password");
    assert!(!format!("{document:?} {root:?} {item:?} {:?}", item.secret()).contains("hunter2"));
    assert!(item.parse::<Target>().is_none());
    assert!(item.boolean().is_none());
    assert!(item.choice(&[("a", ())]).is_none());
    assert!(!document.finish(Some(())).expect_err("faults").to_string().contains("hunter2"));
}

#[test]
fn files_that_cannot_be_read() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let at = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).expect("write");
        path
    };
    let too_long = vec![b'\n'; usize::try_from(FILE_MAX).expect("fits") + 1];
    for (path, expected) in [
        (dir.path().join("absent.toml"), "absent.toml: cannot be read: "),
        (dir.path().to_owned(), "not a regular file"),
        (at("binary.toml", b"a = 1\nb = \"\xff\"\n"), "binary.toml:2: not UTF-8 text"),
        (at("long.toml", &too_long), "longer than 1048576 bytes"),
    ] {
        let faults = Document::read(&path).expect_err("faults").to_string();
        assert!(faults.contains(expected), "{faults}");
    }
}

#[test]
fn control_characters_cannot_forge_a_line() {
    let document = Document::parse(Path::new("a\nb.toml"), "\"x\\u001b\\ny\" = 1").expect("TOML");
    let _ = document.root();
    let faults = document.finish(Some(())).expect_err("faults").to_string();
    assert!(!faults.contains(['\n', '\u{1b}']), "{faults:?}");
}

#[test]
fn faults_are_bounded() {
    let document = parse(&(0..1000).map(|n| format!("k{n} = 1\n")).collect::<String>());
    let _ = document.root();
    let faults = document.finish(Some(())).expect_err("faults");
    assert_eq!(faults.iter().count(), FAULTS_MAX);
    assert!(faults.to_string().ends_with(&format!("and {} more", 1000 - FAULTS_MAX)));
}

proptest! {
    #[test]
    fn never_panics(text in "[\\[\\]a-c=.\"'{}, 0-2\n#]{0,60}") {
        if let Ok(document) = Document::parse(Path::new("x.toml"), &text) {
            let root = document.root();
            let _ = root.tables("a");
            let _ = root.optional("b").and_then(|item| item.integer::<u8>(0..=1));
            let _ = document.finish(Some(()));
        }
    }
}

#[test]
fn two_variables_for_one_key_are_a_fault_whatever_their_order() {
    for list in [
        [("CAPONIER_ORG__0__ID", "a"), ("CAPONIER_ORG__00__ID", "b")],
        [("CAPONIER_ORG__00__ID", "b"), ("CAPONIER_ORG__0__ID", "a")],
        [("CAPONIER_ORG__0__ID", "a"), ("CAPONIER_Org__0__Id", "a")],
    ] {
        let mut document = parse("[[org]]\n");
        document.overlay_environment("CAPONIER", variables(&list));
        let _ = document.root().tables("org")[0].required("id");
        let faults = document.finish(Some(())).expect_err("faults").to_string();
        assert_eq!(
            faults,
            format!("agent.toml: org[0].id (set by {}): {} sets the same: keep one of the two", list[1].0, list[0].0)
        );
    }
}

#[test]
fn a_name_in_a_fault_forges_no_line() {
    let fault = Faults::file(Path::new("a\nb"), "the same as c\nd\u{1b}[2J");
    assert_eq!(fault.to_string(), "a\\nb: the same as c\\nd\\u{1b}[2J");
}
