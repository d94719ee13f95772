"""The JobSets: valid, and each pod of a run finds its place."""

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

CRD = "CROSSLMM_JOBSET_CRD"  # a file: config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of JobSet
NAMES = ["gke_tpu_jobset.yaml", "gke_gpu_jobset.yaml"]


@pytest.fixture(params=NAMES)
def jobset(request: pytest.FixtureRequest, launch: Path) -> dict:
    return yaml.safe_load((launch / request.param).read_text())


def parts(jobset: Mapping) -> tuple[dict, dict, dict, dict]:
    """The replicated job, the spec of its jobs, that of their pods, and the container."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return replicated, job, pod, container


def test_every_pod_starts_a_command_of_this_repository(jobset: dict, launch: Path) -> None:
    command = parts(jobset)[3]["command"]
    assert (launch.parent / command[0]).exists() and command[1] == "train"
    assert (launch.parent / command[2]).exists()


def test_a_users_mistake_ends_the_set_and_all_else_restarts(jobset: dict) -> None:
    _, job, pod, container = parts(jobset)
    rules = job["podFailurePolicy"]["rules"]
    codes = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert rules == [{"action": "FailJob", "onExitCodes": codes}]
    policy = jobset["spec"]["failurePolicy"]
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    assert policy["maxRestarts"] > 0
    # What a pod failure policy needs; and one lost pod restarts all of them.
    assert (pod["restartPolicy"], job["backoffLimit"], job["completionMode"]) == ("Never", 0, "Indexed")


def test_pods_have_time_to_save(jobset: dict) -> None:
    from crosslmm_jax.config import RunConfig

    assert parts(jobset)[2]["terminationGracePeriodSeconds"] > RunConfig(out="x").stop_deadline_s


def test_the_tpu_jobset_starts_every_host_of_its_slices_and_leaves_their_places_to_jax(launch: Path) -> None:
    _, job, pod, container = parts(yaml.safe_load((launch / NAMES[0]).read_text()))
    chips = 1
    for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(size)
    hosts = chips // container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == hosts
    assert "env" not in container


def test_the_gpu_jobset_tells_every_pod_its_place(launch: Path) -> None:
    jobset = yaml.safe_load((launch / NAMES[1]).read_text())
    replicated, job, pod, container = parts(jobset)
    environ = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}
    name = jobset["metadata"]["name"]
    (port,) = (port["containerPort"] for port in container["ports"])
    assert replicated["replicas"] == 1
    assert environ == {
        "COORDINATOR_ADDRESS": f"{name}-{replicated['name']}-0-0.{name}:{port}",
        "NUM_PROCESSES": str(job["completions"]),
        "PROCESS_ID": {
            "fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
        },
    }
    assert job["parallelism"] == job["completions"]
    assert {"nvidia.com/gpu"} == {toleration["key"] for toleration in pod["tolerations"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    (shared,) = (m["name"] for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm")
    assert volumes[shared]["emptyDir"] == {"medium": "Memory"}


# What `crosslmm train` does first, without the training.
JOIN = """
    [[ $2 == *xla_flags ]] && exit
    exec "$INTERPRETER" -c "
    import jax
    from crosslmm_jax.parallel import gather, initialize_processes
    initialize_processes()
    print(jax.process_index(), gather(jax.process_index()))
    "
"""


@pytest.mark.slow
@pytest.mark.multihost
def test_the_pods_of_two_slices_are_one_run(launch: Path, fake_program, cpu_environment, free_port) -> None:
    """Four processes with the variables that GKE and JobSet set in four pods."""
    python, port = fake_program("python", textwrap.dedent(JOIN)), str(free_port())
    processes = [
        subprocess.Popen(
            [launch / "_env.sh", "train", "x.py"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | cpu_environment | {
                "PYTHON": str(python), "INTERPRETER": sys.executable, "JAX_COORDINATOR_PORT": port,
                "JAX_FORCE_TPU_INIT": "1",  # JAX acts as on a host with TPUs
                "TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_WORKER_ID": str(host),
                "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080", "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": str(slice_index),
            },
        )
        for slice_index in range(2) for host in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    last_lines = [output.splitlines()[-1] for output in outputs]
    assert last_lines == [f"{index} [0, 1, 2, 3]" for index in range(4)], outputs


def wrong(value: object, schema: Mapping, where: str) -> Iterator[str]:
    """How `value` differs from a schema of a CRD, read strictly: what it does not name is wrong, too."""
    if schema.get("x-kubernetes-int-or-string"):
        kinds: tuple[type, ...] = (int, str)
    else:
        known = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
        kinds = (known[schema["type"]],)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        yield f"{where} is {value!r}, not of {kinds}"
    elif isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties")
        yield from (f"{where}.{name} is missing" for name in schema.get("required", ()) if name not in value)
        for name, inner in value.items():
            if name in properties or isinstance(others, dict):
                yield from wrong(inner, properties.get(name, others), f"{where}.{name}")
            elif not others and "properties" in schema:
                yield f"{where}.{name} is unknown"
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from wrong(inner, schema["items"], f"{where}[{place}]")
    elif value not in schema.get("enum", [value]):
        yield f"{where} is {value!r}, not one of {schema['enum']}"
    elif isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{where} is {value!r}, which does not match {schema['pattern']}"


@pytest.mark.nightly
def test_the_jobsets_are_valid_against_the_crd(jobset: dict) -> None:
    if CRD not in os.environ:
        pytest.skip("the CRD of JobSet is not here")
    crd = yaml.safe_load(Path(os.environ[CRD]).read_text())
    group, version = jobset["apiVersion"].split("/")
    assert (group, jobset["kind"]) == (crd["spec"]["group"], crd["spec"]["names"]["kind"])
    schemas = {v["name"]: v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"]}
    assert list(wrong(jobset, schemas[version], "JobSet")) == []
    _, job, pod, _ = parts(jobset)
    job["backoffLimt"], pod["containers"][0]["ports"][0]["containerPort"] = 0, "8482"  # the check finds these
    assert [line.split(" ")[0].split(".")[-1] for line in wrong(jobset, schemas[version], "JobSet")] == [
        "containerPort", "backoffLimt"
    ]  # fmt: skip
