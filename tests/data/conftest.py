"""A folder of small text files and the data prepared from it."""

import random

import pytest

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


@pytest.fixture(scope="session")
def prepared(text_folder, tmp_path_factory):
  """The data of `text_folder`, a tenth of it held out."""
  from ultrathink_jax.config import DataConfig
  from ultrathink_jax.data import prepare

  config = DataConfig(f"text:{text_folder}", "auto", 0.1)
  return prepare(config, 512, tmp_path_factory.mktemp("data"), [].append)
