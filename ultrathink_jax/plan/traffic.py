"""How many bytes a compiled program moves between a chip's memory and its cores, read from its HLO text."""

import re

from ultrathink_jax.plan.collectives import Instruction, Program, called_by, shape_bytes

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota",
         "partition-id", "replica-id", "after-all", "opt-barrier"}  # fmt: skip
_NAME = re.compile(r"%([\w.\-]+)")
_DIMS = re.compile(r"\[(\d+),")


def memory_traffic(program: Program) -> int:
  """Returns the bytes of one device in a step: what each instruction reads and writes, fused ones being one.

  An array stacked over the turns of the loop it is used in counts as one slice a turn. What stays in the cores' own
  memory (S(1) in a layout) is not counted.
  """
  fused = {
    name
    for instructions in program.computations.values()
    for instruction in instructions
    if instruction.opcode not in ("while", "conditional", "call")
    for name in called_by(instruction)
  }
  turns = _turns(program)
  total = 0
  for name, instructions in program.computations.items():
    times = program.times.get(name, 0)
    if times and name not in fused:
      total += times * _one_pass(instructions, turns.get(name, 1))
  return total


def _turns(program: Program) -> dict[str, int]:
  """Returns how often each loop body turns whenever its loop is reached."""
  turns = {}
  for name, instructions in program.computations.items():
    for instruction in instructions:
      if instruction.opcode == "while":
        for called in called_by(instruction):
          turns[called] = program.times.get(called, 0) // max(1, program.times.get(name, 1))
  return turns


def _one_pass(instructions: list[Instruction], turns: int) -> int:
  sizes = {i.name: _bytes(i.shape, turns) for i in instructions}
  total = 0
  for instruction in instructions:
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
      continue
    operands = set(_NAME.findall(instruction.rest.split("), ")[0]))
    total += sizes[instruction.name] + sum(sizes.get(operand, 0) for operand in operands)
  return total


def _bytes(shape: str, turns: int) -> int:
  if "S(1)" in shape and not shape.startswith("("):
    return 0
  stacked = _DIMS.search(shape)
  is_stacked = turns > 1 and stacked is not None and int(stacked[1]) == turns and not shape.startswith("(")
  return shape_bytes(shape) // (turns if is_stacked else 1)
