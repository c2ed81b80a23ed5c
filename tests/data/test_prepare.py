"""Tokenizer and stores are made once, found again, and made anew when what they depend on changes."""

import gzip
import json

import numpy as np
import pytest

from ultrathink_jax.config import DataConfig
from ultrathink_jax.data import open_prepared, prepare, standard_library, token_store
from ultrathink_jax.data.text_files import text_corpus
from ultrathink_jax.errors import ConfigError, DataError


@pytest.fixture
def config(text_folder):
  return DataConfig(f"text:{text_folder}", "auto", 0.1)


def made(messages):
  return [word for message in messages for word in ("trained", "tokenized") if message.startswith(f"data: {word}")]


def test_the_store_holds_the_documents_of_its_split(prepared, config, text_folder):
  documents = text_corpus(str(text_folder), config, 512, text_folder, print).open().validation
  assert len(prepared.validation) == len(documents)
  for i in range(len(documents)):
    assert prepared.tokenizer.decode(prepared.validation[i]) == documents[i].text


def test_the_manifest_counts_what_is_there(prepared, config, text_folder):
  documents = text_corpus(str(text_folder), config, 512, text_folder, print).open().validation
  text = "".join(documents[i].text for i in range(len(documents))).encode()
  info = prepared.validation.info
  assert info.text_bytes == len(text)
  assert info.gzip_bytes == len(gzip.compress(text, 9))
  assert info.tokens == prepared.validation.lengths.sum()


def test_another_process_opens_what_was_prepared_without_the_documents(config, tmp_path):
  first = prepare(config, 512, tmp_path / "a", print)
  second = open_prepared(tmp_path / "a")
  assert second.fingerprint == first.fingerprint
  np.testing.assert_array_equal(second.train[3], first.train[3])
  with pytest.raises(DataError, match="holds no prepared data"):
    open_prepared(tmp_path / "b")


def test_a_second_run_finds_everything_and_a_third_elsewhere_makes_the_same(config, tmp_path, messages):
  first = prepare(config, 512, tmp_path / "a", messages.append)
  assert made(messages) == ["trained", "tokenized", "tokenized"]
  messages.clear()
  assert prepare(config, 512, tmp_path / "a", messages.append).fingerprint == first.fingerprint
  assert made(messages) == []
  assert prepare(config, 512, tmp_path / "b", messages.append).fingerprint == first.fingerprint


def test_another_vocabulary_makes_tokenizer_and_stores_anew(config, tmp_path, messages):
  first = prepare(config, 512, tmp_path, messages.append)
  messages.clear()
  other = prepare(config, 400, tmp_path, messages.append)
  assert made(messages) == ["trained", "tokenized", "tokenized"]
  assert other.tokenizer.vocab_size == 400
  assert other.fingerprint != first.fingerprint


def test_changed_documents_keep_the_tokenizer_and_change_the_stores(tmp_path, messages):
  (tmp_path / "text").mkdir()
  for i in range(10):
    (tmp_path / "text" / f"{i}.txt").write_text(f"some words of document {i} and more of them\n" * 30)
  config = DataConfig(f"text:{tmp_path / 'text'}", "auto", 0.1)
  first = prepare(config, 300, tmp_path / "data", messages.append)
  (tmp_path / "text" / "10.txt").write_text("something new")
  messages.clear()
  second = prepare(config, 300, tmp_path / "data", messages.append)
  assert made(messages) == ["tokenized", "tokenized"]
  assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
  assert second.fingerprint != first.fingerprint


def test_an_interrupted_run_is_finished_by_the_next(config, prepared, tmp_path, messages, monkeypatch):
  write_records = token_store._write_records

  def interrupt(*args, **kwargs):
    write_records(*args, **kwargs)
    raise KeyboardInterrupt

  monkeypatch.setattr(token_store, "_write_records", interrupt)
  with pytest.raises(KeyboardInterrupt):
    prepare(config, 512, tmp_path, messages.append)
  assert not (tmp_path / "train").exists()
  monkeypatch.undo()
  assert prepare(config, 512, tmp_path, messages.append).fingerprint == prepared.fingerprint


