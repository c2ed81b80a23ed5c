import multiprocessing
import threading

import pytest

from benchmarks import compare
from benchmarks.compare import OURS, Contestant, Outcome, cases, contestants, page
from benchmarks.environment import write_page


def case(task="train", kind="dense"):
  return cases(compare._parse(["", "--dtypes=float32", f"--what={task}", f"--models={kind}", "--decode_batches=1"]))[0]


def test_the_ratio_is_to_the_best_peer_and_taken_by_round():
  rounds = {
    "torch eager": [(99.0, 10.0), (99.0, 10.0), (99.0, 10.0)],
    "torch compiled": [(30.0, 15.0), (20.0, 20.0), (10.0, 5.0)],
  }
  facts = {name: {"parameters": 5} for name in (OURS, *rounds)}
  outcome = Outcome(rounds, [], facts, {"torch odd": "it has no such form"})
  assert outcome.best_peer == "torch compiled"
  assert outcome.round_ratios == [2, 1, 2]
  text = page({case(): outcome})
  assert "| 20 | 15 | torch compiled | 1.33 | 2.00 (1.00 - 2.00) |" in text
  assert "torch odd does not run: it has no such form" in text
  assert "separate on both sides" in text


def test_a_form_that_stops_is_a_line_of_the_page_and_ours_is_the_end():
  class Runs:
    def __init__(self, answers):
      self.answers = iter(answers)

    def send(self, _):
      pass

    def recv(self):
      return next(self.answers)

  facts, dead = {"parameters": 5}, RuntimeError("killed")
  with pytest.raises(compare._PeerError, match="killed"):
    compare._meet(Runs([1.0]), Runs([dead]), facts, facts, 2, 0.0)
  with pytest.raises(compare._PeerError, match="not the same model"):
    compare._meet(Runs([]), Runs([]), facts, {"parameters": 6}, 2, 0.0)
  with pytest.raises(RuntimeError, match="killed"):
    compare._meet(Runs([dead]), Runs([]), facts, facts, 2, 0.0)
  assert compare._meet(Runs([1.0, 2.0]), Runs([3.0, 4.0]), facts, facts, 2, 0.0) == [(1, 3), (2, 4)]


def test_experts_compete_in_every_form_and_decoding_in_one_more():
  names = lambda *arguments: [contestant.name for contestant in contestants(case(*arguments))]
  assert names() == [OURS, "torch eager", "torch compiled"]
  assert len(names("train", "moe")) == 5
  assert names("decode", "moe") == [OURS] + [f"torch eager, {f} experts" for f in ("eager", "grouped_mm", "batched_mm")]


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--shapes=huge", "'huge' is not one of"),
    ("--dtypes=float16", "'float16' is not one of"),
    ("--models=dense,mamba2", "'mamba2' is not one of"),
    ("--rounds=0", "--rounds=0"),
    ("--nonsense=1", "'nonsense'"),
    ("word", "'word' is not a flag"),
  ],
)
def test_a_flag_that_is_wrong_is_a_line_and_a_code(flag, words, capsys):
  with pytest.raises(SystemExit) as stop:
    compare._parse(["compare", flag])
  assert stop.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ")
  assert words in error
  assert error.endswith("; --help lists the flags\n")
  assert error.count("\n") == 1


def test_flags_multiply_into_cases():
  values = compare._parse(["", "--shapes=tiny,small", "--models=dense,mamba", "--decode_batches=1,8"])
  found = cases(values)
  assert len(found) == 2 * 2 * 2 * (1 + 2)
  assert {c.config.train.batch_size for c in found if c.task == "decode"} == {1, 8}


class _Instant:
  """Runs 10 tokens a call, each of which takes half a second by its own clock."""

  facts, tokens_per_call = {"parameters": 1}, 10

  def __call__(self, calls: int) -> float:
    return calls / 2


def answers(monkeypatch, build):
  """Returns what a worker says first and, after one turn, next."""
  monkeypatch.setattr(compare, "_build", build)
  here, there = multiprocessing.Pipe()
  worker = threading.Thread(target=compare._serve, args=(there, case(), Contestant(OURS, OURS)))
  worker.start()
  first = here.recv()
  speed = None
  if not isinstance(first, Exception):
    here.send(0.0)
    speed = here.recv()
    here.send(None)
  worker.join()
  return first, speed


def test_a_worker_answers_turns_with_tokens_per_second(monkeypatch):
  assert answers(monkeypatch, lambda *_: _Instant()) == ({"parameters": 1}, 20)


def test_a_worker_that_cannot_run_says_why(monkeypatch):
  def build(*_):
    raise ValueError("no such form")

  first, _ = answers(monkeypatch, build)
  assert str(first) == "ValueError: no such form"


def test_a_page_is_named_by_what_where_and_when(tmp_path):
  path = write_page("step tiny", "Intel(R) Xeon(R) Processor, 2 cores", "numbers", tmp_path)
  assert path.name.startswith("step_tiny_intel_xeon_processor_2_cores_2")
  assert path.suffix == ".md"
  assert path.read_text().endswith("numbers\n")
