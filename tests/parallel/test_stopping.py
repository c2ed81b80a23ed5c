"""Processes that stop agree on where, whatever the order in which they hear of it."""

import queue
import random
import threading
import time

import pytest

from ultrathink_jax.parallel.stopping import Stopping


class Network:
  """Processes whose messages arrive late, in order between two of them."""

  def __init__(self, count, seed):
    self._random = random.Random(seed)
    self._queues = {}
    self.processes = [Stopping(index, count, self._teller(index, count)) for index in range(count)]
    for one, other in [(0, i) for i in range(1, count)] + [(i, 0) for i in range(1, count)]:
      self._queues[one, other] = queue.Queue()
      threading.Thread(target=self._deliver, args=(one, other), daemon=True).start()

  def _teller(self, index, count):
    others = range(1, count) if index == 0 else [0]
    return lambda message: [self._queues[index, other].put(message) for other in others]

  def _deliver(self, sender, receiver):
    while True:
      message = self._queues[sender, receiver].get()
      time.sleep(self._random.random() * 0.01)
      self.processes[receiver].hear(sender, message)


@pytest.mark.parametrize("seed", range(12))
def test_all_stop_after_the_same_turn_which_none_has_gone_beyond(seed):
  count = 1 + seed % 4
  network, chance = Network(count, seed), random.Random(seed)
  turns = [0] * count
  barrier = threading.Barrier(count) if seed % 3 else None  # else they do not wait for each other

  def train(index):
    while network.processes[index].may_begin():
      turns[index] += 1
      if barrier:
        barrier.wait(timeout=10)  # a collective operation: broken if one stops too early
      time.sleep(0.001)

  threads = [threading.Thread(target=train, args=(index,)) for index in range(count)]
  for thread in threads:
    thread.start()
  time.sleep(0.05)
  for index in chance.sample(range(count), chance.randint(1, count)):  # some are signalled, or all
    network.processes[index].request("SIGTERM")
  for thread in threads:
    thread.join(timeout=10)
  assert not any(thread.is_alive() for thread in threads)
  assert len(set(turns)) == 1
  assert turns[0] > 0
  assert [process.reason for process in network.processes] == ["SIGTERM"] * count
  assert not any(process.may_begin() for process in network.processes)


def test_a_process_that_has_begun_nothing_goes_on_to_where_the_furthest_is():
  ahead = Stopping(0, 2, lambda message: behind.hear(0, message))
  behind = Stopping(1, 2, lambda message: ahead.hear(1, message))
  assert [ahead.may_begin() for _ in range(3)] == [True] * 3
  behind.request("SIGINT")
  assert [behind.may_begin() for _ in range(5)] == [True] * 3 + [False] * 2
  assert not ahead.may_begin()


def test_asking_before_each_step_costs_next_to_nothing():
  process = Stopping(1, 2, lambda message: pytest.fail("a message"))
  begun = time.perf_counter()
  for _ in range(10_000):
    process.may_begin()
  assert time.perf_counter() - begun < 1.0  # 100 microseconds each, on a busy machine
