"""Sums over documents, and what one model gains over another on the same documents.

Source of the interval: B. Efron, "Bootstrap methods: another look at the jackknife", 1979, the percentile method.
Letters: N documents  S resamples of a part.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ultrathink_jax.evaluate.documents import HeldOut
from ultrathink_jax.evaluate.scoring import Scores

_MAX_DRAWS = 10_000_000  # document numbers that are held at once
_MAX_NATS = 700  # e^ which is still a float


class Summary(NamedTuple):
  """How well a model predicts some documents.

  Attributes:
    loss: nats per target, ends of documents included.
    perplexity: e^loss.
    bits_per_byte: bits to code a byte of the text that counts.
    accuracy: share of the targets that the model would have chosen.
    documents, targets, bytes: how many there are.
  """

  loss: float
  perplexity: float
  bits_per_byte: float
  accuracy: float
  documents: int
  targets: int
  bytes: int


def summarize(scores: Scores, num_bytes: Int[np.ndarray, "N"], chosen: np.ndarray | slice = slice(None)) -> Summary:
  """Returns the summary of the chosen documents, of which at least one has targets."""
  nats, targets = float(scores.nats[chosen].sum()), int(scores.targets[chosen].sum())
  of_bytes, loss = int(num_bytes[chosen].sum()), nats / targets
  return Summary(
    loss=loss,
    perplexity=math.exp(loss) if loss < _MAX_NATS else math.inf,
    bits_per_byte=nats / (math.log(2) * of_bytes) if of_bytes else math.inf,
    accuracy=float(scores.correct[chosen].sum()) / targets,
    documents=len(scores.nats[chosen]),
    targets=targets,
    bytes=of_bytes,
  )


def resampled_ratio(
  numerators: Float[np.ndarray, "N"], denominators: Int[np.ndarray, "N"], resamples: int, seed: int, share: float = 0.95
) -> tuple[float, float] | None:
  """Returns the interval that holds this `share` of sum(numerators) / sum(denominators) of resampled documents.

  It is None of a single document, which says nothing of others.
  """
  N = len(numerators)
  if N < 2:
    return None
  random, ratios = np.random.default_rng(seed), np.empty(resamples)
  size = max(1, _MAX_DRAWS // N)
  for start in range(0, resamples, size):
    drawn = random.integers(N, size=(min(size, resamples - start), N))
    sums = denominators[drawn].sum(axis=1)
    ratios[start : start + len(drawn)] = numerators[drawn].sum(axis=1) / sums
  low, high = np.quantile(ratios, [(1 - share) / 2, (1 + share) / 2])
  return float(low), float(high)


class Improvement(NamedTuple):
  """What the second of two models gains over the first; positive is better.

  Attributes:
    nats_per_target: by how much its loss is lower.
    interval: of 95 % of what that would be on other such documents; None where there are too few to say.
    improved_share: of the documents, those that it predicts better.
    loss_percent, perplexity_percent, bits_per_byte_percent: relative to the first; NaN where that has 0 or infinity.
    accuracy_points: of the share of targets predicted, in percent.
  """

  loss_percent: float
  perplexity_percent: float
  bits_per_byte_percent: float
  accuracy_points: float
  nats_per_target: float
  interval: tuple[float, float] | None
  improved_share: float


class Pair(NamedTuple):
  """Two models on the same documents."""

  base_model: Summary
  finetuned_model: Summary
  improvement: Improvement

  def as_json(self) -> dict[str, Any]:
    """Returns plain values, None for those that are not finite."""
    plain = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
    return {name: {key: plain(value) for key, value in each._asdict().items()} for name, each in self._asdict().items()}


def compare_scores(
  base: Scores, tuned: Scores, num_bytes: Int[np.ndarray, "N"], resamples: int, seed: int, chosen: Any = slice(None)
) -> Pair:
  """Returns both summaries of the chosen documents, and the improvement; documents count by their targets."""
  before, after = (summarize(scores, num_bytes, chosen) for scores in (base, tuned))
  gained, targets = (base.nats - tuned.nats)[chosen], base.targets[chosen]
  with_targets = targets > 0
  gained, targets = gained[with_targets], targets[with_targets]
  percent = lambda old, new: 100 * (old - new) / old if 0 < old < math.inf else math.nan
  improvement = Improvement(
    loss_percent=percent(before.loss, after.loss),
    perplexity_percent=percent(before.perplexity, after.perplexity),
    bits_per_byte_percent=percent(before.bits_per_byte, after.bits_per_byte),
    accuracy_points=100 * (after.accuracy - before.accuracy),
    nats_per_target=before.loss - after.loss,
    interval=resampled_ratio(gained, targets, resamples, seed),
    improved_share=float((gained > 0).mean()),
  )
  return Pair(before, after, improvement)


def by_group(
  documents: Sequence[HeldOut], group: Callable[[HeldOut], str], compare: Callable[[np.ndarray], Pair]
) -> dict[str, Pair]:
  """Returns the pair of each group of documents, the group with the most targets first."""
  names = np.array([group(document) for document in documents])
  targets = np.array([document.sequence.counts.sum() for document in documents])
  sizes = {name: targets[names == name].sum() for name in dict.fromkeys(names.tolist())}
  return {name: compare(names == name) for name in sorted(sizes, key=lambda name: (-sizes[name], name)) if sizes[name]}
