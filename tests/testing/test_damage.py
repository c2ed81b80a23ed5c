"""Damage does to files what it says, and nothing else."""

import collections

import pytest

from ultrathink_jax.testing.damage import apply, delete, flip_bit, truncate, zero


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "a").write_bytes(bytes(range(10)))
  (tmp_path / "deep").mkdir()
  (tmp_path / "deep" / "b").write_bytes(bytes(range(30)))
  (tmp_path / "empty").write_bytes(b"")
  return tmp_path


def contents(folder):
  return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_bit_is_flipped_and_flipping_it_again_undoes_it(folder):
  before = contents(folder)
  for seed in range(50):
    flip = flip_bit(folder, seed)
    after = contents(folder)
    (changed,) = [path for path in before if before[path] != after[path]]
    differences = [a ^ b for a, b in zip(before[changed], after[changed], strict=True)]
    assert changed == flip.file
    assert differences == [1 << flip.bit if i == flip.byte else 0 for i in range(len(differences))]
    apply(flip)
    assert contents(folder) == before


def test_every_bit_is_as_likely_wherever_it_lies(folder):
  flips = [flip_bit(folder, seed) for seed in range(2000)]
  assert 400 < sum(flip.file.name == "a" for flip in flips) < 600  # a quarter of the bytes
  assert len({(flip.file, flip.byte) for flip in flips}) == 40
  assert set(collections.Counter(flip.bit for flip in flips)) == set(range(8))
  assert flip_bit(folder, 7) == flip_bit(folder, 7)


def test_files_are_cut_off_zeroed_and_deleted(folder):
  truncate(folder / "deep" / "b", 0)
  cut = (folder / "deep" / "b").read_bytes()
  assert len(cut) < 30
  assert cut == bytes(range(len(cut)))
  zero(folder / "a")
  assert (folder / "a").read_bytes() == bytes(10)
  delete(folder / "a")
  assert not (folder / "a").exists()


def test_where_there_are_no_bytes_nothing_can_be_damaged(tmp_path):
  (tmp_path / "empty").write_bytes(b"")
  with pytest.raises(FileNotFoundError):
    flip_bit(tmp_path, 0)
