//! Tests of the module above.

use super::*;
use crate::provision::{Instance, Role, Tls};

fn name(text: &str) -> Identifier {
    Identifier::new(text).expect(text)
}

fn resources() -> Resources {
    Resources {
        id: "acme/prod-eu".parse().expect("id"),
        instance: Instance {
            target: "db:5432".parse().expect("target"),
            database: name("postgres"),
            user: name("admin"),
            password: None,
            login_suffix: None,
            tls: Tls::Disable,
        },
        databases: vec![Database {
            name: name("orders"),
            owner: name("orders"),
            template: None,
            encoding: None,
            connection_limit: None,
            extensions: Vec::new(),
            grants: Vec::new(),
        }],
        roles: Vec::new(),
        output: Output::File("out.json".into()),
    }
}

/// An empty instance, seen by a superuser, or by a plain administrator with all that one needs.
fn empty(version: u32, superuser: bool) -> Observed {
    Observed {
        version,
        admin: Admin { name: name("admin"), superuser, createrole: true, createdb: true, inherit: true },
        roles: BTreeMap::new(),
        databases: BTreeMap::new(),
        kept: BTreeMap::new(),
    }
}

fn role(comment: Option<&str>) -> FoundRole {
    FoundRole {
        comment: comment.map(str::to_owned),
        can_login: true,
        usable: true,
        member_of: BTreeSet::new(),
        login: LoginTrial::Untried,
    }
}

/// What is there after a complete run.
fn complete(version: u32) -> Observed {
    let mut observed = empty(version, false);
    observed.roles.insert(name("orders"), role(Some(DELIVERED)));
    observed.databases.insert(
        name("orders"),
        FoundDatabase {
            owner: "orders".into(),
            encoding: "UTF8".into(),
            connection_limit: -1,
            open: true,
            acl: Acl::new(),
            inside: Some(Inside::default()),
        },
    );
    observed.kept.insert(name("orders"), Kept { password: true, ..Kept::default() });
    observed
}

fn steps(plan: &Plan) -> Vec<String> {
    assert_eq!(plan.conflicts, Vec::<String>::new());
    plan.steps().map(Step::to_string).collect()
}

const DELIVERED: &str = "caponier: managed by acme/prod-eu, password delivered";
const PENDING: &str = "caponier: managed by acme/prod-eu, password pending";

#[test]
fn an_empty_instance_gets_everything_in_an_order_that_can_be_interrupted() {
    let first =
        ["CREATE ROLE \"orders\" LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE; COMMENT ON ROLE \"orders\" IS 'caponier: \
             managed by acme/prod-eu, password pending';"];
    let last = [
        "CREATE DATABASE \"orders\" OWNER \"orders\" ALLOW_CONNECTIONS false;",
        "REVOKE CONNECT, TEMPORARY ON DATABASE \"orders\" FROM PUBLIC;",
        "ALTER DATABASE \"orders\" ALLOW_CONNECTIONS true;",
        "make a password for \"orders\", and keep it",
        "ALTER ROLE \"orders\" PASSWORD '(hidden)'; COMMENT ON ROLE \"orders\" IS 'caponier: managed by \
             acme/prod-eu, password delivered';",
    ];
    // PostgreSQL 16 gives whoever makes a role neither its rights nor the right to give things to it.
    for (version, superuser, grant) in [
        (130_000, true, None),
        (160_000, true, None),
        (130_023, false, Some("GRANT \"orders\" TO \"admin\";")),
        (159_999, false, Some("GRANT \"orders\" TO \"admin\";")),
        (160_000, false, Some("GRANT \"orders\" TO \"admin\" WITH INHERIT TRUE, SET TRUE;")),
        (180_001, false, Some("GRANT \"orders\" TO \"admin\" WITH INHERIT TRUE, SET TRUE;")),
    ] {
        let expected: Vec<_> = first.into_iter().chain(grant).chain(last).collect();
        assert_eq!(steps(&plan(&resources(), &empty(version, superuser), false)), expected, "{version} {superuser}");
    }
}

