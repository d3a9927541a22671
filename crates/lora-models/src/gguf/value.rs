//! One metadata value of a GGUF file.

/// A metadata value, as typed in the file.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// Unsigned, 8 bits.
    U8(u8),
    /// Signed, 8 bits.
    I8(i8),
    /// Unsigned, 16 bits.
    U16(u16),
    /// Signed, 16 bits.
    I16(i16),
    /// Unsigned, 32 bits.
    U32(u32),
    /// Signed, 32 bits.
    I32(i32),
    /// Floating point, 32 bits.
    F32(f32),
    /// True or false.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// Values that all have the same type.
    Array(Vec<Value>),
    /// Unsigned, 64 bits.
    U64(u64),
    /// Signed, 64 bits.
    I64(i64),
    /// Floating point, 64 bits.
    F64(f64),
}

impl Value {
    /// The number, when this is an integer of any width that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::U64(value) => Some(value),
            Self::I8(value) => value.try_into().ok(),
            Self::I16(value) => value.try_into().ok(),
            Self::I32(value) => value.try_into().ok(),
            Self::I64(value) => value.try_into().ok(),
            _ => None,
        }
    }

    /// The number, when this is a floating point number.
    ///
    /// An f32 is widened through its shortest decimal form, not bit by bit: llama.cpp stores the
    /// `1e-5` of a `config.json` as f32, and the user means 1e-5, not 9.999999747378752e-6.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(value) => value.to_string().parse().ok(),
            Self::F64(value) => Some(value),
            _ => None,
        }
    }

    /// The truth value, when this is one.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(value) => Some(value),
            _ => None,
        }
    }

    /// The text, when this is a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(value) => Some(value),
            _ => None,
        }
    }

    /// The elements, when this is an array.
    pub fn as_array(&self) -> Option<&[Value]> {
        match self {
            Self::Array(values) => Some(values),
            _ => None,
        }
    }

    /// Says in a few words what this is, for the "found" of a message.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::String(value) if value.chars().count() > 40 => {
                format!("a string of {} bytes", value.len())
            }
            Self::String(value) => format!("the string '{value}'"),
            Self::Array(values) => format!("an array of {}", values.len()),
            Self::Bool(value) => format!("{value}"),
            Self::F32(value) => format!("{value:?}"),
            Self::F64(value) => format!("{value:?}"),
            Self::U8(value) => format!("{value}"),
            Self::I8(value) => format!("{value}"),
            Self::U16(value) => format!("{value}"),
            Self::I16(value) => format!("{value}"),
            Self::U32(value) => format!("{value}"),
            Self::I32(value) => format!("{value}"),
            Self::U64(value) => format!("{value}"),
            Self::I64(value) => format!("{value}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Value;

    #[test]
    fn every_integer_width_is_an_integer_unless_negative() {
        for value in [
            Value::U8(7),
            Value::I8(7),
            Value::U16(7),
            Value::I16(7),
            Value::U32(7),
            Value::I32(7),
            Value::U64(7),
            Value::I64(7),
        ] {
            assert_eq!(value.as_u64(), Some(7), "{value:?}");
        }
        assert_eq!(Value::I32(-1).as_u64(), None);
        assert_eq!(Value::F32(7.0).as_u64(), None);
    }

    #[test]
    fn an_f32_keeps_its_decimal_meaning() {
        assert_eq!(Value::F32(1e-5).as_f64(), Some(1e-5));
        assert_eq!(Value::F32(100_000.0).as_f64(), Some(100_000.0));
        assert!(Value::F32(f32::NAN).as_f64().is_some_and(f64::is_nan));
        assert_eq!(Value::F32(f32::INFINITY).as_f64(), Some(f64::INFINITY));
        assert_eq!(Value::U32(1).as_f64(), None);
    }

    #[test]
    fn each_getter_takes_only_its_own_type() {
        assert_eq!(Value::Bool(true).as_bool(), Some(true));
        assert_eq!(Value::U8(1).as_bool(), None);
        assert_eq!(Value::String("a".into()).as_str(), Some("a"));
        assert_eq!(Value::U8(1).as_str(), None);
        assert_eq!(Value::Array(vec![Value::U8(1)]).as_array(), Some(&[Value::U8(1)][..]));
        assert_eq!(Value::U8(1).as_array(), None);
    }

    #[test]
    fn a_long_string_is_described_by_its_length() {
        assert_eq!(Value::String("x".repeat(41)).describe(), "a string of 41 bytes");
        assert_eq!(Value::String("llama".into()).describe(), "the string 'llama'");
    }
}
