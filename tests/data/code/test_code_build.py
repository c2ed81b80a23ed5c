"""Samples of every kind are what they promise, in one split each, the same on every run."""

import collections
import hashlib
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
from source_trees import files, manifest, samples, without_header, write_tree

from ultrathink_jax.data.code import CodeOptions, CountedTokens, build_code_data, code_corpus
from ultrathink_jax.data.code.items import parse, parses_alone
from ultrathink_jax.data.code.languages import LANGUAGES
from ultrathink_jax.data.documents import Record, Reject, score
from ultrathink_jax.errors import ConfigError, DataError

ALL = dict.fromkeys(("file", "chunk", "item", "complete", "doc", "test", "fim", "repo"), 1.0)


class Words:
  """A tokenizer of words, with the special tokens it is given."""

  fingerprint = "words"

  def __init__(self, *special):
    self._special = special

  def count_tokens(self, text):
    return len(text.split())

  def has_token(self, token):
    return token in self._special


def named(rows, name):
  (row,) = (row for row in rows if row["meta"]["name"] == name)
  return row


@pytest.fixture
def workspace(tmp_path):
  return write_tree(tmp_path / "tree", crates=4)


def test_every_function_of_the_tree_is_an_item_with_its_body_that_parses(workspace, build):
  output = build(workspace, kinds={"item": 1.0}, near_duplicates="keep", max_tokens=100_000, min_tokens=0)
  rows = samples(output)
  assert rows
  for row in rows:
    language = LANGUAGES[row["meta"]["language"]]
    code = without_header(row["text"])
    assert parses_alone(language, code.encode())
    if row["meta"]["item"] in ("function", "method"):
      (item, *_) = (i for i in parse(language, code.encode(), "a").items if i.is_function)
      assert item.body
  expected, found = set(), {(row["meta"]["path"], row["meta"]["name"]) for row in rows}
  for path, row in files(output).items():
    if row.get("language") in LANGUAGES and "split" in row and not row["has_errors"]:
      items = parse(LANGUAGES[row["language"]], (workspace / path).read_bytes(), path).items
      expected |= {(path, item.name) for item in items if item.is_function}
  duplicates = manifest(output)["samples_left_out"]["item: duplicate"]
  assert found & expected
  missing = expected - found
  assert 0 < len(missing) <= duplicates  # the same function in several crates is there once
  texts = [" ".join(without_header(row["text"]).split()) for row in rows]
  assert len(set(texts)) == len(texts)


def test_spans_are_the_bytes_that_samples_show(tree, build):
  for row in samples(build(tree, tests="keep", max_tokens=256), "file", "chunk", "item"):
    start, stop = row["meta"]["span"]
    expected = (tree / row["meta"]["path"]).read_bytes()[start:stop].decode()
    assert row["text"].endswith(expected)


def test_a_completion_is_the_body_after_docs_and_signature(tree, build):
  row = named(samples(build(tree), "complete"), "double")
  assert row["prompt"].startswith("// path: crates/sample0/src/lib.rs\n/// Doubles a number.\n")
  assert row["prompt"].endswith("pub const fn double(x: u32) -> u32")
  assert row["completion"] == " {\n  x * 2 // a comment with }\n}"


def test_a_docstring_is_part_of_the_prompt_of_a_completion(tree, build):
  row = named(samples(build(tree, min_tokens=0), "complete"), "Stack.top")
  assert row["prompt"].endswith('"""Return the last element."""')
  assert row["completion"].startswith('\n        text = """not {')


def test_documentation_is_the_completion_of_the_item_without_it(tree, build):
  rows = samples(build(tree, min_tokens=0), "doc")
  row = named(rows, "double")
  assert "Doubles" not in row["prompt"]
  assert row["prompt"].startswith("// path: crates/sample0/src/lib.rs\n#[inline]\n#[must_use")
  assert row["completion"].startswith("/// Doubles a number.\n///\n/// # Examples\n")
  row = named(rows, "Stack.top")
  assert '    def top(self):\n        text = """not {' in row["prompt"]
  assert row["completion"] == '        """Return the last element."""\n'


