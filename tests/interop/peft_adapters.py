"""Adapters in tests/fixtures/peft and random ones, and what they compute by a formula in numpy."""

import functools
import json
import math
import re
import shutil
from functools import partial

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.interop.conftest import FIXTURES, load_fixture
from ultrathink_jax.config import ModelConfig
from ultrathink_jax.interop.families.pattern import letters_of
from ultrathink_jax.interop.peft import PeftAdapter, read_adapter
from ultrathink_jax.interop.peft.modules import is_matrix, matrix_dims
from ultrathink_jax.interop.pretrained import named_shapes, unstack
from ultrathink_jax.lora.named import NamedAdapter
from ultrathink_jax.models.language_model import LanguageModel, logits, single_documents

ADAPTERS = FIXTURES / "peft"
NAMES = sorted(path.parent.name for path in ADAPTERS.glob("*/adapter_config.json"))
TOLERANCE = 2e-4  # of logits of size 3: float32 sums in another order


def base_of(name):
  return load_fixture(json.loads((ADAPTERS / name / "adapter_config.json").read_text())["base_model_name_or_path"])


@functools.cache
def read_fixture(name) -> PeftAdapter:
  base = base_of(name)
  return read_adapter(ADAPTERS / name, base.model, base.family)


def merged_kernel(kernel, one: NamedAdapter, is_rslora, is_table):
  """Returns W + scale a b, or DoRA's magnitude (W + scale a b) / ||W + scale a b||, in the shape of the kernel."""
  rank = one.a.shape[-1]
  update = one.alpha / (math.sqrt(rank) if is_rslora else rank) * (one.a.astype(np.float64) @ one.b)
  weight = (kernel.T if is_table else kernel).reshape(update.shape) + update
  if one.magnitude is not None:
    weight *= one.magnitude / np.linalg.norm(weight, axis=-2)
  return (weight.T if is_table else weight).reshape(kernel.shape)


def merge(model: ModelConfig, params, adapter: PeftAdapter):
  """Returns the parameters that compute alone what they compute with the adapter."""
  params = jax.tree.map(lambda leaf: np.array(leaf), params)
  arrays = unstack(model, params)
  for name, array in adapter.trained.items():
    arrays[name][...] = array
  for name, one in adapter.adapters.items():
    arrays[name][...] = merged_kernel(arrays[name], one, adapter.is_rslora, name == "unembedding.kernel")
  return params


@partial(jax.jit, static_argnums=0)
def compute_logits(model: ModelConfig, params, tokens):
  return logits(LanguageModel(model).apply({"params": params}, tokens, single_documents(tokens)))


def random_adapter(
  model, family, names, rank=2, alpha=3.0, has_magnitude=False, is_rslora=False, seed=0
) -> PeftAdapter:
  """Returns an adapter of the matrices whose names match."""
  generator = np.random.default_rng(seed)
  normal = lambda *shape: generator.standard_normal(shape, np.float32)
  shapes = named_shapes(model)
  adapters = {}
  for entry in family.entries(letters_of(model), shapes, is_fused=True).values():
    if not is_matrix(entry):
      continue
    in_dim, out_dims = matrix_dims(entry, shapes)
    for name, out_dim in zip(entry.parts, out_dims, strict=True):
      if re.search(names, name):
        bank = shapes[name].shape[:1] if ".moe." in name and "router" not in name and "shared" not in name else ()
        a, b = normal(*bank, in_dim, rank) / np.float32(math.sqrt(in_dim)), normal(*bank, rank, out_dim) / 2
        adapters[name] = NamedAdapter(a, b, alpha, 0.5 + abs(normal(out_dim)) if has_magnitude else None)
  assert adapters
  return PeftAdapter(adapters, {}, is_rslora, "base", 0.0)


def assert_same(ours: PeftAdapter, expected: PeftAdapter):
  assert ours.adapters.keys() == expected.adapters.keys()
  assert ours._replace(adapters={}, trained={}) == expected._replace(adapters={}, trained={})
  for name, one in expected.adapters.items():
    jax.tree.map(np.testing.assert_array_equal, ours.adapters[name]._asdict(), one._asdict())
  jax.tree.map(np.testing.assert_array_equal, ours.trained, expected.trained)


def written(tmp_path):
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  return config, load_file(tmp_path / "adapter_model.safetensors")


def changed(tmp_path, name, **values):
  """Returns a copy of a fixture with other values in its adapter_config.json."""
  directory = tmp_path / name
  shutil.copytree(ADAPTERS / name, directory, dirs_exist_ok=True)
  path = directory / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | values))
  return directory


def with_tensors(tmp_path, name, edit):
  """Returns a copy of a fixture in which the tensors whose names match are changed, or left out."""
  directory = changed(tmp_path, name)
  path = directory / "adapter_model.safetensors"
  tensors = load_file(path)
  for pattern, change in edit.items():
    for key in [key for key in tensors if re.search(pattern, key)]:
      tensor = tensors.pop(key)
      if change:
        tensors[key] = np.ascontiguousarray(change(tensor))
  save_file(tensors, path)
  return directory
