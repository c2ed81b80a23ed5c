"""Damage to files, as disks, networks and people do it: for trying what notices it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np


class Flip(NamedTuple):
  """Which bit was flipped; flipping it again undoes it."""

  file: Path
  byte: int
  bit: int


def flip_bit(path: Path, seed: int) -> Flip:
  """Flips one bit of a file, or of all files below a directory together; every bit of them is as likely."""
  files = _files(path)
  ends = np.cumsum([file.stat().st_size for file in files])
  position = int(np.random.default_rng(seed).integers(8 * ends[-1]))
  number = int(np.searchsorted(ends, position // 8, side="right"))
  flip = Flip(files[number], position // 8 - int(ends[number - 1] if number else 0), position % 8)
  apply(flip)
  return flip


def apply(flip: Flip) -> None:
  """Flips a bit."""
  with open(flip.file, "r+b") as file:
    file.seek(flip.byte)
    value = file.read(1)[0] ^ (1 << flip.bit)
    file.seek(flip.byte)
    file.write(bytes([value]))


def truncate(path: Path, seed: int) -> None:
  """Cuts a file off at a random byte before its end."""
  with open(path, "r+b") as file:
    file.truncate(int(np.random.default_rng(seed).integers(max(1, path.stat().st_size))))


def zero(path: Path) -> None:
  """Replaces all bytes of a file by zeros."""
  path.write_bytes(bytes(path.stat().st_size))


def delete(path: Path) -> None:
  """Removes a file."""
  path.unlink()


def _files(path: Path) -> list[Path]:
  files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
  files = [file for file in files if file.stat().st_size]
  if not files:
    raise FileNotFoundError(f"{path} holds no bytes to damage")
  return files
