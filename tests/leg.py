"""Trains on from the newest checkpoint to a given step and prints digests of what it restored, read and saved.

python -m tests.leg CONFIG DATA WORKDIR STEPS [--config.mesh.axis=size ...]
"""

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np

from ultrathink_jax import main
from ultrathink_jax.data.prepare import open_prepared
from ultrathink_jax.parallel import processes
from ultrathink_jax.parallel.devices import configure_jax, describe_devices
from ultrathink_jax.parallel.placement import gather
from ultrathink_jax.recipes import RECIPES
from ultrathink_jax.testing.faults import from_environment
from ultrathink_jax.train.checkpoint import Checkpoints, shapes_on
from ultrathink_jax.train.goodput import Goodput
from ultrathink_jax.train.loop import Surroundings, train
from ultrathink_jax.train.plan import make_plan
from ultrathink_jax.train.profiling import Profiler
from ultrathink_jax.train.supervisor import Supervisor


def digest(mesh, tree):
  """Returns the hash of all arrays of a tree."""
  total = hashlib.sha256()
  for leaf in jax.tree.leaves(gather(mesh, tree)):
    total.update(np.asarray(leaf).tobytes())
  return total.hexdigest()


def restored(plan, workdir):
  """Returns the newest saved state on the mesh of `plan`, None where there is none."""
  with jax.set_mesh(plan.mesh), Checkpoints(workdir / "checkpoints") as checkpoints:
    step = checkpoints.newest_intact()
    return None if step is None else checkpoints.restore(step, shapes_on(plan.shapes, plan.shardings))[0]


def recording(make_source, read):
  """Returns `make_source` with the digest of every row kept in `read`, {step: {row: digest}}."""

  def make(rows):
    source = make_source(rows)

    def next_batch(step, state):
      batch = source(step, state)
      digests = [hashlib.sha256(tokens.tobytes()).hexdigest()[:16] for tokens in batch.tokens]
      read[step] = dict(zip(map(int, rows), digests, strict=True))
      return batch

    return next_batch

  return make


def run(path, data_directory, workdir, steps, flags):
  """Makes the leg."""
  argv = ["leg", f"--config={path}", *flags]
  config = main._parse(argv, *main._define_flags(argv))
  schedule = dataclasses.replace(config.optimizer, schedule="constant", warmup_steps=0)  # regardless of the last step
  config = dataclasses.replace(config, optimizer=schedule, train=dataclasses.replace(config.train, steps=steps))
  config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, every_steps=0))
  recipe = RECIPES[config.recipe](config)
  plan = make_plan(config, recipe, describe_devices())
  prepared = open_prepared(data_directory)
  said, read = {}, {}
  state = restored(plan, workdir)
  if state is not None:
    said |= {"restored_params": digest(plan.mesh, state.params), "restored_state": digest(plan.mesh, state)}
  make_source = recording(lambda rows: recipe.source(prepared, rows), read)
  with Supervisor(workdir) as supervisor:
    around = Surroundings(
      workdir,
      make_source,
      {"seed": 0},
      lambda params: {},
      supervisor,
      from_environment(0, workdir),
      Profiler(None, workdir, print),
      Goodput(workdir),
      lambda shardings: None,
    )
    outcome = train(config, recipe, plan, around)
  said |= {"trained_params": digest(plan.mesh, outcome.params)}
  said |= {"saved_state": digest(plan.mesh, restored(plan, workdir)), "read": read}
  print(json.dumps(said), flush=True)


if __name__ == "__main__":
  path, data_directory, workdir, steps, *flags = sys.argv[1:]
  configure_jax()
  with processes.joined(dict.fromkeys(processes.VARIABLES), os.environ, True):
    run(path, Path(data_directory), Path(workdir), int(steps), flags)
