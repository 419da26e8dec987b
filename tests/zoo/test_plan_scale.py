"""`twostep plan --gpus`: what it counts on ranks without processes is what two real ranks send and hold."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.train.method_roles import CASES
from twostep.cli import main
from twostep.train.rehearsal import average_among
from twostep.train.sharding import shard
from twostep.zoo import Context
from twostep.zoo.plan import Setting, make_backbone
from twostep.zoo.plan_scale import (
    Cluster,
    Collective,
    RankCount,
    Rates,
    ScaledPlan,
    Work,
    cost,
    counted,
    plan_scale,
    ranks_without_processes,
    ring,
    totals,
)

from .models import stock_model
from .scaled_ranks import MEMORY, TRAFFIC
from .test_plan import CONFIG

ROOT = Path(__file__).parents[2]
CLASSES = {"z-image": "ZImageTransformer2DModel", "flux2": "Flux2Transformer2DModel"}
# How often each update runs a network forward, or backward: Turbo++'s, in the mode "recompute".
PASSES = {
    # both steps without a graph or with, their backwards, step 1 again; and for each of two losses the real score, the
    # fake score and the discriminator forward, and the discriminator backward to its input
    "generator": 5 + 2 * 4,
    # the student's two steps, the fake score forward and backward, the discriminator on real and fake
    "guidance": 2 + 2 + 2,
}


@functools.cache
def planned(family: str, arrangement: str, parallel: str, gpus: int = 2, **cluster: int) -> ScaledPlan:
    case = CASES[family]
    config = {**case.config, "_class_name": CLASSES[family]}
    setting = Setting(*case.size, 2, 32, arrangement, rank=2, optimizer=False)
    return plan_scale(config, setting, Cluster(gpus, parallel=parallel, **cluster), shard, average_among)


def sent(plan: ScaledPlan) -> dict[str, Any]:
    return {update: totals(work.of_update(1)) for update, work in plan.work.items()}


# Against real ranks


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("ranks") / "rendezvous"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.zoo.scaled_ranks", str(rank), "2", str(file)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=1200) for process in ranks]
    assert all(process.returncode == 0 for process in ranks), "\n".join(err[-3000:] for _, err in outputs)
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAFFIC)
def test_two_ranks_send_exactly_what_is_predicted(measured: dict[str, Any], name: str) -> None:
    """Every collective of the trainer's own Turbo++, and its bytes."""
    assert sent(planned(*name.split(", "))) == measured["traffic"][name]


@pytest.mark.slow
@pytest.mark.parametrize("arrangement", MEMORY)
def test_a_rank_in_shards_holds_what_is_predicted(measured: dict[str, Any], arrangement: str) -> None:
    """Within 10 %; the oracle is malloc's own book-keeping on one of two real ranks."""
    predicted = plan_scale(CONFIG, MEMORY[arrangement], Cluster(2), shard, average_among).peak
    assert 0.9 <= predicted / measured["memory"][arrangement] <= 1.1


# Against closed forms


