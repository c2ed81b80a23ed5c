"""The page of a comparison is whole, needs nothing else, and shows what the result holds."""

import copy
import json
import re

import numpy as np
import pytest

from ultrathink_jax.evaluate.code_metrics import score_completion
from ultrathink_jax.evaluate.comparison import Comparison, Settings
from ultrathink_jax.evaluate.documents import HeldOut
from ultrathink_jax.evaluate.routing import LayerShift, utilisation
from ultrathink_jax.evaluate.scoring import Scores
from ultrathink_jax.evaluate.side_by_side import Completed
from ultrathink_jax.evaluate.summaries import compare_scores
from ultrathink_jax.evaluate.tasks import Task
from ultrathink_jax.evaluate.windows import Scored
from ultrathink_jax.report import evaluation

EVIL = "<script>alert(1)</script>\x1b[31m"


def pair(gain):
  nats = np.array([30.0, 50, 20])
  before = Scores(nats, np.array([1, 2, 3]), np.array([10, 20, 10]), {})
  after = before._replace(nats=nats - gain * before.targets, correct=np.array([2, 3, 4]))
  return compare_scores(before, after, np.array([40, 80, 40]), 100, 0)


def layer(number, load, is_collapsed=False):
  return LayerShift(number, 0.125, utilisation(np.ones(4)), utilisation(np.array(load, float)), is_collapsed)


@pytest.fixture(scope="module")
def result():
  task = Task("fn f() {", " 1 }", "fn f() {", "")
  document = HeldOut(f"{EVIL}.rs", Scored(np.zeros(2, np.int32), np.ones(2, bool)), 4, "complete", "rust", task)
  scores = [score_completion(task, text, "rust") for text in (EVIL, " 1 }")]
  comparison = Comparison(
    adapted=pair(0.25),
    by_kind={"complete": pair(0.5), EVIL: pair(0.1)},
    by_language={"rust": pair(0.25), "$x$": pair(-0.2)},
    general=pair(-0.05),
    routing=[layer(1, [3, 1, 1, 1]), layer(3, [97, 1, 1, 1], True)],
    completed=[Completed(document, EVIL, " 1 }", *scores)],
    settings=Settings(64),
  )
  return json.loads(json.dumps(comparison.as_json(), allow_nan=False))


@pytest.fixture(scope="module")
def page(result, tmp_path_factory):
  return evaluation.write(tmp_path_factory.mktemp("page") / "evaluation.html", result, "runs <1>", "AE").read_text()


def test_the_page_needs_nothing_else(page):
  assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
  assert "<script" not in page
  assert "\x1b" not in page


def test_the_page_shows_both_models_and_every_group(page):
  for text in ("2.2500", "2.5000", "+0.2500", "kind complete", "language rust", "general text", "language $x$"):
    assert text in page
  assert page.count("<svg") == 4  # two figures, each for wide and for narrow pages


def test_a_loss_on_general_text_is_told_as_one(page, result):
  assert "+0.0500" in page
  assert "nats per token lost" in page
  assert result["forgetting"]["lost_nats_per_target"] == pytest.approx(0.05)


def test_a_collapse_is_marked(page):
  assert page.count('<td class="alarm">collapsed</td>') == 1
  assert "Collapsed onto one expert: layer 3." in page


def test_completions_stand_beside_what_the_file_says(page):
  assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m" in page
  assert "what the file says" in page
  assert "exact, the file parses" in page
  assert "the file does not parse" in page


def test_a_model_without_experts_general_text_and_completions_has_a_page_too(result, tmp_path):
  plain = copy.deepcopy(result) | {"by_kind": {}, "by_language": {}, "forgetting": None, "routing": []}
  plain |= {"completions": None, "samples": []}
  plain["base_model"]["perplexity"] = plain["improvement"]["interval"] = None
  page = evaluation.write(tmp_path / "evaluation.html", plain, "run").read_text()
  assert page.count("<svg") == 2
  assert "base infinite" in page
  for heading in ("Use of the experts", "Completions", "general text"):
    assert heading not in page
