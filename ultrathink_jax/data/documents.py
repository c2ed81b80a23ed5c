"""What flows from a source to the tokens on disk: records as they lie there, and the documents made of them."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

_EXCERPT_CHARS = 200


class Record(NamedTuple):
  """One entry of a source.

  Attributes:
    where: FILE:LINE, FILE#RECORD or PATH, relative to what the source names; the same on every machine. It is what
      people are told, the name of the document made of the entry, and so decides its split.
    fields: what the entry holds, by name; a plain text has the one field that the configuration names.
  """

  where: str
  fields: Mapping[str, Any]


class Reject(NamedTuple):
  """An entry that cannot be used: `reason` is one line, `excerpt` the start of what was there."""

  where: str
  reason: str
  excerpt: str = ""


class Part(NamedTuple):
  """A stretch of text of which the model learns every token or none; it is tokenized by itself."""

  text: str
  is_learned: bool = True


class Document(NamedTuple):
  """One training example.

  Attributes:
    name: stable across machines; decides the split.
    sequences: one for most formats, chosen and rejected for preferences; each is its parts, in order.
    label: of an unpaired preference, whether the answer is a good one.
  """

  name: str
  sequences: tuple[tuple[Part, ...], ...]
  label: bool | None = None

  @property
  def text(self) -> str:
    """The text of all sequences, which filters and statistics look at."""
    return "\n".join("".join(part.text for part in sequence) for sequence in self.sequences)


def plain(name: str, text: str) -> Document:
  """Returns a document of which every token is learned."""
  return Document(name, ((Part(text),),))


@runtime_checkable
class Shard(Protocol):
  """A part of a corpus that is read by itself, in order, by any process: it can be pickled.

  `name` is the same on every machine and no two shards of a corpus share one; `num_bytes` is about how much there is to
  read.
  """

  name: str
  num_bytes: int

  def read(self) -> Iterator[Record | Reject]: ...


class Corpus(NamedTuple):
  """Entries that are not read yet.

  Attributes:
    identity: differs whenever the entries may differ, found without reading them.
    open: lists the shards, by the split they belong to; under "" where the split of each document is found by its name.
  """

  identity: str
  open: Callable[[], Mapping[str, Sequence[Shard]]]


class BadRecordError(ValueError):
  """An entry from which no document can be made; its text is the reason, one line."""


def excerpt(content: str | bytes) -> str:
  """Returns the start of what an entry holds, for `Reject`."""
  start = content[:_EXCERPT_CHARS]
  return start.decode("utf-8", "replace") if isinstance(start, bytes) else start


def score(name: str) -> float:
  """Returns a number in [0, 1) that depends on the name alone."""
  return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48
