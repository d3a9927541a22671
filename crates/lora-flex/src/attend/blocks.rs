//! Attention of many queries, as in a prompt, and of queries from which some keys are hidden.

use std::marker::PhantomData;
use std::ops::Range;

use burn::tensor::{BoolStore, DType};
use gemm::Parallelism;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{Rounding, softmax, strides};
use crate::FlexTensor;
use crate::halves::widened;
use crate::product::{Matrix, gemm_accumulate_on};
use crate::weight::{Weight, tensor_of, values_of};

/// Queries whose scores are formed at a time, at least: each time, all keys that are seen are gone over.
pub(super) const FEWEST: usize = 16;

/// And at most.
pub(super) const MOST: usize = 64;

/// Scores that are formed at a time, about, so that they stay in the cache: 256 KiB.
pub(super) const SCORES: usize = 1 << 16;

/// softmax(scale q k^T) v, block by block of queries, with scores for the keys only from the first to the last that
/// one of them sees.
///
/// In half precision keys and values are copied to f32, and the output is rounded once; with `rounding`, so are the
/// product, the scores and the weights, where operations one after the other round them.
pub(super) fn attend_in_blocks<T: Weight>(
    q: &FlexTensor,
    k: &FlexTensor,
    v: &FlexTensor,
    scale: f32,
    hidden: &Hidden,
    rounding: Rounding,
) -> Option<FlexTensor> {
    let shape: [usize; 4] = q.layout().shape().dims();
    let [_, heads, rows, width] = shape;
    let q = widened(q.clone());
    let queries = values_of::<f32>(&q)?;
    let (keys, values) = (Lines::of(k)?, Lines::of(v)?);

    let most = (SCORES / hidden.positions).clamp(FEWEST, MOST);
    let mut output = vec![T::round(0.0); q.layout().num_elements()];
    // Of the query heads that share keys, whole ones together where they are short, else parts of one.
    let together = hidden.length * (most / hidden.length).max(1);
    let heads_of = output.chunks_mut(rows * width).zip((0..).step_by(rows));
    let blocks = heads_of.flat_map(|(output, first)| {
        let lines = output.chunks_mut(together * width).zip((first..).step_by(together));
        lines.flat_map(|(output, first)| {
            let rows = output.len() / width;
            let each = rows.div_ceil(rows.div_ceil(most));
            output.chunks_mut(each * width).zip((first..).step_by(each))
        })
    });
    let done = blocks.collect::<Vec<_>>().into_par_iter().map(|(output, first)| {
        let (head, count) = (first / rows, output.len() / width);
        let (batch, head, first_row) = (head / heads, head % heads, first % rows);
        let block = Block {
            queries: Matrix::new(&queries[first * width..], [count, width], [width, 1])?,
            lines: (first_row..first_row + count).map(|row| hidden.line(batch, row)).collect(),
            scale,
            rounding,
        };
        let mixed = block.mixed::<T>(keys.of_head(batch, head)?, values.of_head(batch, head)?)?;
        T::round_all(&mixed, output);
        Some(())
    });
    done.collect::<Option<()>>()?;
    Some(tensor_of(output, shape))
}

/// The keys or the values of all heads, in f32.
pub(super) struct Lines {
    tensor: FlexTensor,
    strides: [usize; 4],
}

impl Lines {
    /// Of `[batch, heads, positions, width]`.
    pub(super) fn of(tensor: &FlexTensor) -> Option<Self> {
        let mut tensor = widened(tensor.clone());
        if strides(&tensor)?[3] != 1 {
            tensor = tensor.to_contiguous();
        }
        Some(Self { strides: strides(&tensor)?, tensor })
    }

    /// `[positions, width]`.
    pub(super) fn of_head(&self, batch: usize, head: usize) -> Option<Matrix<'_>> {
        let ([batches, heads, row, column], layout) = (self.strides, self.tensor.layout());
        let [.., positions, width] = layout.shape().dims::<4>();
        let start = layout.start_offset() + batch * batches + head * heads;
        let values = self.tensor.storage::<f32>().get(start..)?;
        Matrix::new(values, [positions, width], [row, column])
    }
}

/// Which keys each query must not see.
pub(super) struct Hidden<'a> {
    /// `[texts, length, positions]`, 0 for what is seen; without any, all is.
    flags: Option<&'a [u8]>,
    /// What one of the queries sees lies in these, `[texts, length]`.
    seen: Vec<Range<usize>>,
    length: usize,
    positions: usize,
}

/// The flags of one query, where there are any, and what it sees lies in.
pub(super) type Line<'a> = (Option<&'a [u8]>, Range<usize>);

