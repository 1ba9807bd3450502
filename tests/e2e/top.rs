//! `caponier top`, on a real terminal: that of tmux.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;
use tempfile::TempDir;
use tokio::process::Command;

use crate::harness::{Side, Site, caponier, connect, echo, echoes, eventually, run};

/// A terminal of tmux, on a server of its own.
struct Screen {
    socket: PathBuf,
    dir: TempDir,
}

impl Screen {
    async fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("caponier-tmux-").tempdir().expect("a folder");
        let screen = Self { socket: dir.path().join("tmux.sock"), dir };
        let shell = ["new-session", "-d", "-x", "80", "-y", "24", "env PS1='ready> ' sh"];
        assert_eq!(run(screen.tmux().args(["-f", "/dev/null"]).args(shell)).await.code(), 0);
        screen.shows("ready>").await;
        screen
    }

    fn tmux(&self) -> Command {
        let mut command = Command::new("tmux");
        command.env("TERM", "xterm").env_remove("TMUX").arg("-S").arg(&self.socket);
        command
    }

    async fn keys(&self, keys: &[&str]) {
        assert_eq!(run(self.tmux().arg("send-keys").args(keys)).await.code(), 0);
    }

    /// Types a command.
    async fn types(&self, command: &str) {
        self.keys(&["-l", command]).await;
        self.keys(&["Enter"]).await;
    }

    async fn text(&self) -> String {
        run(self.tmux().args(["capture-pane", "-p"])).await.done()
    }

    async fn shows(&self, text: &str) -> String {
        self.shows_all(&[text]).await
    }

    /// Waits until all of them stand there at once: a picture comes piece by piece.
    async fn shows_all(&self, texts: &[&str]) -> String {
        let mut last = String::new();
        let found = tokio::time::timeout(crate::harness::PATIENCE, async {
            loop {
                last = self.text().await;
                if texts.iter().all(|text| last.contains(text)) {
                    return;
                }
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        })
        .await;
        assert!(found.is_ok(), "{texts:?} are not all shown: {last}");
        last
    }

    /// What `stty -a` says of the terminal, in a file.
    async fn settings(&self, name: &str) -> String {
        let file = self.dir.path().join(name);
        self.types(&format!("stty -a > {0}.new && mv {0}.new {0}", file.display())).await;
        eventually("the terminal's settings", async || std::fs::read_to_string(&file).ok()).await
    }

    /// The process that is called so, below the terminal's shell.
    async fn child(&self) -> String {
        let shell = run(self.tmux().args(["display-message", "-p", "#{pane_pid}"])).await.done();
        eventually("the program", async || {
            let told = run(Command::new("pgrep").args(["-P", shell.trim()])).await.stdout;
            let first = told.lines().next()?.to_owned();
            Some(first)
        })
        .await
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let done = std::process::Command::new("tmux")
            .arg("-S")
            .arg(&self.socket)
            .arg("kill-server")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        drop(done);
    }
}

fn command(socket: &Path) -> String {
    format!("{} top --socket {}", caponier().as_std().get_program().to_string_lossy(), socket.display())
}

