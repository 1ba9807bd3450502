//! The picture.

use jiff::Timestamp;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row as Cells, Table, TableState};

use super::model::{Model, Sort};
use crate::cli::agents::ago;
use crate::gateway::Status;

/// Draws what is known.
pub(super) fn draw(frame: &mut Frame<'_>, model: &mut Model) {
    let area = frame.area();
    let events = match area.height {
        0..16 => 0,
        16..40 => 6,
        _ => 12,
    };
    let parts = [
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Min(1),
        Constraint::Length(events),
        Constraint::Length(1),
    ];
    let [head, sums, denials, table, happened, foot] = Layout::vertical(parts).areas(area);
    frame.render_widget(Paragraph::new(title(model)), head);
    let Some(status) = &model.status else {
        frame.render_widget(Paragraph::new(keys(model)), foot);
        return;
    };
    frame.render_widget(Paragraph::new(totals(model, status)), sums);
    frame.render_widget(Paragraph::new(denied(status)), denials);
    frame.render_widget(Paragraph::new(happenings(status, happened)), happened);
    frame.render_widget(Paragraph::new(keys(model)), foot);
    // The line of heads is not one of the table's own.
    let page = usize::from(table.height.saturating_sub(1));
    if model.opened.is_some() {
        forwards(frame, model, table);
    } else {
        agents(frame, model, table);
    }
    model.page = page;
}

fn title(model: &Model) -> Line<'static> {
    let name =
        Span::styled(format!("caponier top  {}", clean(&model.place)), Style::new().add_modifier(Modifier::BOLD));
    let told = match (&model.gone, &model.status) {
        (Some((since, why)), _) => {
            let text = format!("  GATEWAY GONE for {}s, asking again: {}", since.elapsed().as_secs(), clean(why));
            return Line::from(vec![name, Span::styled(text, alarm())]);
        }
        (None, None) => "  asking …".to_owned(),
        (None, Some(status)) => {
            format!(
                "  {}  up {}  {}",
                status.version,
                ago(&status.started.to_string(), status.time),
                clean(&status.state)
            )
        }
    };
    let mut spans = vec![name, Span::raw(told)];
    if model.status.as_ref().is_some_and(|status| !status.recording) {
        spans.push(Span::styled("  TRAIL FAILS: NOTHING OPENS", alarm()));
    }
    Line::from(spans)
}

fn totals(model: &Model, status: &Status) -> Line<'static> {
    let [to, from, opens, _] = model.rates();
    let totals = &status.totals;
    Line::from(format!(
        "links {}  forwards {}  opens {:.1}/s  to targets {}/s  from targets {}/s  failed {}",
        totals.links,
        totals.live,
        opens,
        bytes(to),
        bytes(from),
        totals.failed
    ))
}

fn denied(status: &Status) -> Line<'static> {
    let denied = &status.totals.denied;
    let sum: u64 = denied.values().sum();
    let mut reasons: Vec<_> = denied.iter().collect();
    reasons.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let reasons: Vec<_> = reasons.iter().map(|(reason, count)| format!("{} {count}", clean(reason))).collect();
    let list = if reasons.is_empty() { String::new() } else { format!(": {}", reasons.join(", ")) };
    Line::from(format!("logins refused {}  denied {sum}{list}", status.totals.refused))
}

fn agents(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let rows = model.rows();
    let head = |text: &'static str, sort: Sort| {
        let mark = if model.sort == sort { if model.reversed { "^" } else { "*" } } else { "" };
        Cell::from(format!("{text}{mark}"))
    };
    let heads = Cells::new([
        head("AGENT", Sort::Name),
        Cell::from("REPLICA"),
        head("STATE", Sort::State),
        head("LIVE", Sort::Live),
        head("TO/s", Sort::To),
        head("FROM/s", Sort::From),
        head("OPENS/s", Sort::Opens),
    ]);
    let lines = rows.iter().map(|row| {
        let carrier = &row.carrier;
        let style = match carrier.state.as_str() {
            "active" => Style::new(),
            "absent" | "never linked" => Style::new().fg(Color::Red),
            _ => Style::new().fg(Color::Yellow),
        };
        Cells::new([
            clean(&carrier.agent),
            carrier.replica.as_deref().map_or_else(|| "-".to_owned(), clean),
            clean(&carrier.state),
            carrier.live.to_string(),
            bytes(row.rates[0]),
            bytes(row.rates[1]),
            format!("{:.1}", row.rates[2]),
        ])
        .style(style)
    });
    let widths = [
        Constraint::Fill(2),
        Constraint::Fill(1),
        Constraint::Length(12),
        Constraint::Length(6),
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Length(8),
    ];
    let selected = (!rows.is_empty()).then(|| model.selected(&rows));
    show(frame, area, Table::new(lines, widths), heads, selected);
}

