//! How ggml packs values into blocks, and how the packed bytes become f32 again.
//!
//! Each layout is written at its function, in the order of the bytes. Source: ggml's `ggml-common.h` and
//! `ggml-quants.c`; the order of the multiplications is theirs, so that the values are too, bit by bit.

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
    pub(super) block_bytes: usize,
    /// Unpacks whole blocks, where this crate can read them.
    decode: Option<Decode>,
}

/// Unpacks any run of whole blocks of a tensor.
///
/// # Shapes
/// Bytes: `n_blocks * block_bytes`; values: `n_blocks * block_len`.
pub(super) type Decode = fn(&[u8], &mut [f32]);

impl BlockType {
    /// The type that `id` stands for, unless ggml has no such type.
    pub(super) fn from_id(id: u32) -> Option<&'static Self> {
        TYPES.iter().find(|block_type| block_type.id == id)
    }

    /// The names of the types that have a [`decoder`](Self::decoder), for messages.
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

    /// What unpacks this type, or `None` where this crate cannot read it.
    pub(super) fn decoder(&self) -> Option<Decode> {
        self.decode
    }
}

/// ggml's types. Those that cannot be read are here too: with their sizes a file's header can be
/// checked, and a message can name them.
static TYPES: [BlockType; 34] = [
    row(0, "F32", 1, 4, Some(|bytes, values| each(bytes, values, f32s))),
    row(1, "F16", 1, 2, Some(|bytes, values| each(bytes, values, f16s))),
    row(2, "Q4_0", 32, 18, Some(|bytes, values| each(bytes, values, q4_0))),
    row(3, "Q4_1", 32, 20, Some(|bytes, values| each(bytes, values, q4_1))),
    row(6, "Q5_0", 32, 22, Some(|bytes, values| each(bytes, values, q5_0))),
    row(7, "Q5_1", 32, 24, Some(|bytes, values| each(bytes, values, q5_1))),
    row(8, "Q8_0", 32, 34, Some(|bytes, values| each(bytes, values, q8_0))),
    row(9, "Q8_1", 32, 36, None),
    row(10, "Q2_K", 256, 84, Some(|bytes, values| each(bytes, values, q2_k))),
    row(11, "Q3_K", 256, 110, Some(|bytes, values| each(bytes, values, q3_k))),
    row(12, "Q4_K", 256, 144, Some(|bytes, values| each(bytes, values, q4_k))),
    row(13, "Q5_K", 256, 176, Some(|bytes, values| each(bytes, values, q5_k))),
    row(14, "Q6_K", 256, 210, Some(|bytes, values| each(bytes, values, q6_k))),
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
    row(30, "BF16", 1, 2, Some(|bytes, values| each(bytes, values, bf16s))),
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

/// Unpacks each block of `BYTES` bytes into its `LEN` values.
fn each<const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    values: &mut [f32],
    unpack: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    let blocks = bytes.as_chunks().0.iter();
    blocks.zip(values.as_chunks_mut().0).for_each(|(block, values)| unpack(block, values));
}

fn f32s(bytes: &[u8; 4], value: &mut [f32; 1]) {
    *value = [f32::from_le_bytes(*bytes)];
}

fn f16s([low, high]: &[u8; 2], value: &mut [f32; 1]) {
    *value = [half(low, high)];
}

fn bf16s(bytes: &[u8; 2], value: &mut [f32; 1]) {
    *value = [bf16::from_le_bytes(*bytes).to_f32()];
}

/// `d: f16, q: [i8; 32]`; a value is `q * d`.
fn q8_0([d0, d1, q @ ..]: &[u8; 34], values: &mut [f32; 32]) {
    let d = half(d0, d1);
    for (value, q) in values.iter_mut().zip(q) {
        *value = f32::from(q.cast_signed()) * d;
    }
}

/// `d: f16, q: [u4; 32]`; a value is `(q - 8) * d`.
fn q4_0([d0, d1, q @ ..]: &[u8; 18], values: &mut [f32; 32]) {
    let d = half(d0, d1);
    for (value, q) in values.iter_mut().zip(half_bytes(q)) {
        *value = (f32::from(q) - 8.0) * d;
    }
}

/// `d: f16, m: f16, q: [u4; 32]`; a value is `q * d + m`.
fn q4_1([d0, d1, m0, m1, q @ ..]: &[u8; 20], values: &mut [f32; 32]) {
    let (d, m) = (half(d0, d1), half(m0, m1));
    for (value, q) in values.iter_mut().zip(half_bytes(q)) {
        *value = f32::from(q) * d + m;
    }
}

