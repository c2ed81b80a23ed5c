"""What we write, transformers loads and computes the same with."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import tiny_model
from tests.interop.conftest import NAMES, load_fixture
from ultrathink_jax.api import Model
from ultrathink_jax.data.sentence_piece import train_sentencepiece
from ultrathink_jax.interop import huggingface
from ultrathink_jax.models.language_model import LanguageModel, init_params, logits, single_documents

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = {"bos_token_id": 1, "eos_token_id": 2}


def their_logits(directory, tokens):
  import torch

  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
  )
  assert not info["missing_keys"]
  assert not info["unexpected_keys"]
  with torch.no_grad():
    return model.eval()(torch.from_numpy(np.asarray(tokens)).long(), use_cache=False).logits.numpy()


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_checkpoint_computes_what_it_did(name, tmp_path):
  fixture = load_fixture(name)
  huggingface.save(tmp_path, fixture.model, fixture.params, IDS, fixture.family)
  np.testing.assert_allclose(their_logits(tmp_path, fixture.tokens), fixture.logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
  "changes",
  [
    {"layers": "(AF)x2", "mlp_bias": True, "tie_embeddings": True},
    {"layers": "LFAF", "attention_bias": "qkv"},
    {"layers": "AFAE", "qk_norm": "head", "rope": {"scaling": "yarn", "factor": 4.0, "original_tokens": 16}},
    {"layers": "AE", "qk_norm": "all", "qkv_clip": 0.5},
    {"layers": "MM", "mamba_norm_groups": 2, "mamba_dt_max": 0.3},
    {"layers": "MMAFME", "mamba_norm_groups": 2},
    {"layers": "MMAFME", "mamba_norm_groups": 2, "shared_expert_dim": 20, "position": "none"},
    {"layers": "AM", "mamba_norm_groups": 2, "position": "none", "embedding_multiplier": 2.0},
    {"layers": "MFA", "mamba_norm_groups": 2, "position": "none", "mlp_activation": "relu2"},
  ],
  ids=lambda changes: "-".join(map(str, changes)),
)
def test_a_model_of_ours_computes_the_same_there(changes, tmp_path):
  rope = changes.get("rope", {})
  model = tiny_model(**{key: value for key, value in changes.items() if key != "rope"})
  model = dataclasses.replace(model, rope=dataclasses.replace(model.rope, **rope))
  key = jax.random.key(0)
  params = jax.jit(lambda: init_params(model, key))()
  params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(key, leaf.shape), params)
  huggingface.save(tmp_path, model, params, IDS)
  tokens = jax.random.randint(key, (2, 21), 3, model.vocab_size, jnp.int32)
  ours = logits(LanguageModel(model).apply({"params": params}, tokens, single_documents(tokens)))
  np.testing.assert_allclose(their_logits(tmp_path, tokens), ours, rtol=0, atol=2e-4)


def test_the_tokenizer_is_loaded_and_begins_with_bos(tmp_path):
  texts = [f"def f{i}(x):\n    return 'a  b' + {i} * x\n" for i in range(300)]
  tokenizer = train_sentencepiece(texts, 400, tmp_path / "tokenizer")
  model = tiny_model(layers="AF", vocab_size=400)
  params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
  Model(model, params, tokenizer).save_pretrained(tmp_path / "out")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
  for text in [*texts[:5], "  ▁ é😀\t\n"]:
    ids = tokenizer.encode(text)
    assert theirs(text)["input_ids"] == [tokenizer.bos_id, *ids]
    assert theirs.decode(ids) == text
  assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_the_documented_command_writes_the_fixtures_that_are_there(tmp_path):
  """Weights are exact; logits differ by the order in which another build of torch sums."""
  program = (
    "import sys, pathlib; sys.path.insert(0, 'tests/interop'); import make_fixtures; "
    f"make_fixtures.FIXTURES = pathlib.Path({str(tmp_path)!r}); make_fixtures.make('llama')"
  )
  subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
  again, fixture = huggingface.load(tmp_path / "llama"), load_fixture("llama")
  jax.tree.map(np.testing.assert_array_equal, again[1], fixture.params)
