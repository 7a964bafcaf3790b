"""The launch files: every option and field is one that exists, and the commands they hold train to the end."""

import copy
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.train import shared_cache
from train.__main__ import parser
from train.config import load, override

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "tools" / "launch"
TINY = "tests/train/tiny.py"
QUICK = ["--smoke", "--set=model.depths=()"]
PATIENCE = 240
JOBSETS = ("jobset_tpu.yaml", "jobset_gpu.yaml")

# The long options of sbatch(1) in the manual of Slurm 24.05 (https://slurm.schedmd.com/sbatch.html) that a training
# job may want; each with the form of its value, None where it takes none.
DURATION = r"(\d+-)?\d+(:\d\d){0,2}"
SBATCH = {
    "account": r"\S+",
    "constraint": r"\S+",
    "cpus-per-task": r"\d+",
    "error": r"\S+",
    "exclusive": None,
    "gpus-per-node": r"(\w+:)?\d+",
    "gres": r"\S+",
    "job-name": r"\S+",
    "mem": r"\d+[KMGT]?",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "open-mode": r"append|truncate",
    "output": r"\S+",
    "partition": r"\S+",
    "qos": r"\S+",
    "requeue": None,
    "signal": r"([BR]+:)?[A-Z0-9]+(@\d+)?",
    "time": DURATION,
}

# What stands in for srun: the command once for each task, with the variables of the step; a task that fails ends all.
SRUN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
assert words.pop(0) == "--kill-on-bad-exit=1"
tasks = []
for rank in range(2):
    step = dict(SLURM_NTASKS="2", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
    step |= dict(SLURM_STEP_NODELIST="localhost", SLURM_STEP_NUM_NODES="1", RANK=str(rank))
    tasks.append(subprocess.Popen([*words, "--devices=1", *{extra!r}], env={{**os.environ, **step}}))
sys.exit(max(task.wait(timeout={patience}) % 256 for task in tasks))
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(**variables):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "JAX_"))}
    return kept | shared_cache.environment() | {"JAX_PLATFORMS": "cpu", "PYTHON": sys.executable} | variables


def program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def finished(workdir):
    return (workdir / "report" / "report.md").exists() and (workdir / "checkpoints" / "4" / "manifest").is_dir()


# ---- shell


