"""Tokenizers are exact, deterministic and silent about control symbols."""

import itertools

import pytest

from ultrathink_jax.data.tokenizer import NumbersTokenizer, SentencePieceTokenizer, load_tokenizer, train_sentencepiece
from ultrathink_jax.errors import ConfigError, DataError

TEXTS = [f"def f{i}(x):\n    if x > {i}:\n        return x * {i}\n\treturn 'ä'\r\n" for i in range(300)]

NASTY = [
  "",
  " ",
  "   leading, trailing   ",
  "a  b   c\t\td \t e",
  "\n\n\n  \n",
  "line\r\nline\rline\n",
  "\f\v\x00 NUL \x00\x01\x7f",
  "😀 👨\u200d👩\u200d👧 é e\u0301 漢字 ﬁ Å",
  "\u2581 \u2581\u2581x\u2581",
  "</s> <s> <unk> <0x41> <pad>",
  "\ufeffbom \ufffd \u2047 \u00a0 \u2028 \u3000",
  "x" * 5000,
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return train_sentencepiece(TEXTS, 400, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("text", NASTY + TEXTS[:2])
def test_decoding_an_encoded_text_returns_it(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_character_of_the_basic_plane_survives(tokenizer):
  text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_batch_is_encoded_like_its_texts(tokenizer):
  assert tokenizer.encode_batch(NASTY) == [tokenizer.encode(text) for text in NASTY]


def test_no_text_encodes_to_a_control_symbol(tokenizer):
  assert {0, tokenizer.bos_id, tokenizer.eos_id}.isdisjoint(itertools.chain(*tokenizer.encode_batch(NASTY)))


def test_pieces_cross_line_ends_and_indentation(tokenizer):
  assert len(tokenizer.encode(":\n        return x")) <= 4


def test_training_twice_gives_the_same_model(tokenizer, tmp_path):
  assert train_sentencepiece(TEXTS, 400, tmp_path).fingerprint == tokenizer.fingerprint


def test_a_saved_tokenizer_loads_as_it_was(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
  assert load_tokenizer(tmp_path / "tokenizer.model").encode("if x") == tokenizer.encode("if x")


def test_a_vocabulary_larger_than_the_text_names_the_largest_that_works(tmp_path):
  with pytest.raises(ConfigError, match=r"vocab_size=100000 .* at most (\d+)") as caught:
    train_sentencepiece(TEXTS[:3], 100_000, tmp_path)
  largest = int(str(caught.value).split("at most ")[1].split()[0])
  assert train_sentencepiece(TEXTS[:3], largest, tmp_path).vocab_size == largest


def test_a_vocabulary_smaller_than_the_bytes_is_refused(tmp_path):
  with pytest.raises(ConfigError, match=r"vocab_size=100 "):
    train_sentencepiece(TEXTS, 100, tmp_path)


def test_a_small_vocabulary_leaves_rare_characters_to_bytes(tmp_path):
  text = "".join(map(chr, range(0x4E00, 0x4E00 + 500)))
  tokenizer = train_sentencepiece([text, *TEXTS], 330, tmp_path)
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_missing_model_is_a_data_error_with_its_path(tmp_path):
  with pytest.raises(DataError, match=r"missing\.model"):
    load_tokenizer(tmp_path / "missing.model")


def test_a_file_of_another_kind_is_a_data_error(tmp_path):
  (tmp_path / "other.model").write_bytes(b"not a model")
  with pytest.raises(DataError, match=r"other\.model is not a SentencePiece model"):
    SentencePieceTokenizer((tmp_path / "other.model").read_bytes(), "other.model")


def test_numbers_are_their_own_tokens(tmp_path):
  NumbersTokenizer(20).save(tmp_path)
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.encode("17 4 9") == [17, 4, 9]
  assert tokenizer.decode([17, 4, 9]) == "17 4 9"


@pytest.mark.parametrize("text", ["hello", "20", "1", "-3", "4 x"])
def test_numbers_refuse_other_text(text):
  with pytest.raises(DataError, match="numbers from 2 to 19"):
    NumbersTokenizer(20).encode(text)
