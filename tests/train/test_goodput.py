"""The account of a run adds up, over kills, resumes and steps made again."""

import itertools
import json

import pytest

from ultrathink_jax.train.goodput import CAUSES, Goodput, format_account, read_account


class Clock:
  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now

  def pass_(self, seconds):
    self.now += seconds


def session(workdir, clock, first, last, every=10, start=3.0, compiling=4.0, step=1.0):
  """Makes steps of a second each, and saves each `every` ones; ends without a word, as a kill does."""
  goodput = Goodput(workdir, clock)
  clock.pass_(start)
  goodput.begin(first)
  with goodput.spent("compile"):
    clock.pass_(compiling)
  for done in range(first + 1, last + 1):
    clock.pass_(step)
    if done % every == 0:
      with goodput.spent("checkpoint"):
        clock.pass_(0.5)
      goodput.mark(done, is_saved=True)
  return goodput


def adds_up(account):
  return account.productive + sum(account.lost.values()) == pytest.approx(account.elapsed)


def test_one_session_is_steps_start_compiling_and_saving(tmp_path):
  account = session(tmp_path, Clock(), 0, 20).account()
  assert (account.elapsed, account.productive) == (28.0, 20.0)
  assert {cause: seconds for cause, seconds in account.lost.items() if seconds} == {
    "start": 3.0,
    "compile": 4.0,
    "checkpoint": 1.0,
  }
  assert account.share == pytest.approx(20 / 28)
  assert account.share_beside_compiling == pytest.approx(20 / 24)


def test_a_kill_loses_the_steps_after_the_last_save_and_the_time_to_the_next_start(tmp_path):
  clock = Clock()
  session(tmp_path, clock, 0, 17)  # saved at 10; the steps to 17 are in no line
  clock.pass_(30)
  account = session(tmp_path, clock, 10, 20).account()
  assert account.productive == 20.0
  assert account.lost["restart"] == 37.0
  assert (account.lost["start"], account.lost["compile"], account.lost["lost_steps"]) == (6.0, 8.0, 0.0)
  assert adds_up(account)


def test_steps_that_were_written_down_and_made_again_are_lost(tmp_path):
  clock = Clock()
  goodput = session(tmp_path, clock, 0, 10)
  for done in range(11, 18):
    clock.pass_(10)
    goodput.mark(done)
  account = session(tmp_path, clock, 10, 20).account()
  assert account.productive == 20.0
  assert account.lost["lost_steps"] == 70.0
  assert adds_up(account)


def test_going_back_within_a_session_loses_the_steps_since(tmp_path):
  clock = Clock()
  goodput = session(tmp_path, clock, 0, 10)
  clock.pass_(8)  # eight steps that nobody wrote down
  goodput.begin(10)
  for done in range(11, 21):
    clock.pass_(1)
    goodput.mark(done)
  account = goodput.account()
  assert account.productive == 20.0
  assert account.lost["lost_steps"] == 8.0
  assert adds_up(account)


def test_a_resume_from_an_older_checkpoint_loses_what_came_after_it(tmp_path):
  clock = Clock()
  session(tmp_path, clock, 0, 30)
  session(tmp_path, clock, 30, 40)
  account = session(tmp_path, clock, 20, 30).account()  # two checkpoints were damaged
  assert account.productive == 30.0
  assert account.lost["lost_steps"] == 20.0
  assert adds_up(account)


def test_a_fresh_start_counts_only_itself(tmp_path):
  clock = Clock()
  session(tmp_path, clock, 0, 9)
  account = session(tmp_path, clock, 0, 20).account()
  assert account.productive == 20.0
  assert adds_up(account)


@pytest.mark.parametrize("cause", CAUSES)
def test_time_by_cause_is_not_that_of_steps(tmp_path, cause):
  clock = Clock()
  goodput = session(tmp_path, clock, 0, 10, compiling=0, start=0)
  clock.pass_(7)
  goodput.add(cause, 5)
  goodput.mark(11)
  account = goodput.account()
  assert account.productive == 12.0
  assert account.lost[cause] == 5.0 + 0.5 * (cause == "checkpoint")
  assert adds_up(account)


def test_an_unknown_cause_is_refused(tmp_path):
  with pytest.raises(ValueError, match="cause='sleep' is not one of"):
    Goodput(tmp_path).add("sleep", 1)


def test_the_file_alone_tells_the_same(tmp_path):
  clock = Clock()
  session(tmp_path, clock, 0, 30)
  clock.pass_(5)
  live = session(tmp_path, clock, 20, 40)
  assert read_account(tmp_path) == live.account()


def test_a_torn_line_and_a_foreign_one_change_nothing(tmp_path):
  clock = Clock()
  session(tmp_path, clock, 0, 20)
  before = read_account(tmp_path)
  path = tmp_path / "sessions.jsonl"
  path.write_bytes(path.read_bytes() + b'{"step": 3}\n{"event": "mark", "time": 99')
  assert read_account(tmp_path) == before
  assert session(tmp_path, clock, 20, 30).account().productive == 30.0
  assert read_account(tmp_path).productive == 30.0


def test_every_prefix_of_the_file_is_an_account_that_adds_up(tmp_path):
  clock = Clock()
  session(tmp_path, clock, 0, 30)
  session(tmp_path, clock, 20, 40).begin(30)
  lines = (tmp_path / "sessions.jsonl").read_bytes().splitlines(keepends=True)
  for count in range(2, len(lines) + 1):
    (tmp_path / "sessions.jsonl").write_bytes(b"".join(lines[:count]))
    account = read_account(tmp_path)
    assert adds_up(account)
    assert 0 <= account.productive <= account.elapsed
    assert min(account.lost.values()) >= 0


def test_lines_that_need_not_be_are_seconds_apart(tmp_path):
  clock = Clock()
  goodput = Goodput(tmp_path, clock)
  goodput.begin(0)
  for step in range(1, 10_001):
    clock.pass_(0.1)
    goodput.mark(step)
  times = [json.loads(line)["time"] for line in (tmp_path / "sessions.jsonl").read_text().splitlines()]
  assert min(later - earlier for earlier, later in itertools.pairwise(times[1:])) >= 5
  assert goodput.account().productive == pytest.approx(1000)


def test_nothing_is_known_of_a_workdir_without_sessions(tmp_path):
  assert read_account(tmp_path) is None


def test_the_account_in_words(tmp_path):
  assert format_account(session(tmp_path, Clock(), 0, 20).account()) == (
    "goodput 71.4% of 28s; lost: compile 4s, start 3s, checkpoint 1s"
  )
