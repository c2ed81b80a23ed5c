"""The samples that one file gives by itself; which split they are for is not known yet."""

import collections
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from ultrathink_jax.data.code.chunks import cut
from ultrathink_jax.data.code.fim import choose_middle, draw
from ultrathink_jax.data.code.items import Item, Parsed, Span, outermost, parse, parses_alone
from ultrathink_jax.data.code.languages import comment_format, find_language
from ultrathink_jax.data.code.options import CodeOptions
from ultrathink_jax.data.code.pieces import Pieces
from ultrathink_jax.data.code.tokens import TokenizerView, find_fim_tokens

_MAX_TOKEN_BYTES = 64  # on average over an item; one with more is too large without counting
_FIM_SLACK_TOKENS = 16  # a cut within a word makes more tokens of it


class Draft(NamedTuple):
  """A sample without its split: `fields` are text, or prompt and completion; `key` is the same for the same content.

  `item` is the kind of the item that it is about, `name` its qualified name, "" for samples of files.
  """

  kind: str
  fields: dict[str, str]
  span: Span
  tokens: int
  name: str = ""
  item: str = ""
  key: str = ""


class Place(NamedTuple):
  """Where a function stands, with its names and the header of its samples."""

  simple_name: str
  name: str
  item: str
  span: Span
  header: str


class FileDrafts(NamedTuple):
  """What a file gives.

  Attributes:
    tokens: of the whole file with its header.
    cuts: the stretches taken out of it because they are tests.
    functions, tests: for samples of kind test, whose functions may be in another file.
    num_items: by kind of item.
    left_out: how many samples were not made, by reason.
  """

  drafts: list[Draft]
  tokens: int
  cuts: tuple[Span, ...]
  imports: tuple[str, ...]
  functions: list[Place]
  tests: list[Place]
  num_items: dict[str, int]
  left_out: dict[str, int]
  has_errors: bool


def header(name: str, context: tuple[str, ...] = ()) -> str:
  """Returns the comment that begins a sample: the path, and what encloses the item."""
  comment = comment_format(name)
  lines = [f"path: {name}"] + [f"in: {' > '.join(context)}"] * bool(context)
  return "".join(comment.format(line) + "\n" for line in lines)


