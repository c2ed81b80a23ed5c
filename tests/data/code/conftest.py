"""A source tree, and a way to build its samples."""

import pytest
from source_trees import write_tree

from ultrathink_jax.data.code import CodeOptions, build_code_data


@pytest.fixture
def tree(tmp_path):
  return write_tree(tmp_path / "tree")


@pytest.fixture
def build(tmp_path):
  """Builds into a folder of its own and returns its path."""
  count = iter(range(1000))

  def run(root, tokenizer=None, log=lambda line: None, **options):
    output = tmp_path / f"output{next(count)}"
    build_code_data(root, output, CodeOptions(**({"workers": 1} | options)), tokenizer, log)
    return output

  return run
