"""How near a completion of code is to the one that stands in the file.

Source: arXiv:2310.11248 (CrossCodeEval: exact match, edit similarity, identifier F1).
"""

from collections import Counter
from typing import NamedTuple

import numpy as np

from ultrathink_jax.data.code.items import parses_alone, syntax
from ultrathink_jax.data.code.languages import LANGUAGES, Language
from ultrathink_jax.evaluate.tasks import Task


class CompletionScores(NamedTuple):
  """Attributes:
  exact_match: whether the completion is the reference, but for white space at both ends.
  edit_similarity: 1 - edit distance / length of the longer one.
  identifier_f1: of the identifiers, each as often as it occurs; None where the reference has none, or is of no grammar.
  is_valid: whether the file around it parses; None where it does not with the reference either, or is of no grammar.
  """

  exact_match: bool
  edit_similarity: float
  identifier_f1: float | None
  is_valid: bool | None


def score_completion(task: Task, completion: str, language: str) -> CompletionScores:
  """Returns the scores of a completion; `language` is a name of LANGUAGES or any other word."""
  grammar = LANGUAGES.get(language)
  return CompletionScores(
    exact_match=completion.strip() == task.completion.strip(),
    edit_similarity=edit_similarity(completion.strip(), task.completion.strip()),
    identifier_f1=identifier_f1(task, completion, grammar),
    is_valid=is_valid(task, completion, grammar),
  )


def edit_distance(a: str, b: str) -> int:
  """Returns the fewest insertions, deletions and replacements of characters that make `b` of `a`."""
  a, b = (a, b) if len(a) <= len(b) else (b, a)
  codes, places = np.array([ord(c) for c in b], np.int64), np.arange(len(b) + 1)
  row = places.copy()  # of the distances between what was read of `a` and every beginning of `b`
  for character in a:
    best = row + 1
    np.minimum(best[1:], row[:-1] + (codes != ord(character)), out=best[1:])
    row = np.minimum.accumulate(best - places) + places  # insertions, any number of them
  return int(row[-1])


def edit_similarity(a: str, b: str) -> float:
  """Returns 1 for equal texts, 0 for texts that have nothing in common."""
  longest = max(len(a), len(b))
  return 1 - edit_distance(a, b) / longest if longest else 1.0


def identifiers(task: Task, completion: str, language: Language) -> Counter[str]:
  """Returns the identifiers of a completion where it stands; none of a text that no parser should be given."""
  before, middle = task.before.encode(), completion.encode()
  content = before + middle + task.after.encode()
  start, stop = len(before), len(before) + len(middle)
  root, found = syntax(language, content), Counter()
  nodes = [] if root is None else [root]
  while nodes:
    node = nodes.pop()
    if node.child_count:
      nodes += [child for child in node.children if child.start_byte < stop and child.end_byte > start]
    elif "identifier" in node.type and start <= node.start_byte and node.end_byte <= stop:
      found[content[node.start_byte : node.end_byte].decode()] += 1
  return found


def identifier_f1(task: Task, completion: str, language: Language | None) -> float | None:
  """Returns 2 x identifiers in common / identifiers of both; None without a grammar, or any in the reference."""
  wanted = identifiers(task, task.completion, language) if language else Counter()
  if not wanted:
    return None
  found = identifiers(task, completion, language)
  return 2 * (found & wanted).total() / (found.total() + wanted.total())


def is_valid(task: Task, completion: str, language: Language | None) -> bool | None:
  """Returns whether the file parses with the completion in it; None where that would not be the completion's fault.

  Grammars forgive a missing body; nothing at all is not valid.
  """
  parses = lambda middle: parses_alone(language, f"{task.before}{middle}{task.after}".encode())
  if language is None or not parses(task.completion):
    return None
  return bool(completion.strip()) and parses(completion)
