import json
import math

import numpy as np
import pytest

from ultrathink_jax.data.tokenizer import BytesTokenizer
from ultrathink_jax.evaluate.documents import of_texts
from ultrathink_jax.evaluate.scoring import Scores
from ultrathink_jax.evaluate.summaries import by_group, compare_scores, resampled_ratio, summarize


def scores(nats, correct, targets):
  return Scores(np.array(nats, float), np.array(correct), np.array(targets), {})


BASE, TUNED = scores([8, 30, 2], [1, 4, 2], [4, 10, 2]), scores([4, 31, 1], [2, 4, 2], [4, 10, 2])
NUM_BYTES = np.array([10, 40, 6])


def test_a_summary_is_made_of_sums_over_documents():
  summary = summarize(BASE, NUM_BYTES)
  assert summary.loss == 40 / 16
  assert summary.perplexity == pytest.approx(math.exp(2.5))
  assert summary.bits_per_byte == pytest.approx(40 / math.log(2) / 56)
  assert summary.accuracy == 7 / 16
  assert (summary.documents, summary.targets, summary.bytes) == (3, 16, 56)


def test_an_improvement_is_positive_where_the_second_model_is_better():
  pair = compare_scores(BASE, TUNED, NUM_BYTES, 100, 0)
  gain = pair.improvement
  assert gain.nats_per_target == pytest.approx(4 / 16)
  assert gain.loss_percent == pytest.approx(10)
  assert gain.perplexity_percent == pytest.approx(100 * (1 - math.exp(-0.25)))
  assert gain.accuracy_points == pytest.approx(100 / 16)
  assert gain.improved_share == pytest.approx(2 / 3)
  assert gain.interval[0] < gain.nats_per_target < gain.interval[1]


def test_what_json_has_no_number_for_is_null():
  pair = compare_scores(scores([2000, 2000], [0, 0], [2, 2]), scores([2, 2], [0, 0], [2, 2]), np.zeros(2, int), 10, 0)
  values = json.loads(json.dumps(pair.as_json(), allow_nan=False))
  assert values["base_model"]["perplexity"] is None
  assert values["improvement"]["perplexity_percent"] is None
  assert values["base_model"]["loss"] == 1000


def test_groups_are_compared_by_themselves_the_largest_first():
  documents = [
    document._replace(kind=kind)
    for document, kind in zip(of_texts(["ab", "abcdef", "a"], BytesTokenizer()), ("x", "y", "x"), strict=True)
  ]
  compare = lambda chosen: compare_scores(BASE, TUNED, NUM_BYTES, 10, 0, chosen)
  groups = by_group(documents, lambda document: document.kind, compare)
  assert list(groups) == ["y", "x"]
  assert groups["x"].base_model.loss == 10 / 6
  assert groups["y"].improvement.nats_per_target == pytest.approx(-0.1)
  assert groups["y"].improvement.interval is None


def test_the_interval_of_many_documents_is_that_of_the_normal_distribution():
  random = np.random.default_rng(0)
  values = random.normal(0.3, 2, 4000)
  low, high = resampled_ratio(values, np.ones(4000, int), 4000, 0)
  error = values.std() / math.sqrt(4000)
  assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
  assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_of_two_documents_the_interval_is_that_of_the_four_resamples():
  assert resampled_ratio(np.array([1.0, 5.0]), np.array([1, 1]), 2000, 0) == (1, 5)
  assert resampled_ratio(np.array([2.0, 2.0]), np.array([1, 1]), 100, 0) == (2, 2)


def test_documents_count_by_their_targets():
  # Both documents gain the same per target, so that every resample does.
  low, high = resampled_ratio(np.array([1.0, 300.0, 20.0]), np.array([10, 3000, 200]), 500, 0)
  assert low == pytest.approx(0.1)
  assert high == pytest.approx(0.1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
  random = np.random.default_rng(1)
  covered = 0
  for trial in range(300):
    targets = random.integers(10, 200, 60)
    gains = targets * (0.05 + random.normal(0, 0.1, 60))
    low, high = resampled_ratio(gains, targets, 500, trial)
    covered += low <= 0.05 <= high
  assert 0.89 <= covered / 300 <= 0.98


def test_the_interval_is_the_same_on_every_run_and_however_it_is_divided(monkeypatch):
  values, targets = np.random.default_rng(2).normal(size=50), np.ones(50, int)
  whole = resampled_ratio(values, targets, 400, 7)
  assert resampled_ratio(values, targets, 400, 7) == whole
  monkeypatch.setattr("ultrathink_jax.evaluate.summaries._MAX_DRAWS", 50 * 37)
  assert resampled_ratio(values, targets, 400, 7) == whole
  assert resampled_ratio(values, targets, 400, 8) != whole
