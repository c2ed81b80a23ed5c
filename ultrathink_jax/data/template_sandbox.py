"""A Jinja environment for templates that nobody has read: no access to Python, and bounds on time and memory.

On top of the immutable sandbox of Jinja, every pass through a loop or macro and every character that is printed,
joined, filtered or compared is charged to the budget of the rendering. What could grow without either is taken away:
filters and methods that pad or format, and arithmetic on numbers without bound.
"""

import datetime
import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, nodes, sandbox
from jinja2.utils import pass_context

_MAX_STEPS = 100_000
_MAX_CHARS = 64 * 1024 * 1024
_CHARS_PER_ITEM = 16  # what an item of a list is charged as
_MAX_BITS = 256  # of a number
_MAX_INDENT = 16
_BUDGET = "budget of the rendering"  # a name that no template can spell
_FILTERS = """
  abs capitalize count d default dictsort e escape first float groupby int items last length list lower map max min
  reject rejectattr reverse round safe select selectattr sort string striptags sum title trim truncate unique upper
"""
_TEXT_METHODS = """
  capitalize count endswith find index isalnum isalpha isascii isdigit islower isnumeric isspace istitle isupper join
  lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines
  startswith strip swapcase title upper
"""
_METHODS: dict[type, set[str]] = {
  str: set(_TEXT_METHODS.split()),
  dict: {"get", "items", "keys", "values"},
  list: {"count", "index"},
  tuple: {"count", "index"},
  int: set(),
  float: {"is_integer"},
}
_DAY = datetime.datetime(2025, 1, 1)  # so that the tokens do not depend on when they are made
_DATE_FORMAT = re.compile(r"(?:[^%]|%-?[A-Za-z%]){0,100}", re.DOTALL)

# Around the text of an assistant's turn; Unicode keeps these two for use inside of a program.
GENERATION_START, GENERATION_STOP = "\ufdd0", "\ufdd1"


class Budget:
  """What is left of a rendering."""

  def __init__(self) -> None:
    self._steps, self._chars = _MAX_STEPS, _MAX_CHARS

  def charge(self, steps: int, chars: int) -> None:
    self._steps -= steps
    self._chars -= chars
    if self._steps < 0:
      raise sandbox.SecurityError(f"takes more than {_MAX_STEPS:,} steps")
    if self._chars < 0:
      raise sandbox.SecurityError(f"makes more than {_MAX_CHARS:,} characters")


class Generation(ext.Extension):
  """The block {% generation %} ... {% endgeneration %} around what the assistant says."""

  tags = {"generation"}  # noqa: RUF012, as Jinja has it

  def parse(self, parser: Any) -> list[nodes.Node]:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    start, stop = (
      nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (GENERATION_START, GENERATION_STOP)
    )
    return [start, *body, stop]


class BoundedEnvironment(sandbox.ImmutableSandboxedEnvironment):
  """The environment that chat templates are written for, with bounds."""

  intercepted_binops = frozenset({"+", "*", "**", "%"})

  def __init__(self) -> None:
    super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols], finalize=_print)
    self.filters = {name: self.filters[name] for name in _FILTERS.split()}
    self.filters |= {"tojson": _to_json, "join": _join, "replace": _replace, "_step": _step, "_measured": _measured}
    self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace")}
    self.globals |= {"raise_exception": _raise, "strftime_now": _day}

  def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
    template = super()._parse(source, name, filename)
    for node in list(template.find_all(nodes.Concat)):
      node.nodes = [_filter(nodes.Concat(node.nodes, lineno=node.lineno), "_measured")]
    for node in list(template.find_all(nodes.Filter)):
      node.node = node.node and _filter(node.node, "_measured")
    for node in list(template.find_all(nodes.Getitem)):
      node.node = _filter(node.node, "_measured")
    for node in list(template.find_all(nodes.Operand)):
      if not isinstance(node.expr, nodes.Const):
        node.expr = _filter(node.expr, "_measured")
    for node in list(template.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
      chars = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
      node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(chars, lineno=node.lineno), "_step"), lineno=node.lineno))
    template.set_environment(self)
    return template

  def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
    allowed = next((methods for kind, methods in _METHODS.items() if isinstance(obj, kind)), None)
    return super().is_safe_attribute(obj, attr, value) and (allowed is None or attr in allowed)

  def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
    raise sandbox.SecurityError(f"reads {attribute!r} of a {type(obj).__name__}, which is not allowed")

  def wrap_str_format(self, value: Any) -> None:
    """Leaves str.format to `is_safe_attribute`, which refuses it."""
    del value

  def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
    text = getattr(__obj, "__self__", None)
    if isinstance(text, str) and __obj.__name__ == "join":
      return _join(__context, args[0], text)
    if isinstance(text, str) and __obj.__name__ == "replace":
      return _replace(__context, text, *args)
    if isinstance(text, str):
      _charge(__context, 1, len(text))
    return super().call(__context, __obj, *args, **kwargs)

  def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
    if operator == "+" and isinstance(left, str) and isinstance(right, str):
      _charge(context, 1, len(left) + len(right))
      return left + right
    _check_operands(operator, left, right)
    result = super().call_binop(context, operator, left, right)
    _charge(context, 1, _size(result))
    return result