impl<'a> Hidden<'a> {
    /// `None` for flags that are no booleans of one byte without gaps, or not `[1 or batch, 1, length, positions]` with
    /// a `length` that divides the rows.
    pub(super) fn of(
        flags: Option<&'a FlexTensor>,
        [batch, rows, positions]: [usize; 3],
    ) -> Option<Self> {
        let Some(flags) = flags else {
            let seen = vec![0..positions; rows];
            return Some(Self { flags: None, seen, length: rows, positions });
        };
        let (dtype, shape) = (flags.dtype(), flags.layout().shape());
        let are_bytes = matches!(dtype, DType::Bool(BoolStore::Native | BoolStore::U8));
        if !are_bytes || shape.num_dims() != 4 || !flags.is_contiguous() {
            return None;
        }
        let [texts, one, length, keys] = shape.dims();
        let fits = [1, batch].contains(&texts) && (one, keys) == (1, positions);
        if !fits || length == 0 || !rows.is_multiple_of(length) {
            return None;
        }
        let flags = flags.storage::<u8>().get(flags.layout().start_offset()..)?;
        let flags = flags.get(..texts * length * positions)?;
        let seen = flags.chunks_exact(positions).map(|flags| {
            let first = flags.iter().position(|hidden| *hidden == 0).unwrap_or(0);
            first..flags.iter().rposition(|hidden| *hidden == 0).map_or(positions, |last| last + 1)
        });
        Some(Self { flags: Some(flags), seen: seen.collect(), length, positions })
    }

    /// What each text sees, where that is one run of keys for all queries of it, as in a step of decoding.
    pub(super) fn runs(&self) -> Option<&[Range<usize>]> {
        let Some(flags) = self.flags else { return Some(&self.seen[..1]) };
        let mut lines = flags.chunks_exact(self.positions).zip(&self.seen);
        let is_run = |(flags, seen): (&[u8], &Range<usize>)| {
            flags[seen.clone()].iter().all(|flag| *flag == 0)
        };
        (self.length == 1 && lines.all(is_run)).then_some(&self.seen)
    }

    /// For the query in this row of a head.
    pub(super) fn line(&self, batch: usize, row: usize) -> Line<'a> {
        let query = batch * self.length % self.seen.len() + row % self.length;
        let flags = self.flags.map(|flags| &flags[query * self.positions..][..self.positions]);
        (flags, self.seen[query].clone())
    }
}

/// Some queries of one head.
struct Block<'a> {
    queries: Matrix<'a>,  // [count, width]
    lines: Vec<Line<'a>>, // of each
    scale: f32,
    rounding: Rounding,
}

impl Block<'_> {
    /// `[count, width]`, from all of the head's keys and values.
    fn mixed<T: Weight>(&self, keys: Matrix, values: Matrix) -> Option<Vec<f32>> {
        let (count, [_, width]) = (self.lines.len(), values.shape());
        let first = self.lines.iter().map(|(_, seen)| seen.start).min()?;
        let seen = self.lines.iter().map(|(_, seen)| seen.end).max()? - first;
        let [keys, values] = [keys.rows(first, seen)?, values.rows(first, seen)?];
        let mut scores = vec![0.0; count * seen];
        let mut output = vec![0.0; count * width];
        // Each block is one thread's.
        gemm_accumulate_on(Parallelism::None, &mut scores, seen, self.queries, keys.transposed());
        let lines = self.lines.iter();
        let hidden = lines.map(|(flags, _)| flags.map(|flags| &flags[first..][..seen])).collect();
        let Self { scale, rounding, .. } = *self;
        Arch::new().dispatch(Weigh::<T>::new(&mut scores, hidden, scale, rounding));
        let weights = Matrix::new(&scores, [count, seen], [seen, 1])?;
        gemm_accumulate_on(Parallelism::None, &mut output, width, weights, values);
        Some(output)
    }
}

/// Makes weights of the products of queries and keys, in place.
pub(super) struct Weigh<'a, T> {
    scores: &'a mut [f32],         // [count, positions]
    hidden: Vec<Option<&'a [u8]>>, // of each query
    scale: f32,
    rounding: Rounding,
    phantom: PhantomData<T>,
}

impl<'a, T> Weigh<'a, T> {
    pub(super) fn new(
        scores: &'a mut [f32],
        hidden: Vec<Option<&'a [u8]>>,
        scale: f32,
        rounding: Rounding,
    ) -> Self {
        Self { scores, hidden, scale, rounding, phantom: PhantomData }
    }
}

impl<T: Weight> WithSimd for Weigh<'_, T> {
    type Output = ();

    #[inline(always)] // so that it is compiled for S
    fn with_simd<S: Simd>(self, _: S) {
        let Self { scores, hidden, scale, rounding, .. } = self;
        let positions = scores.len() / hidden.len();
        let rounds = T::PER_WORD == 2 && rounding == Rounding::EachOperation;
        let mut halves = vec![T::round(0.0); if rounds { positions } else { 0 }];
        let mut round = |line: &mut [f32]| {
            if !halves.is_empty() {
                T::round_all(line, &mut halves);
                T::widen_all(&halves, line);
            }
        };
        for (scores, hidden) in scores.chunks_exact_mut(positions).zip(hidden) {
            round(scores);
            scores.iter_mut().for_each(|score| *score *= scale);
            round(scores);
            if let Some(hidden) = hidden {
                for (score, hidden) in scores.iter_mut().zip(hidden) {
                    *score = if *hidden == 0 { *score } else { f32::NEG_INFINITY };
                }
            }
            softmax(scores);
            round(scores);
        }
    }
}
