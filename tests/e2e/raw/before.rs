//! What a stranger can make the gateway hold, and what is told apart, before anybody has logged in.

use super::*;
use crate::certificates::sign;

/// Memory that one connection without a login may take, in KiB.
const EACH: u64 = 256;

/// An SSH packet as it is sent before keys are in use (RFC 4253 §6).
fn packet(payload: &[u8]) -> Vec<u8> {
    let padding = 4 + (8 - (5 + payload.len() + 4) % 8) % 8;
    let length = u32::try_from(1 + payload.len() + padding).expect("a length");
    [&length.to_be_bytes()[..], &[padding as u8], payload, &vec![0; padding]].concat()
}

/// A KEXINIT with so many bytes of names that nobody knows, and one that everybody does.
fn key_exchange(unknown: usize) -> Vec<u8> {
    let names = |known: &str| {
        let text = format!("{},{known}", "x".repeat(60).repeat(unknown / 60));
        [&u32::try_from(text.len()).expect("a length").to_be_bytes()[..], text.as_bytes()].concat()
    };
    let plain =
        |text: &str| [&u32::try_from(text.len()).expect("a length").to_be_bytes()[..], text.as_bytes()].concat();
    let cipher = || plain("aes128-gcm@openssh.com");
    [
        &[20][..],
        &[7; 16],
        &names("curve25519-sha256"),
        &plain("ssh-ed25519"),
        &cipher(),
        &cipher(),
        &plain("hmac-sha2-256-etm@openssh.com"),
        &plain("hmac-sha2-256-etm@openssh.com"),
        &plain("none"),
        &plain("none"),
        &plain(""),
        &plain(""),
        &[0, 0, 0, 0, 0],
    ]
    .concat()
}

#[tokio::test]
async fn a_stranger_makes_the_gateway_hold_little_however_much_it_sends() {
    limited(180, async {
        let line = b"SSH-2.0-x\r\n";
        let ignore = packet(&[&[2][..], &1_000_u32.to_be_bytes(), &[0; 1_000]].concat());
        let unknown = packet(&[191; 20]);
        let largest = packet(&key_exchange(34_000));
        let beginning = |announced: u32| [&line[..], &announced.to_be_bytes(), &[4], &vec![20; 34_000]].concat();
        for (what, bytes, endless) in [
            ("a large packet that does not end", beginning(34_900), false),
            ("a larger packet than any", beginning(262_144), false),
            ("the largest key exchange there is", [&line[..], &largest].concat(), false),
            ("endless messages that mean nothing", [&line[..], &ignore.repeat(64)].concat(), true),
            ("endless messages that nobody knows", [&line[..], &unknown.repeat(2_000)].concat(), true),
            ("endless key exchanges", [&line[..], &largest.repeat(3)].concat(), true),
            ("an endless line", b"SSH-2.0-".to_vec(), true),
        ] {
            let mut world = World::linked().await;
            // Whoever comes first costs what all share.
            let mut client = world.at_the_door().await;
            let before = world.resident();
            let mut streams = Vec::new();
            for _ in 0..limits::UNAUTHENTICATED_PER_ADDRESS {
                streams.push(connect("127.0.0.3", world.port).await);
            }
            let mut most = 0;
            let began = Instant::now();
            let rounds = if endless { 40 } else { 1 };
            for _ in 0..rounds {
                for stream in &mut streams {
                    // Nothing of what comes back is read. Who is hung up on has sent enough.
                    let _ = timeout(Duration::from_millis(20), stream.write_all(&bytes)).await;
                }
                most = most.max(world.resident());
                // Answers what the gateway asks to learn whether it is still there.
                client.ask(json!({"do": "next", "messages": [1], "within": 0})).await;
            }
            while began.elapsed() < Duration::from_secs(3) {
                most = most.max(world.resident());
                sleep(Duration::from_millis(50)).await;
            }
            let each = most.saturating_sub(before) / streams.len() as u64;
            eprintln!("{what}: {each} KiB each, {} still held", held(&mut streams).await);
            assert!(each <= EACH, "{what}: {each} KiB for each connection, of {before} and then {most}");
            // An honest one gets in meanwhile, and who is in already is served.
            let mut honest = world.at_the_door().await;
            let forward = allowed(&world, &mut honest, true).await;
            honest.echoes(&forward).await;
            let forward = allowed(&world, &mut client, true).await;
            client.echoes(&forward).await;
            world.assert_well();
        }
    })
    .await;
}

