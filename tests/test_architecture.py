"""Imports run downward only, and features are listed in registries only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ultrathink_jax"
FLOORS = {
  "redaction": -2, "errors": -1, "interruption": -1, "watchdog": -1,
  "types": 0, "config": 0, "patterns": 0, "platform": 0, "logs": 0,
  "kernels": 1, "parallel": 1,
  "layers": 2, "workdir": 2, "locking": 2,
  "models": 3,
  "lora": 4, "losses": 4, "optimizers": 4, "data": 4, "testing": 4,
  "train": 5, "generate": 5,
  "recipes": 6, "evaluate": 6, "interop": 6, "report": 6, "plan": 7,
  "api": 7, "diagnosis": 7, "sweep": 8, "modes": 8, "main": 9, "__init__": 10,
}  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
  return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
  names = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names += [f"{node.module}.{alias.name}" for alias in node.names]
  return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path):
  for name in imports(path):
    parts = name.split(".")
    if parts[0] == "ultrathink_jax" and len(parts) > 1 and parts[1] != "__version__":
      same = parts[1] == room(path)
      assert same or FLOORS[parts[1]] < FLOORS[room(path)], f"{path.name} imports {name} from its own floor or above"


def test_linen_is_imported_by_layers_and_models_only():
  users = {room(path) for path in FILES if any(name.startswith("flax.linen") for name in imports(path))}
  assert users <= {"layers", "models"}


def test_nothing_imports_tensorflow_or_pickle():
  forbidden = {"tensorflow", "pickle", "torch"}
  for path in FILES:
    assert not forbidden & {name.split(".")[0] for name in imports(path)}, path


def test_platform_tests_stay_in_parallel_and_kernels():
  for path in FILES:
    if room(path) not in ("parallel", "kernels", "platform"):
      text = path.read_text()
      assert "jax.default_backend" not in text, path
      assert "shard_map(" not in text, path


def test_no_module_keeps_variables_beside_parameters():
  for path in FILES:
    assert ".sow(" not in path.read_text(), path
    assert "self.variable(" not in path.read_text(), path
