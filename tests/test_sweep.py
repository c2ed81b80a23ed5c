import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from tests.conftest import tiny_config
from ultrathink_jax import main
from ultrathink_jax.errors import ConfigError
from ultrathink_jax.interruption import Interruption
from ultrathink_jax.sweep import Request, leaderboard, running, sweep, trial_flags
from ultrathink_jax.sweep.leaderboard import Outcome
from ultrathink_jax.sweep.trials import Trial, make_trials, spell_names

ROOT = Path(__file__).parent.parent
CONFIG = ["--config=configs/nano.py"]
STUB = """
import json, os, signal, sys, time
flags = dict(f.removeprefix("--").partition("=")[::2] for f in sys.argv[1:])
workdir, rate = flags["workdir"], float(flags["config.optimizer.learning_rate"])
with open(f"{workdir}/sessions", "a") as file:
  file.write("begun\\n")
print("training", flush=True)
if rate == 0.5:
  print("error: loss is nan at step 3", file=sys.stderr)
  sys.exit(5)
if rate == 0.25:
  os.kill(os.getpid(), signal.SIGKILL)
if rate == 0.75 and len(open(f"{workdir}/sessions").readlines()) == 1:
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
  sweep = os.getppid()
  while os.getppid() == sweep:
    time.sleep(0.1)
  sys.exit(75)
json.dump({"optimizer": {"learning_rate": rate}}, open(f"{workdir}/config.json", "w"))
json.dump({"result": {"loss": 1 + rate}}, open(f"{workdir}/run.json", "w"))
"""


def make_config(flags):
  """Returns the configuration of nano with these flags, parsed as the command line is."""
  argv = ["main", *CONFIG, *flags]
  return main._parse(argv, *main._define_flags(argv))


@pytest.fixture(scope="module")
def nano():
  sys.path.insert(0, str(ROOT))
  before = os.getcwd()
  os.chdir(ROOT)
  yield make_config([])
  os.chdir(before)


def trials(nano, *axes, **settings):
  return make_trials(Request(axes, **settings), nano, make_config)


def test_a_grid_has_every_combination_under_readable_names(nano):
  found = trials(nano, "optimizer.learning_rate=1e-4,3e-4,1e-3", "model.num_experts=4,8")
  assert len(found) == 6
  assert found[0].name == "learning_rate=1e-4_num_experts=4"
  assert {trial.config.optimizer.learning_rate for trial in found} == {1e-4, 3e-4, 1e-3}
  assert [trial.config.model.num_experts for trial in found] == [4, 8] * 3
  assert {trial.config.train for trial in found} == {nano.train}


def test_values_are_parsed_as_flags_are(nano):
  found = trials(nano, "data.mixture=('a=1','b=2'),('c=1',)", "data.shuffle=True,False", "data.source='stdlib'")
  assert [trial.config.data.mixture for trial in found] == [("a=1", "b=2")] * 2 + [("c=1",)] * 2
  assert [trial.config.data.shuffle for trial in found] == [True, False] * 2
  assert all("/" not in trial.name and " " not in trial.name for trial in found)


def test_a_trial_overrides_what_the_command_line_sets():
  argv = ["main", *CONFIG, "--config.train.steps=5", "--config.train.steps=7"]
  assert main._parse(argv, *main._define_flags(argv)).train.steps == 7


def test_draws_repeat_lie_in_their_ranges_and_more_begin_with_the_same(nano):
  axes = ("optimizer.learning_rate=log:1e-4:1e-2", "train.steps=linear:100:200", "optimizer.schedule=cosine,constant")
  few, more = (trials(nano, *axes, num_random=number, seed=3) for number in (5, 40))
  assert more[:5] == few
  rates = [trial.config.optimizer.learning_rate for trial in more]
  assert all(1e-4 <= rate <= 1e-2 for rate in rates)
  assert 10 <= sum(rate < 1e-3 for rate in rates) <= 30  # half of them, by logarithms
  assert all(isinstance(trial.config.train.steps, int) and 100 <= trial.config.train.steps <= 200 for trial in more)
  assert {trial.config.optimizer.schedule for trial in more} == {"cosine", "constant"}
  assert trials(nano, *axes, num_random=5, seed=4) != few


