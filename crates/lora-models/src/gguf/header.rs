//! The head of a GGUF file: keys and tensor places, read with every number checked before use.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use super::blocks::BlockType;
use super::value::Value;
use crate::error::{Error, Result};

const MAGIC: [u8; 4] = *b"GGUF";
const VERSIONS: [u32; 2] = [2, 3];
const DEFAULT_ALIGNMENT: u64 = 32;

// Limits far above any real model (a large vocabulary has 300,000 tokens and as many merges), and
// low enough that a file made to harm cannot make its reader take gigabytes.
const MAX_HEADER_BYTES: u64 = 256 << 20;
const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 16;
/// Array elements of all keys together; each takes 32 bytes of memory, however few in the file.
const MAX_ARRAY_VALUES: u64 = 4 << 20;
const MAX_ARRAY_DEPTH: usize = 4;
const MAX_STRING_BYTES: u64 = 64 << 20;
const MAX_NAME_BYTES: u64 = 1 << 16;
const MAX_DIMS: u32 = 4; // ggml's GGML_MAX_DIMS
const MAX_ALIGNMENT: u64 = 1 << 20;

/// The fewest bytes that a key with its value takes: string length, value type, one byte of value.
const MIN_KEY_BYTES: u64 = 8 + 4 + 1;
/// The fewest bytes that a tensor's entry takes: string length, n_dims, one size, type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

/// Where a tensor lies and how it is packed.
#[derive(Debug, Clone)]
pub(super) struct TensorInfo {
    /// Sizes, outermost first; a linear weight is `[d_output, d_input]`.
    pub(super) shape: Vec<usize>,
    /// How the values are packed.
    pub(super) block_type: &'static BlockType,
    /// First byte, from the start of the file.
    pub(super) offset: u64,
    /// Number of bytes; the file was long enough for them when the header was read.
    pub(super) n_bytes: usize,
}

impl TensorInfo {
    /// One of the parts along the outermost axis, of which there must be more than `number`.
    pub(super) fn part(&self, number: usize) -> Self {
        let n_bytes = self.n_bytes / self.shape[0]; // whole rows, and so whole blocks
        Self {
            shape: self.shape[1..].to_vec(),
            offset: self.offset + (number * n_bytes) as u64,
            n_bytes,
            ..*self
        }
    }
}

/// All that stands before the tensor data.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) metadata: BTreeMap<String, Value>,
    /// Under llama.cpp's names.
    pub(super) tensors: BTreeMap<String, TensorInfo>,
}

impl Header {
    /// Reads the header of a file of `file_bytes` bytes. `path` is for messages only.
    pub(super) fn parse(reader: impl Read, file_bytes: u64, path: &Path) -> Result<Self> {
        let mut cursor =
            Cursor { reader, path, file_bytes, position: 0, array_values: MAX_ARRAY_VALUES };

        let magic = cursor.bytes::<4>("magic")?;
        if magic != MAGIC {
            let found = format!("'{}'", magic.escape_ascii());
            return Err(Error::malformed(path, "magic", "'GGUF' (is this a GGUF file?)", found));
        }
        let version = cursor.u32("version")?;
        if !VERSIONS.contains(&version) {
            // A big-endian file has the version's bytes the other way round.
            let found = match version.swap_bytes() {
                swapped if VERSIONS.contains(&swapped) => format!("{swapped}, big endian"),
                _ => version.to_string(),
            };
            return Err(Error::unsupported(path, "GGUF version", found, "2 and 3, little endian"));
        }
        let n_tensors = cursor.count("tensor count", "tensors", MAX_TENSORS, MIN_TENSOR_BYTES)?;
        let n_keys = cursor.count("key count", "keys", MAX_KEYS, MIN_KEY_BYTES)?;

        let mut metadata = BTreeMap::new();
        for index in 0..n_keys {
            let key = cursor.string(&format!("name of key {index}"), MAX_NAME_BYTES)?;
            let place = format!("key '{key}'");
            let value_type = cursor.u32(&place)?;
            let value = cursor.value(value_type, 0, &place)?;
            if metadata.insert(key, value).is_some() {
                return Err(Error::malformed(path, place, "each key once", "a second one"));
            }
        }

        let mut tensors = BTreeMap::new();
        for index in 0..n_tensors {
            let name = cursor.string(&format!("name of tensor {index}"), MAX_NAME_BYTES)?;
            let place = format!("tensor '{name}'");
            let info = cursor.tensor_info(&name, &place)?;
            if tensors.insert(name, info).is_some() {
                return Err(Error::malformed(path, place, "each tensor once", "a second one"));
            }
        }

        let alignment = alignment(&metadata, path)?;
        let data_start = cursor.position.next_multiple_of(alignment);
        place_tensors(&mut tensors, alignment, data_start, file_bytes, path)?;
        Ok(Self { version, metadata, tensors })
    }
}

