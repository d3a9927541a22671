//! How ggml packs values into blocks, and how the packed bytes become f32 again.

use half::{bf16, f16};

/// One of ggml's tensor types. A tensor's innermost dimension is a whole number of blocks.
#[derive(Debug)]
pub(super) struct BlockType {
    /// The number that stands for it in a file.
    id: u32,
    /// ggml's name for it.
    pub(super) name: &'static str,
    /// Values in one block.
    pub(super) block_len: usize,
    /// Bytes of one block.
    block_bytes: usize,
    /// Appends the values of whole blocks, where this crate can read them.
    decode: Option<Decode>,
}

type Decode = fn(&[u8], &mut Vec<f32>);

impl BlockType {
    /// The type that `id` stands for, unless ggml has no such type.
    pub(super) fn from_id(id: u32) -> Option<&'static Self> {
        TYPES.iter().find(|block_type| block_type.id == id)
    }

    /// The names of the types that [`dequantise`](Self::dequantise) can read, for messages.
    pub(super) fn readable() -> String {
        let names: Vec<_> = TYPES.iter().filter(|t| t.decode.is_some()).map(|t| t.name).collect();
        names.join(", ")
    }

    /// The bytes of a tensor of `shape` (outermost first), or `None` when the innermost dimension is
    /// not a whole number of blocks or the tensor cannot fit in memory, packed or as f32.
    pub(super) fn n_bytes(&self, shape: &[usize]) -> Option<usize> {
        let innermost = *shape.last()?;
        if !innermost.is_multiple_of(self.block_len) {
            return None;
        }
        let n_values = shape.iter().try_fold(1_usize, |n, &size| n.checked_mul(size))?;
        n_values.checked_mul(size_of::<f32>()).filter(|&bytes| isize::try_from(bytes).is_ok())?;
        (n_values / self.block_len).checked_mul(self.block_bytes)
    }

    /// The values of a tensor's `bytes`, or `None` for a type that this crate cannot read.
    pub(super) fn dequantise(&self, bytes: &[u8]) -> Option<Vec<f32>> {
        let decode = self.decode?;
        let mut values = Vec::with_capacity(bytes.len() / self.block_bytes * self.block_len);
        decode(bytes, &mut values);
        Some(values)
    }
}

/// ggml's types. Those that cannot be read are here too: with their sizes a file's header can be
/// checked, and a message can name them.
static TYPES: [BlockType; 34] = [
    row(0, "F32", 1, 4, Some(f32s)),
    row(1, "F16", 1, 2, Some(f16s)),
    row(2, "Q4_0", 32, 18, Some(q4_0)),
    row(3, "Q4_1", 32, 20, Some(q4_1)),
    row(6, "Q5_0", 32, 22, None),
    row(7, "Q5_1", 32, 24, None),
    row(8, "Q8_0", 32, 34, Some(q8_0)),
    row(9, "Q8_1", 32, 36, None),
    row(10, "Q2_K", 256, 84, None),
    row(11, "Q3_K", 256, 110, None),
    row(12, "Q4_K", 256, 144, None),
    row(13, "Q5_K", 256, 176, None),
    row(14, "Q6_K", 256, 210, None),
    row(15, "Q8_K", 256, 292, None),
    row(16, "IQ2_XXS", 256, 66, None),
    row(17, "IQ2_XS", 256, 74, None),
    row(18, "IQ3_XXS", 256, 98, None),
    row(19, "IQ1_S", 256, 50, None),
    row(20, "IQ4_NL", 32, 18, None),
    row(21, "IQ3_S", 256, 110, None),
    row(22, "IQ2_S", 256, 82, None),
    row(23, "IQ4_XS", 256, 136, None),
    row(24, "I8", 1, 1, None),
    row(25, "I16", 1, 2, None),
    row(26, "I32", 1, 4, None),
    row(27, "I64", 1, 8, None),
    row(28, "F64", 1, 8, None),
    row(29, "IQ1_M", 256, 56, None),
    row(30, "BF16", 1, 2, Some(bf16s)),
    row(34, "TQ1_0", 256, 54, None),
    row(35, "TQ2_0", 256, 66, None),
    row(39, "MXFP4", 32, 17, None),
    row(40, "NVFP4", 64, 36, None),
    row(41, "Q1_0", 128, 18, None),
];

const fn row(
    id: u32,
    name: &'static str,
    block_len: usize,
    block_bytes: usize,
    decode: Option<Decode>,
) -> BlockType {
    BlockType { id, name, block_len, block_bytes, decode }
}

fn f32s(bytes: &[u8], values: &mut Vec<f32>) {
    values.extend(bytes.as_chunks().0.iter().copied().map(f32::from_le_bytes));
}

fn f16s(bytes: &[u8], values: &mut Vec<f32>) {
    values.extend(bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()));
}

fn bf16s(bytes: &[u8], values: &mut Vec<f32>) {
    values.extend(bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()));
}

/// `d: f16, q: [i8; 32]`; a value is `q * d`.
fn q8_0(bytes: &[u8], values: &mut Vec<f32>) {
    for [d0, d1, q @ ..] in bytes.as_chunks::<34>().0 {
        let d = f16::from_le_bytes([*d0, *d1]).to_f32();
        values.extend(q.iter().map(|q| f32::from(q.cast_signed()) * d));
    }
}

