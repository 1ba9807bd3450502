//! Records as events of the Open Cybersecurity Schema Framework (OCSF 1.3), for collectors that take nothing else.
//!
//! Promised: the mapping is pure and total, nothing of a record is left out, and nothing is put in that the record does not
//! say. What has no place in OCSF stands under `unmapped`, with the name that it has in the record. An event without a
//! class here becomes a base event, and a test sees to it that none of ours does.
//!
//! | Records | Class | Activity |
//! |---|---|---|
//! | `forward.*`, `peer.violation` | Network Activity (4001) | Open, Close, Reset, Fail, Refuse, Traffic |
//! | `link.*` | Tunnel Activity (4014) | Open, Close |
//! | `auth.*` | Authentication (3002) | Logon, with the status |
//! | `registry.*`, `config.*` | Entity Management (3004) | Update, with the status |
//! | `drain.*` | Application Lifecycle (6002) | Stop, with the status |
//! | `trail.*`, `sink.*` | Event Log Activity (1008) | Start, Stop, Rotate, Enable, Disable, Other |
//!
//! `metadata.sequence` is the record's `seq` and `metadata.correlation_uid` the forward's id. The chain cannot be verified
//! from OCSF: whoever wants that keeps the lines themselves in another sink.

use serde_json::{Map, Value, json};

/// The version of the schema that events name.
pub const VERSION: &str = "1.3.0";

/// One record, as it is read from its line, as an event.
#[must_use]
pub fn event(record: &Value) -> Value {
    let mut fields = Fields(record.as_object().cloned().unwrap_or_default());
    let name = fields.text("event").unwrap_or_default();
    let place = place(&name).unwrap_or(Place::base());
    let mut event = common(&place, &name, &mut fields);
    match place.class {
        NETWORK => network(&mut event, &place, &mut fields),
        TUNNEL => tunnel(&mut event, &mut fields),
        AUTHENTICATION => authentication(&mut event, &name, &mut fields),
        ENTITY => entity(&mut event, &name),
        APPLICATION => {
            event.insert("app".into(), json!({"name": "caponier", "vendor_name": "caponier"}));
        }
        EVENT_LOG => {
            event.insert("log_name".into(), json!(LOG));
        }
        _ => {
            if !record.is_object() {
                event.insert("raw_data".into(), json!(record.to_string()));
            }
        }
    }
    if !fields.0.is_empty() {
        event.insert("unmapped".into(), Value::Object(fields.0));
    }
    Value::Object(event)
}

/// Whether an event with this name has a class of its own.
#[must_use]
pub fn maps(event: &str) -> bool {
    place(event).is_some()
}

/// Where an event belongs.
#[derive(Debug, Clone, Copy)]
struct Place {
    class: u32,
    activity: u32,
    activity_name: &'static str,
    severity: u32,
    /// Whether what was to happen has happened; `None` where that is not said.
    success: Option<bool>,
}

impl Place {
    /// For what nobody has given a class.
    fn base() -> Self {
        Self { class: 0, activity: 99, activity_name: "Other", severity: INFORMATIONAL, success: None }
    }

    /// The category, which the class begins with, and its name.
    fn category(&self) -> (u32, &'static str) {
        match self.class {
            NETWORK | TUNNEL => (4, "Network Activity"),
            AUTHENTICATION | ENTITY => (3, "Identity & Access Management"),
            APPLICATION => (6, "Application Activity"),
            EVENT_LOG => (1, "System Activity"),
            _ => (0, "Uncategorized"),
        }
    }

    fn class_name(&self) -> &'static str {
        match self.class {
            NETWORK => "Network Activity",
            TUNNEL => "Tunnel Activity",
            AUTHENTICATION => "Authentication",
            ENTITY => "Entity Management",
            APPLICATION => "Application Lifecycle",
            EVENT_LOG => "Event Log Activity",
            _ => "Base Event",
        }
    }
}

