//! The agent's own listener, where anybody who reaches it may try: it does what the agent does on a link, and less.

use super::*;

/// An agent that listens, and a peer at it before any byte of SSH.
async fn listening(peer: &mut Peer) -> World {
    let mut world = World::new().await;
    // Only so that it is a port; the rules name it.
    world.port = 9;
    let listen = "[listen]\naddress = \"127.0.0.1:0\"\naccept_from = [\"127.0.0.1/32\"]\n";
    world.start_agent("ssh://127.0.0.1:9", "asserts = [\"provisioner\"]\n", listen);
    world.port = until("the agent listens", SOON, || {
        let log = world.agent.as_ref()?.log();
        let (_, rest) = log.split_once("listening on 127.0.0.1:")?;
        rest.split_once('"')?.0.parse().ok()
    })
    .await;
    peer.ask(json!({"do": "connect", "port": world.port})).await;
    world
}

async fn log_in(world: &World, peer: &mut Peer, line: &str) {
    let exchanged = peer.ask(json!({"do": "client", "identification": line})).await;
    assert_eq!(exchanged["line"], "SSH-2.0-caponier_1", "{exchanged}");
    assert_eq!(exchanged["key"], world.public("agent"), "{exchanged}");
    let login = peer.ask(json!({"do": "login", "user": "acme", "key": world.path("login-acme")})).await;
    assert_eq!(login["ok"], true, "{login}");
}

#[tokio::test]
async fn the_listener_does_nothing_but_forward_and_has_no_control_channel() {
    limited(180, async {
        for line in ["SSH-2.0-paramiko_2.12.0", GATEWAY_LINE] {
            let mut peer = Peer::start();
            let mut world = listening(&mut peer).await;
            log_in(&world, &mut peer, line).await;
            let faults = not_refused(&world, &mut peer, false).await;
            assert_eq!(faults, Vec::<String>::new(), "{line}");
            for _ in 0..2 {
                let session = peer.ask(json!({"do": "open", "type": "session"})).await;
                assert_eq!(session["message"], 92, "{line}: {session}");
            }
            let forward = allowed(&world, &mut peer, false).await;
            peer.echoes(&forward).await;
            world.assert_well();
        }
    })
    .await;
}

#[tokio::test]
async fn a_refusal_at_the_listener_is_one_of_two_texts_whatever_the_reason() {
    limited(120, async {
        let mut peer = Peer::start();
        let mut world = listening(&mut peer).await;
        log_in(&world, &mut peer, "SSH-2.0-paramiko_2.12.0").await;
        let live = originator("provisioner");
        let open = peer.gateway_forward(&live, "127.0.0.1", world.echo).await;
        peer.echoes(&open).await;
        for (originator, host, port, code, reason) in [
            ("127.0.0.1".to_owned(), "127.0.0.1", world.echo, 1, "principal_missing"),
            (originator("root"), "127.0.0.1", world.echo, 1, "principal_not_asserted"),
            ("caponier1:no".to_owned(), "127.0.0.1", world.echo, 1, "malformed_originator"),
            (originator("provisioner"), "0177.0.0.1", world.echo, 1, "malformed_target"),
            (originator("provisioner"), "127.0.0.1", 22, 1, "port"),
            (originator("provisioner"), "169.254.169.254", 80, 1, "reserved_address"),
            (originator("provisioner"), "elsewhere.invalid", 80, 1, "no_rule"),
            (live.clone(), "127.0.0.1", world.echo, 1, "duplicate_forward"),
            (originator("provisioner"), "nowhere.invalid", 80, 2, "unresolved"),
        ] {
            let answer = peer.gateway_forward(&originator, host, port).await;
            let expected = if code == 1 { "not allowed" } else { "not available" };
            let told = (&answer["message"], &answer["code"], &answer["text"]);
            assert_eq!(told, (&json!(92), &json!(code), &json!(expected)), "{reason}: {answer}");
            let refused = |record: &Value| record["reason"] == reason && record["door"] == "listen";
            world.entry("agent", refused).await;
        }
        peer.echoes(&open).await;
        world.assert_well();
    })
    .await;
}

#[tokio::test]
async fn who_is_no_client_does_not_get_to_shake_hands_at_the_listener() {
    limited(60, async {
        for (line, reason) in [
            ("SSH-2.0-caponier_1 agent=acme/prod-eu/r1", "is_an_agent"),
            ("SSH-2.0-caponier_1", "is_a_gateway"),
            ("SSH-2.0-caponier_2 client", "identification"),
            ("SSH-1.5-old", "identification"),
        ] {
            let mut peer = Peer::start();
            let world = listening(&mut peer).await;
            let stream = TcpStream::connect(("127.0.0.1", world.port)).await.expect("connected");
            let (mut read, mut write) = stream.into_split();
            write.write_all(format!("{line}\r\n").as_bytes()).await.expect("written");
            let mut said = Vec::new();
            drop(timeout(SOON, read.read_to_end(&mut said)).await.expect("the end of the connection"));
            assert_eq!(said, b"", "{line}: {}", String::from_utf8_lossy(&said));
            world.entry("agent", |record| record["reason"] == reason && record["door"] == "listen").await;
        }
    })
    .await;
}
