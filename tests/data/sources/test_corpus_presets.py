"""A preset is read where it is prepared; where not, the error says how to get it, and nothing is made up."""

import importlib.util
from pathlib import Path

import pytest

from ultrathink_jax.data.sources import SourceOptions, find_corpus
from ultrathink_jax.data.sources.hugging_face import find_place
from ultrathink_jax.data.sources.presets import PRESETS
from ultrathink_jax.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  return tmp_path


def find(spec, directory):
  return find_corpus(spec, SourceOptions(), directory, print)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_that_is_not_prepared_says_where_it_is_looked_for_and_what_to_do(name, data_dir):
  with pytest.raises(DataError) as error:
    find(name, data_dir)
  message = str(error.value)
  assert str(data_dir / PRESETS[name].folder) in message
  assert "tfds build" in message or "tfds.builder(" in message or "data.source=hf:" in message
  assert "\n" not in message


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.is_registered])
def test_the_command_names_a_data_set_that_tfds_knows(name):
  root = Path(importlib.util.find_spec("tensorflow_datasets").origin).parent
  data_set = PRESETS[name].folder.partition("/")[0]
  without_tensorflow = (root / "datasets" / data_set).is_dir()
  assert without_tensorflow or (root / "text" / f"{data_set}.py").is_file()
  assert without_tensorflow or "tensorflow" in PRESETS[name].needs


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.hub])
def test_what_a_preset_says_to_stream_is_spelled_right(name):
  place = find_place(PRESETS[name].hub)
  assert not place.is_local
  assert place.name.count("/") == 1


def test_a_preset_takes_no_argument(data_dir):
  with pytest.raises(ConfigError, match="has a part after"):
    find("c4:en", data_dir)


def test_a_preset_that_is_prepared_is_read(data_dir):
  (data_dir / "lm1b" / "1.1.0").mkdir(parents=True)
  (data_dir / "lm1b" / "1.1.0" / "dataset_info.json").write_text("{}")
  assert find("lm1b", data_dir).identity


def test_a_preset_whose_preparation_broke_off_is_not_prepared(data_dir):
  (data_dir / "lm1b" / "incomplete.ABC_1.1.0").mkdir(parents=True)
  (data_dir / "lm1b" / "incomplete.ABC_1.1.0" / "dataset_info.json").touch()
  with pytest.raises(DataError, match="is not prepared"):
    find("lm1b", data_dir)
