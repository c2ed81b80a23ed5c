"""Prints how fast data is read and prepared, against the train step that takes it and the libraries of tokenizers.

    python -m benchmarks.data --write

Reading: packed batches of a prepared cache, by `Loader.batches` (threads ahead of time) and `Loader.batch` (none), and
the train step of `tiny dense`, the fastest of --dtypes. Preparing: what `prepare` does with lines of JSON, from a file
to the tokens on disk, and the library's own encoding of the same texts, which are in memory already. Both sides have
the same threads in one process and take turns; ratios are taken round by round.
"""

import itertools
import json
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import environment, options
from benchmarks.ours import OurTraining
from benchmarks.shapes import make_config
from configs import base
from ultrathink_jax.config import DataConfig, from_mapping
from ultrathink_jax.data.loader import Loader
from ultrathink_jax.data.prepare import PreparedData, prepare
from ultrathink_jax.data.sentence_piece import train_sentencepiece

_TRAINING_CHARS = 3_000_000  # of a tokenizer
_NUM_ROWS = 8
_READING_GOAL, _PREPARING_GOAL = 20, 0.9

Rounds = list[tuple[float, float]]  # tokens per second, of ours and of what it is compared with


def standard_library_texts() -> list[str]:
  """Returns the modules of the standard library that are UTF-8."""
  texts = []
  for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
    if path.is_file() and not {"site-packages", "test", "tests"} & set(path.parts):
      content = path.read_bytes()
      try:
        texts.append(content.decode())
      except UnicodeDecodeError:
        continue
  return [text for text in texts if text]


def write_lines(path: Path, texts: Sequence[str], num_bytes: int) -> list[str]:
  """Writes texts as lines of JSON, again and again up to about `num_bytes`, and returns those that were written."""
  written, size = [], 0
  with open(path, "w", encoding="utf-8") as file:
    for text in itertools.cycle(texts):
      if size >= num_bytes:
        return written
      size += file.write(json.dumps({"text": text}) + "\n")
      written.append(text)
  return written