@pytest.mark.parametrize(
  ("axes", "settings", "message"),
  [
    ((), {}, "mode sweep needs --sweep=KEY=VALUE"),
    (("optimizer.learning_rate",), {}, "is not KEY=VALUE"),
    (("optimizer.learning_rat=1",), {}, "no key 'learning_rat'; did you mean 'learning_rate'"),
    (("optimizer.learning_rate=high",), {}, "learning_rate"),
    (("optimizer.learning_rate=-1.0",), {}, "optimizer.learning_rate=-1.0 is below 0"),
    (("train.steps=1,1",), {}, "there twice"),
    (("train.steps=1,",), {}, "empty"),
    (("train.steps=1", "train.steps=2"), {}, "a second time"),
    (("train.steps=linear:1:9",), {}, "add --sweep_random=N"),
    (("train.steps=linear:1",), {"num_random": 1}, "is not linear:LOW:HIGH"),
    (("optimizer.learning_rate=log:0:1",), {"num_random": 1}, "rises from above 0"),
    (("optimizer.rate=log:1:2",), {"num_random": 1}, "there is no key 'rate'"),
  ],
)
def test_what_is_wrong_is_said_before_the_first_trial(nano, axes, settings, message):
  with pytest.raises(ConfigError, match=message):
    trials(nano, *axes, **settings)


@hypothesis.given(st.lists(st.dictionaries(st.sampled_from(["a.x", "b.x", "c"]), st.text(min_size=1)), min_size=1))
def test_names_are_directories_of_their_own(combinations):
  keys = {key for values in combinations for key in values}
  whole = [{key: values.get(key, "0") for key in sorted(keys)} for values in combinations]
  distinct = [dict(pairs) for pairs in dict.fromkeys(tuple(values.items()) for values in whole)]
  hypothesis.assume(keys)
  names = spell_names(distinct)
  assert len(set(names)) == len(distinct)
  assert all("/" not in name and name not in ("", ".", "..") and len(name) < 120 for name in names)


def test_trials_get_the_flags_of_the_sweep_but_its_own():
  argv = ["--config=a.py", "--mode=sweep", "--sweep=train.steps=1,2", "--sweep", "model.layers=A,M", "--debug"]
  argv += ["--workdir", "runs/x", "--config.train.steps", "5", "--sweep_parallel=2", "-sweep_seed=1"]
  assert trial_flags(argv) == ["--config=a.py", "--debug", "--config.train.steps", "5"]


@pytest.fixture
def start(nano, tmp_path, monkeypatch):
  """Returns rates -> the exit code of a sweep over them, with a stub that learns less by higher ones."""
  stub = tmp_path / "stub.py"
  stub.write_text(STUB)
  monkeypatch.setattr(running, "_PROGRAM", (sys.executable, str(stub)))
  monkeypatch.setattr(running, "prepare", lambda *args: (tmp_path / "sweep" / "data").mkdir(exist_ok=True))

  def run(*rates, **settings):
    request = Request((f"optimizer.learning_rate={','.join(map(str, rates))}",), **settings)
    with Interruption() as interruption:
      return sweep(request, nano, tmp_path / "sweep", CONFIG, make_config, interruption, print)

  run.workdir = tmp_path / "sweep"
  return run


def states(workdir):
  rows = json.loads((workdir / "sweep.json").read_text())["trials"]
  return [(row["values"]["optimizer.learning_rate"], row["state"], row["value"]) for row in rows]


def sessions(workdir, rate):
  return len((workdir / "trials" / f"learning_rate={rate}" / "sessions").read_text().splitlines())


