//! Exports traces of forwards to an OpenTelemetry collector: OTLP over HTTP/1.1, in JSON.
//!
//! Promised: a collector that is slow or away costs nothing but traces, which are counted as lost; nobody waits for it save
//! this task, and that for so long. The collector is reached in clear: it stands on the same host, or in the same network.
//!
//! Written by hand, because the crates for it bring some fifty others, for one message of a fixed form.
//!
//! A trace has the id of the gateway's forward, on both sides: what an agent exports hangs below what its gateway does. Each side's
//! span has three below it: `decide`, `open` (with its record in the trail), `splice`.

use std::io;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpStream, lookup_host};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::chain::Chain;
use crate::limits::{TRACE_BATCH, TRACE_PERIOD, TRACE_TIMEOUT};
use crate::metrics;
use crate::target::{Host, Target};
use crate::trace::{self, Forward};

/// Exports what is told, once it [runs](Exporter::run).
#[derive(Debug)]
pub struct Exporter {
    collector: Target,
    forwards: mpsc::Receiver<Forward>,
}

/// Why traces did not get to the collector.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error("could not connect")]
    Connect(#[source] io::Error),
    #[error("the collector does not speak HTTP")]
    Http(#[source] hyper::Error),
    #[error("the collector answered {0}")]
    Status(u16),
    #[error("the collector took too long")]
    Slow,
}

impl Exporter {
    /// Begins to take what is told; `None` where another one does.
    #[must_use]
    pub fn to(collector: Target) -> Option<Self> {
        Some(Self { collector, forwards: trace::export()? })
    }

    /// Exports until `stop`, and then what is left. Waits for forwards to end, for [`TRACE_PERIOD`] to be over, and for the
    /// collector.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut failing = false;
        loop {
            let mut batch = Vec::new();
            let first = tokio::select! {
                count = self.forwards.recv_many(&mut batch, TRACE_BATCH) => count,
                () = stop.cancelled() => break,
            };
            if first == 0 {
                return;
            }
            // More of them are cheaper in one message.
            let full = async {
                while batch.len() < TRACE_BATCH {
                    let room = TRACE_BATCH - batch.len();
                    if self.forwards.recv_many(&mut batch, room).await == 0 {
                        break;
                    }
                }
            };
            tokio::select! {
                _ = timeout(TRACE_PERIOD, full) => {}
                () = stop.cancelled() => {}
            }
            self.deliver(&batch, &mut failing).await;
        }
        let mut rest = Vec::new();
        while let Ok(forward) = self.forwards.try_recv() {
            rest.push(forward);
        }
        if !rest.is_empty() {
            self.deliver(&rest, &mut failing).await;
        }
    }

    async fn deliver(&self, batch: &[Forward], failing: &mut bool) {
        let message = message(batch).to_string();
        let delivered = timeout(TRACE_TIMEOUT, self.post(message)).await.unwrap_or(Err(ExportError::Slow));
        let count = batch.len() as u64;
        match delivered {
            Ok(()) => {
                metrics::TRACES.of(["exported"]).inc_by(count);
                if std::mem::take(failing) {
                    info!("traces get to the collector again");
                }
            }
            Err(error) => {
                metrics::TRACES.of(["lost"]).inc_by(count);
                let error = Chain(&error).to_string();
                // Once, and not for each message.
                if std::mem::replace(failing, true) {
                    debug!(error, "traces are still lost");
                } else {
                    warn!(collector = %self.collector, error, "traces do not get to the collector and are lost");
                }
            }
        }
    }

    async fn post(&self, message: String) -> Result<(), ExportError> {
        let host = match &self.collector.host {
            Host::Name(name) => name.to_string(),
            Host::Address(address) => address.to_string(),
        };
        let found = lookup_host((host.as_str(), self.collector.port)).await.map_err(ExportError::Connect)?;
        let addresses: Vec<_> = found.collect();
        trace::reached(&addresses);
        let stream = TcpStream::connect(&addresses[..]).await.map_err(ExportError::Connect)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(ExportError::Http)?;
        let request = Request::builder()
            .method(Method::POST)
            .uri("/v1/traces")
            .header(HOST, self.collector.to_string())
            .header(CONTENT_TYPE, "application/json")
            .header(CONNECTION, "close")
            .body(Full::new(Bytes::from(message)));
        // All of it is ours, and fits into a request.
        let Ok(request) = request else { return Ok(()) };
        let answered = sender.send_request(request);
        tokio::pin!(answered, connection);
        let response = tokio::select! {
            biased;
            response = &mut answered => response,
            _ = &mut connection => answered.await,
        };
        let status = response.map_err(ExportError::Http)?.status();
        if status.is_success() { Ok(()) } else { Err(ExportError::Status(status.as_u16())) }
    }
}

/// An `ExportTraceServiceRequest`, as the JSON form of OTLP has it: ids in hexadecimal, times as text.
fn message(batch: &[Forward]) -> Value {
    let spans: Vec<_> = batch.iter().flat_map(spans).collect();
    let side = batch.first().map_or("", |forward| forward.side);
    let version = env!("CARGO_PKG_VERSION");
    let resource = [
        attribute("service.name", &format!("caponier-{side}")),
        attribute("service.version", version),
        attribute("process.pid", &std::process::id().to_string()),
    ];
    json!({ "resourceSpans": [{
        "resource": { "attributes": resource },
        "scopeSpans": [{ "scope": { "name": "caponier", "version": version }, "spans": spans }],
    }] })
}