fn place(event: &str) -> Option<Place> {
    let (class, activity, activity_name, severity, success) = match event {
        "forward.open" => (NETWORK, 1, "Open", INFORMATIONAL, Some(true)),
        "forward.progress" => (NETWORK, 6, "Traffic", INFORMATIONAL, Some(true)),
        "forward.ended" => (NETWORK, 2, "Close", INFORMATIONAL, Some(true)),
        "forward.abandoned" => (NETWORK, 3, "Reset", LOW, Some(false)),
        "forward.failed" => (NETWORK, 4, "Fail", LOW, Some(false)),
        "forward.attempt" => (NETWORK, 4, "Fail", INFORMATIONAL, Some(false)),
        "forward.denied" => (NETWORK, 5, "Refuse", MEDIUM, Some(false)),
        "peer.violation" => (NETWORK, 5, "Refuse", HIGH, Some(false)),
        "link.up" => (TUNNEL, 1, "Open", INFORMATIONAL, Some(true)),
        "link.down" => (TUNNEL, 2, "Close", LOW, Some(true)),
        "auth.accepted" => (AUTHENTICATION, 1, "Logon", INFORMATIONAL, Some(true)),
        "auth.refused" | "auth.refused_more" => (AUTHENTICATION, 1, "Logon", MEDIUM, Some(false)),
        "registry.reloaded" | "config.reloaded" => (ENTITY, 3, "Update", LOW, Some(true)),
        "registry.rejected" | "config.rejected" => (ENTITY, 3, "Update", HIGH, Some(false)),
        "agent.examined" => (APPLICATION, 99, "Examine", INFORMATIONAL, Some(true)),
        "agent.examination_asked" => (APPLICATION, 99, "Examine", INFORMATIONAL, None),
        "agent.examination_failed" => (APPLICATION, 99, "Examine", LOW, Some(false)),
        "drain.began" => (APPLICATION, 4, "Stop", INFORMATIONAL, None),
        "drain.ended" => (APPLICATION, 4, "Stop", INFORMATIONAL, Some(true)),
        "trail.started" => (EVENT_LOG, 6, "Start", INFORMATIONAL, Some(true)),
        "trail.stopped" => (EVENT_LOG, 7, "Stop", LOW, Some(true)),
        "trail.continued" => (EVENT_LOG, 5, "Rotate", INFORMATIONAL, Some(true)),
        "trail.resumed" => (EVENT_LOG, 9, "Enable", HIGH, Some(true)),
        "trail.recovered" => (EVENT_LOG, 99, "Recover", MEDIUM, Some(true)),
        "trail.head" => (EVENT_LOG, 99, "Sign", INFORMATIONAL, Some(true)),
        "trail.anchored" => (EVENT_LOG, 99, "Anchor", INFORMATIONAL, Some(true)),
        "trail.countersigned" => (EVENT_LOG, 99, "Countersign", INFORMATIONAL, Some(true)),
        "sink.failed" => (EVENT_LOG, 10, "Disable", HIGH, Some(false)),
        "sink.works" => (EVENT_LOG, 9, "Enable", MEDIUM, Some(true)),
        _ => return None,
    };
    Some(Place { class, activity, activity_name, severity, success })
}

/// What all classes have.
fn common(place: &Place, name: &str, fields: &mut Fields) -> Map<String, Value> {
    let (category, category_name) = place.category();
    let mut product = json!({"name": "caponier", "vendor_name": "caponier"});
    if let Some(side) = fields.take("side") {
        product["feature"] = json!({"name": side});
    }
    if let Some(version) = fields.take("version") {
        product["version"] = version;
    }
    let mut metadata = json!({"version": VERSION, "product": product, "log_name": LOG, "event_code": name});
    for (ours, theirs) in [("seq", "sequence"), ("forward", "correlation_uid")] {
        if let Some(value) = fields.take(ours) {
            metadata[theirs] = value;
        }
    }
    if let Some(version) = fields.take("v") {
        metadata["log_version"] = json!(version.to_string());
    }
    let mut event = Map::new();
    let time = fields.text("time").unwrap_or_default();
    // Not to be told from a record without a time, which none of ours is, and better than an event that no collector takes.
    let milliseconds = time.parse::<jiff::Timestamp>().map_or(0, jiff::Timestamp::as_millisecond);
    event.insert("time".into(), json!(milliseconds));
    metadata["original_time"] = json!(time);
    if place.class == NETWORK {
        metadata["profiles"] = json!(["host", "security_control"]);
    }
    for (key, value) in [
        ("metadata", metadata),
        ("category_uid", json!(category)),
        ("category_name", json!(category_name)),
        ("class_uid", json!(place.class)),
        ("class_name", json!(place.class_name())),
        ("activity_id", json!(place.activity)),
        ("activity_name", json!(place.activity_name)),
        ("type_uid", json!(u64::from(place.class) * 100 + u64::from(place.activity))),
        ("type_name", json!(format!("{}: {}", place.class_name(), place.activity_name))),
        ("severity_id", json!(place.severity)),
        ("severity", json!(severity(place.severity))),
    ] {
        event.insert(key.into(), value);
    }
    if let Some(success) = place.success {
        event.insert("status_id".into(), json!(if success { 1 } else { 2 }));
        event.insert("status".into(), json!(if success { "Success" } else { "Failure" }));
    }
    for (ours, theirs) in [("reason", "status_code"), ("detail", "status_detail"), ("duration_ms", "duration")] {
        if let Some(value) = fields.take(ours) {
            event.insert(theirs.into(), value);
        }
    }
    event
}