/// `d: f16, high: [u1; 32], low: [u4; 32]`; q is `high << 4 | low`, a value is `(q - 16) * d`.
fn q5_0([d0, d1, h0, h1, h2, h3, low @ ..]: &[u8; 22], values: &mut [f32; 32]) {
    let d = half(d0, d1);
    let high = bits([*h0, *h1, *h2, *h3]);
    for ((value, low), high) in values.iter_mut().zip(half_bytes(low)).zip(high) {
        *value = (f32::from(high << 4 | low) - 16.0) * d;
    }
}

/// `d: f16, m: f16, high: [u1; 32], low: [u4; 32]`; q is `high << 4 | low`, a value is `q * d + m`.
fn q5_1([d0, d1, m0, m1, h0, h1, h2, h3, low @ ..]: &[u8; 24], values: &mut [f32; 32]) {
    let (d, m) = (half(d0, d1), half(m0, m1));
    let high = bits([*h0, *h1, *h2, *h3]);
    for ((value, low), high) in values.iter_mut().zip(half_bytes(low)).zip(high) {
        *value = f32::from(high << 4 | low) * d + m;
    }
}

// The K types: blocks of 256 values, in rows of 16 or 32 that have a small scale each.

/// `(scale, min): [(u4, u4); 16], q: [u2; 256], d: f16, m: f16`; a scale and a min for each row of 16, a
/// value is `d * scale * q - m * min`.
fn q2_k([rest @ .., d0, d1, m0, m1]: &[u8; 84], values: &mut [f32; 256]) {
    let (d, m) = (half(d0, d1), half(m0, m1));
    let (scales, q) = rest.split_at(16);
    for (row, values) in values.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let d = d * f32::from(scales[row] & 15);
        let m = m * f32::from(scales[row] >> 4);
        for (value, q) in values.iter_mut().zip(quarter_bytes(q, row)) {
            *value = d * f32::from(q) - m;
        }
    }
}

/// `high: [u1; 256], low: [u2; 256], scale: [u6; 16], d: f16`; q is `high << 2 | low`, a scale for each
/// row of 16, a value is `d * (scale - 32) * (q - 4)`.
fn q3_k([rest @ .., d0, d1]: &[u8; 110], values: &mut [f32; 256]) {
    let d = half(d0, d1);
    let (high, rest) = rest.split_at(32);
    let (low, scales) = rest.split_at(64);
    for (row, values) in values.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        // Half bytes with the scales' low bits, as in Q4_0; then quarter bytes with their high ones.
        let scale_low = scales[row % 8] >> (row / 8 * 4) & 15;
        let scale_high = scales[8 + row % 4] >> (row / 4 * 2) & 3;
        let d = d * (f32::from(scale_high << 4 | scale_low) - 32.0);
        // Byte i has the high bits of the values i, i + 32, ...
        let high = high[row % 2 * 16..].iter().map(|high| high >> (row / 2) & 1);
        for ((value, low), high) in values.iter_mut().zip(quarter_bytes(low, row)).zip(high) {
            *value = d * (f32::from(high << 2 | low) - 4.0);
        }
    }
}

/// `d: f16, m: f16, (scale, min): [(u6, u6); 8], q: [u4; 256]`; a scale and a min for each row of 32, a
/// value is `d * scale * q - m * min`.
fn q4_k([d0, d1, m0, m1, rest @ ..]: &[u8; 144], values: &mut [f32; 256]) {
    let (d, m) = (half(d0, d1), half(m0, m1));
    let (scales, q) = rest.split_at(12);
    for (row, values) in values.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(scales, row);
        let (d, m) = (d * scale, m * min);
        // 32 bytes for two rows, the first in the low halves.
        let q = q[row / 2 * 32..].iter().map(|q| q >> (row % 2 * 4) & 15);
        for (value, q) in values.iter_mut().zip(q) {
            *value = d * f32::from(q) - m;
        }
    }
}

/// `d: f16, m: f16, (scale, min): [(u6, u6); 8], high: [u1; 256], low: [u4; 256]`; q is
/// `high << 4 | low`, a scale and a min for each row of 32, a value is `d * scale * q - m * min`.
fn q5_k([d0, d1, m0, m1, rest @ ..]: &[u8; 176], values: &mut [f32; 256]) {
    let (d, m) = (half(d0, d1), half(m0, m1));
    let (scales, rest) = rest.split_at(12);
    let (high, low) = rest.split_at(32);
    for (row, values) in values.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(scales, row);
        let (d, m) = (d * scale, m * min);
        let low = low[row / 2 * 32..].iter().map(|low| low >> (row % 2 * 4) & 15); // as in Q4_K
        let high = high.iter().map(|high| high >> row & 1); // as in Q3_K
        for ((value, low), high) in values.iter_mut().zip(low).zip(high) {
            *value = d * f32::from(high << 4 | low) - m;
        }
    }
}