/// The multiple on which the data and each tensor in it begin.
fn alignment(metadata: &BTreeMap<String, Value>, path: &Path) -> Result<u64> {
    let Some(value) = metadata.get("general.alignment") else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    match value.as_u64() {
        Some(alignment) if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT => {
            Ok(alignment)
        }
        _ => Err(Error::malformed(
            path,
            "key 'general.alignment'",
            format!("a power of two of at most {MAX_ALIGNMENT}"),
            value.describe(),
        )),
    }
}

/// Turns offsets that count from `data_start` into offsets in the file, and checks that each
/// tensor's bytes are aligned, inside the file, and nobody else's.
fn place_tensors(
    tensors: &mut BTreeMap<String, TensorInfo>,
    alignment: u64,
    data_start: u64,
    file_bytes: u64,
    path: &Path,
) -> Result<()> {
    let mut ranges = Vec::with_capacity(tensors.len());
    for (name, info) in tensors.iter_mut() {
        let malformed = |expected: String, found: String| {
            Error::malformed(path, format!("tensor '{name}'"), expected, found)
        };
        if !info.offset.is_multiple_of(alignment) {
            let expected = format!("an offset that is a multiple of {alignment}");
            return Err(malformed(expected, info.offset.to_string()));
        }
        let range = data_start
            .checked_add(info.offset)
            .and_then(|start| Some((start, start.checked_add(info.n_bytes as u64)?)));
        let Some((start, end)) = range.filter(|&(_, end)| end <= file_bytes) else {
            return Err(malformed(
                format!(
                    "{} bytes of data within the file's {file_bytes} (is the file complete?)",
                    info.n_bytes
                ),
                format!("offset {} after byte {data_start}", info.offset),
            ));
        };
        info.offset = start;
        ranges.push((start, end, name));
    }

    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        let ((_, end, first), (start, _, second)) = (pair[0], pair[1]);
        if start < end {
            return Err(Error::malformed(
                path,
                format!("tensor '{second}'"),
                format!("data after that of '{first}', which ends at byte {end}"),
                format!("data from byte {start}"),
            ));
        }
    }
    Ok(())
}

/// Reads forward and knows how far it is, so that no length is believed that the file cannot hold.
struct Cursor<'a, R> {
    reader: R,
    path: &'a Path,
    file_bytes: u64,
    position: u64,
    /// How many array elements may still come.
    array_values: u64,
}

