"""Check a cluster file before it costs money: `python -m ray_subnets.distributed.clusterfile FILE`.

Ray's own loader is asked first. It lets pass what this adds: unknown names in `provider` and
`node_config`, mounts of files that are not there, a node without a token, a dashboard that others
can reach, another version of Ray than here, places still to be filled in.
"""

from __future__ import annotations

import copy
import difflib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler._private.util import prepare_config, validate_config
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

PLACEHOLDER = "CHANGE-ME"
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"  # that all nodes must have
_TOKEN = "RAY_AUTH_MODE=token"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
Names = Mapping[str, Any]  # name -> names inside of it, or None where anything may stand


def _names(text: str, **inside: Any) -> Names:
    return dict.fromkeys(text.split()) | inside


# What the launcher of Ray 2.60 reads.
PROVIDERS: Mapping[str, Names] = {
    "aws": _names(
        "type region availability_zone cache_stopped_nodes use_internal_ips security_group "
        "cloudwatch key_pair aws_credentials disable_launch_config_check"
    ),
    "gcp": _names(
        "type region availability_zone project_id cache_stopped_nodes use_internal_ips "
        "gcp_credentials"
    ),
    "local": _names("type head_ip worker_ips external_head_ip coordinator_address"),
}
# RunInstances of the EC2 API, and Instance of the Compute Engine API with what we use of it.
NODES: Mapping[str, Names] = {
    "aws": _names(
        "AdditionalInfo CapacityReservationSpecification ClientToken CpuOptions "
        "CreditSpecification DisableApiStop DisableApiTermination EbsOptimized "
        "EnablePrimaryIpv6 EnclaveOptions HibernationOptions ImageId "
        "InstanceInitiatedShutdownBehavior InstanceType Ipv6AddressCount Ipv6Addresses KernelId "
        "KeyName LaunchTemplate LicenseSpecifications MaintenanceOptions MetadataOptions "
        "Monitoring NetworkInterfaces NetworkPerformanceOptions Placement PrivateDnsNameOptions "
        "PrivateIpAddress RamdiskId SecurityGroupIds SecurityGroups SubnetId SubnetIds "
        "TagSpecifications UserData",
        BlockDeviceMappings=_names(
            "DeviceName NoDevice VirtualName",
            Ebs=_names(
                "DeleteOnTermination Encrypted Iops KmsKeyId SnapshotId Throughput VolumeSize "
                "VolumeType"
            ),
        ),
        IamInstanceProfile=_names("Arn Name"),
        InstanceMarketOptions=_names(
            "MarketType",
            SpotOptions=_names(
                "BlockDurationMinutes InstanceInterruptionBehavior MaxPrice SpotInstanceType "
                "ValidUntil"
            ),
        ),
    ),
    "gcp": _names(
        "advancedMachineFeatures canIpForward confidentialInstanceConfig deletionProtection "
        "description displayDevice hostname labels machineType minCpuPlatform networkInterfaces "
        "networkPerformanceConfig params reservationAffinity resourcePolicies serviceAccounts "
        "shieldedInstanceConfig sourceMachineImage tags",
        disks=_names(
            "architecture autoDelete boot deviceName diskSizeGb interface mode source type",
            initializeParams=_names(
                "description diskName diskSizeGb diskType labels provisionedIops "
                "provisionedThroughput resourcePolicies sourceImage sourceSnapshot storagePool"
            ),
        ),
        guestAccelerators=_names("acceleratorCount acceleratorType"),
        metadata=_names("", items=_names("key value")),
        scheduling=_names(
            "automaticRestart instanceTerminationAction maxRunDuration minNodeCpus nodeAffinities "
            "onHostMaintenance preemptible provisioningModel terminationTime"
        ),
    ),
}


def problems(path: Path) -> list[str]:
    """One line each; empty if there are none. Mounts are looked for from the current folder."""
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)  # as Ray reads it  # type: ignore[assignment]
    try:
        documents = [found for found in yaml.load_all(path.read_text()) if found is not None]
    except (OSError, YAMLError) as error:
        return [f"cannot be read: {' '.join(str(error).split())[:200]}"]
    if not documents or not all(isinstance(found, dict) for found in documents):
        return ["holds no settings"]
    check = _rayjob(documents) if "kind" in documents[0] else _launcher(documents[0])
    return [*check, *_placeholders(documents)]


# --- for `ray up` ---


def _launcher(config: dict[str, Any]) -> Iterator[str]:
    try:
        prepared = prepare_config(copy.deepcopy(config))
        validate_config(prepared)
    except (Exception, SystemExit) as error:  # of many kinds
        yield f"Ray refuses it: {' '.join(str(error).split())[:300]}"
        return
    kind = prepared["provider"]["type"]
    if kind in PROVIDERS:
        yield from _unknown(config["provider"], PROVIDERS[kind], "provider")
    for name, node in config.get("available_node_types", {}).items():
        if kind in NODES:
            where = f"available_node_types.{name}.node_config"
            yield from _unknown(node.get("node_config", {}), NODES[kind], where)
    for there, here in prepared["file_mounts"].items():
        if not Path(here).expanduser().exists():
            hint = "; make it: ray get-auth-token --generate" if "auth_token" in str(here) else ""
            yield f"file_mounts.{there}: no {here} here{hint}"
    if not any(there.endswith(".ray/auth_token") for there in prepared["file_mounts"]):
        yield "file_mounts: ~/.ray/auth_token is not mounted: nodes would not know the token"
    head, worker = "head_start_ray_commands", "worker_start_ray_commands"
    for key in (head, worker):
        starts = [command for command in prepared[key] if "ray start" in command]
        if not starts:
            yield f"{key}: no 'ray start'"
        for command in starts:
            yield from _start(key, command)
            if key == head and kind == "local" and "RAY_enable_autoscaler_v2=0" not in command:
                yield (
                    f"{key}: export RAY_enable_autoscaler_v2=0 before 'ray start': with type local "
                    "v2 starts one worker too few"
                )
    docker = prepared.get("docker") or {}
    shells = [*docker.get("run_options", []), *prepared["setup_commands"]]
    if not any(_TOKEN in line for line in shells):
        yield (
            f"{'docker.run_options' if docker.get('image') else 'setup_commands'}: {_TOKEN} is not "
            "set for the shells that 'ray submit' opens"
        )
    for key in ("image", "head_image", "worker_image"):
        yield from _image(f"docker.{key}", docker.get(key))


