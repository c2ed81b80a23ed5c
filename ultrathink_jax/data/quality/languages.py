"""The language of a text, told by py3langid: a naive Bayes model over byte n-grams, with numpy alone."""

import functools
from collections.abc import Sequence
from typing import Any

from ultrathink_jax.errors import ConfigError

_SAMPLE_CHARS = 2000  # the model reads byte by byte in Python: more would cost much and tell little


def identify(text: str) -> tuple[str, float]:
  """Returns the ISO 639-1 code of the language and how sure that is, from 0 to 1."""
  return _identifier().classify(text[:_SAMPLE_CHARS])


def require(codes: Sequence[str]) -> None:
  """Raises ConfigError unless the languages can be told."""
  known = _identifier().labels
  for code in codes:
    if code not in known:
      raise ConfigError(
        f"quality.languages names {code!r}, which is not among the {len(known)} known; choose from {', '.join(known)}"
      )


@functools.cache
def _identifier() -> Any:
  try:
    from py3langid import langid  # here, as few runs need it and it is optional
  except ImportError as error:
    raise ConfigError(
      "quality.languages needs the package py3langid, which is not installed; run pip install 'py3langid>=0.4'"
    ) from error
  return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
