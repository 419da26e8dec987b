"""On two ranks: every mode and policy gives the gradient of one process that sees all ranks' noise.

One pair of processes makes all findings (unrolled_ranks.py); the tests judge them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
]

Findings = dict[str, Any]
CASES = [f"{k} {c}" for k in ("ddp", "fsdp") for c in ("separate float32", "shared float32", "shared float64")]
CASES += ["ddp shared float32 checkpointed", "fsdp shared float32 checkpointed"]
POLICIES = ["plain None", *(f"{mode} {sync}" for mode in ("retain", "recompute") for sync in (None, "last", "each"))]
UNREDUCED = "retain each"  # with one DistributedDataParallel in both steps


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    script, store = Path(__file__).with_name("unrolled_ranks.py"), tmp_path_factory.mktemp("ranks") / "store"
    command = [sys.executable, str(script)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "2", str(store)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), outputs
    found: Findings = json.loads(outputs[0][0].splitlines()[-1])
    return found


def _is_refused(case: str, policy: str) -> bool:
    return case.startswith("ddp shared") and policy == UNREDUCED


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES)
def test_gives_the_gradient_of_one_process(findings: Findings, case: str, policy: str) -> None:
    found = findings[case][policy]
    if _is_refused(case, policy):
        assert "would not reduce the second backward. Use sync='last', or mode='recompute'" in found["error"]
        return
    assert found["from one process"] <= (1e-14 if "float64" in case else 1e-7)
    assert found["sharded"] == case.startswith("fsdp")


@pytest.mark.parametrize("case", CASES)
def test_equals_plain_bit_for_bit_where_gradients_are_exchanged_once(findings: Findings, case: str) -> None:
    """All of them, except those that exchange the gradients of shared parameters twice."""
    for policy, found in findings[case].items():
        once = "separate" in case or "last" in policy or (case.startswith("ddp") and "None" in policy)
        if _is_refused(case, policy):
            continue
        if once or "plain" in policy:
            assert found["from plain"] == 0.0, policy
        else:
            assert found["from plain"] <= (1e-14 if "float64" in case else 1e-7), policy


def test_ddp_exchanges_gradients_as_often_as_the_policy_says(findings: Findings) -> None:
    shared, separate = findings["ddp shared float32"], findings["ddp separate float32"]
    for policy in ("plain None", "retain None", "retain last", "recompute None", "recompute last"):
        assert shared[policy]["reduced"] == 1, policy
    assert shared["recompute each"]["reduced"] == 2
    assert {found["reduced"] for found in separate.values()} == {2}


def test_fsdp_gathers_and_reduces_as_often_as_documented(findings: Findings) -> None:
    """For 4 blocks; docs/two_step_backward.md has this table."""
    shared = {
        policy: (found["gathered"], found["reduced"]) for policy, found in findings["fsdp shared float32"].items()
    }
    assert shared == {
        "plain None": (16, 4),
        "retain None": (17, 8),
        "retain last": (17, 4),
        "retain each": (17, 8),
        "recompute None": (21, 8),
        "recompute last": (21, 4),
        "recompute each": (21, 8),
    }
    assert {found["reduced"] for found in findings["fsdp separate float32"].values()} == {8}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_options_are_bitwise_over_ranks(findings: Findings, kind: str) -> None:
    verified, with_grad, without = findings[f"options {kind}"]
    assert (verified, with_grad) == (0, 0) and without > 1e-3, "dropout and the share that is inherited do something"


def test_fsdp_and_functions_as_steps_need_the_modules(findings: Findings) -> None:
    assert "pass modules=(module of first, module of second)" in findings["functions"]


@pytest.mark.parametrize("mode", ["retain", "recompute"])
def test_what_fsdp_holds_back_is_reduced_or_dropped(findings: Findings, mode: str) -> None:
    """A trunk and a head for each step: three reductions, in whichever backward, and the gradient of plain."""
    assert findings["heads plain"] == [0.0, 3]
    assert findings[f"heads {mode}"] == [0.0, 3]
    assert findings[f"heads {mode} after an error"] == 0.0


def test_a_caller_that_accumulates_without_synchronisation_keeps_its_setting(findings: Findings) -> None:
    assert findings["sync stays off"]
    assert findings["accumulated without sync"] <= 1e-7
    assert findings["no_sync"] == [0.0, 0.0, 0.0]


def test_one_ddp_behind_functions_is_not_left_unreduced(findings: Findings) -> None:
    assert "would not reduce the second backward" in findings["hidden ddp"]


def test_a_static_graph_gets_each_backwards_gradients_when_it_runs(findings: Findings) -> None:
    """Joined, they would arrive after the all-reduce that DistributedDataParallel has counted out, and ranks part."""
    for kind in ("shared", "separate"):
        assert findings[f"static {kind} plain None"] == [0.0] * 3
        assert all(error <= 1e-7 for error in findings[f"static {kind} recompute None"])
        assert "sync='last' and DistributedDataParallel(static_graph=True)" in findings[f"static {kind} recompute last"]
    assert findings["static separate retain None"] == [0.0] * 3
    assert "Use mode='recompute'" in findings["static shared retain None"]
    assert "pass modules=(module of first, module of second)" in findings["static hidden"]


def test_looking_for_unused_parameters_is_refused_where_it_would_lose_a_steps_own(findings: Findings) -> None:
    assert findings["unused False recompute None"] == 0.0
    assert findings["unused True plain None"] <= 1e-7 and findings["unused True recompute each"] <= 1e-7
    assert "Use find_unused_parameters=False" in findings["unused True recompute None"]
