"""Every parameter of a model is of one component."""

import jax
import pytest

from tests.conftest import tiny_model
from ultrathink_jax.models.components import COMPONENTS, component
from ultrathink_jax.models.language_model import init_params
from ultrathink_jax.models.layer import MIXERS


def components(**changes):
  params = jax.eval_shape(lambda: init_params(tiny_model(**changes), jax.random.key(0)))
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return {"/".join(entry.key for entry in path): component(path) for path, _ in leaves}


EVERYTHING = {
  "layers": f"({''.join(MIXERS)})x2{''.join(MIXERS)}",
  "qk_norm": "all",
  "attention_bias": "all",
  "attention_sinks": True,
  "mlp_bias": True,
  "mamba_bias": True,
  "router_bias": True,
  "router": "grouped",
  "expert_groups": "a=2,b=2",
  "shared_expert_dim": 8,
}


def test_every_leaf_of_every_letter_has_a_component_and_every_component_a_leaf():
  assert set(components(**EVERYTHING).values()) == set(COMPONENTS)


def test_a_tied_table_is_an_embedding():
  assert "output" not in components(tie_embeddings=True).values()


@pytest.mark.parametrize(
  ("path", "expected"),
  [
    ("embedding/table", "embedding"),
    ("unembedding/kernel", "output"),
    ("final_norm/scale", "norm"),
    ("group_0/attention_0/mixer/query/kernel", "attention"),
    ("group_0/window_1/mixer/sinks", "attention"),
    ("group_0/attention_0/mixer/query_norm/scale", "norm"),
    ("group_0/mamba_2/mixer/conv_x/kernel", "mamba"),
    ("group_0/mamba_2/mixer/norm/scale", "norm"),
    ("group_0/mlp_3/norm/scale", "norm"),
    ("group_0/mlp_3/mixer/down/bias", "mlp"),
    ("group_0/moe_4/mixer/up/kernel", "experts"),
    ("group_0/moe_4/mixer/shared/up/kernel", "experts"),
    ("group_0/moe_4/mixer/router/kernel", "router"),
    ("group_0/moe_4/mixer/group_router/kernel", "router"),
    ("group_0/moe_4/mixer/router_bias", "router"),
  ],
)
def test_components_by_path(path, expected):
  assert component(path.split("/")) == expected


def test_the_listed_paths_exist():
  paths = components(**EVERYTHING)
  assert any(path.endswith("mixer/query_norm/scale") for path in paths)
  assert any(path.endswith("mixer/group_router/kernel") for path in paths)
  assert any(path.endswith("mixer/shared/up/kernel") for path in paths)
  assert any(path.endswith("mixer/router_bias") for path in paths)


def test_an_unknown_path_is_refused():
  with pytest.raises(ValueError, match="group_0/conv_1/kernel"):
    component(["group_0", "conv_1", "kernel"])
