"""What a compiled program exchanges between devices: bytes by kind and mesh axis, read from its HLO text."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_NARROW = re.compile(r"[a-z]*(\d+)")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|\w+_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_EXPLICIT = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_MESH_AXIS = re.compile(r"'?([\w.\-]+)'?(?:=(\d+)|:\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")


class Instruction(NamedTuple):
  name: str
  shape: str
  opcode: str
  rest: str  # operands and attributes


class Collective(NamedTuple):
  """One instruction of a program: `count` times a step, devices along `axes` exchange.

  Attributes:
    kind: of KINDS.
    axes: mesh axes, in the mesh's order; empty where the groups are of no axes of the mesh.
    group: devices that exchange with each other.
    bytes: of the whole array on one device: what a gather returns, and others take.
    is_async: other work may run between its start and its end.
    name: of the operation in the traced program.
  """

  kind: str
  axes: tuple[str, ...]
  group: int
  bytes: int
  count: int
  is_async: bool
  shape: str
  name: str

  @property
  def moved_bytes(self) -> int:
    """Bytes that one device receives in a step."""
    share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
    return round(self.count * self.bytes * share * (2 if self.kind == "all-reduce" else 1))


@dataclasses.dataclass(frozen=True)
class Program:
  """An HLO module as computations of instructions, and how often each runs in a step."""

  computations: dict[str, list[Instruction]]
  times: dict[str, int]


def shape_bytes(shape: str) -> int:
  """Returns the bytes of an HLO shape, the sum over a tuple's."""
  total = 0
  for dtype, dims in _ARRAY.findall(shape):
    total += _item_bytes(dtype) * math.prod(int(size) for size in dims.split(",") if size)
  return total


def shape_size(shape: str) -> int:
  """Returns the numbers in an HLO shape, the sum over a tuple's."""
  return sum(math.prod(int(size) for size in dims.split(",") if size) for _, dims in _ARRAY.findall(shape))


def _item_bytes(dtype: str) -> int:
  if dtype in _BYTES:
    return _BYTES[dtype]
  bits = _NARROW.match(dtype)
  return max(1, int(bits[1]) // 8) if bits else 0


def parse(hlo: str) -> Program:
  """Returns the program of an HLO text.

  A loop runs as often as the compiler knows, else as often as the largest constant its condition compares with.
  """
  computations: dict[str, list[Instruction]] = {}
  entry = current = ""
  for line in hlo.splitlines():
    if header := _HEADER.match(line):
      current = header[2]
      computations[current] = []
      entry = current if header[1] else entry
    elif current and (match := _LINE.match(line)):
      computations[current].append(Instruction(*match.groups()))
  times: dict[str, int] = defaultdict(int)
  _visit(computations, entry, 1, times)
  return Program(computations, dict(times))


def _visit(computations: dict[str, list[Instruction]], name: str, factor: int, times: dict[str, int]) -> None:
  times[name] += factor
  for instruction in computations.get(name, ()):
    trips = _trips(computations, instruction) if instruction.opcode == "while" else 1
    for called in called_by(instruction):
      _visit(computations, called, factor * trips, times)


def called_by(instruction: Instruction) -> Iterator[str]:
  """Yields the computations that an instruction runs."""
  for one, several in _CALLED.findall(instruction.rest):
    yield from (name.strip().lstrip("%") for name in (one or several).split(","))


def _trips(computations: dict[str, list[Instruction]], loop: Instruction) -> int:
  if known := _TRIPS.search(loop.rest):
    return int(known[1])
  condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]
  bounds = [int(i.rest.split(")")[0]) for i in computations.get(condition, ()) if _is_bound(i)]
  return max(bounds, default=1)


def _is_bound(instruction: Instruction) -> bool:
  return instruction.opcode == "constant" and re.match(r"\d+\)", instruction.rest) is not None


def find_collectives(program: Program, mesh: Mesh) -> list[Collective]:
  """Returns every exchange of the program.

  TPU programs spell an exchange that goes on during products as fusions for its start, each product and its end, all of
  which name it: it counts once.
  """
  found, fused = [], {}
  overlapped = {
    channel
    for name, instructions in program.computations.items()
    if name.startswith("async_collective")
    for channel in map(_channel, instructions)
    if channel
  }
  for name, instructions in program.computations.items():
    count = program.times.get(name, 0)
    for instruction in instructions if count else ():
      each = _collective(instruction, name, count, mesh, instructions)
      if each is None:
        continue
      channel = _channel(instruction)
      if channel in overlapped and name.startswith(("async_collective", "fused_computation")):
        fused[channel, each.kind, each.bytes] = each._replace(is_async=True)
      else:
        found.append(each)
  return found + list(fused.values())