def _start(key: str, command: str) -> Iterator[str]:
    before, _, options = command.partition("ray start")
    if _TOKEN not in before:
        yield f"{key}: export {_TOKEN} before 'ray start': a node without it is refused, or open"
    for host in re.findall(r"--dashboard-host[= ](\S+)", options):
        if host.strip("'\"") not in _LOOPBACK:
            yield (
                f"{key}: --dashboard-host={host}: others could run code through it; 127.0.0.1, and "
                "'ray dashboard FILE' from where you sit"
            )


def _image(where: str, image: str | None) -> Iterator[str]:
    tag = re.search(r"rayproject/ray:([0-9.]+)-py(\d)(\d+)", image or "")
    if tag and tag[1] != ray.__version__:
        yield f"{where}: Ray {tag[1]}, but here is {ray.__version__}; they must be the same"
    if tag and f"{tag[2]}.{tag[3]}" != PYTHON:
        yield f"{where}: Python {tag[2]}.{tag[3]}, but here is {PYTHON}; they must be the same"


def _unknown(found: Any, known: Names, where: str) -> Iterator[str]:
    """Names in `found` that are not `known`, with the likely one."""
    for item in found if isinstance(found, list) else [found]:
        if not isinstance(item, dict):
            yield f"{where}: {item!r} stands where names are expected"
            continue
        for name, value in item.items():
            if name not in known:
                close = difflib.get_close_matches(str(name), known, 1)
                yield f"{where}.{name}: unknown" + (f"; {close[0]}?" if close else "")
            elif known[name] is not None:
                yield from _unknown(value, known[name], f"{where}.{name}")


# --- for KubeRay ---


def _rayjob(documents: list[dict[str, Any]]) -> Iterator[str]:
    job = documents[0]
    claims = {d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    try:
        if (job["apiVersion"], job["kind"]) != ("ray.io/v1", "RayJob"):
            yield "apiVersion, kind: ray.io/v1 RayJob is expected"
        spec = job["spec"]
        if not spec["entrypoint"].strip():
            yield "spec.entrypoint: empty"
        cluster = spec["rayClusterSpec"]
        if cluster["rayVersion"] != ray.__version__:
            yield f"rayVersion: {cluster['rayVersion']}, but here is {ray.__version__}"
        if cluster.get("authOptions", {}).get("mode") != "token":
            yield "authOptions.mode: token is not set: whoever reaches the cluster may run code"
        if cluster.get("headGroupSpec", {}).get("serviceType", "ClusterIP") != "ClusterIP":
            yield "headGroupSpec.serviceType: reachable from outside; use kubectl port-forward"
        images = set()
        groups = [("headGroupSpec", cluster["headGroupSpec"])]
        groups += [(f"group {group['groupName']}", group) for group in cluster["workerGroupSpecs"]]
        for where, group in groups:
            pod = group["template"]["spec"]
            volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
            for volume in volumes.values():
                claim = volume.get("persistentVolumeClaim", {}).get("claimName")
                if claim and claim not in claims:
                    yield f"{where}: no PersistentVolumeClaim {claim} in this file"
            for container in pod["containers"]:
                images.add(container["image"])
                variables = {entry["name"]: entry.get("value") for entry in container["env"]}
                if variables.get("RAY_AUTH_MODE") != "token":
                    yield f"{where}: RAY_AUTH_MODE is not token in {container['name']}"
                for mount in container.get("volumeMounts", []):
                    if mount["name"] not in volumes:
                        yield f"{where}: {container['name']} mounts {mount['name']}: no such volume"
        if len(images) > 1:
            yield f"images differ: {', '.join(sorted(images))}; head and workers must be the same"
    except (KeyError, TypeError, AttributeError) as error:
        yield f"a RayJob needs {error}"


def _placeholders(node: Any, where: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _placeholders(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for place, value in enumerate(node):
            yield from _placeholders(value, f"{where}.{place}" if where else "")
    elif isinstance(node, str) and PLACEHOLDER in node:
        yield f"{where}: still {PLACEHOLDER}"


def main(paths: list[str]) -> int:
    """Print what is wrong; exit code 2 if anything is."""
    if not paths:
        print(f"usage: python -m {__spec__.name} FILE...", file=sys.stderr)
        return 2
    bad = False
    for path in paths:
        found = problems(Path(path))
        bad |= bool(found)
        for line in found or ["nothing wrong found"]:
            print(f"{path}: {line}")
    return 2 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