@pytest.mark.parametrize("name", ["slurm.sbatch", "local.sh"])
def test_scripts_are_bash_that_parses(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    assert os.access(LAUNCH / name, os.X_OK)


def wrong_directives(text):
    """Return what sbatch would not take, and directives after the first command, which it would not read."""
    found, commands = [], False
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
            name, value = match.groups() if match else (None, None)
            form = SBATCH.get(name, "")
            fits = value is None if form is None else value is not None and re.fullmatch(form, value)
            if commands or name not in SBATCH or not fits:
                found.append(line)
        commands = commands or bool(line.strip() and not line.startswith("#"))
    return found


def test_directives_are_options_of_sbatch():
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert text.startswith("#!/bin/bash\n")
    assert len(re.findall("^#SBATCH", text, re.MULTILINE)) >= 8
    assert wrong_directives(text) == []
    for wrong in ("--node=2", "--nodes 2", "--time=soon", "--requeue=yes", "--signal"):
        assert wrong_directives(text.replace("#SBATCH --nodes=2", f"#SBATCH {wrong}")) == [f"#SBATCH {wrong}"]
    assert wrong_directives(text + "#SBATCH --nodes=3\n") == ["#SBATCH --nodes=3"]


def submit(tmp_path, srun, *arguments, **variables):
    """Run the batch script with stand-ins for SLURM's commands on the path."""
    program(tmp_path / "bin" / "srun", srun)
    program(tmp_path / "bin" / "scontrol", f'#!/bin/bash\necho "$@" >> {tmp_path}/scontrol.txt\n')
    return subprocess.run(
        [LAUNCH / "slurm.sbatch", *arguments],
        cwd=ROOT,
        env=environment(SLURM_JOB_ID="77", PATH=f"{tmp_path}/bin:{os.environ['PATH']}", **variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.slow
def test_batch_script_trains_one_process_a_task_to_the_end(tmp_path):
    srun = SRUN.format(python=sys.executable, extra=QUICK, patience=PATIENCE)
    port = str(free_port())
    done = submit(tmp_path, srun, TINY, "--set", "seed=3", WORKDIR=str(tmp_path / "run"), JAX_COORDINATOR_PORT=port)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 cpu devices" in done.stdout
    assert finished(tmp_path / "run")
    assert "seed = 3" in (tmp_path / "run" / "config.txt").read_text()
    assert not (tmp_path / "scontrol.txt").exists()


@pytest.mark.parametrize(("code", "ends", "requeued"), [(138, 0, True), (143, 143, False), (2, 2, False)])
def test_batch_script_goes_back_into_the_queue_only_when_the_time_is_over(tmp_path, code, ends, requeued):
    done = submit(tmp_path, f"#!/bin/bash\nexit {code}\n", TINY)
    assert done.returncode == ends
    assert (tmp_path / "scontrol.txt").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"


def test_batch_script_says_how_it_is_used(tmp_path):
    done = submit(tmp_path, "#!/bin/bash\nexit 0\n")
    assert done.returncode != 0
    assert "usage: sbatch" in done.stderr


def start_locally(count, *arguments):
    return subprocess.Popen(
        [LAUNCH / "local.sh", str(count), *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process):
    """Return the output and the code; leave no process behind."""
    try:
        return process.communicate(timeout=PATIENCE)[0], process.returncode
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_local_script_trains_in_two_processes_stops_saved_and_goes_on(tmp_path):
    workdir = tmp_path / "run"
    steps = ["--set=steps=20000", *QUICK[1:]]
    process = start_locally(2, TINY, "--workdir", str(workdir), *steps)
    limit = time.monotonic() + PATIENCE
    log = workdir / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 5):
        assert time.monotonic() < limit
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal does: the script and all processes
    output, code = end(process)
    assert code == 130, output
    assert "on 2 cpu devices" in output
    saved = re.search(r"stopped by SIGINT: saved step (\d+)", output)
    assert saved, output
    assert (workdir / "checkpoints" / saved[1] / "manifest").is_dir()


@pytest.mark.parametrize("words", [[], ["2"], ["two", TINY], ["0", TINY]])
def test_local_script_says_how_it_is_used(words):
    done = subprocess.run([LAUNCH / "local.sh", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: tools/launch/local.sh" in done.stderr


# ---- Kubernetes

# The fields of a JobSet of jobset.x-k8s.io/v1alpha2 that the files use, by type; a template is a Kubernetes Job.
NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
RESTARTS = ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
JOBSET = {
    "apiVersion": ("jobset.x-k8s.io/v1alpha2",),
    "kind": ("JobSet",),
    "metadata": {"name": NAME, "annotations?": {"alpha.jobset.sigs.k8s.io/exclusive-topology": str}},
    "spec": {
        "network?": {"enableDNSHostnames?": bool, "subdomain?": NAME, "publishNotReadyAddresses?": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "rules?": [
                {
                    "name": r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?",
                    "action": RESTARTS,
                    "onJobFailureReasons?": [("PodFailurePolicy", "BackoffLimitExceeded", "DeadlineExceeded")],
                    "onJobFailureMessagePatterns?": [str],
                }
            ],
        },
        "replicatedJobs": [{"name": NAME, "replicas": int, "template": {"spec": dict}}],
    },
}


def misfits(value, form, path="jobset"):
    """Return where a value departs from a form: fields (`?` = optional), a list, choices, a pattern or a type."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return [f"{path} is not a mapping"]
        fields = {name.rstrip("?"): inner for name, inner in form.items()}
        found = [f"{path}.{name} is unknown" for name in value if name not in fields]
        found += [f"{path}.{name} is missing" for name in form if not name.endswith("?") and name not in value]
        return found + [
            one for name in value if name in fields for one in misfits(value[name], fields[name], f"{path}.{name}")
        ]
    if isinstance(form, list):
        if not isinstance(value, list) or not value:
            return [f"{path} is not a list"]
        return [one for index, entry in enumerate(value) for one in misfits(entry, form[0], f"{path}[{index}]")]
    if isinstance(form, tuple):
        return [] if value in form else [f"{path} is {value!r}"]
    if isinstance(form, str):
        return [] if isinstance(value, str) and re.fullmatch(form, value) else [f"{path} is {value!r}"]
    return [] if type(value) is form else [f"{path} is {value!r}"]


def jobset(name):
    return yaml.safe_load((LAUNCH / name).read_text())


def job(described):
    (entry,) = described["spec"]["replicatedJobs"]
    return entry["template"]["spec"]


def container(described):
    (found,) = job(described)["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize("name", JOBSETS)
def test_jobset_has_only_fields_that_exist(name):
    assert misfits(jobset(name), JOBSET) == []


def test_jobset_form_sees_a_wrong_field():
    for path, value, message in (
        (("spec", "failurePolicy", "maxRestart"), 3, "jobset.spec.failurePolicy.maxRestart is unknown"),
        (("spec", "failurePolicy", "maxRestarts"), "3", "jobset.spec.failurePolicy.maxRestarts is '3'"),
        (("spec", "replicatedJobs"), [], "jobset.spec.replicatedJobs is not a list"),
        (("metadata", "name"), "Jax_Layers", "jobset.metadata.name is 'Jax_Layers'"),
        (("spec", "suspend"), True, "jobset.spec.suspend is unknown"),
    ):
        wrong = copy.deepcopy(jobset("jobset_gpu.yaml"))
        *parents, last = path
        node = wrong
        for parent in parents:
            node = node[parent]
        node[last] = value
        assert misfits(wrong, JOBSET) == [message]


def check_job(described):
    """Validate the template with Kubernetes' own schema of a Job, strictly."""
    import kubernetes_validate

    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": job(described)}
    kubernetes_validate.validate(whole, "1.33", strict=True)


@pytest.mark.parametrize("name", JOBSETS)
def test_job_template_follows_the_schema_of_kubernetes(name):
    import kubernetes_validate

    check_job(jobset(name))
    for change in (
        lambda spec: spec["template"]["spec"].update(terminationGracePeriod=30),
        lambda spec: spec["template"]["spec"]["containers"][0].update(args="configs/swin_digits.py"),
        lambda spec: spec.update(parallelism="four"),
    ):
        wrong = copy.deepcopy(jobset(name))
        change(job(wrong))
        with pytest.raises(kubernetes_validate.ValidationError):
            check_job(wrong)


@pytest.mark.parametrize("name", JOBSETS)
def test_a_jobset_can_be_preempted_and_restarted(name):
    described = jobset(name)
    pod = job(described)["template"]["spec"]
    assert described["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert pod["restartPolicy"] == "Never"  # a pod failure policy needs it
    assert job(described)["backoffLimit"] == 0  # one process cannot come back alone
    assert job(described)["parallelism"] == job(described)["completions"]
    assert pod["terminationGracePeriodSeconds"] >= 60
    # PID 1 is Python: a shell would not hand on SIGTERM.
    assert container(described)["command"][0] == "python"
    exits = job(described)["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert exits["containerName"] == container(described)["name"]
    assert {2, 143} == set(exits["values"])
    claimed = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container(described)["volumeMounts"]} == claimed
    # The rule for wrong settings comes first, and knows the message that the Job controller writes.
    first = described["spec"]["failurePolicy"]["rules"][0]
    message = "Container train for pod default/x-0 failed with exit code {} matching FailJob rule at index 0"
    assert first["action"] == "FailJobSet"
    assert re.fullmatch(first["onJobFailureMessagePatterns"][0], message.format(2))
    assert not re.fullmatch(first["onJobFailureMessagePatterns"][0], message.format(143))


def expanded(text, variables):
    """Return a text with `$(NAME)` replaced as Kubernetes does."""
    return re.sub(r"\$\((\w+)\)", lambda match: variables.get(match[1], match[0]), text)


def pod_command(described, rank):
    """Return the command of one pod, and its variables, as the kubelet would make them."""
    name = described["metadata"]["name"]
    entry = described["spec"]["replicatedJobs"][0]
    annotations = {
        "jobset.sigs.k8s.io/jobset-name": name,
        "jobset.sigs.k8s.io/replicatedjob-name": entry["name"],
        "batch.kubernetes.io/job-completion-index": str(rank),
    }
    variables = {}
    for one in container(described).get("env", []):
        if "value" in one:
            variables[one["name"]] = expanded(one["value"], variables)
        else:
            path = one["valueFrom"]["fieldRef"]["fieldPath"]
            variables[one["name"]] = annotations[re.fullmatch(r"metadata\.annotations\['(.+)'\]", path)[1]]
    words = [*container(described)["command"], *container(described)["args"]]
    return [expanded(word, variables) for word in words], variables


@pytest.mark.parametrize("name", JOBSETS)
@pytest.mark.usefixtures("untyped")
def test_the_settings_of_a_jobset_fit_its_machines(name):
    described = jobset(name)
    command, _ = pod_command(described, 0)
    assert command[:4] == ["python", "-u", "-m", "train"]
    options = parser().parse_args(command[4:])
    config = override(load(ROOT / options.config), options.overrides)
    chips = max(int(number) for key, number in container(described)["resources"]["limits"].items() if "/" in key)
    devices = chips * job(described)["parallelism"]
    if name == "jobset_tpu.yaml":
        topology = job(described)["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert eval(topology.replace("x", "*")) == devices
        assert options.distributed
    else:
        assert options.num_processes == job(described)["completions"]
    mesh = config.mesh
    assert mesh.data == -1
    assert devices % (mesh.fsdp * mesh.sequence * mesh.tensor) == 0
    parts = devices // (mesh.sequence * mesh.tensor)
    assert config.batch_size % parts == 0
    assert config.eval_batch_size % parts == 0


def test_addresses_of_a_jobset_are_those_of_its_pods():
    for rank in range(2):
        command, _ = pod_command(jobset("jobset_gpu.yaml"), rank)
        # <jobset>-<replicated job>-<job index>-<pod index>.<subdomain>, the subdomain being the JobSet's name
        assert "--coordinator=jaxlayers-workers-0-0.jaxlayers:8476" in command
        assert f"--process-id={rank}" in command
        assert not any("$(" in word for word in command)


def dry_run(tmp_path, name, starts):
    """Train the tiny config by the command of every pod, on loopback and on one CPU device each."""
    processes = []
    for rank, (extra, variables) in enumerate(starts):
        command, own = pod_command(jobset(name), rank)
        command = [sys.executable, *command[1:]]
        command[command.index("configs/swin_digits.py")] = TINY
        words = [f"--workdir={tmp_path / 'run'}" if "--workdir=" in word else word for word in command]
        words = [word for word in words if not word.startswith("--set=mesh.fsdp")]
        processes.append(
            subprocess.Popen(
                [*words, "--devices=1", *QUICK, "--set=eval_batch_size=16", *extra],
                cwd=ROOT,
                env=environment(**own, **variables),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    assert f"on {len(processes)} cpu devices" in outputs[0]
    assert finished(tmp_path / "run")


@pytest.mark.slow
def test_gpu_command_trains_to_the_end_on_loopback(tmp_path):
    address = f"--coordinator=127.0.0.1:{free_port()}"  # the last one counts; the pods' names resolve in a cluster only
    dry_run(tmp_path, "jobset_gpu.yaml", [([address], {})] * 2)


@pytest.mark.slow
def test_tpu_command_trains_to_the_end_on_loopback(tmp_path):
    # JAX asks each kind of cluster in turn whether it is there; without TPUs, SLURM's variables answer.
    step = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    step |= {"JAX_COORDINATOR_PORT": str(free_port())}
    ranks = [step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    dry_run(tmp_path, "jobset_tpu.yaml", [([], variables) for variables in ranks])


@pytest.mark.usefixtures("untyped")
def test_the_commands_in_the_headers_parse():
    for name in ("slurm.sbatch", "local.sh"):
        text = (LAUNCH / name).read_text()
        (line,) = re.findall(rf"^#   (?:sbatch )?tools/launch/{name} (?:2 )?(.*)$", text, re.MULTILINE)
        options = parser().parse_args(shlex.split(line))
        assert (ROOT / options.config).exists()
        override(load(ROOT / options.config), options.overrides)
