"""Start a JobSet on Kubernetes (GKE): one pod per host, on TPUs or GPUs."""

import dataclasses
import math

import yaml

from jaxchat.config import Flags, UserError, flag
from jaxchat.hosts import RESTARTED
from launch.cluster.common import MOUNTED, check_name, secret_names, submit

PORT = 8476
# {kind of TPU: (its name in GKE, chips of a host in slices of several hosts)}
TPUS = {
    "v4": ("tpu-v4-podslice", 4),
    "v5e": ("tpu-v5-lite-podslice", 4),
    "v5p": ("tpu-v5p-slice", 4),
    "v6e": ("tpu-v6e-slice", 4),
    "tpu7x": ("tpu7x", 4),
}
EIGHT = ("v5e", "v6e")  # kinds whose single-host slices have up to 8 chips


@dataclasses.dataclass(frozen=True)
class Config(Flags):
    """Write a Kubernetes JobSet with one pod per host to <name>.yaml in the current folder, and apply it with
    kubectl. The cluster needs JobSet 0.6 or newer. Choose TPUs with --tpu, or GPUs with --gpu and --nodes.

    Build and push --image from a checkout. For GPUs, replace EXTRAS=tpu with EXTRAS=cuda13:
    git archive HEAD | docker build --file=launch/cluster/Dockerfile --build-arg=EXTRAS=tpu --tag=IMAGE -
    docker push IMAGE

    Secrets are read from a Kubernetes Secret. Create it once, from a file with one NAME=value per line:
    kubectl create secret generic jaxchat --from-env-file=FILE

    When a node is lost, or after exit code 75 (stopped and saved), 76 (processes cannot reach one another),
    134 (another process was lost) or 137 (killed), all pods are restarted. Any other failure ends the run.

    --bucket is the base directory of every pod. Create the bucket with a hierarchical namespace, so that
    renaming a checkpoint's folder is atomic: gcloud storage buckets create gs://NAME --location=REGION
    --uniform-bucket-level-access --enable-hierarchical-namespace
    Put data there by running launch.download, or with gcloud storage cp --recursive FOLDER gs://NAME. Never
    start a run while another one with its tag is running: locks in a bucket work only within one host.
    """

    name: str = "jaxchat"
    """Name of the JobSet."""
    image: str = ""
    """Container image with jaxchat, such as us-docker.pkg.dev/PROJECT/REPOSITORY/jaxchat:1."""
    tpu: str = ""
    """Kind and topology of a TPU slice, such as v4:2x2x4, v5e:4x4, v5p:4x4x4, v6e:2x4 or tpu7x:2x2x2."""
    slices: int = flag(1, 1)
    """Number of TPU slices."""
    gpu: str = ""
    """Kind of GPU, as in GKE's node labels, such as nvidia-h100-80gb or nvidia-h200-141gb."""
    gpus: int = flag(8, 1)
    """Number of GPUs of each machine."""
    nodes: int = flag(1, 1)
    """Number of machines with GPUs."""
    spot: bool = False
    """Use spot machines, which are cheaper and may be preempted."""
    bucket: str = ""
    """Cloud Storage bucket for data and checkpoints. The service account must be allowed to write to it."""
    service_account: str = "default"
    """Service account of the pods."""
    secrets: str = ""
    """Entries of the Kubernetes Secret `jaxchat` to set as environment variables, separated by commas, as in
    WANDB_API_KEY,HF_TOKEN."""
    restarts: int = flag(20, 0)
    """Maximum number of times that all pods are restarted."""
    dry_run: bool = False
    """Only print the JobSet and the kubectl command; start nothing."""


