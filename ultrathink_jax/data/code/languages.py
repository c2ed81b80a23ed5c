"""One table per language: which nodes of its grammar are items, and where names, bodies, docs and tests sit."""

import re
from collections.abc import Mapping
from typing import NamedTuple


class Rule(NamedTuple):
  """How a node becomes an item.

  Attributes:
    kind: what people call it; "function" inside of a class, impl or trait is a method.
    name, body: the fields that hold them.
    needs_body: whether a node without a body only names what is elsewhere; so it is with functions.
    values: if not empty, only a node whose field `value` is of one of these types is an item, and the body is in there.
  """

  kind: str
  name: str = "name"
  body: str = "body"
  needs_body: bool = False
  values: tuple[str, ...] = ()


class Language(NamedTuple):
  """A language that has a grammar.

  Attributes:
    grammar: the module of the grammar and the function in it.
    comment: a line comment, with {} for what it says.
    separator: between the parts of a qualified name.
    items: by node type; those of `containers` have further items in their bodies.
    wrappers: nodes around an item that belong to it: decorators, `export`, `template <...>`.
    transparent: nodes that are looked into for items, and belong to none.
    attributes: nodes before an item that belong to it.
    comments: nodes of comments.
    docs: what the text of a comment or an attribute begins with if it documents the item after it.
    has_docstrings: whether a string that begins a body documents the item.
    test_head, test_name: found in attributes and signature, or in the name, of a test function.
    test_scope: found in attributes and signature of an item of which everything is there for tests.
    test_path: found in the path of a file of tests.
    imports: node types that name other modules; `module` finds the names in their text.
    shell: text before and after a member of a class that makes it parse.
  """

  name: str
  grammar: tuple[str, str]
  suffixes: tuple[str, ...]
  comment: str
  separator: str
  items: Mapping[str, Rule]
  containers: frozenset[str]
  comments: frozenset[str]
  docs: re.Pattern[str]
  imports: frozenset[str]
  module: re.Pattern[str]
  test_path: re.Pattern[str]
  wrappers: frozenset[str] = frozenset()
  transparent: frozenset[str] = frozenset()
  attributes: frozenset[str] = frozenset()
  has_docstrings: bool = False
  test_head: re.Pattern[str] | None = None
  test_name: re.Pattern[str] | None = None
  test_scope: re.Pattern[str] | None = None
  shell: tuple[str, str] | None = None


def _set(names: str) -> frozenset[str]:
  return frozenset(names.split())


_TEST_FOLDER = r"(?:^|/)(?:tests?|__tests__|benches)/"
_SLASH_DOCS = re.compile(r"/\*\*(?![*/])|///(?!/)")

RUST = Language(
  name="rust",
  grammar=("tree_sitter_rust", "language"),
  suffixes=(".rs",),
  comment="// {}",
  separator="::",
  items={
    "function_item": Rule("function"),
    "struct_item": Rule("struct"),
    "enum_item": Rule("enum"),
    "union_item": Rule("union"),
    "trait_item": Rule("trait"),
    "impl_item": Rule("impl", name="type"),
    "mod_item": Rule("mod", needs_body=True),
    "const_item": Rule("const"),
    "static_item": Rule("static"),
    "type_item": Rule("type"),
    "macro_definition": Rule("macro"),
  },
  containers=_set("trait_item impl_item mod_item"),
  transparent=_set("declaration_list"),
  attributes=_set("attribute_item"),
  comments=_set("line_comment block_comment"),
  docs=re.compile(r"///(?!/)|/\*\*(?![*/])|#\[\s*doc\s*="),
  imports=_set("use_declaration mod_item"),
  module=re.compile(r"\buse\s+([\w:]+)|\bmod\s+(\w+)\s*;"),
  test_path=re.compile(_TEST_FOLDER + r"|(?:^|[/_])tests?\.rs$"),
  test_head=re.compile(
    r"#\s*\[\s*(?:\w+\s*::\s*)*(?:test|rstest|test_case|wasm_bindgen_test|quickcheck|bench)\s*[\]({]"
  ),
  test_scope=re.compile(r"#\s*\[\s*cfg\s*\((?>\bnot\s*\([^()]*\)|[^\]])*?\btest\b"),
)