#[test]
fn a_complete_instance_needs_nothing() {
    let plan = plan(&resources(), &complete(150_000), false);
    assert!(plan.is_empty() && plan.steps().next().is_none(), "{plan}");
    assert_eq!(plan.to_string(), "nothing to do\n");
    assert_eq!(plan.to_json(), json!({ "conflicts": [], "steps": [] }));
}

type Change = fn(&mut Resources, &mut Observed);

#[test]
fn what_is_in_the_way_stops_everything() {
    let cases: &[(&str, Change)] = &[
        ("12.9; 13 is the oldest", |_, observed| observed.version = 120_009),
        ("was not made by caponier", |_, o| o.roles.values_mut().for_each(|it| it.comment = None)),
        ("was not made by caponier", |_, o| {
            o.roles.values_mut().for_each(|it| it.comment = Some(format!("{DELIVERED} ")));
        }),
        ("another set of resources", |_, o| {
            o.roles.values_mut().for_each(|it| it.comment = Some(DELIVERED.replace("prod-eu", "prod-e")));
        }),
        ("took the role \"orders\" its login", |_, o| o.roles.values_mut().for_each(|it| it.can_login = false)),
        ("belongs to the role \"other\"", |_, o| {
            o.databases.values_mut().for_each(|it| it.owner = "other".into());
        }),
        ("belongs to the role", |_, o| o.roles.clear()),
        ("half dropped", |_, o| o.databases.values_mut().for_each(|it| it.connection_limit = -2)),
        ("has the encoding UTF8, not LATIN1", |r, _| r.databases[0].encoding = Some("LATIN1".into())),
        ("--rotate", |_, o| o.kept.clear()),
        ("may not make roles", |_, o| o.admin.createrole = false),
        ("may not make databases", |_, o| {
            o.admin.createdb = false;
            o.databases.clear();
        }),
        ("is NOINHERIT", |_, o| o.admin.inherit = false),
        ("the template \"seed\"", |r, o| {
            r.databases[0].template = Some(name("seed"));
            o.databases.clear();
        }),
        ("\"nobody\" does not exist", |r, _| {
            let to = Grantee::Role(name("nobody"));
            r.databases[0].grants = vec![Grant { to, schema: None, privileges: vec![Privilege::Connect] }];
        }),
        ("\"nobody\" does not exist", |r, _| {
            r.roles = vec![Role { name: name("reader"), member_of: vec![name("nobody")] }];
        }),
        ("is in the schema \"public\", not in \"ext\"", |r, o| {
            r.databases[0].extensions =
                vec![Extension { name: name("citext"), schema: Some(name("ext")), version: None }];
            let inside = Inside {
                extensions: [("citext".to_owned(), ("public".to_owned(), "1.6".to_owned()))].into(),
                schemas: [("ext".to_owned(), Acl::new())].into(),
            };
            o.databases.values_mut().for_each(|it| it.inside = Some(inside.clone()));
        }),
        ("it is also the administrator", |r, _| r.instance.user = name("orders")),
        ("there is nothing to do", |r, _| r.databases.clear()),
    ];
    for (said, change) in cases {
        let (mut resources, mut observed) = (resources(), complete(150_000));
        change(&mut resources, &mut observed);
        let plan = plan(&resources, &observed, false);
        assert!(!plan.is_empty());
        assert!(plan.conflicts.iter().any(|conflict| conflict.contains(said)), "{said}: {:?}", plan.conflicts);
    }
}