fn network(event: &mut Map<String, Value>, place: &Place, fields: &mut Fields) {
    if let Some(user) = user(fields) {
        event.insert("actor".into(), json!({"user": user}));
    }
    if let Some(client) = fields.text("client") {
        event.insert("src_endpoint".into(), endpoint(&client));
    }
    // A collector wants one of the two ends, and a violation may come without either.
    let mut target = fields.text("target").map_or_else(|| json!({"name": "caponier"}), |target| endpoint(&target));
    if let Some(dialled) = fields.text("dialled") {
        if let Some(ip) = endpoint(&dialled).get("ip") {
            target["ip"] = ip.clone();
        } else {
            fields.put("dialled", dialled);
        }
    }
    event.insert("dst_endpoint".into(), target);
    if let Some(agent) = agent(fields) {
        event.insert("proxy_endpoint".into(), agent);
    }
    event.insert("connection_info".into(), json!({"protocol_name": "tcp", "protocol_num": 6, "direction_id": 0}));
    let (sent, received) = (fields.number("to_target"), fields.number("from_target"));
    if sent.is_some() || received.is_some() {
        let (sent, received) = (sent.unwrap_or_default(), received.unwrap_or_default());
        let traffic = json!({"bytes_out": sent, "bytes_in": received, "bytes": sent.saturating_add(received)});
        event.insert("traffic".into(), traffic);
    }
    if let Some(rule) = fields.take("rule") {
        event.insert("firewall_rule".into(), json!({"name": rule}));
    }
    let (action, name) = if place.activity == 5 { (2, "Denied") } else { (1, "Allowed") };
    event.insert("action_id".into(), json!(action));
    event.insert("action".into(), json!(name));
}

fn tunnel(event: &mut Map<String, Value>, fields: &mut Fields) {
    let mut source = fields.text("client").map_or_else(|| json!({}), |client| endpoint(&client));
    let key = fields.take("key");
    if let Some(Value::Object(agent)) = agent(fields) {
        // What is no address shall not give way to the agent's name.
        if let Some(client) = source.get("name").cloned() {
            source["hostname"] = client;
        }
        for (name, value) in agent {
            source[name] = value;
        }
    }
    event.insert("src_endpoint".into(), source);
    event.insert("protocol_name".into(), json!("SSH"));
    event.insert("tunnel_type_id".into(), json!(99));
    event.insert("tunnel_type".into(), json!("SSH"));
    if let Some(key) = key {
        event.insert("user".into(), json!({"credential_uid": key, "type_id": SYSTEM}));
    }
}

