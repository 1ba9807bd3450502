//! `caponier top`: what goes on in a gateway, on a terminal.
//!
//! Promised: the terminal is given back as it was, however this ends: by a key, a signal, a hang-up, an error or a panic. What
//! comes from outside is shown without its control characters. A gateway that does not answer is told of, and asked again.
//!
//! What waits on what: one thread draws, waits for keys in short turns, and between them looks whether a signal or the
//! gateway's answer has come; a gateway that is slow holds no key up.

mod model;
mod view;

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use ratatui::{DefaultTerminal, Terminal};
use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::signal::unix::{Signal, SignalKind, signal};

use model::{Model, Next};

use super::{Exit, ExitWith, print, running};
use crate::chain::Chain;
use crate::gateway;

/// Watch a gateway: its agents, their forwards and rates, denials and failures, over its admin socket.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier top
  caponier top --socket /run/caponier/gateway.sock
  caponier top --once
  caponier top --json | jq '.totals.live'

To be run as the gateway's user, or as root. A line is a link, or a registered agent without one. TO/s and FROM/s are bytes toward \
the targets and from them in the last second; OPENS/s is forwards asked for. Principals and targets are shown only for the agent \
that is opened with Enter.

Keys: up and down (or k and j) select, Enter shows the forwards of the selected agent, Esc goes back, s sorts by the next column, \
r turns the order round, / shows only agents with a text in their name, q or Ctrl-C ends it.

--once prints one picture, for pipes and tests: it takes a second, which the rates are of.")]
pub struct Args {
    /// The gateway's admin socket (`admin_socket` in its configuration).
    #[arg(long, value_name = "PATH", default_value = "/run/caponier/gateway.sock")]
    socket: PathBuf,
    /// Print one picture as text, and end.
    #[arg(long, conflicts_with = "json")]
    once: bool,
    /// Print what the gateway answers as JSON, and end.
    #[arg(long)]
    json: bool,
    /// Begin with the forwards of this agent.
    #[arg(long, value_name = "ORG/AGENT")]
    agent: Option<String>,
    /// How large the picture of --once is.
    #[arg(long, value_name = "COLUMNSxLINES", default_value = "80x24", value_parser = size, requires = "once")]
    size: (u16, u16),
}

fn size(text: &str) -> Result<(u16, u16), String> {
    let parsed = text.split_once('x').and_then(|(columns, lines)| Some((columns.parse().ok()?, lines.parse().ok()?)));
    parsed
        .filter(|(columns, lines)| (20..=500).contains(columns) && (5..=500).contains(lines))
        .ok_or_else(|| "columns and lines are wanted, such as 80x24".to_owned())
}

/// How often the gateway is asked.
const EVERY: Duration = Duration::from_secs(1);

/// How long keys are waited for before it is looked what else there is.
const TURN: Duration = Duration::from_millis(50);

/// Runs the command.
///
/// # Errors
/// If no gateway answers where one picture is wanted, or there is no terminal where one is needed.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    if let Some(agent) = &args.agent {
        agent.parse::<crate::identity::AgentName>().exit_with(Exit::Usage)?;
    }
    if args.json {
        let wanted = gateway::Wanted { agent: args.agent, after: 0 };
        let status = running::block_on(async |_| Ok(gateway::status(&args.socket, wanted).await?))?;
        print(&format!("{}\n", serde_json::to_string_pretty(&status)?))?;
        return Ok(Exit::Done.into());
    }
    let place = args.socket.display().to_string();
    let mut model = Model::new(&place, args.agent);
    if args.once {
        running::block_on(async |_| {
            for wait in [EVERY, Duration::ZERO] {
                let status = gateway::status(&args.socket, model.wanted()).await?;
                model.learn(status, Instant::now());
                tokio::time::sleep(wait).await;
            }
            Ok(())
        })?;
        print(&picture(&mut model, args.size)?)?;
        return Ok(Exit::Done.into());
    }
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(anyhow::anyhow!("this is no terminal: use --once for a picture, or --json")).exit_with(Exit::Usage);
    }
    running::run(async || watch(&args.socket, &mut model).await)?;
    Ok(Exit::Done.into())
}

