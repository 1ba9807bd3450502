//! What SSH can ask for, and neither end of ours does: the one table of it, and that nothing is missing there.
//!
//! `raw.rs` asks for all of it at the SSH door, at an agent and, in the place of an agent, at the gateway; `refusals.rs` at the
//! agent's own listener. The test here holds the table against what `tunnel/ssh/handler.rs` answers and what the library
//! can ask: a callback without an entry fails it.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::json;

use crate::raw::Peer;

/// Bytes in hexadecimal, as `raw.py` takes them.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An SSH string (RFC 4251 §5) in hexadecimal.
pub(crate) fn string(text: &str) -> String {
    format!("{:08x}{}", text.len(), hex(text.as_bytes()))
}

/// Channel types with their bodies: everything but `direct-tcpip`, and `session`, which has a test of its own.
pub(crate) fn channels(port: u16, folder: &Path) -> Vec<(&'static str, String)> {
    let socket = socket(folder);
    let pair = format!("{}{port:08x}{}{:08x}", string("127.0.0.1"), string("127.0.0.1"), 1);
    vec![
        ("x11", format!("{}{:08x}", string("127.0.0.1"), 6000)),
        ("auth-agent@openssh.com", String::new()),
        ("auth-agent", String::new()),
        ("direct-streamlocal@openssh.com", format!("{socket}{}{:08x}", string(""), 0)),
        ("forwarded-streamlocal@openssh.com", format!("{socket}{}", string(""))),
        ("forwarded-tcpip", pair),
        ("tun@openssh.com", format!("{:08x}{:08x}", 1, 0x7fff_ffff)),
        ("frobnicate@example.com", String::new()),
        ("", String::new()),
    ]
}

/// Requests on a channel with their bodies.
pub(crate) fn requests(folder: &Path) -> Vec<(&'static str, String)> {
    let command = format!("touch {}", folder.join("executed").display());
    vec![
        ("shell", String::new()),
        ("exec", string(&command)),
        ("env", format!("{}{}", string("LD_PRELOAD"), string(&command))),
        ("pty-req", format!("{}{:08x}{:08x}{:08x}{:08x}{}", string("xterm"), 80, 24, 0, 0, string("\0"))),
        ("subsystem", string("sftp")),
        ("subsystem", string("control@caponier")),
        ("subsystem", string("frobnicate")),
        (
            "x11-req",
            format!("00{}{}{:08x}", string("MIT-MAGIC-COOKIE-1"), string("00112233445566778899aabbccddeeff"), 0),
        ),
        ("auth-agent-req@openssh.com", String::new()),
        ("signal", string("KILL")),
        ("window-change", format!("{:08x}{:08x}{:08x}{:08x}", 80, 24, 0, 0)),
        ("break", format!("{:08x}", 500)),
        ("xon-xoff", "01".into()),
        ("eow@openssh.com", String::new()),
        ("frobnicate@example.com", String::new()),
    ]
}

/// Global requests with their bodies.
pub(crate) fn globals(folder: &Path) -> Vec<(&'static str, String)> {
    let socket = socket(folder);
    vec![
        ("tcpip-forward", format!("{}{:08x}", string("127.0.0.1"), 0)),
        ("tcpip-forward", format!("{}{:08x}", string(""), 2222)),
        ("cancel-tcpip-forward", format!("{}{:08x}", string("127.0.0.1"), 2222)),
        ("streamlocal-forward@openssh.com", socket.clone()),
        ("cancel-streamlocal-forward@openssh.com", socket),
        ("hostkeys-prove-00@openssh.com", String::new()),
        ("frobnicate@example.com", String::new()),
    ]
}

fn socket(folder: &Path) -> String {
    string(&folder.join("socket").display().to_string())
}

/// Asks for all of it in a session that may have forwards to `port`; everything that was not refused, in words. `originator`
/// makes one for each forward.
pub(crate) async fn not_refused(
    peer: &mut Peer,
    port: u16,
    folder: &Path,
    originator: impl Fn() -> String,
) -> Vec<String> {
    let mut faults = Vec::new();
    for (kind, body) in channels(port, folder) {
        let answer = peer.ask(json!({"do": "open", "type": kind, "rest": body})).await;
        if answer["message"] != 92 {
            faults.push(format!("channel {kind:?}: {answer}"));
        }
    }
    for (name, body) in globals(folder) {
        let answer = peer.ask(json!({"do": "global", "name": name, "rest": body})).await;
        if answer["message"] != 82 {
            faults.push(format!("global request {name:?}: {answer}"));
        }
        // Without a wish for a reply there must be none, or it would be taken for the next request's.
        peer.ask(json!({"do": "global", "name": name, "rest": body, "reply": false})).await;
    }
    let forward = peer.gateway_forward(&originator(), "127.0.0.1", port).await;
    if forward["message"] != 91 {
        faults.push(format!("a forward after foreign channels and global requests: {forward}"));
        return faults;
    }
    for (name, body) in requests(folder) {
        let request = json!({"do": "request", "id": forward["id"], "name": name, "rest": body, "reply": false});
        peer.ask(request).await;
        let request = json!({"do": "request", "id": forward["id"], "name": name, "rest": body});
        let answer = peer.ask(request).await;
        if answer["message"] != 100 {
            faults.push(format!("request {name:?} on a forward: {answer}"));
            if answer["open"] == false {
                return faults;
            }
        }
    }
    peer.echoes(&forward).await;
    let later = peer.gateway_forward(&originator(), "127.0.0.1", port).await;
    peer.echoes(&later).await;
    let late = peer.ask(json!({"do": "next", "messages": [81, 82, 99, 100], "within": 1})).await;
    if late["nothing"] != true {
        faults.push(format!("a reply nobody asked for: {late}"));
    }
    faults
}

