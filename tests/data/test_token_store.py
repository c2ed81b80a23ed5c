"""Records of tokens come back as they were, and stores put together read as one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultrathink_jax.data.token_store import INDEX, SPLITS, TokenStore, decode, encode, fingerprint, tokens_dtype

_SEQUENCES = st.lists(st.lists(st.tuples(st.lists(st.integers(0, 2**16 - 1), max_size=9), st.booleans())), min_size=1)


@given(_SEQUENCES, st.sampled_from([None, False, True]), st.sampled_from(["<u2", "<u4"]))
def test_a_record_gives_back_its_sequences_and_label(sequences, label, dtype):
  parts = [[(np.array(tokens, dtype), is_learned) for tokens, is_learned in parts] for parts in sequences]
  found, found_label = decode(encode(parts, label, dtype), dtype)
  assert found_label is label
  assert len(found) == len(sequences)
  for example, expected in zip(found, sequences, strict=True):
    assert example.tokens.dtype == np.int32
    assert example.is_learned.dtype == bool
    assert example.tokens.tolist() == [token for tokens, _ in expected for token in tokens]
    assert example.is_learned.tolist() == [is_learned for tokens, is_learned in expected for _ in tokens]


@given(st.lists(st.integers(0, 2**16 - 1)))
def test_a_text_that_is_learned_whole_takes_four_bytes_more_than_its_tokens(tokens):
  assert len(encode([[(np.array(tokens, "<u2"), True)]], None, "<u2")) == 4 + 2 * len(tokens)


def test_numbers_of_32_bits_keep_all_of_them():
  tokens = np.array([2**31 - 1, 0], "<u4")
  assert decode(encode([[(tokens, True)]], None, "<u4"), "<u4")[0][0].tokens.tolist() == [2**31 - 1, 0]


def test_every_token_of_a_vocabulary_fits():
  for vocab_size in (2**16 - 1, 2**16, 2**16 + 1):
    assert np.iinfo(tokens_dtype(vocab_size)).max >= vocab_size - 1
  assert tokens_dtype(2**16) == "<u2"


@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 2**64 - 1), st.just(1)), unique=True))
def test_a_fingerprint_does_not_depend_on_who_wrote_which_document(entries):
  index = np.array(entries, INDEX)
  assert fingerprint(index, "a") == fingerprint(index[::-1], "a")
  assert fingerprint(index, "a") != fingerprint(index, "b")
  if len(index):
    assert fingerprint(index, "a") != fingerprint(index[1:], "a")


def test_a_store_reads_its_documents_from_any_thread(prepared):
  from concurrent.futures import ThreadPoolExecutor

  store = prepared.train[0]
  expected = [store.example(index).tokens.tolist() for index in range(len(store))]
  fresh = TokenStore(*_place(store), SPLITS[0])
  with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda index: fresh.example(index).tokens.tolist(), [*range(len(store))] * 5))
  assert found == expected * 5


def test_a_store_put_together_twice_has_every_document_twice(prepared):
  store = prepared.train[0]
  directories, infos = _place(store)
  both = TokenStore(directories * 2, infos * 2, SPLITS[0])
  assert both.num_tokens == 2 * store.num_tokens
  once, twice = ([s.example(i).tokens.tolist() for i in range(len(s))] for s in (store, both))
  assert sorted(twice) == sorted(once * 2)


@pytest.mark.parametrize("index", [0, -1])
def test_lengths_are_those_of_the_documents(prepared, index):
  store = prepared.train[0]
  assert store.lengths[index] == len(store.example(range(len(store))[index]).tokens)


def _place(store):
  """Returns the arguments that a store of one directory was made with."""
  return [store._files[0].parent], list(store.infos)
