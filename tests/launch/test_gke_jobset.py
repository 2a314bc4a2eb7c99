"""launch/gke_jobset.yaml: what Kubernetes would be told agrees with gptjax and with itself."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from gptjax import config
from gptjax.cli import main
from gptjax.plan import machines

yaml = pytest.importorskip("yaml")

REPO = Path(__file__).resolve().parents[2]
FILE = REPO / "launch" / "gke_jobset.yaml"
AGAIN = [69, 75, 134, 137, 143]  # as in launch/README.md


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    """Each object of the file, by kind."""
    loaded = list(yaml.safe_load_all(FILE.read_text()))
    return {one["kind"]: one for one in loaded}


@pytest.fixture(scope="module")
def job(objects) -> dict[str, Any]:
    (replicated,) = objects["JobSet"]["spec"]["replicatedJobs"]
    return replicated


def resolved(words: list[str], monkeypatch: pytest.MonkeyPatch) -> config.Config:
    monkeypatch.chdir(REPO)  # as the image's folder has its configs
    args, rest = main._parser().parse_known_args(words)
    assert args.command is main._train
    return main._resolve(args, rest)


def test_its_objects_are_of_the_kinds_that_the_apis_know(objects) -> None:
    versions = {kind: one["apiVersion"] for kind, one in objects.items()}
    assert versions == {
        "JobSet": "jobset.x-k8s.io/v1alpha2",
        "PersistentVolumeClaim": "v1",
        "NetworkPolicy": "networking.k8s.io/v1",
    }


def test_a_problem_for_a_person_fails_it_and_all_else_restarts_it(objects, job) -> None:
    policy = objects["JobSet"]["spec"]["failurePolicy"]
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert policy["maxRestarts"] > 0
    assert policy["restartStrategy"] == "BlockingRecreate"
    spec = job["template"]["spec"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"]) == ("FailJob", "NotIn")
    assert codes["values"] == AGAIN  # ordered, as the API asks
    (container,) = spec["template"]["spec"]["containers"]
    assert codes["containerName"] == container["name"]
    assert spec["backoffLimit"] == 0  # or a pod is replaced alone, and nobody speaks to it
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 120


def test_pods_share_a_volume_and_run_unprivileged(objects, job) -> None:
    pod = job["template"]["spec"]["template"]["spec"]
    (volume,) = pod["volumes"]
    claim = objects["PersistentVolumeClaim"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (container,) = pod["containers"]
    (mount,) = container["volumeMounts"]
    assert mount["name"] == volume["name"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    # whom launch/Dockerfile makes
    user = re.search(r"useradd .*--uid (\d+)", (REPO / "launch" / "Dockerfile").read_text())
    assert pod["securityContext"]["runAsUser"] == int(user[1])
    policy = objects["NetworkPolicy"]["spec"]
    ours = {"jobset.sigs.k8s.io/jobset-name": objects["JobSet"]["metadata"]["name"]}
    assert policy["podSelector"]["matchLabels"] == ours
    (rule,) = policy["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": ours}}]


def test_its_command_is_one_of_gptjax_for_the_slices_that_it_asks_for(job, monkeypatch) -> None:
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    cfg = resolved(container["args"], monkeypatch)
    machine = machines.parse(cfg.mesh.machine)
    (mount,) = container["volumeMounts"]
    assert cfg.run.startswith(mount["mountPath"] + "/")
    assert cfg.data.store.startswith(mount["mountPath"] + "/")
    assert job["replicas"] == machine.slices
    hosts = machine.processes // machine.slices
    assert job["template"]["spec"]["parallelism"] == hosts
    assert job["template"]["spec"]["completions"] == hosts
    assert container["resources"]["limits"]["google.com/tpu"] == machine.device.node
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert topology == "x".join(map(str, machine.shape))
    cfg.check(machine.devices, machine.processes)


def test_the_line_for_xpk_asks_for_the_same(objects, job, monkeypatch) -> None:
    (line,) = re.findall(r"^#\s+(xpk workload create .*)$", FILE.read_text(), re.M)
    words = shlex.split(line)[3:]
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert list(map(int, options["--restart-on-exit-codes"].split(","))) == AGAIN
    restarts = objects["JobSet"]["spec"]["failurePolicy"]["maxRestarts"]
    assert int(options["--max-restarts"]) == restarts
    pod = job["template"]["spec"]["template"]["spec"]
    grace = int(options["--termination-grace-period-seconds"])
    assert grace == pod["terminationGracePeriodSeconds"]
    cfg = resolved(shlex.split(options["--command"])[1:], monkeypatch)
    assert int(options["--num-slices"]) == machines.parse(cfg.mesh.machine).slices
    chips = int(options["--tpu-type"].rsplit("-", 1)[1])
    assert chips == machines.parse(cfg.mesh.machine).chips