PYTHON = Language(
  name="python",
  grammar=("tree_sitter_python", "language"),
  suffixes=(".py", ".pyi", ".pyw"),
  comment="# {}",
  separator=".",
  items={"function_definition": Rule("function"), "class_definition": Rule("class")},
  containers=_set("class_definition"),
  wrappers=_set("decorated_definition"),
  transparent=_set(
    "block if_statement elif_clause else_clause try_statement except_clause finally_clause with_statement for_statement"
    " while_statement match_statement case_clause"
  ),
  comments=_set("comment"),
  docs=re.compile(r"(?!)"),
  has_docstrings=True,
  imports=_set("import_statement import_from_statement"),
  module=re.compile(r"from\s+\.+\s*import\s+\(?\s*(\w+)|from\s+([\w.]+)\s+import|^import\s+([\w.]+)"),
  test_path=re.compile(_TEST_FOLDER + r"|(?:^|/)(?:test_[^/]*|[^/]*_test|conftest)\.pyi?$"),
  test_name=re.compile(r"^test"),
  test_scope=re.compile(r"^class\s+Test|\(\s*(?:unittest\s*\.\s*)?TestCase\b"),
)

_C_ITEMS = {
  "function_definition": Rule("function", name="declarator"),
  "struct_specifier": Rule("struct", needs_body=True),
  "union_specifier": Rule("union", needs_body=True),
  "enum_specifier": Rule("enum", needs_body=True),
  "type_definition": Rule("type", name="declarator"),
  "preproc_function_def": Rule("macro"),
}
_C_TRANSPARENT = _set("preproc_ifdef preproc_if preproc_else preproc_elif linkage_specification declaration_list")

C = Language(
  name="c",
  grammar=("tree_sitter_c", "language"),
  suffixes=(".c", ".h"),
  comment="// {}",
  separator="::",
  items=_C_ITEMS,
  containers=frozenset(),
  transparent=_C_TRANSPARENT,
  comments=_set("comment"),
  docs=re.compile(r"/\*|//"),
  imports=_set("preproc_include"),
  module=re.compile(r'"([^"]+)"'),
  test_path=re.compile(_TEST_FOLDER + r"|(?:^|/)(?:test_[^/]*|[^/]*_test)\.[ch]$"),
  test_name=re.compile(r"^test_"),
)

CPP = C._replace(
  name="cpp",
  grammar=("tree_sitter_cpp", "language"),
  suffixes=(".cc", ".cpp", ".cxx", ".hh", ".hpp", ".hxx", ".cu", ".cuh"),
  items=_C_ITEMS | {"class_specifier": Rule("class", needs_body=True), "namespace_definition": Rule("mod")},
  containers=_set("class_specifier struct_specifier namespace_definition"),
  wrappers=_set("template_declaration"),
  transparent=_C_TRANSPARENT | _set("field_declaration_list"),
  docs=_SLASH_DOCS,
  test_path=re.compile(_TEST_FOLDER + r"|(?:^|/)(?:test_[^/]*|[^/]*_(?:unit)?test)\.\w+$"),
  shell=("class _ {", "};"),
)

GO = Language(
  name="go",
  grammar=("tree_sitter_go", "language"),
  suffixes=(".go",),
  comment="// {}",
  separator=".",
  items={
    "function_declaration": Rule("function"),
    "method_declaration": Rule("method"),
    "type_spec": Rule("type", body="type"),
    "const_declaration": Rule("const"),
  },
  containers=frozenset(),
  wrappers=_set("type_declaration"),
  comments=_set("comment"),
  docs=re.compile(r"/\*|//(?!go:)"),
  imports=_set("import_declaration"),
  module=re.compile(r'"([^"]+)"'),
  test_path=re.compile(r"_test\.go$"),
  test_name=re.compile(r"^(?:Test|Benchmark|Example|Fuzz)(?![a-z])"),
)

JAVA = Language(
  name="java",
  grammar=("tree_sitter_java", "language"),
  suffixes=(".java",),
  comment="// {}",
  separator=".",
  items={
    "class_declaration": Rule("class"),
    "record_declaration": Rule("class"),
    "interface_declaration": Rule("interface"),
    "enum_declaration": Rule("enum"),
    "annotation_type_declaration": Rule("interface"),
    "method_declaration": Rule("function"),
    "constructor_declaration": Rule("function"),
  },
  containers=_set("class_declaration record_declaration interface_declaration enum_declaration"),
  transparent=_set("class_body interface_body enum_body enum_body_declarations"),
  comments=_set("block_comment line_comment"),
  docs=_SLASH_DOCS,
  imports=_set("import_declaration"),
  module=re.compile(r"import\s+(?:static\s+)?([\w.]+)"),
  test_path=re.compile(_TEST_FOLDER + r"|Tests?\.java$"),
  test_head=re.compile(r"@(?:\w+\.)*(?:Test|ParameterizedTest|RepeatedTest)\b"),
  shell=("class _ {", "}"),
)

