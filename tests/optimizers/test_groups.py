import dataclasses
import functools
import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.conftest import tiny_config, tiny_model
from ultrathink_jax.config import from_mapping
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.models.language_model import init_params, parameter_axes
from ultrathink_jax.models.matrices import matrix_dims, path_name
from ultrathink_jax.optimizers.groups import Group, format_groups, groups
from ultrathink_jax.optimizers.optimizers import OPTIMIZERS, make_optimizer

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
CONFIGS = [path.stem for path in FILES if "\ndef get_config" in path.read_text()]
TINY = tiny_model(layers="(MAFE)x2 L", router="sigmoid", router_bias=True, shared_expert_dim=16, attention_bias="all")


@functools.cache
def shapes(model):
  return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def optimizer_config(**changes):
  return dataclasses.replace(tiny_config().optimizer, **changes)


def leaves(params):
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_of_every_config_has_its_group(name):
  config = from_mapping(importlib.import_module(f"configs.{name}").get_config().to_dict())
  params = shapes(config.model)
  found = groups(dataclasses.replace(config.optimizer, name="muon"), params)
  assert found.keys() == leaves(params).keys()
  for path, group in found.items():
    is_matrix = path.endswith("/kernel") and "/conv_" not in path
    assert group.is_decayed == is_matrix, path
    assert group.rule == ("muon" if is_matrix and path.startswith("group_") else "adamw"), path
  assert sum(leaf.size for leaf in leaves(params).values()) == sum(
    int(row.split()[4].replace(",", "")) for row in format_groups(found, params).splitlines()[1:]
  )


@pytest.mark.parametrize("name", ["tiny", "nano", "ultra3b", "mixtral_8x7b"])
def test_matrices_have_the_embedding_on_one_side_and_stacks_of_them_are_of_layers_and_experts(name):
  if name == "tiny":
    model = TINY
  else:
    model = from_mapping(importlib.import_module(f"configs.{name}").get_config().to_dict()).model
  is_axes = lambda leaf: isinstance(leaf, tuple)
  axes = {path_name(p): a for p, a in jax.tree_util.tree_leaves_with_path(parameter_axes(model), is_leaf=is_axes)}
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes(model)):
    dims = matrix_dims(path, leaf)
    if dims is None:
      continue
    names = axes[path_name(path)]
    stack, rows, columns = names[: dims.stack], names[dims.stack :][: dims.rows], names[dims.stack + dims.rows :]
    assert len(columns) == dims.columns
    assert ("embed",) in (rows, columns), (path_name(path), names)
    assert set(stack) <= {"layers", "expert"}, (path_name(path), names)
    assert "layers" not in rows + columns


def test_the_first_pattern_that_matches_sets_the_rate():
  config = optimizer_config(rate_multipliers=("*router*=0.1", "group_0/*=2", "embedding*=0.5"))
  found = groups(config, shapes(TINY))
  assert found["embedding/table"] == Group("adamw", 0.5, False)
  assert found["group_0/moe_3/mixer/router/kernel"] == Group("adamw", 0.1, True)
  assert found["group_0/moe_3/mixer/up/kernel"].rate == 2
  assert found["group_1/window_0/mixer/out/kernel"].rate == 1
  assert found["group_0/moe_3/mixer/router_bias"] == Group("router_bias", 1.0, False)


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    ("*ruoter*=0.1", r"'\*ruoter\*' matches no parameter; paths like it have .*router"),
    ("embeding/table=0.1", "'embeding/table' matches no parameter; paths like it have .*embedding"),
    ("*router*", r"'\*router\*', which is not PATTERN=FACTOR"),
    ("*router*=fast", "is not PATTERN=FACTOR"),
    ("*router*=-1", "is not PATTERN=FACTOR with a factor of 0 or more"),
  ],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_pattern_without_a_parameter_is_refused_before_a_run(name, entry, message):
  config = optimizer_config(name=name, schedule="constant", rate_multipliers=(entry,))
  with pytest.raises(ConfigError, match=message):
    jax.eval_shape(make_optimizer(config, lambda step: 0.1).init, shapes(TINY))


def test_a_rate_multiplies_the_update_decay_included():
  params = {"a": {"kernel": np.ones((2, 3), np.float32)}, "b": {"kernel": np.ones((2, 3), np.float32)}}
  for name in ("adamw", "sgd", "lion"):
    config = optimizer_config(name=name, rate_multipliers=("b/*=0.25",), clip_norm=1e9)
    optimizer = make_optimizer(config, lambda step: 0.1)
    updates, _ = optimizer.update(jax.tree.map(lambda x: 0.3 * x, params), optimizer.init(params), params)
    np.testing.assert_allclose(0.25 * updates["a"]["kernel"], updates["b"]["kernel"], rtol=1e-6)
    assert np.all(np.asarray(updates["b"]["kernel"]) < 0)


def test_the_table_of_groups_reads_as_a_table():
  table = format_groups(groups(optimizer_config(rate_multipliers=("*router/*=0.1",)), shapes(TINY)), shapes(TINY))
  lines = [line.split() for line in table.splitlines()]
  assert lines[0] == ["rule", "rate", "decay", "leaves", "parameters", "as"]
  assert ["adamw", "x0.1", "yes", "1", "256", "group_0/moe_3/mixer/router/kernel"] in lines
  assert ["router_bias", "own", "no", "1", "8", "group_0/moe_3/mixer/router_bias"] in lines
