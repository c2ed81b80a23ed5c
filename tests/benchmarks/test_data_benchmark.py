import json

import pytest

from benchmarks import data
from ultrathink_jax.data.tokenizer import load_tokenizer


def test_lines_are_repeated_up_to_the_size(tmp_path):
  written = data.write_lines(tmp_path / "x.jsonl", ["alpha", "é\n"], 200)
  lines = (tmp_path / "x.jsonl").read_text().splitlines()
  assert [json.loads(line)["text"] for line in lines] == written
  assert written[:3] == ["alpha", "é\n", "alpha"]
  assert 200 <= (tmp_path / "x.jsonl").stat().st_size < 230


def test_the_tokenizer_json_is_one_that_is_read_and_exact(tmp_path, text_sample):
  data.train_tokenizer_json(text_sample, 400, tmp_path / "t")
  tokenizer = load_tokenizer(tmp_path / "t" / "tokenizer.json")
  for text in (*text_sample, "é 漢字\n\t "):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture
def text_sample():
  return [f"def function_{i}(argument):\n  return argument + {i}\n" * 5 for i in range(40)]


def test_reading_is_timed_without_the_first_call():
  calls = []
  speed = data.read_speed(calls.append, 16, 0.0)
  assert calls == [0, 1]
  assert speed > 0


def test_the_page_says_whether_a_goal_is_reached():
  rounds = [(10.0, 1.0), (60.0, 2.0), (90.0, 3.0)]
  assert data.rows_of({"a": rounds}, 20)[0][-2:] == ["30.00 (10.00 - 30.00)", "20 reached"]
  assert data.rows_of({"a": rounds}, 31)[0][-1] == "31 missed"


@pytest.mark.slow
def test_the_program_prints_both_tables(capsys, monkeypatch, text_sample):
  monkeypatch.setattr(data, "standard_library_texts", lambda: text_sample)
  small = ["--rounds=1", "--megabytes=1", "--vocab_size=320", "--seconds=0", "--train_tokens_per_second=1"]
  data.main(["", *small])
  output = capsys.readouterr().out
  for name in ("Loader.batches, 8 x 256", "Loader.batch, 8 x 1024", "sentencepiece", "tokenizers"):
    assert f"| {name} |" in output