def test_tests_follow_the_functions_they_name(tree, build):
  output = build(tree, min_tokens=0, validation_fraction=0.0, test_fraction=0.0)
  rows = samples(output, "test")
  row = named(rows, "tests::test_double")
  assert "pub const fn double" in row["prompt"]
  assert row["completion"].strip().startswith("#[test]")
  row = named(rows, "parse_header_splits_at_the_colon")
  assert row["meta"]["paths"] == ["crates/sample0/src/parser.rs", "crates/sample0/tests/header.rs"]
  assert "pub(crate) fn parse_header" in row["prompt"]
  assert len(rows) == 3


@pytest.mark.parametrize(
  ("tests", "in_file", "as_items"), [("split", False, True), ("keep", True, True), ("drop", False, False)]
)
def test_tests_are_split_out_kept_or_dropped(tree, build, tests, in_file, as_items):
  output = build(tree, tests=tests)
  (library,) = (r for r in samples(output, "file") if r["meta"]["path"].endswith("lib.rs"))
  assert ("mod tests" in library["text"]) is in_file
  assert "production_only" in library["text"]
  assert "WORD_0_59" in library["text"]
  assert ("tests::test_double" in {row["meta"]["name"] for row in samples(output, "item")}) is as_items
  assert (files(output)["crates/sample0/tests/header.rs"].get("reason") == "tests") is (tests == "drop")


@pytest.mark.parametrize("learned", ["all", "middle"])
def test_fill_in_the_middle_gives_back_the_file_in_both_orders(workspace, build, learned):
  rows = samples(build(workspace, kinds={"fim": 1.0}, fim_learned=learned, near_duplicates="keep"))
  orders = collections.Counter()
  for row in rows:
    text = row["text"] if learned == "all" else row["prompt"] + row["completion"]
    assert text.startswith("<fim_prefix>")
    rest = text.removeprefix("<fim_prefix>")
    if rest.startswith("<fim_suffix>"):
      suffix, _, before = rest.removeprefix("<fim_suffix>").partition("<fim_middle>")
      orders["spm"] += 1
    else:
      prefix, _, rest = rest.partition("<fim_suffix>")
      suffix, _, middle = rest.partition("<fim_middle>")
      before = prefix + middle
      orders["psm"] += 1
    start, stop = row["meta"]["span"]
    whole = (workspace / row["meta"]["path"]).read_bytes()[start:stop].decode()
    if row["meta"]["path"].endswith("lib.rs"):
      continue  # has tests cut out
    assert without_header(before + suffix) == whole
  assert min(orders.values()) > 5
  assert {row["meta"]["item"] for row in rows} == {"char", "line", "item"}


def test_a_file_that_spells_the_marks_gives_no_fill_in_the_middle(tree, build):
  (tree / "marks.py").write_text('PREFIX = "<fim_prefix>"\n\n\ndef mark(text):\n    return PREFIX + text\n')
  output = build(tree, kinds=ALL)
  assert "marks.py" not in {row["meta"]["path"] for row in samples(output, "fim")}
  assert "marks.py" in {row["meta"]["path"] for row in samples(output, "file")}


def test_packages_hold_files_after_what_they_need_in_one_split(workspace, build):
  output = build(workspace, tokenizer=Words("<file_sep>"), repo_tokens=4000, near_duplicates="keep")
  rows, split_of = samples(output, "repo"), {p: row.get("split") for p, row in files(output).items()}
  assert rows
  for row in rows:
    paths = row["meta"]["paths"]
    assert {split_of[path] for path in paths} == {row["meta"]["split"]}
    assert [text.split("\n")[0] for text in row["text"].split("<file_sep>")[1:]] == paths
    assert row["meta"]["tokens"] <= 4000
    for needed, user in (("src/parser.rs", "src/lib.rs"), ("src/shapes/mod.rs", "src/lib.rs")):
      pair = [f"{row['meta']['name']}/{name}" for name in (needed, user)]
      if set(pair) <= set(paths):
        assert paths.index(pair[0]) < paths.index(pair[1])


