import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import tiny_config
from ultrathink_jax.diagnosis import diagnose, diagnosing, format_diagnosis, probing
from ultrathink_jax.diagnosis.arithmetic import learning_rates, parameter_groups, step_arithmetic
from ultrathink_jax.diagnosis.findings import failure, findings
from ultrathink_jax.models.counts import count_model
from ultrathink_jax.parallel.devices import Devices
from ultrathink_jax.recipes.pretrain import make_pretrain
from ultrathink_jax.train.plan import make_plan
from ultrathink_jax.train.state import make_init

CONFIG = tiny_config(
  model={"layers": "(F)x2", "embed_dim": 32, "unroll": 1},
  train={"batch_size": 8, "sequence_length": 32, "steps": 1000},
  optimizer={"learning_rate": 1e-2, "warmup_steps": 10},
)
ENDLESS = Devices("cpu", "test device", 8, 2**40)


@pytest.fixture(scope="module")
def plan():
  return make_plan(CONFIG, make_pretrain(CONFIG), ENDLESS)


@pytest.fixture(scope="module")
def found():
  """Returns what is found for CONFIG, where the training data have 25,600 tokens."""
  return diagnose(CONFIG, make_pretrain(CONFIG), lambda line: None, train_tokens=25_600)


def test_a_sound_config_is_found_sound(found):
  assert found["failure"] is None
  assert found["tried_as"] == []
  doubtful = [each for each in found["findings"] if not each["is_ok"]]
  assert [each["name"] for each in doubtful] == ["data"], doubtful  # read ten times over
  assert json.loads(json.dumps(found, allow_nan=False)) == found
  text = format_diagnosis(found)
  assert "  ok       determinism: the same bits again" in text
  assert "  look at  data: 10 epochs of 25,600 tokens\n           try more data" in text
  assert text.endswith("1 to look at")


def test_the_steps_are_those_of_training(found):
  probe = found["probe"]
  assert len(probe["losses"]) == probing.NUM_STEPS
  assert probe["losses"][0] == pytest.approx(math.log(64), abs=0.3)
  assert probe["learning_rate"] == pytest.approx(1e-3)
  total = math.sqrt(sum(leaf["norm"] ** 2 for leaf in probe["leaves"]))
  assert total == pytest.approx(probe["grad_norms"][0], rel=1e-4)


def test_every_parameter_of_every_layer_is_looked_at(found, plan):
  stacked = [leaf.shape[0] if path[0].key == "group_0" else 1 for path, leaf in leaves(plan.shapes.params)]
  assert len(found["probe"]["leaves"]) == sum(stacked)
  assert all(leaf["update_ratio"] > 0 for leaf in found["probe"]["leaves"])
  first = [leaf for leaf in found["probe"]["leaves"] if leaf["name"] == "group_0/mlp_0/mixer/up/kernel[1]"]
  assert [leaf["component"] for leaf in first] == ["mlp"]


def leaves(tree):
  return jax.tree_util.tree_leaves_with_path(tree)


def test_what_is_not_finite_is_named(found, plan):
  config = tiny_config(model={"layers": "(F)x2", "unroll": 1}, train={"sequence_length": 8})
  recipe = make_pretrain(config)

  def broken(params, *rest):
    loss, info = recipe.loss(params, *rest)
    return loss + jnp.sqrt(0 * params["group_0"]["mlp_0"]["mixer"]["up"]["kernel"][1].sum()), info

  state, frozen = jax.jit(make_init(config, recipe, plan.optimizer))()
  batch = probing.synthetic_batch(config, 2)
  leaves = probing.leaf_statistics(recipe._replace(loss=broken), state, frozen, batch)
  changed = found | {"probe": found["probe"] | {"leaves": leaves}}
  line = failure(changed)
  assert line.startswith("gradients of group_0/mlp_0/mixer/up/kernel[1] are not finite on synthetic tokens: try ")
  assert not next(each for each in findings(CONFIG, changed) if each["name"] == "gradient flow")["is_ok"]


@pytest.mark.parametrize("name", ["grad_norms", "losses"])
def test_a_step_that_is_not_finite_is_named(found, name):
  values = [*found["probe"][name][:-1], math.nan]
  assert failure(found | {"probe": found["probe"] | {name: values}}).startswith("step 10 is not finite")
  text = format_diagnosis(found | {"probe": found["probe"] | {name: diagnosing._finite(values)}})
  assert " nan\n" in text


def test_arithmetic_is_that_of_the_batch_and_the_data():
  config = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, warmup_ratio=0.05))
  steps = step_arithmetic(config, 25_600)
  assert steps["tokens_per_step"] == 8 * 32
  assert steps["tokens"] == 256_000
  assert (steps["steps_per_epoch"], steps["epochs"]) == (100, 10)
  assert (steps["warmup_steps"], steps["warmup_share"]) == (50, 0.05)
  assert steps["tokens_per_parameter"] == 256_000 / count_model(config.model).total
  assert (steps["evaluations"], steps["saves"]) == (5, 5)
  assert step_arithmetic(config, None)["epochs"] is None


