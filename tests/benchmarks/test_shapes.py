import numpy as np
import pytest

from benchmarks.shapes import PATTERNS, SHAPES, SIZES, make_config, random_tokens
from ultrathink_jax.models.counts import count_model, train_flops_per_token

# Millions of FLOPs per token, counted by hand from the peers' published layer sizes.
MFLOPS = {
  ("tiny", "dense"): 33.0, ("tiny", "moe"): 47.2, ("tiny", "mamba"): 25.3, ("tiny", "hybrid"): 37.9,
  ("small", "dense"): 300.7, ("small", "moe"): 414.1, ("small", "mamba"): 221.0, ("small", "hybrid"): 323.1,
}  # fmt: skip


@pytest.mark.parametrize(("shape", "kind"), MFLOPS)
def test_a_token_costs_what_it_costs_the_peer(shape, kind):
  config = make_config(shape, kind, "float32")
  flops = train_flops_per_token(config.model, count_model(config.model), config.train.sequence_length)
  assert flops / 1e6 == pytest.approx(MFLOPS[shape, kind], abs=0.05)


@pytest.mark.parametrize(("shape", "kind", "total", "active"), [
  ("350m", "dense", 353_551_360, 353_551_360),
  ("1.3b", "dense", 1_294_338_048, 1_294_338_048),
  ("1b_active", "moe", 2_622_294_016, 961_349_632),
  ("ultra3b", "hybrid", 3_036_876_032, 1_281_559_808),
])  # fmt: skip
def test_shapes_for_a_gpu_have_the_size_of_their_name(shape, kind, total, active):
  count = count_model(make_config(shape, kind, "bfloat16").model)
  assert (count.total, count.active) == (total, active)


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_dropped_or_recomputed_where_peers_do_not(shape, kind):
  config = make_config(shape, kind, "bfloat16")
  assert config.model.dtype == "bfloat16"
  if shape in SIZES:
    assert config.model.remat == ("none" if shape in ("tiny", "small") else "dots")
    assert config.model.capacity_factor == 0


def test_every_contestant_gets_the_same_tokens_of_the_whole_vocabulary():
  config = make_config("tiny", "dense", "float32")
  tokens = random_tokens(config)
  np.testing.assert_array_equal(tokens, random_tokens(config))
  assert tokens.shape == (8, 256)
  assert 0 <= tokens.min() < 100
  assert 8092 < tokens.max() < 8192
