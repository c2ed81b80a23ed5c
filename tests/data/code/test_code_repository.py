"""Files come after those they need, tests find their functions, and commits say nothing about people."""

import subprocess

import pytest
from source_trees import manifest, samples

from ultrathink_jax.data.code.commits import head_commit, read_commits, without_people
from ultrathink_jax.data.code.linking import Function, link
from ultrathink_jax.data.code.repository import Member, dependency_order, pack
from ultrathink_jax.data.code.samples import Place

ADA = ("-c", "user.name=Ada Lovelace", "-c", "user.email=ada@analytical.example")


def order(**imports):
  members = [Member(name, tuple(names), 10) for name, names in imports.items()]
  return [member.name for member in dependency_order(members)]


@pytest.mark.parametrize(
  ("files", "before", "after"),
  [
    ({"src/lib.rs": ["parser"], "src/parser.rs": ["crate::token::Token"], "src/token.rs": []},
     "src/token.rs", "src/parser.rs"),
    ({"src/lib.rs": ["parser"], "src/parser.rs": []}, "src/parser.rs", "src/lib.rs"),
    ({"a/src/main.rs": ["my_lib::deep::Thing"], "my-lib/src/deep/mod.rs": []},
     "my-lib/src/deep/mod.rs", "a/src/main.rs"),
    ({"pkg/a.py": ["pkg.z"], "pkg/z.py": []}, "pkg/z.py", "pkg/a.py"),
    ({"pkg/a.py": [".z"], "pkg/z/__init__.py": []}, "pkg/z/__init__.py", "pkg/a.py"),
    ({"a.c": ["sub/z.h"], "sub/z.h": []}, "sub/z.h", "a.c"),
    ({"a.ts": ["./z.js"], "z.ts": []}, "z.ts", "a.ts"),
    ({"a.go": ["example.com/mod/z"], "mod/z.go": []}, "a.go", "mod/z.go"),
  ],
)  # fmt: skip
def test_what_is_imported_comes_first(files, before, after):
  found = order(**files)
  assert sorted(found) == sorted(files)
  assert found.index(before) < found.index(after)


def test_the_nearest_of_several_modules_of_one_name_is_meant():
  found = order(**{"a/user.py": ["util"], "a/util.py": [], "b/util.py": ["user_of_b"], "b/zz/user_of_b.py": ["c"]})
  assert found.index("a/util.py") < found.index("a/user.py")


def test_a_ring_of_imports_and_a_long_chain_end():
  assert sorted(order(**{"a.py": ["b"], "b.py": ["c"], "c.py": ["a"]})) == ["a.py", "b.py", "c.py"]
  chain = {f"m{i:05d}.py": [f"m{i + 1:05d}"] for i in range(5000)}
  assert order(**chain) == sorted(chain, reverse=True)


def test_the_order_does_not_hang_on_the_order_of_the_files():
  files = {f"m{i}.py": [f"m{(i * 7) % 20}", f"m{(i * 3) % 20}"] for i in range(20)}
  assert order(**files) == order(**dict(reversed(files.items())))


def test_runs_hold_the_limit_and_leave_out_files_that_are_alone():
  members = [Member(f"{i}", (), tokens) for i, tokens in enumerate((4, 4, 4, 20, 4, 4))]
  assert [[m.name for m in run] for run in pack(members, 10)] == [["0", "1"], ["4", "5"]]


def place(name):
  return Place(name.split("::")[-1], name, "function", (0, 1), "")


@pytest.mark.parametrize(
  ("test", "text", "expected"),
  [
    ("test_parse_header", "parse_header()", "parse_header"),
    ("parse_header_splits", "parse_header()", "parse_header"),
    ("testParseHeader", "parseHeader()", "parseHeader"),
    ("parses_numbers", "parse()", "parse"),
    ("test_parse_header_twice", "parse(parse_header())", "parse_header"),
    ("test_parse_header", "other()", None),  # does not mention it
    ("it_works", "parse_header()", None),  # is not named after it
    ("test_header_parse", "parse_header()", None),
  ],
)
def test_a_test_is_linked_by_the_longest_name_that_it_has_and_mentions(test, text, expected):
  functions = {name: [Function("a.rs", place(name))] for name in ("parse", "parse_header", "parseHeader", "other")}
  found = link(place(test), "a.rs", text, functions)
  assert (found and found.place.name) == expected


