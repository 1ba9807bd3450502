//! Operators, peers and clocks at their worst, around links that restart, drain, reload and are many.

use std::fs;

use serde_json::json;
use tokio::time::Instant;

use crate::harness::{PATIENCE, Side, Site, connect, echo, echoes, eventually};

#[tokio::test]
async fn fifty_hangups_in_a_row_cost_no_forward_and_end_with_the_newest_configuration() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, b"before").await;
    for side in [Side::Agent, Side::Gateway] {
        let good = fs::read_to_string(site.config(side)).expect("a configuration");
        // Something comes and goes that has nothing to do with the forward; and now and then nothing can be read.
        let other = match side {
            Side::Agent => {
                format!(
                    "{good}\n[[organisation.allow]]\nname = \"other\"\naddresses = [\"10.9.9.9/32\"]\nports = [1]\n"
                )
            }
            Side::Gateway => {
                let local = "[[local]]\nlisten = \"127.0.0.1:0\"\nagent = \"acme/prod-eu\"\n\
                             target = \"10.9.9.9:1\"\nprincipal = \"provisioner\"\n";
                format!("{good}\n{local}")
            }
        };
        let marks = json!({"event": "config.reloaded"});
        let began = Instant::now();
        for round in 0..50 {
            let text = match round % 5 {
                0 | 3 => &other,
                1 | 4 => &good,
                _ => "[",
            };
            fs::write(site.config(side), text).expect("written");
            site.program(side).signal("HUP");
            if round % 10 == 0 {
                echoes(&mut stream, b"meanwhile").await;
                echoes(connect(site.doors[0]).await, b"anew").await;
            }
        }
        // What was written last is what holds in the end, whenever it was read: soon a request finds nothing to change.
        fs::write(site.config(side), &other).expect("written");
        site.program(side).signal("HUP");
        let mut asked = 51;
        loop {
            assert!(began.elapsed() < PATIENCE, "{side:?} never has the newest configuration");
            let before = site.records(side, &marks).len();
            site.program(side).signal("HUP");
            asked += 1;
            let last =
                eventually("a reload", async || site.records(side, &marks).into_iter().skip(before).last()).await;
            if last["detail"] == "nothing changed" {
                break;
            }
        }
        let all = site.records(side, &marks).len() + site.records(side, &json!({"event": "config.rejected"})).len();
        assert!(all <= asked, "{side:?}: {all} reloads for {asked} signals");
        echoes(&mut stream, b"and after").await;
        echoes(connect(site.doors[0]).await, b"anew").await;
    }
    assert_eq!(site.records(Side::Agent, &json!({"event": "link.up"})).len(), 1, "the link is the same");
    assert_eq!(site.records(Side::Gateway, &json!({"event": "forward.failed"})).len(), 0);
    drop(stream);
    site.stop().await;
}
