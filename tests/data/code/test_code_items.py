"""Items have their bodies, docs, context and tests, as the grammar and Python's own parser see them."""

import ast
import sysconfig
from pathlib import Path

import pytest
import tree_sitter
import tree_sitter_rust
from source_trees import INTEGRATION, LIBRARY, PARSER, PYTHON, SHAPES

from ultrathink_jax.data.code.items import parse, parses_alone
from ultrathink_jax.data.code.languages import LANGUAGES, RUST, find_language
from ultrathink_jax.errors import ConfigError


def items_of(text, path="src/a.rs"):
  return parse(find_language(path), text.encode(), path).items


def names(items, *kinds):
  return [item.name for item in items if item.kind in kinds]


def text_of(content, span):
  return content.encode()[slice(*span)].decode()


def rust_functions(content):
  """The byte ranges of functions with bodies that are in no function, found by walking the whole tree."""
  found = []

  def walk(node):
    if node.type == "function_item":
      found.append((node.start_byte, node.end_byte))
    else:
      for child in node.children:
        walk(child)

  walk(tree_sitter.Parser(tree_sitter.Language(tree_sitter_rust.language())).parse(content.encode()).root_node)
  return found


@pytest.mark.parametrize("content", [LIBRARY, PARSER, SHAPES, INTEGRATION])
def test_every_rust_function_is_an_item_with_its_body_that_parses_by_itself(content):
  items = [item for item in items_of(content) if item.is_function]
  expected = rust_functions(content)
  assert len(items) == len(expected) > 0
  for item, (start, stop) in zip(items, expected, strict=True):
    text = text_of(content, item.span)
    assert text_of(content, (start, stop)) in text
    assert text.rstrip().endswith("}")
    assert text_of(content, item.body).strip().startswith("{")
    assert parses_alone(RUST, text.encode())


def test_all_kinds_of_rust_items_are_found_by_their_names():
  items = items_of(PARSER)
  assert names(items, "struct", "enum", "union", "trait") == ["Header", "Token", "Bits", "Parse"]
  assert names(items, "method") == ["Parse::parse_or_default", "Header<'a, K, N>::fmt"]
  assert names(items, "const", "static", "type") == ["Parse::LIMIT", "GREETING", "LIMIT", "Map"]
  assert names(items, "function") == ["parse_header"]
  assert names(items_of(LIBRARY), "macro", "mod") == ["make_struct", "tests"]


def test_docs_and_attributes_belong_to_the_item_after_them():
  item = next(item for item in items_of(LIBRARY) if item.name == "double")
  text = text_of(LIBRARY, item.span)
  assert text.startswith("/// Doubles a number.\n")
  assert '#[must_use = "a } in a string"]' in text
  assert len(item.docs) == 6
  assert "crate's documentation" not in text


def test_a_comment_after_a_blank_line_or_on_the_line_of_another_item_belongs_to_nothing():
  content = "struct A; // of A\nfn b() {}\n\n// apart\n\nfn c() {}\n// of d\nfn d() {}\n"
  items = items_of(content)
  assert [text_of(content, item.span) for item in items] == [
    "struct A;", "fn b() {}", "fn c() {}", "// of d\nfn d() {}"
  ]  # fmt: skip


def test_context_names_what_encloses_an_item_without_its_body():
  item = next(item for item in items_of(PARSER) if item.name.endswith("::fmt"))
  assert item.context == ("impl<'a, K: Ord + Display, const N: usize> Display for Header<'a, K, N> where K: Clone",)
  width = next(item for item in items_of(SHAPES) if item.name.endswith("width"))
  assert width.context == ("pub mod flat", "impl Circle")
  assert width.name == "flat::Circle::width"
  assert width.kind == "method"


def test_tests_and_what_is_there_for_them_are_told_apart_from_the_rest():
  tests = {item.name: item.test for item in items_of(LIBRARY)}
  assert tests["tests::test_double"] == tests["tests::fetch_returns_bytes"] == "test"
  assert tests["tests"] == tests["tests::helper"] == "support"
  assert tests["double"] == tests["production_only"] == ""


@pytest.mark.parametrize(
  ("attribute", "expected"),
  [
    ("#[cfg(test)]", "support"),
    ("#[cfg(all(test, unix))]", "support"),
    ("#[cfg(all(not(windows), test))]", "support"),
    ("#[cfg(not(test))]", ""),
    ('#[cfg(feature = "test")]', ""),
    ("#[cfg_attr(test, derive(Debug))]", ""),
    ('#[doc = "#[test]"]', ""),
    ("#[tokio::test]", "test"),
    ('#[test_case(1; "one")]', "test"),
    ("#[rstest]", "test"),
    ("// #[test]", ""),
  ],
)
def test_attributes_tell_tests(attribute, expected):
  (item,) = items_of(f"{attribute}\nfn f() {{ work() }}\n")
  assert item.test == expected


def test_python_items_are_found_in_classes_and_below_conditions_but_not_in_functions():
  items = items_of(PYTHON, "tools/stack.py")
  assert names(items, "class", "method", "function") == ["Stack", "Stack.top", "Stack.drain", "where"]
  top = items[1]
  assert text_of(PYTHON, top.span).startswith("    @property\n    def top")
  assert text_of(PYTHON, top.docs[0]) == '"""Return the last element."""'
  assert text_of(PYTHON, top.body).startswith('\n        text = """not {')
  assert text_of(PYTHON, items[2].body) == " return [x async for x in self]"


