"""Documents, where they come from, and which of them are held out for validation."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable


class Document(NamedTuple):
  """A text that is one training example; `name` is stable across machines and decides its split."""

  text: str
  name: str


@runtime_checkable
class Source(Protocol):
  """Documents of one split, by random access."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Document: ...


class Splits(NamedTuple):
  """The opened documents of a corpus; `num_skipped` files of it are not text."""

  train: Source
  validation: Source
  num_skipped: int


class Corpus(NamedTuple):
  """Documents that are not read yet.

  Attributes:
    identity: differs whenever the documents may differ, found without reading them.
    open: reads, checks and splits them; the slow part.
  """

  identity: str
  open: Callable[[], Splits]


def split(names: Sequence[str], validation_fraction: float) -> tuple[list[int], list[int]]:
  """Returns the indices of the training and of the validation documents, each ordered by a hash of the name.

  The order makes every prefix of a split a random sample of it. A document changes sides only when its own name or
  the fraction changes, with one exception: of two or more documents each side gets at least one (the validation side
  only where the fraction is above 0).
  """
  scores = [score(name) for name in names]
  order = sorted(range(len(names)), key=lambda i: (scores[i], names[i]))
  num_validation = sum(value < validation_fraction for value in scores)
  num_validation = min(max(num_validation, int(validation_fraction > 0)), max(len(names) - 1, 0))
  return order[num_validation:], order[:num_validation]


def score(name: str) -> float:
  """Returns a number in [0, 1) that depends on the name alone."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
