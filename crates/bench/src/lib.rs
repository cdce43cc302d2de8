//! Results of benchmarks: rows in `target/bench/results.json`, the table in the README, and the
//! few statistics that the benchmarks share.
//!
//! Each benchmark measures in its own way and calls [`Results::merge`]; rows of the same `bar`
//! are replaced, others stay, so that one benchmark can run alone. `architect bench-table` writes
//! the README's table from the file, so that no figure there was typed by hand.

pub mod pattern;
mod samples;

pub use samples::Samples;

use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Where the README's table begins.
pub const BEGIN: &str = "<!-- bench:begin -->";
/// Where it ends.
pub const END: &str = "<!-- bench:end -->";

/// What a row promises.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// The value is at most this.
    AtMost(f64),
    /// The value is at least this.
    AtLeast(f64),
    /// Value over baseline is at most this.
    RatioAtMost(f64),
    /// Value over baseline is at least this.
    RatioAtLeast(f64),
}

/// One measured figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was measured; the row's identity.
    pub bar: String,
    /// The figure.
    pub value: f64,
    /// Its unit.
    pub unit: String,
    /// The same work done by something else in the same run, in the same unit.
    pub baseline: Option<f64>,
    /// `value / baseline`.
    pub ratio: Option<f64>,
    /// What was promised, in words; empty if nothing was.
    pub target: String,
    /// Whether that was kept; `null` if nothing was promised or there is no baseline to judge by.
    pub met: Option<bool>,
}

impl Row {
    /// The part that it is about: its name up to the first dot.
    fn part(&self) -> &str {
        self.bar.split('.').next().unwrap_or(&self.bar)
    }

    /// A row judged by its target. The ratio is left out where the baseline is zero.
    pub fn judged(
        bar: &str,
        value: f64,
        unit: &str,
        baseline: Option<f64>,
        target: Option<Target>,
    ) -> Row {
        let ratio = baseline.filter(|&baseline| baseline != 0.0).map(|baseline| value / baseline);
        let (words, met) = match target {
            None => (String::new(), None),
            Some(Target::AtMost(limit)) => {
                (format!("≤ {} {unit}", figure(limit)), Some(value <= limit))
            }
            Some(Target::AtLeast(limit)) => {
                (format!("≥ {} {unit}", figure(limit)), Some(value >= limit))
            }
            Some(Target::RatioAtMost(limit)) => {
                (format!("≤ {}× baseline", figure(limit)), ratio.map(|ratio| ratio <= limit))
            }
            Some(Target::RatioAtLeast(limit)) => {
                (format!("≥ {}× baseline", figure(limit)), ratio.map(|ratio| ratio >= limit))
            }
        };
        let (bar, unit) = (bar.to_owned(), unit.to_owned());
        Row { bar, value, unit, baseline, ratio, target: words, met }
    }
}

impl std::fmt::Display for Row {
    /// One line for people.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mark = match self.met {
            None => " ",
            Some(true) => "+",
            Some(false) => "!",
        };
        write!(f, "{mark} {}: {} {}", self.bar, figure(self.value), self.unit)?;
        if let Some(baseline) = self.baseline {
            write!(f, ", baseline {}", figure(baseline))?;
        }
        if !self.target.is_empty() {
            write!(f, " ({})", self.target)?;
        }
        Ok(())
    }
}

/// Why results could not be kept or shown.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A file could not be read or written.
    #[error("{operation} {}: {source}", path.display())]
    File {
        /// What was attempted.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The results are not results.
    #[error("{} does not hold benchmark results ({source}); delete it and measure again", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// The README has no place for the table.
    #[error("{} has no line {BEGIN} with a line {END} after it", path.display())]
    NoMarkers {
        /// Which file.
        path: PathBuf,
    },
}

/// The rows of `target/bench/results.json`: a JSON list, sorted by `bar`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Results(pub Vec<Row>);