def _channel(instruction: Instruction) -> str | None:
  match = re.search(r"channel_id=(\d+)", instruction.rest)
  return match[1] if match else None


def _collective(
  instruction: Instruction, computation: str, count: int, mesh: Mesh, around: list[Instruction]
) -> Collective | None:
  kind = instruction.opcode.removesuffix("-start")
  if kind not in KINDS or instruction.opcode.endswith("-done"):
    return None
  groups = _groups(instruction.rest, mesh.size)
  size = 2 if kind == "collective-permute" else groups.shape[1]
  if size == 1:
    return None
  total = shape_bytes(instruction.shape)
  is_start = instruction.opcode != kind
  if is_start and kind == "all-gather":  # of (operand, result)
    total = total * size // (size + 1)
  elif is_start and kind == "collective-permute":
    total //= 2
  elif kind == "reduce-scatter":
    total *= size
  root = around[-1]
  if kind == "all-reduce" and size > 1 and root.opcode == "dynamic-slice" and len(around) < 30:
    # TPU programs spell a reduce-scatter as a fusion of an all-reduce and the slice that is kept of it.
    kind = "reduce-scatter" if shape_bytes(root.shape) * size == total else kind
  metadata = re.search(r'op_name="([^"]*)"', instruction.rest)
  is_async = is_start or "async" in computation
  name = metadata[1] if metadata else instruction.name
  return Collective(kind, _axes(groups, mesh), size, total, count, is_async, instruction.shape, name)


def _groups(attributes: str, num_devices: int) -> np.ndarray:
  """Returns the groups of devices, one a row, by their place in the mesh; for a permute, its pairs."""
  numbers = lambda text: [int(n) for n in text.split(",")]
  if iota := _IOTA.search(attributes):
    return _arranged(numbers(iota[2]), numbers(iota[3]) if iota[3] else None).reshape(numbers(iota[1]))
  if of_mesh := _MESH.search(attributes):
    sizes = {name: int(size) for name, size, *_ in _MESH_AXIS.findall(of_mesh[1])}
    order = [math.prod(sizes.values())] if of_mesh[2] is None else numbers(of_mesh[2])
    return _along(_arranged(order, numbers(of_mesh[3]) if of_mesh[3] else None), sizes, of_mesh[4])
  if listed := _EXPLICIT.search(attributes) or _PAIRS.search(attributes):
    return np.array([numbers(group) for group in re.findall(r"[\d,]+", listed[1].replace("},{", "} {"))])
  return np.arange(num_devices)[None]


def _arranged(sizes: list[int], order: list[int] | None) -> np.ndarray:
  devices = np.arange(math.prod(sizes)).reshape(sizes)
  return devices if order is None else devices.transpose(order)


def _along(devices: np.ndarray, sizes: dict[str, int], along: str) -> np.ndarray:
  """Returns the groups of `devices`, laid out in `sizes`, along axes such as 'a','b':(2)4.

  The second stands for 4 devices along b, each after 2 times what is left of b.
  """
  parts: list[tuple[int, bool]] = []
  wanted = {name: (int(before or 1), int(size or 0)) for name, _, before, size in _MESH_AXIS.findall(along)}
  for name, whole in sizes.items():
    if name not in wanted:
      parts.append((whole, False))
      continue
    before, size = wanted[name][0], wanted[name][1] or whole
    parts += [(before, False), (size, True), (whole // before // size, False)]
  devices = devices.reshape([size for size, _ in parts])
  inside = [dim for dim, (_, is_inside) in enumerate(parts) if is_inside]
  outside = [dim for dim, (_, is_inside) in enumerate(parts) if not is_inside]
  return devices.transpose(outside + inside).reshape(-1, math.prod(parts[dim][0] for dim in inside))


def _axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
  """Returns the mesh axes along which the devices of a group differ; none if groups are not whole axes."""
  coordinates = np.stack(np.unravel_index(groups, mesh.devices.shape), axis=-1)
  differs = np.any(coordinates != coordinates[:, :1], axis=(0, 1))
  return tuple(axis for axis, is_different in zip(mesh.axis_names, differs, strict=True) if is_different)


def by_kind_and_axes(collectives: list[Collective]) -> dict[tuple[str, tuple[str, ...]], dict[str, int]]:
  """Returns {(kind, axes): {"count", "bytes", "async_bytes"}}: exchanges a step, and bytes one device receives."""
  table: dict[tuple[str, tuple[str, ...]], dict[str, int]] = {}
  for each in collectives:
    line = table.setdefault((each.kind, each.axes), {"count": 0, "bytes": 0, "async_bytes": 0})
    line["count"] += each.count
    line["bytes"] += each.moved_bytes
    line["async_bytes"] += each.moved_bytes * each.is_async
  return dict(sorted(table.items(), key=lambda item: -item[1]["bytes"]))
