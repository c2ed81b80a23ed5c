"""Configurations that older versions wrote down, read as of today."""

import dataclasses
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ultrathink_jax.config import Config, from_mapping


def from_saved(values: Mapping[str, Any]) -> Config:
  """Returns the configuration of a config.json that this version or an older one wrote.

  A key that came later has its value in configs/base.py, where a new key begins as what was done without it. Raises
  ConfigError for a key that is not known.
  """
  root = str(Path(__file__).resolve().parent.parent.parent)
  if root not in sys.path:  # of a program that is not the command line
    sys.path.append(root)
  return from_mapping(_filled(values, import_module("configs.base").get_config().to_dict(), Config))


def _filled(values: Mapping[str, Any], defaults: Mapping[str, Any], section: type) -> dict[str, Any]:
  """Returns the values of a section and, for keys that they lack, the defaults."""
  filled = {**defaults, **values}
  for field in dataclasses.fields(section):
    if dataclasses.is_dataclass(field.type) and isinstance(filled[field.name], Mapping):
      filled[field.name] = _filled(filled[field.name], defaults[field.name], field.type)
  return filled
