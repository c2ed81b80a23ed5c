import math

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.compare import EXPERT_FORMS
from benchmarks.peers import TorchDecoding, TorchTraining, make_model
from benchmarks.shapes import PATTERNS, make_config, with_batch
from ultrathink_jax.models.counts import count_model

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own


@pytest.mark.parametrize("kind", PATTERNS)
def test_the_peer_has_as_many_parameters_as_we_do(kind):
  model = make_config("tiny", kind, "float32").model
  peer = make_model(model, "eager" if kind == "moe" else None)
  assert sum(weight.numel() for weight in peer.parameters()) == count_model(model).total


def test_layers_no_peer_has_are_refused():
  with pytest.raises(ValueError, match="no architecture of the layers"):
    make_model(make_config("ultra3b", "hybrid", "float32").model, None)


@pytest.mark.parametrize("experts", EXPERT_FORMS["train"])
def test_the_peer_trains_with_every_form_of_the_experts(experts):
  run = TorchTraining(with_batch(make_config("tiny", "moe", "float32"), 2, 16), experts, is_compiled=False)
  assert run.first_loss == pytest.approx(math.log(8192), abs=0.3)
  run(3)
  assert run.loss < run.first_loss
  assert run.facts["optimizer"] in ("fused", "foreach")


def test_the_peer_decodes_as_many_tokens_as_asked():
  run = TorchDecoding(with_batch(make_config("tiny", "mamba", "float32"), 2, 16), None, 2, 8, 4, 2)
  assert run.tokens_per_call == 8
