"""Every method trains every family, in full and as adapters: the table of docs/methods.md says what ran here.

`pytest tests/train/test_matrix.py --write-tables` writes it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from twostep.train.journal import read_metrics

from . import tiny_pipelines, tiny_runs
from .run_server import Server

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
BEGIN, END = "<!-- table: tests/train/test_matrix.py -->\n", "<!-- end of table -->\n"
NAMES = {"z-image": "Z-Image", "klein": "FLUX.2-klein"}
RAN: dict[tuple[str, str, str], bool] = {}
CASES = [(m, f, w) for m in tiny_runs.METHODS for f in tiny_pipelines.PIPELINES for w in tiny_runs.WEIGHTS]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tiny_runs.Place]:
    return {name: tiny_runs.make_place(name, tmp_path_factory.mktemp(name)) for name in tiny_pipelines.PIPELINES}


@pytest.mark.parametrize(("method", "family", "weights"), CASES)
def test_trains(
    server: Server, places: dict[str, tiny_runs.Place], tmp_path: Path, method: str, family: str, weights: str
) -> None:
    """In bfloat16 with checkpointed blocks; the student that is written is not the one that the run began with."""
    compute = {"dtype": "bfloat16", "checkpointing": True}
    recipe = tiny_runs.recipe(places[family], method, weights, tmp_path, iterations=2, accumulate=2, compute=compute)
    statuses, printed = server.run(recipe)
    assert statuses == [0], printed
    rows = read_metrics(tmp_path)
    assert len(rows) == 2 and rows[-1]["skipped_updates"] == 0 and rows[-1]["generator_gradient_norm"] > 0
    facts = json.loads((tmp_path / "student" / "student.json").read_text())
    for name in set(facts["steps"]):
        if weights == "lora":
            tensors = load_file(tmp_path / "student" / f"{name}.safetensors")
            assert any(bool(value.any()) for key, value in tensors.items() if "lora_B" in key)
        else:
            file = "diffusion_pytorch_model.safetensors"
            mine = load_file(tmp_path / "student" / name / file)
            theirs = load_file(places[family].model / "transformer" / file)
            assert mine.keys() == theirs.keys()
            assert any(not mine[key].equal(theirs[key]) for key in theirs)
    RAN[method, family, weights] = True


def table() -> str:
    columns = [(family, weights) for family in NAMES for weights in tiny_runs.WEIGHTS]
    head = ["method", *(f"{NAMES[family]}, {'full' if weights == 'full' else 'LoRA'}" for family, weights in columns)]
    lines = [head, ["---"] * len(head)]
    for method in tiny_runs.METHODS:
        ran = ["yes" if RAN.get((method, *column)) else "no" for column in columns]
        lines.append([f"`{method}`", *ran])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_docs_say_what_ran(pytestconfig: pytest.Config) -> None:
    if len(RAN) < len(CASES) and not pytestconfig.getoption("--write-tables"):
        pytest.skip("only a part of the cases ran before this: the table is of all of them")
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    found, _, after = rest.partition(END)
    if pytestconfig.getoption("--write-tables"):
        PAGE.write_text(f"{before}{BEGIN}{table()}{END}{after}")
    else:
        assert found == table(), "run: pytest tests/train/test_matrix.py --write-tables"