impl Results {
    /// Reads `path`; a file that does not exist holds no rows.
    pub fn read(path: &Path) -> Result<Results, BenchError> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Results::default()),
            Err(source) => return Err(file("read", path, source)),
        };
        let rows = serde_json::from_slice(&text)
            .map_err(|source| BenchError::Unreadable { path: path.into(), source })?;
        Ok(Results(rows))
    }

    /// Replaces rows of the same `bar` in the file at `path`, keeps the others, and returns all.
    /// The file is replaced as a whole, never half written.
    pub fn merge(path: &Path, rows: &[Row]) -> Result<Results, BenchError> {
        let mut results = Results::read(path)?;
        results.0.retain(|old| rows.iter().all(|row| row.bar != old.bar));
        results.0.extend_from_slice(rows);
        results.write(path)?;
        Ok(results)
    }

    /// Takes out of the file at `path` the rows of which `measured` says that they should have been
    /// measured now, and that are not among `bars`: their bars do not exist any more.
    pub fn retire(
        path: &Path,
        bars: &[String],
        measured: impl Fn(&str) -> bool,
    ) -> Result<(), BenchError> {
        let mut results = Results::read(path)?;
        results.0.retain(|row| bars.contains(&row.bar) || !measured(&row.bar));
        results.write(path)
    }

    fn write(&mut self, path: &Path) -> Result<(), BenchError> {
        self.0.sort_by(|a, b| a.bar.cmp(&b.bar));
        let mut text = serde_json::to_string_pretty(&self.0)
            .map_err(|source| BenchError::Unreadable { path: path.into(), source })?;
        text.push('\n');
        replace(path, &text)
    }

    /// Prints those of `rows` whose names begin with `only`, merges them into the file at `path`, and
    /// adds their names to `bars`. True if every promise among them was kept.
    pub fn report(
        path: &Path,
        mut rows: Vec<Row>,
        only: &str,
        bars: &mut Vec<String>,
    ) -> Result<bool, BenchError> {
        rows.retain(|row| row.bar.starts_with(only));
        rows.iter().for_each(|row| println!("   {row}"));
        Results::merge(path, &rows)?;
        bars.extend(rows.iter().map(|row| row.bar.clone()));
        Ok(rows.iter().all(|row| row.met != Some(false)))
    }

    /// The table in Markdown: the bars that promise something; the others are in the file.
    ///
    /// What was missed stands first and open; then each part has its table, folded.
    pub fn markdown(&self) -> String {
        let promises: Vec<&Row> = self.0.iter().filter(|row| row.met.is_some()).collect();
        let mut out = String::new();
        let missed: Vec<&Row> =
            promises.iter().copied().filter(|row| row.met == Some(false)).collect();
        if !missed.is_empty() {
            out += &format!("Not kept:\n\n{}\n", table(&missed));
        }
        for part in promises.chunk_by(|a, b| a.part() == b.part()) {
            let kept = part.iter().filter(|row| row.met == Some(true)).count();
            out += &format!(
                "<details><summary><b>{}</b>: {kept} of {} promises kept</summary>\n\n{}\n</details>\n",
                part[0].part(),
                part.len(),
                table(part)
            );
        }
        out
    }
}

fn table(rows: &[&Row]) -> String {
    let mut out = String::from(
        "| what | measured | baseline | ratio | target | met |\n|---|---:|---:|---:|---|---|\n",
    );
    for row in rows {
        let unit = &row.unit;
        let baseline =
            row.baseline.map_or("–".into(), |value| format!("{} {unit}", figure(value)));
        let ratio = row.ratio.map_or("–".into(), |ratio| format!("{ratio:.2}"));
        let target = if row.target.is_empty() { "–" } else { &row.target };
        let met = if row.met == Some(false) { "**no**" } else { "yes" };
        let bar = row.bar.replace('|', "\\|");
        let value = figure(row.value);
        out += &format!("| {bar} | {value} {unit} | {baseline} | {ratio} | {target} | {met} |\n");
    }
    out
}

/// Replaces what stands between the markers in `readme` by the table. True if it changed.
pub fn update_readme(readme: &Path, results: &Results) -> Result<bool, BenchError> {
    let text = fs::read_to_string(readme).map_err(|source| file("read", readme, source))?;
    let missing = || BenchError::NoMarkers { path: readme.into() };
    let begin = text.find(BEGIN).ok_or_else(missing)? + BEGIN.len();
    let end = begin + text[begin..].find(END).ok_or_else(missing)?;
    let new = format!("{}\n{}{}", &text[..begin], results.markdown(), &text[end..]);
    if new == text {
        return Ok(false);
    }
    replace(readme, &new)?;
    Ok(true)
}

fn replace(path: &Path, text: &str) -> Result<(), BenchError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let write = || {
        fs::create_dir_all(folder)?;
        let fresh = tempfile::NamedTempFile::new_in(folder)?;
        fs::write(fresh.path(), text)?;
        fs::set_permissions(fresh.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        fresh.persist(path)?;
        Ok(())
    };
    write().map_err(|source| file("write", path, source))
}

fn file(operation: &'static str, path: &Path, source: io::Error) -> BenchError {
    BenchError::File { operation, path: path.into(), source }
}

