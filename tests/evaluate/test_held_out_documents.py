import json

import numpy as np
import pytest

from tests.conftest import tiny_config
from ultrathink_jax.data.code.tokens import _FIM_FAMILIES
from ultrathink_jax.data.documents import Part
from ultrathink_jax.data.prepare import prepare
from ultrathink_jax.data.tokenizer import BytesTokenizer
from ultrathink_jax.errors import DataError
from ultrathink_jax.evaluate.documents import UNKNOWN, of_store, of_texts, read_samples
from ultrathink_jax.evaluate.tasks import find_task

BYTES = BytesTokenizer()


def write(path, *rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def test_of_a_sample_the_completion_and_its_end_count(tmp_path):
  meta = {"kind": "complete", "language": "rust", "path": "src/lib.rs"}
  path = write(tmp_path / "test.jsonl", {"prompt": "fn a() ", "completion": "{é}", "meta": meta}, {"text": "plain"})
  task, plain = read_samples(path, BYTES)
  tokens = [256, *"fn a() {é}".encode(), 257]
  np.testing.assert_array_equal(task.sequence.tokens, tokens)
  np.testing.assert_array_equal(task.sequence.counts, [False] * 8 + [True] * 5)
  assert (task.name, task.kind, task.language, task.num_bytes) == ("src/lib.rs", "complete", "rust", 4)
  assert (task.task.prompt, task.task.completion) == ("fn a() ", "{é}")
  assert (plain.name, plain.kind, plain.language, plain.task) == ("test.jsonl:2", UNKNOWN, UNKNOWN, None)
  assert plain.sequence.counts.sum() == 6


def test_of_more_samples_than_asked_for_some_are_drawn_from_all_of_them(tmp_path):
  path = write(tmp_path / "test.jsonl", *({"text": f"text {i}"} for i in range(200)))
  chosen = [document.name for document in read_samples(path, BYTES, 50)]
  numbers = [int(name.removeprefix("test.jsonl:")) for name in chosen]
  assert len(set(numbers)) == 50
  assert numbers == sorted(numbers)
  assert numbers[-1] > 150
  assert [document.name for document in read_samples(path, BYTES, 50)] == chosen


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ('{"text": "a"}\n{"txt": "b"}\n', ":2 has .*'txt'.*a line holds a text"),
    ("[1]\n", ":1 is a list"),
    ("", "holds no samples"),
    (None, "cannot be read"),
  ],
)
def test_what_is_no_sample_is_refused_with_its_line(tmp_path, content, message):
  if content is not None:
    (tmp_path / "test.jsonl").write_text(content)
  with pytest.raises(DataError, match=message):
    read_samples(tmp_path / "test.jsonl", BYTES)


def test_documents_of_a_store_are_those_of_their_texts(tmp_path):
  rows = [{"prompt": f"what is {i}? ", "completion": f"it is {i}"} for i in range(40)]
  source = write(tmp_path / "tasks.jsonl", *rows)
  config = tiny_config(
    data={"source": f"jsonl:{source}", "tokenizer": "bytes", "validation_fraction": 0.3, "workers": 1}
  )
  prepared = prepare(config.data, 258, tmp_path / "data", [].append, config.quality)
  documents = of_store(prepared.validation, prepared.tokenizer)
  assert len(documents) == len(prepared.validation) > 3
  by_prompt = {row["prompt"]: row["completion"] for row in rows}
  for document in documents:
    assert by_prompt[document.task.prompt] == document.task.completion
    assert document.num_bytes == len(document.task.completion)
    assert document.sequence.counts.sum() == document.num_bytes + 1
  assert sum(len(document.sequence.tokens) - 2 for document in documents) == prepared.validation.num_tokens
  assert len(of_store(prepared.validation, prepared.tokenizer, 2)) == 2


def test_everything_of_a_plain_text_counts():
  [document] = of_texts(["né"], BYTES)
  np.testing.assert_array_equal(document.sequence.counts, [False, True, True, True, True])
  assert document.num_bytes == 3


@pytest.mark.parametrize("fim", _FIM_FAMILIES, ids=lambda fim: fim.prefix)
@pytest.mark.parametrize("is_suffix_first", [False, True])
def test_prefix_and_suffix_are_found_in_the_prompts_of_every_family(fim, is_suffix_first):
  prompt = fim.order("before\n", "\nafter", is_suffix_first)
  task = find_task((Part(prompt, False), Part("middle")), "fim")
  assert (task.before, task.after) == ("before\n", "\nafter")
  assert (task.prompt, task.completion) == (prompt, "middle")


@pytest.mark.parametrize("fim", _FIM_FAMILIES, ids=lambda fim: fim.prefix)
def test_where_all_is_learned_a_middle_is_found_behind_its_token(fim):
  task = find_task((Part(fim.order("before", "after", False) + "middle"),), "fim")
  if fim.middle:
    assert (task.before, task.after, task.completion) == ("before", "after", "middle")
    assert find_task((Part(fim.order("before", "after", True) + "middle"),), "fim") is None
  else:
    assert task is None


def test_prompts_that_fill_in_nothing_stand_before_their_completions():
  task = find_task((Part("def f():\n", False), Part("  pass")), "complete")
  assert (task.before, task.after) == ("def f():\n", "")
  assert find_task((Part("all of it"),), "file") is None