def test_a_sweep_ranks_its_trials_and_a_failed_one_does_not_end_it(start, capsys):
  assert start(0.5, 0.4, 0.25, 0.1) == 0
  assert states(start.workdir) == [
    ("0.1", "finished", 1.1), ("0.4", "finished", 1.4), ("0.5", "failed", None), ("0.25", "failed", None)
  ]  # fmt: skip
  rows = json.loads((start.workdir / "sweep.json").read_text())["trials"]
  assert [(row["exit_code"], row["line"]) for row in rows[2:]] == [
    (5, "error: loss is nan at step 3"), (-9, "ended by SIGKILL")
  ]  # fmt: skip
  table = (start.workdir / "sweep.md").read_text()
  assert "| 1 | 0.1 | 1.1 | finished |" in table
  assert "exit 5: error: loss is nan at step 3" in capsys.readouterr().out
  assert "training" in (start.workdir / "trials" / "learning_rate=0.5" / "console.log").read_text()


def test_a_sweep_goes_on_with_what_has_not_finished(start):
  start(0.1, 0.5)
  start(0.1, 0.5, 0.2)
  assert states(start.workdir) == [("0.1", "finished", 1.1), ("0.2", "finished", 1.2), ("0.5", "failed", None)]
  assert (sessions(start.workdir, 0.1), sessions(start.workdir, 0.5)) == (1, 2)


def test_where_every_trial_fails_so_does_the_sweep(start):
  assert start(0.5) == 5


def test_trials_can_run_at_the_same_time(start):
  assert start(0.1, 0.2, 0.3, num_parallel=3) == 0
  assert len(states(start.workdir)) == 3


def test_a_directory_of_other_values_is_not_taken_for_a_trial(start):
  start(0.1)
  path = start.workdir / "trials" / "learning_rate=0.1" / "config.json"
  path.write_text(json.dumps({"optimizer": {"learning_rate": 0.3}}))
  with pytest.raises(ConfigError, match="holds a trial of other values"):
    start(0.1)


def test_a_workdir_of_another_sweep_is_refused(start, nano):
  start(0.1)
  other = dataclasses.replace(nano, train=dataclasses.replace(nano.train, steps=7))
  request = Request(("optimizer.learning_rate=0.1",))
  with Interruption() as interruption, pytest.raises(ConfigError, match="holds another run"):
    sweep(request, other, start.workdir, CONFIG, make_config, interruption, print)


INTERRUPTED = """
import sys
from tests import test_sweep
from ultrathink_jax.errors import Preempted
from ultrathink_jax.interruption import Interruption
from ultrathink_jax.sweep import Request, running, sweep
from pathlib import Path
workdir, stub = Path(sys.argv[1]), sys.argv[2]
running._PROGRAM = (sys.executable, stub)
running.prepare = lambda *args: (workdir / "data").mkdir(exist_ok=True)
nano = test_sweep.make_config([])
request = Request(("optimizer.learning_rate=0.1,0.75,0.3",))
try:
  with Interruption() as interruption:
    sweep(request, nano, workdir, test_sweep.CONFIG, test_sweep.make_config, interruption, print)
except Preempted as error:
  print(error)
  sys.exit(75)
"""


