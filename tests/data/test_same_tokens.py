"""The same contents give the same tokens whatever they lie in, and without the libraries they may have come from.

What is promised: every kind of source gives the same multiset of documents, token for token. The order of documents,
and which are held out, follow from their names; so sources whose entries have the same names give the same batches.
"""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from tests.data.conftest import data_config
from tests.data.malformed import write_records
from ultrathink_jax.data.loader import Loader
from ultrathink_jax.data.prepare import prepare

ROOT = Path(__file__).parent.parent.parent
TINY = """
from configs import base

def get_config():
  config = base.get_config()
  config.model.update(
    layers="AF", vocab_size=512, embed_dim=16, dtype="float32", remat="none", num_heads=2, num_kv_heads=1, head_dim=8,
    mlp_dim=16, mamba_head_dim=16)
  config.data.update(mixture=MIXTURE, validation_fraction=0.2)
  config.optimizer.warmup_steps = 1
  config.train.update(steps=2, batch_size=2, sequence_length=16, log_every_steps=1)
  config.evaluate.update(every_steps=0, num_batches=1)
  config.generate.max_new_tokens = 1
  return config
"""
# Runs a command line where TensorFlow and PyTorch seem to be installed; to import one ends the run.
GUARDED = """
import importlib.machinery, sys

class Guard:
  def find_spec(self, name, path=None, target=None):
    return importlib.machinery.ModuleSpec(name, self) if name in ("tensorflow", "torch") else None

  def create_module(self, spec):
    raise SystemExit(f"{spec.name} is imported")

  def exec_module(self, module):
    pass

sys.meta_path.insert(0, Guard())
from ultrathink_jax import main
main.main(sys.argv)
"""
PREPARE = """
import json, sys
from pathlib import Path
from tests.data.conftest import data_config
from ultrathink_jax.data import building, prepare
building._TASK_BYTES = int(sys.argv[3])
print(prepare.prepare(data_config(**json.loads(sys.argv[2])), 512, Path(sys.argv[1]), print).fingerprint)
"""