def train_tokenizer_json(texts: Sequence[str], vocab_size: int, path: Path) -> None:
  """Writes a byte-level BPE of the tokenizers library, as GPT-2 has it."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator(texts, trainer)
  path.mkdir(parents=True)
  tokenizer.save(str(path / "tokenizer.json"))
  (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


def library_encoders(folder: Path, vocab_size: int, texts: Sequence[str]) -> dict[str, tuple[str, Callable[..., Any]]]:
  """Returns {library: (path of a tokenizer that was trained on some of the texts, texts to lists of tokens)}."""
  import sentencepiece
  import tokenizers

  ends = itertools.accumulate(map(len, texts))
  sample = [text for text, end in zip(texts, ends, strict=True) if end <= _TRAINING_CHARS] or list(texts[:1])
  train_sentencepiece(sample, vocab_size, folder / "sentencepiece")
  train_tokenizer_json(sample, vocab_size, folder / "tokenizers")
  model, file = folder / "sentencepiece" / "tokenizer.model", folder / "tokenizers" / "tokenizer.json"
  processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
  tokenizer = tokenizers.Tokenizer.from_file(str(file))
  threads = environment.num_cores()
  return {
    "sentencepiece": (str(model), lambda batch: processor.encode(batch, num_threads=threads)),
    "tokenizers": (
      str(file),
      lambda batch: [encoding.ids for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False)],
    ),
  }


def seconds_of(call: Callable[..., Any], *arguments: Any) -> float:
  begun = time.perf_counter()
  call(*arguments)
  return time.perf_counter() - begun


def data_config(source: Path, tokenizer: str, workers: int) -> DataConfig:
  config = base.get_config().data
  config.update(source=f"jsonl:{source}", tokenizer=tokenizer, workers=workers)
  return from_mapping(config.to_dict(), DataConfig, "data.")


def measure_preparing(
  folder: Path, lines: Path, texts: list[str], encoder: tuple[str, Callable[..., Any]], values: flags.FlagValues
) -> tuple[Rounds, PreparedData]:
  """Returns tokens per second of `prepare` and of the library, and what was prepared last."""
  tokenizer, encode = encoder
  config = data_config(lines, tokenizer, values.workers)
  rounds = []
  for number in range(values.rounds):
    theirs = seconds_of(encode, texts)
    begun = time.perf_counter()
    data = prepare(config, values.vocab_size, folder / str(number), lambda _: None)
    ours = time.perf_counter() - begun
    num_tokens = sum(data.infos[0].tokens.values())
    rounds.append((num_tokens / ours, num_tokens / theirs))
  return rounds, data


def read_speed(batches: Callable[[int], Any], length: int, seconds: float) -> float:
  """Returns tokens per second of calls with the numbers 0, 1, 2 ..., the first of which is not counted."""
  batches(0)
  begun, count = time.perf_counter(), 0
  while not count or time.perf_counter() - begun < seconds:
    count += 1
    batches(count)
  return count * _NUM_ROWS * length / (time.perf_counter() - begun)


def measure_reading(data: PreparedData, step_speed: Callable[[], float], values: flags.FlagValues) -> dict[str, Rounds]:
  """Returns tokens per second of reading and of the train step, by what is read and how."""
  rounds: dict[str, Rounds] = {}
  for _ in range(values.rounds):
    step = step_speed()
    for length in (256, 1024):
      loader = Loader(data.train, data.tokenizer, _NUM_ROWS, length, seed=0, packing=values.packing)
      ahead = loader.batches()
      ways = {"Loader.batches": lambda _, ahead=ahead: next(ahead), "Loader.batch": loader.batch}
      for name, read in ways.items():
        speed = read_speed(read, length, values.seconds)
        rounds.setdefault(f"{name}, {_NUM_ROWS} x {length}", []).append((speed, step))
      ahead.close()
  return rounds


def train_step_speed(values: flags.FlagValues) -> Callable[[], float]:
  """Returns a function that measures the fastest train step of `tiny dense`, or returns what the flags say."""
  if values.train_tokens_per_second:
    return lambda: values.train_tokens_per_second
  runs = [OurTraining(make_config("tiny", "dense", dtype)) for dtype in values.dtypes]
  return lambda: max(run.tokens_per_call / min(run(1) for _ in range(3)) for run in runs)


def rows_of(results: dict[str, Rounds], goal: float) -> list[list[str]]:
  rows = []
  for name, rounds in results.items():
    ratios = [ours / theirs for ours, theirs in rounds]
    ours, theirs = (environment.spread(speeds) for speeds in zip(*rounds, strict=True))
    ratio = statistics.median(ratios)
    span = f"{ratio:.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
    rows.append([name, ours, theirs, span, f"{goal} {'reached' if ratio >= goal else 'missed'}"])
  return rows


def main(argv: Sequence[str]) -> None:
  values = flags.FlagValues()
  define = lambda kind, *args, **more: getattr(flags, f"DEFINE_{kind}")(*args, flag_values=values, **more)
  define("integer", "rounds", 3, "Turns of each side.", lower_bound=1)
  define("float", "seconds", 1.0, "How long each way of reading is timed in a round.", lower_bound=0)
  define("integer", "megabytes", 60, "Of lines to prepare.", lower_bound=1)
  define("integer", "vocab_size", 8192, "Of the tokenizers.", lower_bound=300)
  define("integer", "workers", 1, "Processes that prepare, 0: one for each core.", lower_bound=0)
  define("string", "packing", "split", "See data.packing.")
  define("list", "dtypes", ["float32", "bfloat16"], "Of the train step.")
  define("float", "train_tokens_per_second", None, "Instead of measuring the train step.")
  define("bool", "write", False, "Also write the page to benchmarks/results/.")
  options.parse(values, argv)
  preparing: dict[str, Rounds] = {}
  prepared = {}
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    lines = folder / "library.jsonl"
    texts = write_lines(lines, standard_library_texts(), values.megabytes * 1_000_000)
    for library, encoder in library_encoders(folder, values.vocab_size, texts).items():
      preparing[library], prepared[library] = measure_preparing(
        folder / f"{library}_data", lines, texts, encoder, values
      )
    reading = measure_reading(prepared["sentencepiece"], train_step_speed(values), values)
  text = page(values, reading, preparing)
  print(text)
  if values.write:
    print(f"[written] {environment.write_page('data', environment.cpu_name(), text)}")


def page(values: flags.FlagValues, reading: dict[str, Rounds], preparing: dict[str, Rounds]) -> str:
  versions = environment.versions("array_record", "grain", "jax", "sentencepiece", "tokenizers")
  header = lambda theirs: ["what", "ours, tokens/s", f"{theirs}, tokens/s", "ratio of the rounds, median", "goal"]
  return "\n\n".join(
    [
      f"{environment.cpu_name()}; {versions}; medians and ranges of {values.rounds} rounds.",
      f"Reading packed rows of a cache ({values.packing}), and the fastest train step of tiny dense, 8 x 256 tokens:",
      environment.table(header("train step"), rows_of(reading, _READING_GOAL)),
      f"Preparing {values.megabytes} MB of the standard library as lines of JSON, and the libraries' own encoding:",
      environment.table(header("library"), rows_of(preparing, _PREPARING_GOAL)),
    ]
  )


if __name__ == "__main__":
  environment.restart_with_product_settings()
  main(sys.argv)