/// Three significant digits, but never fewer digits than the whole number has.
fn figure(value: f64) -> String {
    let decimals = match value.abs() {
        size if size == 0.0 || size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_judged_by_its_target() {
        let met =
            |value, baseline, target| Row::judged("b", value, "ms", baseline, Some(target)).met;
        assert_eq!(met(9.0, None, Target::AtMost(10.0)), Some(true));
        assert_eq!(met(11.0, None, Target::AtMost(10.0)), Some(false));
        assert_eq!(met(9.0, None, Target::AtLeast(10.0)), Some(false));
        assert_eq!(met(9.0, Some(20.0), Target::RatioAtMost(0.5)), Some(true));
        assert_eq!(met(9.0, Some(4.0), Target::RatioAtLeast(2.5)), Some(false));
        assert_eq!(met(9.0, None, Target::RatioAtMost(0.5)), None, "nothing to compare with");
        assert_eq!(met(9.0, Some(0.0), Target::RatioAtMost(0.5)), None);
        assert_eq!(Row::judged("b", 1.0, "ms", Some(4.0), None).ratio, Some(0.25));
    }

    #[test]
    fn merging_replaces_rows_of_the_same_bar_and_keeps_the_others() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bench/results.json");
        let row = |bar, value| Row::judged(bar, value, "ms", None, None);
        Results::merge(&path, &[row("b", 1.0), row("a", 2.0)]).unwrap();
        Results::merge(&path, &[row("b", 3.0), row("c", 4.0)]).unwrap();
        let found: Vec<_> =
            Results::read(&path).unwrap().0.into_iter().map(|r| (r.bar, r.value)).collect();
        assert_eq!(found, [("a".into(), 2.0), ("b".into(), 3.0), ("c".into(), 4.0)]);
        let json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(
            json[0],
            serde_json::json!({"bar": "a", "value": 2.0, "unit": "ms", "baseline": null,
                "ratio": null, "target": "", "met": null})
        );
    }

    #[test]
    fn bars_that_are_not_measured_any_more_are_taken_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.json");
        let row = |bar| Row::judged(bar, 1.0, "ms", None, None);
        Results::merge(&path, &[row("a.old"), row("b.other")]).unwrap();
        let mut bars = Vec::new();
        Results::report(&path, vec![row("a.new"), row("b.not-asked-for")], "a.", &mut bars)
            .unwrap();
        Results::retire(&path, &bars, |bar| bar.starts_with("a.")).unwrap();
        let left: Vec<_> = Results::read(&path).unwrap().0.into_iter().map(|r| r.bar).collect();
        assert_eq!(left, ["a.new", "b.other"]);
    }

    #[test]
    fn a_file_that_holds_something_else_is_refused_and_left_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.json");
        fs::write(&path, "{}").unwrap();
        let error = Results::merge(&path, &[]).unwrap_err().to_string();
        assert!(error.contains("delete it and measure again"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"{}");
    }

    #[test]
    fn the_readmes_table_is_replaced_between_its_markers_only() {
        let folder = tempfile::tempdir().unwrap();
        let readme = folder.path().join("README.md");
        fs::write(&readme, format!("before\n{BEGIN}\nold\n{END}\nafter\n")).unwrap();
        let row = Row::judged(
            "blackout.fast | 256 MiB",
            4.256,
            "ms",
            Some(48.0),
            Some(Target::RatioAtMost(0.5)),
        );
        let late = Row::judged("blackout.late", 9.0, "ms", None, Some(Target::AtMost(1.0)));
        let results = Results(vec![row, late]);
        assert!(update_readme(&readme, &results).unwrap());
        let text = fs::read_to_string(&readme).unwrap();
        let head = "<details><summary><b>blackout</b>: 1 of 2 promises kept</summary>\n\n| what";
        assert!(text.contains(head), "{text}");
        assert!(text.starts_with(&format!("before\n{BEGIN}\nNot kept:\n\n| what")), "{text}");
        assert!(text.ends_with(&format!("</details>\n{END}\nafter\n")), "{text}");
        assert_eq!(text.matches("| blackout.late |").count(), 2, "{text}");
        assert!(
            text.contains(
                "| blackout.fast \\| 256 MiB | 4.26 ms | 48 ms | 0.09 | ≤ 0.5× baseline | yes |"
            ),
            "{text}"
        );
        assert!(!update_readme(&readme, &results).unwrap(), "the same again changes nothing");
        fs::write(&readme, "no markers").unwrap();
        assert!(matches!(update_readme(&readme, &results), Err(BenchError::NoMarkers { .. })));
    }

    #[test]
    fn figures_have_the_digits_that_mean_something() {
        let texts = [0.0, 0.0123, 1.005, 12.0, 12.34, 1234.5].map(figure);
        assert_eq!(texts, ["0", "0.012", "1", "12", "12.3", "1234"]);
    }
}
