"""The `hf:` source: a data set of the Hugging Face Hub, streamed, or a local folder that `datasets` can load.

Spelled hf:NAME, hf:OWNER/NAME or hf:OWNER/NAME/CONFIG, each with @REVISION if need be, or hf:PATH. It needs the package
`datasets`, which is an extra. Entries are named SPLIT-SHARD#INDEX from 0. Splits are used as `tfds:` does.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ultrathink_jax.data.documents import Corpus, Record, Reject, Shard
from ultrathink_jax.data.sources.files import find_files
from ultrathink_jax.data.sources.options import SourceOptions
from ultrathink_jax.data.sources.tfds import own_splits
from ultrathink_jax.data.wording import in_short, printable
from ultrathink_jax.errors import ConfigError, DataError

_SAVED = ("state.json", "dataset_dict.json")  # left by save_to_disk
_ROWS_PER_SHARD = 20_000  # of what was saved by save_to_disk


class Place(NamedTuple):
  """What to load; `name` is a path where `is_local`."""

  name: str
  config: str | None
  revision: str | None
  is_local: bool


class HuggingFaceShard(NamedTuple):
  """One of the `num_shards` parts of a split."""

  place: Place
  split: str
  index: int
  num_shards: int
  num_bytes: int

  @property
  def name(self) -> str:
    return f"{self.split}-{self.index}"

  def read(self) -> Iterator[Record | Reject]:
    with _errors(self.place):
      shard = _load(self.place)[self.split].shard(num_shards=self.num_shards, index=self.index)
      for index, fields in enumerate(shard):
        yield Record(f"{self.name}#{index}", fields)


def hugging_face_corpus(argument: str, options: SourceOptions, directory: Path, log: Callable[[str], None]) -> Corpus:
  """Returns the data set that `argument` names."""
  del options, directory
  _require_datasets()
  place = find_place(argument)
  if place.is_local:
    return Corpus(find_files(place.name, "hf", log).identity("hf"), functools.partial(_open, place))
  with _errors(place):
    import huggingface_hub

    commit = huggingface_hub.HfApi().dataset_info(place.name, revision=place.revision).sha
  place = place._replace(revision=commit)
  return Corpus(f"hf {place.name} {place.config} {commit}", functools.partial(_open, place))


def find_place(argument: str) -> Place:
  """Returns what the argument of a source means. Raises ConfigError."""
  path = os.path.expanduser(argument)
  if argument and os.path.exists(path):
    return Place(os.path.abspath(path), None, None, True)
  name, _, revision = argument.partition("@")
  parts = name.split("/")
  if not all(parts) or len(parts) > 3 or name.startswith((".", "~")):
    raise ConfigError(
      f"source {printable('hf:' + argument)!r} is neither there nor a name; write hf:OWNER/NAME, hf:OWNER/NAME/CONFIG "
      "or hf:PATH"
    )
  return Place("/".join(parts[:2]), parts[2] if len(parts) == 3 else None, revision or None, False)


def _require_datasets() -> Any:
  try:
    datasets = importlib.import_module("datasets")
  except ImportError as error:
    raise DataError("source hf: needs the package datasets; install it by: pip install 'datasets>=4'") from error
  datasets.config.TORCH_AVAILABLE = datasets.config.TF_AVAILABLE = False  # else it imports them where they are there
  datasets.disable_progress_bars()
  return datasets


def _load(place: Place) -> dict[str, Any]:
  """Returns the splits by name, as data sets that are read in order."""
  datasets = _require_datasets()
  if place.is_local and any(os.path.exists(os.path.join(place.name, name)) for name in _SAVED):
    saved = datasets.load_from_disk(place.name)
    splits = saved if isinstance(saved, dict) else {"train": saved}
    return {
      name: rows.to_iterable_dataset(num_shards=max(1, min(len(rows), len(rows) // _ROWS_PER_SHARD)))
      for name, rows in splits.items()
    }
  return datasets.load_dataset(place.name, place.config, revision=place.revision, streaming=True)


def _open(place: Place) -> dict[str, Sequence[Shard]]:
  with _errors(place):
    shards: dict[str, list[Shard]] = {}
    for split, rows in _load(place).items():
      known = (rows.info.splits or {}).get(split)
      num_bytes = (known.num_bytes or 0) // rows.num_shards if known else 0
      shards[str(split)] = [
        HuggingFaceShard(place, str(split), index, rows.num_shards, num_bytes) for index in range(rows.num_shards)
      ]
    return own_splits(shards)


@contextlib.contextmanager
def _errors(place: Place) -> Iterator[None]:
  """Turns what goes wrong in `datasets`, which raises errors of many libraries, into a DataError."""
  try:
    yield
  except DataError:
    raise
  except Exception as error:
    raise DataError(f"source {printable('hf:' + place.name)!r} cannot be read: {in_short(error)}") from error
