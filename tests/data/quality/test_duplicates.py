"""Clusters are the components that verified pairs link, whatever the order of the documents."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ultrathink_jax.data.documents import plain
from ultrathink_jax.data.quality import words as words_module
from ultrathink_jax.data.quality.duplicates import (
  NUM_FUNCTIONS,
  DisjointSets,
  clusters,
  minima,
  rows_per_band,
  signature,
)
from ultrathink_jax.data.quality.words import mix

UNHURRIED = settings(deadline=None)  # the machine may be busy

DIGEST_BYTES = 16


def words(seed, count):
  return [f"w{number}" for number in np.random.default_rng(seed).integers(10**9, size=count)]


def replaced(seed, of, count):
  """`of` with `count` of its words, far from each other, replaced."""
  changed = list(of)
  for i, place in enumerate(range(3, 3 + 10 * count, 10)):
    changed[place] = f"new{seed}x{i}"
  return changed


def jaccard(first, second, num_words=5):
  """The oracle: the share of the shingles of two lists of words that both have."""
  one, two = ({tuple(w[i : i + num_words]) for i in range(len(w) - num_words + 1)} for w in (first, second))
  return len(one & two) / len(one | two)


def sign(texts, similarity=0.8):
  return [signature(plain("", text), similarity) for text in texts]


def components(names, signatures, similarity):
  """The oracle: all pairs compared, components grown one by one, each named by its smallest name."""
  sketches = [np.frombuffer(s[DIGEST_BYTES:], "<u2") for s in signatures]
  rows = rows_per_band(similarity)

  def is_linked(i, j):
    equal = sketches[i] == sketches[j]
    in_band = equal.reshape(-1, rows).all(axis=1).any()
    return signatures[i][:DIGEST_BYTES] == signatures[j][:DIGEST_BYTES] or (in_band and equal.mean() >= similarity)

  found = np.full(len(names), -1)
  for start in sorted(range(len(names)), key=lambda i: names[i]):
    queue = [start] if found[start] < 0 else []
    while queue:
      i = queue.pop()
      found[i] = start
      queue += [j for j in range(len(names)) if found[j] < 0 and is_linked(i, j)]
  return found


def family(seed, similarities_in_replaced_words):
  base = words(seed, 400)
  return [" ".join(replaced(k, base, count)) for k, count in enumerate(similarities_in_replaced_words)]


CORPUS = [
  *itertools.chain.from_iterable(family(seed, [0, 0, 2, 4, 6, 8, 10, 12, 20, 30]) for seed in range(12)),
  *("", "", "...", "!?", "short text", "Short, text!", "another short text", "漢字" * 40, "漢字" * 41),
]  # fmt: skip
NAMES = [f"doc{(i * 7919) % 1000:03d}" for i in range(len(CORPUS))]


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.95])
def test_clusters_equal_those_of_comparing_all_pairs(similarity):
  signatures = sign(CORPUS)
  np.testing.assert_array_equal(
    clusters(NAMES, signatures, similarity), components(NAMES, signatures, similarity)
  )  # fmt: skip


def test_clusters_hold_what_is_similar_and_nothing_else():
  base, other = words(1, 400), words(2, 400)
  near, far = replaced(0, base, 3), replaced(1, base, 25)
  assert jaccard(base, near) > 0.9
  assert jaccard(base, far) < 0.6
  texts = [" ".join(w) for w in (far, near, base, other)]
  assert clusters(["a", "b", "c", "d"], sign(texts)).tolist() == [0, 1, 1, 3]


def test_what_only_bands_have_in_common_is_not_chained():
  """Sketches that agree in three whole bands, and so are candidates, but in fewer functions than the threshold."""
  sketches = np.arange(3 * NUM_FUNCTIONS).reshape(3, NUM_FUNCTIONS).astype("<u2")
  sketches[1, :24] = sketches[0, :24]
  sketches[2, 24:48] = sketches[1, 24:48]
  signatures = [bytes([i]) * DIGEST_BYTES + sketch.tobytes() for i, sketch in enumerate(sketches)]
  assert clusters(["a", "b", "c"], signatures, 0.8).tolist() == [0, 1, 2]


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(60)))
def test_clusters_do_not_depend_on_the_order_of_the_documents(order):
  texts, names = CORPUS[-60:], NAMES[-60:]
  expected = {names[i]: names[j] for i, j in enumerate(clusters(names, sign(texts)))}
  shuffled = [names[i] for i in order]
  found = clusters(shuffled, sign([texts[i] for i in order]))
  assert {shuffled[i]: shuffled[j] for i, j in enumerate(found)} == expected


def test_of_a_cluster_the_smallest_name_is_kept():
  found = clusters(["m", "b", "z", "a"], sign(["same text here"] * 3 + ["other text there"]))
  assert found.tolist() == [1, 1, 1, 3]
  assert (found == np.arange(4)).tolist() == [False, True, False, True]


def test_no_documents_have_no_clusters():
  assert clusters([], []).tolist() == []


@pytest.mark.parametrize(
  ("first", "second", "is_exact", "is_near"),
  [
    ("one  two\n\nthree", " one two three ", True, True),
    ("e\u0301te\u0301 a b c d e", "été a b c d e", True, True),
    ("One two three", "one two three", False, True),
    ("one, two; three", "one two three", False, True),
    ("one two three", "one two four", False, False),
    ("...", "!!!", False, False),
    ("", " \n", True, True),
    ("a b", "ab", False, False),
    ("\ud800 x", "\ud800  x", True, True),
  ],
)
def test_what_is_folded_before_texts_are_compared(first, second, is_exact, is_near):
  assert (clusters(["a", "b"], sign([first, second], 1.0), 1.0)[1] == 0) == is_exact
  assert (clusters(["a", "b"], sign([first, second]))[1] == 0) == is_near


def test_white_space_does_not_count_however_long_the_text(monkeypatch):
  chosen = words(0, 300)
  texts = [separator.join([*chosen, "x" * 100]) for separator in (" ", "\n\n\n", " " * 45)]
  texts += [texts[0] + " ", "\t" + texts[0], texts[0].replace(" ", "", 1)]
  expected = sign(texts, 1.0)
  assert [s == expected[0] for s in expected] == [True] * 5 + [False]
  monkeypatch.setattr(words_module, "_PIECE_CHARS", 37)
  assert sign(texts, 1.0) == expected


def test_a_signature_is_small_and_survives_pickling():
  long = signature(plain("name", " ".join(words(0, 5000))))
  assert len(long) == len(signature(plain("name", ""))) == 272
  assert len(signature(plain("name", "x"), 1.0)) == DIGEST_BYTES
  assert pickle.loads(pickle.dumps(long)) == long


def test_the_estimate_is_the_similarity_within_its_standard_error():
  """Pairs of sets with a known similarity; the mean over 400 pairs has a standard error of sqrt(s(1-s)/128/400)."""
  random = np.random.default_rng(0)
  for size, common in ((50, 40), (200, 160), (2000, 1000), (3000, 2850)):
    similarity = common / (2 * size - common)
    estimates = []
    for _ in range(400 if size < 1000 else 100):
      keys = random.integers(2**64, size=2 * size - common, dtype=np.uint64)
      estimates.append((minima(keys[:size]) == minima(keys[size - common :])).mean())
    error = np.sqrt(similarity * (1 - similarity) / NUM_FUNCTIONS)
    assert abs(np.mean(estimates) - similarity) < 4 * error / np.sqrt(len(estimates))
    assert 0.8 * error < np.std(estimates) < 1.25 * error


@pytest.mark.parametrize("similarity", [0.6, 0.7, 0.75, 0.8, 0.85, 0.9])
def test_pairs_are_found_as_often_as_theory_says(similarity):
  """The chance is that of 128 draws of which 8 in a row, of a band, all agree and 103 in all, by simulation."""
  random = np.random.default_rng(int(100 * similarity))
  num_pairs, threshold = 400, 0.8
  rows = rows_per_band(threshold)
  draws = random.random((20_000, NUM_FUNCTIONS // rows, rows)) < similarity
  expected = (draws.all(axis=2).any(axis=1) & (draws.mean(axis=(1, 2)) >= threshold)).mean()

  common = 400
  alone = round(common * (1 - similarity) / similarity / 2)
  signatures, names = [], []
  for pair in range(num_pairs):
    keys = mix(random.integers(2**64, size=common + 2 * alone, dtype=np.uint64))
    for side, chosen in enumerate((keys[: common + alone], keys[alone:])):
      name = f"{pair:03d}/{side}"
      names.append(name)
      signatures.append(name.encode().ljust(DIGEST_BYTES) + minima(chosen).astype("<u2").tobytes())
  found = clusters(names, signatures, threshold)
  is_found = found[1::2] == np.arange(0, 2 * num_pairs, 2)
  assert set(found[1::2][~is_found]) <= set(range(1, 2 * num_pairs, 2)), "no pair is taken for another"
  error = np.sqrt(max(expected * (1 - expected), 0.002) / num_pairs)
  assert abs(is_found.mean() - expected) < 4 * error


def test_a_band_is_as_long_as_lets_nine_in_ten_pairs_through():
  assert [rows_per_band(s) for s in (0.1, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)] == [1, 2, 4, 8, 8, 16, 16]


def test_many_copies_are_one_cluster_in_little_time():
  texts = ["the same few words again and again"] * 3000 + ["The same, few words: again and again!"] * 3000
  assert set(clusters([f"{i:05d}" for i in range(6000)], sign(texts))) == {0}


@UNHURRIED
@given(st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=4), max_size=12))
def test_disjoint_sets_are_the_components_of_what_was_joined(joined):
  sets, oracle = DisjointSets(20), {i: {i} for i in range(20)}
  for group in joined:
    sets.join(group)
    union = set().union(*(oracle[i] for i in group))
    oracle |= dict.fromkeys(union, union)
  assert sets.roots().tolist() == [min(oracle[i]) for i in range(20)]
