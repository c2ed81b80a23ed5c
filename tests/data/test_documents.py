"""Splits are decided by the names of the documents alone."""

import pytest

from ultrathink_jax.data.documents import score, split

NAMES = [f"package/module{number}.py" for number in range(200)]


@pytest.mark.parametrize(
  ("name", "expected"), [("os.py", 0.850949), ("asyncio/tasks.py", 0.146486), ("text#3", 0.497726), ("ä.txt", 0.585472)]
)
def test_the_score_of_a_name_never_changes(name, expected):
  assert score(name) == pytest.approx(expected, abs=1e-6)


def test_the_splits_are_disjoint_and_complete():
  train, validation = split(NAMES, 0.1)
  assert sorted(train + validation) == list(range(200))


def test_the_held_out_share_is_near_the_fraction():
  assert 10 <= len(split(NAMES, 0.1)[1]) <= 30


def test_a_document_keeps_its_side_when_others_come_and_go():
  held_out = {NAMES[i] for i in split(NAMES, 0.1)[1]}
  some = NAMES[::2]
  assert {some[i] for i in split(some, 0.1)[1]} == held_out & set(some)


def test_the_splits_do_not_depend_on_the_order_of_the_names():
  backwards = NAMES[::-1]
  assert [[backwards[i] for i in part] for part in split(backwards, 0.1)] == [
    [NAMES[i] for i in part] for part in split(NAMES, 0.1)
  ]


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_two_documents_give_one_to_each_side(fraction):
  train, validation = split(["a", "b"], fraction)
  assert len(train) == len(validation) == 1


def test_no_document_is_held_out_at_fraction_zero():
  assert split(["a", "b"], 0.0)[1] == []
