"""The items of a source file, functions, types, modules and so on, found in the syntax tree by the language's table."""

import functools
import importlib
import re
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import psutil
import tree_sitter

from ultrathink_jax.data.code.languages import LANGUAGES, Language, Rule
from ultrathink_jax.errors import ConfigError

_MAX_HEADING_CHARS = 200
# Some texts that are not of the language at all take a parser gigabytes, hours or the whole stack. Others never come
# near these limits: of 12000 files none was more repetitive than 20, and a line a thousand times over is 40 at least.
_MAX_SECONDS = 5.0  # of processor time
_MAX_MEMORY_BYTES = 256 * 1024 * 1024
_USUAL_SECONDS = 0.5  # a file of a mebibyte takes half of it
_BLOCK_BYTES = 64 * 1024
_MAX_BYTES = 512 * 1024
_MAX_REPETITION = 40
_MAX_NESTING = 10_000  # of brackets, which is more than anybody writes, << and >> included
_BRACKETS = np.zeros(256, np.int8)
_BRACKETS[list(b"([{<")], _BRACKETS[list(b")]}>")] = 1, -1
_MAX_DEPTH = 64  # of items in items; what is nested deeper, which nobody writes, would take quadratic memory
_FUNCTION_KINDS = ("function", "method")
_MODULE_KINDS = ("mod",)  # functions in these are no methods
_STRING = re.compile(r'"[^"\n]*"')
_LINE_COMMENT = re.compile(r"^\s*(?://|#(?!\s*\[)).*$", re.MULTILINE)
_WORD = re.compile(r"\w+")

Span = tuple[int, int]  # bytes of a file, from and to


class Item(NamedTuple):
  """An item in a file.

  Attributes:
    kind: function, method, struct, enum, union, trait, impl, mod, const, static, type, macro, class or interface.
    name: qualified by what encloses it.
    context: the first lines of what encloses it, outermost first, without their bodies.
    span: with the comments and attributes before it, and the indentation of its first line.
    docs: of the comments that document it, or of its docstring.
    body: of a function that has one: everything after the signature, or after the docstring.
    test: "test" for a test function, "support" for what else is there for tests, "" for the rest.
  """

  kind: str
  name: str
  context: tuple[str, ...]
  span: Span
  docs: tuple[Span, ...]
  body: Span | None
  test: str

  @property
  def is_function(self) -> bool:
    return self.kind in _FUNCTION_KINDS

  @property
  def simple_name(self) -> str:
    """The name without what encloses it."""
    return _WORD.findall(self.name)[-1] if _WORD.search(self.name) else self.name


class Parsed(NamedTuple):
  """What the grammar says about a file; with errors in it there are no items. `imports` are names of modules."""

  items: tuple[Item, ...]
  imports: tuple[str, ...]
  has_errors: bool


class _Scope(NamedTuple):
  """Nodes that follow one another in what the enclosing items, `names`, `context` and `test`, hold."""

  nodes: Sequence[tree_sitter.Node]
  names: tuple[str, ...] = ()
  context: tuple[str, ...] = ()
  is_class: bool = False
  is_test: bool = False
  wrapper: tree_sitter.Node | None = None  # the outermost of those that belong to the only item in here
  leading: tuple[tree_sitter.Node, ...] = ()  # comments and attributes before it


def parse(language: Language, content: bytes, path: str) -> Parsed:
  """Returns the items of a file in the order of their starts, those that enclose others first."""
  root = syntax(language, content)
  if root is None:
    return Parsed((), (), has_errors=True)
  finder = _Finder(language, content)
  finder.find(root, bool(language.test_path.search(path)))
  items = () if root.has_error else tuple(sorted(finder.items, key=lambda item: (item.span[0], -item.span[1])))
  return Parsed(items, tuple(dict.fromkeys(finder.imports)), root.has_error)


def parses_alone(language: Language, text: bytes) -> bool:
  """Returns whether an item is whole by itself, or as the member of a class where the grammar wants one."""
  texts = [text + b"\n"]
  if language.shell is not None:
    before, after = (part.encode() for part in language.shell)
    texts.append(before + b"\n" + text + b"\n" + after)
  roots = (syntax(language, each) for each in texts)
  return any(root is not None and not root.has_error for root in roots)


