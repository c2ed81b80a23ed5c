"""Malformed inputs: how each is made, what a strict run says of it, and how many entries a lenient one leaves out."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from pyarrow import parquet

NUM_GOOD = 8
GOOD = [json.dumps({"text": f"def alpha_{i}(self): return beta() + {i}\n"}).encode() for i in range(NUM_GOOD)]
HELLO = {"role": "user", "content": "Hello?"}
YES = {"role": "assistant", "content": "Yes."}
SYSTEM = {"role": "system", "content": "Be kind."}


class Case(NamedTuple):
  """A malformed input.

  Attributes:
    make: puts files into a folder and returns the keys of the section `data` that name them.
    says: found in what a strict run ends with; "" where nothing is wrong after all.
    left_out: how many entries a lenient run leaves out beside NUM_GOOD good ones; None: it ends as a strict one does.
    exit_code: of the runs that end.
  """

  name: str
  make: Callable[[Path], dict[str, Any]]
  says: str
  left_out: int | None = None
  exit_code: int = 3


def line(name: str, bad: bytes | Any, says: str, **changes: Any) -> Case:
  """Returns the case of one bad line, the third, among good ones; what is not bytes is written as JSON."""
  bad = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
  content = b"\n".join([*GOOD[:2], bad, *GOOD[2:]]) + b"\n"
  return Case(name, file("x.jsonl", content, "jsonl", **changes), f"x.jsonl:3: {says}", 1)


def field(name: str, value: Any, says: str, **changes: Any) -> Case:
  return line(name, value, says, **changes)


def file(name: str, content: bytes, kind: str, **changes: Any) -> Callable[[Path], dict[str, Any]]:
  def make(folder: Path) -> dict[str, Any]:
    (folder / name).write_bytes(content)
    return {"source": f"{kind}:{folder / name}", **changes}

  return make


def lines_file(name: str, content: bytes, says: str, left_out: int | None = None) -> Case:
  return Case(name, file("x.jsonl", content, "jsonl"), says, left_out)


def whole(name: str, path: str, content: bytes, kind: str, says: str) -> Case:
  """Returns the case of a file that cannot be read at all, or not to its end."""
  return Case(name, file(path, content, kind), says)


def in_folder(name: str, says: str, left_out: int | None, add: Callable[[Path], Any], kind: str = "text") -> Case:
  """Returns the case of a folder of good files to which `add` adds something."""

  def make(folder: Path) -> dict[str, Any]:
    for number, content in enumerate(GOOD):
      (folder / f"good{number}.txt").write_bytes(content)
    add(folder)
    return {"source": f"{kind}:{folder}"}

  return Case(name, make, says, left_out)


def at(name: str, says: str, add: Callable[[Path], Any], kind: str = "jsonl") -> Case:
  """Returns the case of a source that is whatever `add` puts at a path."""

  def make(folder: Path) -> dict[str, Any]:
    add(folder / "x")
    return {"source": f"{kind}:{folder / 'x'}"}

  return Case(name, make, says)


def config(name: str, says: str, exit_code: int = 2, **changes: Any) -> Case:
  """Returns the case of good lines with settings that are wrong; FOLDER stands for the folder they lie in."""

  def make(folder: Path) -> dict[str, Any]:
    (folder / "x.jsonl").write_bytes(b"\n".join(GOOD))
    fill = lambda value: value.replace("FOLDER", str(folder)) if isinstance(value, str) else value
    filled = {key: tuple(map(fill, v)) if isinstance(v, tuple) else fill(v) for key, v in changes.items()}
    return {"source": f"jsonl:{folder / 'x.jsonl'}"} | filled

  return Case(name, make, says, exit_code=exit_code)


def beside(name: str, says: str, key: str, path: str, content: bytes, exit_code: int) -> Case:
  """Returns the case of good lines and a file that another key names."""

  def make(folder: Path) -> dict[str, Any]:
    (folder / "x.jsonl").write_bytes(b"\n".join(GOOD))
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_bytes(content)
    return {"source": f"jsonl:{folder / 'x.jsonl'}", key: str(folder / path)}

  return Case(name, make, says, exit_code=exit_code)


def template(name: str, source: str, says: str) -> Case:
  """Returns the case of a chat template."""
  return beside(name, says, "chat_template", "chat.jinja", source.encode(), 2)


def numbers(name: str, text: str) -> Case:
  """Returns the case of a text that is no token numbers below 512, for the tokenizer that reads those."""

  def make(folder: Path) -> dict[str, Any]:
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({"numbers": 512}))
    texts = [f"{i} 7 9" for i in range(2, 2 + NUM_GOOD)]
    texts.insert(2, text)
    (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"source": f"jsonl:{folder / 'x.jsonl'}", "tokenizer": str(folder / "tokenizer")}

  return Case(name, make, "x.jsonl:3: the numbers tokenizer cannot read", 1)


def columns(name: str, says: str, left_out: int | None, **values: Any) -> Case:
  """Returns the case of a Parquet file."""

  def make(folder: Path) -> dict[str, Any]:
    parquet.write_table(pyarrow.table(values), folder / "x.parquet")
    return {"source": f"parquet:{folder / 'x.parquet'}"}

  return Case(name, make, says, left_out)


def records(name: str, says: str, left_out: int | None, contents: list[bytes], keep: float = 1.0) -> Case:
  """Returns the case of an ArrayRecord file, of which only a part is there."""

  def make(folder: Path) -> dict[str, Any]:
    write_records(folder / "x.array_record", contents)
    size = (folder / "x.array_record").stat().st_size
    os.truncate(folder / "x.array_record", int(size * keep))
    return {"source": f"arrayrecord:{folder / 'x.array_record'}"}

  return Case(name, make, says, left_out)


def write_records(path: Path, contents: list[bytes]) -> None:
  from array_record.python.array_record_module import ArrayRecordWriter

  writer = ArrayRecordWriter(str(path), "group_size:1")
  for content in contents:
    writer.write(content)
  writer.close()


def zstd(content: bytes) -> bytes:
  return pyarrow.compress(content, "zstd", asbytes=True)


def parquet_bytes() -> bytes:
  sink = pyarrow.BufferOutputStream()
  parquet.write_table(pyarrow.table({"text": [f"alpha {i}" * 20 for i in range(99)]}), sink)
  return sink.getvalue().to_pybytes()


def _damaged_gzip() -> bytes:
  content = bytearray(gzip.compress(ALL))
  content[-6] ^= 1  # of the check sum
  return bytes(content)


def _numbered_links(folder: Path) -> None:
  (folder / "a.txt").symlink_to(folder / "b.txt")
  (folder / "b.txt").symlink_to(folder / "a.txt")


def _unfinished_tfds(path: Path) -> None:
  (path / "1.0.0").mkdir(parents=True)
  (path / "1.0.0" / "x-train.array_record-00000-of-00001").write_bytes(b"")


def _damaged_tfds(path: Path) -> None:
  path.mkdir()
  (path / "dataset_info.json").write_text('{"name": ')


def chat(*messages: Any) -> dict[str, Any]:
  return {"messages": list(messages)}


ALL = b"\n".join(GOOD) + b"\n"
NESTED = b"[" * 100_000
TEXTS = [json.loads(good)["text"] for good in GOOD]
LATIN = pyarrow.array([*(text.encode() for text in TEXTS), b"\xe9"]).view(pyarrow.string())
CHOICE = {"prompt": "Why? ", "chosen": "So.", "rejected": "No."}

LINES = [
  line("not json", b'{"text": }', "is not JSON"),
  line("half a line", b'{"text": "alph', "is not JSON"),
  line("single quotes", b"{'text': 'alpha'}", "is not JSON"),
  line("two objects on a line", GOOD[0] + GOOD[1], "is not JSON"),
  line("words after the object", GOOD[0] + b" // alpha", "is not JSON"),
  line("not utf8", b'{"text": "alpha \xff beta"}', "is not UTF-8: byte 0xff at position 16"),
  line("utf8 cut inside a character", b'{"text": "alpha \xc3"}', "is not UTF-8"),
  line("latin1", '{"text": "née"}'.encode("latin-1"), "is not UTF-8"),
  line("byte order mark in the middle", b"\xef\xbb\xbf" + GOOD[0], "is not JSON"),
  line("nul in a line", b'{"text": "alp\0ha"}', "is not JSON"),
  line("nul line", b"\0" * 50, "is not JSON"),
  line("escaped nul in a text", {"text": "alp\0ha"}, "text holds a NUL character at position 3"),
  line("lone surrogate", b'{"text": "alpha \\ud800"}', "text holds half a character"),
  line("deep list", NESTED, "is nested too deeply"),
  line("deep list that ends", NESTED + b"]" * 100_000, "is nested too deeply"),
  line("deep object", b'{"text": ' * 100_000, "is nested too deeply"),
  line("deep list in a field", b'{"text": "a", "x": ' + NESTED + b"]" * 100_000 + b"}", "is nested too deeply"),
  line("a list", b'["alpha"]', "is a list, not an object"),
  line("a string", b'"alpha"', "is a string, not an object"),
  line("a number", b"17", "is a number, not an object"),
  line("null", b"null", "is null, not an object"),
  line("the same key twice", b'{"text": "alpha", "text": "beta"}', "has the key 'text' twice"),
  line("the same key twice inside", b'{"text": "alpha", "x": {"y": 1, "y": 2}}', "has the key 'y' twice"),
  line("not a number", b'{"text": "alpha", "x": NaN}', "holds NaN"),
  line("infinity", b'{"text": "alpha", "x": [Infinity]}', "holds Infinity"),
  line("minus infinity", b'{"text": "alpha", "x": -Infinity}', "holds -Infinity"),
  line("number of ten thousand digits", b'{"text": "a", "x": ' + b"9" * 10_000 + b"}", "holds a number of too many"),
  lines_file("half a line at the end", ALL + GOOD[0][:9], "x.jsonl:9: is not JSON", 1),
  lines_file("byte order mark at the start", b"\xef\xbb\xbf" + ALL, "", 0),
  lines_file("carriage returns", ALL.replace(b"\n", b"\r\n"), "", 0),
  lines_file("blank lines", ALL.replace(b"\n", b"\n\n \t\n"), "", 0),
  lines_file("no line end at the end", ALL.rstrip(), "", 0),
  lines_file("utf16", ALL.decode().encode("utf-16"), "x.jsonl:1: is not UTF-8"),
  lines_file("random bytes", np.random.default_rng(0).bytes(9999), "x.jsonl:1: is not UTF-8"),
]

FIELDS = [
  field("text is a number", {"text": 17}, "text is a number, not a string"),
  field("text is null", {"text": None}, "text is null, not a string"),
  field("text is a list", {"text": ["alpha"]}, "text is a list, not a string"),
  field("text is an object", {"text": {"text": "alpha"}}, "text is an object, not a string"),
  field("text is empty", {"text": ""}, "text is empty"),
  field("text is missing", {"txt": "alpha"}, "has the fields 'txt'"),
  field("text is missing where it is asked for", {"txt": "a"}, "lacks 'text'; did you mean 'txt'", format="text"),
  field("no fields", {}, "has no fields"),
  field("a name with line ends", {"a\nb": 1}, r"has the fields 'a\nb'"),
  field("a name of a million characters", {"a" * 1_000_000: 1}, "has the fields 'aaa"),
  field("messages are a string", {"messages": "alpha"}, "messages is a string, not a list"),
  field("no messages", chat(), "messages is an empty list"),
  field("a message is a string", chat("alpha", YES), "messages[0] is a string, not an object"),
  field("a message lacks its content", chat({"role": "user"}, YES), "messages[0] lacks 'content'"),
  field("a message lacks its role", chat({"content": "?"}, YES), "messages[0] lacks 'role'"),
  field("a content is null", chat({"role": "user", "content": None}, YES), "messages[0].content is null"),
  field("a role that is unknown", chat(HELLO, {"role": "robot", "content": "?"}), "messages[1] has the role 'robot'"),
  field("a role that is a list", chat({"role": [], "content": "?"}), "messages[0] has the role []"),
  field("the assistant begins", chat(YES, HELLO, YES), "messages[0] has the role 'assistant' at the start"),
  field("two questions", chat(HELLO, HELLO, YES), "messages[1] has the role 'user' after 'user'"),
  field("system in the middle", chat(HELLO, SYSTEM, YES), "messages[1] has the role 'system' after 'user'"),
  field("the user has the last word", chat(HELLO, YES, HELLO), "messages ends with the role 'user'"),
  field("a picture", chat({"role": "user", "content": [{"type": "image"}]}, YES), "a message holds 'image'"),
  field("a reserved character", chat({"role": "user", "content": "\ufdd0"}, YES), "messages[0] holds a character"),
  field("no completion", {"prompt": "Why?"}, "has the fields 'prompt'; expected"),
  field("an empty completion", {"prompt": "Why?", "completion": ""}, "completion is empty"),
  field("a prompt that is a number", {"prompt": 1, "completion": "a"}, "prompt is a number"),
  field("chosen is empty", CHOICE | {"chosen": ""}, "chosen is empty"),
  field("rejected is empty", CHOICE | {"rejected": []}, "rejected is empty"),
  field("rejected is null", CHOICE | {"rejected": None}, "rejected is null"),
  field("chosen equals rejected", CHOICE | {"chosen": "No."}, "chosen and rejected are equal"),
  field("chosen is a text, rejected messages", CHOICE | {"rejected": [YES]}, "chosen is a string, but rejected"),
  field("the prompt is null", CHOICE | {"prompt": None}, "prompt is null"),
  field(
    "conversations without a prompt in common",
    {"chosen": [HELLO, YES], "rejected": [HELLO | {"content": "!"}, YES]},
    "chosen and rejected begin with no prompt",
  ),
  field("a label that is a string", {"prompt": "Why? ", "completion": "So.", "label": "yes"}, "label is a string"),
]

FILES = [
  at("nothing there", "x", lambda path: None),
  at("an empty file", "empty", lambda path: path.write_bytes(b"")),
  at("an empty folder", "names no file", lambda path: path.mkdir()),
  at("a folder of other files", "names no file", lambda path: (path.mkdir(), (path / "a.csv").write_text("a"))),
  at("a link to itself", "leads back to itself", lambda path: path.symlink_to(path)),
  at("a link to nothing", "link to nothing", lambda path: path.symlink_to("nothing")),
  at("a pipe", "is a pipe", os.mkfifo),
  at("a pipe as a text", "is a pipe", os.mkfifo, "text"),
  at("a pipe as parquet", "is a pipe", os.mkfifo, "parquet"),
  at("a folder as a tokenized data set", "holds no dataset_info.json", lambda path: path.mkdir(), "tfds"),
  at("a file as a data set", "is no folder", lambda path: path.write_text("a"), "tfds"),
  at("a data set without metadata", "holds no dataset_info.json", _unfinished_tfds, "tfds"),
  at("a data set with damaged metadata", "is no readable data set", _damaged_tfds, "tfds"),
  in_folder("a pipe in a folder", "pipe.txt: is a pipe", 1, lambda folder: os.mkfifo(folder / "pipe.txt")),
  in_folder("links in a circle", "a.txt: is a link that leads back", 2, _numbered_links),
  in_folder("a link to nothing in a folder", "a.txt: is a link to nothing", 1, lambda f: (f / "a.txt").symlink_to("?")),
  in_folder("a link to the folder it is in", "", 0, lambda folder: (folder / "loop").symlink_to(folder)),
  in_folder("an empty file in a folder", "", 0, lambda folder: (folder / "empty.txt").write_text("")),
  in_folder("a text with nul", "a.txt: holds NUL", 1, lambda folder: (folder / "a.txt").write_bytes(b"a\0b")),
  in_folder("a text that is not utf8", "a.txt: is not UTF-8", 1, lambda f: (f / "a.txt").write_bytes(b"alpha \xff")),
  whole("gzip cut short", "x.jsonl.gz", gzip.compress(ALL)[:-20], "jsonl", "x.jsonl.gz cannot be read"),
  whole("gzip with a wrong check sum", "x.jsonl.gz", _damaged_gzip(), "jsonl", "x.jsonl.gz cannot be read"),
  whole("plain lines called gzip", "x.jsonl.gz", ALL, "jsonl", "x.jsonl.gz cannot be read"),
  whole("zstd cut short", "x.jsonl.zst", zstd(ALL)[:-20], "jsonl", "x.jsonl.zst cannot be read"),
  whole("plain lines called zstd", "x.jsonl.zst", ALL, "jsonl", "x.jsonl.zst cannot be read"),
  whole("gzip called lines", "x.jsonl", gzip.compress(ALL), "jsonl", "x.jsonl:1: is not UTF-8"),
  whole("a list that is cut short", "x.json", b"[" + GOOD[0] + b", ", "jsonl", "after item 0"),
  whole("a list without commas", "x.json", b"[" + GOOD[0] + GOOD[1] + b"]", "jsonl", "after item 0"),
  whole("a list that goes on", "x.json", b"[" + GOOD[0] + b"] 5", "jsonl", "goes on after the end of its list"),
  whole("a list that is not utf8", "x.json", b"[" + GOOD[0] + b', "\xff"]', "jsonl", "x.json is not UTF-8"),
  Case(
    "a list with a number in it",
    file("x.json", b"[" + b",".join([*GOOD[:2], b"5", *GOOD[2:]]) + b"]", "jsonl"),
    "x.json#2: is a number, not an object",
    1,
  ),
  whole("parquet cut short", "x.parquet", parquet_bytes()[:-50], "parquet", "x.parquet is no readable Parquet file"),
  whole("parquet without its start", "x.parquet", parquet_bytes()[200:], "parquet", "x.parquet is no readable Parquet"),
  whole("lines called parquet", "x.parquet", ALL, "parquet", "x.parquet is no readable Parquet file"),
  columns("parquet without rows", "too few", None, text=pyarrow.array([], pyarrow.string())),
  columns("parquet without the field", "x.parquet#0: has the fields 'txt'", None, txt=TEXTS),
  columns("parquet of numbers", "x.parquet#0: text is a number", None, text=[1, 2]),
  columns("parquet with null", "x.parquet#8: text is null", 1, text=[*TEXTS, None]),
  columns("parquet that is not utf8", "x.parquet#8: is not UTF-8: byte 0xe9", 1, text=LATIN),
  records("records cut short", "no readable ArrayRecord", None, GOOD, keep=0.6),
  records("records without their end", "no readable ArrayRecord", None, GOOD, keep=0.99),
  records("a record that is no object", "x.array_record#8: is a number", 1, [*GOOD, b"5"]),
  records("a record that is not json", "x.array_record#8: is not JSON", 1, [*GOOD, b"{"]),
  records("a record that is not utf8", "x.array_record#8: is not UTF-8", 1, [*map(str.encode, TEXTS), b"\xff"]),
  whole("lines called records", "x.array_record", ALL, "arrayrecord", "no readable ArrayRecord"),
  whole("records of nothing", "x.array_record", b"", "arrayrecord", "x.array_record"),
]

SETTINGS = [
  config("an unknown source", "did you mean 'jsonl'", source="jsonll:FOLDER/x.jsonl"),
  config("a path without its kind", "text:PATH", source="FOLDER/x.jsonl"),
  config("a source without a path", "lacks a path", source="jsonl:"),
  config("a weight that is a word", "is not a number of 0 or more", mixture=("jsonl:FOLDER/x.jsonl=much",)),
  config("a weight below nothing", "is not a number of 0 or more", mixture=("jsonl:FOLDER/x.jsonl=-1",)),
  config("a weight that is not a number", "is not a number of 0 or more", mixture=("jsonl:FOLDER/x.jsonl=nan",)),
  config("a weight without end", "is not a number of 0 or more", mixture=("jsonl:FOLDER/x.jsonl=inf",)),
  config("a source without a weight", "where 'stdlib' is not a number", mixture=("stdlib",)),
  config("a source twice", "names a source twice", mixture=("stdlib=1", "stdlib=2")),
  config("an unknown source in a mixture", "is not one of", mixture=("jsonl:FOLDER/x.jsonl=1", "stdlb=1")),
  config("a source of a mixture that is not there", "nothing.jsonl", 3, mixture=("jsonl:FOLDER/nothing.jsonl=1",)),
  config("too few weights in a stage", "2 sources", mixture=("stdlib=1", "synthetic=1"), stages=("5:1",)),
  config("stages that go back", "rising order", stages=("9:1", "5:1")),
  config("a stage without a step", "does not begin with a step", stages=("soon:1",)),
  config("a length of nothing", "not a number of tokens", length_stages=("0:0",)),
  config("a share above one", "validation_fraction", validation_fraction=1.5),
  config("an unknown format", "format", format="txt"),
  config("an unknown policy", "on_error", on_error="ignore"),
  config("a tokenizer that is not there", "cannot be read", 3, tokenizer="FOLDER/nothing.model"),
  config("a misspelt tokenizer", "did you mean 'unigram'", tokenizer="unigrm"),
  config("numbers for texts", "reads the synthetic source only", tokenizer="numbers"),
  config("a folder as a tokenizer", "cannot be read", 3, tokenizer="FOLDER"),
  config("a template that is not there", "nothing.jinja", chat_template="FOLDER/nothing.jinja"),
  beside("a broken model", "is not a SentencePiece model", "tokenizer", "x.model", b"\x0a\xffabc", 3),
  beside("an empty model", "x.model", "tokenizer", "x.model", b"", 3),
  beside("a broken tokenizer.json", "tokenizers library", "tokenizer", "tokenizer.json", b'{"version": ', 3),
  beside("a tokenizer.json of nothing", "tokenizers library", "tokenizer", "tokenizer.json", b"{}", 3),
  beside("a tokenizer.json that is a list", "tokenizer", "tokenizer", "tokenizer.json", b"[1]", 3),
  numbers("an id beyond the vocabulary", "5 512"),
  numbers("a negative id", "5 -7"),
  numbers("an id that is a special token", "5 1"),
  numbers("an id that is no number", "5 five"),
  numbers("an id of ten thousand digits", "9" * 10_000),
  template("a template that does not end", "{% for m in messages %}", "chat.jinja"),
  template("a template that reads classes", "{{ ''.__class__.__mro__ }}", "chat.jinja"),
  template("a template that reads globals", "{{ messages.__init__.__globals__ }}", "chat.jinja"),
  template("a template that formats", "{{ '{0.__class__}'.format(messages) }}", "chat.jinja"),
  template(
    "a template that loops", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", ""
  ),
  template("a template that calls itself", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "chat.jinja"),
  template("a template that prints too much", "{{ 'a' * 99999999999 }}", "chat.jinja"),
  template("a template that computes too much", "{{ 9 ** 9 ** 9 }}", "chat.jinja"),
  template("a template that refuses", "{{ raise_exception('no') }}", "chat.jinja"),
  template("a template that includes", "{% include '/etc/passwd' %}", "chat.jinja"),
  template("a template that says nothing", "alpha", "chat.jinja"),
  beside("a template that is not utf8", "chat.jinja", "chat_template", "chat.jinja", b"\xff\xfe", 2),
]

CASES = LINES + FIELDS + FILES + SETTINGS


def large(name: str, path: str, write: Callable[[Path], Any], kind: str, says: str, left_out: int | None) -> Case:
  """Returns the case of a large file that `write` fills."""

  def make(folder: Path) -> dict[str, Any]:
    write(folder / path)
    return {"source": f"{kind}:{folder / path}"}

  return Case(name, make, says, left_out)


def _with_line(length: int, bad: bytes) -> Callable[[Path], Any]:
  return lambda path: path.write_bytes(b"\n".join([*GOOD[:2], bad * length, *GOOD[2:]]))


def _repeated(pack: Callable[[bytes], bytes], content: bytes) -> Callable[[Path], Any]:
  """Returns what writes a file that unpacks to 4 GiB, as 64 parts put together."""
  return lambda path: path.write_bytes(pack(content * (MIB * 64 // len(content))) * 64)


def _huge_cell(path: Path) -> None:
  parquet.write_table(pyarrow.table({"text": [*TEXTS, "alpha " * (12 * MIB)]}), path, compression="zstd")


def _huge_record(path: Path) -> None:
  write_records(path, [*GOOD, b'{"text": "' + b"alpha " * (12 * MIB) + b'"}'])


MIB = 1024 * 1024
# Each takes a second or more, and would take gigabytes if it were read as it comes.
LARGE = [
  large("a line of 100 MB", "x.jsonl", _with_line(100_000_000, b"a"), "jsonl", "x.jsonl:3: is longer than", 1),
  large("30 MB of brackets", "x.jsonl", _with_line(30_000_000, b"["), "jsonl", "x.jsonl:3: holds more than", 1),
  large("30 MB of numbers", "x.jsonl", _with_line(15_000_000, b"1,"), "jsonl", "x.jsonl:3: holds more than", 1),
  large(
    "one item of 100 MB", "x.json", lambda path: path.write_bytes(b'["' + b"a" * 100_000_000), "jsonl", "item", None
  ),
  large("4 GiB of gzip", "x.jsonl.gz", _repeated(gzip.compress, b"\0"), "jsonl", "is not JSONL", None),
  large("4 GiB of zstd", "x.jsonl.zst", _repeated(zstd, b"a"), "jsonl", "is not JSONL", None),
  large("a text of 4 GiB of gzip", "x.gz", _repeated(gzip.compress, b"\0"), "text", "x.gz#0: holds NUL", None),
  large("a cell of 75 MB", "x.parquet", _huge_cell, "parquet", "x.parquet#8: is longer than", 1),
  large("a record of 75 MB", "x.array_record", _huge_record, "arrayrecord", "x.array_record#8: is longer than", 1),
]