fn forwards(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let (Some(status), Some(agent)) = (&model.status, &model.opened) else { return };
    let [what, list] = Layout::vertical([Constraint::Length(1), Constraint::Min(1)]).areas(area);
    let more = if status.more_forwards { ", the first of more" } else { "" };
    let text = format!("{}: {} forwards{more}", clean(agent), status.forwards.len());
    frame.render_widget(Paragraph::new(text).style(Style::new().add_modifier(Modifier::BOLD)), what);
    let heads = Cells::new(["FORWARD", "PRINCIPAL", "TARGET", "DOOR", "AGE", "TO", "FROM"]);
    let lines = status.forwards.iter().map(|one| {
        Cells::new([
            one.forward.chars().take(10).collect(),
            clean(&one.principal),
            clean(&one.target),
            clean(&one.door),
            ago(&one.since.to_string(), status.time),
            bytes(one.to_target as f64),
            bytes(one.from_target as f64),
        ])
    });
    let widths = [
        Constraint::Length(10),
        Constraint::Fill(1),
        Constraint::Fill(2),
        Constraint::Length(8),
        Constraint::Length(5),
        Constraint::Length(7),
        Constraint::Length(7),
    ];
    let last = status.forwards.len().checked_sub(1);
    show(frame, list, Table::new(lines, widths), heads, last.map(|last| model.place_in_forwards.min(last)));
}

fn show(frame: &mut Frame<'_>, area: Rect, table: Table<'_>, heads: Cells<'_>, selected: Option<usize>) {
    let bar = Style::new().add_modifier(Modifier::REVERSED);
    let heads = heads.style(Style::new().add_modifier(Modifier::BOLD | Modifier::UNDERLINED));
    let mut state = TableState::new().with_selected(selected);
    frame.render_stateful_widget(table.header(heads).row_highlight_style(bar), area, &mut state);
}

fn happenings(status: &Status, area: Rect) -> Vec<Line<'static>> {
    let room = usize::from(area.height.saturating_sub(1));
    let head = Line::styled("LAST EVENTS", Style::new().add_modifier(Modifier::BOLD | Modifier::UNDERLINED));
    let line = |event: &crate::gateway::Happened| {
        let agent = event.agent.as_deref().map_or_else(String::new, |agent| format!(" {}", clean(agent)));
        let detail = if event.detail.is_empty() { String::new() } else { format!(": {}", clean(&event.detail)) };
        Line::from(format!("{} {}{agent}{detail}", clock(event.at), clean(&event.event)))
    };
    std::iter::once(head).chain(status.events.iter().take(room).map(line)).collect()
}

fn keys(model: &Model) -> Line<'static> {
    let text = match (model.typing, &model.opened) {
        (true, _) => format!("/{}_  Enter keeps it, Esc drops it", clean(&model.filter)),
        (false, Some(_)) => "q quit  Esc back  up/down".to_owned(),
        (false, None) => {
            let filter = if model.filter.is_empty() { String::new() } else { format!("={}", clean(&model.filter)) };
            let left_out = model.status.as_ref().map_or(0, |status| status.left_out);
            let more = if left_out == 0 { String::new() } else { format!("  {left_out} more agents not shown") };
            format!("q quit  up/down  Enter forwards  s sort  r reverse  / filter{filter}{more}")
        }
    };
    Line::styled(text, Style::new().add_modifier(Modifier::DIM))
}

fn alarm() -> Style {
    Style::new().fg(Color::Red).add_modifier(Modifier::BOLD)
}

/// The time of day, in UTC as in the trail.
fn clock(at: Timestamp) -> String {
    at.to_string().get(11..19).unwrap_or("-").to_owned()
}

/// A text from outside, without what a terminal would take for more than a text.
pub(super) fn clean(text: &str) -> String {
    let unsafe_char = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    text.chars().map(|c| if unsafe_char(c) { '\u{fffd}' } else { c }).collect()
}

/// A number of bytes in at most six characters.
pub(super) fn bytes(number: f64) -> String {
    let mut number = number;
    for unit in ["", "k", "M", "G", "T"] {
        if number < 999.5 {
            return match unit {
                "" => format!("{number:.0}"),
                _ if number < 9.95 => format!("{number:.1}{unit}"),
                _ => format!("{number:.0}{unit}"),
            };
        }
        number /= 1_000.0;
    }
    format!("{number:.0}P")
}
