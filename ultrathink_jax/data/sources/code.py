"""The `code:PATH` source: samples of a source tree, see data/code/."""

from collections.abc import Callable
from pathlib import Path

from ultrathink_jax.data.code import CountedTokens, code_corpus
from ultrathink_jax.data.documents import Corpus
from ultrathink_jax.data.sources.options import SourceOptions


def code_tree_corpus(argument: str, options: SourceOptions, directory: Path, log: Callable[[str], None]) -> Corpus:
  """Returns the samples of the tree at `argument`, measured in tokens of the tokenizer where it is known."""
  tokenizer = None if options.tokenizer is None else CountedTokens(options.tokenizer)
  return code_corpus(argument, options.code, directory, log, tokenizer)
