"""Reading all of a source at once."""

import pytest

from ultrathink_jax.data.documents import Record, Reject
from ultrathink_jax.data.sources import SourceOptions, find_corpus


class Reading:
  """What a source gives: its entries in order, as records and rejects, and what it logs."""

  def __init__(self, spec, directory, **options):
    self.messages = []
    corpus = find_corpus(str(spec), SourceOptions(**options), directory, self.messages.append)
    self.identity = corpus.identity
    self.splits = corpus.open()
    self.shards = [shard for shards in self.splits.values() for shard in shards]
    self.entries = [entry for shard in self.shards for entry in shard.read()]
    self.records = [entry for entry in self.entries if isinstance(entry, Record)]
    self.rejects = [entry for entry in self.entries if isinstance(entry, Reject)]

  @property
  def names(self):
    return [entry.where for entry in self.entries]

  def fields(self, name="text"):
    return [record.fields[name] for record in self.records]


@pytest.fixture
def read(tmp_path_factory):
  def function(spec, **options):
    return Reading(spec, tmp_path_factory.mktemp("prepared"), **options)

  return function
