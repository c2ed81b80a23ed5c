"""All rules about single documents in one call, for the processes that read a corpus."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from ultrathink_jax.config import QualityConfig
from ultrathink_jax.data.documents import Document, Part
from ultrathink_jax.data.quality.decontamination import Contamination, read_texts
from ultrathink_jax.data.quality.duplicates import signature
from ultrathink_jax.data.quality.filters import make_filter
from ultrathink_jax.data.quality.secrets import scrub


class Verdict(NamedTuple):
  """What is to be done with a document.

  Attributes:
    document: as it goes on, scrubbed; also where it is left out, so that no report holds a secret.
    reason: why it is left out, a stable key; "" if it is kept.
    detail: more about the reason: the evaluation text it overlaps.
    num_scrubbed: what was replaced, by kind.
    signature: what `clusters` needs, of a document that is kept and if duplicates are looked for; else b"".
  """

  document: Document
  reason: str
  detail: str
  num_scrubbed: Counter[str]
  signature: bytes


@dataclasses.dataclass(frozen=True)
class Quality:
  """A function from documents to verdicts; it can be pickled, so that evaluation files are read once."""

  options: QualityConfig
  find_fault: Callable[[Document], str | None]
  contamination: Contamination | None

  def __call__(self, document: Document) -> Verdict:
    document, counts = self._scrub(document)
    reason, detail = self.find_fault(document) or "", ""
    if not reason and self.contamination:
      detail = self.contamination.matches(document) or ""
      reason = "contaminated" if detail else ""
    similarity = self.options.duplicate_similarity
    made = signature(document, similarity) if similarity and not reason else b""
    return Verdict(document, reason, detail, counts, made)

  def without_signatures(self) -> "Quality":
    """Returns the same rules for documents whose duplicates are known."""
    return dataclasses.replace(self, options=dataclasses.replace(self.options, duplicate_similarity=0.0))

  def _scrub(self, document: Document) -> tuple[Document, Counter[str]]:
    counts: Counter[str] = Counter()
    if not (self.options.scrub_secrets or self.options.scrub_contacts):
      return document, counts
    sequences = []
    for sequence in document.sequences:
      parts = []
      for part in sequence:
        text, found = scrub(part.text, self.options.scrub_secrets, self.options.scrub_contacts)
        parts.append(Part(text, part.is_learned))
        counts += found
      sequences.append(tuple(parts))
    return document._replace(sequences=tuple(sequences)), counts


def make_quality(options: QualityConfig) -> Quality:
  """Returns what judges documents one by one; reads the evaluation files, if any.

  Raises:
    DataError: an evaluation file cannot be read.
  """
  contamination = None
  if options.decontaminate:
    contamination = Contamination(read_texts(options.decontaminate), options.decontamination_words)
  return Quality(options, make_filter(options), contamination)
