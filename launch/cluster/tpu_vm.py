"""Run commands on a Cloud TPU with gcloud: create it, set it up, run, follow the log, delete it."""

import contextlib
import dataclasses
import itertools
import os
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

from jaxchat.config import Flags, UserError, flag
from jaxchat.hosts import RESTARTED
from launch.cluster.common import MOUNTED, check_name, perform, secret_names

STEPS = ("create", "setup", "run", "log", "delete")
MOUNT = "$HOME/bucket"
# The TPU images have a Python older than 3.11; uv installs a newer one.
INSTALL = (
    "mkdir -p jaxchat && tar -xzf jaxchat.tar.gz -C jaxchat && cd jaxchat"
    " && python3 -m pip install --user --quiet uv"
    " && python3 -m uv venv --quiet --allow-existing --python=3.12 .venv"
    " && python3 -m uv pip install --quiet --constraint=constraints.txt --editable='.[tpu,wandb]'"
)
GCSFUSE = (
    "if ! command -v gcsfuse; then"
    " curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg"
    " | sudo tee /usr/share/keyrings/gcsfuse.asc >/dev/null"
    " && echo deb '[signed-by=/usr/share/keyrings/gcsfuse.asc]' https://packages.cloud.google.com/apt"
    " gcsfuse-$(lsb_release -cs) main | sudo tee /etc/apt/sources.list.d/gcsfuse.list"
    " && sudo apt-get update -qq && sudo apt-get install -qq -y gcsfuse; fi"
)


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Create a Cloud TPU, install this checkout's last commit on it, run the command on all its workers,
    print the first worker's log, and delete the TPU once the command has ended and its exit code is known.
    --steps selects some of these steps. Several commands, each after a --, run one after another until one
    fails.

    A command is restarted after exit code 75 (stopped and saved), 76 (processes cannot reach one another),
    134 (another process was lost) or 137 (killed). If the connection is lost, the commands keep running, and
    --steps=log,delete reconnects. A preempted TPU no longer exists. Start this launcher again to create a new
    TPU, on which trainers with --resume continue. Secrets are copied over ssh, in a file that only you can
    read.

    --bucket is the base directory of every worker. Create the bucket with a hierarchical namespace, so that
    renaming a checkpoint's folder is atomic: gcloud storage buckets create gs://NAME --location=REGION
    --uniform-bucket-level-access --enable-hierarchical-namespace
    Put data there with launch.download as the first command, which runs on one worker, or with
    gcloud storage cp --recursive FOLDER gs://NAME. At the end, the log is copied to gs://NAME/logs. Never
    start a run while another one with its tag is running: locks in a bucket work only within one host.
    """

    name: str = "jaxchat"
    """Name of the TPU."""
    zone: str = ""
    """Zone of the TPU, such as us-central2-b."""
    project: str = ""
    """Google Cloud project; empty: gcloud's own setting."""
    type: str = "v5litepod-16"
    """Kind and size of the TPU, as gcloud names it, such as v4-32, v5litepod-16, v5p-8 or v6e-8."""
    version: str = "v2-alpha-tpuv5-lite"
    """Image of the TPU, such as tpu-ubuntu2204-base (v4), v2-alpha-tpuv5 (v5p) or v2-alpha-tpuv6e (v6e)."""
    spot: bool = False
    """Use a spot TPU, which is cheaper and may be preempted."""
    queued: bool = False
    """Request the TPU as a queued resource, and wait until the request is granted."""
    bucket: str = ""
    """Name of the Cloud Storage bucket for data and checkpoints, without gs://."""
    secrets: str = ""
    """Environment variables to copy to the TPU, separated by commas, as in WANDB_API_KEY,HF_TOKEN."""
    restarts: int = flag(20, 0)
    """Maximum number of restarts of each command."""
    steps: str = ",".join(STEPS)
    """Steps to run, separated by commas: any of create,setup,run,log,delete."""
    dry_run: bool = False
    """Only print the commands."""


def check(config: Config) -> list[str]:
    """Return the steps to run, in order. Raise UserError if a flag is invalid."""
    check_name(config.name)
    steps = [step for step in config.steps.split(",") if step]
    if unknown := [step for step in steps if step not in STEPS]:
        raise UserError(f"--steps={config.steps}: {unknown[0]!r} is none of {', '.join(STEPS)}")
    if not config.zone:
        raise UserError("--zone is missing; give the TPU's zone, such as --zone=us-central2-b")
    if {"run", "delete"} <= set(steps) and not config.bucket:
        raise UserError(
            "the checkpoints would be deleted with the TPU: give --bucket=NAME or --steps=create,setup,run"
        )
    return [step for step in STEPS if step in steps]


def gcloud(config: Config, kind: str, verb: str, *rest: str) -> list[str]:
    where = [f"--zone={config.zone}", *([f"--project={config.project}"] if config.project else [])]
    return ["gcloud", "compute", "tpus", kind, verb, *rest, *where]


def create(config: Config) -> list[str]:
    kind = [f"--accelerator-type={config.type}", *(["--spot"] if config.spot else [])]
    if config.queued:
        names = [f"--node-id={config.name}", f"--runtime-version={config.version}"]
        return gcloud(config, "queued-resources", "create", config.name, *names, *kind)
    return gcloud(config, "tpu-vm", "create", config.name, f"--version={config.version}", *kind)


def state(config: Config) -> list[str]:
    return gcloud(config, "queued-resources", "describe", config.name, "--format=value(state.state)")


def delete(config: Config) -> list[str]:
    kind, more = ("queued-resources", ["--force"]) if config.queued else ("tpu-vm", [])
    return gcloud(config, kind, "delete", config.name, *more, "--quiet")


