"""A directory of transformers becomes a run and a run such a directory, by the command line and at a prompt."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import ultrathink_jax
from tests.conftest import tiny_model
from tests.interop.conftest import FIXTURES, load_fixture
from ultrathink_jax import main
from ultrathink_jax.data.sentence_piece import train_sentencepiece
from ultrathink_jax.data.tokenizer import load_tokenizer
from ultrathink_jax.errors import CheckpointError, ConfigError
from ultrathink_jax.models.language_model import init_params
from ultrathink_jax.train.checkpoint import Checkpoints

TEXTS = [f"def f{i}(x):\n    return x * {i}\n" for i in range(300)]


def run(*flags) -> int:
  with pytest.raises(SystemExit) as exit_:
    main.main(["main", *flags])
  return exit_.value.code


@pytest.fixture
def source(tmp_path) -> Path:
  """Returns a checkpoint of transformers with a tokenizer of as many tokens as the model has."""
  from tokenizers import Tokenizer, models, pre_tokenizers

  directory = tmp_path / "source"
  shutil.copytree(FIXTURES / "granitemoehybrid", directory)
  tokenizer = Tokenizer(
    models.WordLevel({word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *map(str, range(61))])})
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.save(str(directory / "tokenizer.json"))
  return directory


def test_an_imported_directory_is_a_run_at_step_0(source, tmp_path, capsys):
  workdir = tmp_path / "run"
  assert run("--mode=import", f"--source={source}", f"--workdir={workdir}") == 0
  assert "MEAEME" in capsys.readouterr().out
  model, fixture = ultrathink_jax.load(workdir), load_fixture("granitemoehybrid")
  assert model.step == 0
  assert model.tokenizer.encode("5 60") == [8, 63]
  jax.tree.map(np.testing.assert_array_equal, model.params, fixture.params)
  np.testing.assert_allclose(model.logits(fixture.tokens), fixture.logits, rtol=0, atol=2e-4)
  config = json.loads((workdir / "config.json").read_text())
  assert load_tokenizer(config["data"]["tokenizer"]).fingerprint == model.tokenizer.fingerprint
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    assert checkpoints.steps() == [0]
  tuples = "--config.data.stages=('100:1',)"  # which JSON has not
  assert run("--mode=describe", f"--config={workdir / 'config.py'}", f"--workdir={tmp_path / 'look'}", tuples) == 0


def test_an_imported_run_is_exported_to_what_it_came_from(source, tmp_path, capsys):
  workdir, output = tmp_path / "run", tmp_path / "output"
  run("--mode=import", f"--source={source}", f"--workdir={workdir}")
  assert run("--mode=export", f"--workdir={workdir}", f"--output={output}") == 0
  assert "GraniteMoeHybridForCausalLM" in capsys.readouterr().out
  for name in ("model.safetensors", "tokenizer.json"):
    assert (output / name).read_bytes() == (source / name).read_bytes()


def test_the_written_configuration_is_the_run_s(source, tmp_path, capsys):
  workdir = tmp_path / "run"
  run(
    "--mode=import", f"--source={source}", f"--workdir={workdir}", "--config=configs/nano.py", "--config.train.seed=7"
  )
  assert run(f"--config={workdir / 'config.py'}", f"--workdir={tmp_path / 'other'}", "--mode=describe") == 0
  assert "MEAEME" in capsys.readouterr().out
  assert json.loads((workdir / "config.json").read_text())["train"]["seed"] == 7


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--mode=import", "--source=x"], "needs --workdir"),
    (["--mode=import", "--workdir=x"], "needs --source"),
    (["--mode=export", "--workdir=x"], "needs --output"),
    (["--mode=evaluate", "--workdir=x"], "--config is missing"),
  ],
)
def test_a_missing_flag_is_named(flags, words, capsys):
  assert run(*flags) == 2
  assert words in capsys.readouterr().err


def test_a_workdir_with_a_run_is_not_overwritten(source, tmp_path, capsys):
  for code in (0, 2):
    assert run("--mode=import", f"--source={source}", f"--workdir={tmp_path / 'run'}") == code
  assert "holds a run already" in capsys.readouterr().err


def test_a_family_that_does_not_fit_is_refused(source, tmp_path, capsys):
  run("--mode=import", f"--source={source}", f"--workdir={tmp_path / 'run'}")
  export = ["--mode=export", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'output'}"]
  assert run(*export, "--family=llama") == 2
  assert "LlamaForCausalLM does not compute this model" in capsys.readouterr().err
  assert run(*export, "--family=lama") == 2
  assert "family='lama' is not one of llama" in capsys.readouterr().err


@pytest.fixture
def make_model(tmp_path):
  tokenizer = train_sentencepiece(TEXTS, 400, tmp_path / "tokenizer")

  def make(**changes):
    model = tiny_model(vocab_size=400, **changes)
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    return ultrathink_jax.Model(model, params, tokenizer)

  return make


def test_a_saved_model_is_one_of_transformers_where_that_is_exact(make_model, tmp_path, capsys):
  model = make_model(layers="MAF", mamba_norm_groups=2)
  model.save_pretrained(tmp_path / "out")
  said = capsys.readouterr().out
  assert "GraniteMoeHybridForCausalLM; layers of zeros make" in said
  again = ultrathink_jax.load(tmp_path / "out")
  tokens = np.arange(24).reshape(2, 12)
  np.testing.assert_allclose(again.logits(tokens), model.logits(tokens), rtol=0, atol=1e-5)
  assert again.tokenizer.fingerprint == model.tokenizer.fingerprint


def test_a_saved_model_is_one_of_ours_where_no_class_is_exact_and_says_why(make_model, tmp_path, capsys):
  model = make_model(layers="AFL", attention_sinks=True)
  with pytest.raises(ConfigError, match="attention_sinks"):
    model.save_pretrained(tmp_path / "out", format="huggingface")
  model.save_pretrained(tmp_path / "out")
  assert "attention_sinks" in capsys.readouterr().out
  assert json.loads((tmp_path / "out" / "config.json").read_text())["format"] == "ultrathink_jax"
  jax.tree.map(np.testing.assert_array_equal, ultrathink_jax.load(tmp_path / "out").params, model.params)


def test_our_own_format_can_be_asked_for(make_model, tmp_path):
  model = make_model(layers="AF")
  model.save_pretrained(tmp_path / "out", format="ultrathink_jax")
  again = ultrathink_jax.load(tmp_path / "out")
  assert again.config == model.config
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
  with pytest.raises(ConfigError, match="format='hf' is not one of auto, huggingface"):
    model.save_pretrained(tmp_path / "out", format="hf")


def test_saving_again_leaves_nothing_of_the_model_before(make_model, tmp_path, monkeypatch):
  monkeypatch.setattr("ultrathink_jax.interop.shards.MAX_FILE_BYTES", 30_000)
  make_model(layers="AFAF").save_pretrained(tmp_path / "out")
  monkeypatch.undo()
  model = make_model(layers="AF")
  model.save_pretrained(tmp_path / "out")
  jax.tree.map(np.testing.assert_array_equal, ultrathink_jax.load(tmp_path / "out").params, model.params)


def test_a_damaged_file_of_ours_is_one_line(make_model, tmp_path):
  make_model(layers="AF").save_pretrained(tmp_path / "out", format="ultrathink_jax")
  path = tmp_path / "out" / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(CheckpointError, match="does not hold a saved model"):
    ultrathink_jax.load(tmp_path / "out")
