//! A proxy in a folder of its own, with all that it needs.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{self, LISTENING, Program, Side, caponier, checked_record, connect, eventually, within};

/// A folder, and what runs in it.
pub(crate) struct Place {
    // Dropped in this order: the program ends before its folder goes.
    program: Option<Program>,
    /// Where the listeners are, in the order of the configuration.
    pub(crate) listeners: Vec<SocketAddr>,
    /// Where the health endpoint is.
    pub(crate) health: Option<SocketAddr>,
    dir: TempDir,
    starts: usize,
}

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("caponier-proxy-").tempdir().expect("a folder");
        Self { program: None, listeners: Vec::new(), health: None, dir, starts: 0 }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.path().join("proxy.toml")
    }

    /// Writes a configuration: `settings` for `[proxy]`, and tables.
    pub(crate) fn write(&self, settings: &str, tables: &str) {
        let text = format!("[proxy]\n{settings}\n[audit]\nfile = \"trail.jsonl\"\n{tables}");
        fs::write(self.config(), text).expect("written");
    }

    /// Starts the proxy, and waits until it listens at so many places.
    pub(crate) async fn start(&mut self, listeners: usize) {
        self.starts += 1;
        let mut command = caponier();
        command.arg("proxy").arg("--config").arg(self.config()).env("CAPONIER_LOG", "warn,caponier=debug");
        let log = self.path().join(format!("proxy.{}.log", self.starts));
        let mut program = Program::start("proxy", command, &log);
        program.says("proxy started").await;
        self.program = Some(program);
        self.listens_at(listeners).await;
    }

    /// Waits until it has told of so many listeners, and of its health endpoint if it has one.
    pub(crate) async fn listens_at(&mut self, listeners: usize) {
        let with_health = fs::read_to_string(self.config()).expect("a configuration").contains("health");
        let found = eventually("the proxy's listeners", async || {
            let log = self.program().log();
            let after = |line: &str, words: &str| -> Option<SocketAddr> {
                let (_, rest) = line.split_once(words)?;
                rest.split_whitespace().next()?.parse().ok()
            };
            let found: Vec<_> = log.lines().filter_map(|line| after(line, LISTENING)).collect();
            let health = log.lines().find_map(|line| after(line, " health on "));
            (found.len() >= listeners && (health.is_some() || !with_health)).then_some((found, health))
        })
        .await;
        (self.listeners, self.health) = found;
    }

    pub(crate) fn program(&mut self) -> &mut Program {
        self.program.as_mut().expect("a proxy")
    }

    pub(crate) fn trail(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.path().join("trail.jsonl")).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(checked_record).collect()
    }

    pub(crate) fn records(&self, like: &Value) -> Vec<Value> {
        let mut records = self.trail();
        records
            .retain(|record| like.as_object().expect("an object").iter().all(|(field, value)| record[field] == *value));
        records
    }

    /// Waits for a record that has all the fields of `like`, with the same values.
    pub(crate) async fn record(&self, like: Value) -> Value {
        let what = format!("a record like {like} in {:#?}", self.trail());
        eventually(&what, async || self.records(&like).into_iter().next()).await
    }

    /// SIGTERM: it must end well, and every entry of its trail have been closed once.
    pub(crate) async fn stop(mut self) {
        let code = self.program().stop().await;
        let trail = self.trail();
        harness::assert_balanced(Side::Gateway, &trail);
        assert_eq!(code, Some(0), "{}", self.program().log());
        assert!(trail.iter().all(|record| record["side"] == "proxy"), "{trail:#?}");
    }

    /// What the health endpoint says: the status, and the text.
    pub(crate) async fn health(&self, path: &str) -> (u16, String) {
        let mut stream = connect(self.health.expect("a health endpoint")).await;
        let said = ask(&mut stream, &format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")).await;
        let (head, body) = said.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{said:?}"));
        (head[9..12].parse().expect("a status"), body.to_owned())
    }
}

/// Sends `request` and reads to the end.
pub(crate) async fn ask(stream: &mut TcpStream, request: &str) -> String {
    within("the request", stream.write_all(request.as_bytes())).await.expect("written");
    String::from_utf8_lossy(&harness::read_to_end(stream).await).into_owned()
}

/// Sends `request` and reads the head of the reply, and nothing after it.
pub(crate) async fn head(stream: &mut TcpStream, request: &[u8]) -> String {
    within("the request", stream.write_all(request)).await.expect("written");
    let mut reply = Vec::new();
    while !reply.ends_with(b"\r\n\r\n") {
        match within("the reply", stream.read_u8()).await {
            Ok(byte) => reply.push(byte),
            Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&reply)),
        }
    }
    String::from_utf8_lossy(&reply).into_owned()
}