// ---------------------------------------------------------------------------------------------------------------------
// Nothing is missing.

/// Where a callback's refusal is shown.
enum Shown {
    /// By [`channels`], with this type.
    Channel(&'static str),
    /// By [`requests`], with this name.
    Request(&'static str),
    /// By [`globals`], with this name.
    Global(&'static str),
    /// By a test in a file of `tests/e2e/`, because what is asked is granted to some.
    Test(&'static str, &'static str),
    /// It asks for nothing: it tells, or it is the library's own bookkeeping.
    Tells,
}

/// What a server of ours can be asked, by the library's callbacks.
const SERVER: &[(&str, Shown)] = &[
    ("auth_none", Shown::Test("raw.rs", "refused_logins_at_the_door_look_alike_and_are_recorded_as_they_were")),
    ("auth_password", Shown::Test("raw.rs", "refused_logins_at_the_door_look_alike_and_are_recorded_as_they_were")),
    (
        "auth_keyboard_interactive",
        Shown::Test("raw.rs", "refused_logins_at_the_door_look_alike_and_are_recorded_as_they_were"),
    ),
    ("auth_publickey_offered", Shown::Test("refusals.rs", "at_the_ssh_door_one_wrong_field_is_enough")),
    ("auth_publickey", Shown::Test("refusals.rs", "at_the_ssh_door_one_wrong_field_is_enough")),
    ("auth_openssh_certificate", Shown::Test("refusals.rs", "at_the_ssh_door_one_wrong_field_is_enough")),
    ("auth_succeeded", Shown::Tells),
    ("authentication_banner", Shown::Tells),
    ("channel_close", Shown::Tells),
    ("channel_eof", Shown::Tells),
    ("channel_open_confirmation", Shown::Tells),
    ("data", Shown::Tells),
    ("extended_data", Shown::Tells),
    ("window_adjusted", Shown::Tells),
    ("adjust_window", Shown::Tells),
    ("channel_open_session", Shown::Test("raw.rs", "a_session_channel_at_the_agent_is_for_one_control_channel")),
    ("channel_open_direct_tcpip", Shown::Test("refusals.rs", "at_the_ssh_door_one_wrong_field_is_enough")),
    ("channel_open_x11", Shown::Channel("x11")),
    ("channel_open_forwarded_tcpip", Shown::Channel("forwarded-tcpip")),
    ("channel_open_direct_streamlocal", Shown::Channel("direct-streamlocal@openssh.com")),
    ("pty_request", Shown::Request("pty-req")),
    ("x11_request", Shown::Request("x11-req")),
    ("env_request", Shown::Request("env")),
    ("shell_request", Shown::Request("shell")),
    ("exec_request", Shown::Request("exec")),
    ("subsystem_request", Shown::Request("subsystem")),
    ("window_change_request", Shown::Request("window-change")),
    ("agent_request", Shown::Request("auth-agent-req@openssh.com")),
    ("signal", Shown::Request("signal")),
    ("tcpip_forward", Shown::Global("tcpip-forward")),
    ("cancel_tcpip_forward", Shown::Global("cancel-tcpip-forward")),
    ("streamlocal_forward", Shown::Global("streamlocal-forward@openssh.com")),
    ("cancel_streamlocal_forward", Shown::Global("cancel-streamlocal-forward@openssh.com")),
    // Only asked where a group-exchange algorithm was agreed on, and none is offered.
    ("lookup_dh_gex_group", Shown::Tells),
];

/// What a client of ours can be asked: the gateway at an agent, `caponier forward` at a gateway.
const CLIENT: &[(&str, Shown)] = &[
    ("auth_banner", Shown::Tells),
    ("check_server_key", Shown::Test("raw.rs", "an_agents_key_counts_for_its_own_name_alone")),
    ("kex_done", Shown::Tells),
    ("channel_open_confirmation", Shown::Tells),
    ("channel_success", Shown::Tells),
    ("channel_failure", Shown::Tells),
    ("channel_close", Shown::Tells),
    ("channel_eof", Shown::Tells),
    ("channel_open_failure", Shown::Tells),
    ("server_channel_open_forwarded_tcpip", Shown::Channel("forwarded-tcpip")),
    ("server_channel_open_forwarded_streamlocal", Shown::Channel("forwarded-streamlocal@openssh.com")),
    ("server_channel_open_agent_forward", Shown::Channel("auth-agent@openssh.com")),
    ("should_accept_unknown_server_channel", Shown::Channel("frobnicate@example.com")),
    ("server_channel_open_unknown", Shown::Channel("tun@openssh.com")),
    ("server_channel_open_session", Shown::Test("raw.rs", "an_agent_opens_nothing_toward_the_gateway")),
    ("server_channel_open_direct_tcpip", Shown::Test("raw.rs", "an_agent_opens_nothing_toward_the_gateway")),
    ("server_channel_open_direct_streamlocal", Shown::Channel("direct-streamlocal@openssh.com")),
    ("server_channel_open_x11", Shown::Channel("x11")),
    ("data", Shown::Tells),
    ("extended_data", Shown::Tells),
    ("xon_xoff", Shown::Tells),
    ("exit_status", Shown::Tells),
    ("exit_signal", Shown::Tells),
    ("window_adjusted", Shown::Tells),
    ("adjust_window", Shown::Tells),
    ("openssh_ext_host_keys_announced", Shown::Tells),
    ("disconnected", Shown::Tells),
];

/// Callbacks whose default in the library refuses already: they need not stand in our handler.
const REFUSED_BY_DEFAULT: [&str; 2] = ["auth_none", "auth_keyboard_interactive"];

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The functions of the block that begins with the line `head`, which ends with a brace at the line's beginning.
fn functions(text: &str, head: &str) -> BTreeSet<String> {
    let (_, block) = text.split_once(head).unwrap_or_else(|| panic!("no {head:?}"));
    let block = block.split_once("\n}").expect("its end").0;
    block.lines().filter_map(function).collect()
}

/// The function that a line one level deep begins.
fn function(line: &str) -> Option<String> {
    let line = line.strip_prefix("    ").filter(|rest| !rest.starts_with(' '))?;
    let name = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ")?;
    Some(name.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect())
}

/// The library's folder, which cargo knows.
fn library() -> std::path::PathBuf {
    let said = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--offline", "--format-version", "1", "--manifest-path"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
        .output()
        .expect("cargo runs");
    let said: serde_json::Value = serde_json::from_slice(&said.stdout).expect("cargo's metadata");
    let packages = said["packages"].as_array().expect("packages");
    let russh = packages.iter().find(|package| package["name"] == "russh").expect("russh");
    let manifest = Path::new(russh["manifest_path"].as_str().expect("a path"));
    manifest.parent().expect("a folder").to_owned()
}

/// Every callback of the library has an entry, every refusal among them stands in our handler, and every entry is shown.
#[test]
fn every_kind_of_request_has_a_refusal() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let handler = read(&root.join("src/tunnel/ssh/handler.rs"));
    let library = library();
    let folder = Path::new("/nonexistent");
    let mut faults = Vec::new();
    for (side, file, ours, kinds) in [
        ("server", "src/server/mod.rs", "\nimpl server::Handler for ", SERVER),
        ("client", "src/client/mod.rs", "\nimpl client::Handler for ", CLIENT),
    ] {
        let known: BTreeSet<String> = kinds.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(known.len(), kinds.len(), "{side}: an entry stands twice");
        let offered = functions(&read(&library.join(file)), "\npub trait Handler");
        let answered = functions(&handler, ours);
        for name in offered.union(&answered).filter(|name| !known.contains(*name)) {
            faults.push(format!("{side}: {name} has no entry, and so no refusal that a test shows"));
        }
        for name in known.difference(&offered) {
            faults.push(format!("{side}: the library has no {name}"));
        }
        for (name, shown) in kinds {
            let (table, kind) = match shown {
                Shown::Tells => continue,
                Shown::Test(file, test) => {
                    if !read(&root.join("tests/e2e").join(file)).contains(&format!("async fn {test}()")) {
                        faults.push(format!("{side}: {name} names {file}'s {test}, which does not exist"));
                    }
                    if !answered.contains(*name) && !REFUSED_BY_DEFAULT.contains(name) {
                        faults.push(format!("{side}: {name} is left to the library's default"));
                    }
                    continue;
                }
                Shown::Channel(kind) => (channels(1, folder), kind),
                Shown::Request(kind) => (requests(folder), kind),
                Shown::Global(kind) => (globals(folder), kind),
            };
            if !table.iter().any(|(asked, _)| asked == kind) {
                faults.push(format!("{side}: {name}: nothing asks for {kind}"));
            }
            if !answered.contains(*name) {
                faults.push(format!("{side}: {name} is left to the library's default"));
            }
        }
    }
    assert_eq!(faults, Vec::<String>::new());
}