/// The spans of one forward; none if its id is not one of ours.
fn spans(forward: &Forward) -> Vec<Value> {
    let Some(own) = id(&forward.forward) else { return Vec::new() };
    let parent = forward.peer_forward.as_deref().and_then(id);
    // A trace's id has 16 bytes and a forward's 12, the first eight of which the gateway's span has.
    let trace = format!("{:08x}{:024x}", TRACE_PREFIX, parent.unwrap_or(own));
    let (of_gateway, of_other) = (|id: u128| (id >> 32) as u64, |id: u128| id as u64);
    let root = if forward.peer_forward.is_some() { of_other(own) } else { of_gateway(own) };
    let at = |after: Duration| nanoseconds(forward.asked + after);
    let mut attributes = vec![
        attribute("caponier.forward", &forward.forward),
        attribute("caponier.outcome", forward.outcome),
        attribute("caponier.reason", &forward.reason),
    ];
    let optional = [
        ("caponier.peer_forward", forward.peer_forward.as_deref()),
        ("caponier.organisation", forward.organisation.as_deref()),
        ("caponier.agent", forward.agent.as_deref()),
        ("caponier.door", forward.door),
    ];
    attributes.extend(optional.into_iter().filter_map(|(key, value)| Some(attribute(key, value?))));
    let failed = forward.outcome == "failed";
    let mut all = vec![json!({
        "traceId": trace,
        "spanId": hex(root),
        "name": "forward",
        "kind": SERVER,
        "startTimeUnixNano": at(Duration::ZERO),
        "endTimeUnixNano": at(forward.ended),
        "attributes": attributes,
        "status": if failed { json!({ "code": ERROR, "message": forward.reason }) } else { json!({}) },
    })];
    if let Some(parent) = parent {
        all[0]["parentSpanId"] = hex(of_gateway(parent)).into();
    }
    let end = forward.opened.unwrap_or(forward.ended);
    let was_opened = forward.outcome != "denied" || forward.opened.is_some();
    let stages = [
        Some(("decide", Duration::ZERO, forward.decided)),
        was_opened.then_some(("open", forward.decided, end)),
        forward.opened.map(|opened| ("splice", opened, forward.ended)),
    ];
    for (number, (name, begin, end)) in (1..).zip(stages).filter_map(|(number, stage)| Some((number, stage?))) {
        all.push(json!({
            "traceId": trace,
            "spanId": hex(root.wrapping_add(number)),
            "parentSpanId": hex(root),
            "name": name,
            "kind": INTERNAL,
            "startTimeUnixNano": at(begin),
            "endTimeUnixNano": at(end),
        }));
    }
    all
}

fn attribute(key: &str, value: &str) -> Value {
    json!({ "key": key, "value": { "stringValue": value } })
}

fn id(forward: &str) -> Option<u128> {
    let ours = forward.len() == 24 && forward.bytes().all(|byte| byte.is_ascii_hexdigit());
    u128::from_str_radix(forward, 16).ok().filter(|_| ours)
}

fn hex(span: u64) -> String {
    format!("{span:016x}")
}

fn nanoseconds(at: SystemTime) -> String {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos().to_string()
}

/// `cap0`: tells our traces apart in a log of many.
const TRACE_PREFIX: u32 = 0x6361_7030;

/// Numbers of the protocol.
const INTERNAL: u8 = 1;
const SERVER: u8 = 2;
const ERROR: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    fn forward() -> Forward {
        Forward {
            side: "gateway",
            forward: "0102030405060708090a0b0c".to_owned(),
            peer_forward: None,
            organisation: Some("acme".to_owned()),
            agent: Some("prod-eu".to_owned()),
            door: Some("ssh"),
            outcome: "ended",
            reason: "eof".into(),
            asked: SystemTime::UNIX_EPOCH + Duration::from_secs(1),
            decided: Duration::from_millis(1),
            opened: Some(Duration::from_millis(5)),
            ended: Duration::from_millis(9),
        }
    }

    #[test]
    fn the_two_sides_of_a_forward_are_one_trace() {
        let gateway = spans(&forward());
        let names: Vec<_> = gateway.iter().map(|span| span["name"].as_str().expect("a name")).collect();
        assert_eq!(names, ["forward", "decide", "open", "splice"]);
        assert_eq!(gateway[0]["traceId"], "636170300102030405060708090a0b0c");
        assert_eq!(gateway[0]["spanId"], "0102030405060708");
        assert_eq!(gateway[0].get("parentSpanId"), None);
        assert_eq!(gateway[3]["startTimeUnixNano"], "1005000000");
        assert_eq!(gateway[3]["endTimeUnixNano"], "1009000000");
        let agent = Forward {
            side: "agent",
            forward: "ffffffffffffffffffffffff".to_owned(),
            peer_forward: Some(forward().forward),
            ..forward()
        };
        let agent = spans(&agent);
        assert_eq!(agent[0]["traceId"], gateway[0]["traceId"]);
        assert_eq!(agent[0]["parentSpanId"], gateway[0]["spanId"]);
        let ids: std::collections::BTreeSet<_> =
            gateway.iter().chain(&agent).map(|span| span["spanId"].to_string()).collect();
        assert_eq!(ids.len(), 8, "{ids:?}");
    }

    #[test]
    fn what_did_not_open_has_no_splice_and_what_was_denied_no_open() {
        let names = |outcome| {
            let forward = Forward { outcome, opened: None, ..forward() };
            let spans = spans(&forward);
            let failed = spans[0]["status"]["code"] == ERROR;
            (spans.iter().map(|span| span["name"].to_string()).collect::<Vec<_>>().join(" "), failed)
        };
        assert_eq!(names("denied"), ("\"forward\" \"decide\"".to_owned(), false));
        assert_eq!(names("failed"), ("\"forward\" \"decide\" \"open\"".to_owned(), true));
        assert!(spans(&Forward { forward: "not ours".to_owned(), ..forward() }).is_empty());
    }
}
