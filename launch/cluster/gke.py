"""A JobSet on Kubernetes (GKE): one pod a host, TPUs or GPUs."""

import dataclasses
import math
from pathlib import Path

import yaml

from jaxchat.config import UserError
from launch.cluster.common import MOUNTED, RESTARTED, check_at_least, check_name, perform, secret_names

PORT = 8476
# Kind of TPU: GKE's name for it, and the chips of a host where there are several hosts.
TPUS = {
    "v4": ("tpu-v4-podslice", 4),
    "v5e": ("tpu-v5-lite-podslice", 4),
    "v5p": ("tpu-v5p-slice", 4),
    "v6e": ("tpu-v6e-slice", 4),
    "tpu7x": ("tpu7x", 4),
}
EIGHT = ("v5e", "v6e")  # have hosts with 8 chips, for slices of one host


@dataclasses.dataclass(frozen=True)
class Config:
    """Write <name>.yaml here, a JobSet with a pod a host, and apply it with kubectl. The cluster needs JobSet 0.6 or
    newer. TPUs by --tpu=v5e:4x4, or GPUs by --gpu and --nodes.

    Secrets are read from a Secret of Kubernetes, which you make once, from a file with a line NAME=value each:
    kubectl create secret generic jaxchat --from-env-file=FILE

    A run that saves and ends because its node goes away, or that lost a peer, is started again, all pods at once; one
    that fails otherwise is not. What is trained goes to --bucket, which every pod sees as its base directory.

    A run's folder in a bucket is locked on one host only: see to it that no other host trains under the same tag.
    Make the bucket with a hierarchical namespace, in which a checkpoint's folder is renamed all at once: gcloud storage
    buckets create gs://NAME --location=REGION --uniform-bucket-level-access --enable-hierarchical-namespace
    """

    name: str = "jaxchat"
    """Of the JobSet."""
    image: str = ""
    """With jaxchat and its requirements installed, such as us-docker.pkg.dev/PROJECT/REPOSITORY/jaxchat:1."""
    tpu: str = ""
    """Kind and topology of a slice: v4:2x2x4, v5e:4x4, v5p:4x4x4, v6e:2x4, tpu7x:2x2x2."""
    slices: int = 1
    """Of TPUs."""
    gpu: str = ""
    """Kind, as GKE labels nodes: nvidia-h100-80gb, nvidia-h200-141gb."""
    gpus: int = 8
    """Of each machine."""
    nodes: int = 1
    """Machines with GPUs."""
    spot: bool = False
    """Cheaper, and may be taken away."""
    bucket: str = ""
    """Cloud Storage bucket for data and checkpoints; the service account must be allowed to write it."""
    service_account: str = "default"
    """Of the pods."""
    secrets: str = ""
    """Keys of the Secret `jaxchat` that the command gets as environment variables: WANDB_API_KEY,HF_TOKEN."""
    restarts: int = 20
    """How often at most the run is started again."""
    dry_run: bool = False
    """Only print the file and the command."""


def hardware(config: Config) -> tuple[int, dict, dict]:
    """(hosts of a slice, what a host must be labelled, what a pod takes of it)."""
    if bool(config.tpu) == bool(config.gpu):
        raise UserError("give either --tpu=v5e:4x4 or --gpu=nvidia-h100-80gb")
    if config.gpu:
        if config.slices != 1:
            raise UserError(f"--slices={config.slices} is for TPUs; GPUs take --nodes")
        return config.nodes, {"cloud.google.com/gke-accelerator": config.gpu}, {"nvidia.com/gpu": config.gpus}
    kind, _, topology = config.tpu.partition(":")
    sides = topology.split("x")
    flat = kind in EIGHT
    if kind not in TPUS or len(sides) != (2 if flat else 3) or not all(s.isdigit() and int(s) > 0 for s in sides):
        kinds = ", ".join(f"{name}:{'4x4' if name in EIGHT else '2x2x4'}" for name in TPUS)
        raise UserError(f"--tpu={config.tpu}; it is of the form {kinds}")
    label, on_host = TPUS[kind]
    chips = math.prod(map(int, sides))
    if chips <= (8 if flat else 4):
        on_host = chips
    if chips % on_host:
        raise UserError(f"--tpu={config.tpu} has {chips} chips, which is no multiple of a host's {on_host}")
    labels = {"cloud.google.com/gke-tpu-accelerator": label, "cloud.google.com/gke-tpu-topology": topology}
    return chips // on_host, labels, {"google.com/tpu": on_host}


def jobset(config: Config, command: list[str]) -> dict:
    """The JobSet, as the tree that its YAML is."""
    hosts, labels, takes = hardware(config)
    secrets = secret_names(config.secrets, here=False)
    env = [{"name": n, "valueFrom": {"secretKeyRef": {"name": "jaxchat", "key": n}}} for n in secrets]
    if config.gpu:  # TPUs are told by GKE itself
        first = f"{config.name}-workers-0-0.{config.name}:{PORT}"  # job 0, pod 0, in the JobSet's own network
        env += [{"name": "JAX_COORDINATOR_ADDRESS", "value": first}]
        env += [{"name": "JAXCHAT_NUM_PROCESSES", "value": str(hosts)}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    volumes = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    if config.bucket:
        env += [{"name": "JAXCHAT_BASE_DIR", "value": "/bucket"}]
        mounts += [{"name": "bucket", "mountPath": "/bucket"}]
        attributes = {"bucketName": config.bucket, "mountOptions": ",".join(MOUNTED)}
        volumes += [{"name": "bucket", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}]
    container = {
        "name": "jaxchat",
        "image": config.image,
        "command": command,
        "env": env,
        "resources": {"limits": takes},
        "volumeMounts": mounts,
        "ports": [{"containerPort": PORT}],
    }
    pod = {
        "restartPolicy": "Never",
        "serviceAccountName": config.service_account,
        "terminationGracePeriodSeconds": 120,
        "nodeSelector": labels | ({"cloud.google.com/gke-spot": "true"} if config.spot else {}),
        "containers": [container],
        "volumes": volumes,
    }
    annotations = {"gke-gcsfuse/volumes": "true"} if config.bucket else {}
    exits = {"containerName": "jaxchat", "operator": "NotIn", "values": [*RESTARTED]}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one pod that ends ends the job; then the JobSet decides
        "podFailurePolicy": {
            "rules": [
                {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": exits},
            ]
        },
        "template": {"metadata": {"annotations": annotations}, "spec": pod},
    }
    together = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"} if config.tpu else {}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": config.name, "annotations": together},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": config.restarts,
                "rules": [{"name": "broken", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "workers", "replicas": config.slices, "template": {"spec": job}}],
        },
    }


def run(config: Config, command: list[str]):
    check_name("name", config.name)
    check_at_least(config, slices=1, gpus=1, nodes=1, restarts=0)
    if not config.image:
        raise UserError("--image is missing: a container image with jaxchat and its requirements installed")
    file, text = f"{config.name}.yaml", yaml.safe_dump(jobset(config, command), sort_keys=False)
    print(f"# {file}\n{text}", flush=True)
    if not config.dry_run:
        Path(file).write_text(text)
    perform(["kubectl", "apply", f"--filename={file}"], config.dry_run)
    print(f"# its log: kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name={config.name}")