def test_a_model_file_of_the_right_size_is_used(config, prepared, tmp_path, messages):
  prepared.tokenizer.save(tmp_path)
  given = DataConfig(config.source, str(tmp_path / "tokenizer.model"), 0.1)
  assert prepare(given, 512, tmp_path / "data", messages.append).fingerprint == prepared.fingerprint


def test_a_vocabulary_may_be_padded_but_not_too_small(config, prepared, tmp_path):
  prepared.tokenizer.save(tmp_path)
  given = DataConfig(config.source, str(tmp_path / "tokenizer.model"), 0.1)
  assert prepare(given, 600, tmp_path / "data", print).fingerprint == prepared.fingerprint
  with pytest.raises(ConfigError, match=r"vocab_size=500 .* set model\.vocab_size to 512 or more"):
    prepare(given, 500, tmp_path / "data", print)


def test_a_missing_model_file_is_a_data_error(config, tmp_path):
  with pytest.raises(DataError, match=r"missing\.model"):
    prepare(DataConfig(config.source, str(tmp_path / "missing.model"), 0.1), 512, tmp_path, print)


@pytest.mark.parametrize(
  ("tokenizer", "hint"), [("sentencepeice", "did you mean 'sentencepiece'"), ("numbers", "auto")]
)
def test_a_tokenizer_that_does_not_fit_is_a_config_error(config, tmp_path, tokenizer, hint):
  with pytest.raises(ConfigError, match=hint):
    prepare(DataConfig(config.source, tokenizer, 0.1), 512, tmp_path, print)


def test_one_character_of_text_is_too_few_documents(tmp_path):
  (tmp_path / "text").write_text("a")
  with pytest.raises(DataError, match="holds 1 documents, too few"):
    prepare(DataConfig(f"text:{tmp_path / 'text'}", "auto", 0.05), 300, tmp_path / "data", print)


def test_no_validation_is_an_empty_store(config, tmp_path, messages):
  data = prepare(DataConfig(config.source, "auto", 0.0), 512, tmp_path, messages.append)
  assert len(data.validation) == data.validation.info.tokens == 0


def test_synthetic_data_needs_no_files(tmp_path, messages, monkeypatch):
  monkeypatch.setattr("ultrathink_jax.data.sources._NUM_SYNTHETIC", 50)
  data = prepare(DataConfig("synthetic", "auto", 0.05), 70_000, tmp_path, messages.append)
  tokens = np.concatenate([data.train[i] for i in range(len(data.train))])
  assert data.train.info.dtype == "<u4"
  assert tokens.min() >= 2
  assert 2**16 < tokens.max() < 70_000


def test_the_standard_library_is_prepared_as_a_data_set(tmp_path, messages, monkeypatch, capfd, text_folder):
  monkeypatch.setattr(standard_library, "_root", lambda: text_folder)
  data = prepare(DataConfig("stdlib", "auto", 0.1), 512, tmp_path, messages.append)
  info = json.loads((tmp_path / "stdlib" / "standard_library" / "1.0.0" / "dataset_info.json").read_text())
  assert info["fileFormat"] == "array_record"
  assert len(data.train) + len(data.validation) == 40
  texts = {path.read_text() for path in text_folder.iterdir()}
  assert {data.tokenizer.decode(data.train[i]) for i in range(len(data.train))} < texts
  assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_real_standard_library_reaches_four_bytes_per_token(tmp_path, messages):
  data = prepare(DataConfig("stdlib", "auto", 0.05), 4096, tmp_path, messages.append)
  assert data.train.info.text_bytes / data.train.info.tokens > 4
  assert data.validation.info.text_bytes / data.validation.info.tokens > 3.9