@pytest.mark.parametrize(
  "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGKILL))]
)
def test_a_signal_stops_the_trial_that_runs_and_the_sweep_is_resumed(start, tmp_path, number):
  process = subprocess.Popen(
    [sys.executable, "-c", INTERRUPTED, start.workdir, tmp_path / "stub.py"],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  begun = start.workdir / "trials" / "learning_rate=0.75" / "sessions"
  deadline = time.monotonic() + 60
  while not begun.exists() and time.monotonic() < deadline:
    time.sleep(0.1)
  time.sleep(0.5)
  process.send_signal(number)
  output, _ = process.communicate(timeout=20)
  if number != signal.SIGKILL:
    assert process.returncode == 75
    assert "1 of 3 trials have finished" in output
    assert states(start.workdir)[1:] == [("0.75", "stopped", None), ("0.3", "stopped", None)]
  assert start(0.1, 0.75, 0.3) == 0
  assert [state for _, state, _ in states(start.workdir)] == ["finished"] * 3
  assert (sessions(start.workdir, 0.1), sessions(start.workdir, 0.75)) == (1, 2)


def test_prepared_data_are_shared_and_a_trial_cannot_change_those_of_others(tmp_path):
  source, target = tmp_path / "data", tmp_path / "trial" / "data"
  (source / "tokens" / "text").mkdir(parents=True)
  (source / "tokens" / "text" / "train.bin").write_bytes(b"tokens")
  (source / "prepared.json").write_text("{}")
  target.parent.mkdir()
  running.share(source, target, print)
  assert (target / "tokens" / "text" / "train.bin").samefile(source / "tokens" / "text" / "train.bin")
  (target / "prepared.json").write_text("changed")
  assert (source / "prepared.json").read_text() == "{}"
  running.share(source, target, print)
  assert (target / "prepared.json").read_text() == "changed"  # what a trial has is its own


def test_the_best_is_what_the_config_says(tmp_path):
  evaluations = [{"step": 1, "evaluate/accuracy": 0.2}, {"step": 2, "evaluate/accuracy": 0.6}]
  (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "moe/dead": 3}\n{"step": 2, "moe/dead": 1}\n')
  (tmp_path / "run.json").write_text('{"result": {"loss": 2.5, "bits_per_byte": 1.5}}')
  value = lambda metric, best_is="lowest": leaderboard.read_value(
    tmp_path, tiny_config(evaluate={"best_metric": metric, "best_is": best_is}).evaluate
  )
  assert value("evaluate/loss") == 2.5
  assert value("evaluate/bits_per_byte") == 1.5
  assert value("evaluate/accuracy", "highest") == 0.6
  assert value("moe/dead") == 1
  assert value("evaluate/nothing") is None


def test_values_that_are_not_finite_rank_last():
  outcomes = [Outcome("finished", 0, "", value) for value in (float("nan"), 2.0, None, 1.0)]
  config = tiny_config(evaluate={"best_is": "highest"}).evaluate
  trials = [Trial(str(number), {}, tiny_config()) for number in range(4)]
  ranks = [outcome.value for _, outcome in leaderboard.ranked(trials, outcomes, config)]
  assert ranks[:2] == [2.0, 1.0]


TINY = """
from configs import base

def get_config():
  config = base.get_config()
  config.model.update(
    layers="F", vocab_size=300, embed_dim=32, dtype="float32", remat="none", num_heads=2, num_kv_heads=1, head_dim=16,
    mlp_dim=48)
  config.data.source = "text:" + TEXT
  config.optimizer.update(warmup_steps=2)
  config.train.update(steps=20, batch_size=8, sequence_length=32)
  config.evaluate.update(every_steps=0, num_batches=2)
  config.generate.max_new_tokens = 4
  return config
"""


@pytest.mark.slow
def test_trials_are_runs_and_the_data_are_prepared_once(tmp_path):
  for number in range(20):
    (tmp_path / f"{number}.txt").write_text(f"The cat {number} sat on a mat and saw two dogs run far away.\n" * 40)
  (tmp_path / "tiny.py").write_text(f"TEXT = {str(tmp_path / '*.txt')!r}\n{TINY}")
  command = [sys.executable, "-m", "ultrathink_jax.main", f"--config={tmp_path / 'tiny.py'}", "--mode=sweep"]
  command += [f"--workdir={tmp_path / 'sweep'}", "--sweep=optimizer.learning_rate=1e-2,1e-4,-1.0"]
  run = lambda: subprocess.run(
    command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"}
  )
  result = run()
  assert result.returncode == 2
  assert result.stderr.startswith("error: optimizer.learning_rate=-1.0 is below 0"), result.stderr
  command[-1] = "--sweep=optimizer.learning_rate=1e-2,1e-4"
  result = run()
  assert result.returncode == 0, result.stderr
  assert [rate for rate, _, _ in states(tmp_path / "sweep")] == ["1e-2", "1e-4"]
  assert result.stdout.count("data: trained a bpe SentencePiece tokenizer") == 1
  for rate in ("1e-2", "1e-4"):
    console = (tmp_path / "sweep" / "trials" / f"learning_rate={rate}" / "console.log").read_text()
    assert "data: found text:" in console
    assert "data: tokenized" not in console
  again = run()
  assert again.returncode == 0
  assert "2 trials in" in again.stdout
  assert "2 finished" in again.stdout
  assert "begins" not in again.stdout
