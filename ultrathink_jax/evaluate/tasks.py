"""A prompt and its completion, found in the parts of a document, fill-in-the-middle included."""

from collections.abc import Sequence
from typing import NamedTuple

from ultrathink_jax.data.code.tokens import find_fim_tokens
from ultrathink_jax.data.documents import Part


class Task(NamedTuple):
  """What a model is asked and what the document says.

  The file around the completion ends with `before` and goes on with `after`; of a prompt that fills in nothing they are
  the prompt and "".
  """

  prompt: str
  completion: str
  before: str
  after: str


def find_task(parts: Sequence[Part], kind: str) -> Task | None:
  """Returns the task of a document that begins with a prompt that is not learned, or that fills in a middle.

  Of one that is learned as a whole the middle is known where the order is prefix, suffix, middle; in the other order
  nothing says where it begins, and there is no task.
  """
  if len(parts) > 1 and not parts[0].is_learned and parts[1].is_learned:
    prompt, completion = parts[0].text, parts[1].text
  elif kind == "fim" and len(parts) == 1 and (cut := _middle(parts[0].text)):
    prompt, completion = parts[0].text[:cut], parts[0].text[cut:]
  else:
    return None
  before, after = (_surroundings(prompt) if kind == "fim" else None) or (prompt, "")
  return Task(prompt, completion, before, after)


def _middle(text: str) -> int | None:
  """Returns where the middle begins in a text of the order prefix, suffix, middle, or None."""
  fim = find_fim_tokens(text.__contains__)
  is_known = fim.middle and text.startswith(fim.prefix) and not text.startswith(fim.prefix + fim.suffix)
  at = text.find(fim.middle)
  return at + len(fim.middle) if is_known and at >= 0 else None


def _surroundings(prompt: str) -> tuple[str, str] | None:
  """Returns the prefix and the suffix that a prompt is made of by `FimTokens.order`, or None where it is not."""
  fim = find_fim_tokens(prompt.__contains__)
  if not all(spelling in prompt for spelling in fim.spellings):
    return None
  if fim.is_suffix_first:
    suffix, _, prefix = prompt.removeprefix(fim.suffix).partition(fim.prefix)
    return prefix, suffix
  if prompt.startswith(fim.prefix + fim.suffix):
    suffix, _, prefix = prompt.removeprefix(fim.prefix + fim.suffix).partition(fim.middle)
    return prefix, suffix
  prefix, _, suffix = prompt.removeprefix(fim.prefix).partition(fim.suffix)
  return prefix, suffix.removesuffix(fim.middle)
