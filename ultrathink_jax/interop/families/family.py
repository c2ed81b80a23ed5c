"""What is known of one Hugging Face architecture: the names of its tensors and the keys of its config.json.

A table of rows says which of their tensors is which of our parameters; reading and writing both follow it.
Letters: D embed  C channels  W convolution width  E experts  F mlp.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from ultrathink_jax.config import ModelConfig
from ultrathink_jax.models.layer import MIXERS

Tensor = Any  # numpy array, or a traced array where only shapes are asked for


class Transform(NamedTuple):
  """How one weight of ours lies in memory there; `ours` undoes `theirs`.

  Attributes:
    theirs: our array -> their tensor, or their part of it.
    ours: (their tensor or part, our shape) -> our array.
    axis: along which a tensor that holds several of our parameters is cut.
  """

  theirs: Callable[[Tensor], Tensor]
  ours: Callable[[Tensor, tuple[int, ...]], Tensor]
  axis: int = 0


# Biases, norms, tables, constants of the state space: the same numbers in the same order.
FLAT = Transform(lambda x: x.reshape(-1), lambda t, shape: t.reshape(shape))
TABLE = Transform(lambda x: x, lambda t, shape: t)
# [D, *out] and [*in, D] against [out, in].
LINEAR = Transform(lambda x: x.reshape(x.shape[0], -1).T, lambda t, shape: t.T.reshape(shape))
LINEAR_FROM_HEADS = Transform(lambda x: x.reshape(-1, x.shape[-1]).T, lambda t, shape: t.T.reshape(shape))
# [W, C] against [C, 1, W].
CONV = Transform(lambda x: x.T[:, None], lambda t, shape: t[:, 0].T)
# [E, in, out] against [E, out, in].
BANK = Transform(lambda x: x.swapaxes(1, 2), lambda t, shape: t.swapaxes(1, 2), axis=1)


class Row(NamedTuple):
  """One line of a table.

  Attributes:
    theirs: name below the layer; where it holds {}, one tensor an expert.
    ours: names below the layer, `mixer` for that of its letter; several are joined in this order. A row whose
      parameters the model does not have does not count.
    transform: between the two.
  """

  theirs: str
  ours: tuple[str, ...]
  transform: Transform


def row(theirs: str, *ours: str, transform: Transform = LINEAR) -> Row:
  return Row(theirs, ours, transform)


class Entry(NamedTuple):
  """One tensor of a file: the parameters in it by our names in files, and for one expert's tensor, which expert."""

  parts: tuple[str, ...]
  expert: int | None
  transform: Transform


@dataclasses.dataclass(frozen=True)
class Family:
  """An architecture of the transformers library.

  Attributes:
    model_type: its name in config.json.
    architecture: its class.
    read: config.json -> the keys of our model section. Raises ConfigError for what we do not compute.
    write: our model -> config.json. What the architecture has no key for is left out: `exact_families` tells.
    layer: name of layer {} there.
    outside: rows of the tensors outside the layers.
    rows: rows of a layer, by our letter.
    fused: rows of expert layers whose experts share one tensor, where files come in both forms.
    renames: (regular expression, replacement) from other spellings of names in files to those of the rows.
    letters_per_layer: how many of our layers, each with its norm, one of theirs holds.
  """

  model_type: str
  architecture: str
  read: Callable[[dict[str, Any]], dict[str, Any]]
  write: Callable[[ModelConfig], dict[str, Any]]
  layer: str
  outside: tuple[Row, ...]
  rows: dict[str, tuple[Row, ...]]
  fused: tuple[Row, ...] | None = None
  renames: tuple[tuple[str, str], ...] = ()
  letters_per_layer: int = 2

  def entries(self, letters: str, shapes: dict[str, Any], is_fused: bool) -> dict[str, Entry]:
    """Returns {tensor name: entry} of a model with these layers, whose parameters have `shapes`."""
    rows = self.rows | ({"E": self.fused} if is_fused and self.fused else {})
    found = dict(_expand(self.outside, "", lambda name: name, shapes))
    for number, letter in enumerate(letters):
      prefix = self.layer.format(number // self.letters_per_layer) + "."
      found |= _expand(rows[letter], prefix, functools.partial(_own_name, number, letter), shapes)
    return found


def _own_name(number: int, letter: str, name: str) -> str:
  """Returns layers.3.attention.query.kernel for mixer.query.kernel of layer 3, an A."""
  first, rest = name.split(".", 1)
  return f"layers.{number}.{MIXERS[letter].name if first == 'mixer' else first}.{rest}"


def _expand(
  rows: tuple[Row, ...], prefix: str, name_of: Callable[[str], str], shapes: dict[str, Any]
) -> Iterator[tuple[str, Entry]]:
  for theirs, ours, transform in rows:
    parts = tuple(map(name_of, ours))
    if parts[0] not in shapes:
      continue
    if "{}" in theirs:
      for expert in range(shapes[parts[0]].shape[0]):
        yield prefix + theirs.format(expert), Entry(parts, expert, transform)
    else:
      yield prefix + theirs, Entry(parts, None, transform)


def their_shape(entry: Entry, shapes: dict[str, Any]) -> tuple[int, ...]:
  """Returns the shape of an entry's tensor."""
  parts = [_part_shape(entry, shapes[name].shape) for name in entry.parts]
  axis = entry.transform.axis
  return (*parts[0][:axis], sum(part[axis] for part in parts), *parts[0][axis + 1 :])


def to_theirs(entry: Entry, arrays: dict[str, np.ndarray]) -> np.ndarray:
  """Returns the tensor of an entry from our parameters, contiguous."""
  parts = [arrays[name] if entry.expert is None else arrays[name][entry.expert] for name in entry.parts]
  parts = [entry.transform.theirs(part) for part in parts]
  return np.ascontiguousarray(np.concatenate(parts, entry.transform.axis) if len(parts) > 1 else parts[0])


def to_ours(entry: Entry, tensor: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
  """Writes an entry's tensor into our parameters, which are views of where they belong."""
  axis = entry.transform.axis
  sizes = [_part_shape(entry, arrays[name].shape)[axis] for name in entry.parts]
  pieces = np.split(tensor, np.cumsum(sizes)[:-1], axis) if len(sizes) > 1 else [tensor]
  for name, piece in zip(entry.parts, pieces, strict=True):
    target = arrays[name] if entry.expert is None else arrays[name][entry.expert]
    target[...] = entry.transform.ours(piece, target.shape)


def _part_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
  return _shape_of(entry.transform.theirs, shape if entry.expert is None else shape[1:])


@functools.cache
def _shape_of(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[int, ...]:
  return jax.eval_shape(function, jax.ShapeDtypeStruct(shape, np.float32)).shape
