//! The date that a chat template is told.

use std::fmt::{self, Write};
use std::str::FromStr;

use chrono::format::{Item, StrftimeItems};
use chrono::{NaiveDate, NaiveDateTime};
use serde::Deserialize;

use crate::error::{Error, ErrorKind};

/// The date, and perhaps the time of day, that a chat template prints as today's.
///
/// A value that the caller chooses and not the clock's, so that the same conversation is the same
/// text tomorrow: `"2026-10-03".parse()`, or with a time `"2026-10-03T14:30:00"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct Date(NaiveDateTime);

impl FromStr for Date {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let midnight = |date: NaiveDate| date.and_hms_opt(0, 0, 0);
        let date = NaiveDate::parse_from_str(text, "%Y-%m-%d").ok().and_then(midnight);
        let date = date.or_else(|| {
            let formats = ["%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S"];
            formats.iter().find_map(|format| NaiveDateTime::parse_from_str(text, format).ok())
        });
        date.map(Self).ok_or_else(|| {
            ErrorKind::Argument {
                what: "date",
                expected: "a day such as 2026-10-03, perhaps with a time, 2026-10-03T14:30:00"
                    .to_owned(),
                found: format!("{text:?}"),
            }
            .into()
        })
    }
}

impl TryFrom<String> for Date {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.format("%Y-%m-%dT%H:%M:%S"))
    }
}

impl Date {
    /// As Python's `strftime` writes it, in English; `None` when the format has a directive that
    /// is not known.
    pub(super) fn strftime(self, format: &str) -> Option<String> {
        let format = as_chrono(format);
        let items: Vec<Item> = StrftimeItems::new(&format).collect();
        let mut text = String::new();
        // A directive that needs a time zone, which is not known here, is an error of `write!`.
        write!(text, "{}", self.0.format_with_items(items.iter())).ok()?;
        Some(text)
    }
}

/// The directives that Python understands otherwise: a fraction is of six digits, and a date without
/// a time zone has an empty one.
fn as_chrono(format: &str) -> String {
    let mut text = String::with_capacity(format.len());
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        match (c, if c == '%' { rest.next() } else { None }) {
            ('%', Some('f')) => text.push_str("%6f"),
            ('%', Some('z' | 'Z')) => {}
            (c, directive) => {
                text.push(c);
                text.extend(directive);
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_is_written_as_python_writes_it() {
        let date: Date = "2026-03-07T04:05:09".parse().unwrap();
        // datetime(2026, 3, 7, 4, 5, 9).strftime(...) of CPython 3.13 with glibc
        for (format, expected) in [
            ("%d %b %Y", "07 Mar 2026"),
            ("%d %B %Y", "07 March 2026"),
            ("%Y-%m-%d", "2026-03-07"),
            ("%A, %a, %-d, %e, %y", "Saturday, Sat, 7,  7, 26"),
            ("%H:%M:%S %I %p", "04:05:09 04 AM"),
            ("%f|%z|%Z|%%|100%% Zürich", "000000|||%|100% Zürich"),
            ("%j %U %W %w %u %G-%V", "066 09 09 6 6 2026-10"),
            ("%c|%x|%X", "Sat Mar  7 04:05:09 2026|03/07/26|04:05:09"),
            ("", ""),
        ] {
            assert_eq!(date.strftime(format).as_deref(), Some(expected), "{format}");
        }
        assert_eq!(date.strftime("%Q"), None);
        assert_eq!(date.strftime("%"), None);
    }

    #[test]
    fn a_day_begins_at_midnight() {
        let date: Date = "2026-12-31".parse().unwrap();
        assert_eq!(date.to_string(), "2026-12-31T00:00:00");
        assert_eq!("2026-12-31 00:00:00".parse::<Date>().unwrap(), date);
        assert_eq!(serde_json::from_str::<Date>("\"2026-12-31\"").unwrap(), date);
    }

    #[test]
    fn what_is_no_date_is_refused() {
        for text in ["", "2026-13-01", "2026-02-30", "today", "03.10.2026", "2026-10-03T25:00:00"] {
            let error = text.parse::<Date>().unwrap_err().to_string();
            assert!(error.contains("expected a day such as 2026-10-03"), "{error}");
            assert!(error.contains(&format!("found {text:?}")), "{error}");
        }
        assert!(serde_json::from_str::<Date>("3").is_err());
    }
}