def syntax(language: Language, content: bytes) -> tree_sitter.Node | None:
  """Returns the root of the syntax tree, or None for texts that would take all of a parser's time, memory or stack."""
  if len(content) > _MAX_BYTES or _nesting(content) > _MAX_NESTING or _repetition(content) > _MAX_REPETITION:
    return None
  parser = _parser(language.name)
  start, used_bytes = time.thread_time(), []

  def is_lost(offset: int, has_error: bool) -> bool:
    seconds = time.thread_time() - start
    if seconds < _USUAL_SECONDS:
      return False
    used_bytes.append(psutil.Process().memory_info().rss)
    return seconds > _MAX_SECONDS or used_bytes[-1] - used_bytes[0] > _MAX_MEMORY_BYTES

  try:
    tree = parser.parse(lambda offset, point: content[offset : offset + _BLOCK_BYTES], progress_callback=is_lost)
  except ValueError:  # stopped
    parser.reset()
    return None
  return tree.root_node


def _nesting(content: bytes) -> int:
  """Returns by how much opening brackets outnumber closing ones where it is most, wherever they stand."""
  return int(_BRACKETS[np.frombuffer(content, np.uint8)].cumsum(dtype=np.int64).max(initial=0))


def _repetition(content: bytes) -> float:
  """Returns how many times smaller a text becomes by compression."""
  return len(content) / len(zlib.compress(content, level=1))


@functools.cache
def _parser(name: str) -> tree_sitter.Parser:
  module, function = LANGUAGES[name].grammar
  try:
    grammar = importlib.import_module(module)
  except ImportError as error:
    package = module.replace("_", "-")
    raise ConfigError(
      f"the grammar of {name} is not installed; run pip install {package}, or leave {name} out"
    ) from error
  return tree_sitter.Parser(tree_sitter.Language(getattr(grammar, function)()))


