//! The bytes of a GGUF file. Tests also write with it what a reader must refuse.

const ALIGNMENT: usize = 32;

/// What can stand under a key.
pub trait Field {
    /// The number that stands for the type in a file.
    const TYPE: u32;
    /// Appends the value's bytes.
    fn write(&self, bytes: &mut Vec<u8>);
}

macro_rules! numbers {
    ($($number:ty = $id:literal),*) => {$(
        impl Field for $number {
            const TYPE: u32 = $id;
            fn write(&self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_le_bytes());
            }
        }
    )*};
}
numbers!(u8 = 0, i8 = 1, u16 = 2, i16 = 3, u32 = 4, i32 = 5, f32 = 6, u64 = 10, i64 = 11, f64 = 12);

impl Field for bool {
    const TYPE: u32 = 7;
    fn write(&self, bytes: &mut Vec<u8>) {
        bytes.push((*self).into());
    }
}

impl Field for str {
    const TYPE: u32 = 8;
    fn write(&self, bytes: &mut Vec<u8>) {
        bytes.extend((self.len() as u64).to_le_bytes());
        bytes.extend(self.as_bytes());
    }
}

impl Field for String {
    const TYPE: u32 = str::TYPE;
    fn write(&self, bytes: &mut Vec<u8>) {
        self.as_str().write(bytes);
    }
}

impl<T: Field> Field for [T] {
    const TYPE: u32 = 9;
    fn write(&self, bytes: &mut Vec<u8>) {
        bytes.extend(T::TYPE.to_le_bytes());
        bytes.extend((self.len() as u64).to_le_bytes());
        self.iter().for_each(|element| element.write(bytes));
    }
}

impl<T: Field, const N: usize> Field for [T; N] {
    const TYPE: u32 = <[T]>::TYPE;
    fn write(&self, bytes: &mut Vec<u8>) {
        self[..].write(bytes);
    }
}

impl<T: Field> Field for Vec<T> {
    const TYPE: u32 = <[T]>::TYPE;
    fn write(&self, bytes: &mut Vec<u8>) {
        self[..].write(bytes);
    }
}

impl<T: Field + ?Sized> Field for &T {
    const TYPE: u32 = T::TYPE;
    fn write(&self, bytes: &mut Vec<u8>) {
        (**self).write(bytes);
    }
}

/// A file in the making.
#[derive(Debug, Default)]
pub struct Writer {
    n_keys: u64,
    keys: Vec<u8>,
    n_tensors: u64,
    tensors: Vec<u8>,
    data: Vec<u8>,
}

impl Writer {
    /// A file without keys and tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// A key with a typed value.
    pub fn key<T: Field>(self, key: &str, value: T) -> Self {
        let mut payload = Vec::new();
        value.write(&mut payload);
        self.raw_key(key, T::TYPE, &payload)
    }

    /// A key whose type and value are taken as they are.
    pub fn raw_key(mut self, key: &str, value_type: u32, payload: &[u8]) -> Self {
        self.n_keys += 1;
        key.write(&mut self.keys);
        value_type.write(&mut self.keys);
        self.keys.extend(payload);
        self
    }

    /// A tensor of `shape`, outermost first.
    pub fn tensor(mut self, name: &str, type_id: u32, shape: &[u64], bytes: &[u8]) -> Self {
        self.data.resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
        let offset = self.data.len() as u64;
        self.data.extend(bytes);
        self.raw_tensor(name, type_id, shape, offset)
    }

    /// A tensor of `shape`, outermost first, in f32.
    pub fn f32s(self, name: &str, shape: &[u64], values: &[f32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensor(name, 0, shape, &bytes)
    }

    /// The entry of a tensor, whether or not there is data for it.
    pub fn raw_tensor(mut self, name: &str, type_id: u32, shape: &[u64], offset: u64) -> Self {
        self.n_tensors += 1;
        name.write(&mut self.tensors);
        (shape.len() as u32).write(&mut self.tensors);
        shape.iter().rev().for_each(|size| size.write(&mut self.tensors));
        type_id.write(&mut self.tensors);
        offset.write(&mut self.tensors);
        self
    }

    /// The bytes of the file, padded to the alignment as ggml's own writer and its reader of whole
    /// files have it.
    pub fn finish_padded(self) -> Vec<u8> {
        let mut bytes = self.finish();
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes
    }

    /// The bytes of the file up to the last one that means something.
    pub fn finish(self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        3_u32.write(&mut bytes);
        self.n_tensors.write(&mut bytes);
        self.n_keys.write(&mut bytes);
        bytes.extend(self.keys);
        bytes.extend(self.tensors);
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes.extend(self.data);
        bytes
    }

    #[cfg(test)]
    /// The file itself, gone when the value is dropped.
    pub fn write(self) -> tempfile::NamedTempFile {
        on_disk(&self.finish())
    }
}

#[cfg(test)]
/// `bytes` as a file, gone when the value is dropped.
pub fn on_disk(bytes: &[u8]) -> tempfile::NamedTempFile {
    use std::io::Write;

    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}
