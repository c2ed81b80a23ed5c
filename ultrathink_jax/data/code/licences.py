"""Under which licence a file is: as it says itself, else as the nearest folder above it says."""

import json
import os
import re
import tomllib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

UNKNOWN = "unknown"
_MAX_BYTES = 256 * 1024
_SPDX = re.compile(r"SPDX-License-Identifier:\s*([\w.+-]+(?:\s+(?:OR|AND|WITH)\s+[\w.+-]+)*)")
_LICENCE_FILE = re.compile(r"(?i)^(?:un)?licen[sc]e|^copying")
_MANIFESTS = {  # where a package says its licence, and the keys that lead there
  "Cargo.toml": (("package", "license"), ("workspace", "package", "license")),
  "pyproject.toml": (("project", "license"), ("tool", "poetry", "license")),
  "package.json": (("license",),),
}
# What the text of each licence holds, white space folded; the first that fits is it.
_TEXTS = (
  ("AGPL-3.0", ("GNU AFFERO GENERAL PUBLIC LICENSE",)),
  ("LGPL-3.0", ("GNU LESSER GENERAL PUBLIC LICENSE", "Version 3")),
  ("LGPL-2.1", ("GNU LESSER GENERAL PUBLIC LICENSE",)),
  ("GPL-3.0", ("GNU GENERAL PUBLIC LICENSE", "Version 3")),
  ("GPL-2.0", ("GNU GENERAL PUBLIC LICENSE",)),
  ("Apache-2.0", ("Apache License", "Version 2.0")),
  ("MPL-2.0", ("Mozilla Public License", "2.0")),
  ("BSL-1.0", ("Boost Software License",)),
  ("CC0-1.0", ("CC0 1.0 Universal",)),
  ("Unlicense", ("This is free and unencumbered software released into the public domain",)),
  ("PSF-2.0", ("PYTHON SOFTWARE FOUNDATION LICENSE",)),
  ("Zlib", ("This software is provided 'as-is', without any express or implied warranty", "altered source")),
  ("ISC", ("Permission to use, copy, modify, and/or distribute this software",)),
  ("MIT", ("Permission is hereby granted, free of charge", "the Software")),
  ("BSD-3-Clause", ("Redistribution and use in source and binary forms", "Neither the name")),
  ("BSD-2-Clause", ("Redistribution and use in source and binary forms",)),
)


def declared_licence(text: str) -> str:
  """Returns the SPDX expression that a text declares, "" if none."""
  match = _SPDX.search(text)
  return match.group(1) if match else ""


def folder_licences(root: Path, paths: Iterable[str]) -> dict[str, str]:
  """Returns {folder, "" or ending in a slash: SPDX expression} for the folders above the paths that say one."""
  folders = {path[: end + 1] for path in paths for end, c in enumerate(path) if c == "/"} | {""}
  licences = {}
  for folder in sorted(folders):
    try:
      names = os.listdir(root / folder)
    except OSError:
      continue
    expression = _licence_of(root / folder, names)
    if expression:
      licences[folder] = expression
  return licences


def licence_of(path: str, folders: dict[str, str]) -> str:
  """Returns the licence of the nearest folder above a path."""
  parts = path.split("/")[:-1]
  for depth in range(len(parts), -1, -1):
    folder = "".join(part + "/" for part in parts[:depth])
    if folder in folders:
      return folders[folder]
  return UNKNOWN


def is_allowed(expression: str, allowed: Collection[str]) -> bool:
  """Returns whether one may choose licences that are allowed; brackets are read as if all in them were needed."""
  if "(" in expression:
    return all(_is_named(part, allowed) for part in re.split(r"\s+(?:OR|AND)\s+|/|[()]", expression) if part.strip())
  alternatives = re.split(r"\s+OR\s+|/", expression)
  return any(all(_is_named(part, allowed) for part in re.split(r"\s+AND\s+", one)) for one in alternatives)


def _is_named(part: str, allowed: Collection[str]) -> bool:
  identifier = re.split(r"\s+WITH\s+", part.strip())[0]
  return identifier in allowed or re.sub(r"-only$|-or-later$|\+$", "", identifier) in allowed


def _licence_of(folder: Path, names: Iterable[str]) -> str:
  names = sorted(names)
  for name in names:
    for keys in _MANIFESTS.get(name, ()):
      value = _value(_read_manifest(folder / name), keys)
      value = value.get("text") if isinstance(value, dict) else value
      if isinstance(value, str) and re.fullmatch(r"[\w.+()/ -]{2,100}", value):
        return value
  texts = (_identify(folder / name) for name in names if _LICENCE_FILE.match(name))
  return " OR ".join(sorted({text for text in texts if text}))


def _read(path: Path) -> str:
  """Returns the start of a regular file, "" for anything else."""
  try:
    if path.is_symlink() or not path.is_file():
      return ""
    with open(path, "rb") as file:
      return file.read(_MAX_BYTES).decode("utf-8", "replace")
  except OSError:
    return ""


def _read_manifest(path: Path) -> Any:
  text = _read(path)
  try:
    return json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
  except (ValueError, RecursionError):
    return {}


def _value(tree: Any, keys: Iterable[str]) -> Any:
  for key in keys:
    tree = tree.get(key) if isinstance(tree, dict) else None
  return tree


def _identify(path: Path) -> str:
  text = _read(path)
  declared = declared_licence(text)
  text = " ".join(text.split())
  return declared or next((name for name, phrases in _TEXTS if all(phrase in text for phrase in phrases)), "")
