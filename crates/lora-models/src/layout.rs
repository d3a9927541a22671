//! Where the tokens of a batch stand, and what each of them may see.

use burn::tensor::{Bool, Device, Tensor, TensorData};

use crate::error::{ErrorKind, Result};

/// Several texts in one row of a batch, one after the other, so that short texts waste no row.
///
/// Each text has positions of its own, from 0, and sees nothing of its neighbours. What is left at the
/// end of a row is padding, which no text sees.
///
/// ```
/// use lora_models::Packing;
///
/// // Two rows of 8 tokens: texts of 3 and 5 tokens, and one of 4 with padding behind it.
/// let packing = Packing::new(&[vec![3, 5], vec![4]], 8)?;
/// assert_eq!(packing.positions(), [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2, 3]);
/// # Ok::<(), lora_models::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packing {
    length: usize,
    positions: Vec<u32>, // rows * length
    texts: Vec<u32>,     // rows * length; which text of its row a token belongs to
}

impl Packing {
    /// Texts of the given lengths in each row of `length` tokens.
    ///
    /// # Errors
    /// When there is no row, a text is empty, or a row's texts are longer than `length`.
    pub fn new(rows: &[Vec<usize>], length: usize) -> Result<Self> {
        let argument = |expected: String, found: String| {
            Err(ErrorKind::Argument { what: "packing", expected, found }.into())
        };
        if rows.is_empty() || length == 0 {
            return argument("at least one row of at least one token".into(), "none".into());
        }
        let (mut positions, mut texts) = (Vec::new(), Vec::new());
        for (row, lengths) in rows.iter().enumerate() {
            let total = lengths.iter().try_fold(0_usize, |sum, text| sum.checked_add(*text));
            if lengths.contains(&0) || total.is_none_or(|total| total > length) {
                let expected = format!("texts above 0 tokens, together at most {length}");
                return argument(expected, format!("{lengths:?} in row {row}"));
            }
            let rest = length - total.unwrap_or(0);
            let parts = lengths.iter().copied().chain((rest > 0).then_some(rest));
            for (text, tokens) in parts.enumerate() {
                positions.extend(0..tokens as u32);
                texts.extend(std::iter::repeat_n(text as u32, tokens));
            }
        }
        Ok(Self { length, positions, texts })
    }

    /// Each row's text as long as the row; `starts` says how many tokens of padding stand before it.
    pub(crate) fn behind_padding(starts: &[usize], length: usize) -> Self {
        let (mut positions, mut texts) = (Vec::new(), Vec::new());
        for &start in starts {
            let start = start.min(length);
            positions.extend((0..start).map(|_| 0));
            positions.extend(0..(length - start) as u32);
            texts.extend(std::iter::repeat_n(0, start));
            texts.extend(std::iter::repeat_n(1, length - start));
        }
        Self { length, positions, texts }
    }

    /// Each token's position in its text, row after row.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.positions.len() / self.length
    }

    /// Tokens in a row.
    pub fn row_length(&self) -> usize {
        self.length
    }

    /// The same from column `start`.
    pub(crate) fn positions_from(&self, start: usize) -> Vec<u32> {
        self.positions.chunks(self.length).flat_map(|row| row[start..].iter().copied()).collect()
    }
}

/// Which of the `seen + length` keys each of the newest `length` queries may *not* look at:
/// `[1 or rows, 1, length, seen + length]`, one byte for each pair, shared by all heads. `None` for a
/// single query of a plain row, from which nothing is hidden but what lies before its window.
pub(crate) fn hidden_keys(
    packing: Option<&Packing>,
    window: Option<usize>,
    seen: usize,
    length: usize,
    device: &Device,
) -> Option<Tensor<4, Bool>> {
    let total = seen + length;
    let narrow = window.filter(|window| *window < total);
    if packing.is_none() && length == 1 {
        return None;
    }
    let rows = packing.map_or(1, Packing::rows);
    let mut hidden = vec![true; rows * length * total];
    for (line, allowed) in hidden.chunks_mut(total).enumerate() {
        let (row, query) = (line / length, seen + line % length);
        let first = narrow.map_or(0, |window| (query + 1).saturating_sub(window));
        let keys = first..=query;
        match packing {
            None => allowed[keys].fill(false),
            Some(packing) => {
                let texts = &packing.texts[row * packing.length..][..total];
                for key in keys {
                    allowed[key] = texts[key] != texts[query];
                }
            }
        }
    }
    let data = TensorData::new(hidden, [rows, 1, length, total]);
    Some(Tensor::from_data(data, device))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each query sees, as a picture: a row of the batch, then its queries.
    fn picture(
        packing: Option<&Packing>,
        window: Option<usize>,
        seen: usize,
        length: usize,
    ) -> Vec<String> {
        let device = lora_core::device_from_env().unwrap();
        let Some(mask) = hidden_keys(packing, window, seen, length, &device) else {
            return vec![];
        };
        let data = mask.into_data();
        let hidden: Vec<bool> = data.iter::<bool>().collect();
        let line =
            |line: &[bool]| line.iter().map(|hidden| if *hidden { '.' } else { 'x' }).collect();
        hidden.chunks(seen + length).map(line).collect()
    }

    #[test]
    fn a_query_sees_itself_and_what_is_before() {
        assert_eq!(picture(None, None, 0, 3), ["x..", "xx.", "xxx"]);
        assert_eq!(picture(None, None, 2, 2), ["xxx.", "xxxx"]);
        assert!(picture(None, None, 5, 1).is_empty());
    }

    #[test]
    fn a_window_hides_the_oldest() {
        assert_eq!(picture(None, Some(2), 0, 4), ["x...", "xx..", ".xx.", "..xx"]);
        assert_eq!(picture(None, Some(2), 2, 2), [".xx.", "..xx"]);
        assert!(picture(None, Some(2), 3, 1).is_empty());
    }

    #[test]
    fn texts_in_a_row_do_not_see_each_other() {
        let packing = Packing::new(&[vec![2, 1], vec![3]], 4).unwrap();
        assert_eq!(
            picture(Some(&packing), None, 0, 4),
            ["x...", "xx..", "..x.", "...x", "x...", "xx..", "xxx.", "...x"]
        );
        assert_eq!(packing.positions(), [0, 1, 0, 0, 0, 1, 2, 0]);
    }

    #[test]
    fn padding_before_a_text_is_not_seen_by_it() {
        let packing = Packing::behind_padding(&[2, 0], 4);
        assert_eq!(packing.positions(), [0, 0, 0, 1, 0, 1, 2, 3]);
        assert_eq!(picture(Some(&packing), None, 3, 1), ["..xx", "xxxx"]);
        assert_eq!(packing.positions_from(3), [1, 3]);
    }

    #[test]
    fn texts_that_do_not_fit_are_errors() {
        for rows in [vec![], vec![vec![3, 2]], vec![vec![0]], vec![vec![usize::MAX, 2]]] {
            assert!(Packing::new(&rows, 4).is_err(), "{rows:?}");
        }
        assert!(Packing::new(&[vec![]], 4).is_ok(), "a row of padding");
        assert!(Packing::new(&[vec![1]], 0).is_err());
    }
}
