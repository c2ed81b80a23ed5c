"""A folder of small text files and the data prepared from it."""

import dataclasses
import random

import pytest

from configs.base import get_config
from ultrathink_jax.config import from_mapping

_WORDS = ("alpha", "beta", "gamma", "delta", "def", "return", "self", "if", "else", "None", "True", "while", "import")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
  """Forty small files of code-like text, about 60 KB."""
  folder = tmp_path_factory.mktemp("texts")
  choose = random.Random(0)
  for number in range(40):
    lines = []
    for _ in range(choose.randrange(20, 60)):
      words = " ".join(choose.choice(_WORDS) + choose.choice(["", "_x", "()", "1"]) for _ in range(5))
      lines.append("  " * choose.randrange(4) + words + choose.choice([":", "", "", "\n"]))
    (folder / f"file{number:02d}.py").write_text("\n".join(lines) + "\n")
  return folder


@pytest.fixture
def messages():
  return []


def data_config(source, **changes):
  """Returns the section of the defaults for `source`, a tenth of it held out."""
  defaults = from_mapping(get_config().to_dict()).data
  return dataclasses.replace(defaults, source=source, **{"validation_fraction": 0.1, "workers": 1} | changes)


@pytest.fixture(scope="session")
def prepared(text_folder, tmp_path_factory):
  """The data of `text_folder`, a tenth of it held out."""
  from ultrathink_jax.data.prepare import prepare

  return prepare(data_config(f"text:{text_folder}"), 512, tmp_path_factory.mktemp("data"), [].append)
