//! What a stranger can make the gateway hold, and what is told apart, before anybody has logged in.

use super::*;

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
            let end = peer.ask(json!({"do": "closed", "within": 5})).await;
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
        let end = peer.ask(json!({"do": "closed", "within": 5})).await;
        assert_eq!(end["closed"], true, "an agent goes on: {end}");
        drop(agent);
        world.assert_well();
    })
    .await;
}