class Sampler:
  """Makes the samples of files."""

  def __init__(self, options: CodeOptions, tokenizer: TokenizerView):
    self._options = options
    self.count_tokens = tokenizer.count_tokens
    self._fim = find_fim_tokens(tokenizer.has_token)
    self._fim_tokens = self.count_tokens("".join(self._fim.spellings)) + _FIM_SLACK_TOKENS

  def sample(self, name: str, content: bytes) -> FileDrafts | str:
    """Returns what a file gives, or the reason why it gives nothing."""
    language = find_language(name)
    parsed = parse(language, content, name) if language else Parsed((), (), False)
    cuts = _test_cuts(content, parsed.items)
    if language and language.test_path.search(name):
      cuts = [(0, len(content))]
    if cuts and not Pieces(content, cuts).text(0, len(content)).strip():
      if self._options.tests == "drop":
        return "tests"
      cuts = []  # the file is tests as a whole, and stays whole
    file = _File(name, content, parsed, Pieces(content, () if self._options.tests == "keep" else cuts))
    left_out: collections.Counter[str] = collections.Counter()
    drafts = [draft for draft in self._drafts(file, left_out) if self._is_wanted(draft, name, left_out)]
    places = [
      (item, Place(item.simple_name, item.name, item.kind, item.span, header(name, item.context)))
      for item in parsed.items
      if item.is_function and item.body
    ]
    return FileDrafts(
      drafts=drafts,
      tokens=self.count_tokens(header(name) + file.text()),
      cuts=() if self._options.tests == "keep" else tuple(cuts),
      imports=parsed.imports,
      functions=[place for item, place in places if not item.test],
      tests=[place for item, place in places if item.test == "test" and self._options.tests != "drop"],
      num_items=dict(collections.Counter(item.kind for item in parsed.items)),
      left_out=dict(left_out),
      has_errors=parsed.has_errors,
    )

  def is_kept(self, kind: str, *where: object) -> bool:
    """Returns whether a sample is among the share of its kind that is kept."""
    return draw(self._options.seed, "share", kind, *where) < self._options.kinds.get(kind, 0.0)

  def make(self, kind: str, fields: dict[str, str], span: Span, **facts: Any) -> Draft:
    """Returns a draft with its tokens counted."""
    return Draft(kind, fields, span, sum(map(self.count_tokens, fields.values())), **facts)

  def fits(self, draft: Draft, left_out: collections.Counter[str]) -> bool:
    """Returns whether a sample has neither too few nor too many tokens; if not it is counted."""
    limit = self._options.repo_tokens if draft.kind == "repo" else self._options.max_tokens
    if self._options.min_tokens <= draft.tokens <= limit:
      return True
    left_out[f"{draft.kind}: too {'few' if draft.tokens < self._options.min_tokens else 'many'} tokens"] += 1
    return False

  def _is_wanted(self, draft: Draft, name: str, left_out: collections.Counter[str]) -> bool:
    if not self.is_kept(draft.kind, name, *draft.span):
      left_out[f"{draft.kind}: not in the share kept"] += 1
      return False
    return self.fits(draft, left_out)

  def _drafts(self, file: "_File", left_out: collections.Counter[str]) -> Iterator[Draft]:
    kinds = {kind for kind, share in self._options.kinds.items() if share > 0}
    if kinds & {"file", "chunk"}:
      yield from (draft for draft in self._whole(file) if draft.kind in kinds)
    if "fim" in kinds:
      yield from self._fill_in(file, left_out)
    if kinds & {"item", "complete", "doc"}:
      for item in file.parsed.items:
        if not (item.test and self._options.tests == "drop"):
          yield from (draft for draft in self._of_item(file, item, left_out) if draft.kind in kinds)

  def _whole(self, file: "_File") -> Iterator[Draft]:
    """Yields the file, or its chunks if it has too many tokens."""
    draft = self.make("file", {"text": header(file.name) + file.text()}, file.pieces.span)
    if draft.tokens <= self._options.max_tokens:
      yield draft
      return
    for span in self._windows(file, self._options.max_tokens, self._options.overlap_tokens):
      yield self.make("chunk", {"text": header(file.name) + file.pieces.text(*span)}, span)

  def _windows(self, file: "_File", max_tokens: int, overlap_tokens: int) -> Iterator[Span]:
    head = header(file.name)
    if self.count_tokens(head) > max_tokens // 2:
      return  # a path of thousands of characters
    boundaries = [item.span[0] for item in file.parsed.items]
    yield from cut(file.pieces, boundaries, head, max_tokens, overlap_tokens, self.count_tokens)

  def _fill_in(self, file: "_File", left_out: collections.Counter[str]) -> Iterator[Draft]:
    options, head, pieces = self._options, header(file.name), file.pieces
    if any(token in head + file.text() for token in self._fim.spellings):
      left_out["fim: the file spells its tokens"] += 1
      return
    bodies = [item.body for item in file.parsed.items if item.is_function and item.body]
    for start, stop in self._windows(file, max(options.max_tokens - self._fim_tokens, 1), 0):
      key = (options.seed, "fim", file.name, start, stop)
      level, middle = choose_middle(pieces, (start, stop), bodies, options.fim_levels, key)
      is_suffix_first = draw(*key, "order") < options.fim_spm_rate
      before = head + pieces.text(start, middle[0])
      prompt = self._fim.order(before, pieces.text(middle[1], stop), is_suffix_first)
      completion = pieces.text(*middle)
      if not completion.strip():
        left_out["fim: empty middle"] += 1
      elif options.fim_learned == "middle":
        yield self.make("fim", {"prompt": prompt, "completion": completion}, (start, stop), item=level)
      else:
        yield self.make("fim", {"text": prompt + completion}, (start, stop), item=level)

  def _of_item(self, file: "_File", item: Item, left_out: collections.Counter[str]) -> Iterator[Draft]:
    # A test is cut out of its file, and whole by itself.
    pieces = file.whole if item.test else file.pieces
    if item.span[1] - item.span[0] > _MAX_TOKEN_BYTES * self._options.max_tokens:
      left_out["item: too many tokens"] += 1
      return
    text, head = pieces.text(*item.span), header(file.name, item.context)
    if not text.strip():
      return
    facts = {"name": item.name, "item": item.kind, "key": hashlib.sha256(" ".join(text.split()).encode()).hexdigest()}
    whole = self.make("item", {"text": head + text}, item.span, **facts)
    if whole.tokens > self._options.max_tokens:
      left_out["item: too many tokens"] += 1
      return
    if not parses_alone(find_language(file.name), text.encode()):
      left_out["item: does not parse by itself"] += 1
      return
    yield whole
    if item.test:
      return
    if item.is_function and item.body:
      prompt = head + pieces.text(item.span[0], item.body[0])
      fields = {"prompt": prompt, "completion": pieces.text(item.body[0], item.span[1])}
      yield self.make("complete", fields, item.span, **facts)
    fields = self._documentation(file, item, head)
    if fields:
      yield self.make("doc", fields, item.span, **facts)

  def _documentation(self, file: "_File", item: Item, head: str) -> dict[str, str] | None:
    """Returns an item without its documentation, and the documentation."""
    if not item.docs:
      return None
    content, cuts, docs = file.content, [], []
    for start, stop in item.docs:
      line = content.rfind(b"\n", 0, start) + 1
      if item.span[0] <= line and not content[line:start].strip():
        start = line
      docs.append(content[start:stop].decode().rstrip("\n"))
      while stop < len(content) and content[stop : stop + 1].isspace() and content[stop - 1 : stop] != b"\n":
        stop += 1
      cuts.append((start, stop))
    code = Pieces(content, [*file.cuts, *cuts]).text(*item.span)
    if not parses_alone(find_language(file.name), code.encode()):
      return None  # nothing else was in the body
    cue = comment_format(file.name).format(f"documentation of {item.name}:")
    return {"prompt": f"{head}{code}\n\n{cue}\n", "completion": "\n".join(docs) + "\n"}


class _File(NamedTuple):
  name: str
  content: bytes
  parsed: Parsed
  pieces: Pieces

  @property
  def whole(self) -> Pieces:
    return Pieces(self.content)

  @property
  def cuts(self) -> list[Span]:
    edges = [0, *(edge for span in self.pieces.ranges for edge in span), len(self.content)]
    return [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]

  def text(self) -> str:
    return self.pieces.text(0, len(self.content))


def _test_cuts(content: bytes, items: tuple[Item, ...]) -> list[Span]:
  """Returns the spans of the tests, with the blank lines after them."""
  cuts = []
  for item in outermost([item for item in items if item.test]):
    start, stop = item.span
    while stop < len(content) and content[stop : stop + 1].isspace():
      stop += 1
    line = content.rfind(b"\n", 0, stop) + 1  # the indentation of what follows stays
    cuts.append((start, max(line, item.span[1]) if stop < len(content) else stop))
  return cuts
