//! What each kind of record becomes, and that none is forgotten.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::*;

fn mapped(record: &Value) -> Value {
    let event = event(record);
    for required in ["time", "metadata", "category_uid", "class_uid", "activity_id", "type_uid", "severity_id"] {
        assert!(event.get(required).is_some(), "{required} is missing: {event}");
    }
    assert_eq!(event["metadata"]["version"], VERSION);
    let (class, activity) = (event["class_uid"].as_u64(), event["activity_id"].as_u64());
    assert_eq!(event["type_uid"].as_u64(), class.zip(activity).map(|(class, activity)| class * 100 + activity));
    assert_eq!(event["category_uid"].as_u64(), class.map(|class| class / 1000));
    event
}

#[test]
fn a_forward_is_a_connection() {
    let event = mapped(&json!({
        "v": 1, "time": "2026-11-21T20:00:00.123Z", "event": "forward.ended", "side": "agent", "forward": "f-1",
        "peer_forward": "g-1", "organisation": "acme", "agent": "prod-eu", "replica": "a", "principal": "ci",
        "asserted_by": "SHA256:gw", "key": "SHA256:k", "client": "192.0.2.1:50000", "door": "ssh",
        "target": "orders.db.internal:5432", "rule": "orders-db", "resolved": ["10.20.0.7"], "dialled": "10.20.0.7:5432",
        "to_target": 10, "from_target": 32, "duration_ms": 1500, "reason": "closed", "seq": 7, "prev": "x"
    }));
    assert_eq!(event["class_uid"], 4001);
    assert_eq!(event["activity_name"], "Close");
    assert_eq!(event["time"], 1_795_291_200_123_u64);
    assert_eq!(event["src_endpoint"], json!({"ip": "192.0.2.1", "port": 50000}));
    assert_eq!(event["dst_endpoint"], json!({"hostname": "orders.db.internal", "ip": "10.20.0.7", "port": 5432}));
    assert_eq!(event["traffic"], json!({"bytes_out": 10, "bytes_in": 32, "bytes": 42}));
    assert_eq!(event["proxy_endpoint"], json!({"name": "acme/prod-eu", "instance_uid": "a"}));
    assert_eq!(event["firewall_rule"]["name"], "orders-db");
    assert_eq!(event["action"], "Allowed");
    assert_eq!(event["duration"], 1500);
    assert_eq!(event["status_code"], "closed");
    let user = json!({"name": "ci", "type_id": 1, "org": {"name": "acme"}, "credential_uid": "SHA256:k"});
    assert_eq!(event["actor"]["user"], user);
    assert_eq!(event["metadata"]["sequence"], 7);
    assert_eq!(event["metadata"]["correlation_uid"], "f-1");
    let unmapped = json!({"peer_forward": "g-1", "asserted_by": "SHA256:gw", "door": "ssh", "resolved": ["10.20.0.7"], "prev": "x"});
    assert_eq!(event["unmapped"], unmapped);
}

#[test]
fn a_denial_is_a_refusal() {
    let time = "2026-11-21T20:00:00.123Z";
    let event =
        mapped(&json!({"time": time, "event": "forward.denied", "target": "[fd00::1]:22", "reason": "no_rule"}));
    assert_eq!((event["activity_name"].as_str(), event["action"].as_str()), (Some("Refuse"), Some("Denied")));
    assert_eq!((event["status"].as_str(), event["status_code"].as_str()), (Some("Failure"), Some("no_rule")));
    assert_eq!(event["dst_endpoint"], json!({"ip": "fd00::1", "port": 22}));
    assert!(event.get("actor").is_none(), "{event}");
}

#[test]
fn who_was_let_in_is_a_user() {
    let time = "2026-11-21T20:00:00.123Z";
    let event =
        mapped(&json!({"time": time, "event": "auth.accepted", "organisation": "acme", "agent": "prod", "key": "k"}));
    assert_eq!(event["class_uid"], 3002);
    let user = json!({"name": "prod", "type_id": 3, "org": {"name": "acme"}, "credential_uid": "k"});
    assert_eq!(event["user"], user);
    let more = mapped(&json!({"time": time, "event": "auth.refused_more", "counts": {"a": 3, "b": 4}}));
    assert_eq!((more["count"].as_u64(), more["status"].as_str()), (Some(7), Some("Failure")));
    assert_eq!(more["unmapped"], json!({"counts": {"a": 3, "b": 4}}));
    assert_eq!(more["user"]["name"], "unknown");
}

#[test]
fn what_changed_stays_readable() {
    let time = "2026-11-21T20:00:00.123Z";
    let changes = json!({"added": ["agent acme/prod"]});
    let event = mapped(&json!({"time": time, "event": "registry.reloaded", "changes": changes}));
    assert_eq!((event["class_uid"].as_u64(), event["entity"]["type"].as_str()), (Some(3004), Some("registry")));
    assert_eq!(event["unmapped"]["changes"], changes);
}

/// Every field of a record turns up somewhere, whatever the event, and whatever is in it.
#[test]
fn nothing_is_left_out() {
    const NAMES: [&str; 22] = [
        "forward",
        "peer_forward",
        "organisation",
        "agent",
        "replica",
        "principal",
        "asserted_by",
        "key",
        "ca",
        "serial",
        "key_id",
        "client",
        "door",
        "target",
        "rule",
        "dialled",
        "reason",
        "detail",
        "transport",
        "token",
        "something",
        "prev",
    ];
    for kind in kinds() {
        let mut record = json!({"time": "2026-11-21T20:00:00.123Z", "event": kind, "side": "agent"});
        for name in NAMES {
            record[name] = json!(format!("<{name}>"));
        }
        let text = mapped(&record).to_string();
        for name in NAMES {
            assert!(text.contains(&format!("<{name}>")), "{kind}: {name} is left out: {text}");
        }
    }
}

#[test]
fn what_is_no_record_is_still_an_event() {
    for value in [json!(null), json!([1]), json!({}), json!({"event": 7, "time": [], "client": {}, "to_target": "x"})] {
        assert_eq!(mapped(&value)["class_uid"], 0, "{value}");
    }
}

#[test]
fn every_kind_of_record_has_a_class() {
    let kinds = kinds();
    assert!(kinds.len() > 20, "{kinds:?}");
    let without: Vec<_> = kinds.iter().filter(|kind| !maps(kind)).collect();
    assert!(without.is_empty(), "no class for {without:?}");
}

/// The names of events, as the sources of the trail write them.
fn kinds() -> BTreeSet<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.join("audit")];
    let mut files = vec![root.join("audit.rs")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder of sources").flatten() {
            let path = entry.path();
            let tests = path.file_stem().is_some_and(|stem| stem == "tests" || stem == "ocsf");
            match (path.is_dir(), tests) {
                (true, _) => folders.push(path),
                (false, false) => files.push(path),
                (false, true) => {}
            }
        }
    }
    let families = ["link", "auth", "peer", "forward", "registry", "config", "drain", "trail", "sink"];
    let mut kinds = BTreeSet::new();
    for file in files {
        let text = fs::read_to_string(file).expect("a source");
        for quoted in text.split('"') {
            let Some((family, name)) = quoted.split_once('.') else { continue };
            let word = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
            if word && families.contains(&family) {
                kinds.insert(quoted.to_owned());
            }
        }
    }
    kinds
}