#[test]
fn repairs_only_what_differs() {
    let cases: &[(&[&str], Change)] = &[
        (&["ALTER DATABASE \"orders\" CONNECTION LIMIT 5;"], |r, _| r.databases[0].connection_limit = Some(5)),
        (&[], |r, _| r.databases[0].connection_limit = Some(-1)),
        (&[], |r, _| r.databases[0].encoding = Some("utf-8".into())),
        (&["ALTER DATABASE \"orders\" ALLOW_CONNECTIONS true;"], |_, o| {
            o.databases.values_mut().for_each(|it| it.open = false);
        }),
        (&["REVOKE CONNECT ON DATABASE \"orders\" FROM PUBLIC;"], |_, o| {
            o.databases.values_mut().for_each(|it| it.acl = [(None, "CONNECT".to_owned())].into());
        }),
        (&["GRANT CONNECT ON DATABASE \"orders\" TO PUBLIC;"], |r, _| {
            let privileges = vec![Privilege::Connect];
            r.databases[0].grants = vec![Grant { to: Grantee::Public, schema: None, privileges }];
        }),
        (
            &[
                "in \"orders\": CREATE SCHEMA IF NOT EXISTS \"app\" AUTHORIZATION \"orders\";",
                "in \"orders\": SET LOCAL search_path = public; CREATE EXTENSION IF NOT EXISTS \"citext\" VERSION '1.6';",
                "in \"orders\": CREATE EXTENSION IF NOT EXISTS \"pgcrypto\" SCHEMA \"app\";",
                "in \"orders\": GRANT USAGE, CREATE ON SCHEMA \"app\" TO \"orders\";",
            ],
            |r, _| {
                r.databases[0].extensions = vec![
                    Extension { name: name("citext"), schema: None, version: Some("1.6".into()) },
                    Extension { name: name("pgcrypto"), schema: Some(name("app")), version: None },
                ];
                let to = Grantee::Role(name("orders"));
                let privileges = vec![Privilege::Usage, Privilege::Create];
                r.databases[0].grants = vec![Grant { to, schema: Some(name("app")), privileges }];
            },
        ),
        (&["in \"orders\": ALTER EXTENSION \"citext\" UPDATE TO '1.6';"], |r, o| {
            r.databases[0].extensions =
                vec![Extension { name: name("citext"), schema: None, version: Some("1.6".into()) }];
            let extensions = [("citext".to_owned(), ("public".to_owned(), "1.5".to_owned()))].into();
            let inside = Inside { extensions, ..Inside::default() };
            o.databases.values_mut().for_each(|it| it.inside = Some(inside.clone()));
        }),
        (&["GRANT \"pg_monitor\" TO \"reader\";"], |r, o| {
            r.roles = vec![Role { name: name("reader"), member_of: vec![name("pg_monitor")] }];
            o.roles.insert(name("pg_monitor"), role(None));
            o.roles.insert(name("reader"), role(Some(DELIVERED)));
            o.kept.insert(name("reader"), Kept { password: true, ..Kept::default() });
        }),
        (&["GRANT \"orders\" TO \"admin\";"], |_, o| o.roles.values_mut().for_each(|it| it.usable = false)),
        (&["ALTER ROLE \"orders\" PASSWORD '(hidden)';"], |_, o| {
            o.roles.values_mut().for_each(|it| it.login = LoginTrial::Wrong);
        }),
        (&[], |_, o| o.roles.values_mut().for_each(|it| it.login = LoginTrial::Barred)),
        (&["write the output file, of which something is missing"], |_, o| {
            o.kept.values_mut().for_each(|it| it.incomplete = true);
        }),
    ];
    for (expected, change) in cases {
        let (mut resources, mut observed) = (resources(), complete(150_000));
        change(&mut resources, &mut observed);
        assert_eq!(steps(&plan(&resources, &observed, false)), *expected);
    }
}

