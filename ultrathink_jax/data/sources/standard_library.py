"""The `stdlib` source: the source files of the running Python's standard library, as a TensorFlow Datasets data set.

It needs no network and is there wherever the program runs. Tests are left out. The data set is written once in
ArrayRecord format, without TensorFlow, below the run's data directory, where any TFDS program can read it.
"""

import contextlib
import functools
import hashlib
import io
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ultrathink_jax.data.documents import Corpus, Record, Reject, Shard
from ultrathink_jax.data.sources.options import SourceOptions
from ultrathink_jax.data.sources.tfds import TfdsShard, open_prepared
from ultrathink_jax.data.storage import read_manifest, write_directory
from ultrathink_jax.errors import ConfigError

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_VERSION = "1.0.0"


class StandardLibraryShard(NamedTuple):
  """Files of the prepared data set, named by their paths."""

  prepared: TfdsShard
  text_field: str

  @property
  def name(self) -> str:
    return self.prepared.name

  @property
  def num_bytes(self) -> int:
    return self.prepared.num_bytes

  def read(self) -> Iterator[Record | Reject]:
    for record in self.prepared.read():
      yield Record(record.fields["path"], {self.text_field: record.fields["text"]})


def standard_library_corpus(
  argument: str, options: SourceOptions, directory: Path, log: Callable[[str], None]
) -> Corpus:
  """Returns the standard library; its data set is prepared in `directory` when it is opened."""
  if argument:
    raise ConfigError(f"source 'stdlib:{argument}' has a part after ':'; write stdlib")
  files = _find_files(Path(sysconfig.get_path("stdlib")))
  stamps = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in files.items()]
  identity = hashlib.sha256(repr(stamps).encode()).hexdigest()
  return Corpus(identity, functools.partial(_open, files, identity, options.text_field, directory / "stdlib", log))


def _find_files(root: Path) -> dict[str, Path]:
  """Returns {path relative to root: path} of the modules, sorted."""
  files = {}
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
    paths = [Path(folder, name) for name in names if name.endswith(".py")]
    files |= {path.relative_to(root).as_posix(): path for path in paths if path.is_file() and path.stat().st_size}
  return dict(sorted(files.items()))


def _open(
  files: dict[str, Path], identity: str, text_field: str, directory: Path, log: Callable[[str], None]
) -> dict[str, Sequence[Shard]]:
  manifest = read_manifest(directory, identity)
  if manifest is None:
    manifest = write_directory(directory, identity, lambda path: _prepare(files, path))
  if manifest["skipped"]:
    log(f"data: skipped {manifest['skipped']} of {len(files)} files of the standard library that are not UTF-8 text")
  prepared = open_prepared(str(directory / "standard_library" / _VERSION), identity).open()
  return {split: [StandardLibraryShard(shard, text_field) for shard in shards] for split, shards in prepared.items()}


def _prepare(files: dict[str, Path], directory: Path) -> dict[str, Any]:
  import tensorflow_datasets as tfds

  skipped = []

  def examples() -> Iterator[tuple[int, dict[str, str]]]:
    for order, (name, path) in enumerate(files.items()):
      try:
        yield order, {"text": path.read_bytes().decode(), "path": name}
      except UnicodeDecodeError:
        skipped.append(name)

  with tfds.core.registered.skip_registration():

    class StandardLibrary(tfds.core.GeneratorBasedBuilder):
      """Source files of the Python standard library."""

      VERSION = tfds.core.Version(_VERSION)

      def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "path": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

      def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

      def _generate_examples(self) -> Iterator[Any]:
        return examples()

  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):  # the builder prints
    StandardLibrary(data_dir=directory, file_format="array_record").download_and_prepare(
      download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
  return {"files": len(files), "skipped": len(skipped)}
