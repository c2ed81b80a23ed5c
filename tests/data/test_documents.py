"""Documents are named, and their names decide their splits."""

import pytest

from ultrathink_jax.data.documents import Document, Part, excerpt, plain, score


@pytest.mark.parametrize(
  ("name", "expected"), [("os.py", 0.850949), ("asyncio/tasks.py", 0.146486), ("text#3", 0.497726), ("ä.txt", 0.585472)]
)
def test_the_score_of_a_name_never_changes(name, expected):
  assert score(name) == pytest.approx(expected, abs=1e-6)


def test_scores_are_spread_evenly():
  scores = [score(f"file.jsonl:{line}") for line in range(2000)]
  assert 0 <= min(scores) < 0.01
  assert 0.99 < max(scores) < 1
  assert sum(value < 0.1 for value in scores) == pytest.approx(200, abs=40)


def test_a_name_that_is_not_unicode_has_a_score():
  assert 0 <= score("\udcff") < 1


def test_the_text_of_a_document_is_that_of_its_parts_and_sequences():
  parts = (Part("prompt ", False), Part("answer"))
  assert Document("name", (parts, (Part("other"),))).text == "prompt answer\nother"
  assert plain("name", "text").sequences == ((Part("text", True),),)


@pytest.mark.parametrize("content", ["x" * 1000, b"x" * 1000, b"\xff" * 1000])
def test_an_excerpt_is_short_text(content):
  assert len(excerpt(content)) == 200