def _write_tfds(texts, place):
  import tensorflow_datasets as tfds

  with tfds.core.registered.skip_registration():

    class Texts(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")

      def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

      def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

      def _generate_examples(self):
        for number, text in enumerate(texts):
          yield number, {"text": text}

    Texts(data_dir=place, file_format="array_record").download_and_prepare(
      download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


def _write_folder(texts, place):
  place.mkdir()
  for number, text in enumerate(texts):
    (place / f"{number:03}.txt").write_text(text)


def _as_lines(texts):
  return "".join(json.dumps({"text": text}) + "\n" for text in texts)


WRITERS = {
  "tfds": (_write_tfds, "data"),
  "parquet": (lambda texts, place: parquet.write_table(pyarrow.table({"text": texts}), place), "data.parquet"),
  "jsonl": (lambda texts, place: place.write_bytes(gzip.compress(_as_lines(texts).encode())), "data.jsonl.gz"),
  "arrayrecord": (lambda texts, place: write_records(place, [text.encode() for text in texts]), "data.array_record"),
  "text": (_write_folder, "data"),
}


@pytest.fixture(scope="module")
def texts(text_folder):
  odd = ["no line end", "  \n\ttabs and spaces  \n", "é ▁ 漢字 🙂\r\n", "x" * 3000, "</s><s> [INST]"]
  return [path.read_text() for path in sorted(text_folder.iterdir())] + odd


@pytest.fixture(scope="module")
def sources(texts, tmp_path_factory):
  """Returns how data.source spells each kind of source of the same texts."""
  folder = tmp_path_factory.mktemp("sources")
  specs = {}
  for kind, (write, name) in WRITERS.items():
    (folder / kind).mkdir()
    write(texts, folder / kind / name)
    specs[kind] = f"{kind}:{folder / kind / name}"
  return specs


@pytest.fixture(scope="module")
def model_file(prepared, tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  prepared.tokenizer.save(folder)
  return str(folder / "tokenizer.model")


def _prepare(spec, model_file, directory):
  return prepare(data_config(spec, tokenizer=model_file), 512, directory, [].append)


def _documents(data):
  stores = (*data.train, data.validation)
  return sorted(store.example(index).tokens.tolist() for store in stores for index in range(len(store)))


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_source_gives_the_same_documents(kind, sources, texts, model_file, prepared, tmp_path):
  data = _prepare(sources[kind], model_file, tmp_path)
  assert _documents(data) == sorted(prepared.tokenizer.encode(text) for text in texts)
  assert sum(data.infos[0].text_bytes.values()) == sum(len(text.encode()) for text in texts)


def test_sources_whose_entries_have_the_same_names_give_the_same_batches(texts, model_file, tmp_path):
  plain, zipped, records, table = (tmp_path / name for name in ("a", "b", "c", "d"))
  for folder in (plain, zipped, records, table):
    folder.mkdir()
  (plain / "x.jsonl").write_text(_as_lines(texts))
  (zipped / "x.jsonl").write_text(_as_lines(texts).replace("\n", "\r\n"))
  write_records(records / "x", [text.encode() for text in texts])
  parquet.write_table(pyarrow.table({"text": texts}), table / "x")
  pairs = [(f"jsonl:{plain}/x.jsonl", f"jsonl:{zipped}/x.jsonl"), (f"arrayrecord:{records}/x", f"parquet:{table}/x")]
  for number, specs in enumerate(pairs):
    first, second = (_prepare(spec, model_file, tmp_path / f"{number}{i}") for i, spec in enumerate(specs))
    assert first.fingerprint == second.fingerprint
    loaders = [Loader(data.train, data.tokenizer, 4, 64, seed=3) for data in (first, second)]
    for step in (0, 7, 40):
      for ours, theirs in zip(*(jax_leaves(loader.batch(step)) for loader in loaders), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def jax_leaves(batch):
  import jax

  return jax.tree.leaves(batch)


def test_training_on_every_kind_of_source_imports_neither_tensorflow_nor_torch(sources, model_file, tmp_path):
  mixture = tuple(f"{spec}=1" for spec in sources.values())
  (tmp_path / "tiny.py").write_text(TINY.replace("MIXTURE", repr(mixture)))
  command = [sys.executable, "-c", GUARDED, f"--config={tmp_path / 'tiny.py'}", f"--workdir={tmp_path / 'run'}"]
  command += ["--mode=train", f"--config.data.tokenizer={model_file}"]
  environment = os.environ | {"XLA_FLAGS": ""}
  result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
  assert result.returncode == 0, result.stderr[-2000:]
  assert "step=2/2" in result.stdout
  for kind in sources:
    assert f"data: tokenized {kind}:" in result.stdout


def test_a_killed_build_goes_on_and_ends_with_the_same_fingerprint(texts, model_file, tmp_path):
  folder = tmp_path / "texts"
  _write_folder([f"{number} {text}" for number in range(60) for text in texts], folder)
  config = {"source": f"text:{folder}", "tokenizer": model_file}
  whole = prepare(data_config(**config), 512, tmp_path / "whole", [].append)

  def start():
    arguments = [str(tmp_path / "killed"), json.dumps(config), "20000"]
    return subprocess.Popen([sys.executable, "-c", PREPARE, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)

  tasks = lambda: sorted((tmp_path / "killed").glob("tokens/*.incomplete/[0-9]*.json"))
  process = start()
  while process.poll() is None and len(tasks()) < 3:
    time.sleep(0.001)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  finished = {path.name: path.stat().st_mtime_ns for path in tasks()}
  assert len(finished) >= 3, "the build ended before it was killed"
  again = start()
  output, _ = again.communicate()
  assert again.returncode == 0
  assert output.split()[-1] == whole.fingerprint
  written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("tokens/*/[0-9]*.json")}
  assert len(written) > len(finished)
  assert {name: written[name] for name in finished} == finished, "finished tasks were made again"
