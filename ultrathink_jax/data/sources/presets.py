"""Corpora by their names, as in data.source=c4: read where they are prepared, never downloaded or replaced.

A preset looks for a TFDS directory below $TFDS_DATA_DIR or ~/tensorflow_datasets. Where there is none, the error says
which command prepares it and how it is streamed instead.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ultrathink_jax.data.documents import Corpus
from ultrathink_jax.data.sources.options import SourceOptions
from ultrathink_jax.data.sources.tfds import tfds_corpus
from ultrathink_jax.data.wording import printable
from ultrathink_jax.errors import ConfigError, DataError


class Preset(NamedTuple):
  """A corpus by its names elsewhere.

  Attributes:
    folder: where TFDS puts it, below its data directory; also its name there if `is_registered`.
    hub: the argument of `hf:`, "" where the hub has no copy that can be streamed.
    needs: packages that TFDS needs to prepare it; best installed in an environment of their own.
  """

  folder: str
  hub: str
  is_registered: bool = False
  needs: str = ""


PRESETS = {
  "bookcorpus": Preset("bookcorpus", "bookcorpus/bookcorpus@refs/convert/parquet"),
  "c4": Preset("c4/en", "allenai/c4/en", True, "tensorflow apache-beam gcld3 nltk langdetect"),
  "imdb": Preset("imdb_reviews/plain_text", "stanfordnlp/imdb", True),
  "lm1b": Preset("lm1b", "", True, "tensorflow"),
  "openwebtext": Preset("openwebtext", "Skylion007/openwebtext"),
  "oscar": Preset("oscar", "oscar-corpus/OSCAR-2201/en"),
  "pg19": Preset("pg19", "", True, "tensorflow"),
  "pile": Preset("pile", "monology/pile-uncopyrighted"),
  "slimpajama": Preset("slimpajama", "cerebras/SlimPajama-627B"),
  "tiny_shakespeare": Preset("tiny_shakespeare", "", True, "tensorflow"),
  "wiki40b": Preset("wiki40b/en", "", True, "tensorflow apache-beam"),
  "wikipedia": Preset("wikipedia", "wikimedia/wikipedia/20231101.en"),
  "wikitext": Preset("wikitext-2", "Salesforce/wikitext/wikitext-2-raw-v1"),
  "wikitext-103": Preset("wikitext-103", "Salesforce/wikitext/wikitext-103-raw-v1"),
}


def preset_corpus(
  name: str, argument: str, options: SourceOptions, directory: Path, log: Callable[[str], None]
) -> Corpus:
  """Returns the corpus of a preset.

  Raises:
    DataError: it is not prepared.
  """
  if argument:
    raise ConfigError(f"source {printable(f'{name}:{argument}')!r} has a part after ':'; write {name} or tfds:DIR")
  preset = PRESETS[name]
  root = os.path.expanduser(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
  folder = os.path.join(root, preset.folder)
  if any("incomplete." not in str(path) for path in Path(folder).rglob("dataset_info.json")):
    return tfds_corpus(folder, options, directory, log)
  ways = [f"prepare it by: {_command(preset)}"] if preset.is_registered else []
  if preset.hub:
    ways.append(f"stream it by data.source=hf:{preset.hub}")
  if not preset.is_registered:
    ways.append("read files you have by data.source=jsonl:PATH or parquet:PATH")
  raise DataError(f"source {name!r} is not prepared at {printable(folder)}; {'; or '.join(ways)}")


def _command(preset: Preset) -> str:
  if preset.needs:  # what the command of TFDS needs itself, too
    return f"pip install {preset.needs} && tfds build {preset.folder} --file_format=array_record"
  call = f"tfds.builder('{preset.folder}', file_format='array_record').download_and_prepare()"
  return f'python -c "import tensorflow_datasets as tfds; {call}"'
