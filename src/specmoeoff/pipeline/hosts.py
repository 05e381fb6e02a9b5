"""Hosts with known figures, as cost tables: peaks of links, memories and processors.

The two hosts are those of arXiv 2508.21706, section "Evaluation": an A30 with a Xeon Gold 6426Y
and an RTX 4090D with a Gold 5418Y. Peaks are bounds: real kernels reach a share of them.
"""

from __future__ import annotations

from dataclasses import replace

from specmoeoff.errors import InvalidInputError
from specmoeoff.pipeline.costs import Costs, Rate

TERA, GIGA = 1e12, 1e9
LATENCY_S = 10e-6
"""What starting a copy or a kernel costs."""
DISK = Rate(2.0 * GIGA)


def _host(link: float, device: Rate, cpu: Rate) -> Costs:
    moves = Rate(link, latency_s=LATENCY_S)
    device = replace(device, latency_s=LATENCY_S)
    return Costs({"disk": DISK, "h2d": moves, "d2h": moves, "device": device, "cpu": cpu})


HOSTS = {
    "a30": _host(25 * GIGA, Rate(933 * GIGA, 165 * TERA), Rate(357 * GIGA, 2.43 * TERA)),
    "4090d": _host(23 * GIGA, Rate(1008 * GIGA, 83 * TERA), Rate(197 * GIGA, 1.45 * TERA)),
}


def costs_of(host: str, scale: float = 1.0) -> Costs:
    """Return a host's cost table with every rate multiplied by ``scale``, latencies kept.

    Raises:
        InvalidInputError: There is no such host.
    """
    if host not in HOSTS:
        raise InvalidInputError(f"host {host!r} is unknown; use one of {', '.join(HOSTS)}")
    scaled = {
        lane: Rate(rate.bytes_per_s * scale, rate.flops_per_s * scale, rate.latency_s)
        for lane, rate in HOSTS[host].lanes.items()
    }
    return Costs(scaled)
