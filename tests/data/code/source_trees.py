"""A source tree in Rust and Python with everything in it that trips up simple parsers, and readers of output."""

import json

LIBRARY = r"""//! The crate's documentation, with a brace } in it.
mod parser;
pub mod shapes;

use crate::parser::parse_header;

/// Doubles a number.
///
/// # Examples
/// ```
/// assert_eq!(double(2), 4);
/// ```
#[inline]
#[must_use = "a } in a string"]
pub const fn double(x: u32) -> u32 {
  x * 2 // a comment with }
}

/* outer /* nested } */ still a comment */
pub async unsafe fn fetch<'a, T: Into<Vec<Vec<u8>>>>(input: &'a T) -> Result<Vec<u8>, Box<dyn std::error::Error + 'a>>
where
  T: Clone + 'a,
  for<'b> &'b T: IntoIterator<Item = &'b u8>,
{
  let raw = r##"a raw string with "# and { braces }"##;
  let bytes = b"{{{";
  let (open, tick) = ('{', '\'');
  let label = 'outer: loop { break 'outer raw.len() };
  println!("{raw} {open} {tick} {label} {}", bytes.len());
  Ok(input.clone().into().remove(0))
}

extern "C" fn callback(code: i32) -> i32 {
  if code > 0 { code } else { -code }
}

macro_rules! make_struct {
  ($name:ident { $($field:ident : $type:ty),* }) => {
    pub struct $name { $($field: $type),* }
  };
}

make_struct!(Generated { a: u8, b: Vec<u8> });

#[cfg(not(test))]
pub fn production_only() -> &'static str {
  "not a test"
}

#[cfg(test)]
mod tests {
  use super::*;

  fn helper() -> u32 { 21 }

  #[test]
  fn test_double() {
    assert_eq!(double(helper()), 42);
  }

  #[tokio::test(flavor = "multi_thread")]
  async fn fetch_returns_bytes() {
    let brace = "}";
    assert!(unsafe { fetch(&vec![vec![1u8]]).await }.is_ok(), "{brace}");
  }
}
"""

PARSER = r"""use std::fmt::{self, Display};

/// The header of a message.
#[derive(Debug, Clone, PartialEq)]
pub struct Header<'a, K: Ord = u8, const N: usize = 4> where K: Display {
  /// Its key.
  pub key: K,
  body: &'a [u8; N],
}

pub enum Token { Open = b'{' as isize, Close = b'}' as isize }

pub union Bits { int: u32, float: f32 }

pub trait Parse<'a>: Sized + 'a {
  const LIMIT: usize = 8;
  type Output: Display;
  fn parse(input: &'a str) -> Option<Self>;
  fn parse_or_default(input: &'a str) -> Self where Self: Default {
    Self::parse(input).unwrap_or_default()
  }
}

impl<'a, K: Ord + Display, const N: usize> Display for Header<'a, K, N> where K: Clone {
  fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    write!(f, "{{{}}}", self.key)
  }
}

pub static GREETING: &str = "hello {";
pub const LIMIT: usize = { 1 + 2 };
pub type Map<K> = std::collections::HashMap<K, Vec<Option<K>>>;

pub(crate) fn parse_header(line: &str) -> Option<(&str, &str)> {
  let split = |text: &str| text.find(|c: char| c == '{' || c == ':');
  split(line).map(|at| (&line[..at], &line[at + 1..]))
}
"""

SHAPES = """//! Shapes.
use crate::double;

pub mod flat {
  /// A circle.
  pub struct Circle { pub radius: u32 }

  impl Circle {
    /// Its width.
    pub fn width(&self) -> u32 {
      super::super::double(self.radius)
    }
  }
}

pub fn area(side: u32) -> u32 {
  side * double(side) / 2
}
"""

INTEGRATION = """use sample::parser::parse_header;

#[test]
fn parse_header_splits_at_the_colon() {
  assert_eq!(parse_header("a:b"), Some(("a", "b")));
}
"""

PYTHON = '''"""A module."""
import os


class Stack(list):
    """A stack."""

    limit = 3

    @property
    def top(self):
        """Return the last element."""
        text = """not { a docstring
        def fake(): pass
"""
        return self[-1] or text

    async def drain(self): return [x async for x in self]


if os.name == "posix":
    def where():
        # no docstring
        def inner():
            return 1
        return inner()
'''


def write_tree(root, crates=1):
  """Writes a workspace in which each crate has files of its own, eight per crate and three besides."""
  files = {
    "Cargo.toml": '[workspace]\nmembers = ["crates/*"]\n[workspace.package]\nlicense = "MIT OR Apache-2.0"\n',
    "tools/stack.py": PYTHON,
    "README.md": "# A sample\n\nIt has everything in it.\n",
  }
  for number in range(crates):
    crate = f"crates/sample{number}"
    # Words that differ from crate to crate, so that files are no near duplicates of one another.
    words = "\n".join(f"pub const WORD_{number}_{i}: u32 = {number * 7919 + i * i};" for i in range(60))
    many = "\n\n".join(
      f"/// Adds {i} of {number}.\npub fn add_{number}_{i}(x{i}: u32) -> u32 {{\n  x{i} + {number} * {i}\n}}"
      for i in range(40)
    )
    files |= {
      f"{crate}/Cargo.toml": f'[package]\nname = "sample{number}"\nversion = "0.{number}.0"\n',
      f"{crate}/src/lib.rs": LIBRARY + words,
      f"{crate}/src/parser.rs": PARSER + words.replace("WORD", "PARSER_WORD"),
      f"{crate}/src/shapes/mod.rs": SHAPES + words.replace("WORD", "SHAPE_WORD"),
      f"{crate}/src/words.rs": f"//! Words of {number}.\n{words.replace('u32', 'u64')}\n",
      f"{crate}/src/many.rs": many + "\n",
      f"{crate}/src/broken.rs": f"fn fine{number}() {{ 1 + {number}; }}\n\nfn broken( {{ let = ;\n" + words,
      f"{crate}/tests/header.rs": INTEGRATION + words.replace("pub const", "const"),
    }
  for name, text in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return root


def samples(output, *kinds):
  """Returns the samples of all splits, those of some kinds if any are given."""
  rows = [
    json.loads(line)
    for split in ("train", "validation", "test")
    for line in (output / f"{split}.jsonl").read_text().split("\n")
    if line
  ]
  return [row for row in rows if not kinds or row["meta"]["kind"] in kinds]


def manifest(output):
  return json.loads((output / "manifest.json").read_text())


def files(output):
  return {row["path"]: row for row in map(json.loads, (output / "files.jsonl").read_text().splitlines())}


def without_header(text):
  """Returns a sample without the comments that begin it."""
  lines = text.split("\n")
  while lines[0].startswith(("// path: ", "// in: ", "# path: ", "# in: ", "<!-- path: ")):
    lines.pop(0)
  return "\n".join(lines)
