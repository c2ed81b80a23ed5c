"""What a model is evaluated on: held-out documents, with what they are and which of their tokens count."""

import heapq
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ultrathink_jax.data.documents import BadRecordError, Document, Part, Record, score
from ultrathink_jax.data.formats import make_format
from ultrathink_jax.data.packing import Example
from ultrathink_jax.data.sources.json_objects import parse_object
from ultrathink_jax.data.token_store import TokenStore
from ultrathink_jax.data.tokenizer import Tokenizer
from ultrathink_jax.errors import DataError
from ultrathink_jax.evaluate.tasks import Task, find_task
from ultrathink_jax.evaluate.windows import Scored

UNKNOWN = "unknown"  # kind and language of a document that does not say


class HeldOut(NamedTuple):
  """A document that was not trained on.

  Attributes:
    name: where it stands, for people.
    sequence: BOS, its tokens and EOS; what is learned in training counts, the end included.
    num_bytes: of UTF-8, of the text that counts.
    task: where it is made of a prompt and a completion.
  """

  name: str
  sequence: Scored
  num_bytes: int
  kind: str = UNKNOWN
  language: str = UNKNOWN
  task: Task | None = None


def with_ends(example: Example, bos_id: int, eos_id: int) -> Scored:
  """Returns an example with BOS and EOS, of which EOS counts where any token does, as in training."""
  tokens = np.concatenate([[bos_id], example.tokens, [eos_id]]).astype(np.int32)
  counts_at_end = not len(example.tokens) or bool(example.is_learned.any())
  return Scored(tokens, np.concatenate([[False], example.is_learned, [counts_at_end]]))


def of_texts(texts: Iterable[str], tokenizer: Tokenizer) -> list[HeldOut]:
  """Returns plain texts as documents of which everything counts."""
  parts = [(Part(text),) for text in texts]
  return [_encoded(f"text {number}", part, tokenizer, UNKNOWN, UNKNOWN) for number, part in enumerate(parts)]


def of_store(store: TokenStore, tokenizer: Tokenizer, limit: int | None = None) -> list[HeldOut]:
  """Returns the documents of a split, at most `limit` of them; a store does not know their kinds and languages.

  A part of a document was tokenized by itself, and so is decoded by itself.
  """
  documents = []
  for index in range(min(len(store), limit or len(store))):
    example = store.example(index)
    edges = np.flatnonzero(np.diff(example.is_learned)) + 1
    runs = [run for run in np.split(np.arange(len(example.tokens)), edges) if len(run)]
    parts = [Part(tokenizer.decode(example.tokens[run].tolist()), bool(example.is_learned[run[0]])) for run in runs]
    documents.append(_made_of(f"{store.split} document {index}", example, parts, tokenizer, UNKNOWN, UNKNOWN))
  return documents


def read_samples(
  path: Path,
  tokenizer: Tokenizer,
  limit: int | None = None,
  to_document: Callable[[Record], Document] | None = None,
) -> list[HeldOut]:
  """Returns the samples of a JSONL file, such as the test.jsonl that is built of a source tree, in its order.

  Of more than `limit`, it is a random sample, the same on every machine.
  `to_document` is the format of its lines (see data/formats.py), by default the one whose fields are there. Under
  `meta` a line may say its kind, path and language.

  Raises:
    DataError: the file cannot be read or is empty, or a line is no sample.
  """
  documents, number = [], 0
  to_document = to_document or make_format("auto", "text", None)
  try:
    for number, line in _lines(path, limit):
      fields = parse_object(line)
      meta = fields["meta"] if isinstance(fields.get("meta"), dict) else {}
      kind, language = (str(meta.get(key) or UNKNOWN) for key in ("kind", "language"))
      name = str(meta.get("path") or f"{path.name}:{number}")
      parts = to_document(Record(name, fields)).sequences[0]
      documents.append(_encoded(name, parts, tokenizer, kind, language))
  except OSError as error:
    raise DataError(f"{path} cannot be read: {error.strerror}; give a JSONL file of held-out samples") from error
  except BadRecordError as error:
    raise DataError(f"{path}:{number} {error}; a line holds a text, or a prompt and a completion") from error
  if not documents:
    raise DataError(f"{path} holds no samples; give a JSONL file of held-out samples")
  return documents


def _lines(path: Path, limit: int | None) -> list[tuple[int, bytes]]:
  """Returns the numbers and contents of the lines that hold something, or of those among them with the lowest hash."""
  with open(path, "rb") as file:
    lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    if limit is None:
      return list(lines)
    return sorted(heapq.nsmallest(limit, lines, key=lambda line: score(line[1].decode("utf-8", "replace"))))


def _encoded(name: str, parts: Sequence[Part], tokenizer: Tokenizer, kind: str, language: str) -> HeldOut:
  encoded = tokenizer.encode_batch([part.text for part in parts])
  tokens = np.array([token for tokens in encoded for token in tokens], np.int32)
  is_learned = np.repeat(np.array([part.is_learned for part in parts], bool), [len(tokens) for tokens in encoded])
  return _made_of(name, Example(tokens, is_learned), parts, tokenizer, kind, language)


def _made_of(
  name: str, example: Example, parts: Sequence[Part], tokenizer: Tokenizer, kind: str, language: str
) -> HeldOut:
  num_bytes = sum(len(part.text.encode()) for part in parts if part.is_learned)
  sequence = with_ends(example, tokenizer.bos_id, tokenizer.eos_id)
  return HeldOut(name, sequence, num_bytes, kind, language, find_task(parts, kind))