impl<R: Read> Cursor<'_, R> {
    fn malformed(
        &self,
        place: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        Error::malformed(self.path, place, expected, found)
    }

    /// Checks that `n` more bytes can follow.
    fn need(&self, n: u64, place: &str) -> Result<()> {
        let left = self.file_bytes.saturating_sub(self.position);
        if n > left {
            return Err(self.malformed(
                place,
                format!("{n} more bytes at byte {} (is the file complete?)", self.position),
                format!("{left} until the end of the file"),
            ));
        }
        if n > MAX_HEADER_BYTES - self.position {
            let expected = format!("a header of at most {MAX_HEADER_BYTES} bytes");
            return Err(self.malformed(place, expected, format!("{}", self.position + n)));
        }
        Ok(())
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.reader.read_exact(bytes).map_err(|source| Error::io(self.path, source))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self, place: &str) -> Result<[u8; N]> {
        self.need(N as u64, place)?;
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self, place: &str) -> Result<u32> {
        self.bytes(place).map(u32::from_le_bytes)
    }

    fn u64(&mut self, place: &str) -> Result<u64> {
        self.bytes(place).map(u64::from_le_bytes)
    }

    /// A number of `things` that each take at least `min_bytes` of the file.
    fn count(&mut self, place: &str, things: &str, max: u64, min_bytes: u64) -> Result<u64> {
        let count = self.u64(place)?;
        if count > max {
            let expected = format!("at most {max} {things}");
            return Err(self.malformed(place, expected, count.to_string()));
        }
        self.need(count * min_bytes, place)?;
        Ok(count)
    }

    fn string(&mut self, place: &str, max_bytes: u64) -> Result<String> {
        let n_bytes = self.u64(place)?;
        if n_bytes > max_bytes {
            let expected = format!("a string of at most {max_bytes} bytes");
            return Err(self.malformed(place, expected, n_bytes.to_string()));
        }
        self.need(n_bytes, place)?;
        let mut bytes = vec![0; n_bytes as usize]; // at most MAX_STRING_BYTES
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|error| {
            let found = format!("an invalid byte at {}", error.utf8_error().valid_up_to());
            self.malformed(place, "UTF-8 text", found)
        })
    }

    /// A value of the type `value_type`, inside `depth` arrays.
    fn value(&mut self, value_type: u32, depth: usize, place: &str) -> Result<Value> {
        Ok(match value_type {
            0 => Value::U8(u8::from_le_bytes(self.bytes(place)?)),
            1 => Value::I8(i8::from_le_bytes(self.bytes(place)?)),
            2 => Value::U16(u16::from_le_bytes(self.bytes(place)?)),
            3 => Value::I16(i16::from_le_bytes(self.bytes(place)?)),
            4 => Value::U32(self.u32(place)?),
            5 => Value::I32(i32::from_le_bytes(self.bytes(place)?)),
            6 => Value::F32(f32::from_le_bytes(self.bytes(place)?)),
            7 => match self.bytes::<1>(place)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [byte] => return Err(self.malformed(place, "0 or 1 for a bool", byte.to_string())),
            },
            8 => Value::String(self.string(place, MAX_STRING_BYTES)?),
            9 => self.array(depth, place)?,
            10 => Value::U64(self.u64(place)?),
            11 => Value::I64(i64::from_le_bytes(self.bytes(place)?)),
            12 => Value::F64(f64::from_le_bytes(self.bytes(place)?)),
            _ => {
                let expected = "a value type from 0 to 12";
                return Err(self.malformed(place, expected, value_type.to_string()));
            }
        })
    }

    fn array(&mut self, depth: usize, place: &str) -> Result<Value> {
        if depth == MAX_ARRAY_DEPTH {
            let expected = format!("at most {MAX_ARRAY_DEPTH} arrays inside each other");
            return Err(self.malformed(place, expected, "one more"));
        }
        let element_type = self.u32(place)?;
        // The fewest bytes of one element. An unknown type is refused even when the array is empty.
        let min_bytes = match element_type {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            _ => {
                let expected = "an element type from 0 to 12";
                return Err(self.malformed(place, expected, element_type.to_string()));
            }
        };
        let len = self.count(place, "more array elements", self.array_values, min_bytes)?;
        self.array_values -= len;
        (0..len)
            .map(|_| self.value(element_type, depth + 1, place))
            .collect::<Result<_>>()
            .map(Value::Array)
    }

    /// The entry of one tensor; its offset still counts from the start of the data.
    fn tensor_info(&mut self, name: &str, place: &str) -> Result<TensorInfo> {
        let n_dims = self.u32(place)?;
        if !(1..=MAX_DIMS).contains(&n_dims) {
            let expected = format!("1 to {MAX_DIMS} dimensions");
            return Err(self.malformed(place, expected, n_dims.to_string()));
        }
        let mut sizes = Vec::with_capacity(n_dims as usize);
        for _ in 0..n_dims {
            sizes.push(self.u64(place)?);
        }
        sizes.reverse(); // the file has the innermost first
        let type_id = self.u32(place)?;
        let offset = self.u64(place)?;

        let block_type = BlockType::from_id(type_id).ok_or_else(|| {
            let what = format!("tensor '{name}' of the type");
            Error::unsupported(self.path, what, type_id.to_string(), BlockType::readable())
        })?;
        let malformed = |expected: &str| self.malformed(place, expected, format!("{sizes:?}"));
        if sizes.contains(&0) {
            return Err(malformed("sizes above 0"));
        }
        let BlockType { name, block_len, .. } = *block_type;
        if sizes.last().is_none_or(|last| !last.is_multiple_of(block_len as u64)) {
            return Err(malformed(&format!(
                "a last size that is a multiple of {block_len}, for {name}"
            )));
        }
        let shape: Option<Vec<usize>> = sizes.iter().map(|&size| size.try_into().ok()).collect();
        let placed = shape.and_then(|shape| Some((block_type.n_bytes(&shape)?, shape)));
        let (n_bytes, shape) = placed.ok_or_else(|| malformed("sizes that fit in memory"))?;
        Ok(TensorInfo { shape, block_type, offset, n_bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::gguf::writer::{Field, Writer};

    fn parse(bytes: &[u8]) -> Result<Header> {
        Header::parse(bytes, bytes.len() as u64, Path::new("test.gguf"))
    }

    fn small() -> Vec<u8> {
        Writer::new()
            .key("general.architecture", "llama")
            .key("flag", true)
            .key("numbers", [1_u32, 2, 3])
            .key("words", ["a", "bc"])
            .tensor("first", 0, &[2, 3], &[0; 24])
            .tensor("second", 8, &[32], &[0; 34])
            .finish()
    }

    #[test]
    fn sizes_are_outermost_first_and_offsets_from_the_start_of_the_file() {
        let bytes = small();
        let header = parse(&bytes).unwrap();
        assert_eq!(header.version, 3);
        assert_eq!(header.tensors["first"].shape, [2, 3]);
        assert_eq!(header.tensors["first"].n_bytes, 24);
        let (first, second) = (&header.tensors["first"], &header.tensors["second"]);
        assert_eq!(first.offset % 32, 0);
        assert_eq!(second.offset, first.offset + 32); // 24 bytes, padded to the alignment
        assert_eq!(second.offset as usize + 34, bytes.len());
        assert_eq!(header.metadata["words"].as_array().map(<[Value]>::len), Some(2));
    }

    #[test]
    fn every_flipped_byte_and_every_cut_is_answered_without_panic() {
        let bytes = small();
        for position in 0..bytes.len() {
            for flip in [0x01, 0x10, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[position] ^= flip;
                let _ = parse(&damaged);
            }
            assert!(parse(&bytes[..position]).is_err(), "cut at {position}");
        }
    }

    #[test]
    fn nested_arrays_end_at_the_depth_limit() {
        // Each level is an array of one array; the innermost is empty.
        let nested = |levels: u32| {
            let mut payload = Vec::new();
            for level in 1..=levels {
                let (element, len) = if level == levels { (0_u32, 0_u64) } else { (9, 1) };
                payload.extend(element.to_le_bytes());
                payload.extend(len.to_le_bytes());
            }
            Writer::new().raw_key("nested", Vec::<u32>::TYPE, &payload).finish()
        };
        assert!(parse(&nested(MAX_ARRAY_DEPTH as u32)).is_ok());
        let error = parse(&nested(MAX_ARRAY_DEPTH as u32 + 1)).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Malformed { .. }), "{error}");
        assert!(error.to_string().contains("arrays inside each other"), "{error}");
    }

    #[test]
    fn a_header_longer_than_the_limit_is_refused_before_it_is_read() {
        // The file claims to be large enough, so only the limit can stop the string.
        let mut payload = Vec::new();
        payload.extend((MAX_STRING_BYTES + 1).to_le_bytes());
        let bytes = Writer::new().raw_key("long", String::TYPE, &payload).finish();
        let error = Header::parse(&bytes[..], u64::MAX, Path::new("test.gguf")).unwrap_err();
        assert!(error.to_string().contains("a string of at most"), "{error}");
    }

    #[test]
    fn an_array_longer_than_the_limit_is_refused_before_it_is_read() {
        let mut payload = Vec::new();
        payload.extend(0_u32.to_le_bytes());
        payload.extend((MAX_ARRAY_VALUES + 1).to_le_bytes());
        let bytes = Writer::new().raw_key("long", Vec::<u32>::TYPE, &payload).finish();
        let error = Header::parse(&bytes[..], u64::MAX, Path::new("test.gguf")).unwrap_err();
        assert!(error.to_string().contains("at most 4194304"), "{error}");
    }

    #[test]
    fn all_arrays_together_have_one_limit() {
        let half = vec![0_u8; MAX_ARRAY_VALUES as usize / 2];
        let two = || Writer::new().key("first", &half).key("second", &half);
        assert!(parse(&two().finish()).is_ok());
        let error = parse(&two().key("third", [0_u8]).finish()).unwrap_err().to_string();
        assert!(error.contains("key 'third'") && error.contains("at most 0"), "{error}");
    }
}
