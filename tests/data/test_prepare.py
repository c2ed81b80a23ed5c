"""Tokenizer and stores are made once, found again, and made anew when what they depend on changes."""

import dataclasses
import gzip
import json
import types

import numpy as np
import pytest

from configs.base import get_config
from tests.data.conftest import data_config
from ultrathink_jax.config import QualityConfig, from_mapping
from ultrathink_jax.data import building
from ultrathink_jax.data.documents import score
from ultrathink_jax.data.prepare import open_prepared, prepare, prepare_tokenizer
from ultrathink_jax.data.shard_writer import ShardWriter
from ultrathink_jax.data.sources import standard_library, synthetic
from ultrathink_jax.errors import ConfigError, DataError


@pytest.fixture
def config(text_folder):
  return data_config(f"text:{text_folder}", validation_fraction=0.1)


def made(messages):
  return [word for message in messages for word in ("trained", "tokenized") if message.startswith(f"data: {word}")]


def texts_by_split(folder):
  """Returns the texts of the files of each split, in the order of the scores of their names."""
  paths = sorted(folder.iterdir(), key=lambda path: score(path.name))
  held_out = [path.read_text() for path in paths if score(path.name) < 0.1]
  return [path.read_text() for path in paths if score(path.name) >= 0.1], held_out


def test_the_stores_hold_the_documents_of_their_splits_in_order(prepared, text_folder):
  for store, texts in zip((prepared.train[0], prepared.validation), texts_by_split(text_folder), strict=True):
    assert [prepared.tokenizer.decode(store.example(i).tokens) for i in range(len(store))] == texts


def test_the_manifest_counts_what_is_there(prepared, text_folder):
  text = "".join(texts_by_split(text_folder)[1]).encode()
  info = prepared.infos[0]
  assert info.text_bytes["validation"] == prepared.validation.text_bytes == len(text)
  assert abs(info.gzip_bytes - len(gzip.compress(text, 9))) < 100  # of the same documents in another order
  assert info.tokens["validation"] == prepared.validation.lengths.sum()


def test_another_process_opens_what_was_prepared_without_the_documents(config, tmp_path):
  first = prepare(config, 512, tmp_path / "a", print)
  second = open_prepared(tmp_path / "a")
  assert second.fingerprint == first.fingerprint
  np.testing.assert_array_equal(second.train[0].example(3).tokens, first.train[0].example(3).tokens)
  with pytest.raises(DataError, match="holds no prepared data"):
    open_prepared(tmp_path / "b")


def test_a_second_run_finds_everything_and_a_third_elsewhere_makes_the_same(config, tmp_path, messages):
  first = prepare(config, 512, tmp_path / "a", messages.append)
  assert made(messages) == ["trained", "tokenized"]
  messages.clear()
  assert prepare(config, 512, tmp_path / "a", messages.append).fingerprint == first.fingerprint
  assert made(messages) == []
  assert prepare(config, 512, tmp_path / "b", messages.append).fingerprint == first.fingerprint


def test_another_vocabulary_makes_tokenizer_and_stores_anew(config, tmp_path, messages):
  first = prepare(config, 512, tmp_path, messages.append)
  messages.clear()
  other = prepare(config, 400, tmp_path, messages.append)
  assert made(messages) == ["trained", "tokenized"]
  assert other.tokenizer.vocab_size == 400
  assert other.fingerprint != first.fingerprint


def test_changed_documents_keep_the_tokenizer_and_change_the_stores(tmp_path, messages):
  (tmp_path / "text").mkdir()
  for i in range(10):
    (tmp_path / "text" / f"{i}.txt").write_text(f"some words of document {i} and more of them\n" * 30)
  config = data_config(f"text:{tmp_path / 'text'}", validation_fraction=0.1)
  first = prepare(config, 300, tmp_path / "data", messages.append)
  (tmp_path / "text" / "10.txt").write_text("something new")
  messages.clear()
  second = prepare(config, 300, tmp_path / "data", messages.append)
  assert made(messages) == ["tokenized"]
  assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
  assert second.fingerprint != first.fingerprint


def test_an_interrupted_run_goes_on_with_the_tasks_that_are_left(config, prepared, tmp_path, messages, monkeypatch):
  monkeypatch.setattr(building, "_TASK_BYTES", 20_000)
  finish, finished = ShardWriter.finish, []

  def interrupted(writer):
    if len(finished) == 2:
      raise KeyboardInterrupt
    finished.append(writer)
    return finish(writer)

  monkeypatch.setattr(ShardWriter, "finish", interrupted)
  with pytest.raises(KeyboardInterrupt):
    prepare(config, 512, tmp_path, messages.append)
  assert not (tmp_path / "prepared.json").exists()
  counted = []
  monkeypatch.setattr(ShardWriter, "finish", lambda writer: counted.append(writer) or finish(writer))
  again = prepare(config, 512, tmp_path, messages.append)
  assert again.fingerprint == prepared.fingerprint
  assert len(counted) == again.infos[0].shards - 2