/// `low: [u4; 256], high: [u2; 256], scale: [i8; 16], d: f16`; q is `high << 4 | low`, a scale for each
/// row of 16, a value is `d * scale * (q - 32)`.
fn q6_k([rest @ .., d0, d1]: &[u8; 210], values: &mut [f32; 256]) {
    let d = half(d0, d1);
    let (low, rest) = rest.split_at(128);
    let (high, scales) = rest.split_at(64);
    for (row, values) in values.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let d = d * f32::from(scales[row].cast_signed());
        // 64 bytes for eight rows, the first four in the low halves.
        let low = low[row / 8 * 64 + row % 4 * 16..].iter();
        let low = low.map(|low| low >> (row % 8 / 4 * 4) & 15);
        for ((value, low), high) in values.iter_mut().zip(low).zip(quarter_bytes(high, row)) {
            *value = d * (f32::from(high << 4 | low) - 32.0);
        }
    }
}

/// The f16 of two bytes, the low one first.
fn half(low: &u8, high: &u8) -> f32 {
    f16::from_le_bytes([*low, *high]).to_f32()
}

/// The low halves of all bytes, values 0 to 15 of a block, then the high halves, values 16 to 31.
fn half_bytes(bytes: &[u8; 16]) -> impl Iterator<Item = u8> {
    let low = bytes.iter().map(|byte| byte & 15);
    let high = bytes.iter().map(|byte| byte >> 4);
    low.chain(high)
}

/// Each bit, the lowest of the first byte first.
fn bits(bytes: [u8; 4]) -> impl Iterator<Item = u8> {
    let bits = u32::from_le_bytes(bytes);
    (0..32).map(move |i| (bits >> i & 1) as u8)
}

/// The quarters that belong to one row of 16. 32 bytes are for eight rows: the lowest two bits of all of
/// them for the first two rows, and so on.
fn quarter_bytes(bytes: &[u8], row: usize) -> impl Iterator<Item = u8> {
    let shift = row % 8 / 2 * 2;
    bytes[row / 8 * 32 + row % 2 * 16..].iter().map(move |byte| byte >> shift & 3)
}

