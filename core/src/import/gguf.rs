//! Reads GGUF: typed keys, then a table of tensors, then their bytes.
//!
//! The file is not trusted: every count is checked against the bytes that are left before
//! anything is kept, values borrow from the file, and tensors must lie inside it, aligned and
//! apart from each other.

use std::collections::BTreeMap;

use super::dequantize::{Encoding, TensorView};
use super::{ImportError, error};

/// Most keys of a file.
pub const KEYS_MAX: u64 = 4096;
/// Most tensors of a file.
pub const TENSORS_MAX: u64 = 1 << 16;
/// Longest name of a key or tensor, in bytes.
pub const NAME_BYTES_MAX: usize = 256;
/// Most dimensions of a tensor.
const DIMENSIONS_MAX: u32 = 4;
/// Largest alignment of tensors, in bytes.
const ALIGNMENT_MAX: u64 = 1 << 16;

/// A value under a key.
#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    /// Any integer type, and bool as 0 or 1.
    Integer(i128),
    /// f32 or f64.
    Float(f64),
    /// UTF-8.
    Text(&'a str),
    /// Texts.
    Texts(Vec<&'a str>),
    /// Integers.
    Integers(Vec<i64>),
    /// Floats.
    Floats(Vec<f32>),
}

/// A parsed file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gguf<'a> {
    /// Keys and values.
    pub keys: BTreeMap<&'a str, Value<'a>>,
    /// Tensors by name.
    pub tensors: BTreeMap<&'a str, TensorView<'a>>,
}

/// A tensor of the table, before its bytes are known.
struct Entry<'a> {
    name: &'a str,
    encoding: Encoding,
    dims: Vec<usize>,
    bytes: usize,
    offset: u64,
}

impl<'a> Gguf<'a> {
    /// Whether these bytes begin as a GGUF file.
    pub fn is(bytes: &[u8]) -> bool {
        bytes.starts_with(b"GGUF")
    }

    /// Parses a whole file.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ImportError> {
        if !Self::is(bytes) {
            return Err(error("header", "this is not a GGUF file"));
        }
        let mut r = Reader { bytes, at: 4 };
        let version = r.u32("header")?;
        if !(2..=3).contains(&version) {
            let big = if version.swap_bytes() <= 3 { " (big-endian)" } else { "" };
            let problem = format!("version {version}{big} is not read, only 2 and 3 are");
            return Err(error("header", problem));
        }
        let (tensors, keys) = (r.u64("header")?, r.u64("header")?);
        if keys > KEYS_MAX || tensors > TENSORS_MAX {
            let problem = format!(
                "{keys} keys and {tensors} tensors are more than {KEYS_MAX} and {TENSORS_MAX}"
            );
            return Err(error("header", problem));
        }
        let mut out = Self::default();
        for i in 0..keys {
            let key = r.name(&format!("key {i}"))?;
            let value = r.value(key)?;
            if out.keys.insert(key, value).is_some() {
                return Err(error(key, "the key is there twice"));
            }
        }
        let mut table = Vec::new();
        for i in 0..tensors {
            table.push(r.entry(i)?);
        }
        let alignment = match out.keys.get("general.alignment") {
            None => 32,
            Some(Value::Integer(a)) => match u64::try_from(*a) {
                Ok(a) if a.is_power_of_two() && a <= ALIGNMENT_MAX => a,
                _ => return Err(error("general.alignment", format!("{a} is no alignment"))),
            },
            Some(_) => return Err(error("general.alignment", "is not an integer")),
        };
        let data = (r.at as u64).next_multiple_of(alignment);
        out.place(bytes, data, alignment, table)?;
        Ok(out)
    }

    /// Finds every tensor's bytes behind `data`.
    fn place(
        &mut self,
        bytes: &'a [u8],
        data: u64,
        alignment: u64,
        mut table: Vec<Entry<'a>>,
    ) -> Result<(), ImportError> {
        table.sort_by_key(|e| e.offset);
        let mut free = 0;
        for e in table {
            let name = e.name;
            if e.offset % alignment != 0 {
                let problem = format!("its offset {} is not a multiple of {alignment}", e.offset);
                return Err(error(name, problem));
            }
            if e.offset < free {
                return Err(error(name, "its bytes overlap those of another tensor"));
            }
            let start = data.checked_add(e.offset).and_then(|s| usize::try_from(s).ok());
            let range = start.and_then(|s| Some(s..s.checked_add(e.bytes)?));
            let Some(bytes) = range.and_then(|r| bytes.get(r)) else {
                let problem = format!(
                    "its {} bytes at offset {} lie outside the file; the file is cut off, copy it again",
                    e.bytes, e.offset
                );
                return Err(error(name, problem));
            };
            free = e.offset + e.bytes as u64;
            let view = TensorView { encoding: e.encoding, dims: e.dims, bytes };
            if self.tensors.insert(name, view).is_some() {
                return Err(error(name, "the tensor is there twice"));
            }
        }
        Ok(())
    }

    /// The text under a key.
    pub fn text(&self, key: &str) -> Result<&'a str, ImportError> {
        match self.get(key)? {
            Value::Text(text) => Ok(text),
            _ => Err(error(key, "is not a text")),
        }
    }

    /// The size or count under a key, below 2^32.
    pub fn size(&self, key: &str) -> Result<usize, ImportError> {
        match self.get(key)? {
            Value::Integer(n) => match u32::try_from(*n) {
                Ok(n) => Ok(n as usize),
                Err(_) => Err(error(key, format!("{n} is not a size"))),
            },
            _ => Err(error(key, "is not an integer")),
        }
    }

    /// The number under a key.
    pub fn float(&self, key: &str) -> Result<f64, ImportError> {
        match self.get(key)? {
            Value::Float(x) => Ok(*x),
            _ => Err(error(key, "is not a number with a fraction")),
        }
    }

    /// The texts under a key.
    pub fn texts(&self, key: &str) -> Result<&[&'a str], ImportError> {
        match self.get(key)? {
            Value::Texts(texts) => Ok(texts),
            _ => Err(error(key, "is not a list of texts")),
        }
    }

    /// The integers under a key.
    pub fn integers(&self, key: &str) -> Result<&[i64], ImportError> {
        match self.get(key)? {
            Value::Integers(integers) => Ok(integers),
            _ => Err(error(key, "is not a list of integers")),
        }
    }

    fn get(&self, key: &str) -> Result<&Value<'a>, ImportError> {
        self.keys.get(key).ok_or_else(|| error(key, "the key is missing"))
    }
}

