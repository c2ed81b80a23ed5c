"""The registry of sources: what `data.source` can name, as NAME or NAME:ARGUMENT."""

import difflib
import functools
from collections.abc import Callable
from pathlib import Path

from ultrathink_jax.data.documents import Corpus
from ultrathink_jax.data.sources.arrayrecord import arrayrecord_corpus
from ultrathink_jax.data.sources.code import code_tree_corpus
from ultrathink_jax.data.sources.hugging_face import hugging_face_corpus
from ultrathink_jax.data.sources.jsonl import jsonl_corpus
from ultrathink_jax.data.sources.options import SourceOptions
from ultrathink_jax.data.sources.parquet import parquet_corpus
from ultrathink_jax.data.sources.presets import PRESETS, preset_corpus
from ultrathink_jax.data.sources.standard_library import standard_library_corpus
from ultrathink_jax.data.sources.synthetic import synthetic_corpus
from ultrathink_jax.data.sources.text import text_corpus
from ultrathink_jax.data.sources.tfds import tfds_corpus
from ultrathink_jax.data.wording import printable
from ultrathink_jax.errors import ConfigError

__all__ = ["SOURCES", "SourceOptions", "find_corpus"]

SOURCES: dict[str, Callable[[str, SourceOptions, Path, Callable[[str], None]], Corpus]] = {
  "arrayrecord": arrayrecord_corpus,
  "code": code_tree_corpus,
  "hf": hugging_face_corpus,
  "jsonl": jsonl_corpus,
  "parquet": parquet_corpus,
  "stdlib": standard_library_corpus,
  "synthetic": synthetic_corpus,
  "text": text_corpus,
  "tfds": tfds_corpus,
} | {name: functools.partial(preset_corpus, name) for name in PRESETS}


def find_corpus(spec: str, options: SourceOptions, directory: Path, log: Callable[[str], None]) -> Corpus:
  """Returns the corpus that NAME or NAME:ARGUMENT names; sources that need files of their own put them in `directory`.

  Raises:
    ConfigError: there is no such source.
    DataError: there is nothing at its argument.
  """
  name, _, argument = spec.partition(":")
  if name not in SOURCES:
    near = difflib.get_close_matches(name, SOURCES, 1)
    hint = f"did you mean {near[0]!r}?" if near else "for files write text:PATH or jsonl:PATH"
    kinds = ", ".join(kind for kind in SOURCES if kind not in PRESETS)
    raise ConfigError(f"source {printable(spec)!r} is not one of {kinds} or a preset ({', '.join(PRESETS)}); {hint}")
  return SOURCES[name](argument, options, Path(directory), log)
