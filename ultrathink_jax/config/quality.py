"""The section `quality`: what is kept of a corpus; 0, False or an empty tuple turns a rule off."""

import dataclasses

from ultrathink_jax.errors import ConfigError

_SHARES = (
  "min_alphanumeric", "max_punctuation", "max_repetition", "min_script", "min_language", "duplicate_similarity"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class QualityConfig:
  """Which documents are kept, and what is taken out of them.

  Attributes:
    min_chars, max_chars: of a document; white space at its ends does not count towards `min_chars`.
    min_alphanumeric: share of the characters that are letters, marks, digits or white space.
    max_punctuation: share of the characters that are punctuation or symbols.
    max_repetition: share of the characters of lines that are in lines seen before in the document; and share of
      its runs of 10 words that were seen before. Source: arXiv:2112.11446 appendix A1.1, which has more measures.
    scripts: Unicode names (Latin, Han, Cyrillic); `min_script` is the share of the letters that are of one of them.
    languages: ISO 639-1 codes, as py3langid tells them; `min_language` is how sure it must be.
    max_line_chars, max_mean_line_chars: of the lines of a document.
    scrub_secrets: keys, tokens and passwords are replaced by markers; `scrub_contacts`: e-mail and IP addresses are.
    duplicate_similarity: of two documents whose estimated Jaccard similarity reaches it one is kept; 1 compares them
      as they are, but for white space.
    decontaminate: evaluation files; a document that shares `decontamination_words` words in a row with one is left out.
  """

  min_chars: int = 0
  max_chars: int = 0
  min_alphanumeric: float = 0.0
  max_punctuation: float = 0.0
  max_repetition: float = 0.0
  scripts: tuple[str, ...] = ()
  min_script: float = 0.8
  languages: tuple[str, ...] = ()
  min_language: float = 0.8
  max_line_chars: int = 0
  max_mean_line_chars: int = 0
  scrub_secrets: bool = False
  scrub_contacts: bool = False
  duplicate_similarity: float = 0.0
  decontaminate: tuple[str, ...] = ()
  decontamination_words: int = 13

  def __post_init__(self) -> None:
    for key in _SHARES:
      if not 0 <= getattr(self, key) <= 1:
        raise ConfigError(f"quality.{key}={getattr(self, key)} is not a share; choose a number from 0 to 1")
    for key in ("min_chars", "max_chars", "max_line_chars", "max_mean_line_chars"):
      if not getattr(self, key) >= 0:
        raise ConfigError(
          f"quality.{key}={getattr(self, key)} is negative; choose a number of characters, or 0 for any"
        )
    if 0 < self.max_chars < self.min_chars:
      raise ConfigError(
        f"quality.max_chars={self.max_chars} is below min_chars={self.min_chars}, so that nothing is kept; raise it"
      )
    if self.decontamination_words < 1:
      raise ConfigError(f"quality.decontamination_words={self.decontamination_words} is below 1; 13 is usual")
