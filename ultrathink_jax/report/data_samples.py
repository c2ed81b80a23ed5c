"""Training rows as the model sees them, decoded: documents, where they are cut, and what of them is learned.

Letters: B batch, T row length.
"""

from itertools import pairwise
from typing import Any

import numpy as np

from ultrathink_jax.config import Config
from ultrathink_jax.data.loader import training_loader
from ultrathink_jax.data.packing import Row, Span, make_row
from ultrathink_jax.data.prepare import PreparedData
from ultrathink_jax.data.tokenizer import Tokenizer

_NUM_SAMPLES = 3
_MAX_PAIR_TOKENS = 4096


def samples(config: Config, prepared: PreparedData) -> list[dict[str, Any]]:
  """Returns the first rows of the first training batch; where a source holds preferences, its first pairs instead.

  Of each sample:
    title: where it is from.
    learned, unlearned, padding: how many of its tokens, an end of document counted as one.
    segments: what it holds, left to right.
      begins: whether the document begins here, not in another row.
      end: whether the end of the document is learned; null where it is cut.
      runs: its text in stretches {text, tokens, is_learned}, of which all tokens are learned or none.
  """
  pairs = [store for store in prepared.train if store.infos[0].num_sequences > 1]
  if pairs:
    return [
      _sample(f"{which} of document {number + 1} of {pairs[0].name}", _whole(example, tokenizer), tokenizer)
      for tokenizer in [prepared.tokenizer]
      for number in range(min(len(pairs[0]), _NUM_SAMPLES - 1))
      for which, example in zip(("chosen", "rejected"), pairs[0].sequences(number), strict=True)
    ]
  loader = training_loader(config, prepared, range(min(_NUM_SAMPLES, config.train.batch_size)))
  batch, sources = loader.batch(0), loader.sources(0)
  arrays = (batch.tokens, batch.targets, batch.weights, batch.context.segment_ids, batch.context.positions)
  return [
    _sample(f"row {number + 1} of step 0, from {prepared.train[source].name}", Row(*row), prepared.tokenizer)
    for number, (source, *row) in enumerate(zip(sources, *arrays, strict=False))
  ]


def _whole(example: Any, tokenizer: Tokenizer) -> Row:
  """Returns a row that holds one document, or the beginning of a long one."""
  size = min(len(example.tokens) + 1, _MAX_PAIR_TOKENS)
  return make_row([Span(0, 0, size)], lambda _: example, size, tokenizer.bos_id, tokenizer.eos_id)


def _sample(title: str, row: Row, tokenizer: Tokenizer) -> dict[str, Any]:
  is_filled = row.segment_ids > 0
  learned = int((row.weights > 0).sum())
  edges = np.flatnonzero(np.diff(row.segment_ids[is_filled], prepend=0, append=0)).tolist()
  return {
    "title": title,
    "learned": learned,
    "unlearned": int(is_filled.sum()) - learned,
    "padding": int((~is_filled).sum()),
    "segments": [
      _segment(int(row.tokens[start]), row.targets[start:stop].tolist(), row.weights[start:stop] > 0, tokenizer)
      for start, stop in pairwise(edges)
    ],
  }


def _segment(head: int, targets: list[int], is_learned: np.ndarray, tokenizer: Tokenizer) -> dict[str, Any]:
  end = None
  if targets[-1] == tokenizer.eos_id:
    end, targets, is_learned = bool(is_learned[-1]), targets[:-1], is_learned[:-1]
  changes = (np.flatnonzero(np.diff(is_learned)) + 1).tolist() if targets else []
  runs, before = [], ""
  for start, stop in pairwise([0, *changes, len(targets)] if targets else []):
    text = tokenizer.decode(targets[:stop])  # by itself a stretch may lose the space it begins with
    runs.append({"text": text[len(before) :], "tokens": stop - start, "is_learned": bool(is_learned[start])})
    before = text
  return {"begins": head == tokenizer.bos_id, "end": end, "runs": runs}
