import subprocess
import sys

import jax
import pytest

from tests.conftest import tiny_model
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.kernels import backends
from ultrathink_jax.kernels.attention import Scoring

PLAIN = Scoring(1.0)


def on(monkeypatch, platform):
  """Makes this process look like it had another platform and no optional packages."""

  class Device:
    compute_capability = "9.0"

  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  monkeypatch.setattr(jax, "devices", lambda: [Device()])
  monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize(
  ("platform", "attention", "ssd", "dropless", "dropping"),
  [
    ("cpu", "blockwise", "chunked", "loop", "loop"),
    ("gpu", "cudnn", "pallas", "pallas", "capacity"),
    ("tpu", "pallas", "pallas", "pallas", "capacity"),
  ],
)
def test_auto_follows_the_platform(monkeypatch, platform, attention, ssd, dropless, dropping):
  on(monkeypatch, platform)
  assert backends.resolve_attention("auto", PLAIN, False) == attention
  assert backends.resolve_ssd("auto") == ssd
  assert backends.resolve_experts("auto", None) == dropless
  assert backends.resolve_experts("auto", 1.25) == dropping


def test_every_name_of_the_configuration_is_registered():
  for key, registry in (
    ("attention_backend", backends.ATTENTION),
    ("ssd_backend", backends.SSD),
    ("experts_backend", backends.EXPERTS),
  ):
    for name in registry:
      tiny_model(**{key: name})
    with pytest.raises(ConfigError) as error:
      tiny_model(**{key: "nonsense"})
    named = str(error.value).split(" is not one of ")[1].split(", ")
    assert set(named) == {"auto", *registry}


@pytest.mark.parametrize(
  ("changes", "what"),
  [
    ({"scoring": Scoring(1.0, 50.0)}, "soft_cap=50.0"),
    ({"has_sinks": True}, "sinks"),
    ({"dtype": "float32"}, "float32"),
    ({"head_dim": 20}, "head_dim=20"),
  ],
)
def test_cudnn_refuses_what_it_cannot_do(monkeypatch, changes, what):
  on(monkeypatch, "gpu")
  ours = {"scoring": PLAIN, "has_sinks": False, "dtype": "bfloat16", "head_dim": 64}
  assert backends.resolve_attention("cudnn", *ours.values()) == "cudnn"
  with pytest.raises(ConfigError, match=what):
    backends.resolve_attention("cudnn", *(ours | changes).values())
  assert backends.resolve_attention("auto", *(ours | changes).values()) == "pallas"


def test_cudnn_refuses_other_platforms():
  with pytest.raises(ConfigError, match="this is a cpu; choose"):
    backends.resolve_attention("cudnn", PLAIN, False)


def test_a_missing_capacity_or_package_is_named(monkeypatch):
  on(monkeypatch, "gpu")
  with pytest.raises(ConfigError, match="capacity_factor=0"):
    backends.resolve_experts("capacity", None)
  with pytest.raises(ConfigError, match="pip install tokamax"):
    backends.resolve_experts("tokamax", None)


def test_the_description_names_the_backend_of_each_layer_the_model_has():
  model = tiny_model(layers="MAE", attention_backend="pallas", capacity_factor=1.0, experts_backend="capacity")
  assert backends.describe(model) == {"A": "pallas", "M": "chunked", "E": "capacity"}
  assert backends.describe(tiny_model(layers="LF")) == {"L": "blockwise"}


def test_importing_the_table_imports_no_accelerator_kernel():
  program = "import sys, ultrathink_jax.kernels.backends; print([m for m in sys.modules if 'pallas' in m])"
  out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == "[]"
