//! Keys and values of the positions that a decoder has seen.

use burn::tensor::{DType, Device, Tensor, s};

use crate::layout::Packing;

/// Keys and values of the positions that a decoder has seen, so that each new token costs one
/// position only.
///
/// The buffers are made once, for [`with_capacity`](Self::with_capacity) positions, and written in
/// place. A text that outgrows them doubles them, which copies; one whose length is known beforehand
/// never does.
#[derive(Debug, Clone)]
pub struct KvCache {
    blocks: Vec<Option<BlockCache>>,
    capacity: usize,
    seen: usize,
    /// Tokens of padding before each row's text; empty when no row has any.
    padding: Vec<usize>,
}

/// One block's part.
#[derive(Debug, Clone)]
pub(crate) struct BlockCache {
    keys: Tensor<4>,   // [batch, kv_heads, capacity, head_dim]
    values: Tensor<4>, // [batch, kv_heads, capacity, head_dim]
}

impl Default for KvCache {
    fn default() -> Self {
        Self::with_capacity(0)
    }
}

impl KvCache {
    /// A cache that has seen nothing and makes room as it grows.
    pub fn new() -> Self {
        Self::default()
    }

    /// A cache with room for `capacity` positions.
    pub fn with_capacity(capacity: usize) -> Self {
        Self { blocks: Vec::new(), capacity, seen: 0, padding: Vec::new() }
    }

    /// A cache for rows of unequal length: row i begins with `padding[i]` tokens that are no text.
    pub(crate) fn with_padding(capacity: usize, padding: Vec<usize>) -> Self {
        let some = padding.iter().any(|tokens| *tokens > 0);
        Self { padding: if some { padding } else { Vec::new() }, ..Self::with_capacity(capacity) }
    }

    /// What is in the cache, in words, unless that is nothing or `blocks` blocks of `[batch, kv_heads,
    /// head_dim]` as in `fitting`, of this type and on this device.
    pub(crate) fn unlike(
        &self,
        blocks: usize,
        fitting: [usize; 3],
        (dtype, device): (DType, &Device),
    ) -> Option<String> {
        let first = self.blocks.first()?.as_ref()?;
        let [batch, heads, _, head_dim] = first.keys.dims();
        let (own_dtype, own_device) = (first.keys.dtype(), first.keys.device());
        let fits = self.blocks.len() == blocks && [batch, heads, head_dim] == fitting;
        (!fits || own_dtype != dtype || own_device != *device).then(|| {
            let blocks = self.blocks.len();
            format!(
                "{blocks} blocks of {batch} rows, {heads} key heads and a width of {head_dim} in \
                 {own_dtype:?} on {own_device:?}"
            )
        })
    }

    /// Positions seen so far, padding included.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// Forgets what came after the first `seen` positions, so that another continuation can be tried.
    /// A larger number than has been seen changes nothing.
    pub fn truncate(&mut self, seen: usize) {
        self.seen = self.seen.min(seen);
    }

    /// Where the tokens stand after `length` more, or `None` when they are plain rows from position 0.
    pub(crate) fn packing(&self, length: usize) -> Option<Packing> {
        (!self.padding.is_empty())
            .then(|| Packing::behind_padding(&self.padding, self.seen + length))
    }

    /// Makes room for `length` more positions in each of `blocks` blocks.
    pub(crate) fn prepare(&mut self, blocks: usize, length: usize) {
        self.blocks.resize(blocks, None);
        let needed = self.seen + length;
        if needed > self.capacity {
            self.capacity = needed.max(2 * self.capacity).next_multiple_of(GROWTH);
        }
    }

    /// The keys and values of `block` with those of the newest positions behind them.
    ///
    /// # Shapes
    /// - `keys`, `values` `[batch, kv_heads, length, head_dim]`, output `[batch, kv_heads, seen + length, head_dim]`
    pub(crate) fn extend(
        &mut self,
        block: usize,
        keys: Tensor<4>,
        values: Tensor<4>,
    ) -> (Tensor<4>, Tensor<4>) {
        let (seen, capacity) = (self.seen, self.capacity);
        // Taken out, so that this is the buffers' only handle and they are written in place.
        let (old_keys, old_values) = match self.blocks[block].take() {
            Some(BlockCache { keys, values }) => (Some(keys), Some(values)),
            None => (None, None),
        };
        let keys = written(old_keys, keys, seen, capacity);
        let values = written(old_values, values, seen, capacity);
        let total = seen + keys.1;
        let all = (keys.0.clone().narrow(2, 0, total), values.0.clone().narrow(2, 0, total));
        self.blocks[block] = Some(BlockCache { keys: keys.0, values: values.0 });
        all
    }

    /// Counts `length` more positions, after all blocks have been extended by them.
    pub(crate) fn advance(&mut self, length: usize) {
        self.seen += length;
    }
}

/// Positions by which a cache grows at least.
const GROWTH: usize = 64;

/// `buffer`, grown to `capacity` if need be, with `new` at position `seen`; and how many these are.
fn written(
    buffer: Option<Tensor<4>>,
    new: Tensor<4>,
    seen: usize,
    capacity: usize,
) -> (Tensor<4>, usize) {
    let [batch, heads, length, head_dim] = new.dims();
    let options = (&new.device(), new.dtype());
    let empty = || Tensor::zeros([batch, heads, capacity, head_dim], options);
    let buffer = match buffer {
        Some(buffer) if buffer.dims()[2] == capacity => buffer,
        Some(buffer) => {
            let kept = buffer.narrow(2, 0, seen);
            empty().slice_assign(s![.., .., 0..seen, ..], kept)
        }
        None => empty(),
    };
    (buffer.slice_assign(s![.., .., seen..seen + length, ..], new), length)
}
