"""Our tokenizers give the same tokens in the files of transformers, or are not written there."""

import json
from pathlib import Path

import pytest

from ultrathink_jax.data.json_tokenizer import JsonTokenizer
from ultrathink_jax.data.sentence_piece import train_sentencepiece
from ultrathink_jax.data.tokenizer import NumbersTokenizer, load_tokenizer
from ultrathink_jax.interop import tokenizer_files
from ultrathink_jax.interop.tokenizer_files import save_for_transformers

SOURCES = [path.read_text() for path in sorted(Path(tokenizer_files.__file__).parent.parent.rglob("*.py"))]
SPECIAL = ("<unk>", "<s>", "</s>")  # spelled in a text, these become special tokens in transformers, and here do not


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return train_sentencepiece(SOURCES[::2], 1500, tmp_path_factory.mktemp("tokenizer"))


def test_a_trained_tokenizer_becomes_a_json_of_the_same_tokens(tokenizer, tmp_path):
  assert save_for_transformers(tmp_path, tokenizer) == ""
  converted = JsonTokenizer(tmp_path / "tokenizer.json")
  assert (converted.bos_id, converted.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
  for text in [*SOURCES, "\u2581 \u2581\u2581x", "  \u00e9\u6f22\U0001f600\t\r\n\0" + " " * 100]:
    for token in SPECIAL:
      text = text.replace(token, "")
    ids = tokenizer.encode(text)
    assert converted.encode(text) == ids
    assert converted.decode(ids) == text


def test_the_model_itself_is_what_we_load_again(tokenizer, tmp_path):
  save_for_transformers(tmp_path, tokenizer)
  assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_a_json_that_would_give_other_tokens_is_not_left_behind(tokenizer, tmp_path, monkeypatch):
  convert = tokenizer_files._as_json

  def without_merges(tokenizer):
    encoder = json.loads(convert(tokenizer))
    encoder["model"]["merges"] = encoder["model"]["merges"][:100]
    return json.dumps(encoder)

  monkeypatch.setattr(tokenizer_files, "_as_json", without_merges)
  assert "other tokens" in save_for_transformers(tmp_path, tokenizer)
  assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_a_tokenizer_of_numbers_is_said_to_have_no_counterpart(tmp_path):
  assert "numbers" in save_for_transformers(tmp_path, NumbersTokenizer(20))
  assert load_tokenizer(tmp_path).vocab_size == 20