def test_token_counts_are_those_of_the_tokenizer_and_hold_the_limits(workspace, build):
  words = Words()
  for row in samples(build(workspace, tokenizer=words, kinds=ALL, max_tokens=120, min_tokens=15, overlap_tokens=20)):
    texts = [row[field] for field in ("text", "prompt", "completion") if field in row]
    assert row["meta"]["tokens"] == sum(map(words.count_tokens, texts))
    assert 15 <= row["meta"]["tokens"] <= (8192 if row["meta"]["kind"] == "repo" else 120)
    assert row["meta"]["sha256"] == hashlib.sha256("".join(texts).encode()).hexdigest()


def test_no_file_or_cluster_crosses_splits(workspace, build):
  for number in range(6):  # near duplicates of one another, far apart by name
    text = (workspace / "crates/sample0/src/many.rs").read_text() + f"// copy {number}\n"
    (workspace / f"{'zyxwvu'[number]}_copy.rs").write_text(text)
  output = build(workspace, near_duplicates="keep", validation_fraction=0.3, test_fraction=0.3, kinds=ALL)
  rows, splits_of_path, splits_of_cluster = files(output), {}, {}
  for row in samples(output):
    for path in row["meta"].get("paths", [row["meta"]["path"]]):
      splits_of_path.setdefault(path, set()).add(row["meta"]["split"])
      splits_of_cluster.setdefault(rows[path].get("cluster", path), set()).add(row["meta"]["split"])
  assert {len(splits) for splits in splits_of_path.values()} == {1}
  assert {len(splits) for splits in splits_of_cluster.values()} == {1}
  assert sum(row.get("cluster") == "crates/sample0/src/many.rs" for row in rows.values()) == 6
  assert set(manifest(output)["files_by_split"]) == {"train", "validation", "test"}
  assert min(manifest(output)["files_by_split"].values()) > 0


def test_a_split_hangs_on_the_name_alone_and_files_that_are_added_move_no_others(workspace, build):
  before = {path: row.get("split") for path, row in files(build(workspace)).items()}
  write_tree(workspace, crates=6)
  after = {path: row.get("split") for path, row in files(build(workspace)).items()}
  assert len(after) > len(before)
  assert {path: after[path] for path in before} == before
  for path, split in after.items():
    if split:
      expected = "validation" if score(path) < 0.05 else "test" if score(path) < 0.1 else "train"
      assert split == expected


def test_modules_stay_whole_when_split_by_module(workspace, build):
  rows = files(build(workspace, split_by="module", near_duplicates="keep", validation_fraction=0.4, test_fraction=0.2))
  splits = collections.defaultdict(set)
  for path, row in rows.items():
    if "split" in row and path.startswith("crates/"):
      splits["/".join(path.split("/")[:2])].add(row["split"])
  assert len(splits) == 4
  assert all(len(each) == 1 for each in splits.values())


def test_runs_are_byte_identical_wherever_the_tree_lies_and_however_many_processes(
  workspace, tmp_path, build, monkeypatch
):
  first = build(workspace, kinds=ALL)
  elsewhere = tmp_path / "else where" / "moved"
  shutil.copytree(workspace, elsewhere)
  real = os.walk
  monkeypatch.setattr(os, "walk", lambda *a, **k: reversed(list(real(*a, **k))))
  second = build(elsewhere, kinds=ALL, workers=2)
  names = sorted(path.name for path in first.iterdir())
  assert names == ["files.jsonl", "manifest.json", "test.jsonl", "train.jsonl", "validation.jsonl"]
  for name in names:
    assert (first / name).read_bytes() == (second / name).read_bytes(), name
  for name, digest in manifest(first)["outputs"].items():
    assert hashlib.sha256((first / name).read_bytes()).hexdigest() == digest


