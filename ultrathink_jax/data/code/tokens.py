"""What the builder asks of a tokenizer: how many tokens a text has, and which special tokens there are."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from ultrathink_jax.data.tokenizer import Tokenizer

_BYTES_PER_TOKEN = 4


@runtime_checkable
class TokenizerView(Protocol):
  """A tokenizer as the builder sees it; it can be pickled. `fingerprint` differs where the answers may differ."""

  fingerprint: str

  def count_tokens(self, text: str) -> int: ...

  def has_token(self, token: str) -> bool: ...


class EstimatedTokens:
  """Four bytes to a token and no special tokens, for samples that no particular tokenizer is known for."""

  fingerprint = f"{_BYTES_PER_TOKEN} bytes per token"

  def count_tokens(self, text: str) -> int:
    return -(-len(text.encode("utf-8", "surrogatepass")) // _BYTES_PER_TOKEN)

  def has_token(self, token: str) -> bool:
    return False


class CountedTokens:
  """The tokens of a tokenizer; it has a special token if it encodes its spelling as one token that spells it."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self.fingerprint = tokenizer.fingerprint

  def count_tokens(self, text: str) -> int:
    return len(self._tokenizer.encode(text))

  def has_token(self, token: str) -> bool:
    ids = self._tokenizer.encode(token)
    return len(ids) == 1 and self._tokenizer.decode(ids) == token


class FimTokens(NamedTuple):
  """How a family of tokenizers marks the parts of a fill-in-the-middle sample.

  Attributes:
    middle: "" where the middle follows the prefix with nothing between.
    is_suffix_first: whether the family knows the order suffix, prefix, middle alone.
  """

  prefix: str
  suffix: str
  middle: str
  is_suffix_first: bool = False

  def order(self, prefix: str, suffix: str, is_suffix_first: bool) -> str:
    """Returns everything before the middle. Source: arXiv:2207.14255 section 3 and appendix D, SPM variant 2."""
    if self.is_suffix_first:
      return f"{self.suffix}{suffix}{self.prefix}{prefix}{self.middle}"
    if is_suffix_first:
      return f"{self.prefix}{self.suffix}{suffix}{self.middle}{prefix}"
    return f"{self.prefix}{prefix}{self.suffix}{suffix}{self.middle}"

  @property
  def spellings(self) -> tuple[str, ...]:
    return tuple(token for token in (self.prefix, self.suffix, self.middle) if token)


_FIM_FAMILIES = (
  FimTokens("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder; spelled as text where there is no family
  FimTokens("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma, Granite 4
  FimTokens("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
  FimTokens("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001, DeepSeek-Coder
  FimTokens("<PRE>", "<SUF>", "<MID>"),
  FimTokens("[PREFIX]", "[SUFFIX]", "", is_suffix_first=True),  # Codestral
)
_FILE_SEPARATORS = ("<file_sep>", "<|file_sep|>")


def find_fim_tokens(has_token: Callable[[str], bool]) -> FimTokens:
  """Returns the first family of which a tokenizer has all tokens, else the first of all, which is then plain text."""
  for family in _FIM_FAMILIES:
    if all(map(has_token, family.spellings)):
      return family
  return _FIM_FAMILIES[0]


def find_file_separator(has_token: Callable[[str], bool]) -> str:
  """Returns the token that comes before the path of each file of a repository, "" where a tokenizer has none."""
  return next((token for token in _FILE_SEPARATORS if has_token(token)), "")