JAVASCRIPT = Language(
  name="javascript",
  grammar=("tree_sitter_javascript", "language"),
  suffixes=(".js", ".jsx", ".mjs", ".cjs"),
  comment="// {}",
  separator=".",
  items={
    "function_declaration": Rule("function"),
    "generator_function_declaration": Rule("function"),
    "class_declaration": Rule("class"),
    "method_definition": Rule("function"),
    "variable_declarator": Rule("function", values=("arrow_function", "function_expression", "generator_function")),
  },
  containers=_set("class_declaration"),
  wrappers=_set("export_statement lexical_declaration variable_declaration"),
  transparent=_set("class_body"),
  attributes=_set("decorator"),
  comments=_set("comment"),
  docs=_SLASH_DOCS,
  imports=_set("import_statement export_statement"),
  module=re.compile(r"""\bfrom\s*["']([^"']+)["']|^import\s*["']([^"']+)["']"""),
  test_path=re.compile(_TEST_FOLDER + r"|\.(?:test|spec)\.\w+$"),
  shell=("class _ {", "}"),
)

TYPESCRIPT = JAVASCRIPT._replace(
  name="typescript",
  grammar=("tree_sitter_typescript", "language_typescript"),
  suffixes=(".ts", ".mts", ".cts"),
  items=JAVASCRIPT.items
  | {
    "abstract_class_declaration": Rule("class"),
    "interface_declaration": Rule("interface"),
    "type_alias_declaration": Rule("type", body="value"),
    "enum_declaration": Rule("enum"),
    "internal_module": Rule("mod"),
  },
  containers=_set("class_declaration abstract_class_declaration internal_module"),
  wrappers=JAVASCRIPT.wrappers | _set("ambient_declaration expression_statement"),
  transparent=_set("class_body statement_block"),
)

TSX = TYPESCRIPT._replace(name="tsx", grammar=("tree_sitter_typescript", "language_tsx"), suffixes=(".tsx",))

LANGUAGES = {language.name: language for language in (RUST, PYTHON, C, CPP, GO, JAVA, JAVASCRIPT, TYPESCRIPT, TSX)}
_BY_SUFFIX = {suffix: language for language in LANGUAGES.values() for suffix in language.suffixes}

# Languages without a table give files and chunks; a comment in them looks like this.
_COMMENTS = {
  "css": "/* {} */", "scss": "/* {} */", "html": "<!-- {} -->", "xml": "<!-- {} -->", "svg": "<!-- {} -->",
  "md": "<!-- {} -->", "markdown": "<!-- {} -->", "sql": "-- {}", "lua": "-- {}", "hs": "-- {}", "elm": "-- {}",
  "kt": "// {}", "swift": "// {}", "scala": "// {}", "cs": "// {}", "zig": "// {}", "dart": "// {}", "php": "// {}",
  "proto": "// {}", "wgsl": "// {}", "glsl": "// {}", "tex": "% {}", "erl": "% {}", "lisp": ";; {}", "clj": ";; {}",
}  # fmt: skip


def find_language(path: str) -> Language | None:
  """Returns the table that fits a path, or None where there is none."""
  return _BY_SUFFIX.get(_suffix(path))


def language_name(path: str) -> str:
  """Returns the name of a file's language: its suffix, or "text", where there is no table."""
  language = find_language(path)
  return language.name if language else _suffix(path).removeprefix(".") or "text"


def comment_format(path: str) -> str:
  """Returns a line comment in the language of a file, with {} for what it says."""
  language = find_language(path)
  return language.comment if language else _COMMENTS.get(_suffix(path).removeprefix("."), "# {}")


def _suffix(path: str) -> str:
  stem, dot, suffix = path.rpartition("/")[2].rpartition(".")
  return (dot + suffix).lower() if stem else ""
