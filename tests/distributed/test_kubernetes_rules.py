"""What Kubernetes does after each exit code, by a small model of its rules.

The rules are those of the controllers' documentation: "Pod failure policy" of
kubernetes.io/docs/concepts/workloads/controllers/job, and "Failure Policy" of jobset.sigs.k8s.io.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from consyn_jax.cli.exit_codes import EXIT_CODES
from consyn_jax.distributed.process_group import LOST

MANIFESTS = Path(__file__).parents[2] / "scripts" / "kubernetes"
ENDS = "the job fails"
AGAIN = "again, without limit"
COUNTED = "again, a number of times"
# A mistake, a diverged run; saved, another process lost. The rest may be chance: an unknown error,
# a record that differs, a signal before the first step, and processes that are killed or crash.
AFTER = {2: ENDS, 3: ENDS, 75: AGAIN, 76: AGAIN}
AFTER |= dict.fromkeys((1, 4, 130, 134, 135, 137, 139, 143), COUNTED)


def manifest(name: str, kind: str) -> dict[str, Any]:
    parts = yaml.safe_load_all((MANIFESTS / name.removesuffix(".yaml") / name).read_text())
    [found] = [part for part in parts if part["kind"] == kind]
    return dict(found["spec"])


def pod_action(job: dict[str, Any], container: str, code: int) -> str:
    """The action for a pod that failed; a Job uses its first rule that matches."""
    for rule in job["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes is None or codes.get("containerName", container) != container:
            continue
        assert codes["operator"] == "In"
        assert 0 not in codes["values"], "the API refuses it"
        if code in codes["values"]:
            return str(rule["action"])
    return "Count"


def job_end(job: dict[str, Any], code: int) -> tuple[str | None, int]:
    """Why a Job fails whose pod fails again and again with `code`, and after how many pods.

    None if it never does.
    """
    [container] = [each["name"] for each in job["template"]["spec"]["containers"]]
    counted = 0
    for pods in range(1, 1000):
        action = pod_action(job, container, code)
        if action == "FailJob":
            return "PodFailurePolicy", pods
        counted += action == "Count"
        if counted > job["backoffLimit"]:
            return "BackoffLimitExceeded", pods
    return None, pods


def jobset_end(jobset: dict[str, Any], code: int) -> tuple[bool, int]:
    """Whether a JobSet fails at once, and how often it starts its Jobs before it fails."""
    [job] = [each["template"]["spec"] for each in jobset["replicatedJobs"]]
    policy = jobset["failurePolicy"]
    reason, _ = job_end(job, code)
    for rule in policy["rules"]:
        if reason in rule["onJobFailureReasons"]:
            assert rule["action"] == "FailJobSet"
            return True, 1
    return False, 1 + int(policy["maxRestarts"])


def test_all_codes_are_here() -> None:
    assert {*EXIT_CODES.values(), LOST} <= set(AFTER)


@pytest.mark.parametrize(("code", "then"), AFTER.items())
def test_a_job(code: int, then: str) -> None:
    reason, pods = job_end(manifest("job.yaml", "Job"), code)
    expected = {ENDS: ("PodFailurePolicy", 1), AGAIN: (None, 999)}
    assert (reason, pods) == expected.get(then, ("BackoffLimitExceeded", 21))


@pytest.mark.parametrize(("code", "then"), AFTER.items())
def test_a_jobset(code: int, then: str) -> None:
    """It restarts all pods, also after 75 and 76, and counts each restart."""
    ended, starts = jobset_end(manifest("jobset.yaml", "JobSet"), code)
    assert (ended, starts) == ((True, 1) if then == ENDS else (False, 101))


def test_a_preempted_pod_is_not_counted() -> None:
    rules = manifest("job.yaml", "Job")["podFailurePolicy"]["rules"]
    conditions = [rule for rule in rules if "onPodConditions" in rule]
    assert conditions == [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    ]


DOCS = MANIFESTS.parents[1] / "docs"


@pytest.mark.parametrize("name", ["job.yaml", "jobset.yaml"])
def test_the_number_of_hosts_is_in_the_places_that_the_docs_count(name: str) -> None:
    text = (MANIFESTS / name.removesuffix(".yaml") / name).read_text()
    marked = [line for line in text.splitlines() if line.endswith(" # hosts")]
    assert len(marked) == 4
    assert len({line.split(":")[1].split()[0].strip('"') for line in marked}) == 1
    assert "which appears in four places marked `# hosts`" in (DOCS / "kubernetes.md").read_text()
    assert 'in all places marked "hosts"' in text


@pytest.mark.parametrize(("name", "kind"), [("job.yaml", "Job"), ("jobset.yaml", "JobSet")])
def test_a_frozen_process_is_killed_after_the_time_that_the_docs_say(name: str, kind: str) -> None:
    spec = manifest(name, kind)
    if kind == "JobSet":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    probe = spec["template"]["spec"]["containers"][0]["livenessProbe"]
    assert "-mmin -1)" in probe["exec"]["command"][-1]
    longest = 60 + probe["periodSeconds"] * probe["failureThreshold"]
    longest += probe["terminationGracePeriodSeconds"]
    words = f"is killed within {longest} seconds"
    assert words in (MANIFESTS / name.removesuffix(".yaml") / name).read_text()
    assert words in (DOCS / "kubernetes.md").read_text()


def test_added_capabilities_are_for_root_only() -> None:
    """In a pod that is not root they have no effect: kubernetes/kubernetes#56374."""
    for name, kind in (("job.yaml", "Job"), ("jobset.yaml", "JobSet")):
        spec = manifest(name, kind)
        if kind == "JobSet":
            spec = spec["replicatedJobs"][0]["template"]["spec"]
        assert spec["template"]["spec"]["securityContext"]["runAsNonRoot"]
    for component in (MANIFESTS / "with").glob("*/kustomization.yaml"):
        for patch in yaml.safe_load(component.read_text()).get("patches", ()):
            assert "capabilities" not in patch["patch"], component
