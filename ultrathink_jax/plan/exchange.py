"""What the compiled program shows of how experts and fully sharded parameters are exchanged."""

import math
import re

from jax.sharding import Mesh

from ultrathink_jax.config import Config
from ultrathink_jax.parallel.mesh import batch_ways
from ultrathink_jax.plan.collectives import Collective, Program, shape_bytes, shape_size

_WORK = ("fusion", "convolution", "dot", "custom-call")
_MANY = 1 << 20  # bytes of an array of weights


def exchange_lines(config: Config, mesh: Mesh, program: Program, found: list[Collective]) -> list[str]:
  """Returns what can be said of the exchanges over the expert and fsdp axes, one sentence each."""
  lines = []
  if mesh.shape["expert"] > 1:
    lines += _of_experts(config, mesh, found)
  if mesh.shape["fsdp"] > 1:
    lines += _of_fsdp(program, found)
  return lines or ["Neither the expert nor the fsdp axis has several devices."]


def expert_buffer_size(config: Config, mesh: Mesh) -> int:
  """Returns the numbers in one device's buffer of routed rows, for one chunk of a micro-batch."""
  model, train = config.model, config.train
  ways = batch_ways(mesh.shape)
  rows = train.micro_batch_size // ways
  tokens = rows * train.sequence_length // mesh.shape["context"] // model.expert_chunks
  choices, devices = tokens * model.experts_per_token, mesh.shape["expert"]
  if model.capacity_factor:
    slots = model.num_experts * min(tokens, math.ceil(model.capacity_factor * choices / model.num_experts))
  else:
    most = tokens * min(model.experts_per_token, model.num_experts // devices)
    slots = devices * min(most, math.ceil(model.expert_buffer_factor * choices / devices))
  return slots * model.embed_dim


def gathers_over_experts(config: Config, mesh: Mesh, found: list[Collective]) -> list[Collective]:
  """Returns the all-gathers over the expert axis of more than counts: of tokens, their scores, or weights."""
  least = expert_buffer_size(config, mesh) // 16
  return [c for c in found if c.kind == "all-gather" and "expert" in c.axes and shape_size(c.shape) > least]


def _of_experts(config: Config, mesh: Mesh, found: list[Collective]) -> list[str]:
  buffer = expert_buffer_size(config, mesh)
  swaps = [c for c in found if c.kind == "all-to-all" and c.axes == ("expert",) and shape_size(c.shape) > buffer // 16]
  sizes = sorted({shape_size(each.shape) for each in swaps})
  spelled = ", ".join(f"{size:,}" for size in sizes) or "no"
  relation = "which is" if sizes == [buffer] else "and not"
  lines = [
    f"expert: {sum(each.count for each in swaps)} all-to-alls of {spelled} numbers, {relation} a device's buffer of "
    f"routed rows ({buffer:,})"
  ]
  gathers = gathers_over_experts(config, mesh, found)
  if not gathers:
    return [*lines, "expert: no all-gather over the expert axis: neither tokens nor experts' weights are gathered"]
  names = ", ".join(f"{each.shape.split('{')[0]} of {each.name.rsplit('/', 1)[-1]}" for each in gathers[:3])
  return [*lines, f"expert: {len(gathers)} all-gathers over the expert axis beside them: {names}"]


def _of_fsdp(program: Program, found: list[Collective]) -> list[str]:
  gathers = [each for each in found if each.kind == "all-gather" and "fsdp" in each.axes]
  total = sum(each.moved_bytes for each in gathers)
  asynchronous = sum(each.moved_bytes for each in gathers if each.is_async)
  lines = [
    f"fsdp: {sum(each.count for each in gathers)} all-gathers of {total / 2**30:.2f} GiB, "
    f"{asynchronous / max(1, total):.0%} of the bytes asynchronous"
  ]
  if work := overlapped_work(program):
    mean = sum(work) / len(work)
    lines.append(f"fsdp: between start and end of an asynchronous gather {mean:.1f} other computations run")
  if carried := carried_gathers(program):
    lines.append(f"fsdp: {carried} gathered arrays pass from one turn of a loop to the next: begun a period ahead")
  else:
    lines.append(
      "fsdp: no gathered array passes from one turn of a loop to the next: weights are gathered in their turn"
    )
  return lines


def overlapped_work(program: Program) -> list[int]:
  """Returns, for each asynchronous all-gather in schedule order, how many computations start before it is done."""
  counts = []
  for name, instructions in program.computations.items():
    if not program.times.get(name):
      continue
    begun: dict[str, int] = {}
    for place, instruction in enumerate(instructions):
      if _starts_gather(program, instruction):
        begun[instruction.name] = place
      elif instruction.opcode.endswith("-done") or "async-collective-done" in instruction.rest:
        for operand in re.findall(r"%([\w.\-]+)", instruction.rest):
          if operand in begun:
            between = instructions[begun.pop(operand) + 1 : place]
            counts.append(sum(i.opcode in _WORK for i in between))
  return counts


def _starts_gather(program: Program, instruction) -> bool:
  if instruction.opcode == "all-gather-start":
    return True
  if instruction.opcode != "async-start":
    return False
  called = re.search(r"calls=%?([\w.\-]+)", instruction.rest)
  return bool(called) and any(i.opcode == "all-gather" for i in program.computations.get(called[1], ()))


def carried_gathers(program: Program, least_bytes: int = _MANY) -> int:
  """Returns how many all-gathers of more than `least_bytes` give what a loop's body passes to its next turn."""
  count = 0
  for instructions in program.computations.values():
    for loop in (i for i in instructions if i.opcode == "while"):
      body = program.computations.get(re.search(r"body=%?([\w.\-]+)", loop.rest)[1], [])
      if not body:
        continue
      by_name = {i.name: i for i in body}
      for operand in re.findall(r"%([\w.\-]+)", body[-1].rest.split("metadata")[0]):
        source = _through(by_name, operand)
        count += (
          source is not None and shape_bytes(source.shape) > least_bytes and source.opcode.startswith("all-gather")
        )
  return count


def _through(by_name: dict, name: str):
  """Returns the instruction that makes `name`, seen through copies."""
  instruction = by_name.get(name)
  while instruction is not None:
    operands = re.findall(r"%([\w.\-]+)", instruction.rest.partition(")")[0])
    is_copy = instruction.opcode == "fusion" and len(operands) == 1  # if of a gather, which nothing computes with
    if not (is_copy or instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start")):
      break
    instruction = by_name.get(operands[0])
  return instruction
