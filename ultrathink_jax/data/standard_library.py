"""The `stdlib` source: the source files of the running Python's standard library, as a TensorFlow Datasets data set.

It needs no network and is there wherever the program runs. Tests are left out. The data set is written once in
ArrayRecord format, without TensorFlow, below the run's data directory, where any TFDS program can read it.
"""

import contextlib
import functools
import io
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ultrathink_jax.config import DataConfig
from ultrathink_jax.data.documents import Corpus, Document, Splits, split
from ultrathink_jax.data.storage import read_manifest, write_directory
from ultrathink_jax.data.text_files import identify, is_text, walk
from ultrathink_jax.errors import ConfigError

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_VERSION = "1.0.0"


class PreparedDocuments:
  """One split of the prepared data set."""

  def __init__(self, data_source: Any):
    self._data_source = data_source

  def __len__(self) -> int:
    return len(self._data_source)

  def __getitem__(self, index: int) -> Document:
    features = self._data_source[index]
    return Document(features["text"].decode(), features["path"].decode())


def standard_library_corpus(
  argument: str, config: DataConfig, vocab_size: int, directory: Path, log: Callable[[str], None]
) -> Corpus:
  """Returns the standard library; its data set is prepared in `directory` when it is opened."""
  del vocab_size
  if argument:
    raise ConfigError(f"data.source={config.source!r} has a part after ':'; write stdlib")
  files = {name: path for name, path in walk(_root(), _SKIPPED_FOLDERS.__contains__).items() if name.endswith(".py")}
  return Corpus(identify(files), functools.partial(_open, files, config, directory / "stdlib", log))


def _root() -> Path:
  return Path(sysconfig.get_path("stdlib"))


def _open(files: dict[str, Path], config: DataConfig, directory: Path, log: Callable[[str], None]) -> Splits:
  key = f"{identify(files)} {config.validation_fraction}"
  manifest = read_manifest(directory, key)
  if manifest is None:
    manifest = write_directory(directory, key, lambda path: _prepare(files, config, path))
  if manifest["skipped"]:
    log(f"data: skipped {manifest['skipped']} of {len(files)} files that are not UTF-8 text")
  return Splits(*(_read(directory, name) for name in ("train", "validation")), manifest["skipped"])


def _read(directory: Path, name: str) -> Any:
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(directory / "standard_library" / _VERSION)
  return PreparedDocuments(builder.as_data_source(name)) if name in builder.info.splits else ()


def _prepare(files: dict[str, Path], config: DataConfig, directory: Path) -> dict[str, Any]:
  import tensorflow_datasets as tfds

  names = [name for name, path in files.items() if is_text(path)]
  parts = dict(zip(("train", "validation"), split(names, config.validation_fraction), strict=True))

  def examples(part: list[int]) -> Iterator[tuple[int, dict[str, str]]]:
    for order, index in enumerate(part):
      text = files[names[index]].read_bytes().decode()
      yield order, {"text": text, "path": names[index]}

  with tfds.core.registered.skip_registration():

    class StandardLibrary(tfds.core.GeneratorBasedBuilder):
      """Source files of the Python standard library."""

      VERSION = tfds.core.Version(_VERSION)

      def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "path": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

      def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {name: self._generate_examples(part) for name, part in parts.items() if part}

      def _generate_examples(self, part: list[int]) -> Iterator[Any]:
        return examples(part)

  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):  # the builder prints
    StandardLibrary(data_dir=directory, file_format="array_record").download_and_prepare(
      download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
  return {"files": len(files), "skipped": len(files) - len(names)}