def gathered_bytes(family: str, shards: int) -> int:
    """Of one network in bfloat16: each parameter's rows are filled up to a multiple of the shards."""
    rows = [(p.shape[0], p.numel() // p.shape[0]) for p in stock_model(CASES[family]).parameters()]
    return sum(2 * shards * math.ceil(count / shards) * each for count, each in rows)


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("gpus", [2, 3])
def test_every_network_is_gathered_once_a_forward_and_once_a_backward(family: str, gpus: int) -> None:
    found = sent(planned(family, "networks", "fsdp", gpus))
    for update, passes in PASSES.items():
        # The discriminator's last tap is the last block, so that all blocks run, and the root is gathered too.
        assert found[update]["gather"]["bytes"] == passes * gathered_bytes(family, gpus)


def test_gradients_are_scattered_in_float32_and_all_reduced_whole_under_ddp() -> None:
    fsdp, ddp = (sent(planned("z-image", "networks", parallel)) for parallel in ("fsdp", "ddp"))
    networks = {"generator": 2, "guidance": 1}
    heads = 4 * planned("z-image", "networks", "fsdp").trainable["discriminator"]
    for update, count in networks.items():
        assert fsdp[update]["scatter"]["bytes"] == 2 * count * gathered_bytes("z-image", 2)
    assert "reduce" not in fsdp["generator"] and fsdp["guidance"]["reduce"]["bytes"] == heads
    whole = 4 * sum(p.numel() for p in stock_model(CASES["z-image"]).parameters())
    assert ddp == {
        "generator": {"reduce": {"calls": 1, "bytes": 2 * whole}},
        "guidance": {"reduce": {"calls": 1, "bytes": whole + heads}},
    }


def test_replicas_gather_among_fewer_and_reduce_what_they_have_scattered() -> None:
    two, four = (
        planned("z-image", "networks", "fsdp", 2),
        planned("z-image", "networks", "fsdp", 4, nodes=2, replicas=2),
    )
    generator = sent(four)["generator"]
    assert generator["gather"] == sent(two)["generator"]["gather"]
    assert generator["reduce"]["bytes"] == generator["scatter"]["bytes"] // 2
    assert {c.ranks for c in four.work["generator"].collectives} == {(0, 1), (0, 2)}
    costs = four.costs["generator"]
    assert costs.reduced == sent(two)["generator"]["scatter"]["bytes"]  # the same gradients, not more
    assert costs.between == 2 * generator["reduce"]["bytes"]  # two groups, twice (2 - 1) / 2 each
    assert costs.inside == (generator["gather"]["bytes"] + generator["scatter"]["bytes"]) / 2


def test_what_is_held_is_divided_but_for_the_heads() -> None:
    one, three = planned("z-image", "networks", "fsdp", 1), planned("z-image", "networks", "fsdp", 3)
    heads = 4 * one.trainable["discriminator"]
    assert three.held - heads == pytest.approx((one.held - heads) / 3, rel=0.02)  # rows that fill up
    assert planned("z-image", "networks", "ddp").held == pytest.approx(one.held, rel=0.001)


def network_and_inputs() -> tuple[Any, torch.Tensor, Context]:
    network = make_backbone({**CASES["z-image"].config, "_class_name": CLASSES["z-image"]}, torch.float32)
    return network, torch.randn(2, 4, 4, 6), Context(torch.randn(2, 32, network.context_width))


def test_operations_are_those_of_the_matrix_products_and_attention() -> None:
    """2 x rows x parameters for every linear layer, and 4 x tokens^2 x width for every attention."""
    expected = []
    with counted() as count:
        network, x, context = network_and_inputs()
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(
                    lambda layer, given, out: expected.append(2 * given[0].numel() * layer.out_features)
                )
        with count.phase("forward"), torch.no_grad():
            network.velocity(x, 0.5, context)
    tokens = 32 + 32  # 2 x 3 patches and the caption, each filled up to 32
    attention = 4 * tokens**2 * network.width * len(x) * len(network.blocks())
    assert count.work["forward"].flops == sum(expected) + attention


def test_operations_of_a_backward_are_those_that_torch_counts() -> None:
    network, x, context = network_and_inputs()
    with sdpa_kernel(SDPBackend.MATH):  # torch's counter does not know the CPU's attention
        with FlopCounterMode(display=False) as theirs:
            network.velocity(x, 0.5, context).sum().backward()
        with RankCount() as ours, ours.phase("update"):
            network.velocity(x, 0.5, context).sum().backward()
    assert ours.work["update"].flops == theirs.get_total_flops() > 0


@given(
    per_node=st.integers(1, 8),
    nodes=st.integers(1, 4),
    divisor=st.integers(1, 32),
    kind=st.sampled_from(["gather", "scatter", "reduce"]),
    replicate=st.booleans(),
)
def test_a_ring_sends_what_walking_around_it_says(
    per_node: int, nodes: int, divisor: int, kind: str, replicate: bool
) -> None:
    gpus = per_node * nodes
    shards = max(n for n in range(1, gpus + 1) if gpus % n == 0 and n <= divisor)
    if shards % per_node and per_node % shards:
        return
    groups = [tuple(range(first, first + shards)) for first in range(0, gpus, shards)]
    if replicate:
        groups = [tuple(range(first, gpus, shards)) for first in range(shards)]
    inside, between = ring(Collective(kind, 840, groups[0]), per_node)
    left, moved = [0.0] * nodes, [0.0] * gpus  # what each node, and each GPU inside one, sends
    for group in groups:
        pieces = (2 if kind == "reduce" else 1) * (len(group) - 1)
        for rank, after in zip(group, group[1:] + group[:1], strict=True):
            if rank // per_node == after // per_node:
                moved[rank] += pieces * 840 / len(group)
            else:
                left[rank // per_node] += pieces * 840 / len(group)
    assert max(left) == pytest.approx(between) and min(left) == pytest.approx(between)
    assert max(moved) == pytest.approx(inside)


def test_a_cost_is_bytes_and_operations_over_rates() -> None:
    cluster = Cluster(4, 2, rates=Rates(flops=10.0, link=5.0, network=2.0))
    work = Work(100, [Collective("gather", 80, (0, 1, 2, 3))], [Collective("reduce", 40, (0, 1, 2, 3))])
    once, twice = cost(work, cluster), cost(work, cluster, accumulate=2)
    assert (once.compute, once.gathered, once.reduced) == (10.0, 80, 40)
    assert once.communication == 60 / 2 + 60 / 2  # the network is slower than the links
    assert (once.overlapped, once.in_turn) == (60.0, 70.0)
    assert (twice.compute, twice.gathered, twice.reduced) == (20.0, 160, 40)  # averaged once, however many batches


def test_more_batches_an_update_hold_their_gradients_and_send_as_much_each() -> None:
    config = {**CASES["z-image"].config, "_class_name": CLASSES["z-image"]}
    setting = Setting(*CASES["z-image"].size, 2, 32, "networks", optimizer=False, accumulate=3)
    three = plan_scale(config, setting, Cluster(2), shard, average_among)
    one = planned("z-image", "networks", "fsdp")
    assert three.costs["generator"].gathered == 3 * one.costs["generator"].gathered
    assert three.samples == 3 * one.samples
    assert three.peaks["generator"] > one.peaks["generator"] and three.held == one.held


# The command


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"gpus": 0}, "gpus is 0, expected at least 1"),
        ({"gpus": 6, "nodes": 4}, "gpus is 6, expected a multiple of the number of nodes, 4"),
        ({"gpus": 8, "replicas": 3}, "replicas is 3, expected a divisor of the number of GPUs, 8"),
        ({"gpus": 8, "replicas": 2, "parallel": "ddp"}, "replicas is for parallel 'fsdp'"),
        ({"gpus": 8, "parallel": "tp"}, "parallel is 'tp', expected one of 'ddp', 'fsdp'"),
        ({"gpus": 12, "nodes": 3, "replicas": 2}, "a replica has 6 GPUs and a node 4: expected that one divides"),
    ],
)
def test_a_cluster_that_cannot_be(cluster: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cluster(**cluster)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "2"], "--nodes is given, and --gpus is not"),
        (["--gpus", "4", "--nodes", "3"], "gpus is 4, expected a multiple of the number of nodes, 3"),
        (["--gpus", "4", "--accumulate", "0"], "--accumulate is 0, expected at least 1"),
        (["--gpus", "4", "--link", "0"], "link is 0, expected a number above 0"),
        (["--gpus", "4", "--flops", "nan"], "flops is nan, expected a number above 0"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "z-image", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock_model(CASES["z-image"]).save_pretrained(tmp_path)
    small = [str(tmp_path), "--height", "32", "--width", "48", "--caption", "32", "--rank", "2"]
    assert main(["plan", *small, "--gpus", "2", "--parallel", "ddp", "--arrangement", "one base"]) == 0
    table = capsys.readouterr().out
    assert "2 GPUs in 1 node, ddp: every GPU holds everything; 2 samples an update" in table
    assert "one base: most time goes to" in table and "reduces: GB a GPU" in table
    assert "Assumed, not measured: 400 TFLOP/s" in table
    scale = ["--gpus", "4", "--nodes", "2", "--replicas", "2", "--arrangement", "networks", "--ema"]
    assert main(["plan", *small, *scale, "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    costs = facts["costs"]
    assert costs["iteration"]["flops"] == 5 * costs["guidance"]["flops"] + costs["generator"]["flops"]
    assert costs["generator"]["gathered_bytes"] == PASSES["generator"] * gathered_bytes("z-image", 2)
    assert facts["rates"] == {"flops": 400e12, "link": 360e9, "network": 320e9}


def test_a_rank_does_not_plan() -> None:
    with ranks_without_processes(Cluster(2)), pytest.raises(ValueError, match="this process is a rank already"):
        ranks_without_processes(Cluster(2)).__enter__()