class _Finder:
  """Collects items and imports; nesting costs no Python stack."""

  def __init__(self, language: Language, content: bytes):
    self._language = language
    self._content = content
    self.items: list[Item] = []
    self.imports: list[str] = []
    self._scopes: list[_Scope] = []

  def find(self, root: tree_sitter.Node, is_test: bool) -> None:
    self._scopes = [_Scope(root.children, is_test=is_test)]
    while self._scopes:
      self._visit(self._scopes.pop())

  def _visit(self, scope: _Scope) -> None:
    language = self._language
    leading: list[tree_sitter.Node] = []
    last_row = -1  # of what came before the comments
    for node in scope.nodes:
      if node.type in language.comments or node.type in language.attributes:
        if node.type in language.comments and node.start_point.row == last_row:
          continue  # belongs to what stands on the same line
        if leading and self._is_apart(leading[-1], node):
          leading = [each for each in leading if each.type in language.attributes]
        leading.append(node)
        continue
      if leading and self._is_apart(leading[-1], node):
        leading = [each for each in leading if each.type in language.attributes]
      self._enter(node, scope, tuple(leading))
      leading = []
      last_row = node.end_point.row

  def _enter(self, node: tree_sitter.Node, scope: _Scope, leading: tuple[tree_sitter.Node, ...]) -> None:
    language = self._language
    if node.type in language.imports and not (node.type in language.items and node.child_by_field_name("body")):
      for match in language.module.finditer(self._text(node)):
        self.imports.append(next(group for group in match.groups() if group))
    rule = language.items.get(node.type)
    if rule and self._fits(node, rule):
      self._add(node, rule, scope, leading)
    elif node.type in language.wrappers:
      inner = [child for child in node.children if child.type in language.items or child.type in language.wrappers]
      if len(inner) == 1:
        self._scopes.append(
          scope._replace(nodes=inner, wrapper=scope.wrapper or node, leading=scope.leading or leading)
        )
      else:
        self._scopes.append(scope._replace(nodes=inner))
    elif node.type in language.transparent:
      self._scopes.append(scope._replace(nodes=node.children))

  def _fits(self, node: tree_sitter.Node, rule: Rule) -> bool:
    """Returns whether a node defines something, rather than naming it."""
    if not rule.values:
      needs_body = rule.needs_body or rule.kind in _FUNCTION_KINDS
      return not needs_body or node.child_by_field_name(rule.body) is not None
    value = node.child_by_field_name("value")
    return value is not None and value.type in rule.values

  def _add(self, node: tree_sitter.Node, rule: Rule, scope: _Scope, leading: tuple[tree_sitter.Node, ...]) -> None:
    language = self._language
    leading, outer = scope.leading or leading, scope.wrapper or node
    holder = node.child_by_field_name("value") if rule.values else node
    body = holder.child_by_field_name(rule.body)
    kind = "method" if rule.kind == "function" and scope.is_class else rule.kind
    simple_name = self._name(node, rule)
    names = (*scope.names, simple_name)
    heading = self._heading(outer, body)
    head = "\n".join([*(self._text(each) for each in leading if each.type in language.attributes), heading])
    docstring = self._docstring(body) if language.has_docstrings and body else None
    docs = tuple((each.start_byte, each.end_byte) for each in leading if language.docs.match(self._text(each)))
    test = self._test(kind, simple_name, head, scope.is_test)
    self.items.append(
      Item(
        kind=kind,
        name=language.separator.join(names),
        context=scope.context,
        span=self._span(leading[0] if leading else outer, outer),
        docs=(docstring,) if docstring else docs,
        body=self._body(holder, body, docstring) if kind in _FUNCTION_KINDS and body else None,
        test=test,
      )
    )
    if node.type in language.containers and body is not None and len(names) < _MAX_DEPTH:
      inner = _Scope(
        nodes=body.children,
        names=names,
        context=(*scope.context, heading),
        is_class=rule.kind not in _MODULE_KINDS,
        is_test=bool(test),
      )
      self._scopes.append(inner)

  def _test(self, kind: str, name: str, head: str, is_test: bool) -> str:
    language = self._language
    code = _STRING.sub('""', _LINE_COMMENT.sub("", head))
    if kind in _FUNCTION_KINDS:
      by_head = language.test_head and language.test_head.search(code)
      if by_head or (language.test_name and language.test_name.search(name)):
        return "test"
    in_scope = language.test_scope and language.test_scope.search(code)
    return "support" if is_test or in_scope else ""

  def _name(self, node: tree_sitter.Node, rule: Rule) -> str:
    name = node.child_by_field_name(rule.name)
    while name is not None and (inner := name.child_by_field_name("declarator")) is not None:
      name = inner
    return " ".join(self._text(name).split()) if name is not None else ""

  def _heading(self, outer: tree_sitter.Node, body: tree_sitter.Node | None) -> str:
    """Returns what stands before the body, on one line."""
    text = self._content[outer.start_byte : body.start_byte if body else outer.end_byte].decode()
    heading = " ".join(text.split()).rstrip(" {:")
    return heading if len(heading) <= _MAX_HEADING_CHARS else heading[:_MAX_HEADING_CHARS] + "..."

  def _docstring(self, body: tree_sitter.Node) -> Span | None:
    first = next((child for child in body.children if child.type not in self._language.comments), None)
    if first is None or first.type != "expression_statement" or first.children[0].type != "string":
      return None
    return first.start_byte, first.end_byte

  def _body(self, holder: tree_sitter.Node, body: tree_sitter.Node, docstring: Span | None) -> Span | None:
    """Returns the span of what is to be written after signature and docstring, if there is anything."""
    if docstring:
      start = docstring[1]
    else:
      before = [child for child in holder.children if child.end_byte <= body.start_byte]
      start = next(child.end_byte for child in reversed(before) if child.type not in self._language.comments)
    return (start, body.end_byte) if self._content[start : body.end_byte].strip() else None

  def _span(self, first: tree_sitter.Node, last: tree_sitter.Node) -> Span:
    content, start, stop = self._content, first.start_byte, last.end_byte
    line = content.rfind(b"\n", 0, start) + 1
    if not content[line:start].strip():
      start = line
    return start, stop + (content[stop : stop + 1] == b";")

  def _is_apart(self, first: tree_sitter.Node, second: tree_sitter.Node) -> bool:
    """Returns whether a blank line parts two nodes; the node of a comment may hold the end of its line."""
    stop = first.end_byte - self._text(first).endswith("\n")
    return self._content.count(b"\n", stop, second.start_byte) > 1

  def _text(self, node: tree_sitter.Node) -> str:
    return self._content[node.start_byte : node.end_byte].decode()


def outermost(items: Sequence[Item]) -> Iterator[Item]:
  """Yields the items, sorted as `parse` does, that lie in none of those before them."""
  stop = -1
  for item in items:
    if item.span[0] >= stop:
      stop = item.span[1]
      yield item
