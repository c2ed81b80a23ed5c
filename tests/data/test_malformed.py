"""Malformed inputs end a strict run in one line, and are counted and recorded in a lenient one."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.conftest import data_config
from tests.data.malformed import CASES, FILES, GOOD, LARGE, LINES, NUM_GOOD, Case
from ultrathink_jax.data.prepare import prepare
from ultrathink_jax.errors import DataError, UserError

ROOT = Path(__file__).parent.parent.parent
_MAX_CHARS = 200
_MAX_BYTES = 1024**3
_PROGRAM = """
import json, re, sys
from pathlib import Path
from tests.data.conftest import data_config
from ultrathink_jax.data.prepare import prepare
from ultrathink_jax.errors import UserError
out, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
try:
  info = prepare(data_config(**changes), 512, out, [].append).infos[0]
  outcome = {"documents": sum(info.documents.values()), "left_out": sum(info.left_out.values())}
except UserError as error:
  outcome = {"error": str(error), "exit_code": error.exit_code}
peak = re.search("VmHWM:[^0-9]*([0-9]+) kB", Path("/proc/self/status").read_text())
print(json.dumps(outcome | {"peak_bytes": 1024 * int(peak.group(1))}))
"""
pytestmark = pytest.mark.timeout(10)


@pytest.fixture(scope="module")
def model_file(prepared, tmp_path_factory):
  """Returns the path of a tokenizer, so that none is trained for a case."""
  folder = tmp_path_factory.mktemp("tokenizer")
  prepared.tokenizer.save(folder)
  return str(folder / "tokenizer.model")


@pytest.fixture
def outcome(model_file, tmp_path):
  """Returns what a run on a case comes to: the data, or the error and that it is of one line."""

  def run(case, on_error):
    (tmp_path / "in").mkdir()
    try:
      changes = {"tokenizer": model_file, "on_error": on_error, "chat_template": "plain"} | case.make(tmp_path / "in")
      config = data_config(**{"source": ""} | changes)
      return prepare(config, 512, tmp_path / "out", [].append)
    except UserError as error:
      return error

  return run


def require_one_line(error, case, folder):
  line = str(error)
  assert isinstance(error, UserError), "the run does not end"
  assert error.exit_code == case.exit_code, line
  assert case.says in line
  assert line.isprintable(), line
  if case.exit_code == DataError.exit_code:
    assert len(line.replace(str(folder), "")) <= _MAX_CHARS, line
  if case.left_out:  # one entry is bad, not a file
    assert len(line) <= _MAX_CHARS, line


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_strict_run_ends_in_one_line(case, outcome, tmp_path):
  result = outcome(case, "strict")
  if case.says or case.left_out is None:
    require_one_line(result, case, tmp_path)
  else:
    assert sum(result.infos[0].documents.values()) == NUM_GOOD


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_lenient_run_counts_and_records_what_it_leaves_out(case, outcome, tmp_path):
  result = outcome(case, "skip")
  if case.left_out is None:
    assert isinstance(result, UserError)
    assert result.exit_code == case.exit_code
    return
  assert not isinstance(result, UserError), result
  info = result.infos[0]
  assert sum(info.documents.values()) == NUM_GOOD
  assert sum(info.left_out.values()) == case.left_out
  rejects = [
    json.loads(line) for line in next((tmp_path / "out").glob("tokens/*/rejects.jsonl")).read_text().splitlines()
  ]
  assert len(rejects) == case.left_out
  if rejects:
    assert f"{rejects[0]['where']}: {rejects[0]['reason']}".startswith(case.says)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_what_is_large_takes_neither_memory_nor_time(case, model_file, tmp_path):
  changes = {"tokenizer": model_file} | case.make(tmp_path)
  for on_error in ("strict", "skip") if case.left_out else ("strict",):
    arguments = [str(tmp_path / on_error), json.dumps(changes | {"on_error": on_error})]
    result = subprocess.run([sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-1000:]
    outcome = json.loads(result.stdout)
    assert outcome["peak_bytes"] < _MAX_BYTES
    if on_error == "strict":
      assert outcome["exit_code"] == case.exit_code
      assert case.says in outcome["error"]
    else:
      assert (outcome["documents"], outcome["left_out"]) == (NUM_GOOD, case.left_out)


@pytest.mark.parametrize("case", [LINES[1], FILES[6]], ids=lambda case: case.name)
@pytest.mark.timeout(60)  # a program starts
def test_the_program_ends_in_one_line_and_exit_code_3(case, model_file, tmp_path):
  flags = {"tokenizer": model_file, "chat_template": "plain"} | case.make(tmp_path)
  command = [sys.executable, "-m", "ultrathink_jax.main", "--config=configs/nano.py", f"--workdir={tmp_path / 'run'}"]
  command += [f"--config.data.{name}={value}" for name, value in flags.items()]
  result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""})
  assert result.returncode == 3
  assert case.says in result.stderr
  assert "Traceback" not in result.stderr
  assert result.stderr.count("\n") == 1
  assert len(result.stderr.replace(str(tmp_path), "")) <= _MAX_CHARS + len("error: \n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet", "arrayrecord"])
def test_a_file_that_may_not_be_read_ends_a_run_in_one_line(kind, outcome):
  def make(folder):
    (folder / "x").write_text("alpha")
    (folder / "x").chmod(0)
    return {"source": f"{kind}:{folder / 'x'}"}

  assert "Permission denied" in str(outcome(Case(kind, make, ""), "skip"))


@pytest.mark.parametrize("name", ["with space", "🙂", "line\nend", "-x", "a=b", "a,b", "[a]*", "é"])
def test_any_name_of_a_file_will_do(name, outcome, tmp_path):
  write = lambda folder: {"source": f"jsonl:{_written(folder / f'{name}.jsonl')}"}
  data = outcome(Case(name, write, ""), "strict")
  assert sum(data.infos[0].documents.values()) == NUM_GOOD
  bad = dataclasses.replace(data_config(f"jsonl:{_written(tmp_path / f'{name}.jsonl', b'{')}"), tokenizer="bytes")
  with pytest.raises(DataError, match=r"\.jsonl:9: is not JSON") as error:
    prepare(bad, 512, tmp_path / "bad", [].append)
  assert str(error.value).isprintable()


def _written(path, more=b""):
  path.write_bytes(b"\n".join([*GOOD, more]))
  return path
