import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import tiny_model
from ultrathink_jax.config import GenerateConfig
from ultrathink_jax.data.tokenizer import BytesTokenizer
from ultrathink_jax.errors import DataError, NumericsError
from ultrathink_jax.evaluate.comparison import Settings, compare
from ultrathink_jax.evaluate.documents import of_texts, read_samples
from ultrathink_jax.evaluate.side_by_side import choose, greedy, markdown
from ultrathink_jax.models.language_model import init_params
from ultrathink_jax.types import Adapted, Adapter

MODEL = tiny_model(layers="AE", vocab_size=258)
BYTES = BytesTokenizer()
SETTINGS = Settings(64, batch_size=4, num_samples=3, sampling=GenerateConfig(8, 0.9, 0, 1.0, 1.0, (), 0), resamples=200)
UNSAMPLED = dataclasses.replace(SETTINGS, num_samples=0)
GENERAL = ["the cat sat on the mat", "two dogs ran far away"]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
  path = tmp_path_factory.mktemp("samples") / "test.jsonl"
  rows = [
    {
      "prompt": "fn one() {\n",
      "completion": "  1\n}\n",
      "meta": {"kind": "complete", "language": "rust", "path": "a.rs"},
    },
    {
      "prompt": "fn two() {\n",
      "completion": "  2\n}\n",
      "meta": {"kind": "complete", "language": "rust", "path": "b.rs"},
    },
    {"prompt": "x = 1\n", "completion": "# one\n", "meta": {"kind": "doc", "language": "python", "path": "c.py"}},
    {"text": "y = 2\n" * 30, "meta": {"kind": "file", "language": "python", "path": "d.py"}},
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return read_samples(path, BYTES)


@pytest.fixture(scope="module")
def base():
  return jax.jit(lambda: init_params(MODEL, jax.random.key(0)))()


@pytest.fixture(scope="module")
def adapted(base):
  """Adapters beside the router, which move it and nothing else that is trained."""
  keys = jax.random.split(jax.random.key(1))
  router = Adapter(jax.random.normal(keys[0], (1, 32, 2)), jax.random.normal(keys[1], (1, 2, 4)), jnp.full((1,), 2.0))
  lora = {"group_0": {"moe_1": {"mixer": {"router": {"adapter": router}}}}}
  return Adapted(base, {}, lora)


@pytest.fixture(scope="module")
def result(base, adapted, samples):
  general = of_texts(GENERAL, BYTES)
  return compare(MODEL, adapted._replace(lora={}), adapted, BYTES, samples, general, SETTINGS)


def test_a_model_compared_with_itself_gains_nothing(base, samples):
  result = compare(MODEL, base, base, BYTES, samples, of_texts(GENERAL, BYTES), UNSAMPLED)
  for pair in (result.adapted, result.general, *result.by_kind.values(), *result.by_language.values()):
    assert pair.base_model == pair.finetuned_model
    assert pair.improvement.nats_per_target == pair.improvement.improved_share == 0
    assert pair.improvement.interval in ((0, 0), None)
  assert [layer.divergence for layer in result.routing] == [0]
  assert result.completed == []


def test_without_its_adapters_an_adapted_model_is_its_base(base, adapted, samples, result):
  alone = compare(MODEL, base, adapted, BYTES, samples, of_texts(GENERAL, BYTES), UNSAMPLED)
  assert alone.adapted.base_model.loss == pytest.approx(result.adapted.base_model.loss, rel=1e-6)
  assert alone.adapted.base_model.loss != alone.adapted.finetuned_model.loss
  assert result.routing[0].divergence > 0


def test_kinds_and_languages_add_up_to_the_whole(result):
  for groups in (result.by_kind, result.by_language):
    for name in ("base_model", "finetuned_model"):
      whole, parts = getattr(result.adapted, name), [getattr(pair, name) for pair in groups.values()]
      assert sum(part.targets for part in parts) == whole.targets
      assert sum(part.loss * part.targets for part in parts) == pytest.approx(whole.loss * whole.targets)
  assert list(result.by_kind) == ["file", "complete", "doc"]
  assert list(result.by_language) == ["python", "rust"]


def test_the_result_is_json_with_the_keys_that_readers_know(result):
  values = json.loads(json.dumps(result.as_json(), allow_nan=False))
  assert list(values)[:3] == ["base_model", "finetuned_model", "improvement"]
  assert values["improvement"].keys() >= {"loss_percent", "perplexity_percent", "interval"}
  gained = values["base_model"]["loss"] - values["finetuned_model"]["loss"]
  assert values["forgetting"]["gained_nats_per_target"] == pytest.approx(gained)
  general = values["forgetting"]
  lost = general["finetuned_model"]["loss"] - general["base_model"]["loss"]
  assert general["lost_nats_per_target"] == pytest.approx(lost)
  assert [sample["name"] for sample in values["samples"]].count("c.py") == 1
  assert values["completions"]["base_model"]["edit_similarity_of"] == 3
  [layer] = values["routing"]
  assert sum(layer["base_model"]["shares"]) == pytest.approx(1)


def test_lines_say_what_a_person_wants_to_know_first(result):
  lines = result.lines()
  assert lines[0].startswith(f"[result] loss {result.adapted.base_model.loss:.4f} -> ")
  assert any(line.startswith("[result] general text: loss ") for line in lines)
  assert any(line.startswith("[result] kind complete: ") for line in lines)
  assert any("layer 1" in line and "bits" in line for line in lines)
  assert any("3 completions: exact match" in line for line in lines)


def test_samples_are_of_every_kind_in_turn_and_the_same_whatever_their_order(samples):
  chosen = choose(samples, 2, BYTES, 64)
  assert {document.kind for document in chosen} == {"complete", "doc"}
  assert choose(samples[::-1], 2, BYTES, 64) == chosen
  assert [document.kind for document in choose(samples, 9, BYTES, 8)] == ["doc"]


def test_markdown_shows_texts_that_hold_fences(result):
  [first, *_] = result.completed
  text = markdown([first._replace(base="```\nnot the end\n````")])
  assert f"`````{first.document.language}\n```\nnot the end\n````\n`````" in text
  assert first.document.task.prompt.strip() in text


def test_completions_are_greedy_whatever_a_run_samples_with():
  sampling = greedy(SETTINGS.sampling, 5)
  assert (sampling.temperature, sampling.max_new_tokens) == (0, 5)


def test_weights_that_are_not_finite_are_no_result(base, samples):
  broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, np.nan), base)
  with pytest.raises(NumericsError, match="fine-tuned model is not finite on 4 of 4 documents"):
    compare(MODEL, base, broken, BYTES, samples, [], SETTINGS)


def test_documents_without_anything_to_predict_are_refused(base, samples):
  nothing = [s._replace(sequence=s.sequence._replace(counts=np.zeros_like(s.sequence.counts))) for s in samples]
  with pytest.raises(DataError, match="none of the 4 documents"):
    compare(MODEL, base, base, BYTES, nothing, [], SETTINGS)
