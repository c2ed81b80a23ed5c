"""Documents that hold what a model will be tested with, found by the words they share with evaluation texts.

A document is contaminated if 13 of its words in a row, case and punctuation dropped, are in an evaluation text. Source:
arXiv:2005.14165 appendix C, which cuts out the overlap where we leave out the document. Texts with fewer words match
documents with exactly these words.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64

from ultrathink_jax.data.documents import Document
from ultrathink_jax.data.quality.words import shingles, word_hashes
from ultrathink_jax.errors import DataError


class Contamination:
  """What evaluation texts hold, in about 24 bytes per word: it can be pickled and sent to the processes that read."""

  def __init__(self, texts: Iterable[tuple[str, str]], num_words: int = 13):
    """Takes (name, text) pairs; of several texts that share words the first is named."""
    self._num_words = num_words
    self._names: list[str] = []
    keys, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint32)]
    for name, text in texts:
      found = shingles(word_hashes(text), num_words)
      if not self._names or name != self._names[-1]:
        self._names.append(name)
      keys.append(found)
      owners.append(np.full(len(found), len(self._names) - 1, np.uint32))
    self._keys, first = np.unique(np.concatenate(keys), return_index=True)
    self._owners = np.concatenate(owners)[first]
    self._is_used = np.zeros(8 << len(self._keys).bit_length(), bool)  # by the low bits, so that few keys are searched
    self._is_used[self._low_bits(self._keys)] = True

  def matches(self, document: Document) -> str | None:
    """Returns the name of an evaluation text that the document overlaps, the first in the document, or None."""
    found = shingles(word_hashes(document.text), self._num_words)
    found = found[self._is_used[self._low_bits(found)]]
    if not len(found):
      return None
    places = np.minimum(np.searchsorted(self._keys, found), len(self._keys) - 1)
    hits = places[self._keys[places] == found]
    return self._names[self._owners[hits[0]]] if len(hits) else None

  def _low_bits(self, keys: UInt64[np.ndarray, "keys"]) -> UInt64[np.ndarray, "keys"]:
    return keys & np.uint64(len(self._is_used) - 1)


def read_texts(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
  """Yields (name, text) of evaluation files: each string in a line of a .jsonl file, all of any other file.

  Raises:
    DataError: a file cannot be read, or a line of it is not JSON.
  """
  for path in map(Path, paths):
    if path.suffix != ".jsonl":
      yield path.name, _read(path)
      continue
    for number, line in enumerate(_read(path).split("\n"), 1):
      if not line.strip():
        continue
      try:
        value = json.loads(line)
      except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{number}: not JSON ({error}); write one object per line") from error
      for text in _strings(value):
        yield f"{path.name}:{number}", text


def _read(path: Path) -> str:
  try:
    return path.read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    raise DataError(f"{path}: not UTF-8 at byte {error.start}; evaluation files are text or .jsonl") from error
  except OSError as error:
    raise DataError(f"{path}: cannot be read: {error.strerror}; correct quality.decontaminate") from error


def _strings(value: Any) -> Iterator[str]:
  """Yields the strings in a JSON value, in order."""
  stack = [value]
  while stack:
    value = stack.pop()
    if isinstance(value, str):
      yield value
    elif isinstance(value, dict):
      stack += reversed(value.values())
    elif isinstance(value, list):
      stack += reversed(value)