@pytest.mark.parametrize("workers", [1, 2])
def test_neither_shards_nor_processes_show_in_what_is_read(config, prepared, tmp_path, monkeypatch, workers):
  monkeypatch.setattr(building, "_TASK_BYTES", 10_000)
  monkeypatch.setattr("ultrathink_jax.data.prepare._PARALLEL_BYTES", 0)
  many = prepare(dataclasses.replace(config, workers=workers), 512, tmp_path, print)
  assert many.infos[0].shards > 3
  assert many.fingerprint == prepared.fingerprint
  np.testing.assert_array_equal(many.train[0].example(5).tokens, prepared.train[0].example(5).tokens)


def test_of_two_documents_each_split_gets_one(tmp_path, messages):
  (tmp_path / "text").mkdir()
  for name in ("a", "b"):
    (tmp_path / "text" / name).write_text(f"the words of document {name} and more of them\n" * 50)
  for fraction in (0.001, 0.99):
    config = data_config(f"text:{tmp_path / 'text'}", validation_fraction=fraction)
    data = prepare(config, 300, tmp_path / str(fraction), messages.append)
    assert data.infos[0].documents == {"train": 1, "validation": 1}


def test_bad_entries_end_a_strict_run_and_are_counted_otherwise(tmp_path, messages):
  lines = [json.dumps({"text": f"some words of line {i} and more of them " * 20}) for i in range(30)]
  lines[3], lines[7] = "{", json.dumps({"txt": "?"})
  (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
  config = data_config(f"jsonl:{tmp_path / 'x.jsonl'}")
  with pytest.raises(DataError, match=r"x\.jsonl:4: .*data\.on_error=skip"):
    prepare(config, 300, tmp_path / "strict", messages.append)
  data = prepare(dataclasses.replace(config, on_error="skip"), 300, tmp_path / "skip", messages.append)
  info = data.infos[0]
  assert sum(info.documents.values()) == 28
  assert sum(info.left_out.values()) == 2
  rejects = next((tmp_path / "skip" / "tokens").glob("*/rejects.jsonl")).read_text().splitlines()
  assert [json.loads(line)["where"] for line in rejects] == ["x.jsonl:4", "x.jsonl:8"]
  assert any(message.startswith("data: left out entries of jsonl:") for message in messages)
  assert messages[-1].endswith("rejects.jsonl")


def test_documents_are_judged_and_only_one_of_equal_ones_is_kept(tmp_path, messages):
  texts = [f"document {i} says {i} things about {i * i} and nothing else " * 10 for i in range(30)]
  texts += [texts[4], "short", f"{texts[5]} api_key = 'ghp_{'a1B2' * 9}'"]
  (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  quality = QualityConfig(min_chars=20, scrub_secrets=True, duplicate_similarity=1.0)
  data = prepare(data_config(f"jsonl:{tmp_path / 'x.jsonl'}"), 300, tmp_path / "data", messages.append, quality)
  assert data.infos[0].left_out == {"too_short": 1, "duplicate": 1}
  assert sum(data.infos[0].scrubbed.values()) == 1
  stores = (data.train[0], data.validation)
  read = [data.tokenizer.decode(store.example(i).tokens) for store in stores for i in range(len(store))]
  assert sum("<SECRET>" in text for text in read) == 1
  assert not any("ghp_" in text for text in read)
  assert read.count(texts[4]) == 1


def test_a_source_tree_is_a_source(tmp_path, messages):
  tree = tmp_path / "tree"
  tree.mkdir()
  for number in range(12):
    body = "".join(f"  total += {number} * {line}\n" for line in range(20))
    (tree / f"m{number}.py").write_text(f'def f{number}(total):\n  """Adds {number}."""\n{body}  return total\n')
  code = from_mapping(get_config().to_dict()).code
  data = prepare(data_config(f"code:{tree}"), 300, tmp_path / "data", messages.append, code=code)
  read = [data.tokenizer.decode(data.train[0].example(i).tokens) for i in range(len(data.train[0]))]
  assert any("return total" in text and text.startswith("# path: m") for text in read)
  assert not all(data.train[0].example(i).is_learned.all() for i in range(len(read)))  # completions have prompts


def test_only_the_tokenizer_is_made_where_only_it_is_asked_for(config, prepared, tmp_path, messages):
  assert prepare_tokenizer(config, 512, tmp_path, messages.append).fingerprint == prepared.tokenizer.fingerprint
  assert not (tmp_path / "tokens").exists()


def test_sources_of_a_mixture_have_stores_of_their_own_and_one_tokenizer(text_folder, tmp_path, messages):
  other = tmp_path / "other.jsonl"
  other.write_text("".join(json.dumps({"text": f"number {i} of the other source\n" * 9}) + "\n" for i in range(50)))
  config = data_config("", mixture=(f"text:{text_folder}=0.7", f"jsonl:{other}=0.3"))
  data = prepare(config, 512, tmp_path / "data", messages.append)
  assert [len(store) for store in data.train] == [info.documents["train"] for info in data.infos]
  assert len(data.validation) == sum(info.documents["validation"] for info in data.infos)
  texts = {data.tokenizer.decode(data.validation.example(i).tokens)[:6] for i in range(len(data.validation))}
  assert "number" in texts
  assert len(texts) > 1


def test_a_model_file_of_the_right_size_is_used(config, prepared, tmp_path, messages):
  prepared.tokenizer.save(tmp_path)
  given = data_config(config.source, tokenizer=str(tmp_path / "tokenizer.model"))
  assert prepare(given, 512, tmp_path / "data", messages.append).fingerprint == prepared.fingerprint


def test_a_vocabulary_may_be_padded_but_not_too_small(config, prepared, tmp_path):
  prepared.tokenizer.save(tmp_path)
  given = data_config(config.source, tokenizer=str(tmp_path / "tokenizer.model"))
  assert prepare(given, 600, tmp_path / "data", print).fingerprint == prepared.fingerprint
  with pytest.raises(ConfigError, match=r"vocab_size=500 .* set model\.vocab_size to 512 or more"):
    prepare(given, 500, tmp_path / "data", print)


def test_a_missing_model_file_is_a_data_error(config, tmp_path):
  with pytest.raises(DataError, match=r"missing\.model"):
    prepare(data_config(config.source, tokenizer=str(tmp_path / "missing.model")), 512, tmp_path, print)


@pytest.mark.parametrize(("tokenizer", "hint"), [("unigarm", "did you mean 'unigram'"), ("numbers", "auto")])
def test_a_tokenizer_that_does_not_fit_is_a_config_error(config, tmp_path, tokenizer, hint):
  with pytest.raises(ConfigError, match=hint):
    prepare(data_config(config.source, tokenizer=tokenizer), 512, tmp_path, print)


def test_one_character_of_text_is_too_few_documents(tmp_path):
  (tmp_path / "text").write_text("a")
  with pytest.raises(DataError, match="holds 1 documents, too few"):
    prepare(data_config(f"text:{tmp_path / 'text'}", validation_fraction=0.05), 300, tmp_path / "data", print)


def test_no_validation_is_an_empty_store(config, tmp_path, messages):
  data = prepare(data_config(config.source, validation_fraction=0.0), 512, tmp_path, messages.append)
  assert len(data.validation) == data.validation.num_tokens == 0


def test_synthetic_data_needs_no_files(tmp_path, messages, monkeypatch):
  monkeypatch.setattr(synthetic, "_NUM_DOCUMENTS", 64)
  data = prepare(data_config("synthetic"), 70_000, tmp_path, messages.append)
  store = data.train[0]
  tokens = np.concatenate([store.example(i).tokens for i in range(len(store))])
  assert store.infos[0].dtype == "<u4"
  assert tokens.min() >= 2
  assert 2**16 < tokens.max() < 70_000


def test_the_standard_library_is_prepared_as_a_data_set(tmp_path, messages, monkeypatch, capfd, text_folder):
  here = types.SimpleNamespace(get_path=lambda _: str(text_folder))
  monkeypatch.setattr(standard_library, "sysconfig", here)
  data = prepare(data_config("stdlib", validation_fraction=0.1), 512, tmp_path, messages.append)
  info = json.loads((tmp_path / "stdlib" / "standard_library" / "1.0.0" / "dataset_info.json").read_text())
  assert info["fileFormat"] == "array_record"
  store = data.train[0]
  assert len(store) + len(data.validation) == 40
  texts = {path.read_text() for path in text_folder.iterdir()}
  assert {data.tokenizer.decode(store.example(i).tokens) for i in range(len(store))} < texts
  assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_real_standard_library_reaches_four_bytes_per_token(tmp_path, messages):
  data = prepare(data_config("stdlib", validation_fraction=0.05), 4096, tmp_path, messages.append)
  for split, least in (("train", 4), ("validation", 3.9)):
    assert data.infos[0].text_bytes[split] / data.infos[0].tokens[split] > least
