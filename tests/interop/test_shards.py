"""Directories of safetensors."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from ultrathink_jax.errors import CheckpointError
from ultrathink_jax.interop import shards
from ultrathink_jax.interop.shards import find_tensors, read_tensors, write_tensors

VALUES = np.array([[1.0, -2.5], [3.25, 1e-3]], np.float32)


def write(directory, named, limit, monkeypatch):
  monkeypatch.setattr(shards, "MAX_FILE_BYTES", limit)
  write_tensors(directory, {name: array.shape for name, array in named.items()}, named.__getitem__, {"format": "pt"})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_floating_type_is_read_to_float32(tmp_path, dtype):
  array = jnp.asarray(VALUES, dtype)
  safetensors.flax.save_file({"a": array}, tmp_path / "model.safetensors")
  ((name, tensor),) = read_tensors(find_tensors(tmp_path))
  assert (name, tensor.dtype) == ("a", np.float32)
  np.testing.assert_array_equal(tensor, np.asarray(array, np.float32))


def test_integers_are_refused_by_name(tmp_path):
  safetensors.numpy.save_file({"q": np.zeros(3, np.int8)}, tmp_path / "model.safetensors")
  with pytest.raises(CheckpointError, match="q has type I8"):
    find_tensors(tmp_path)


def test_files_are_no_larger_than_the_limit_unless_a_tensor_is(tmp_path, monkeypatch):
  named = {"a": VALUES, "b": VALUES, "c": np.zeros((9, 9), np.float32), "d": VALUES}
  write(tmp_path, named, 32, monkeypatch)
  files = [path for path, *_ in find_tensors(tmp_path).values()]
  assert [path.name[:11] for path in files] == ["model-00001", "model-00001", "model-00002", "model-00003"]
  assert {name: tensor.tolist() for name, tensor in read_tensors(find_tensors(tmp_path))} == {
    name: array.tolist() for name, array in named.items()
  }


def test_a_missing_shard_is_named(tmp_path, monkeypatch):
  write(tmp_path, {"a": VALUES, "b": VALUES}, 16, monkeypatch)
  (tmp_path / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(CheckpointError, match="model-00002-of-00002"):
    find_tensors(tmp_path)


def test_an_empty_directory_is_no_model(tmp_path):
  with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
    find_tensors(tmp_path)