class _Functions(ast.NodeVisitor):
  """Names of the functions in a module that are in no function, and not below what the builder does not look into."""

  def __init__(self):
    self.names, self.found = [], []

  def visit_ClassDef(self, node):
    self.names.append(node.name)
    self.generic_visit(node)
    self.names.pop()

  def visit_FunctionDef(self, node):
    self.found.append((".".join([*self.names, node.name]), ast.get_docstring(node, clean=False)))

  visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815


@pytest.mark.parametrize("folder", ["json", "asyncio", "email", "unittest", "importlib", "concurrent"])
def test_python_functions_are_those_that_python_itself_sees(folder):
  for path in sorted(Path(sysconfig.get_path("stdlib"), folder).rglob("*.py")):
    content = path.read_text()
    visitor = _Functions()
    visitor.visit(ast.parse(content))
    items = [item for item in items_of(content, str(path)) if item.is_function]
    assert [item.name for item in items] == [name for name, _ in visitor.found], path
    for item, (name, docstring) in zip(items, visitor.found, strict=True):
      text = text_of(content, item.span)
      (function,) = ast.parse(f"if True:\n{text}").body[0].body if text[0] == " " else ast.parse(text).body
      assert function.name == name.split(".")[-1]
      assert bool(item.docs) == (docstring is not None), (path, name)
      assert parses_alone(LANGUAGES["python"], text_of(content, item.span).encode())


@pytest.mark.parametrize(
  ("path", "content", "expected"),
  [
    ("a.c", "/* Doc. */\nstatic int *f(int x) { return 0; }\nstruct S { int a; };\nint g(void);\n",
     [("function", "f"), ("struct", "S")]),
    ("a.cpp", "namespace n { template <class T> class V { V() : x(1) {} int f() const { return 1; } }; }\n"
     "int n::V::g() {}",
     [("mod", "n"), ("class", "n::V"), ("method", "n::V::V"), ("method", "n::V::f"), ("function", "n::V::g")]),
    ("a.go", "package m\n// Doc\nfunc (s *S) F() int { return 1 }\ntype S struct { a int }\nfunc G() {}\n",
     [("method", "F"), ("type", "S"), ("function", "G")]),
    ("A.java", "class A<T> extends B { @Test public void f() { } A() {} abstract void g(); enum E { Q } }",
     [("class", "A"), ("method", "A.f"), ("method", "A.A"), ("enum", "A.E")]),
    ("a.js", "/** d */\nexport const f = async (x) => { return 1; };\nexport default class A { m() {} }\nlet y = 1;",
     [("function", "f"), ("class", "A"), ("method", "A.m")]),
    ("a.ts", "interface I { a: string }\ntype X = 1;\nnamespace N { export function f(): void {} }\n"
     "abstract class A { private m(): void {} }",
     [("interface", "I"), ("type", "X"), ("mod", "N"), ("function", "N.f"), ("class", "A"), ("method", "A.m")]),
    ("a.tsx", "export function View() { return <div>{1}</div>; }", [("function", "View")]),
  ],
)  # fmt: skip
def test_other_languages_need_nothing_but_their_table(path, content, expected):
  items = items_of(content, path)
  assert [(item.kind, item.name) for item in items] == expected
  for item in items:
    assert parses_alone(find_language(path), text_of(content, item.span).encode()), item


def test_a_file_with_errors_has_no_items():
  parsed = parse(RUST, b"fn fine() {}\nfn broken( {\n", "a.rs")
  assert parsed.has_errors
  assert parsed.items == ()


@pytest.mark.parametrize(("depth", "num_items"), [(40, 41), (9000, 64), (40_000, 0)])
def test_nesting_of_any_depth_ends_soon(depth, num_items):
  content = "".join(f"mod m{i} {{\n" for i in range(depth)) + "fn f() { 1 }" + "\n}" * depth
  parsed = parse(RUST, content.encode(), "a.rs")
  assert len(parsed.items) == num_items
  assert parsed.has_errors is (not num_items)


@pytest.mark.parametrize(
  ("path", "line", "num_bytes"),
  [
    ("A.java", "a=>\n", 64_000),  # would take gigabytes
    ("a.rs", 'r#"\n', 400_000),  # would take minutes
    ("a.js", "{a:\n", 500_000),  # would end the process
    ("a.ts", "a<b,\n", 400_000),
    ("a.py", "def f(\n", 400_000),
  ],
)
def test_what_would_break_a_parser_is_a_file_with_errors(path, line, num_bytes, monkeypatch):
  monkeypatch.setattr("ultrathink_jax.data.code.items._MAX_SECONDS", 1.0)
  language = find_language(path)
  content = (line * (num_bytes // len(line))).encode()
  assert parse(language, content, path) == ((), (), True)
  assert not parse(language, b"", path).has_errors  # the parser is as good as new


def test_a_missing_grammar_is_named(monkeypatch):
  broken = RUST._replace(name="gone", grammar=("tree_sitter_gone", "language"))
  monkeypatch.setitem(LANGUAGES, "gone", broken)
  with pytest.raises(ConfigError, match="pip install tree-sitter-gone"):
    parse(broken, b"fn f() {}", "a.rs")