def hardware(config: Config) -> tuple[int, dict, dict]:
    """Return (hosts per slice, node labels, resource limits of a pod). Raise UserError for invalid flags."""
    if bool(config.tpu) == bool(config.gpu):
        raise UserError("give either --tpu=v5e:4x4 or --gpu=nvidia-h100-80gb")
    if config.gpu:
        if config.slices != 1:
            raise UserError(f"--slices={config.slices} is for TPUs; for GPUs give --nodes")
        return config.nodes, {"cloud.google.com/gke-accelerator": config.gpu}, {"nvidia.com/gpu": config.gpus}
    kind, _, topology = config.tpu.partition(":")
    sides = topology.split("x")
    flat = kind in EIGHT
    counts = all(side.isdigit() and int(side) > 0 for side in sides)
    if kind not in TPUS or len(sides) != (2 if flat else 3) or not counts:
        kinds = ", ".join(f"{name}:{'4x4' if name in EIGHT else '2x2x4'}" for name in TPUS)
        raise UserError(f"--tpu={config.tpu}; expected a form such as {kinds}")
    label, on_host = TPUS[kind]
    chips = math.prod(map(int, sides))
    if chips <= (8 if flat else 4):
        on_host = chips
    if chips % on_host:
        raise UserError(f"--tpu={config.tpu} has {chips} chips, not a multiple of a host's {on_host}")
    labels = {"cloud.google.com/gke-tpu-accelerator": label, "cloud.google.com/gke-tpu-topology": topology}
    return chips // on_host, labels, {"google.com/tpu": on_host}


def container(config: Config, command: list[str], hosts: int, takes: dict) -> dict:
    secrets = secret_names(config.secrets, here=False)
    env = [{"name": n, "valueFrom": {"secretKeyRef": {"name": "jaxchat", "key": n}}} for n in secrets]
    if config.gpu:  # on TPUs GKE sets this itself
        first = f"{config.name}-workers-0-0.{config.name}:{PORT}"  # job 0, pod 0, in the JobSet's own network
        env += [{"name": "JAX_COORDINATOR_ADDRESS", "value": first}]
        env += [{"name": "JAXCHAT_NUM_PROCESSES", "value": str(hosts)}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    if config.bucket:
        env += [{"name": "JAXCHAT_BASE_DIR", "value": "/bucket"}]
        mounts += [{"name": "bucket", "mountPath": "/bucket"}]
    return {
        "name": "jaxchat",
        "image": config.image,
        "command": command,
        "env": env,
        "resources": {"limits": takes},
        "volumeMounts": mounts,
        "ports": [{"containerPort": PORT}],
    }


def jobset(config: Config, command: list[str]) -> dict:
    """Return the JobSet that runs `command`, as nested dicts that can be written as YAML."""
    hosts, labels, takes = hardware(config)
    volumes = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    if config.bucket:
        attributes = {"bucketName": config.bucket, "mountOptions": ",".join(MOUNTED)}
        mounted = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}
        volumes += [{"name": "bucket", "csi": mounted}]
    pod = {
        "restartPolicy": "Never",
        "serviceAccountName": config.service_account,
        "terminationGracePeriodSeconds": 120,
        "nodeSelector": labels | ({"cloud.google.com/gke-spot": "true"} if config.spot else {}),
        "containers": [container(config, command, hosts, takes)],
        "volumes": volumes,
    }
    annotations = {"gke-gcsfuse/volumes": "true"} if config.bucket else {}
    exits = {"containerName": "jaxchat", "operator": "NotIn", "values": [*RESTARTED]}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one failed pod fails the job; then the JobSet decides
        "podFailurePolicy": {
            "rules": [
                {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": exits},
            ]
        },
        "template": {"metadata": {"annotations": annotations}, "spec": pod},
    }
    together = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": config.name, "annotations": together if config.tpu else {}},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": config.restarts,
                "rules": [
                    {"name": "broken", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                ],
            },
            "replicatedJobs": [{"name": "workers", "replicas": config.slices, "template": {"spec": job}}],
        },
    }


def run(config: Config, command: list[str]):
    check_name(config.name)
    if not config.image:
        raise UserError("--image is missing: a container image with jaxchat (--help says how to build one)")
    file, text = f"{config.name}.yaml", yaml.safe_dump(jobset(config, command), sort_keys=False)
    submit(file, text, ["kubectl", "apply", f"--filename={file}"], config.dry_run)
    print(f"# follow the log: kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name={config.name}")
