"""The checkpoints in tests/fixtures, each loaded once."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.numpy import load_file

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.interop import huggingface
from ultrathink_jax.interop.families import FAMILIES, Family

FIXTURES = Path(__file__).parent.parent / "fixtures"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))


class Fixture(NamedTuple):
  """What a checkpoint is to us, and what transformers computes with it."""

  name: str
  directory: Path
  family: Family
  model: ModelConfig  # computes in float32
  params: Any
  tokens: Any
  logits: Any


@functools.cache
def load_fixture(name: str) -> Fixture:
  directory = FIXTURES / name
  family = FAMILIES[json.loads((directory / "config.json").read_text())["model_type"]]
  model, params = huggingface.load(directory)
  expected = load_file(directory / "expected.safetensors")
  model = dataclasses.replace(model, dtype="float32", remat="none")
  return Fixture(name, directory, family, model, params, expected["tokens"], expected["logits"])


@pytest.fixture(params=NAMES)
def fixture(request) -> Fixture:
  return load_fixture(request.param)
