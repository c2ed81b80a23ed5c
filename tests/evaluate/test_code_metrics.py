import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrathink_jax.data.code.languages import LANGUAGES
from ultrathink_jax.evaluate.code_metrics import edit_distance, edit_similarity, identifiers, score_completion
from ultrathink_jax.evaluate.tasks import Task

RUST = Task("", "let total = left + width;", "fn area(left: u32) -> u32 {\n    ", "\n    total\n}\n")


def recursive_distance(a, b):
  @functools.cache
  def of(i, j):
    if not i or not j:
      return i + j
    return min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

  return of(len(a), len(b))


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_edit_distance_is_that_of_the_recurrence(a, b):
  assert edit_distance(a, b) == recursive_distance(a, b)


def test_edit_similarity_is_relative_to_the_longer_text():
  assert edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
  assert edit_similarity("", "") == 1
  assert edit_similarity("", "ab") == 0


def test_identifiers_are_neither_keywords_nor_words_in_strings_and_comments():
  task = RUST._replace(after="\n}\n")
  found = identifiers(task, 'let x = Path::new("path of item"); // path\n    x.item(x)', LANGUAGES["rust"])
  assert found == {"x": 3, "Path": 1, "new": 1, "item": 1}
  assert identifiers(RUST._replace(before=RUST.before + "lef"), "t + 1", LANGUAGES["rust"]) == {}


def test_the_reference_itself_is_perfect():
  assert score_completion(RUST, f"{RUST.completion}\n", "rust") == (True, 1, 1, True)


def test_identifier_f1_counts_each_as_often_as_it_occurs():
  scores = score_completion(RUST, "let total = left + left;", "rust")
  assert not scores.exact_match
  assert scores.identifier_f1 == pytest.approx(2 * 2 / (3 + 3))
  assert scores.is_valid


@pytest.mark.parametrize("completion", ["let total = (left;", "}", "let total = = 3;", " \n"])
def test_a_completion_that_breaks_the_file_is_not_valid(completion):
  assert score_completion(RUST, completion, "rust").is_valid is False


def test_what_is_broken_around_a_completion_is_not_its_fault():
  task = RUST._replace(after="\n    total\n}}}\n")
  assert score_completion(task, task.completion, "rust").is_valid is None


def test_without_a_grammar_only_the_texts_are_compared():
  scores = score_completion(RUST, RUST.completion, "toml")
  assert scores == (True, 1, None, None)


def test_endless_repetition_is_scored_and_not_parsed():
  scores = score_completion(RUST, "((((" * 50_000, "rust")
  assert scores.is_valid is False
  assert scores.identifier_f1 == 0