#[test]
fn passwords_follow_what_was_handed_over() {
    let mark = "COMMENT ON ROLE \"orders\" IS 'caponier: managed by acme/prod-eu, password delivered';";
    let set = "ALTER ROLE \"orders\" PASSWORD '(hidden)';";
    let set_and_mark = format!("{set} {mark}");
    let make = "make a password for \"orders\", and keep it";
    let make_next = "make a new password beside the old one for \"orders\", and keep it";
    let promote = "replace the old password of \"orders\" by the new one in the output file";
    let none = Kept::default();
    let password = Kept { password: true, ..none };
    let both = Kept { next: true, ..password };
    for (comment, kept, rotate, expected) in [
        (PENDING, none, false, vec![make, &set_and_mark]),
        (PENDING, none, true, vec![make, &set_and_mark]),
        (PENDING, password, false, vec![&*set_and_mark]),
        (PENDING, password, true, vec![make_next, &set_and_mark, promote]),
        (PENDING, both, false, vec![&set_and_mark, promote]),
        (DELIVERED, password, false, vec![]),
        (DELIVERED, password, true, vec![make_next, set, promote]),
        (DELIVERED, both, false, vec![set, promote]),
        (DELIVERED, both, true, vec![set, promote]),
        (DELIVERED, none, true, vec![make_next, set, promote]),
    ] {
        let mut observed = complete(150_000);
        observed.roles.insert(name("orders"), role(Some(comment)));
        observed.kept.insert(name("orders"), kept);
        assert_eq!(steps(&plan(&resources(), &observed, rotate)), expected, "{comment} {kept:?} {rotate}");
    }

    let printed = Resources { output: Output::Stdout, ..resources() };
    let unmark = "COMMENT ON ROLE \"orders\" IS 'caponier: managed by acme/prod-eu, password pending';";
    let print = "print the credentials";
    for (comment, rotate, expected) in [
        (PENDING, false, vec![make, set, print, mark]),
        (PENDING, true, vec![make, set, print, mark]),
        (DELIVERED, false, vec![print]),
        (DELIVERED, true, vec![unmark, make, set, print, mark]),
    ] {
        let mut observed = complete(150_000);
        observed.roles.insert(name("orders"), role(Some(comment)));
        assert_eq!(steps(&plan(&printed, &observed, rotate)), expected, "{comment} {rotate}");
    }
}

#[test]
fn destroys_what_is_ours_and_nothing_else() {
    let drop = ["DROP DATABASE IF EXISTS \"orders\" WITH (FORCE);", "DROP ROLE IF EXISTS \"orders\";"];
    let forget = "remove the entries from the output file";
    let all = [drop[0], drop[1], forget];
    assert_eq!(steps(&plan_destroy(&resources(), &complete(150_000))), all);
    assert_eq!(steps(&plan_destroy(&resources(), &empty(150_000, false))), Vec::<String>::new());
    let mut unusable = complete(160_000);
    unusable.roles.values_mut().for_each(|it| it.usable = false);
    let grant = "GRANT \"orders\" TO \"admin\" WITH INHERIT TRUE, SET TRUE;";
    assert_eq!(steps(&plan_destroy(&resources(), &unusable)), [grant, drop[0], drop[1], forget]);
    let mut half = complete(150_000);
    half.databases.clear();
    half.kept.clear();
    assert_eq!(steps(&plan_destroy(&resources(), &half)), [drop[1]]);

    let cases: &[(&str, Change)] = &[
        ("was not made by caponier", |_, o| o.roles.values_mut().for_each(|it| it.comment = None)),
        ("another set of resources", |r, _| r.id = "other".parse().expect("id")),
        ("belongs to the role \"other\"", |_, o| {
            o.databases.values_mut().for_each(|it| it.owner = "other".into());
        }),
        ("belongs to the role", |r, _| r.databases[0].owner = name("new-owner")),
    ];
    for (said, change) in cases {
        let (mut resources, mut observed) = (resources(), complete(150_000));
        change(&mut resources, &mut observed);
        let plan = plan_destroy(&resources, &observed);
        assert!(plan.conflicts.iter().any(|conflict| conflict.contains(said)), "{said}: {:?}", plan.conflicts);
    }
}

#[test]
fn marks_are_read_strictly() {
    assert_eq!(mark(Some(DELIVERED)), Some(("acme/prod-eu", Password::Delivered)));
    assert_eq!(mark(Some(PENDING)), Some(("acme/prod-eu", Password::Pending)));
    for text in
        ["", "caponier", "caponier: managed by x", "caponier: managed by x, password lost", "x, password pending"]
    {
        assert_eq!(mark(Some(text)), None, "{text}");
    }
    assert_eq!(mark(None), None);
}
