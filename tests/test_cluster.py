"""The launchers: what they write and run against what the schedulers document."""

import math
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from jaxchat.config import UserError
from jaxchat.hosts import RESTARTED
from launch.cluster import __main__ as cluster
from launch.cluster import gke, local, slurm, tpu_vm

TRAIN = ["python", "-m", "launch.base_train", "--run=a b", "--resume"]
SECRET = "it's $ecret"

# sbatch(1): long options that take a value, and that don't.
SBATCH_VALUES = (
    "account array begin chdir comment constraint cpus-per-gpu cpus-per-task dependency error exclude export gpus "
    "gpus-per-node gpus-per-task gres input job-name licenses mail-type mail-user mem mem-per-cpu mem-per-gpu nodelist "
    "nodes ntasks ntasks-per-node open-mode output partition qos reservation signal time"
)
SBATCH_BARE = "contiguous exclusive hold no-requeue overcommit requeue spread-job"

# gcloud reference: compute tpus …: the flags of each command that is used, and those of all commands.
ON_VM = "zone worker command ssh-flag ssh-key-file plain internal-ip dry-run output-directory strict-host-key-checking"
CREATE = "zone accelerator-type topology type spot reserved network subnetwork labels metadata tags async description"
GCLOUD = {
    "tpu-vm create": f"{CREATE} version preemptible data-disk service-account",
    "tpu-vm ssh": ON_VM,
    "tpu-vm scp": "zone worker recurse compress scp-flag ssh-key-file plain internal-ip strict-host-key-checking",
    "tpu-vm delete": "zone async",
    "queued-resources create": f"{CREATE} runtime-version node-id node-count node-prefix guaranteed",
    "queued-resources describe": "zone",
    "queued-resources delete": "zone async force",
}
GCLOUD_WIDE = "project quiet format account verbosity"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    return tmp_path