def test_learning_rates_are_those_of_the_schedule(plan):
  rates = {row["step"]: row["learning_rate"] for row in learning_rates(CONFIG, plan)}
  assert list(rates) == [1, 5, 10, 11, 250, 500, 750, 1000]
  assert rates[1] == pytest.approx(1e-3)
  assert rates[10] == rates[11] == pytest.approx(1e-2)
  assert rates[1000] == pytest.approx(1e-3, rel=1e-3)


def test_groups_cover_every_parameter(plan):
  groups = parameter_groups(CONFIG.optimizer, plan.shapes.params)
  assert sum(sum(counts.values()) for counts in groups.values()) == count_model(CONFIG.model).total
  assert groups["norm"]["decayed"] == groups["embedding"]["decayed"] == 0
  assert groups["mlp"]["not_decayed"] == 0


@pytest.mark.parametrize(("share", "expected"), [(1.1, 0), (0.9, 1), (0.15, 2)])
def test_what_does_not_fit_is_tried_in_a_smaller_shape(share, expected):
  config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, batch_size=64, sequence_length=256))
  recipe = make_pretrain(config)
  plan = make_plan(config, recipe, ENDLESS)
  need = plan.need.total + plan.need.parameters
  tried, changes = diagnosing.shrink(config, recipe, plan, Devices("cpu", "test device", 8, int(share * need / 0.95)))
  assert [change.partition(": ")[2] for change in changes] == [
    "tried with train.batch_size=8", "tried with train.sequence_length=128"
  ][:expected]  # fmt: skip
  assert (tried.train.batch_size, tried.train.sequence_length) == (
    64 if not expected else 8,
    256 if expected < 2 else 128,
  )


def test_what_fits_in_no_shape_is_not_tried(plan):
  tried, changes = diagnosing.shrink(CONFIG, make_pretrain(CONFIG), plan, Devices("cpu", "test device", 8, 1000))
  assert tried is None
  assert "model.layers=F" in changes[0]
  assert changes[-1].startswith("no step was made: the smallest needs ")


def test_any_bit_changes_the_mark_of_an_array():
  rng = np.random.default_rng(0)
  for dtype in ("float32", "bfloat16", "int32", "uint8"):
    array = np.array(jnp.asarray(rng.normal(size=(3, 5, 2)) * 100, dtype))
    mark = int(probing._marks(array))
    for _ in range(20):
      changed = array.copy()
      bits = changed.view(np.uint8).reshape(-1)
      bits[rng.integers(len(bits))] ^= 1 << rng.integers(8)
      assert int(probing._marks(changed)) != mark
  swapped = np.array([1.0, 2.0], np.float32)
  assert int(probing._marks(swapped)) != int(probing._marks(swapped[::-1].copy()))


LOGITS = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0}
CHANGES = {
  "first loss": {"losses": [9.0] * 9 + [8.0]},
  "loss falls": {"losses": [4.1] * 9 + [4.2]},
  "determinism": {"is_deterministic": False},
  "logits": {"logits": {"before": LOGITS | {"std": 0.05}, "after": LOGITS}},
  "experts at start": {"experts": {"moe/entropy": 0.4, "moe/max_expert": 0.9, "moe/dead": 2, "moe/dropped": 0.0}},
  "update to weight": {"learning_rate": 1e-6},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_each_verdict_can_be_bad_and_says_what_to_try(found, name):
  changed = found | {"probe": found["probe"] | CHANGES[name]}
  bad = [each for each in findings(CONFIG, changed) if not each["is_ok"] and each["name"] != "data"]
  assert [each["name"] for each in bad] == [name]
  assert bad[0]["advice"]


@pytest.mark.parametrize(
  ("name", "change"),
  [("gradient flow", {"norm": 0.0, "rms": 0.0}), ("gradient scale", {"rms": 1e6}), ("gradient scale", {"rms": 1e-12})],
)
def test_a_gradient_unlike_the_others_is_named(found, name, change):
  leaves = [leaf | change if leaf["name"] == "embedding/table" else leaf for leaf in found["probe"]["leaves"]]
  bad = next(
    each for each in findings(CONFIG, found | {"probe": found["probe"] | {"leaves": leaves}}) if each["name"] == name
  )
  assert not bad["is_ok"]
  assert "embedding/table" in bad["found"]


def test_gradients_that_vanish_with_depth_are_seen(found):
  stem = "group_0/mlp_0/mixer/up/kernel"
  leaves = [
    leaf | ({"rms": 1e-3 * leaf["rms"]} if leaf["name"] == f"{stem}[0]" else {}) for leaf in found["probe"]["leaves"]
  ]
  bad = [each for each in findings(CONFIG, found | {"probe": found["probe"] | {"leaves": leaves}}) if not each["is_ok"]]
  assert [each["name"] for each in bad] == ["data", "gradient by depth"]
  assert stem in bad[1]["found"]
