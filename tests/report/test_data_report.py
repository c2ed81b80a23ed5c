"""What is said of training data is what a run would read, on a terminal and as a page."""

import dataclasses
import io
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import tiny_config
from ultrathink_jax.data.loader import training_loader
from ultrathink_jax.data.packing import PACKINGS
from ultrathink_jax.data.prepare import prepare
from ultrathink_jax.report import data_page, data_text
from ultrathink_jax.report.data import inspect

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "far", "away", "into", "woods"]
STEPS, BATCH_SIZE, LENGTH = 40, 4, 64
EVIL = "<script>alert(1)</script>\x1b[31m"


def write_source(path, entries):
  path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
  return f"jsonl:{path}"


def words(number, count):
  return " ".join([str(number), *random.Random(number).choices(WORDS, k=count)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def texts(folder):
  entries = [{"text": words(i, 5 + i % 60)} for i in range(80)]
  entries[3:5] = [{"text": EVIL * 40}, {"text": EVIL * 40}]
  return write_source(folder / "texts.jsonl", [*entries, {"txt": "?"}])


@pytest.fixture(scope="module")
def tasks(folder):
  return write_source(
    folder / "tasks.jsonl",
    [{"prompt": words(i, 6) + " ?", "completion": words(i, 12), "label": i % 4 == 0} for i in range(60)],
  )


@pytest.fixture(scope="module")
def pairs(folder):
  entries = [{"prompt": "which one ? ", "chosen": words(i, 12), "rejected": words(i, 5) + "!"} for i in range(40)]
  return write_source(folder / "pairs.jsonl", entries)


def look(directory, source="", train=None, **data):
  """Returns the configuration, the prepared data and what is said of it."""
  data = {"source": source, "validation_fraction": 0.1, "workers": 1, "on_error": "skip"} | data
  train = {"steps": STEPS, "batch_size": BATCH_SIZE, "sequence_length": LENGTH} | (train or {})
  config = tiny_config(data=data, train=train, model={"vocab_size": 420})
  prepared = prepare(config.data, 420, directory, [].append, config.quality)
  return config, prepared, inspect(config, prepared, directory, "run <1>")


@pytest.fixture(scope="module")
def mixed(texts, tasks, folder):
  return look(
    folder / "mixed",
    mixture=(f"{texts}=0.7", f"{tasks}=0.3"),
    stages=("25:0.2,0.8",),
    length_stages=("10:24", "30:64"),
    packing="best_fit",
  )


def test_the_rows_of_a_source_are_those_that_the_loader_reads(mixed):
  config, prepared, facts = mixed
  loader = training_loader(config, prepared, range(BATCH_SIZE))
  read = np.concatenate([loader.sources(step) for step in range(STEPS)])
  assert [source["rows"] for source in facts["sources"]] == np.bincount(read, minlength=2).tolist()
  assert facts["run"]["rows"] == STEPS * BATCH_SIZE


def test_the_tokens_of_a_source_are_about_those_of_its_batches(mixed):
  config, prepared, facts = mixed
  loader, counts = training_loader(config, prepared, range(BATCH_SIZE)), np.zeros(2)
  for step in range(STEPS):
    filled = (loader.batch(step).context.segment_ids > 0).sum(axis=1)
    np.add.at(counts, loader.sources(step), filled)
  np.testing.assert_allclose([source["tokens"] for source in facts["sources"]], counts, rtol=0.05)
  for store, source in zip(prepared.train, facts["sources"], strict=True):
    assert source["tokens"] == pytest.approx(source["epochs"] * (store.num_tokens + len(store)), abs=1)


@pytest.mark.parametrize("name", PACKINGS)
def test_what_a_packing_comes_to_is_counted_in_its_rows(mixed, name):
  _, prepared, facts = mixed
  assert [stage["first_step"] for stage in facts["packings"]] == [0, 10, 30]
  for stage in facts["packings"]:
    rows = positions = cut = documents = 0
    for store in prepared.train:
      packing = PACKINGS[name](store.lengths, LENGTH, None, stage["limit"])
      spans = [span for row in range(packing.rows_per_epoch) for span in packing.spans(0, row)]
      rows += packing.rows_per_epoch
      positions += sum(span.stop - span.start for span in spans)
      cut += int((np.bincount([span.document for span in spans]) > 1).sum())
      documents += len(store)
    efficiency = pytest.approx(positions / (rows * LENGTH))
    assert stage[name] == {"rows": rows, "efficiency": efficiency, "cut": pytest.approx(cut / documents)}


def test_a_preparation_that_was_killed_is_passed_over(mixed):
  config, prepared, facts = mixed
  place = Path(facts["sources"][0]["rejects"]).parent
  incomplete = place.with_name("other.incomplete")
  incomplete.mkdir()
  (incomplete / "rejects.jsonl").touch()
  assert inspect(config, prepared, place.parent.parent, "run <1>") == facts


def test_lengths_are_those_of_all_documents(mixed):
  _, prepared, facts = mixed
  lengths = np.concatenate([store.lengths for store in prepared.train])
  described = facts["lengths"]
  bins = [
    lengths[(lengths >= low) & (lengths < high)]
    for low, high in zip(described["edges"][:-1], described["edges"][1:], strict=True)
  ]
  assert described["documents"] == [len(part) for part in bins]
  assert described["tokens"] == [part.sum() for part in bins]
  assert sum(described["documents"]) == len(lengths)
  assert described["longer"] == np.mean([length > LENGTH - 1 for length in lengths])
  assert described["p50"] == sorted(lengths)[(len(lengths) + 1) // 2 - 1]
  assert described["max"] == max(lengths)


def test_the_share_that_is_learned_is_that_of_completions(mixed):
  _, prepared, facts = mixed
  first, second = facts["sources"]
  assert (first["learned"], first["ends_learned"], first["good"]) == (1, 1, None)
  store = prepared.train[1]
  learned = [int(store.example(i).is_learned.sum()) + 1 for i in range(len(store))]
  assert second["learned"] == pytest.approx(sum(learned) / (store.num_tokens + len(store)))
  assert second["good"] == np.mean([store.label(i) for i in range(len(store))])


def test_what_was_left_out_is_listed_where_it_is_said_to_be(mixed):
  source = mixed[2]["sources"][0]
  lines = Path(source["rejects"]).read_text().splitlines()
  assert len(lines) == sum(source["left_out"].values()) == 1
  assert "texts.jsonl:81" in lines[0]


def test_samples_are_the_first_rows_of_training(mixed):
  config, prepared, facts = mixed
  batch = training_loader(config, prepared, range(BATCH_SIZE)).batch(0)
  tokenizer = prepared.tokenizer
  for row, sample in enumerate(facts["samples"]):
    segments = batch.context.segment_ids[row]
    assert sample["learned"] == (batch.weights[row] > 0).sum()
    assert sample["learned"] + sample["unlearned"] + sample["padding"] == LENGTH
    assert len(sample["segments"]) == segments.max()
    for number, segment in enumerate(sample["segments"], 1):
      targets = batch.targets[row][segments == number]
      assert "".join(run["text"] for run in segment["runs"]) == tokenizer.decode(targets)
      assert (segment["end"] is not None) == (targets[-1] == tokenizer.eos_id)
      assert sum(run["tokens"] for run in segment["runs"]) == len(targets) - (segment["end"] is not None)


def test_prompts_are_marked_and_text_cannot_steer_the_terminal(tasks, texts, folder):
  _, _, facts = look(folder / "tasks", tasks)
  plain = data_text.format_inspection(facts, data_text.PLAIN)
  assert re.search(r"\[begins\]⟦\d+ [a-z ]+\?⟧\d+ [a-z ]+\[end\]", plain)
  assert "\x1b" not in plain
  assert "\x1b[36m[begins]\x1b[0m\x1b[38;5;208m" in data_text.format_inspection(facts, data_text.COLORS)
  assert data_text.visible("a\tb\n\x1b[31m\u202e\ud800é") == "a\tb\n\\x1b[31m\\u202e\\ud800é"


def test_colours_are_for_terminals_that_show_them(monkeypatch):
  terminal, file = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "ascii")
  terminal.isatty = lambda: True
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.delenv("NO_COLOR", raising=False)
  assert data_text.marks_for(terminal) == data_text.COLORS
  assert data_text.marks_for(file) == data_text.ASCII
  monkeypatch.setenv("NO_COLOR", "1")
  assert data_text.marks_for(terminal) == data_text.PLAIN


def test_healthy_data_is_said_to_be(texts, folder):
  _, _, facts = look(folder / "healthy", texts, train={"steps": 20}, packing="best_fit")
  assert facts["findings"] == []
  first = data_text.headline(facts).splitlines()[0]
  assert first == "healthy   nothing looks wrong"


@pytest.mark.parametrize(
  ("changes", "finding"),
  [
    ({"train": {"steps": 4000}}, "times through"),
    ({"validation_fraction": 0.0}, "no validation documents"),
    ({"packing": "split", "num_tokens": 18}, "documents are cut with data.packing=split; best_fit would cut 0%"),
    ({"num_bad": 60}, "60 of the 140 entries"),
    ({"num_tokens": 30}, "% of the positions are padding with data.packing=best_fit; with split it would be"),
  ],
)
def test_what_looks_wrong_is_said_first(folder, changes, finding):
  changes = dict(changes)
  entries = [{"text": words(i, 14)} for i in range(80)] + [{}] * changes.pop("num_bad", 0)
  if "num_tokens" in changes:
    changes["train"] = {"sequence_length": changes.pop("num_tokens")}
  source = write_source(folder / "wrong.jsonl", entries)
  _, _, facts = look(folder / "wrong", source, **{"packing": "best_fit"} | changes)
  assert any(finding in found for found in facts["findings"]), facts["findings"]
  assert data_text.headline(facts).startswith("look at   ")


def test_an_end_that_is_not_learned_is_found(folder):
  entries = [{"messages": [{"role": r, "content": words(i, 8)} for r in ("user", "assistant")]} for i in range(40)]
  source = write_source(folder / "messages.jsonl", entries)
  template = folder / "ends.jinja"
  template.write_text(
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }} ? {% endif %}{% endfor %} and so on"
  )
  _, _, facts = look(folder / "ends", source, chat_template=str(template))
  assert facts["sources"][0]["ends_learned"] == 0
  assert any("the end of 100% of the documents" in found for found in facts["findings"])


