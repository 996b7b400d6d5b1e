"""Check the clocks of several hosts, and the network between them."""

from __future__ import annotations

from collections.abc import Sequence

from consyn_jax.doctor.host_facts import Process
from consyn_jax.doctor.machine_findings import FAIL, PASS, WARN, Finding
from consyn_jax.errors import listed

# Hosts that follow NTP differ by milliseconds. Kerberos and Munge, which Slurm uses, refuse a
# credential whose time is 300 s off.
APART_S, BROKEN_S = 0.5, 300.0


def check_hosts(processes: Sequence[Process]) -> list[Finding]:
    """Check that all clocks agree with process 0's, and that all hosts can connect."""
    return [_clocks(processes), _network(processes)]


def _clocks(processes: Sequence[Process]) -> Finding:
    # Subtract the uncertainty of the comparison, so that a busy host gets no warning.
    sure = [max(0.0, abs(each.offset_s) - each.uncertainty_s) for each in processes]
    apart = [
        f"{each.host}: {each.offset_s:+.3g} s"
        for each, offset in zip(processes, sure, strict=True)
        if offset > APART_S
    ]
    if apart:
        found = f"differ from {processes[0].host}'s: {listed(apart, 8)}"
        advice = "Set the clocks by NTP (chronyc makestep, or timedatectl set-ntp true)."
        return Finding("clocks", FAIL if max(sure) > BROKEN_S else WARN, found, advice)
    most = max(abs(each.offset_s) + each.uncertainty_s for each in processes)
    return Finding("clocks", PASS, f"{len(processes)} processes, at most {most:.3g} s apart")


def _network(processes: Sequence[Process]) -> Finding:
    failed = [
        f"{each.host} to {other}" for each in processes for other in dict.fromkeys(each.unreachable)
    ]
    if failed:
        advice = (
            "Open all ports between the hosts in the firewall, because NCCL and JAX choose ports "
            "themselves. Check that each host resolves the others' names."
        )
        return Finding("network", FAIL, f"no connection: {listed(failed, 4)}", advice)
    count = len({each.host for each in processes})
    hosts = f"{count} host{'' if count == 1 else 's'}"
    return Finding("network", PASS, f"{hosts}; every process can connect to every other")