/// `d: f16, q: [u8; 16]`; a value is `(q - 8) * d`.
fn q4_0(bytes: &[u8], values: &mut Vec<f32>) {
    for [d0, d1, q @ ..] in bytes.as_chunks::<18>().0 {
        let d = f16::from_le_bytes([*d0, *d1]).to_f32();
        values.extend(nibbles(q).map(|q| (q - 8.0) * d));
    }
}

/// `d: f16, m: f16, q: [u8; 16]`; a value is `q * d + m`.
fn q4_1(bytes: &[u8], values: &mut Vec<f32>) {
    for [d0, d1, m0, m1, q @ ..] in bytes.as_chunks::<20>().0 {
        let d = f16::from_le_bytes([*d0, *d1]).to_f32();
        let m = f16::from_le_bytes([*m0, *m1]).to_f32();
        values.extend(nibbles(q).map(|q| q * d + m));
    }
}

/// The low halves of all bytes, values 0 to 15 of a block, then the high halves, values 16 to 31.
fn nibbles(q: &[u8; 16]) -> impl Iterator<Item = f32> {
    let low = q.iter().map(|q| q & 0x0f);
    let high = q.iter().map(|q| q >> 4);
    low.chain(high).map(f32::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dequantise(id: u32, bytes: &[u8]) -> Vec<f32> {
        BlockType::from_id(id).unwrap().dequantise(bytes).unwrap()
    }

    // f16 by eye: 0x3800 is 0.5, 0x4000 is 2, 0xbc00 is -1.

    #[test]
    fn f32_f16_bf16() {
        assert_eq!(dequantise(0, &[0, 0, 0xc0, 0x3f, 0, 0, 0, 0xc0]), [1.5, -2.0]);
        assert_eq!(dequantise(1, &[0x00, 0x38, 0x00, 0xbc]), [0.5, -1.0]);
        assert_eq!(dequantise(30, &[0xc0, 0x3f, 0x00, 0xc0]), [1.5, -2.0]);
    }

    #[test]
    fn q8_0_is_a_signed_byte_times_the_scale() {
        let mut block = vec![0x00, 0x38];
        block.extend((0..32_i8).map(|i| (i - 16).cast_unsigned()));
        block[2] = 0x80; // -128
        let mut expected: Vec<f32> = (0..32_i8).map(|i| f32::from(i - 16) * 0.5).collect();
        expected[0] = -64.0;
        assert_eq!(dequantise(8, &block), expected);
    }

    #[test]
    fn q4_0_has_the_low_halves_first_and_eight_for_zero() {
        let mut block = vec![0x00, 0x40];
        block.extend((0..16_u8).map(|i| i | (15 - i) << 4));
        let values = dequantise(2, &block);
        let low = (0..16_u8).map(|i| (f32::from(i) - 8.0) * 2.0); // -16, -14, .., 14
        let high = (0..16_u8).rev().map(|i| (f32::from(i) - 8.0) * 2.0);
        assert_eq!(values, low.chain(high).collect::<Vec<_>>());
    }

    #[test]
    fn q4_1_adds_the_minimum() {
        let mut block = vec![0x00, 0x38, 0x00, 0xbc];
        block.extend((0..16_u8).map(|i| i | (15 - i) << 4));
        let values = dequantise(3, &block);
        let low = (0..16_u8).map(|i| f32::from(i) * 0.5 - 1.0); // -1, -0.5, .., 6.5
        let high = (0..16_u8).rev().map(|i| f32::from(i) * 0.5 - 1.0);
        assert_eq!(values, low.chain(high).collect::<Vec<_>>());
    }

    #[test]
    fn a_second_block_has_its_own_scale() {
        let mut blocks = vec![0x00, 0x38];
        blocks.extend([1; 32]);
        blocks.extend([0x00, 0x40]);
        blocks.extend([1; 32]);
        assert_eq!(dequantise(8, &blocks), [[0.5; 32], [2.0; 32]].concat());
    }

    #[test]
    fn bytes_are_counted_in_whole_blocks_of_the_innermost_dimension() {
        let q4_1 = BlockType::from_id(3).unwrap();
        assert_eq!(q4_1.n_bytes(&[3, 64]), Some(3 * 2 * 20));
        assert_eq!(q4_1.n_bytes(&[64, 3]), None);
        assert_eq!(q4_1.n_bytes(&[usize::MAX, 32]), None);
        assert_eq!(q4_1.n_bytes(&[]), None);
        let i8s = BlockType::from_id(24).unwrap();
        assert_eq!(i8s.n_bytes(&[usize::MAX / 4]), None); // its f32 form would not fit
    }

    #[test]
    fn an_id_stands_for_one_type() {
        for block_type in &TYPES {
            let found = BlockType::from_id(block_type.id).unwrap();
            assert_eq!(found.name, block_type.name);
        }
        assert!(BlockType::from_id(4).is_none()); // Q4_2, removed from ggml long ago
        assert!(BlockType::from_id(12).unwrap().dequantise(&[0; 144]).is_none());
        assert_eq!(BlockType::readable(), "F32, F16, Q4_0, Q4_1, Q8_0, BF16");
    }
}