def compile_template(source: str) -> jinja2.Template:
  """Returns a template. Raises jinja2.TemplateError."""
  return BoundedEnvironment().from_string(source)


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
  """Returns what a template prints; templates may raise anything."""
  budget = Budget()
  parts = []
  for part in template.generate({**variables, _BUDGET: budget}):
    budget.charge(0, len(part))
    parts.append(part)
  return "".join(parts)


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
  return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _size(value: Any) -> int:
  """Returns the characters that a value is charged as."""
  if isinstance(value, str):
    return len(value)
  return _CHARS_PER_ITEM * len(value) if isinstance(value, (list, tuple, range)) else 0


def _charge(context: Any, steps: int, chars: int) -> None:
  context.parent[_BUDGET].charge(steps, chars)  # where variables of the rendering are, and quickly found


def _check_operands(operator: str, left: Any, right: Any) -> None:
  """Refuses what would be large before it is made."""
  numbers = [value for value in (left, right) if isinstance(value, int)]
  sizes = [_size(value) for value in (left, right)]
  if operator == "%" and isinstance(left, str):
    raise sandbox.SecurityError("formats with %, which is not allowed")
  if operator == "*" and numbers and numbers[0] * max(sizes) > _MAX_CHARS:
    raise sandbox.SecurityError(f"repeats something {numbers[0]:,} times")
  if operator == "**" and len(numbers) == 2 and right * left.bit_length() > _MAX_BITS:
    raise sandbox.SecurityError("makes a number that is too large")
  if operator == "*" and sum(number.bit_length() for number in numbers) > _MAX_BITS:
    raise sandbox.SecurityError("makes a number that is too large")


@pass_context
def _print(context: Any, value: Any) -> str:
  text = str(value)
  _charge(context, 1, len(text))
  return text


@pass_context
def _step(context: Any, chars: int) -> None:
  _charge(context, 1, chars)


@pass_context
def _measured(context: Any, value: Any) -> Any:
  _charge(context, 1, _size(value))
  return value


@pass_context
def _join(context: Any, values: Any, separator: str = "", attribute: Any = None) -> str:
  if attribute is not None:
    raise sandbox.SecurityError("joins an attribute, which is not allowed; use map before join")
  parts = [str(value) for value in values]
  _charge(context, len(parts), sum(map(len, parts)) + len(separator) * len(parts))
  return separator.join(parts)


@pass_context
def _replace(context: Any, text: Any, old: str, new: str, count: int = -1) -> str:
  text, old, new = str(text), str(old), str(new)
  found = text.count(old) if count is None or count < 0 else min(count, text.count(old))
  _charge(context, 1, len(text) + found * len(new))
  return text.replace(old, new, -1 if count is None else count)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
  if indent is not None and not (isinstance(indent, int) and 0 <= indent <= _MAX_INDENT):
    raise sandbox.SecurityError(f"indents JSON by more than {_MAX_INDENT}")
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


def _day(format: str) -> str:
  if not _DATE_FORMAT.fullmatch(format):
    raise sandbox.SecurityError("formats a date with a width, which is not allowed")
  return _DAY.strftime(format)