/// A place in the header.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8], ImportError> {
        let rest = &self.bytes[self.at..];
        let Some(taken) = rest.get(..count) else {
            let problem = format!("the file ends at byte {}; copy it again", self.bytes.len());
            return Err(error(what, problem));
        };
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ImportError> {
        let taken = self.take(N, what)?;
        Ok(std::array::from_fn(|i| taken[i]))
    }

    fn u32(&mut self, what: &str) -> Result<u32, ImportError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, ImportError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn text(&mut self, what: &str) -> Result<&'a str, ImportError> {
        let length = usize::try_from(self.u64(what)?).unwrap_or(usize::MAX);
        let bytes = self.take(length, what)?;
        std::str::from_utf8(bytes).map_err(|_| error(what, "a text is not UTF-8"))
    }

    fn name(&mut self, what: &str) -> Result<&'a str, ImportError> {
        let name = self.text(what)?;
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            let problem = format!("a name of {} bytes, not 1 to {NAME_BYTES_MAX}", name.len());
            return Err(error(what, problem));
        }
        Ok(name)
    }

    fn value(&mut self, key: &str) -> Result<Value<'a>, ImportError> {
        let kind = self.u32(key)?;
        Ok(match kind {
            8 => Value::Text(self.text(key)?),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array(key)?))),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            9 => self.list(key)?,
            _ => Value::Integer(self.integer(kind, key)?),
        })
    }

    fn integer(&mut self, kind: u32, key: &str) -> Result<i128, ImportError> {
        Ok(match kind {
            0 | 7 => i128::from(self.array::<1>(key)?[0]),
            1 => i128::from(self.array::<1>(key)?[0].cast_signed()),
            2 => i128::from(u16::from_le_bytes(self.array(key)?)),
            3 => i128::from(i16::from_le_bytes(self.array(key)?)),
            4 => i128::from(u32::from_le_bytes(self.array(key)?)),
            5 => i128::from(i32::from_le_bytes(self.array(key)?)),
            10 => i128::from(u64::from_le_bytes(self.array(key)?)),
            11 => i128::from(i64::from_le_bytes(self.array(key)?)),
            _ => return Err(error(key, format!("its type {kind} is unknown"))),
        })
    }

    fn list(&mut self, key: &str) -> Result<Value<'a>, ImportError> {
        let (kind, count) = (self.u32(key)?, self.u64(key)?);
        // Every element takes a byte or more, a text eight or more.
        let least = if kind == 8 { 8 } else { 1 };
        let left = (self.bytes.len() - self.at) as u64;
        if count.checked_mul(least).is_none_or(|bytes| bytes > left) {
            return Err(error(key, format!("{count} elements do not fit the rest of the file")));
        }
        match kind {
            8 => (0..count).map(|_| self.text(key)).collect::<Result<_, _>>().map(Value::Texts),
            6 => {
                let float = |_| Ok(f32::from_le_bytes(self.array(key)?));
                (0..count).map(float).collect::<Result<_, _>>().map(Value::Floats)
            }
            _ => {
                let integer = |_| {
                    let n = self.integer(kind, key)?;
                    i64::try_from(n).map_err(|_| error(key, format!("{n} is over 63 bits")))
                };
                (0..count).map(integer).collect::<Result<_, _>>().map(Value::Integers)
            }
        }
    }

    fn entry(&mut self, index: u64) -> Result<Entry<'a>, ImportError> {
        let name = self.name(&format!("tensor {index}"))?;
        let count = self.u32(name)?;
        if !(1..=DIMENSIONS_MAX).contains(&count) {
            return Err(error(name, format!("{count} dimensions, not 1 to {DIMENSIONS_MAX}")));
        }
        let dims = (0..count).map(|_| {
            let d = self.u64(name)?;
            let size = usize::try_from(d).ok().filter(|_| (1..1 << 32).contains(&d));
            size.ok_or_else(|| error(name, format!("a dimension is {d}")))
        });
        let mut dims = dims.collect::<Result<Vec<usize>, _>>()?;
        // GGUF names the contiguous dimension first.
        dims.reverse();
        let number = self.u32(name)?;
        let offset = self.u64(name)?;
        let Some(encoding) = Encoding::from_ggml(number) else {
            let known = Encoding::names();
            return Err(error(name, format!("its type {number} is not read; {known} are")));
        };
        let Some(bytes) = encoding.bytes(&dims) else {
            let problem = format!("{dims:?} does not consist of blocks of {}", encoding.name());
            return Err(error(name, problem));
        };
        Ok(Entry { name, encoding, dims, bytes, offset })
    }
}