def copy(config: Config, file: str, to: str) -> list[str]:
    return gcloud(config, "tpu-vm", "scp", file, f"{config.name}:{to}", "--worker=all")


def on(config: Config, workers: str, shell: str) -> list[str]:
    return gcloud(config, "tpu-vm", "ssh", config.name, f"--worker={workers}", f"--command={shell}")


def background_script(config: Config, command: list[str]) -> str:
    """Return shell code that runs commands one after another in the background, until one fails.

    command: the words of all commands, separated by "--". A command is restarted after exit code 75, 76, 134
    or 137. The last exit code is written to run.code.
    """
    base, kept = "", ""
    if config.bucket:
        base = f"export JAXCHAT_BASE_DIR={MOUNT}; "
        kept = f"mkdir -p {MOUNT}/logs; cp run.log {MOUNT}/logs/$(hostname)-$(date +%Y%m%d-%H%M%S).log; "
    ends = [-1, *(i for i, word in enumerate(command) if word == "--"), len(command)]
    turns = " && ".join(f"turns {shlex.join(command[a + 1 : b])}" for a, b in itertools.pairwise(ends))
    codes = "|".join(map(str, RESTARTED))
    loop = (
        f"{base}set -a; [ -f ../jaxchat.env ] && . ../jaxchat.env; set +a; export PATH=$PWD/.venv/bin:$PATH; "
        f'turns() {{ for turn in $(seq 0 {config.restarts}); do "$@"; code=$?; '
        f"case $code in {codes}) echo started again after exit code $code;; *) break;; esac; done; "
        "return $code; }; "
        f"{turns}; code=$?; {kept}echo $code > run.code"
    )
    background = f"nohup bash -c {shlex.quote(loop)} > run.log 2>&1 < /dev/null &"
    return f"cd jaxchat && rm -f run.code && ({background} echo $! > run.pid)"


FOLLOW = "cd jaxchat && tail --lines=+1 --follow=name --pid=$(cat run.pid) run.log"
CODE = "cat jaxchat/run.code"


@contextlib.contextmanager
def secret_file(names: list[str], dry_run: bool):
    """Write the environment variables `names` to a private temporary file, yield its path and delete it."""
    if dry_run:
        yield f"<a file with {', '.join(names)}>"
        return
    # The file's mode is 600, which scp keeps.
    with tempfile.NamedTemporaryFile("w", prefix="jaxchat-", suffix=".env") as file:
        file.writelines(f"{name}={shlex.quote(os.environ[name])}\n" for name in names)
        file.flush()
        yield file.name


def setup(config: Config, secrets: list[str]):
    with tempfile.TemporaryDirectory() as folder:
        archive = str(Path("/tmp" if config.dry_run else folder) / "jaxchat.tar.gz")
        perform(["git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"], config.dry_run)
        perform(copy(config, archive, "jaxchat.tar.gz"), config.dry_run)
    shell = INSTALL
    if config.bucket:
        gcsfuse = shlex.join(["gcsfuse", *(f"--{option}" for option in MOUNTED), config.bucket])
        mount = f"mkdir -p {MOUNT} && (mountpoint -q {MOUNT} || {gcsfuse} {MOUNT})"
        shell += f" && {GCSFUSE} && {mount}"
    perform(on(config, "all", shell), config.dry_run)
    if secrets:
        with secret_file(secrets, config.dry_run) as file:
            perform(copy(config, file, "jaxchat.env"), config.dry_run)


def wait(config: Config):
    """Wait until the requested TPU is granted. Raise UserError if the request fails."""
    print(f"# every 30 s, until it prints ACTIVE:\n{shlex.join(state(config))}", flush=True)
    while not config.dry_run:
        asked = subprocess.run(state(config), capture_output=True, text=True)
        if asked.returncode:
            raise UserError(f"the state of {config.name} cannot be read: {' '.join(asked.stderr.split())}")
        now = asked.stdout.strip()
        if now == "ACTIVE":
            return
        if now in ("FAILED", "SUSPENDED"):
            raise UserError(
                f"the queued resource {config.name} is {now}; delete it with --queued --steps=delete"
            )
        time.sleep(30)


def follow(config: Config) -> int:
    """Print the first worker's log. Return the command's exit code, or raise UserError if it is unknown."""
    perform(on(config, "0", FOLLOW), config.dry_run, check=False)  # its exit code may be gcloud's or ssh's
    print(shlex.join(on(config, "0", CODE)), flush=True)
    if config.dry_run:
        return 0
    code = subprocess.run(on(config, "0", CODE), stdout=subprocess.PIPE, text=True).stdout.strip()
    if not code.isdigit():
        raise UserError(
            "the connection was lost, or the command was killed; --steps=log,delete follows the log again"
        )
    return int(code)


def run(config: Config, command: list[str]):
    steps = check(config)
    secrets = secret_names(config.secrets, here=True)
    if "create" in steps:
        perform(create(config), config.dry_run)
    code = 0
    try:
        if "create" in steps and config.queued:
            wait(config)
        if "setup" in steps:
            setup(config, secrets)
        if "run" in steps:
            perform(on(config, "all", background_script(config, command)), config.dry_run)
        if "log" in steps:
            code = follow(config)
        if "delete" in steps:
            perform(delete(config), config.dry_run)
    except BaseException:
        end = "--queued --steps=delete" if config.queued else "--steps=delete"
        warning = f"unless it was preempted, {config.name} still runs and is billed"
        print(f"{warning}; delete it with {end}", flush=True)
        raise
    return code
