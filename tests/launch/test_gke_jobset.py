"""launch/gke_jobset.yaml agrees with gptjax and with itself."""

import re
from pathlib import Path
from typing import Any

import pytest

from gptjax import config
from gptjax.cli import arguments, main
from gptjax.plan import machines

yaml = pytest.importorskip("yaml")

REPO = Path(__file__).resolve().parents[2]
FILE = REPO / "launch" / "gke_jobset.yaml"
RESTART_CODES = [69, 75, 134, 137, 143]  # as in launch/README.md


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    """The objects of the file by kind."""
    loaded = list(yaml.safe_load_all(FILE.read_text()))
    return {one["kind"]: one for one in loaded}


@pytest.fixture(scope="module")
def job(objects) -> dict[str, Any]:
    (replicated,) = objects["JobSet"]["spec"]["replicatedJobs"]
    return replicated


def resolved(words: list[str], monkeypatch: pytest.MonkeyPatch) -> config.Config:
    monkeypatch.chdir(REPO)  # the image's folder has the configs too
    args, rest = main.parser().parse_known_args(words)
    assert args.command.name == "train"
    return arguments.resolve(args, rest)


def test_objects_have_the_expected_kinds_and_api_versions(objects) -> None:
    versions = {kind: one["apiVersion"] for kind, one in objects.items()}
    assert versions == {
        "JobSet": "jobset.x-k8s.io/v1alpha2",
        "NetworkPolicy": "networking.k8s.io/v1",
    }


def test_permanent_errors_fail_the_jobset_and_all_other_exit_codes_restart_it(objects, job) -> None:
    policy = objects["JobSet"]["spec"]["failurePolicy"]
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert policy["maxRestarts"] > 0
    assert policy["restartStrategy"] == "BlockingRecreate"
    spec = job["template"]["spec"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"]) == ("FailJob", "NotIn")
    assert codes["values"] == RESTART_CODES  # ordered, as the API requires
    (container,) = spec["template"]["spec"]["containers"]
    assert codes["containerName"] == container["name"]
    assert spec["backoffLimit"] == 0  # a single replaced pod could not join the job
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # required by podFailurePolicy
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 120


def test_pods_keep_a_folder_of_their_node_and_run_unprivileged(objects, job) -> None:
    pod = job["template"]["spec"]["template"]["spec"]
    (volume,) = pod["volumes"]
    assert "hostPath" in volume  # which the pods of the next attempt see
    (container,), (chown,) = pod["containers"], pod["initContainers"]
    (mount,) = container["volumeMounts"]
    assert mount["name"] == volume["name"]
    assert chown["volumeMounts"] == container["volumeMounts"]
    assert chown["command"][1:] == ["1000:1000", mount["mountPath"]]
    assert pod["securityContext"]["runAsNonRoot"] is True
    # created by launch/Dockerfile
    user = re.search(r"useradd .*--uid (\d+)", (REPO / "launch" / "Dockerfile").read_text())
    assert pod["securityContext"]["runAsUser"] == int(user[1])
    policy = objects["NetworkPolicy"]["spec"]
    ours = {"jobset.sigs.k8s.io/jobset-name": objects["JobSet"]["metadata"]["name"]}
    assert policy["podSelector"]["matchLabels"] == ours
    (rule,) = policy["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": ours}}]


def test_command_parses_and_its_machine_matches_the_requested_slices(job, monkeypatch) -> None:
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    cfg = resolved(container["args"], monkeypatch)
    machine = machines.parse(cfg.mesh.machine)
    (mount,) = container["volumeMounts"]
    assert cfg.run.startswith("gs://")
    assert cfg.data.store.startswith("gs://")
    for folder in (cfg.checkpoint.local, cfg.data.cache, cfg.log.compile_cache):
        assert folder.startswith(mount["mountPath"] + "/")
    assert job["replicas"] == machine.slices
    hosts = machine.processes // machine.slices
    assert job["template"]["spec"]["parallelism"] == hosts
    assert job["template"]["spec"]["completions"] == hosts
    assert container["resources"]["limits"]["google.com/tpu"] == machine.device.devices_per_host
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert topology == "x".join(map(str, machine.shape))
    cfg.check(machine.devices, machine.processes)