/// What would be on the screen, as text.
fn picture(model: &mut Model, (columns, lines): (u16, u16)) -> anyhow::Result<String> {
    let mut terminal = Terminal::new(TestBackend::new(columns, lines))?;
    terminal.draw(|frame| view::draw(frame, model))?;
    let buffer = terminal.backend().buffer();
    let mut text = String::new();
    for row in buffer.content().chunks(usize::from(columns)) {
        let line: String = row.iter().map(ratatui::buffer::Cell::symbol).collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    Ok(text)
}

/// Takes the terminal, until the guard is dropped or something panics.
fn take() -> io::Result<(DefaultTerminal, Restore)> {
    Ok((ratatui::try_init()?, Restore))
}

/// Gives the terminal back; a panic does so by a hook of the library.
struct Restore;

impl Drop for Restore {
    fn drop(&mut self) {
        // It may be gone.
        drop(ratatui::try_restore());
    }
}

/// The signals that end it.
struct Ends([Signal; 4]);

impl Ends {
    fn new() -> io::Result<Self> {
        let kinds = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup(), SignalKind::quit()];
        let [terminate, interrupt, hangup, quit] = kinds.map(signal);
        Ok(Self([terminate?, interrupt?, hangup?, quit?]))
    }

    async fn any(&mut self) {
        let [one, two, three, four] = &mut self.0;
        tokio::select! {
            _ = one.recv() => {}
            _ = two.recv() => {}
            _ = three.recv() => {}
            _ = four.recv() => {}
        }
    }
}

async fn watch(socket: &Path, model: &mut Model) -> anyhow::Result<()> {
    let mut ends = Ends::new().context("could not listen for signals")?;
    let (mut terminal, _restore) = take().context("could not use the terminal")?;
    let mut due = Instant::now();
    let mut asking = None;
    loop {
        if asking.is_none() && Instant::now() >= due {
            due = Instant::now() + EVERY;
            asking = Some(Box::pin(gateway::status(socket, model.wanted())));
        }
        terminal.draw(|frame| view::draw(frame, model)).context("could not draw")?;
        let until = Instant::now() + TURN * 4;
        // Many keys at once are one picture; and what else has come is looked at in between.
        while Instant::now() < until {
            let answer = async {
                match &mut asking {
                    Some(asking) => asking.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = ends.any() => return Ok(()),
                answer = answer => {
                    asking = None;
                    match answer {
                        Ok(status) => model.learn(status, Instant::now()),
                        Err(error) => model.lose(&Chain(&error).to_string(), Instant::now()),
                    }
                    break;
                }
                () = tokio::time::sleep(Duration::from_millis(1)) => {}
            }
            if !keys().context("could not read from the terminal")? {
                continue;
            }
            match event::read().context("could not read from the terminal")? {
                Event::Key(key) if key.kind != KeyEventKind::Release => match model.press(key) {
                    Next::Stay => {}
                    Next::Ask => due = Instant::now(),
                    Next::End => return Ok(()),
                },
                Event::Resize(..) => terminal.autoresize().context("could not draw")?,
                _ => continue,
            }
            break;
        }
        if !io::stdout().is_terminal() {
            bail!("the terminal is gone");
        }
    }
}

/// Waits a turn for something to read. A terminal that has hung up is an error: the library would read its end for ever.
fn keys() -> io::Result<bool> {
    let stdin = io::stdin();
    let mut polled = [PollFd::new(&stdin, PollFlags::IN)];
    let turn = Timespec { tv_sec: 0, tv_nsec: TURN.subsec_nanos().into() };
    match rustix::event::poll(&mut polled, Some(&turn)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    if polled[0].revents().intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the terminal is gone"));
    }
    event::poll(Duration::ZERO)
}

#[cfg(test)]
mod tests;