/// The scale and the min of one row of 32 in Q4_K and Q5_K. The first four rows have theirs in the low
/// six bits of bytes 0 to 3 and 4 to 7; the others a half byte each in bytes 8 to 11, and above it the
/// two bits that those left over.
fn scale_and_min(scales: &[u8], row: usize) -> (f32, f32) {
    let (scale, min) = if row < 4 {
        (scales[row] & 63, scales[row + 4] & 63)
    } else {
        let low = scales[row + 4];
        (scales[row - 4] >> 6 << 4 | low & 15, scales[row] >> 6 << 4 | low >> 4)
    };
    (f32::from(scale), f32::from(min))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dequantise(id: u32, bytes: &[u8]) -> Vec<f32> {
        let block_type = BlockType::from_id(id).unwrap();
        let mut values =
            vec![f32::NAN; bytes.len() / block_type.block_bytes * block_type.block_len];
        block_type.decoder().unwrap()(bytes, &mut values);
        values
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
    fn q5_0_has_a_fifth_bit_for_each_value_and_sixteen_for_zero() {
        // The bits of the values 0, 9 and 31; each low half is 3 and each high one 5.
        let mut block = vec![0x00, 0x40, 0x01, 0x02, 0x00, 0x80];
        block.extend([0x53; 16]);
        let mut expected = [[-26.0; 16], [-22.0; 16]].concat(); // (3 - 16) * 2, (5 - 16) * 2
        (expected[0], expected[9], expected[31]) = (6.0, 6.0, 10.0); // 32 above it
        assert_eq!(dequantise(6, &block), expected);
    }

    #[test]
    fn q5_1_adds_the_minimum() {
        let mut block = vec![0x00, 0x38, 0x00, 0xbc, 0x01, 0x02, 0x00, 0x80];
        block.extend([0x53; 16]);
        let mut expected = [[0.5; 16], [1.5; 16]].concat(); // 3 * 0.5 - 1, 5 * 0.5 - 1
        (expected[0], expected[9], expected[31]) = (8.5, 8.5, 9.5); // 16 * 0.5 above it
        assert_eq!(dequantise(7, &block), expected);
    }

    /// The values of a block by rows of 16, each of which has one value throughout.
    fn rows(id: u32, block: &[u8]) -> Vec<f32> {
        let values = dequantise(id, block);
        let rows = values.as_chunks::<16>().0;
        assert!(rows.iter().all(|row| row.iter().all(|value| *value == row[0])), "{values:?}");
        rows.iter().map(|row| row[0]).collect()
    }

    #[test]
    fn q2_k_has_a_scale_and_a_min_for_each_row_of_16() {
        let mut block: Vec<u8> = (0..16_u8).map(|i| i | (15 - i) << 4).collect();
        // Quarters 0 1 2 3, then 3 2 1 0, each for two rows.
        block.extend([[0b_11_10_01_00; 32], [0b_00_01_10_11; 32]].concat());
        block.extend([0x00, 0x40, 0x00, 0x38]);
        let q = [0., 0., 1., 1., 2., 2., 3., 3., 3., 3., 2., 2., 1., 1., 0., 0.];
        let expected: Vec<f32> = (0..16_u8)
            .map(|i| 2.0 * f32::from(i) * q[usize::from(i)] - 0.5 * f32::from(15 - i))
            .collect();
        assert_eq!(rows(10, &block), expected);
        // By hand: row 7 is 2 * 7 * 3 - 0.5 * 8.
        assert_eq!(expected[7], 38.0);
    }

    #[test]
    fn q2_k_has_value_i_in_byte_i() {
        let mut block = vec![0x01; 16];
        block.extend([0; 64]);
        (block[16], block[17], block[16 + 31]) = (0b_10, 0b_11_00, 0b_01_00_00); // of rows 0, 3, 4
        block.extend([0x00, 0x40, 0x00, 0x00]);
        let mut expected = vec![0.0; 256];
        (expected[0], expected[32 + 1], expected[64 + 31]) = (4.0, 6.0, 2.0);
        assert_eq!(dequantise(10, &block), expected);
    }

    #[test]
    fn q3_k_takes_four_away_where_the_high_bit_is_0() {
        // Value 0 and value 255 have their bit; every quarter is 3.
        let mut block = vec![0; 32];
        (block[0], block[31]) = (0x01, 0x80);
        block.extend([0xff; 64]);
        // Every scale is 0b10_0001, 33: minus 32, that is 1.
        block.extend([0x11; 8]);
        block.extend([0b_10_10_10_10; 4]);
        block.extend([0x00, 0x40]);
        let mut expected = vec![-2.0; 256]; // (3 - 4) * 2
        (expected[0], expected[255]) = (6.0, 6.0);
        assert_eq!(dequantise(11, &block), expected);
    }

    #[test]
    fn q3_k_has_six_bits_for_each_scale() {
        // The low four bits are the row's number; the two above them are 0 for the first four rows, 1
        // for the next four, and so on.
        let mut block = vec![0xff; 32];
        block.extend([0b_01_01_01_01; 64]);
        block.extend((0..8_u8).map(|i| i | (8 + i) << 4));
        block.extend([0b_11_10_01_00; 4]);
        block.extend([0x00, 0x38]);
        let scales = [0., 1., 2., 3., 20., 21., 22., 23., 40., 41., 42., 43., 60., 61., 62., 63.];
        let expected = scales.map(|scale| 0.5 * (scale - 32.0));
        assert_eq!(rows(11, &block), expected);
    }

    /// For rows of 32: scales 1 2 3 4 17 34 51 4 and mins 5 6 7 8 50 35 20 5.
    const SCALES_AND_MINS: [u8; 12] = [
        0x41, 0x82, 0xc3, 0x04, // the scales 1 2 3 4, above them 1 2 3 0
        0xc5, 0x86, 0x47, 0x08, // the mins 5 6 7 8, above them 3 2 1 0
        0x21, 0x32, 0x43, 0x54, // the scales' low halves 1 2 3 4, the mins' 2 3 4 5
    ];

    #[test]
    fn q4_k_has_a_scale_and_a_min_for_each_row_of_32() {
        let mut block = vec![0x00, 0x40, 0x00, 0x38];
        block.extend(SCALES_AND_MINS);
        // Rows of 1 and 2, of 3 and 4, of 5 and 6, of 15 and 0.
        block.extend([[0x21; 32], [0x43; 32], [0x65; 32], [0x0f; 32]].concat());
        let expected = [
            2. * 1. * 1. - 0.5 * 5.,
            2. * 2. * 2. - 0.5 * 6.,
            2. * 3. * 3. - 0.5 * 7.,
            2. * 4. * 4. - 0.5 * 8.,
            2. * 17. * 5. - 0.5 * 50.,
            2. * 34. * 6. - 0.5 * 35.,
            2. * 51. * 15. - 0.5 * 20.,
            2. * 4. * 0. - 0.5 * 5.,
        ];
        assert_eq!(rows(12, &block), expected.map(|value: f32| [value; 2]).concat());
    }

    #[test]
    fn q5_k_has_bit_i_of_the_high_bytes_for_row_i() {
        let mut block = vec![0x00, 0x40, 0x00, 0x38];
        block.extend(SCALES_AND_MINS);
        block.extend([0b_1001_0010; 32]); // 16 more in the rows 1, 4 and 7
        block.extend([[0x21; 32], [0x43; 32], [0x65; 32], [0x0f; 32]].concat());
        let expected = [
            2. * 1. * 1. - 0.5 * 5.,
            2. * 2. * 18. - 0.5 * 6.,
            2. * 3. * 3. - 0.5 * 7.,
            2. * 4. * 4. - 0.5 * 8.,
            2. * 17. * 21. - 0.5 * 50.,
            2. * 34. * 6. - 0.5 * 35.,
            2. * 51. * 15. - 0.5 * 20.,
            2. * 4. * 16. - 0.5 * 5.,
        ];
        assert_eq!(rows(13, &block), expected.map(|value: f32| [value; 2]).concat());
        (block[16], block[47]) = (0, 0xff); // the first value of each row, the last
        let values = dequantise(13, &block);
        assert_eq!((values[32], values[33]), (2. * 2. * 2. - 3., 2. * 2. * 18. - 3.));
        assert_eq!((values[30], values[31]), (2. * 1. * 1. - 2.5, 2. * 1. * 17. - 2.5));
    }

    #[test]
    fn q6_k_has_signed_scales_and_thirty_two_for_zero() {
        // Low halves, each for four rows: 1 and 2, then 3 and 4; the four rows of 2 end in 15.
        let mut block = [[0x21; 64], [0x43; 64]].concat();
        (block[15], block[31], block[47], block[63]) = (0xf1, 0xf1, 0xf1, 0xf1);
        // Quarters 0 1 2 3, then 3 2 1 0, each for two rows.
        block.extend([[0b_11_10_01_00; 32], [0b_00_01_10_11; 32]].concat());
        block.extend((0..16_i8).map(|i| (i - 8).cast_unsigned()));
        block.extend([0x00, 0x38]);
        let values = dequantise(14, &block);
        // A pair of rows each: 0b00_0001, 0b01_0001, 0b10_0010, 0b11_0010, and then 0b11_0011, 0b10_0011,
        // 0b01_0100, 0b00_0100.
        let q = [1., 1., 17., 17., 34., 34., 50., 50., 51., 51., 35., 35., 20., 20., 4., 4.];
        let last = [1., 1., 17., 17., 47., 47., 63., 63., 51., 51., 35., 35., 20., 20., 4., 4.];
        for (row, values) in values.as_chunks::<16>().0.iter().enumerate() {
            let d = 0.5 * (row as f32 - 8.0);
            assert_eq!(values[..15], [d * (q[row] - 32.0); 15], "row {row}");
            assert_eq!(values[15], d * (last[row] - 32.0), "row {row}");
        }
        // By hand: row 0 is 0.5 * -8 * (1 - 32).
        assert_eq!(values[0], 124.0);
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
    fn a_tensor_unpacks_piece_by_piece_as_it_does_at_once() {
        for block_type in TYPES.iter().filter(|block_type| block_type.decode.is_some()) {
            // No byte below 0x20 or above 0x5f: every f16, bf16 and f32 in them is finite.
            let bytes = (0..7 * block_type.block_bytes).map(|i| 0x20 | (i * 37 % 64) as u8);
            let bytes: Vec<u8> = bytes.collect();
            let whole = dequantise(block_type.id, &bytes);
            let (first, second) = bytes.split_at(3 * block_type.block_bytes);
            let pieces = [dequantise(block_type.id, first), dequantise(block_type.id, second)];
            assert_eq!(pieces.concat(), whole, "{}", block_type.name);
            assert!(whole.iter().all(|value| value.is_finite()), "{}", block_type.name);
        }
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
        assert!(BlockType::from_id(15).unwrap().decoder().is_none());
        assert_eq!(
            BlockType::readable(),
            "F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, BF16"
        );
    }
}