@pytest.fixture
def fake(here, monkeypatch):
    """fake(name, shell): a command that writes how it was called to `here`/called, a JSON-free line a call."""
    (here / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{here / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def make(name, shell=""):
        file = here / "bin" / name
        file.write_text(f'#!/bin/bash\nprintf "%q " {name} "$@" >> {here}/called\necho >> {here}/called\n{shell}\n')
        file.chmod(0o755)

    return make


def called(here):
    file = here / "called"
    return [shlex.split(line) for line in file.read_text().splitlines()] if file.exists() else []


def start(capsys, *args, command=TRAIN):
    cluster.main([*args, "--", *command])
    return capsys.readouterr().out


def sbatch_options(text):
    """{option: value or None} of an sbatch file; what follows the first other line is no directive."""
    head, *lines = text.splitlines()
    assert head == "#!/bin/bash"
    options = {}
    for line in lines:
        if not line.startswith("#SBATCH"):
            break
        (word,) = shlex.split(line.removeprefix("#SBATCH "))  # Slurm, too, knows quotes
        name, equals, value = re.fullmatch(r"--([a-z-]+)(=?)(.*)", word).groups()
        assert name in (SBATCH_VALUES if equals else SBATCH_BARE).split(), line
        options[name] = value if equals else None
    assert "#SBATCH" not in text.partition("\n\n")[2]
    return options


def test_slurm(here, capsys):
    args = ["slurm", "--nodes=4", "--partition=gpu", "--account=me", "--secrets=WANDB_API_KEY", "--setup=module load x"]
    out = start(capsys, *args, "--directives=--qos=high --comment='my run'", "--dry_run")
    file, submit = out.removeprefix("# jaxchat.sbatch\n").rsplit("\n", 2)[0:2]
    options = sbatch_options(file)
    assert options["nodes"] == "4" and options["ntasks-per-node"] == "1" and options["gpus-per-node"] == "8"
    assert (
        options["partition"] == "gpu"
        and options["qos"] == "high"
        and options["comment"] == "my run"
        and {"exclusive", "requeue"} <= options.keys()
        and options["mem"] == "0"
    )
    # documented: [{R|B}:]<sig_num>[@sig_time]; without B: the signal goes to the processes, and not to the shell only
    assert re.fullmatch(r"TERM@\d+", options["signal"]) and options["export"] == "ALL"
    assert re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", options["time"]) and options["open-mode"] == "append"
    srun = "srun --kill-on-bad-exit=0 --cpus-per-task=$SLURM_CPUS_ON_NODE"
    assert "\nmodule load x\n" in file and f"\n{srun} {shlex.join(TRAIN)}\n" in file
    shared = slurm.script(slurm.Config(cpus=12, mem="100G"), TRAIN)
    options = sbatch_options(shared)
    assert (options["cpus-per-task"], options["mem"]) == ("12", "100G") and "exclusive" not in options
    assert "\nsrun --kill-on-bad-exit=0 --cpus-per-task=12 python" in shared
    assert submit == "sbatch jaxchat.sbatch" and SECRET not in out and not list(here.iterdir())


@pytest.mark.parametrize(
    "code, state, count, again",
    [(0, "RUNNING", 0, False), (75, "RUNNING", 0, True), (76, "RUNNING", 1, True), (137, "RUNNING", 0, True)]
    + [
        (134, "RUNNING", 0, True),
        (1, "RUNNING", 0, False),
        (175, "RUNNING", 0, False),
        (75, "COMPLETING", 0, False),
        (75, "RUNNING", 2, False),
    ],
)
def test_slurm_puts_back_what_can_go_on(here, fake, monkeypatch, code, state, count, again):
    """The file itself, run by bash: srun runs the command, and Slurm is told to requeue on the right exit codes."""
    fake("srun", 'shift 2; "$@"')
    fake("squeue", f"echo {state}")
    fake("scontrol")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    if count:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(count))
    text = slurm.script(slurm.Config(restarts=2), ["bash", "-c", f"exit {code}"])
    assert subprocess.run(["bash", "-c", text]).returncode == code
    assert (["scontrol", "requeue", "7"] in called(here)) == again


def test_slurm_submits_what_it_shows(here, fake, capsys):
    fake("sbatch")
    out = start(capsys, "slurm", "--job_name=run1")
    text = (here / "run1.sbatch").read_text()
    assert out == f"# run1.sbatch\n{text}\nsbatch run1.sbatch\n" and called(here) == [["sbatch", "run1.sbatch"]]


def check_gcloud(words):
    assert words[:3] == ["gcloud", "compute", "tpus"]
    allowed = f"{GCLOUD[' '.join(words[3:5])]} {GCLOUD_WIDE}".split()
    for word in words[5:]:
        if word.startswith("--"):
            assert word[2:].partition("=")[0] in allowed, word
    assert any(word.startswith("--zone=") for word in words)


TOLD = "[[ $* = *jaxchat/run.code* ]] && echo 0;"  # gcloud: the command on the workers has ended well
TPU = ["tpu_vm", "--zone=us-central2-b", "--project=p", "--bucket=b", "--secrets=WANDB_API_KEY"]


@pytest.mark.parametrize("flags", [["--spot"], ["--queued", "--spot"]])
def test_tpu_vm(here, capsys, flags):
    out = start(capsys, *TPU, *flags, "--dry_run")
    lines = [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]
    verbs = [" ".join(words[3:5]) for words in lines if words[0] == "gcloud"]
    install = ["tpu-vm scp", "tpu-vm ssh", "tpu-vm scp"]
    if "--queued" in flags:
        begin, end = ["queued-resources create", "queued-resources describe"], ["queued-resources delete"]
    else:
        begin, end = ["tpu-vm create"], ["tpu-vm delete"]
    assert verbs == [*begin, *install, "tpu-vm ssh", "tpu-vm ssh", "tpu-vm ssh", *end]
    for words in lines:
        if words[0] == "gcloud":
            check_gcloud(words)
        else:
            assert words[:2] == ["git", "archive"]
    (mount,) = re.findall(r"gcsfuse --.*?(?=\))", out)
    assert mount == "gcsfuse --implicit-dirs --rename-dir-limit=200000 b $HOME/bucket"
    assert SECRET not in out and "--spot" in lines[0] and not list(here.iterdir())


def test_tpu_vm_runs_what_it_shows_and_no_secret_is_on_a_command_line(here, fake, capsys):
    fake("git")
    copied = (
        f'for word in "$@"; do case $word in *jaxchat-*.env) stat -c %a "$word"; cat "$word";; esac; done > {here}/env'
    )
    fake("gcloud", f'if [ "$4" = scp ]; then {copied}; fi; {TOLD} exit 0')
    start(capsys, *TPU)
    calls = called(here)
    dry = [shlex.split(line) for line in start(capsys, *TPU, "--dry_run").splitlines() if not line.startswith("#")]
    assert SECRET not in str(calls) and len(calls) == len(dry) == 9
    differ = [(a, b) for made, told in zip(calls, dry, strict=True) for a, b in zip(made, told, strict=True) if a != b]
    assert all("jaxchat.tar.gz" in a or a.endswith(".env") for a, _ in differ) and len(differ) == 3
    mode, line = (here / "env").read_text().splitlines()
    assert mode == "600" and shlex.split(line) == [f"WANDB_API_KEY={SECRET}"]
    assert not any(Path(word).exists() for words in calls for word in words if word.endswith(".env"))


@pytest.mark.parametrize("codes, end", [([75, 76, 0], 0), ([3], 3), ([75] * 9, 75)])
def test_tpu_vm_starts_again(here, codes, end):
    """The text for the workers, run by bash: with the secret set, as often as is due, the code told in the end."""
    (here / "jaxchat").mkdir()
    (here / "jaxchat.env").write_text(f"WANDB_API_KEY={shlex.quote(SECRET)}\n")
    (here / "codes").write_text("\n".join(map(str, codes)) + "\n")
    shell = f'echo "$WANDB_API_KEY|$JAXCHAT_BASE_DIR"; c=$(head -1 {here}/codes); sed -i 1d {here}/codes; exit $c'
    config = tpu_vm.Config(restarts=4, bucket="b")
    env = os.environ | {"HOME": str(here)}
    subprocess.run(["bash", "-c", tpu_vm.background_script(config, ["bash", "-c", shell])], check=True, env=env)
    told = {"env": env, "stdout": subprocess.PIPE, "text": True, "timeout": 30}
    followed = subprocess.run(["bash", "-c", tpu_vm.FOLLOW], **told)
    assert subprocess.run(["bash", "-c", tpu_vm.CODE], **told).stdout == f"{end}\n"
    assert followed.stdout.count(f"{SECRET}|{here}/bucket\n") == min(len(codes), 5)


def test_tpu_vm_runs_several_commands_on_one_tpu(here, capsys):
    """Each is started again by itself; the first that fails for good ends it. The log stays in the bucket."""
    turn = ["bash", "-c", 'echo "$0" >> ../turns; exit $(( $0 == $(wc -l < ../turns) ? 75 : $1 ))']
    command = [*turn, "1", "0", "--", *turn, "3", "4", "--", *turn, "5", "0"]
    assert "turns bash" in start(capsys, *TPU, "--steps=run", "--dry_run", command=command)
    (here / "jaxchat").mkdir()
    env = os.environ | {"HOME": str(here)}
    shell = tpu_vm.background_script(tpu_vm.Config(bucket="b"), command)
    subprocess.run(["bash", "-c", shell], check=True, env=env)
    subprocess.run(["bash", "-c", tpu_vm.FOLLOW], env=env, timeout=30)
    assert (here / "turns").read_text().split() == ["1", "1", "3", "3"]
    assert (here / "jaxchat/run.code").read_text() == "4\n"
    (log,) = (here / "bucket/logs").iterdir()
    assert log.read_text().count("started again after exit code 75") == 2


def test_tpu_vm_takes_up_a_log_without_a_command(here, capsys):
    cluster.main([*TPU, "--steps=log,delete", "--dry_run"])
    assert [line.split()[4] for line in capsys.readouterr().out.splitlines()] == ["ssh", "ssh", "delete"]


@pytest.mark.parametrize(
    "shell, code, words",
    [
        ("[[ $* = *jaxchat/run.code* ]] && echo 3; exit 0", 3, ""),  # the command ended, and failed
        ("[[ $* = *jaxchat/run.code* ]] && exit 1; exit 0", 2, "--steps=log,delete"),  # not ended
        ("[[ $4 = ssh ]] && exit 1; exit 0", 2, "gcloud failed with exit code 1"),
        ("[[ $4 = describe ]] && echo a$'\\n'b >&2 && exit 1; exit 0", 2, "the state of jaxchat cannot be read: a b"),
        ("exit 1", 2, "gcloud failed with exit code 1"),
    ],
)
def test_tpu_vm_deletes_only_what_has_ended(here, fake, capsys, shell, code, words):
    fake("git")
    fake("gcloud", shell)
    with pytest.raises(SystemExit) as stop:
        start(capsys, *TPU, *(["--queued"] if "describe" in shell else []))
    said = capsys.readouterr()
    assert stop.value.code == code and words in said.err
    assert ("delete" in [words[4] for words in called(here) if words[0] == "gcloud"]) == (code == 3)
    hint = f"jaxchat still runs and is billed; delete it with {'--queued ' * ('describe' in shell)}--steps=delete\n"
    assert (hint in said.out) == (code == 2 and shell != "exit 1")


# JobSet v1alpha2, batch/v1 and core/v1: {field: what it holds}; another field is refused. A list has entries of its one
# kind; `str`, `int`, `bool`: a scalar; {str: str}: a map; a tuple: one of these words.
NAMED = {"name": str, "annotations": {str: str}, "labels": {str: str}}
ENV = [{"name": str, "value": str, "valueFrom": {"secretKeyRef": {"name": str, "key": str, "optional": bool}}}]
POD = {
    "restartPolicy": ("Never", "OnFailure"),
    "serviceAccountName": str,
    "terminationGracePeriodSeconds": int,
    "nodeSelector": {str: str},
    "containers": [
        {
            "name": str,
            "image": str,
            "command": [str],
            "args": [str],
            "env": ENV,
            "resources": {"limits": {str: int}, "requests": {str: int}},
            "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
            "ports": [{"containerPort": int}],
        }
    ],
    "volumes": [
        {"name": str, "emptyDir": {"medium": ("Memory",)}, "csi": {"driver": str, "volumeAttributes": {str: str}}}
    ],
}
ON_EXIT = {"containerName": str, "operator": ("In", "NotIn"), "values": [int]}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": ("Indexed", "NonIndexed"),
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [
            {
                "action": ("FailJob", "Ignore", "Count", "FailIndex"),
                "onExitCodes": ON_EXIT,
                "onPodConditions": [{"type": str, "status": ("True", "False", "Unknown")}],
            }
        ]
    },
    "template": {"metadata": NAMED, "spec": POD},
}
JOBSET = {
    "apiVersion": ("jobset.x-k8s.io/v1alpha2",),
    "kind": ("JobSet",),
    "metadata": NAMED,
    "spec": {
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [
                {
                    "name": str,
                    "action": ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
                    # of batch/v1: the reasons of a job's condition Failed
                    "onJobFailureReasons": [
                        ("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded")
                        + ("PodFailurePolicy",)
                    ],
                    "targetReplicatedJobs": [str],
                }
            ],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"metadata": NAMED, "spec": JOB}}],
    },
}


