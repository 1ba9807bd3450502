//! Trails for `scripts/bench` and `scripts/soak`: large ones, with their chain and their time index.
//!
//! ```text
//! trail make FILE MIB HOURS      a gateway's trail of so many MiB that tells of so many hours, and FILE.index; prints, as JSON,
//!                                a principal and an hour in the middle, and how many records there are of each
//! trail write FILE COUNT WORKERS records so many forwards, so many at a time, and prints the microseconds of processor time that
//!                                each took: making the records, their chain, waking the writer, writing. FILE `-` is no trail
//!                                at all, for comparison
//! ```

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use caponier::audit::chain::{Chain, TrailId};
use caponier::audit::read::files::index_of;
use caponier::audit::read::index::Entry;
use caponier::audit::sink::NoNetwork;
use caponier::audit::{Counters, Opening, Side, Sinks, Trail};
use caponier::task::Tasks;
use jiff::{SignedDuration, Timestamp};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["make", file, mib, hours] => make(Path::new(file), mib.parse::<u64>()? << 20, hours.parse()?),
        ["write", file, count, workers] => write(Path::new(file), count.parse()?, workers.parse()?),
        _ => Err("usage: see the head of benches/trail.rs".into()),
    }
}

/// About what the opening and the end of a forward take.
const PAIR_BYTES: u64 = 1_100;
const PRINCIPALS: u64 = 500;
const INDEX_STEP: u64 = 1 << 20;

fn make(path: &Path, bytes: u64, hours: u32) -> Result<(), Box<dyn Error>> {
    let trail = TrailId::generate()?;
    let mut chain = Chain::begin(&trail);
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let begin: Timestamp = "2026-03-01T00:00:00Z".parse()?;
    let span = i64::from(hours) * 3_600_000;
    let pairs = bytes / PAIR_BYTES;
    let hour = i64::from(hours / 2) * 3_600_000..i64::from(hours / 2 + 1) * 3_600_000;
    let wanted = PRINCIPALS / 2;
    let (mut index, mut offset, mut indexed) = (Vec::new(), 0_u64, 0_u64);
    let mut times = Some((begin.as_millisecond(), begin.as_millisecond()));
    let (mut records, mut of_principal, mut of_hour) = (0_u64, 0_u64, 0_u64);
    let mut number = 0_u64;
    let mut line = Vec::new();
    writeln!(
        line,
        "{{\"v\":1,\"time\":\"{begin:.3}\",\"event\":\"trail.started\",\"side\":\"gateway\",\"trail\":\"{trail}\",\
         \"version\":\"0.1.0\",\"pid\":1}}"
    )?;
    chain.link(&mut line);
    out.write_all(&line)?;
    offset += line.len() as u64;
    records += 1;
    of_hour += u64::from(hour.contains(&0));
    while offset < bytes {
        // Openings and ends of several forwards lie between each other, as in life.
        let after =
            |forward: u64| i64::try_from(u128::from(forward) * span.unsigned_abs() as u128 / u128::from(pairs.max(1)));
        let mut put = |forward: u64, ends: bool| -> Result<(), Box<dyn Error>> {
            let ms = after(forward + if ends { BETWEEN } else { 0 })?;
            let time = begin + SignedDuration::from_millis(ms);
            let principal = forward.wrapping_mul(0x9e37_79b9_7f4a_7c15) % PRINCIPALS;
            line.clear();
            write!(
                line,
                "{{\"v\":1,\"time\":\"{time:.3}\",\"event\":\"forward.{}\",\"side\":\"gateway\",\"forward\":\"{:016x}\",{}\
                 \"organisation\":\"acme\",\"agent\":\"prod-{}\",{}\"principal\":\"user-{principal}\",\
                 \"key\":\"SHA256:2jmj7l5rSw0yVb/vlWAYkK/YBwk3vuT{principal:03}yqQzZxxOIk\",\"client\":\"192.0.2.{}:{}\",\
                 \"door\":\"ssh\",\"target\":\"orders-{}.db.internal:5432\",\"rule\":\"orders-db\"",
                if ends { "ended" } else { "open" },
                forward.wrapping_mul(0x2545_f491_4f6c_dd1d),
                if ends { format!("\"peer_forward\":\"{:016x}\",", !forward) } else { String::new() },
                forward % 7,
                if ends { "\"replica\":\"one\"," } else { "" },
                forward % 250,
                1_024 + forward % 60_000,
                forward % 40,
            )?;
            if ends {
                write!(
                    line,
                    ",\"to_target\":{},\"from_target\":{},\"duration_ms\":{},\"reason\":\"eof\"",
                    forward % 100_000,
                    forward % 10_000_000,
                    after(BETWEEN)?
                )?;
            }
            line.extend_from_slice(b"}\n");
            chain.link(&mut line);
            out.write_all(&line)?;
            offset += line.len() as u64;
            records += 1;
            of_principal += u64::from(principal == wanted);
            of_hour += u64::from(hour.contains(&ms));
            let time = time.as_millisecond();
            times = Some(times.map_or((time, time), |(least, most)| (least.min(time), most.max(time))));
            if offset - indexed >= INDEX_STEP
                && let Some((earliest, latest)) = times.take()
            {
                index.extend_from_slice(&Entry { end: offset, earliest, latest }.encode());
                indexed = offset;
            }
            Ok(())
        };
        put(number, false)?;
        if let Some(forward) = number.checked_sub(BETWEEN) {
            put(forward, true)?;
        }
        number += 1;
    }
    out.flush()?;
    fs::write(index_of(path), index)?;
    let moment = |ms: i64| format!("{:.3}", begin + SignedDuration::from_millis(ms));
    let told = json!({
        "records": records, "bytes": offset, "principal": format!("user-{wanted}"), "of_principal": of_principal,
        "since": moment(hour.start), "until": moment(hour.end), "of_hour": of_hour,
    });
    println!("{told}");
    Ok(())
}

