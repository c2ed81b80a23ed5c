"""Documents that say the same, found from signatures of fixed size that are made where the documents are read.

Two documents are exact duplicates if their texts are equal in normal form C with white space folded. They are near
duplicates if the share of their shingles (5 words in a row, case and punctuation dropped) that both have, the Jaccard
similarity, reaches a threshold; it is estimated as the share of 128 hash functions whose minimum over the shingles is
the same, and only for pairs that agree in all functions of one band at least, which finds the pairs without comparing
all. Sources: Broder 1997 (On the resemblance and containment of documents), arXiv:2107.06499 (its use on corpora), Li
and Koenig arXiv:0910.3349 (16 bits of each minimum are enough).

A signature has 272 bytes (305 as a Python object); while duplicates are looked for, a document takes some 700 in all.
"""

import functools
import hashlib
import math
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int, UInt16, UInt64

from ultrathink_jax.data.documents import Document
from ultrathink_jax.data.quality.words import mix, pieces, shingles, word_hashes

NUM_FUNCTIONS = 128
_SHINGLE_WORDS = 5
_DIGEST_BYTES = 16
_BLOCK_SHINGLES = 1024  # times 128 functions, four bytes each: stays in the cache
_BLOCK_ROWS = 1 << 16


def signature(document: Document, similarity: float = 0.8) -> bytes:
  """Returns what `clusters` compares documents by; for similarity 1 only what tells exact duplicates."""
  text = document.text
  digest = _digest(text)
  if similarity >= 1:
    return digest
  keys = shingles(word_hashes(text), _SHINGLE_WORDS)
  if not len(keys):
    keys = np.frombuffer(digest[:8], "<u8")  # texts without a word are like themselves only
  return digest + minima(keys).astype("<u2").tobytes()


def minima(keys: UInt64[np.ndarray, "shingles"]) -> UInt16[np.ndarray, "functions"]:
  """Returns the low bits of the least value that each function, an affine map modulo 2**32, takes on the keys."""
  factors, offsets = _functions()
  keys = (keys >> np.uint64(32)).astype(np.uint32)
  least = np.full(NUM_FUNCTIONS, 2**32 - 1, np.uint32)
  for start in range(0, len(keys), _BLOCK_SHINGLES):
    values = factors * keys[start : start + _BLOCK_SHINGLES]
    values += offsets
    np.minimum(least, values.min(axis=1), out=least)
  return least.astype(np.uint16)


