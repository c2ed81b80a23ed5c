"""A fine-tuned model against the model it was made of: what it gained, what it lost, and how its routing moved."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ultrathink_jax.config import GenerateConfig, ModelConfig
from ultrathink_jax.data.tokenizer import Tokenizer
from ultrathink_jax.errors import DataError, NumericsError
from ultrathink_jax.evaluate.documents import UNKNOWN, HeldOut
from ultrathink_jax.evaluate.routing import LayerShift, routing_shift
from ultrathink_jax.evaluate.scoring import Score, Scores, make_score, score_all
from ultrathink_jax.evaluate.side_by_side import Completed, average, choose, complete_all, greedy, markdown
from ultrathink_jax.evaluate.summaries import Pair, by_group, compare_scores

_GREEDY = GenerateConfig(128, 0.0, 0, 1.0, 1.0, (), 0)


@dataclasses.dataclass(frozen=True)
class Settings:
  """How models are compared.

  Attributes:
    window_tokens: the length of a row; longer documents are read in windows that overlap by half.
    batch_size: rows scored, and prompts completed, at once.
    num_samples: prompts that both models complete; 0: none.
    sampling: how completions end; they are greedy.
    resamples, seed: of the bootstrap.
    collapse_share: of a layer's choices, from which one expert is worth an alarm.
  """

  window_tokens: int
  batch_size: int = 8
  num_samples: int = 8
  sampling: GenerateConfig = _GREEDY
  resamples: int = 10_000
  seed: int = 0
  collapse_share: int | float = 0.5


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Attributes:
  adapted: both models on documents like those of the fine-tuning.
  by_kind, by_language: the same of each kind and language, the one with the most targets first; empty where no
    document says.
  general: both on other documents; None without any.
  routing: every layer of experts, on all documents.
  completed: prompts that both completed.
  settings: how they were compared.
  """

  adapted: Pair
  by_kind: dict[str, Pair]
  by_language: dict[str, Pair]
  general: Pair | None
  routing: list[LayerShift]
  completed: list[Completed]
  settings: Settings

  def as_json(self) -> dict[str, Any]:
    """Returns what evaluation_results.json holds."""
    return {
      **self.adapted.as_json(),
      "by_kind": {name: pair.as_json() for name, pair in self.by_kind.items()},
      "by_language": {name: pair.as_json() for name, pair in self.by_language.items()},
      "forgetting": None if self.general is None else self._forgetting(self.general),
      "routing": [_layer_as_json(layer) for layer in self.routing],
      "completions": average(self.completed) if self.completed else None,
      "samples": [completed.as_json() for completed in self.completed],
      "settings": dataclasses.asdict(self.settings),
    }

  def _forgetting(self, general: Pair) -> dict[str, Any]:
    gained, lost = self.adapted.improvement, general.improvement
    return {
      **general.as_json(),
      "gained_nats_per_target": gained.nats_per_target,
      "lost_nats_per_target": -lost.nats_per_target,
    }

  def lines(self) -> list[str]:
    """Returns the result as lines for a console."""
    lines = [f"[result] {_in_words(self.adapted)}"]
    for name, pairs in (("kind", self.by_kind), ("language", self.by_language)):
      if len(pairs) > 1:
        lines += [f"[result] {name} {value}: {_in_short(pair)}" for value, pair in pairs.items()]
    if self.general is not None:
      lines.append(f"[result] general text: {_in_short(self.general)}")
    if self.routing:
      most = max(self.routing, key=lambda layer: layer.divergence)
      lines.append(
        f"[result] routing moved by up to {most.divergence:.3f} bits (layer {most.layer}), "
        f"{np.mean([layer.divergence for layer in self.routing]):.3f} on average over {len(self.routing)} layers"
      )
    lines += [
      f"[advice] layer {layer.layer}: one expert takes {max(layer.finetuned_model.shares):.0%} of the choices, in the "
      f"base model {max(layer.base_model.shares):.0%}: raise loss.load_balance_weight, or keep routers frozen"
      for layer in self.routing
      if layer.is_collapsed
    ]
    if self.completed:
      lines.append(f"[result] {_completions_in_words(self.completed)}")
    return lines

  def markdown(self) -> str:
    """Returns the completions side by side, as Markdown."""
    return markdown(self.completed)


