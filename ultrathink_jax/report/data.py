"""What training data is like: how much there is, how often a run goes through it, and what looks wrong with it."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from ultrathink_jax.config import Config
from ultrathink_jax.data.mixture import Mixture
from ultrathink_jax.data.packing import PACKINGS
from ultrathink_jax.data.prepare import PreparedData
from ultrathink_jax.data.token_store import SPLITS, StoreInfo, TokenStore, open_info
from ultrathink_jax.report.data_findings import findings
from ultrathink_jax.report.data_samples import samples

_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_SAMPLED_DOCUMENTS = 1000  # the first ones of a store: in the order of hashes, a random sample
_SAMPLED_TOKENS = 4_000_000
_COUNTS = ("documents", "tokens", "text_bytes")


def inspect(config: Config, prepared: PreparedData, directory: Path, name: str) -> dict[str, Any]:
  """Returns the contents of data.json. `directory` holds the prepared data.

  name: of the run.
  findings: what looks wrong, a sentence each; empty where nothing does.
  fingerprint: the same wherever tokenizer and tokens are the same.
  splits: of train and validation, {documents, tokens, text_bytes} of all sources.
  run: {steps, batch_size, sequence_length, packing, shuffle}, and of the rows it reads:
    rows, tokens: how many; tokens without padding, an end of document counted as one.
    epochs: tokens / those of all training documents.
    passes: epochs of the source that is gone through most often.
  stages: [{first_step, shares}], the share of the rows that each source gives from a step on.
  sources: in the order of the configuration, each with
    source: as the configuration writes it.
    splits: of train and validation, {documents, tokens, text_bytes, bytes_per_token}; the last is null where there are
      no tokens, and for preferences, of which tokens counts the chosen ones only.
    learned: share of the tokens that are learned, with ends of documents; ends_learned: share of the ends; not_learned:
      share of the documents without a learned token; good: share of the labelled documents that are labelled as good,
      null without labels. All of the first thousand training documents, which are a random sample.
    is_preference: whether documents are pairs of a chosen and a rejected text.
    left_out, scrubbed: {reason or kind: count}; rejects: the file that lists what was left out.
    rows, tokens, epochs: what the run reads of it; its rows are exact, the rest by the mean of an epoch.
    lengths: {mean, p1 .. p99, max}, tokens of a training document.
  lengths: of the training documents of all sources {mean, p1 .. p99, max}, and
    longer: share of the documents that do not fit into a row of their own, with their end.
    edges, documents, tokens: bin i counts documents of edges[i] to edges[i + 1] - 1 tokens, and their tokens.
  packings: [{first_step, limit, split, best_fit}] for every stage of data.length_stages; limit is the most positions of
    a document in a row, and under the name of each packing stand, for an epoch of every source,
    rows: how many.
    efficiency: share of their positions that are not padding.
    cut: share of the documents that do not stay in one piece.
  samples: see `data_samples.samples`.
  """
  stages = _length_stages(config)
  packed_by_stage = [[_pack(store, config, limit) for store in prepared.train] for _, limit in stages]
  rows_by_stage = _rows_by_stage(config, [first for first, _ in stages])
  sources = _describe_sources(config, prepared, directory, packed_by_stage, rows_by_stage)
  lengths = np.concatenate([store.lengths for store in prepared.train])
  facts = {
    "name": name,
    "fingerprint": prepared.fingerprint,
    "splits": {
      split: {key: sum(source["splits"][split][key] for source in sources) for key in _COUNTS} for split in SPLITS
    },
    "run": _describe_run(config, sources),
    "stages": [
      {"first_step": first, "shares": [weight / sum(weights) for weight in weights]}
      for first, weights in config.data.weights_by_stage
      if first < config.train.steps or not first
    ],
    "sources": sources,
    "lengths": _describe_lengths(lengths, config.train.sequence_length),
    "packings": [
      {"first_step": first, "limit": limit, **_efficiencies(packed, config.train.sequence_length)}
      for (first, limit), packed in zip(stages, packed_by_stage, strict=True)
    ],
  }
  return {"findings": findings(config, facts), **facts, "samples": samples(config, prepared)}


class _Packed(NamedTuple):
  """What an epoch of a source comes to; `cut` documents do not stay in one piece."""

  rows: int
  positions: int
  documents: int
  cut: int


def _pack(store: TokenStore, config: Config, limit: int) -> dict[str, _Packed]:
  """Returns, for each packing, an epoch in the order on disk; a shuffled one has as many rows."""
  sizes = store.lengths + 1
  stops = np.cumsum(sizes)
  length = config.train.sequence_length
  crosses = (stops - sizes) // length < (stops - 1) // length  # the end of a row, when laid end to end
  is_cut = {"split": crosses | (sizes > limit), "best_fit": sizes > limit}
  packings = {name: make(store.lengths, length, None, limit) for name, make in PACKINGS.items()}
  return {
    name: _Packed(packing.rows_per_epoch, packing.num_positions, len(sizes), int(is_cut[name].sum()))
    for name, packing in packings.items()
  }


def _efficiencies(packed: Sequence[dict[str, _Packed]], sequence_length: int) -> dict[str, dict[str, Any]]:
  sums = {name: _Packed(*map(sum, zip(*(each[name] for each in packed), strict=True))) for name in PACKINGS}
  return {
    name: {
      "rows": total.rows,
      "efficiency": total.positions / (total.rows * sequence_length),
      "cut": total.cut / total.documents,
    }
    for name, total in sums.items()
  }


def _length_stages(config: Config) -> list[tuple[int, int]]:
  """Returns (first step, most positions of a document in a row) of the stages that the run comes to."""
  length = config.train.sequence_length
  stages = [(first, min(limit, length)) for first, limit in config.data.positions_by_stage]
  if not stages or stages[0][0]:
    stages.insert(0, (0, length))
  return [stage for stage in stages if stage[0] < config.train.steps] or stages[:1]


def _rows_by_stage(config: Config, first_steps: Sequence[int]) -> list[list[int]]:
  """Returns how many rows each source gives in each of the stages that begin at these steps, in the whole run."""
  batch_size, seed = config.train.batch_size, config.train.seed if config.data.shuffle else None
  mixture = Mixture(config.data.weights_by_stage, batch_size, seed)
  given = [mixture.given_before(step * batch_size) for step in (*first_steps, config.train.steps)]
  return [np.subtract(after, before).tolist() for before, after in pairwise(given)]


def _describe_sources(
  config: Config,
  prepared: PreparedData,
  directory: Path,
  packed_by_stage: Sequence[Sequence[dict[str, _Packed]]],
  rows_by_stage: Sequence[Sequence[int]],
) -> list[dict[str, Any]]:
  found = [(open_info(path.parent), path) for path in sorted(directory.glob("tokens/*/rejects.jsonl"))]
  rejects = {info.key: str(path) for info, path in found if info}
  sources = []
  for number, (info, store) in enumerate(zip(prepared.infos, prepared.train, strict=True)):
    rows_per_epoch = [packed[number][config.data.packing].rows for packed in packed_by_stage]
    rows = [given[number] for given in rows_by_stage]
    epochs = sum(given / size for given, size in zip(rows, rows_per_epoch, strict=True))
    tokens = round(epochs * (store.num_tokens + len(store)))
    source = _describe(info) | {"rejects": rejects[info.key]} | _look_into(store)
    reads = {"rows": sum(rows), "tokens": tokens, "epochs": epochs}
    sources.append(source | reads | {"lengths": _percentiles(store.lengths)})
  return sources


def _describe(info: StoreInfo) -> dict[str, Any]:
  is_preference = info.num_sequences > 1
  splits = {
    split: {
      "documents": info.documents[split],
      "tokens": info.tokens[split],
      "text_bytes": info.text_bytes[split],
      "bytes_per_token": None
      if is_preference or not info.tokens[split]
      else info.text_bytes[split] / info.tokens[split],
    }
    for split in SPLITS
  }
  counts = {"left_out": info.left_out, "scrubbed": info.scrubbed}
  return {"source": info.source, "splits": splits, "is_preference": is_preference, **counts}


def _look_into(store: TokenStore) -> dict[str, Any]:
  """Returns what of a sample of the documents is learned, and how they are labelled."""
  tokens, learned, ends, labels = [], [], [], []
  for number in range(min(len(store), _SAMPLED_DOCUMENTS)):
    example = store.example(number)
    ends.append(bool(example.is_learned[-1]) if len(example.tokens) else True)  # with the token before it
    tokens.append(len(example.tokens) + 1)
    learned.append(int(example.is_learned.sum()) + ends[-1])
    labels.append(store.label(number))
    if sum(tokens) >= _SAMPLED_TOKENS:
      break
  known = [label for label in labels if label is not None]
  return {
    "learned": sum(learned) / sum(tokens),
    "ends_learned": sum(ends) / len(ends),
    "not_learned": learned.count(0) / len(learned),
    "good": sum(known) / len(known) if known else None,
  }


def _describe_run(config: Config, sources: Sequence[dict[str, Any]]) -> dict[str, Any]:
  train, tokens = config.train, sum(source["tokens"] for source in sources)
  there = sum(source["splits"]["train"]["tokens"] + source["splits"]["train"]["documents"] for source in sources)
  return {
    "steps": train.steps,
    "batch_size": train.batch_size,
    "sequence_length": train.sequence_length,
    "packing": config.data.packing,
    "shuffle": config.data.shuffle,
    "rows": train.steps * train.batch_size,
    "tokens": tokens,
    "epochs": tokens / there,
    "passes": max(source["epochs"] for source in sources),
  }


def _describe_lengths(lengths: Int[np.ndarray, "documents"], sequence_length: int) -> dict[str, Any]:
  edges = [0, *(2**power for power in range(int(lengths.max()).bit_length() + 1))]
  bins = np.searchsorted(edges, lengths, "right") - 1
  return {
    **_percentiles(lengths),
    "longer": float((lengths + 1 > sequence_length).mean()),
    "edges": edges,
    "documents": np.bincount(bins, minlength=len(edges) - 1).tolist(),
    "tokens": np.bincount(bins, lengths, len(edges) - 1).astype(int).tolist(),
  }


def _percentiles(lengths: Int[np.ndarray, "documents"]) -> dict[str, int | float]:
  values = np.percentile(lengths, _PERCENTILES, method="inverted_cdf").tolist()
  named = {f"p{percent}": int(value) for percent, value in zip(_PERCENTILES, values, strict=True)}
  return {"mean": float(lengths.mean()), **named, "max": int(lengths.max())}
