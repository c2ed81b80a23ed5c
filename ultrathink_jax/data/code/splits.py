"""Which files are duplicates of others, and in which split each of the rest is."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ultrathink_jax.data.code.options import CodeOptions
from ultrathink_jax.data.documents import score
from ultrathink_jax.data.quality.duplicates import DisjointSets, clusters

SPLITS = ("train", "validation", "test")
_EXACT_BYTES = 16  # of a signature: the digest of the text
_PACKAGE_FILES = ("Cargo.toml", "pyproject.toml", "setup.py", "package.json", "go.mod", "pom.xml", "build.gradle")


class Assignment(NamedTuple):
  """What becomes of a file: its split, or the reason why it is left out; the file that stands for its cluster."""

  split: str
  reason: str
  cluster: str


def assign(
  names: Sequence[str], signatures: Sequence[bytes], modules: Sequence[str], options: CodeOptions
) -> list[Assignment]:
  """Returns what becomes of each file.

  Of files that are equal but for white space the first by name is kept, of near duplicates too unless
  `options.near_duplicates` is "keep". The split hangs on the smallest name of a cluster, or the name of a module,
  alone, so that files that are added move no others, unless they are near duplicates of them with a smaller name.
  """
  exact = clusters(names, [signature[:_EXACT_BYTES] for signature in signatures], similarity=1.0)
  kept = [i for i, first in enumerate(exact) if i == first]
  near = clusters([names[i] for i in kept], [signatures[i] for i in kept])
  first_near = {i: kept[first] for i, first in zip(kept, near, strict=True)}
  keys = _module_keys(modules, first_near) if options.split_by == "module" else names
  assignments = []
  for i, first in enumerate(exact):
    cluster = first_near[int(first)]
    if i != first:
      assignments.append(Assignment("", "exact duplicate", names[cluster]))
    elif i != cluster and options.near_duplicates == "drop":
      assignments.append(Assignment("", "near duplicate", names[cluster]))
    else:
      assignments.append(Assignment(_split(keys[cluster], options), "", names[cluster]))
  return assignments


def find_modules(root: Path, paths: Sequence[str]) -> list[str]:
  """Returns the innermost folder above each path that is a package, else the top folder; "" at the root."""
  is_package: dict[str, bool] = {}
  modules = []
  for path in paths:
    parts = path.split("/")[:-1]
    module = parts[0] if parts else ""
    for depth in range(len(parts), 0, -1):
      folder = "/".join(parts[:depth])
      if folder not in is_package:
        is_package[folder] = any(os.path.isfile(root / folder / name) for name in _PACKAGE_FILES)
      if is_package[folder]:
        module = folder
        break
    modules.append(module)
  return modules


def _split(key: str, options: CodeOptions) -> str:
  at = score(key)
  if at < options.validation_fraction:
    return "validation"
  return "test" if at < options.validation_fraction + options.test_fraction else "train"


def _module_keys(modules: Sequence[str], first_near: dict[int, int]) -> list[str]:
  """Returns for each file the smallest name of the modules that near duplicates tie to its own."""
  order = sorted(set(modules))
  rank = {module: i for i, module in enumerate(order)}
  sets = DisjointSets(len(order))
  for i, first in first_near.items():
    sets.join([rank[modules[i]], rank[modules[first]]])
  return [order[sets.find(rank[module])] for module in modules]
