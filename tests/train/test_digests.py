import os

import pytest

from ultrathink_jax.train.digests import MANIFEST, find_damage, read_files, seal


@pytest.fixture
def sealed(tmp_path):
  """Returns a sealed directory of four files."""
  for name, data in {"a": b"\x00" * 40, "b/c": b"text\n", "b/with space": bytes(range(99)), "empty": b""}.items():
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
  seal(tmp_path, read_files(tmp_path))
  return tmp_path


def files(directory):
  return sorted(path for path in directory.rglob("*") if path.is_file())


def test_an_untouched_directory_is_intact_by_any_share(sealed):
  assert find_damage(sealed) is None
  assert all(find_damage(sealed, index, 3) is None for index in range(3))


def test_each_flip_of_one_bit_is_found_and_its_file_named(sealed):
  for path in files(sealed):
    data = path.read_bytes()
    for bit in range(8 * len(data)):
      path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
      assert find_damage(sealed).startswith(f"{path.relative_to(sealed)} ")
    path.write_bytes(data)
  assert find_damage(sealed) is None


def test_one_of_the_shares_finds_damage(sealed):
  for path in files(sealed):
    if path.name == MANIFEST or not path.stat().st_size:
      continue
    data = path.read_bytes()
    path.write_bytes(bytes(byte ^ 1 for byte in data))
    assert len([index for index in range(3) if find_damage(sealed, index, 3)]) == 1
    path.write_bytes(data)


@pytest.mark.parametrize("size", [0, 1, -1])
def test_a_cut_file_is_found(sealed, size):
  for path in files(sealed):
    data = path.read_bytes()
    if data[:size] != data:
      path.write_bytes(data[:size])
      assert str(path.relative_to(sealed)) in find_damage(sealed)
      path.write_bytes(data)


def test_a_longer_file_is_found(sealed):
  for path in files(sealed):
    data = path.read_bytes()
    path.write_bytes(data + b"\n")
    assert str(path.relative_to(sealed)) in find_damage(sealed)
    path.write_bytes(data)


def test_a_file_that_is_gone_new_moved_or_a_link_is_found(sealed):
  for path in files(sealed):
    data = path.read_bytes()
    path.unlink()
    assert find_damage(sealed).startswith(f"{path.relative_to(sealed)} ")
    path.symlink_to("/dev/null" if not data else __file__)
    assert str(path.relative_to(sealed)) in find_damage(sealed)
    path.unlink()
    path.write_bytes(data)
  (sealed / "b" / "new").touch()
  assert find_damage(sealed) == "b/new does not belong to it"
  (sealed / "b" / "new").unlink()
  (sealed / "a").rename(sealed / "z")
  assert find_damage(sealed) == "a is missing"


def test_two_files_that_changed_places_are_found(sealed):
  (sealed / "same_size").write_bytes(b"b" * 40)
  seal(sealed, read_files(sealed))
  (sealed / "a").rename(sealed / "x")
  (sealed / "same_size").rename(sealed / "a")
  (sealed / "x").rename(sealed / "same_size")
  assert find_damage(sealed) == "a differs from its digest"


def test_what_is_no_file_is_not_opened(sealed):
  (sealed / "a").unlink()
  os.mkfifo(sealed / "a")
  assert find_damage(sealed) == "a is not a file"
