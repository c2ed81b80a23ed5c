"""Fills in a job file and hands it to the place it is for; settings are environment variables.

    NAME=... IMAGE=... python launch/submit.py [--dry-run] gke.yaml|vertex.yaml|sagemaker.json -- --config=... ...

${ARGUMENTS} of the file becomes what stands after `--`. --dry-run prints the filled file and the command.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from string import Template

COMMANDS = {  # FILE is the filled file
  "gke.yaml": "kubectl apply --filename=FILE",
  "vertex.yaml": "gcloud ai custom-jobs create --region=${REGION} --display-name=${NAME} --config=FILE",
  "sagemaker.json": "aws sagemaker create-training-job --cli-input-json=file://FILE",
}


def main(argv: list[str]) -> int:
  """Returns the exit code of the place's tool, 2 where settings are missing."""
  at = argv.index("--") if "--" in argv else len(argv)
  options, arguments = argv[:at], argv[at + 1 :]
  is_dry = "--dry-run" in options
  names = [option for option in options if option != "--dry-run"]
  if len(names) != 1 or names[0] not in COMMANDS:
    return _refuse(f"{' '.join(names) or 'no file'} is not one of {', '.join(COMMANDS)}")
  if not arguments:
    return _refuse("nothing to run; write -- --config=configs/NAME.py --workdir=DIR after the file")
  template, command = Template(Path(__file__).with_name(names[0]).read_text()), Template(COMMANDS[names[0]])
  settings = {**os.environ, "ARGUMENTS": json.dumps(arguments)}
  wanted = dict.fromkeys(template.get_identifiers() + command.get_identifiers())
  missing = [name for name in wanted if not settings.get(name)]
  if missing:
    return _refuse(f"{', '.join(missing)} not set; {names[0]} says what they mean: put NAME=... before the command")
  filled, words = template.substitute(settings), shlex.split(command.substitute(settings))
  if is_dry:
    print(f"{filled}\n{shlex.join(words)}")
    return 0
  with tempfile.NamedTemporaryFile("w", suffix=Path(names[0]).suffix) as file:
    file.write(filled)
    file.flush()
    return subprocess.run([word.replace("FILE", file.name) for word in words], check=False).returncode


def _refuse(why: str) -> int:
  print(f"error: {why}", file=sys.stderr)
  return 2


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
