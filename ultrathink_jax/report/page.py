"""Pages of reports: one HTML file each that needs no network and no other file."""

import os
from importlib import resources
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from ultrathink_jax.report.drawing import Plot


class Tile(NamedTuple):
  """One number of the headline."""

  label: str
  value: str
  note: str = ""


class Section(NamedTuple):
  """A heading with its figures; `is_wide` figures take the whole width of the page."""

  title: str
  is_wide: bool
  plots: list[Plot]


def write(path: Path, template: str, values: dict[str, Any]) -> Path:
  """Returns `path`, to which the page is written as a whole or not at all.

  `template` is a file beside this one, or extends one; what it puts in is escaped, but for figures.
  """
  files = resources.files("ultrathink_jax.report")
  environment = jinja2.Environment(
    loader=jinja2.FunctionLoader(lambda name: files.joinpath(name).read_text("utf-8")),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters["svg"] = Markup  # drawn by us from text that is escaped
  page = environment.get_template(template).render(values)
  temporary = path.with_name(f"{path.name}.tmp")
  temporary.write_text(page, "utf-8", "replace")  # a text may end inside a character
  os.replace(temporary, path)
  return path


def short(number: Real) -> str:
  """Returns 912, 3.04 B or 12.0 T: three significant digits and a unit."""
  for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
    if number >= 0.9995 * scale:
      return f"{number / scale:#,.3g}".rstrip(".") + f" {unit}"
  return f"{number:.0f}"