def test_another_seed_draws_other_samples_and_moves_no_file(workspace, build):
  first, second = (build(workspace, kinds={"item": 0.5}, seed=seed) for seed in (0, 1))
  assert files(first).keys() == files(second).keys()
  assert {r["meta"]["name"] for r in samples(first)} != {r["meta"]["name"] for r in samples(second)}


def test_shares_and_limits_bound_how_many_samples_there_are(workspace, build):
  counts = lambda output: collections.Counter(row["meta"]["kind"] for row in samples(output))
  whole = counts(build(workspace, kinds=ALL))
  half = counts(build(workspace, kinds=ALL | {"item": 0.5, "fim": 0.0}))
  assert 0.3 * whole["item"] < half["item"] < 0.7 * whole["item"]
  assert half["fim"] == 0
  assert half["complete"] == whole["complete"]
  limited = build(workspace, kinds=ALL, max_per_kind={"item": 10, "doc": 0, "complete": 100_000})
  assert counts(limited)["item"] == 10
  assert counts(limited)["doc"] == 0
  assert counts(limited)["complete"] == whole["complete"]
  kept = manifest(limited)
  assert sum(kinds.get("item", {}).get("samples", 0) for kinds in kept["samples"].values()) == 10
  assert kept["samples_left_out"]["item: above max_per_kind"] == whole["item"] - 10
  by_file = collections.Counter(
    row["meta"]["path"] for row in samples(build(workspace, kinds=ALL | {"repo": 0.0}, max_per_file=3))
  )
  assert max(by_file.values()) == 3


def test_counts_of_the_manifest_are_those_of_the_samples(workspace, build):
  output = build(workspace, kinds=ALL)
  counted = collections.Counter((row["meta"]["split"], row["meta"]["kind"]) for row in samples(output))
  told = {(s, k): c["samples"] for s, kinds in manifest(output)["samples"].items() for k, c in kinds.items()}
  assert told == counted
  tokens = sum(row["meta"]["tokens"] for row in samples(output))
  assert tokens == sum(c["tokens"] for each in manifest(output)["languages"].values() for c in each.values())


def test_part_of_the_standard_library_is_accounted_for(build):
  root = Path(sysconfig.get_path("stdlib"), "asyncio")
  output = build(root, kinds=ALL, near_duplicates="keep")
  counts = manifest(output)["files"]
  assert counts["found"] == counts["used"] + sum(counts["left_out"].values())
  assert counts["found"] == sum(len(names) for _, _, names in os.walk(root))
  assert manifest(output)["files_with_errors"] == 0


def test_an_output_that_is_something_else_is_not_touched(tree, tmp_path):
  (tmp_path / "work").mkdir()
  (tmp_path / "work" / "thesis.txt").write_text("years")
  for output, match in ((tmp_path / "work", "something else"), (tmp_path, "holds the source tree"), (tree, "holds")):
    with pytest.raises(ConfigError, match=match):
      build_code_data(tree, output, CodeOptions(), None, print)
  assert (tmp_path / "work" / "thesis.txt").read_text() == "years"


def test_an_output_inside_of_the_tree_is_no_part_of_it_and_may_be_written_again(tree):
  for _ in range(2):
    build_code_data(tree, tree / "samples", CodeOptions(workers=1), None, lambda line: None)
    assert not any(path.startswith("samples") for path in files(tree / "samples"))


def test_a_corpus_gives_the_training_and_validation_samples_and_builds_once(workspace, tmp_path, monkeypatch):
  lines = []
  options = CodeOptions(validation_fraction=0.3, workers=1)
  corpus = code_corpus(str(workspace), options, tmp_path / "data", lines.append)
  shards = corpus.open()
  assert list(shards) == ["train", "validation"]
  (folder,) = (tmp_path / "data").iterdir()
  for split, parts in shards.items():
    records = [record for shard in parts for record in shard.read()]
    assert [dict(record.fields) for record in records] == [
      row for row in samples(folder) if row["meta"]["split"] == split
    ]
    assert len({record.where for record in records}) == len(records) > 0
    assert sum(shard.num_bytes for shard in parts) == (folder / f"{split}.jsonl").stat().st_size
  num_lines = len(lines)
  again = code_corpus(str(workspace), options, tmp_path / "data", lines.append)
  assert again.identity == corpus.identity
  again.open()
  assert len(lines) == num_lines
  (workspace / "added.py").write_text("def added():\n    return 'something new'\n")
  assert code_corpus(str(workspace), options, tmp_path / "data", lines.append).identity != corpus.identity
  assert code_corpus(str(workspace), CodeOptions(seed=1), tmp_path / "data", lines.append).identity != corpus.identity


