"""Words and shingles hash alike if and only if they are alike."""

import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrathink_jax.data.quality import words as words_module
from ultrathink_jax.data.quality.words import (
  IDEOGRAPH,
  PUNCTUATION,
  SPACE,
  WORD,
  class_table,
  count,
  look_up,
  shingles,
  word_hashes,
)

UNHURRIED = settings(deadline=None)  # the machine may be busy

WORDS = ["alpha", "beta", "alph", "a", "b", "ab", "ba", "x1", "été", "дом", "über", "ssss", "sss", "zzzzzzzzzzzzzzzzz"]


def split(text):
  """The oracle: words as a regular expression finds them."""
  single = r"[\p{Script=Han}\p{Script=Hiragana}\p{Script=Thai}]"
  return regex.findall(rf"{single}|(?:(?!{single})[\p{{L}}\p{{M}}\p{{N}}])+", text.lower())


@pytest.mark.parametrize(
  "text",
  ["", " ", "...", "one", "One two_three-four", "漢字かな mixed漢w", "ไทย abc", "tail ", "a" * 300, "é e\u0301 1.5"],
)
def test_there_are_as_many_hashes_as_words(text):
  assert len(word_hashes(text)) == len(split(unicodedata.normalize("NFC", text)))


@UNHURRIED
@given(st.lists(st.sampled_from(WORDS), max_size=60), st.sampled_from([" ", ", ", "\n\n", "_", "-"]))
def test_words_hash_alike_exactly_if_they_are_equal(chosen, separator):
  hashes = word_hashes(separator.join(chosen))
  alone = {word: int(word_hashes(word)[0]) for word in WORDS}
  assert len(set(alone.values())) == len(WORDS)
  assert hashes.tolist() == [alone[word] for word in chosen]


def test_case_and_normal_form_do_not_matter():
  np.testing.assert_array_equal(word_hashes("ÉTÉ Maison"), word_hashes("e\u0301te\u0301, maison!"))


def test_a_long_text_is_hashed_as_its_pieces_are(monkeypatch):
  text = " ".join(WORDS[i % len(WORDS)] for i in range(500))
  whole = word_hashes(text)
  word_hashes.cache_clear()
  monkeypatch.setattr(words_module, "_PIECE_CHARS", 37)
  np.testing.assert_array_equal(word_hashes(text), whole)


@UNHURRIED
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 7))
def test_shingles_hash_alike_exactly_if_their_words_are_equal(ids, num_words):
  words = word_hashes(" ".join(WORDS[i] for i in ids))
  size = min(num_words, len(ids))
  expected = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)] if ids else []
  hashes = shingles(words, num_words).tolist()
  assert len(hashes) == len(expected)
  for i, first in enumerate(expected):
    for j, second in enumerate(expected):
      assert (hashes[i] == hashes[j]) == (first == second)


def test_classes_equal_those_of_the_unicode_database():
  text = "aZ9é 漢\n\t.,;+$€_«»\u0301\x00\u200b"
  expected = [WORD] * 4 + [SPACE, IDEOGRAPH, SPACE, SPACE] + [PUNCTUATION] * 9 + [WORD, 0, 0]
  assert look_up(text, class_table()).tolist() == expected
  assert look_up(text[:3], class_table()).tolist() == expected[:3]


@UNHURRIED
@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_ascii_has_the_classes_it_has_among_other_characters(text):
  assert look_up(text, class_table()).tolist() == look_up(text + "é", class_table()).tolist()[:-1]


def test_classes_are_counted_over_all_pieces(monkeypatch):
  text = "one, two; 漢字\n" * 20
  expected = np.bincount(look_up(text, class_table()))
  monkeypatch.setattr(words_module, "_PIECE_CHARS", 37)
  assert count(text, class_table()).tolist() == expected.tolist() == [0, 60, 40, 120, 40]
  assert count("", class_table()).tolist() == [0] * 5


@UNHURRIED
@given(st.text(st.characters(exclude_categories=[])))
def test_any_text_can_be_hashed(text):
  assert len(shingles(word_hashes(text), 5)) <= max(1, len(text) * 3)


def test_hashes_are_the_same_in_other_processes():
  code = "from ultrathink_jax.data.quality.words import word_hashes as w; print(w('one two été').tolist())"
  printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
  assert printed.strip() == str(word_hashes("one two été").tolist())