def test_preferences_are_shown_as_pairs(pairs, folder):
  _, _, facts = look(folder / "pairs", pairs)
  assert any("recipe=pretrain does not read" in found for found in facts["findings"])
  assert [sample["title"].split()[0] for sample in facts["samples"]] == ["chosen", "rejected"] * 2
  runs = facts["samples"][1]["segments"][0]["runs"]
  assert [run["is_learned"] for run in runs] == [False, True]
  assert runs[0]["text"] == "which one ? "
  assert facts["sources"][0]["splits"]["train"]["bytes_per_token"] is None


def test_the_page_holds_everything_and_loads_nothing(mixed, tmp_path):
  config, _, facts = mixed
  page = data_page.write(tmp_path / "data.html", facts, config).read_text("utf-8")
  assert not re.search(r"<(script|link|iframe|object)\b|@import|https?:", page)
  assert "<h1>run &lt;1&gt;</h1>" in page
  for text in ("texts.jsonl", "70% → 20%", "has the fields", "best_fit", facts["fingerprint"], 'class="unlearned"'):
    assert text in page
  assert page.count("<figure") == 2


def test_texts_on_the_page_are_escaped(mixed, tmp_path):
  config, _, facts = mixed
  sample = facts["samples"][0]
  run = {"text": f"{EVIL}\ud800", "tokens": 9, "is_learned": False}
  sample = sample | {"title": EVIL, "segments": [{"begins": True, "end": False, "runs": [run]}]}
  page = data_page.write(tmp_path / "data.html", facts | {"samples": [sample]}, config).read_text("utf-8")
  assert '<span class="unlearned">&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m\\ud800</span>' in page
  assert "<script" not in page


def test_the_numbers_are_json(mixed):
  assert json.loads(json.dumps(mixed[2], allow_nan=False)) == mixed[2]
  assert dataclasses.is_dataclass(mixed[0])