def clusters(
  names: Sequence[str], signatures: Sequence[bytes], similarity: float = 0.8
) -> Int[np.ndarray, "documents"]:
  """Returns, for each document, the index of the one that stands for its cluster, that with the smallest name.

  So document i is the one to keep if and only if `clusters(...)[i] == i`, and the ids tell which documents must not be
  in two splits. A cluster is what pairs link: exact duplicates, and pairs that agree in a band and whose estimated
  similarity reaches `similarity`. Names must differ; then the clusters do not depend on the order of the documents.
  """
  if not len(names):
    return np.zeros(0, np.int64)
  order = np.array(sorted(range(len(names)), key=names.__getitem__))
  rows = np.frombuffer(b"".join(signatures[i] for i in order), "<u2").reshape(len(names), -1)
  sets = DisjointSets(len(names))  # of ranks by name, so that the least of a set is the one to keep
  digests = rows[:, : _DIGEST_BYTES // 2].copy().view("<u8")
  for group in _groups(digests[:, 0], digests[:, 1]):
    sets.join(group.tolist())
  if similarity < 1:
    assert rows.shape[1] == _DIGEST_BYTES // 2 + NUM_FUNCTIONS, "signatures made for similarity 1 tell exact duplicates"
    _join_similar(rows[:, _DIGEST_BYTES // 2 :], similarity, sets)
  clustered = np.empty(len(names), np.int64)
  clustered[order] = order[sets.roots()]
  return clustered


class DisjointSets:
  """A partition of 0..count-1 that grows coarser; the root of a set is its least element."""

  def __init__(self, count: int):
    self._parents = list(range(count))

  def find(self, element: int) -> int:
    """Returns the root of an element's set."""
    parents = self._parents
    while parents[element] != element:
      parents[element] = element = parents[parents[element]]
    return element

  def join(self, elements: Sequence[int]) -> None:
    """Makes one set of the sets of the elements."""
    roots = {self.find(element) for element in elements}
    least = min(roots)
    for root in roots:
      self._parents[root] = least

  def roots(self) -> Int[np.ndarray, "elements"]:
    """Returns the root of each element."""
    return np.array([self.find(element) for element in range(len(self._parents))])


def rows_per_band(similarity: float) -> int:
  """Returns how many functions make a band: the most with which 9 in 10 pairs of that similarity agree in a band."""
  return max(
    (rows for rows in (2, 4, 8, 16) if 1 - (1 - similarity**rows) ** (NUM_FUNCTIONS // rows) >= 0.9), default=1
  )


def _join_similar(sketches: np.ndarray, similarity: float, sets: DisjointSets) -> None:
  num_equal = math.ceil(similarity * NUM_FUNCTIONS - 1e-9)
  remaining = np.unique(sets.roots())
  for group in _groups(
    _fold(sketches, remaining, range(NUM_FUNCTIONS))
  ):  # equal throughout, as many as there may be, need no search
    _join_group(remaining[group], sketches, NUM_FUNCTIONS, sets)
  remaining = np.unique(sets.roots())
  rows = rows_per_band(similarity)
  for start in range(0, NUM_FUNCTIONS, rows):
    for group in _groups(_fold(sketches, remaining, range(start, start + rows))):
      _join_group(remaining[group], sketches, num_equal, sets)


def _join_group(group: np.ndarray, sketches: np.ndarray, num_equal: int, sets: DisjointSets) -> None:
  """Joins what pairs of a group that agree in `num_equal` functions link."""
  if len({sets.find(element) for element in group.tolist()}) == 1:
    return
  while len(group) > 1:
    reached, group = [int(group[0])], group[1:]
    while reached and len(group):
      element = reached.pop()
      is_near = np.concatenate([
        (sketches[group[start : start + _BLOCK_ROWS]] == sketches[element]).sum(axis=1) >= num_equal
        for start in range(0, len(group), _BLOCK_ROWS)
      ])  # fmt: skip
      if is_near.any():
        near = group[is_near].tolist()
        sets.join([element, *near])
        reached += near
        group = group[~is_near]


def _groups(*columns: np.ndarray) -> Iterator[np.ndarray]:
  """Yields the indices, ascending, of each two or more rows that are equal in all columns."""
  order = np.lexsort(columns)
  is_new = np.ones(len(order) + 1, bool)
  is_new[1:-1] = np.any([column[order[1:]] != column[order[:-1]] for column in columns], axis=0)
  bounds = np.flatnonzero(is_new)
  is_group = np.diff(bounds) > 1
  for start, stop in zip(bounds[:-1][is_group], bounds[1:][is_group], strict=True):
    yield order[start:stop]


def _fold(sketches: UInt16[np.ndarray, "documents functions"], documents: np.ndarray, functions: range) -> np.ndarray:
  """Returns a hash of some values of some sketches."""
  folded = np.zeros(len(documents), np.uint64)
  for function in functions:
    folded = mix(folded + sketches[documents, function] + np.uint64(1))
  return folded


def _digest(text: str) -> bytes:
  """Returns a hash of the words between white space, which takes no notice of where the pieces end."""
  digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
  for piece in pieces(text, len(text)):
    folded = " ".join([*unicodedata.normalize("NFC", piece).split(), ""])
    digest.update(folded.encode("utf-8", "surrogatepass"))
  return digest.digest()


@functools.cache
def _functions() -> tuple[np.ndarray, np.ndarray]:
  """Returns the factors, which are odd, and the offsets."""
  numbers = mix(np.arange(1, 2 * NUM_FUNCTIONS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
  factors, offsets = (numbers >> np.uint64(32)).astype(np.uint32).reshape(2, NUM_FUNCTIONS, 1)
  return factors | np.uint32(1), offsets
