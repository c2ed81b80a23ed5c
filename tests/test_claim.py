import pytest

from tests.conftest import tiny_config
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.workdir import claim, read_json


@pytest.fixture
def workdir(tmp_path):
  claim(tmp_path / "run", tiny_config(), print)
  return tmp_path / "run"


def rate(workdir):
  return read_json(workdir / "config.json")["optimizer"]["learning_rate"]


FASTER = tiny_config(optimizer={"learning_rate": 0.5})


@pytest.mark.parametrize("directory", ["checkpoints/20", "trials/a"])
def test_a_directory_from_which_something_has_come_is_kept_for_its_own_configuration(workdir, directory):
  before = rate(workdir)
  (workdir / directory).mkdir(parents=True)
  with pytest.raises(ConfigError, match=f"optimizer.learning_rate was {before} and is 0.5.*--force"):
    claim(workdir, FASTER, print)
  assert rate(workdir) == before
  claim(workdir, tiny_config(evaluate={"num_batches": 3}), print)  # says nothing of what is trained
  claim(workdir, FASTER, print, force=True)
  assert rate(workdir) == 0.5


def test_a_directory_of_a_run_that_came_to_nothing_is_free_for_another(workdir, capsys):
  (workdir / "checkpoints").mkdir()
  claim(workdir, FASTER, print)
  assert rate(workdir) == 0.5
  assert capsys.readouterr().out.endswith("-> 0.5\n")


def test_an_imported_model_that_is_not_trained_yet_keeps_its_shape_alone(workdir):
  (workdir / "checkpoints" / "0").mkdir(parents=True)
  claim(workdir, FASTER, print)
  with pytest.raises(ConfigError, match=r"model\.mlp_dim"):
    claim(workdir, tiny_config(model={"mlp_dim": 96}), print)
