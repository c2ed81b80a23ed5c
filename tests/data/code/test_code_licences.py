"""Licences are read from files, manifests and texts, and an allow list is held."""

import pytest
from source_trees import files, manifest

from ultrathink_jax.data.code.licences import declared_licence, folder_licences, is_allowed, licence_of


@pytest.mark.parametrize(
  ("expression", "allowed", "expected"),
  [
    ("MIT", {"MIT"}, True),
    ("MIT OR Apache-2.0", {"Apache-2.0"}, True),
    ("MIT/Apache-2.0", {"MIT"}, True),
    ("MIT AND BSD-3-Clause", {"MIT"}, False),
    ("GPL-3.0-or-later OR MIT AND ISC", {"MIT", "ISC"}, True),
    ("GPL-3.0-only", {"GPL-3.0"}, True),
    ("Apache-2.0 WITH LLVM-exception", {"Apache-2.0"}, True),
    ("(MIT OR Apache-2.0) AND Unicode-3.0", {"MIT", "Apache-2.0"}, False),
    ("(MIT OR Apache-2.0) AND Unicode-3.0", {"MIT", "Apache-2.0", "Unicode-3.0"}, True),
    ("unknown", {"MIT"}, False),
    ("unknown", {"unknown"}, True),
  ],
)
def test_an_expression_is_allowed_if_one_may_choose_what_is(expression, allowed, expected):
  assert is_allowed(expression, allowed) is expected


def test_a_file_says_its_own_licence():
  assert declared_licence("// SPDX-License-Identifier: MIT OR Apache-2.0\nfn f() {}") == "MIT OR Apache-2.0"
  assert declared_licence("/* SPDX-License-Identifier: GPL-2.0-only */") == "GPL-2.0-only"
  assert declared_licence("fn f() {}") == ""


def test_the_nearest_folder_that_says_a_licence_decides(tmp_path):
  texts = {
    "LICENSE": "Permission is hereby granted, free\nof charge, to any person obtaining a copy of the Software",
    "a/Cargo.toml": '[package]\nname = "a"\nlicense = "Apache-2.0"\n',
    "a/b/package.json": '{"license": "ISC"}',
    "c/COPYING": "GNU GENERAL PUBLIC LICENSE\n   Version 3, 29 June 2007",
    "d/Cargo.toml": "[package\nbroken",
    "e/LICENSE-MIT": "Permission is hereby granted, free of charge ... the Software",
    "e/LICENSE-APACHE": "Apache License\nVersion 2.0, January 2004",
  }
  for name, text in texts.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
  paths = ["x.rs", "a/src/x.rs", "a/b/x.js", "c/x.c", "d/x.rs", "e/x.rs"]
  folders = folder_licences(tmp_path, paths)
  expected = ["MIT", "Apache-2.0", "ISC", "GPL-3.0", "MIT", "Apache-2.0 OR MIT"]
  assert [licence_of(path, folders) for path in paths] == expected
  assert licence_of("x.rs", {}) == "unknown"


def test_files_under_other_licences_are_left_out_and_the_rest_counted(tree, build):
  (tree / "tools" / "gpl.py").write_text("# SPDX-License-Identifier: GPL-3.0-only\ndef gpl():\n    return 1\n")
  output = build(tree, licences=("MIT",))
  assert files(output)["tools/gpl.py"]["reason"] == "licence"
  assert set(manifest(output)["licences"]) == {"MIT OR Apache-2.0"}
