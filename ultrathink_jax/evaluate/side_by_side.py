"""The completions of two models beside each other, and how near each is to what the file says."""

import dataclasses
import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from ultrathink_jax.config import GenerateConfig, ModelConfig
from ultrathink_jax.data.documents import score
from ultrathink_jax.data.tokenizer import Tokenizer
from ultrathink_jax.evaluate.code_metrics import CompletionScores, score_completion
from ultrathink_jax.evaluate.documents import HeldOut
from ultrathink_jax.generate.engine import generate


class Completed(NamedTuple):
  """A held-out document that both models completed."""

  document: HeldOut
  base: str
  tuned: str
  base_scores: CompletionScores
  tuned_scores: CompletionScores

  def as_json(self) -> dict[str, Any]:
    document = self.document
    return {
      "name": document.name,
      "kind": document.kind,
      "language": document.language,
      "prompt": document.task.prompt,
      "reference": document.task.completion,
      "base_model": {"completion": self.base, **self.base_scores._asdict()},
      "finetuned_model": {"completion": self.tuned, **self.tuned_scores._asdict()},
    }


def choose(documents: Sequence[HeldOut], number: int, tokenizer: Tokenizer, max_tokens: int) -> list[HeldOut]:
  """Returns at most `number` documents with tasks whose prompts have up to `max_tokens`, those of kinds in turn.

  Of each kind it is the same random sample on every machine.
  """
  by_kind: dict[str, list[HeldOut]] = {}
  for document in documents:
    if document.task is not None and document.task.completion.strip():
      by_kind.setdefault(document.kind, []).append(document)
  for kind, found in by_kind.items():
    found.sort(key=lambda document: score(f"{document.name}\0{document.task.prompt}"))
    fitting = (document for document in found if len(tokenizer.encode(document.task.prompt)) <= max_tokens)
    by_kind[kind] = [document for document, _ in zip(fitting, range(number), strict=False)]
  turns = range(max(map(len, by_kind.values()), default=0))
  in_turn = [by_kind[kind][turn] for turn in turns for kind in sorted(by_kind) if turn < len(by_kind[kind])]
  return in_turn[:number]


def complete_all(
  model: ModelConfig,
  base: Any,
  tuned: Any,
  tokenizer: Tokenizer,
  documents: Sequence[HeldOut],
  sampling: GenerateConfig,
  batch_size: int,
) -> list[Completed]:
  """Returns the documents with both models' completions; each is scored as it was generated, its end included."""
  completed = []
  for start in range(0, len(documents), batch_size):
    batch = documents[start : start + batch_size]
    prompts = [document.task.prompt for document in batch]
    texts = [generate(model, params, tokenizer, prompts, sampling) for params in (base, tuned)]
    for document, *pair in zip(batch, *texts, strict=True):
      scores = [score_completion(document.task, text, document.language) for text in pair]
      completed.append(Completed(document, *pair, *scores))
  return completed


def greedy(sampling: GenerateConfig, max_new_tokens: int) -> GenerateConfig:
  """Returns settings by which completions are the same on every run."""
  return dataclasses.replace(sampling, temperature=0.0, repetition_penalty=1.0, max_new_tokens=max_new_tokens)


def average(completed: Sequence[Completed]) -> dict[str, dict[str, Any]]:
  """Returns the means of each model's scores, and over how many completions each is; None over none."""
  means: dict[str, dict[str, Any]] = {}
  for name, scores in (
    ("base_model", [each.base_scores for each in completed]),
    ("finetuned_model", [each.tuned_scores for each in completed]),
  ):
    means[name] = {}
    for field in CompletionScores._fields:
      values = [float(getattr(score, field)) for score in scores if getattr(score, field) is not None]
      means[name] |= {field: fmean(values) if values else None, f"{field}_of": len(values)}
  return means


def markdown(completed: Sequence[Completed]) -> str:
  """Returns prompts, references and completions as Markdown."""
  parts = []
  for each in completed:
    document, task = each.document, each.document.task
    parts.append(f"### `{document.name}` ({document.kind}, {document.language})")
    scored = ((f"{name} ({_words(scores)})", text) for name, text, scores in (
      ("Base", each.base, each.base_scores), ("Fine-tuned", each.tuned, each.tuned_scores)
    ))  # fmt: skip
    for title, text in (("Prompt", task.prompt), ("Reference", task.completion), *scored):
      parts.append(f"{title}\n\n{_fenced(text, document.language)}")
  return "\n\n".join(parts) + "\n"


def _words(scores: CompletionScores) -> str:
  words = ["exact" if scores.exact_match else f"edit similarity {scores.edit_similarity:.2f}"]
  if scores.identifier_f1 is not None:
    words.append(f"identifiers {scores.identifier_f1:.2f}")
  if scores.is_valid is not None:
    words.append("parses" if scores.is_valid else "does not parse")
  return ", ".join(words)


def _fenced(text: str, language: str) -> str:
  """Returns a block of code whose fence is longer than any in the text."""
  longest = max(map(len, re.findall(r"`+", text)), default=0)
  fence = "`" * max(3, longest + 1)
  return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"
