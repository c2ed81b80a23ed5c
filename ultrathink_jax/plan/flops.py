"""How many FLOPs a traced program does in matrix products, recomputation included."""

import math
from typing import Any

from jax.extend import core


def count_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> int:
  """Returns the FLOPs of all matrix products over all devices: two for each multiply and add.

  Scans count as often as they turn, while loops once, branches by the largest; what every device does by itself counts
  for each.
  """
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    lhs = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[dim] for dim in contracted)
  if name in ("ragged_dot", "ragged_dot_general"):
    return 2 * math.prod(equation.outvars[0].aval.shape) * equation.invars[0].aval.shape[-1]
  if name == "cond":
    return max(count_flops(branch) for branch in params["branches"])
  inner = sum(count_flops(value) for value in params.values() if isinstance(value, (core.ClosedJaxpr, core.Jaxpr)))
  if name == "scan":
    return params["length"] * inner
  if "mesh" in params and "in_specs" in params:  # what every device of the mesh does by itself
    return params["mesh"].size * inner
  if name == "pallas_call":
    return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int)) * inner
  return inner
