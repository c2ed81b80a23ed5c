"""Tokenizers are exact, deterministic and silent about control symbols."""

import hashlib
import itertools
import json

import pytest

from ultrathink_jax.data.json_tokenizer import JsonTokenizer
from ultrathink_jax.data.sentence_piece import SentencePieceTokenizer, train_sentencepiece
from ultrathink_jax.data.tokenizer import BytesTokenizer, NumbersTokenizer, load_tokenizer
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


def test_a_unigram_model_is_exact_too(tmp_path):
  unigram = train_sentencepiece(TEXTS, 320, tmp_path, "unigram")
  assert unigram.vocab_size == 320
  for text in NASTY + TEXTS[:2]:
    assert unigram.decode(unigram.encode(text)) == text


def test_a_special_token_is_one_token_wherever_it_is_spelled(tmp_path):
  special = train_sentencepiece(TEXTS, 400, tmp_path, special_tokens=("<fim_middle>", "<|im_end|>"))
  text = "if x<fim_middle>\n<|im_end|>else"
  ids = special.encode(text)
  assert special.decode(ids) == text
  assert sum(special.piece(i) in ("<fim_middle>", "<|im_end|>") for i in ids) == 2


def test_bytes_are_tokens(tmp_path):
  BytesTokenizer().save(tmp_path)
  tokenizer = load_tokenizer(tmp_path)
  for text in NASTY:
    ids = tokenizer.encode(text)
    assert bytes(ids) == text.encode()
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


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


@pytest.fixture
def json_directory(tmp_path):
  """Returns a directory with a byte-level tokenizer.json, as transformers writes it, without special tokens named."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  special = ["<|end|>", "<|begin|>", "<|user|>"]
  trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
  tokenizer.train_from_iterator(TEXTS, trainer)
  directory = tmp_path / "json"
  directory.mkdir()
  tokenizer.save(str(directory / "tokenizer.json"))
  return directory


def write(path, values):
  path.write_text(json.dumps(values))


@pytest.mark.parametrize("text", NASTY)
def test_a_byte_level_json_tokenizer_gives_texts_back(json_directory, text):
  write(json_directory / "tokenizer_config.json", {"eos_token": "<|end|>"})
  tokenizer = load_tokenizer(json_directory)
  assert isinstance(tokenizer, JsonTokenizer)
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert tokenizer.encode_batch([text, "x"]) == [tokenizer.encode(text), tokenizer.encode("x")]


@pytest.mark.parametrize(
  ("files", "bos_id", "eos_id"),
  [
    ({"tokenizer_config.json": {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}}, 1, 0),
    ({"special_tokens_map.json": {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>"}}, 1, 0),
    ({"config.json": {"bos_token_id": 1, "eos_token_id": [0, 2]}}, 1, 0),
    ({"tokenizer_config.json": {"bos_token": None, "eos_token": "<|end|>"}}, 0, 0),
    ({"tokenizer_config.json": {"eos_token": "<|end|>"}, "config.json": {"bos_token_id": 1, "eos_token_id": 2}}, 1, 0),
  ],
)
def test_special_tokens_come_from_the_files_beside_a_json_tokenizer(json_directory, files, bos_id, eos_id):
  for name, values in files.items():
    write(json_directory / name, values)
  tokenizer = load_tokenizer(json_directory)
  assert (tokenizer.bos_id, tokenizer.eos_id) == (bos_id, eos_id)


def test_a_json_tokenizer_is_saved_with_its_files(json_directory, tmp_path):
  write(json_directory / "config.json", {"bos_token_id": 1, "eos_token_id": 0})
  write(json_directory / "tokenizer_config.json", {"chat_template": "{{ x }}", "bos_token": None})
  tokenizer = load_tokenizer(json_directory / "tokenizer.json")
  tokenizer.save(tmp_path / "copy")
  copy = load_tokenizer(tmp_path / "copy")
  assert (copy.bos_id, copy.eos_id, copy.vocab_size) == (1, 0, 400)
  assert copy.fingerprint == hashlib.sha256((json_directory / "tokenizer.json").read_bytes()).hexdigest()
  assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())["chat_template"] == "{{ x }}"


def test_decoding_leaves_out_what_begins_and_ends_a_document(json_directory):
  write(json_directory / "tokenizer_config.json", {"bos_token": "<|begin|>", "eos_token": "<|end|>"})
  tokenizer = load_tokenizer(json_directory)
  assert tokenizer.encode("<|user|>x")[0] == 2
  assert tokenizer.decode([1, *tokenizer.encode("<|user|>x"), 0]) == "<|user|>x"


def test_a_json_tokenizer_without_eos_or_of_another_kind_is_a_data_error(json_directory):
  with pytest.raises(DataError, match="no EOS token"):
    load_tokenizer(json_directory)
  write(json_directory / "tokenizer.json", {"version": "1.0"})
  with pytest.raises(DataError, match="not a file of the tokenizers library"):
    load_tokenizer(json_directory)