#[tokio::test]
async fn what_comes_under_keys_before_the_login_ends_when_it_is_more_than_a_login_needs() {
    limited(120, async {
        let mut world = World::linked().await;
        for (what, message) in [
            ("what is to be ignored", format!("02{}", string(&"x".repeat(4_000)))),
            ("what is to be shown", format!("0400{}{}", string(&"x".repeat(4_000)), string(""))),
            ("what nobody knows", format!("c0{}", string(&"x".repeat(4_000)))),
        ] {
            let mut peer = Peer::start();
            let from = peer.ask(json!({"do": "connect", "port": world.port})).await["local"].clone();
            assert_eq!(peer.ask(json!({"do": "client"})).await["exchanged"], true);
            // It may be hung up on before it has said all.
            let _ = peer.try_ask(json!({"do": "raw", "hex": message, "times": 200})).await;
            let end = peer.ask(json!({"do": "closed", "within": 60})).await;
            assert_eq!(end["closed"], true, "{what}: {end}");
            let record = world.entry("gateway", |it| it["event"] == "auth.refused" && it["client"] == from).await;
            assert!(
                ["too_much_before_login", "left_before_login"].contains(&record["reason"].as_str().unwrap_or_default()),
                "{what}: {record}"
            );
        }
        // And an agent in front of a gateway that does the same.
        let mut peer = Peer::start();
        let agent = World::dialled(&mut peer).await;
        peer.ask(json!({"do": "client", "identification": GATEWAY_LINE})).await;
        let _ =
            peer.try_ask(json!({"do": "raw", "hex": format!("02{}", string(&"x".repeat(4_000))), "times": 200})).await;
        let end = peer.ask(json!({"do": "closed", "within": 60})).await;
        assert_eq!(end["closed"], true, "an agent goes on: {end}");
        drop(agent);
        world.assert_well();
    })
    .await;
}

/// Says that certificates are taken, and not.
const LISTENERS: [&str; 2] = ["user_ca = true", "user_ca = false"];

impl World {
    /// One attempt to log in as a principal of the agent, or with `probe` the question whether the key would do.
    async fn shows(&self, peer: &mut Peer, key: &str, certificate: Option<&str>, probe: bool) -> Value {
        peer.ask(self.showing(key, certificate, probe)).await
    }

    /// What [`Peer::ask`] is to be asked for that.
    fn showing(&self, key: &str, certificate: Option<&str>, probe: bool) -> Value {
        let mut login = json!({"do": "login", "user": "acme/prod-eu", "key": self.path(key), "probe": probe});
        if let Some(certificate) = certificate {
            login["certificate"] = json!(self.path(&format!("{certificate}-cert.pub")));
        }
        login
    }
}

/// The first byte of every message that came back.
fn kinds_of(answer: &Value) -> Vec<&str> {
    answer["answers"].as_array().expect("answers").iter().map(|it| &it.as_str().expect("hex")[..2]).collect()
}

#[tokio::test]
async fn keys_that_are_asked_about_are_acknowledged_so_often_and_then_refused() {
    limited(120, async {
        // Where certificates are taken every key is acknowledged, elsewhere one that may log in.
        for (listener, key) in [(LISTENERS[0], "stranger"), (LISTENERS[1], "provisioner")] {
            let mut world = World::new().await;
            world.start_gateway_at(listener).await;
            let mut peer = Peer::start();
            let from = peer.ask(json!({"do": "connect", "port": world.port})).await["local"].clone();
            peer.ask(json!({"do": "client"})).await;
            for number in 0..limits::LOGIN_PROBES {
                let answer = world.shows(&mut peer, key, None, true).await;
                assert_eq!(kinds_of(&answer), ["3c"], "{listener}: the {number}th is {answer}");
            }
            // From here on each is an attempt, of which there are so many.
            let mut refused = 0;
            loop {
                let answer = world.shows(&mut peer, key, None, true).await;
                if answer["answers"] != json!([LOGIN_FAILURE]) {
                    break assert_eq!(answer["open"], false, "{listener}: {answer}");
                }
                refused += 1;
                assert!(refused <= limits::LOGIN_ATTEMPTS, "{listener}: {refused} more are answered");
            }
            assert!((limits::LOGIN_ATTEMPTS - 1..=limits::LOGIN_ATTEMPTS).contains(&refused), "{listener}: {refused}");
            let record = world.entry("gateway", |it| it["event"] == "auth.refused" && it["client"] == from).await;
            assert_eq!(record["reason"], "too_many_probes", "{listener}: {record}");
            // Whoever has asked so often and then signs gets in: what is signed is asked about, too.
            let mut honest = Peer::start();
            honest.ask(json!({"do": "connect", "port": world.port})).await;
            honest.ask(json!({"do": "client"})).await;
            for _ in 1..limits::LOGIN_PROBES {
                world.shows(&mut honest, key, None, true).await;
            }
            let login = world.shows(&mut honest, "provisioner", None, false).await;
            assert_eq!(login["ok"], true, "{listener}: {login}");
            world.assert_well();
        }
    })
    .await;
}