def compare(
  model: ModelConfig,
  base: Any,
  tuned: Any,
  tokenizer: Tokenizer,
  documents: Sequence[HeldOut],
  general: Sequence[HeldOut],
  settings: Settings,
) -> Comparison:
  """Returns how `tuned` compares with `base` on documents like those it was tuned on, and on general ones.

  Both are parameters of `model`, plain or Adapted; arrays that they share are held once: of an Adapted the base is the
  same with `lora={}`.

  Raises:
    DataError: no token of the documents counts.
    NumericsError: a loss is not finite.
  """
  score = make_score(model)
  pair_of = partial(_scored, score, (base, tuned), settings=settings)
  before, after, compare_chosen = pair_of(documents)
  elsewhere, loads = None, [before.loads, after.loads]
  if general:
    general_before, general_after, compare_general = pair_of(general)
    elsewhere = compare_general(slice(None))
    loads = [_added(*both) for both in zip(loads, (general_before.loads, general_after.loads), strict=True)]
  chosen = choose(documents, settings.num_samples, tokenizer, settings.window_tokens)
  sampling = greedy(settings.sampling, settings.sampling.max_new_tokens)
  grouped = lambda group: {} if {*map(group, documents)} == {UNKNOWN} else by_group(documents, group, compare_chosen)
  return Comparison(
    adapted=compare_chosen(slice(None)),
    by_kind=grouped(lambda document: document.kind),
    by_language=grouped(lambda document: document.language),
    general=elsewhere,
    routing=routing_shift(model, *loads, settings.collapse_share),
    completed=complete_all(model, base, tuned, tokenizer, chosen, sampling, settings.batch_size),
    settings=settings,
  )


def _scored(
  score: Score, all_params: Sequence[Any], documents: Sequence[HeldOut], settings: Settings
) -> tuple[Scores, Scores, Callable[[Any], Pair]]:
  """Returns the scores of the two models, and a function from chosen documents to what they come to."""
  sequences = [document.sequence for document in documents]
  if not any(sequence.counts.any() for sequence in sequences):
    raise DataError(f"none of the {len(documents)} documents has tokens that count; give some with text to learn")
  before, after = score_all(score, all_params, sequences, settings.window_tokens, settings.batch_size)
  for name, scores in (("base", before), ("fine-tuned", after)):
    if bad := np.flatnonzero(~np.isfinite(scores.nats)).tolist():
      raise NumericsError(
        f"the loss of the {name} model is not finite on {len(bad)} of {len(documents)} documents, the first of them "
        f"{documents[bad[0]].name!r}; check its weights, or set model.dtype=float32"
      )
  num_bytes = np.array([document.num_bytes for document in documents])
  compare_chosen = partial(compare_scores, before, after, num_bytes, settings.resamples, settings.seed)
  return before, after, compare_chosen


def _added(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {path: load + b[path] for path, load in a.items()}


def _layer_as_json(layer: LayerShift) -> dict[str, Any]:
  models = {name: getattr(layer, name)._asdict() for name in ("base_model", "finetuned_model")}
  return layer._asdict() | models


def _in_words(pair: Pair) -> str:
  """Returns all that a pair comes to."""
  base, tuned = pair.base_model, pair.finetuned_model
  return (
    f"{_in_short(pair)}; perplexity {base.perplexity:,.2f} -> {tuned.perplexity:,.2f}, bits per byte "
    f"{base.bits_per_byte:.3f} -> {tuned.bits_per_byte:.3f}, accuracy {base.accuracy:.1%} -> {tuned.accuracy:.1%}, "
    f"{pair.improvement.improved_share:.0%} of {tuned.documents:,} documents better"
  )


def _in_short(pair: Pair) -> str:
  """Returns what a pair gained, with its interval."""
  base, tuned, gain = pair.base_model, pair.finetuned_model, pair.improvement
  interval = "" if gain.interval is None else f" [{gain.interval[0]:+.4f}, {gain.interval[1]:+.4f}]"
  return (
    f"loss {base.loss:.4f} -> {tuned.loss:.4f}, gained {gain.nats_per_target:+.4f}{interval} nats per token over "
    f"{tuned.targets:,}"
  )


def _completions_in_words(completed: Sequence[Completed]) -> str:
  means = average(completed)
  words = []
  for field, name in (
    ("exact_match", "exact match"), ("edit_similarity", "edit similarity"), ("identifier_f1", "identifier F1"),
    ("is_valid", "parses"),
  ):  # fmt: skip
    base, tuned = (means[model][field] for model in ("base_model", "finetuned_model"))
    if base is not None:
      words.append(f"{name} {base:.2f} -> {tuned:.2f}")
  return f"{len(completed)} completions: {', '.join(words)}"
