"""Advice speaks of what is wrong, rarely, and of nothing that is right."""

import itertools
import math
import random
from types import SimpleNamespace

import pytest

from tests.conftest import tiny_config
from ultrathink_jax.train import advice
from ultrathink_jax.train.advice import Advisor

LOAD = {"layers.1": [0.125] * 8}
EVEN = {"moe/entropy": 0.98, "moe/max_expert": 0.16, "moe/dead": 0, "moe/load": LOAD}


def decaying(step, peak=10.0, floor=2.0):
  """A loss as small models show it."""
  return floor + (peak - floor) * (1 + step / 20) ** -0.5


def rate(step, warmup=100, steps=5000):
  if step <= warmup:
    return 3e-4 * step / warmup
  return 3e-4 * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def values(step, loss, **changes):
  return {
    "loss": loss,
    "learning_rate": rate(step),
    "grad_norm": 1.0,
    "step_seconds": 1.0,
    "data_wait_seconds": 0.01,
    "skipped_steps": 0,
    **EVEN,
    **changes,
  }


def lines(series, last=5000, every=10, **settings):
  """Returns what is said of series(step) -> values."""
  advisor = Advisor(tiny_config(advice=settings).advice)
  said = []
  for step in range(every, last + 1, every):
    said += advisor.after(step, series(step))
  return said


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("every", [1, 10, 50])
def test_nothing_is_said_of_a_healthy_curve(seed, every):
  noise = random.Random(seed)

  def healthy(step):
    loss = decaying(step) * (1 + 0.03 * noise.gauss(0, 1))
    norm = (0.5 + 4 * math.exp(-step / 50)) * math.exp(0.3 * noise.gauss(0, 1))
    return values(step, loss, grad_norm=norm)

  assert lines(healthy, last=min(5000, 1500 * every), every=every) == []


def test_nothing_is_said_of_a_loss_that_stays_where_the_rate_has_fallen():
  assert lines(lambda step: values(step, 2.0 if step > 3000 else decaying(step, floor=0.0) + 1)) == []


def swinging(step):
  return values(step, 3 + 2 * math.sin(step / 30))


def rising(step):
  loss = decaying(step) + max(0.0, 0.05 * (step - 300))
  return {**values(step, loss), "learning_rate": step * 1e-6}


def exploding(step):
  return values(step, decaying(step), grad_norm=30.0 if step == 1000 else 1.0)


SICK = {
  "skipped": (lambda step: values(step, decaying(step), skipped_steps=step // 2000), "1 steps were not applied"),
  "not finite": (lambda step: values(step, math.nan if step > 1000 else decaying(step)), "not finite"),
  "explosion": (exploding, "30 times its median"),
  "warm-up": (rising, "while the learning rate warms up"),
  "oscillation": (swinging, "swings by"),
  "flat": (lambda step: values(step, 4 + 0.02 * math.sin(step)), "steps ago"),
  "collapse": (lambda step: values(step, decaying(step), **{"moe/max_expert": 0.8}), "one expert takes 80%"),
  "dead": (lambda step: values(step, decaying(step), **{"moe/dead": 3}), "3 experts get less than"),
  "saturation": (lambda step: values(step, decaying(step), **{"moe/entropy": 0.1}), "routing is saturated"),
  "data": (lambda step: values(step, decaying(step), data_wait_seconds=0.5), "50% of the time goes into waiting"),
}


def said_of(name, **changes):
  """Returns the lines of one rule about the series that is sick in that way."""
  series, text = SICK[name]
  return [line for line in lines(series, **changes) if text in line]


@pytest.mark.parametrize("name", SICK)
def test_what_is_wrong_is_said_with_what_to_try(name):
  first = said_of(name)[0]
  assert first.startswith("[advice] step=")
  assert any(f"{section}." in first for section in ("optimizer", "model", "train", "loss", "data"))


@pytest.mark.parametrize("name", ["collapse", "dead", "saturation", "data", "explosion", "not finite", "skipped"])
def test_only_what_is_wrong_is_said(name):
  assert len(said_of(name)) == len(lines(SICK[name][0]))


@pytest.mark.parametrize("name", [name for name in SICK if name != "explosion"])
def test_a_lasting_fault_is_named_less_and_less_often(name):
  steps = [int(line.split()[1].removeprefix("step=")) for line in said_of(name)]
  gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
  assert len(steps) <= 4
  assert all(gap >= 500 * 2**place for place, gap in enumerate(gaps))


@pytest.mark.parametrize(
  ("name", "setting"),
  [
    ("explosion", {"explosion_ratio": 0.0}),
    ("oscillation", {"oscillation_ratio": 0.0}),
    ("flat", {"flat_steps": 0}),
    ("collapse", {"collapse_share": 0.0}),
    ("dead", {"collapse_share": 0.0}),
    ("saturation", {"saturation_entropy": 0.0}),
  ],
)
def test_zero_turns_a_rule_off(name, setting):
  assert said_of(name) != []
  assert said_of(name, **setting) == []


def test_thresholds_are_those_of_the_configuration():
  assert said_of("oscillation", oscillation_ratio=0.6) == []
  assert said_of("explosion", explosion_ratio=31.0) == []
  assert said_of("explosion", explosion_ratio=29.0) != []


def test_one_of_two_experts_may_have_most_tokens():
  routing = {"moe/max_expert": 0.7, "moe/load": {"layers.1": [0.7, 0.3]}}
  assert lines(lambda step: values(step, decaying(step), **routing)) == []


def test_a_single_outlier_of_routing_or_waiting_is_no_fault():
  spike = {"moe/max_expert": 0.9, "moe/entropy": 0.1, "moe/dead": 4, "data_wait_seconds": 0.8}
  assert lines(lambda step: values(step, decaying(step), **(spike if step == 1000 else {}))) == []


def test_steps_that_are_made_again_are_judged_again():
  advisor = Advisor(tiny_config().advice)
  said = [line for step in range(10, 1010, 10) for line in advisor.after(step, exploding(step))]
  advisor.rewind(500)
  said += [line for step in range(510, 1010, 10) for line in advisor.after(step, exploding(step))]
  assert said == 2 * lines(exploding)


def test_a_long_run_is_looked_at_in_no_more_time_than_a_short_one():
  advisor = Advisor(tiny_config().advice)
  for step in range(1, 2000):
    advisor.after(step, values(step, decaying(step)))
  assert len(advisor._curve) <= 600


def test_a_full_disk_and_a_full_memory_are_named(tmp_path, monkeypatch):
  monkeypatch.setattr(advice.shutil, "disk_usage", lambda path: SimpleNamespace(used=95 * 2**30, free=5 * 2**30))
  monkeypatch.setattr(advice.psutil, "virtual_memory", lambda: SimpleNamespace(percent=97.0, available=2**30))
  memory, disk = Advisor(tiny_config().advice, tmp_path).after(10, values(10, 3.0))
  assert "97% of the machine's memory is in use, 1.0 GiB are left" in memory
  assert "is 95% full, 5.0 GiB are left" in disk
  assert Advisor(tiny_config().advice).after(10, values(10, 3.0)) == []
