"""Character classes and word hashes of texts, found without a Python loop over characters.

A word is a run of letters, marks and digits, its case folded; a letter of a script that is written without spaces (Han,
kana, Thai ...) is a word by itself. Hashes are the same in every process: they do not depend on PYTHONHASHSEED.
"""

import functools
import unicodedata
from collections.abc import Iterator

import numpy as np
import regex
from jaxtyping import Int, UInt8, UInt64

SPACE, PUNCTUATION, WORD, IDEOGRAPH = 1, 2, 3, 4  # what is none of these, as control characters, is 0

_PATTERNS = {
  SPACE: r"\s+",
  PUNCTUATION: r"[\p{P}\p{S}]+",
  WORD: r"[\p{L}\p{M}\p{N}]+",
  IDEOGRAPH: r"[[\p{lb=Ideographic}\p{lb=Conditional_Japanese_Starter}\p{lb=Complex_Context}]&&[\p{L}\p{M}]]+",
}
_ASSIGNED = (range(0x40000), range(0xE0000, 0xE1000))  # tags and variation selectors; what is left is private use
_NUM_CODE_POINTS = 0x110000
_PIECE_CHARS = 1 << 16  # bounds the memory that a text of any length takes
_RADIX = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_BREAK = regex.compile(r"\s")


@functools.cache
def class_table() -> UInt8[np.ndarray, "code_points"]:
  """Returns the class of each code point."""
  return code_point_table(_PATTERNS)


def code_point_table(patterns: dict[int, str]) -> UInt8[np.ndarray, "code_points"]:
  """Returns, for each code point, the number whose pattern (the last of several) matches it, or 0."""
  table = np.zeros(_NUM_CODE_POINTS, np.uint8)
  for assigned in _ASSIGNED:
    characters = "".join(map(chr, assigned))
    for number, pattern in patterns.items():
      for match in regex.finditer(pattern, characters, regex.VERSION1):
        table[assigned.start + match.start() : assigned.start + match.end()] = number
  return table


def look_up(text: str, table: UInt8[np.ndarray, "code_points"]) -> UInt8[np.ndarray, "chars"]:
  """Returns the entry of each character in a table of code points."""
  if text.isascii():
    return np.frombuffer(text.encode().translate(table[:256].tobytes()), np.uint8)
  return table[_code_points(text)]


def count(text: str, table: UInt8[np.ndarray, "code_points"]) -> Int[np.ndarray, "numbers"]:
  """Returns how many characters have each number in a table of code points."""
  pieces = (text[start : start + _PIECE_CHARS] for start in range(0, len(text), _PIECE_CHARS))
  counts = np.zeros(int(table.max()) + 1, np.int64)
  for piece in pieces:
    counts += np.bincount(look_up(piece, table), minlength=len(counts))
  return counts


def pieces(text: str, max_chars: int) -> Iterator[str]:
  """Yields a text in short pieces that end after white space, unless there is none within `max_chars`."""
  start = 0
  while start < len(text):
    stop = start + _PIECE_CHARS
    if stop < len(text):
      found = _BREAK.search(text, stop, start + max_chars)
      stop = found.end() if found else start + max_chars
    yield text[start:stop]
    start = stop


@functools.lru_cache(maxsize=1)  # several rules in turn ask for the words of one document
def word_hashes(text: str) -> UInt64[np.ndarray, "words"]:
  """Returns a hash of each word, in order; not to be written to."""
  hashes = [_hash_words(unicodedata.normalize("NFC", piece).lower()) for piece in pieces(text, 2 * _PIECE_CHARS)]
  hashes = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
  hashes.setflags(write=False)
  return hashes


def shingles(words: UInt64[np.ndarray, "words"], num_words: int) -> UInt64[np.ndarray, "shingles"]:
  """Returns a hash of each `num_words` words in a row; if there are fewer words, the one hash of all of them."""
  if not len(words):
    return words
  num_words = min(num_words, len(words))
  count = len(words) - num_words + 1
  hashes = words[:count].copy()
  for offset in range(1, num_words):
    hashes *= np.uint64(_RADIX)
    hashes += words[offset : offset + count]
  return mix(hashes)


def mix(values: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
  """Returns the values after a bijection of 64 bits in which every bit of a value changes half the bits of the result.

  Source: the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
  """
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))


def _code_points(text: str) -> np.ndarray:
  return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _hash_words(text: str) -> np.ndarray:
  """Returns the hashes as differences of one running sum: a word is a polynomial in `_RADIX` modulo 2**64."""
  kinds = look_up(text, class_table())
  is_start, is_end = kinds >= WORD, kinds >= WORD
  is_alone = kinds == IDEOGRAPH
  changes = kinds[1:] != kinds[:-1]
  is_start[1:] &= changes | is_alone[1:]
  is_end[:-1] &= changes | is_alone[:-1]
  starts, stops = np.flatnonzero(is_start), np.flatnonzero(is_end) + 1
  powers, inverses = _powers(1 << len(text).bit_length())
  characters = np.frombuffer(text.encode(), np.uint8) if text.isascii() else _code_points(text)
  sums = np.zeros(len(text) + 1, np.uint64)
  np.cumsum(characters * powers[: len(text)], out=sums[1:])
  return mix((sums[stops] - sums[starts]) * inverses[starts])


@functools.cache
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the powers of `_RADIX` and of its inverse."""
  factors = np.empty((2, count), np.uint64)
  factors[0], factors[1] = _RADIX, pow(_RADIX, -1, 2**64)
  factors[:, 0] = 1
  powers, inverses = np.multiply.accumulate(factors, axis=1)
  return powers, inverses