fn authentication(event: &mut Map<String, Value>, name: &str, fields: &mut Fields) {
    let of_agent = !fields.0.contains_key("principal") && fields.0.contains_key("agent");
    let agent = if of_agent { fields.take("agent") } else { None };
    let mut user = user(fields).unwrap_or_else(|| json!({"name": "unknown", "type_id": 0}));
    if let Some(agent) = agent {
        user["name"] = agent;
        user["type_id"] = json!(SYSTEM);
    }
    event.insert("user".into(), user);
    event.insert("service".into(), json!({"name": "caponier"}));
    event.insert("is_remote".into(), json!(true));
    event.insert("auth_protocol_id".into(), json!(99));
    event.insert("auth_protocol".into(), json!("public key"));
    if let Some(client) = fields.text("client") {
        event.insert("src_endpoint".into(), endpoint(&client));
    }
    if name == "auth.refused_more" {
        let counts = fields.0.get("counts").and_then(Value::as_object);
        let sum = counts.map_or(0, |counts| counts.values().filter_map(Value::as_u64).fold(0, u64::saturating_add));
        event.insert("count".into(), json!(sum));
    }
}

fn entity(event: &mut Map<String, Value>, name: &str) {
    let (name, kind) =
        if name.starts_with("registry") { ("registry", "registry") } else { ("configuration", "policy") };
    event.insert("entity".into(), json!({"name": name, "type": kind}));
}

/// On whose behalf, if the record says anything of that.
fn user(fields: &mut Fields) -> Option<Value> {
    let principal = fields.take("principal");
    let organisation = fields.0.get("organisation").cloned();
    let key = fields.take("key");
    if principal.is_none() && organisation.is_none() && key.is_none() {
        return None;
    }
    let mut user = Map::new();
    user.insert("type_id".into(), json!(u32::from(principal.is_some())));
    user.insert("name".into(), principal.unwrap_or_else(|| json!("unknown")));
    if let Some(organisation) = organisation {
        // It stays for whoever names the agent.
        if !fields.0.contains_key("agent") {
            fields.take("organisation");
        }
        user.insert("org".into(), json!({"name": organisation}));
    }
    if let Some(key) = key {
        user.insert("credential_uid".into(), key);
    }
    Some(Value::Object(user))
}

/// The agent by its full name, with its replica.
fn agent(fields: &mut Fields) -> Option<Value> {
    let agent = fields.text("agent")?;
    let organisation = fields.text("organisation");
    let name = organisation.map_or(agent.clone(), |organisation| format!("{organisation}/{agent}"));
    let mut endpoint = json!({"name": name});
    if let Some(replica) = fields.take("replica") {
        endpoint["instance_uid"] = replica;
    }
    Some(endpoint)
}

/// `HOST:PORT`, `[ADDRESS]:PORT`, an address or a name.
fn endpoint(text: &str) -> Value {
    if let Ok(address) = text.parse::<std::net::SocketAddr>() {
        return json!({"ip": address.ip().to_string(), "port": address.port()});
    }
    if let Ok(address) = text.parse::<std::net::IpAddr>() {
        return json!({"ip": address.to_string()});
    }
    match text.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?))) {
        Some((host, port)) => json!({"hostname": host, "port": port}),
        None => json!({"name": text}),
    }
}

fn severity(id: u32) -> &'static str {
    match id {
        LOW => "Low",
        MEDIUM => "Medium",
        HIGH => "High",
        _ => "Informational",
    }
}

/// The fields of a record that have found no place yet.
struct Fields(Map<String, Value>);

impl Fields {
    fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    /// Takes a text; what is not one stays.
    fn text(&mut self, name: &str) -> Option<String> {
        self.0.get(name)?.as_str()?;
        self.take(name)?.as_str().map(str::to_owned)
    }

    /// Takes a number; what is not one stays.
    fn number(&mut self, name: &str) -> Option<u64> {
        let number = self.0.get(name)?.as_u64()?;
        self.take(name);
        Some(number)
    }

    fn put(&mut self, name: &str, value: String) {
        self.0.insert(name.to_owned(), Value::String(value));
    }
}

const NETWORK: u32 = 4001;
const TUNNEL: u32 = 4014;
const AUTHENTICATION: u32 = 3002;
const ENTITY: u32 = 3004;
const APPLICATION: u32 = 6002;
const EVENT_LOG: u32 = 1008;

const INFORMATIONAL: u32 = 1;
const LOW: u32 = 2;
const MEDIUM: u32 = 3;
const HIGH: u32 = 4;

/// Of users: a machine's.
const SYSTEM: u32 = 3;

const LOG: &str = "caponier audit";

#[cfg(test)]
mod tests;