/// How many other forwards begin before one ends.
const BETWEEN: u64 = 20;

#[tokio::main(flavor = "current_thread")]
async fn write(path: &Path, count: u64, workers: u64) -> Result<(), Box<dyn Error>> {
    let tasks = Tasks::new();
    let trail = match path.as_os_str() == "-" {
        true => None,
        false => Some(Trail::start(Sinks::file(path), Side::Gateway, Arc::new(NoNetwork), &tasks).await?),
    };
    let spent = || {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        Duration::from_secs(time.tv_sec.unsigned_abs()) + Duration::from_nanos(time.tv_nsec.unsigned_abs())
    };
    let before = spent();
    let workers = (0..workers).map(|worker| {
        let trail = trail.clone();
        tasks.spawn(async move {
            for number in 0..count / workers {
                let opening = opening(worker, number);
                let Some(trail) = &trail else {
                    tokio::task::yield_now().await;
                    drop(opening);
                    continue;
                };
                let mut entry = trail.open(opening).await.expect("recorded");
                entry.established(Some(([10, 20, 0, 5], 5432).into()));
                entry.finish(Counters::default().ended("eof"));
            }
        })
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await?;
    }
    if let Some(trail) = trail {
        trail.close().await?;
    }
    println!("{:.2}", (spent() - before).as_secs_f64() * 1e6 / count as f64);
    Ok(())
}

/// What is known of a forward that comes through the SSH door.
fn opening(worker: u64, number: u64) -> Opening {
    Opening {
        forward: format!("{worker:04x}{number:012x}"),
        organisation: "acme".parse().ok(),
        agent: "prod-eu".parse().ok(),
        principal: "provisioner".parse().ok(),
        key: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU".parse().ok(),
        client: Some(format!("192.0.2.17:{}", 1_024 + number % 60_000)),
        door: Some("ssh"),
        target: "orders.db.internal:5432".to_owned(),
        rule: Some("orders-db".to_owned()),
        ..Opening::default()
    }
}