def test_of_functions_of_one_name_the_nearest_is_linked():
  functions = {"f": [Function(name, place("f")) for name in ("a/x.rs", "b/deep/y.rs", "b/z.rs")]}
  assert link(place("test_f"), "b/deep/t.rs", "f()", functions).file == "b/deep/y.rs"


def git(root, *arguments):
  command = ["git", "-C", str(root), *ADA, "-c", "commit.gpgsign=false", *arguments]
  return subprocess.run(command, check=True, capture_output=True).stdout.decode()


@pytest.fixture
def repository(tree):
  git(tree, "init", "-q")
  git(tree, "add", "-A")
  git(tree, "commit", "-q", "-m", "Everything\n\nSigned-off-by: Ada Lovelace <ada@analytical.example>")
  parser = tree / "crates/sample0/src/parser.rs"
  parser.write_text(parser.read_text().replace("c == '{' ||", "c == '[' ||"))
  words = tree / "crates/sample0/src/words.rs"
  words.write_text(words.read_text().replace("WORD_0_7:", "WORD_0_SEVEN:"))
  git(tree, "commit", "-q", "-a", "-m", "Brackets begin a key\n\nThanks to @charles and ada@analytical.example.\n"
      "Co-authored-by: Charles Babbage <charles@analytical.example>")  # fmt: skip
  return tree


def test_commits_have_whole_changes_and_no_people(repository, build):
  options = {"kinds": {"file": 1.0, "commit": 1.0}, "validation_fraction": 0.0, "test_fraction": 0.0}
  output = build(repository, **options)
  rows = samples(output, "commit")
  text = rows[0]["text"]
  assert text.startswith("commit: Brackets begin a key\n\nThanks to")
  before, after = text.split("path: crates/sample0/src/parser.rs\nbefore:\n")[1].split("after:\n")[:2]
  assert "c == '{' ||" in before
  assert "c == '[' ||" in after
  assert before.count("\n") == 7
  assert rows[0]["meta"]["paths"] == ["crates/sample0/src/parser.rs", "crates/sample0/src/words.rs"]
  everything = "".join(row["text"] for row in rows).lower()
  assert not any(word in everything for word in ("ada", "lovelace", "charles", "babbage", "@analytical"))
  assert manifest(output)["git_commit"] == git(repository, "rev-parse", "HEAD").strip()


def test_changes_of_a_commit_are_parted_by_split(repository, build):
  output = build(repository, kinds={"commit": 1.0, "file": 1.0}, validation_fraction=0.5, test_fraction=0.2)
  rows = [*samples(output)]
  split_of = {row["meta"]["path"]: row["meta"]["split"] for row in rows if row["meta"]["kind"] == "file"}
  commits = [row for row in rows if row["meta"]["kind"] == "commit"]
  assert commits
  for row in commits:
    assert {split_of[path] for path in row["meta"]["paths"]} == {row["meta"]["split"]}


def test_commits_are_off_unless_asked_for_and_settings_of_the_user_change_nothing(repository, build, monkeypatch):
  assert not samples(build(repository), "commit")
  plain = list(read_commits(repository, 10))
  for key, value in {
    "diff.noprefix": "true", "color.ui": "always", "diff.external": "false", "log.showSignature": "true",
    "diff.context": "9", "diff.renames": "copies", "core.quotePath": "true", "log.date": "iso",
  }.items():  # fmt: skip
    git(repository, "config", key, value)
  assert list(read_commits(repository, 10)) == plain
  assert len(plain) == 2
  assert len(list(read_commits(repository, 1))) == 1


def test_a_folder_that_git_does_not_know_has_no_commit(tree, repository):
  (tree / "new").mkdir()
  assert head_commit(tree / "new") is None
  assert head_commit(tree / "crates") == git(repository, "rev-parse", "HEAD").strip()


def test_messages_lose_trailers_addresses_and_handles():
  message = (
    "Fix `a@b` parsing\n\nReported by Ada Lovelace <ada@x.org>, see @ada.\n\nSigned-off-by: Ada <ada@x.org>\nCc: Bob"
  )
  cleaned = without_people(message)
  assert cleaned.startswith("Fix `a@b` parsing\n\n")
  assert not any(word in cleaned for word in ("ada", "Ada", "Bob", "x.org"))