#[tokio::test]
async fn a_certificate_is_refused_with_the_same_bytes_after_the_same_time_as_a_key() {
    limited(180, async {
        let always = ["-V", "always:forever"];
        // A name for the certificate, the CA, the key, and the arguments of ssh-keygen.
        let certificates: &[(&str, &str, &str, &[&str])] = &[
            ("good", "ca", "stranger", &["-n", "provisioner"]),
            ("of-others", "other-ca", "stranger", &["-n", "provisioner"]),
            ("for-others", "ca", "stranger", &["-n", "former"]),
            ("for-nobody", "ca", "stranger", &[]),
            ("withdrawn-serial", "ca", "stranger", &["-n", "provisioner", "-z", "666"]),
            ("with-a-command", "ca", "stranger", &["-n", "provisioner", "-O", "force-command=x"]),
            ("elsewhere", "ca", "stranger", &["-n", "provisioner", "-O", "source-address=192.0.2.0/24"]),
            ("a-host", "ca", "stranger", &["-h", "-n", "provisioner"]),
            ("past", "ca", "stranger", &["-n", "provisioner", "-V", "20200101:20200102"]),
            ("of-a-withdrawn-key", "ca", "withdrawn", &["-n", "provisioner"]),
            ("of-a-registered-key", "ca", "provisioner", &["-n", "former"]),
            ("of-a-registered-key-by-others", "other-ca", "provisioner", &["-n", "provisioner"]),
        ];
        for listener in LISTENERS {
            let mut world = World::new().await;
            let ca = world.path("keys/organisations/acme/user-ca");
            fs::create_dir_all(&ca).expect("a folder");
            fs::write(ca.join("ca.pub"), format!("{}\n", world.key("ca").to_openssh())).expect("written");
            fs::write(ca.join("ca.toml"), "principals = [\"prov*\"]\nrevoked_serials = [666]\n").expect("written");
            world.key("other-ca");
            for key in ["stranger", "withdrawn", "provisioner"] {
                fs::write(world.path(&format!("{key}.pub")), format!("{}\n", world.public(key))).expect("written");
            }
            for (name, ca, subject, arguments) in certificates {
                let time = if arguments.contains(&"-V") { &[][..] } else { &always };
                sign(world.dir.path(), ca, subject, name, &[arguments, time].concat()).await;
            }
            world.start_gateway_at(listener).await;
            let takes = listener == LISTENERS[0];

            let mut faults = Vec::new();
            let mut fastest = Vec::new();
            let mut peer = Peer::start();
            let certified = certificates.iter().map(|(name, _, subject, _)| (*subject, Some(*name)));
            for (key, certificate) in certified.chain([("stranger", None), ("withdrawn", None)]) {
                if takes && certificate == Some("good") {
                    continue;
                }
                let what = format!("{listener}: {key} with {certificate:?}");
                peer.ask(json!({"do": "connect", "port": world.port})).await;
                peer.ask(json!({"do": "client"})).await;
                let mut seconds = f64::MAX;
                for _ in 0..3 {
                    let answer = world.shows(&mut peer, key, certificate, false).await;
                    if answer["ok"] != false || answer["answers"] != json!([LOGIN_FAILURE]) {
                        faults.push(format!("{what}: {answer}"));
                        break;
                    }
                    seconds = seconds.min(answer["seconds"].as_f64().expect("seconds"));
                }
                fastest.push((seconds, what.clone(), world.showing(key, certificate, false)));
                // Before anything is signed: all are acknowledged where certificates are taken. Elsewhere a certificate is
                // asked about as its bare key, so that this tells no more than the key itself would.
                let acknowledged = takes || key == "provisioner";
                // Its time is looked at by the library, before anybody is asked; it stands in the certificate.
                let in_time = certificate != Some("past");
                for (certificate, expected) in [(None, acknowledged), (certificate, acknowledged && in_time)] {
                    let answer = world.shows(&mut peer, key, certificate, true).await;
                    if kinds_of(&answer) != [if expected { "3c" } else { "33" }] {
                        faults.push(format!("{what}, asked about {certificate:?}: {answer}"));
                    }
                }
                peer.ask(json!({"do": "drop"})).await;
            }
            faults.extend(world.told_apart_by_time(&mut peer, fastest).await);
            assert_eq!(faults, Vec::<String>::new());
            // And what is right gets in, the certificate only where one is taken.
            for (key, certificate, gets_in) in [("provisioner", None, true), ("stranger", Some("good"), takes)] {
                let mut honest = Peer::start();
                honest.ask(json!({"do": "connect", "port": world.port})).await;
                honest.ask(json!({"do": "client"})).await;
                let login = world.shows(&mut honest, key, certificate, false).await;
                assert_eq!(login["ok"], gets_in, "{listener}: {key}: {login}");
            }
            world.assert_well();
        }
    })
    .await;
}