def check_schema(value, schema, path=""):
    if isinstance(schema, tuple):
        assert value in schema, path
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, path
        for entry in value:
            check_schema(entry, schema[0], f"{path}[]")
    elif isinstance(schema, dict):
        assert isinstance(value, dict), path
        for name, part in value.items():
            assert name in schema or str in schema, f"{path}.{name}"
            check_schema(part, schema.get(name, schema.get(str)), f"{path}.{name}")
    else:
        assert type(value) is schema, path


@pytest.mark.parametrize(
    "flags, hosts, takes",
    [
        (["--tpu=v5e:4x4", "--bucket=b", "--spot"], 4, {"google.com/tpu": 4}),
        (["--tpu=v6e:2x4"], 1, {"google.com/tpu": 8}),
        (["--tpu=v5p:4x4x4", "--slices=2"], 16, {"google.com/tpu": 4}),
        (["--tpu=v4:2x2x1"], 1, {"google.com/tpu": 4}),
        (["--gpu=nvidia-h100-80gb", "--nodes=3"], 3, {"nvidia.com/gpu": 8}),
    ],
)
def test_gke(here, capsys, flags, hosts, takes):
    out = start(capsys, "gke", "--image=i", "--secrets=WANDB_API_KEY", *flags, "--dry_run")
    assert "\nkubectl apply --filename=jaxchat.yaml\n" in out and SECRET not in out and not list(here.iterdir())
    tree = yaml.safe_load(out.partition("kubectl")[0])
    check_schema(tree, JOBSET)
    (workers,) = tree["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (hosts, hosts, "Indexed")
    assert container["resources"]["limits"] == takes and container["command"] == TRAIN
    labels = pod["nodeSelector"]
    if "--gpu" in flags[0]:
        assert labels == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
        env = {entry["name"]: entry.get("value") for entry in container["env"]}
        # <jobset>-<replicated job>-<job index>-<pod index>.<subdomain, by default the jobset>
        assert env["JAX_COORDINATOR_ADDRESS"].startswith("jaxchat-workers-0-0.jaxchat:")
        assert env["JAXCHAT_NUM_PROCESSES"] == "3"
    else:
        chips = math.prod(map(int, labels["cloud.google.com/gke-tpu-topology"].split("x")))
        assert chips == hosts * takes["google.com/tpu"] and labels["cloud.google.com/gke-tpu-accelerator"]
    # batch/v1: a pod failure policy needs restartPolicy Never, and the container it names
    assert pod["restartPolicy"] == "Never"
    exits = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert [(e["containerName"], e["operator"], e["values"]) for e in exits] == [
        (container["name"], "NotIn", list(RESTARTED))
    ]
    options = [volume["csi"]["volumeAttributes"]["mountOptions"] for volume in pod["volumes"] if "csi" in volume]
    assert options == (["implicit-dirs,rename-dir-limit=200000"] if "--bucket=b" in flags else [])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_schema_check_refuses():
    good = gke.jobset(gke.Config(image="i", tpu="v5e:4x4"), TRAIN)
    for change in ({"kind": "Job"}, {"speck": {}}, {"metadata": {"name": 3}}, {"spec": {"replicatedJobs": []}}):
        with pytest.raises(AssertionError):
            check_schema(good | change, JOBSET)


@pytest.mark.parametrize(
    "args, words",
    [
        (["foo"], "no launcher 'foo'"),
        ([], "which launcher"),
        (["slurm", "--secrets=NOT_SET_HERE"], "NOT_SET_HERE is not set here"),
        (["slurm", "--secrets=A=b"], "is not the name of an environment variable"),
        (["slurm", "--directives=-x"], "--directives"),
        (["slurm", "--nodes=0"], "--nodes=0"),
        (["tpu_vm"], "--zone is missing"),
        (["tpu_vm", "--zone=z"], "would be deleted with the TPU"),
        (["tpu_vm", "--zone=z", "--steps=go"], "'go' is none of"),
        (["tpu_vm", "--zone=z", "--name=A"], "--name=A"),
        (["gke", "--tpu=v5e:4x4"], "--image is missing"),
        (["gke", "--image=i"], "either --tpu"),
        (["gke", "--image=i", "--tpu=v5e:4x4x4"], "--tpu=v5e:4x4x4"),
        (["gke", "--image=i", "--tpu=v5p:3x1x2"], "not a multiple"),
        (["gke", "--image=i", "--gpu=x", "--slices=2"], "--slices=2"),
        (["local", "--processes=0"], "--processes=0"),
    ],
)
def test_refusals(here, capsys, args, words):
    with pytest.raises(SystemExit) as stop:
        cluster.main([*args, "--", *TRAIN])
    said = capsys.readouterr()
    assert stop.value.code == 2 and words in said.err and said.err.count("\n") == 1 and not list(here.iterdir())


def test_no_command_and_no_scheduler(here, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(here))
    for args, words in ((["local"], "no command given"), (["slurm", "--", "x"], "there is no sbatch here")):
        with pytest.raises(SystemExit) as stop:
            cluster.main(args)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(UserError, match="form"):
        gke.hardware(gke.Config(tpu="v9:1"))


def test_the_image_is_built_from_what_there_is():
    """The Dockerfile copies files of a checkout, its extras exist; and each --help names all restart codes."""
    lines = (ROOT / "launch/cluster/Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"pyproject.toml", "constraints.txt"} <= set(copied) and all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (named,) = [line for line in lines if "tpu, cuda12" in line]
    assert {"tpu", "cuda12", "cuda13", "wandb"} <= set(project["optional-dependencies"]) and "tpu" in named
    assert set(project["license-files"]) <= set(copied)
    for config in (cluster.Config, gke.Config, local.Config):
        assert all(str(code) in config.__doc__ for code in RESTARTED)
