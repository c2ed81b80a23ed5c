"""Directories of safetensors: model.safetensors, or numbered files with model.safetensors.index.json."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ultrathink_jax.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_READABLE = ("F32", "F16", "BF16", "F64")
MAX_FILE_BYTES = 5 * 10**9


class Stored(NamedTuple):
  """Where a tensor is and what its header says."""

  path: Path
  shape: tuple[int, ...]
  dtype: str


def find_tensors(directory: Path) -> dict[str, Stored]:
  """Returns what is stored by name; reads headers only.

  Raises:
    CheckpointError: a file is missing or damaged, or holds another type than floating-point numbers.
  """
  found: dict[str, Stored] = {}
  try:
    for path in _files(directory):
      with safe_open(path, "numpy") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
          header = file.get_slice(name)
          found[name] = Stored(path, tuple(header.get_shape()), header.get_dtype())
  except (OSError, json.JSONDecodeError, KeyError, SafetensorError) as error:
    raise CheckpointError(f"{directory} does not hold a saved model: {type(error).__name__}: {error}") from error
  for name, stored in found.items():
    if stored.dtype not in _READABLE:
      raise CheckpointError(f"{stored.path}: {name} has type {stored.dtype}; it takes {', '.join(_READABLE)}")
  return found


def read_tensors(stored: dict[str, Stored]) -> Iterator[tuple[str, np.ndarray]]:
  """Yields every tensor in float32, one at a time. Raises CheckpointError where a file is damaged."""
  for path in sorted({entry.path for entry in stored.values()}):
    names = [name for name, entry in stored.items() if entry.path == path]
    try:
      # numpy has no bfloat16 of its own; jax arrays of the host do.
      with (
        jax.default_device(jax.local_devices(backend="cpu")[0]),
        safe_open(path, "numpy") as plain,
        safe_open(path, "flax") as with_bfloat16,
      ):
        for name in names:
          file = with_bfloat16 if stored[name].dtype == "BF16" else plain
          yield name, np.asarray(file.get_tensor(name)).astype(np.float32, copy=False)
    except (OSError, SafetensorError) as error:
      raise CheckpointError(f"{path} is damaged: {error}") from error


def write_tensors(
  directory: Path,
  shapes: dict[str, tuple[int, ...]],
  tensor_of: Callable[[str], np.ndarray],
  metadata: dict[str, str],
) -> None:
  """Writes float32 tensors, a file at a time; `tensor_of` makes the tensor of a name when its file is written."""
  sizes = {name: 4 * int(np.prod(shape, dtype=np.int64)) for name, shape in shapes.items()}
  files: list[list[str]] = [[]]
  room = MAX_FILE_BYTES
  for name, size in sizes.items():
    if files[-1] and size > room:
      files.append([])
      room = MAX_FILE_BYTES
    files[-1].append(name)
    room -= size
  paths = [_SINGLE_FILE]
  for old in (directory / INDEX_FILE, directory / _SINGLE_FILE):
    old.unlink(missing_ok=True)
  if len(files) > 1:
    paths = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    weight_map = {name: path for path, names in zip(paths, files, strict=True) for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
  for path, names in zip(paths, files, strict=True):
    save_file({name: np.ascontiguousarray(tensor_of(name)) for name in names}, directory / path, metadata)


def _files(directory: Path) -> list[Path]:
  index = directory / INDEX_FILE
  if index.is_file():
    return sorted({directory / name for name in json.loads(index.read_text())["weight_map"].values()})
  if (directory / _SINGLE_FILE).is_file():
    return [directory / _SINGLE_FILE]
  pickled = sorted(directory.glob("pytorch_model*.bin"))
  if pickled:
    raise CheckpointError(f"{pickled[0]} is pickled, which can run any code; convert the model to safetensors")
  raise CheckpointError(f"{directory} holds neither {_SINGLE_FILE} nor {INDEX_FILE}")