def test_shards_of_any_size_give_every_line_once(workspace, tmp_path, monkeypatch):
  from ultrathink_jax.data.code import corpus

  shards = code_corpus(str(workspace), CodeOptions(workers=1), tmp_path / "data", print).open()["train"]
  whole = [record for shard in shards for record in shard.read()]
  for size in (1000, 4096, 99_991):
    monkeypatch.setattr(corpus, "_SHARD_BYTES", size)
    parts = corpus._shards(shards[0].path)
    assert len(parts) > 1
    assert [record for shard in parts for record in shard.read()] == whole


def test_a_damaged_line_is_a_reject_and_a_missing_file_an_error(workspace, tmp_path):
  shards = code_corpus(str(workspace), CodeOptions(workers=1), tmp_path / "data", print).open()
  shard = shards["validation"][0] if shards["validation"] else shards["train"][0]
  content = shard.path.read_bytes()
  shard.path.write_bytes(b'{"broken\n' + content)
  first, second, *_ = shard.read()
  assert isinstance(first, Reject)
  assert isinstance(second, Record)
  shard.path.unlink()
  with pytest.raises(DataError, match="cannot be read"):
    list(shard.read())


def test_a_corpus_needs_a_path(tmp_path):
  with pytest.raises(ConfigError, match="code:PATH"):
    code_corpus("", CodeOptions(), tmp_path, print)


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"kinds": {"itme": 1.0}}, "did you mean 'item'"),
    ({"kinds": {"item": 1.5}}, r"kinds\[item\]=1.5"),
    ({"max_per_kind": {"item": -1}}, "negative"),
    ({"tests": "delete"}, "split, keep, drop"),
    ({"split_by": "date"}, "file, module"),
    ({"validation_fraction": 0.6, "test_fraction": 0.5}, "nothing to train on"),
    ({"validation_fraction": -0.1}, "validation_fraction=-0.1"),
    ({"overlap_tokens": 1025}, "at most 1024"),
    ({"max_tokens": 10}, "64 or more"),
    ({"max_per_file": 0}, "1 or more"),
    ({"fim_levels": {"char": 0.0}}, "no weight above 0"),
    ({"fim_levels": {"word": 1.0}}, "char, line, item"),
    ({"fim_levels": {"char": -1.0}}, "negative"),
    ({"secrets": "hide"}, "scrub, drop, keep"),
    ({"workers": 0}, "1 or more"),
  ],
)
def test_a_bad_option_is_named_with_its_value_and_the_rule(options, match):
  with pytest.raises(ConfigError, match=match):
    CodeOptions(**options)


def test_counted_tokens_has_what_it_encodes_as_one_token_and_back():
  class Toy:
    vocab_size, bos_id, eos_id, fingerprint = 300, 0, 1, "toy"

    def encode(self, text):
      return [299] if text == "<fim_prefix>" else [7] if text == "unknown" else list(text.encode())

    def encode_batch(self, texts):
      return [self.encode(text) for text in texts]

    def decode(self, ids):
      return "<fim_prefix>" if list(ids) == [299] else bytes(ids).decode()

    def save(self, directory):
      del directory

  tokens = CountedTokens(Toy())
  assert tokens.has_token("<fim_prefix>")
  assert not tokens.has_token("unknown")
  assert not tokens.has_token("<fim_suffix>")
  assert tokens.count_tokens("abc") == 3