#[tokio::test]
async fn it_shows_agents_and_forwards_and_gives_the_terminal_back() {
    let target = echo().await;
    let mut site = Site::plan().allow(target).door(target).door("10.9.9.9:1").start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, &[1; 200_000]).await;
    let screen = Screen::start().await;
    let before = screen.settings("before").await;

    screen.types(&command(&site.admin_socket())).await;
    let told = ["caponier top", "serving", "links 1  forwards 1", "LIVE", "OPENS/s", "active", "link.up", "q quit"];
    let text = screen.shows_all(&[&told[..], &["acme/prod-eu"]].concat()).await;
    assert!(!text.contains(&target.to_string()), "targets are shown on request: {text}");
    // What is denied by the agent's owner shows.
    drop(connect(site.doors[1]).await);
    screen.shows("forward.denied").await;
    screen.keys(&["Enter"]).await;
    let target = target.to_string();
    screen.shows_all(&["acme/prod-eu: 1 forwards", "provisioner", "PRINCIPAL", "200k", &target]).await;
    screen.keys(&["Escape"]).await;
    screen.shows("OPENS/s").await;
    // A larger window, and a small one.
    for (columns, lines) in [(150, 50), (60, 12), (80, 24)] {
        let (wide, high) = (columns.to_string(), lines.to_string());
        let resized = run(screen.tmux().args(["resize-window", "-x", &wide, "-y", &high])).await;
        assert_eq!(resized.code(), 0, "{resized:?}");
        eventually("a picture of that size", async || {
            let text = screen.text().await;
            let last = text.lines().last().unwrap_or_default();
            (text.lines().count() == lines && last.starts_with("q quit")).then_some(())
        })
        .await;
    }
    // A gateway that is away and comes back.
    drop(stream);
    site.program(Side::Gateway).kill().await;
    screen.shows("GATEWAY GONE").await;
    site.restart_gateway().await;
    eventually("the gateway is back", async || (!screen.text().await.contains("GONE")).then_some(())).await;
    screen.keys(&["q"]).await;
    screen.shows("ready>").await;
    assert_eq!(screen.settings("after-q").await, before);

    for end in ["C-c", "TERM", "HUP", "INT"] {
        screen.types(&command(&site.admin_socket())).await;
        screen.shows("q quit").await;
        if end == "C-c" {
            screen.keys(&["C-c"]).await;
        } else {
            let pid = screen.child().await;
            assert_eq!(run(Command::new("kill").args([&format!("-{end}"), pid.as_str()])).await.code(), 0);
        }
        eventually("the shell is back", async || (!screen.text().await.contains("q quit")).then_some(())).await;
        assert_eq!(screen.settings(&format!("after-{end}")).await, before, "{end}");
    }

    // The terminal goes away under it.
    screen.types(&command(&site.admin_socket())).await;
    screen.shows("q quit").await;
    let pid = screen.child().await;
    drop(screen);
    // Whoever inherits it may never ask how it ended.
    let ended = || std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "));
    eventually("its end", async || ended().then_some(())).await;
    site.stop().await;
}

#[tokio::test]
async fn a_picture_and_json_need_no_terminal() {
    let target = echo().await;
    let site = Site::plan().allow(target).door(target).start().await;
    let mut stream = connect(site.doors[0]).await;
    echoes(&mut stream, &[1; 50_000]).await;
    let top = |arguments: &[&str]| {
        let mut command = caponier();
        command.arg("top").arg("--socket").arg(site.admin_socket()).args(arguments);
        command
    };
    let text = run(&mut top(&["--once"])).await.done();
    assert!(text.lines().count() == 24 && text.contains("acme/prod-eu") && text.contains("forwards 1"), "{text}");
    let text = run(&mut top(&["--once", "--agent", "acme/prod-eu", "--size", "120x30"])).await.done();
    assert!(text.lines().count() == 30 && text.contains(&target.to_string()), "{text}");
    let told: Value =
        serde_json::from_str(&run(&mut top(&["--json", "--agent", "acme/prod-eu"])).await.done()).expect("JSON");
    assert_eq!(told["totals"]["live"], 1);
    assert_eq!(told["agents"][0]["to_target"], 50_000);
    assert_eq!(told["forwards"][0]["principal"], "provisioner");
    assert_eq!(told["forwards"][0]["target"], target.to_string());
    drop(stream);
    let ended = eventually("the forward's end", async || {
        let told: Value = serde_json::from_str(&run(&mut top(&["--json"])).await.done()).expect("JSON");
        (told["totals"]["live"] == 0).then_some(told)
    })
    .await;
    assert_eq!((&ended["totals"]["opened"], &ended["totals"]["from_target"]), (&1.into(), &50_000.into()), "{ended}");
    let said = run(&mut top(&[])).await;
    assert!(said.code() == 2 && said.stderr.contains("--once"), "{said:?}");
    let said = run(caponier().args(["top", "--once", "--socket", "/nonexistent/socket"])).await;
    assert_eq!(said.code(), 1, "{said:?}");
    site.stop().await;
}
