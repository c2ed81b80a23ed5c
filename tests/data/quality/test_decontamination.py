"""A document is contaminated exactly if it shares enough words in a row with an evaluation text."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrathink_jax.data.documents import plain
from ultrathink_jax.data.quality.decontamination import Contamination, read_texts
from ultrathink_jax.errors import DataError

UNHURRIED = settings(deadline=None)  # the machine may be busy

QUESTION = "If a train leaves at noon and travels sixty miles each hour where is it by three o clock that day"
VOCABULARY = ["a", "b", "c"]


def runs(words, size):
  size = min(size, len(words))
  return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)} if words else set()


@UNHURRIED
@given(
  st.lists(st.lists(st.sampled_from(VOCABULARY), max_size=9), max_size=4),
  st.lists(st.sampled_from(VOCABULARY), max_size=12),
  st.integers(1, 6),
)
def test_overlap_equals_that_of_comparing_all_runs_of_words(evaluated, words, size):
  contamination = Contamination(((str(i), " ".join(text)) for i, text in enumerate(evaluated)), size)
  overlapping = [str(i) for i, text in enumerate(evaluated) if runs(text, size) & runs(words, size)]
  found = contamination.matches(plain("name", " ".join(words)))
  assert (found is None) == (not overlapping)
  assert found is None or found in overlapping


@pytest.mark.parametrize(
  ("text", "is_found"),
  [
    (f"Some words before. {QUESTION}? And more after.", True),
    (QUESTION.upper().replace(" ", ",\n"), True),
    (" ".join(QUESTION.split()[:13]), True),
    (" ".join(QUESTION.split()[:12]), False),
    (" ".join([*QUESTION.split()[:12], "today"]), False),
    ("What is two plus two?", True),
    ("Tell me: what is two plus two?", False),
    ("", False),
  ],
)
def test_thirteen_words_in_a_row_are_too_many(text, is_found):
  contamination = Contamination([("exam", QUESTION), ("short", "what is two plus two"), ("empty", "")])
  assert (contamination.matches(plain("name", text)) is not None) == is_found


def test_the_text_that_overlaps_is_named():
  contamination = pickle.loads(
    pickle.dumps(Contamination([("first", "x y z"), ("second", QUESTION), ("third", QUESTION)]))
  )
  assert contamination.matches(plain("name", QUESTION)) == "second"


def test_nothing_overlaps_no_texts():
  assert Contamination([]).matches(plain("name", QUESTION)) is None


def test_every_string_of_a_line_is_a_text(tmp_path):
  (tmp_path / "exam.jsonl").write_text(
    json.dumps({"question": "one", "choices": ["two", {"deep": "three"}], "answer": 4}) + '\n\n"five"\n'
  )
  (tmp_path / "exam.txt").write_text("six\nseven")
  found = list(read_texts([str(tmp_path / "exam.jsonl"), str(tmp_path / "exam.txt")]))
  assert found == [
    ("exam.jsonl:1", "one"),
    ("exam.jsonl:1", "two"),
    ("exam.jsonl:1", "three"),
    ("exam.jsonl:3", "five"),
    ("exam.txt", "six\nseven"),
  ]


@pytest.mark.parametrize(
  ("name", "content", "expected"),
  [
    ("exam.jsonl", b'{"a": 1}\n{"a":\n', "exam.jsonl:2: not JSON"),
    ("exam.jsonl", b"[" * 100_000, "exam.jsonl:1: not JSON"),
    ("exam.txt", b"caf\xe9", "exam.txt: not UTF-8 at byte 3"),
    ("missing.txt", None, "missing.txt: cannot be read: No such file or directory"),
  ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, content, expected):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError) as caught:
    list(read_texts([str(tmp_path / name)]))
  assert expected in str(caught.value)
  assert len(str(caught.value)) < 250
