"""Configurations: what is accepted, what is refused and in which words, and that a dump is the configuration."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from twostep.train.configuration import ConfigurationError, describe, dump, environment, load, resolved


@dataclass(frozen=True)
class Adam:
    lr: float = field(default=1e-5, metadata={"help": "step size"})
    betas: tuple[float, float] = (0.0, 0.999)
    clip: float | None = None


@dataclass(frozen=True)
class Distribution:
    kind: Literal["dmd"]
    inherit: float = 1.0
    sync: Literal["always", "last"] = "always"
    mode: Literal["recompute", "retain", "plain"] = "recompute"

    def check(self) -> Iterator[str]:
        if self.sync == "last" and self.mode == "plain":
            yield "sync='last' needs two backwards, mode='plain' has one; use mode='retain'"


@dataclass(frozen=True)
class SelfDistillation:
    kind: Literal["sd"]
    teacher: Path
    mode: Literal["recompute", "retain", "plain"] = "recompute"


@dataclass(frozen=True)
class Lora:
    rank: int
    targets: tuple[str, ...] = ("to_q", "to_v")


@dataclass(frozen=True)
class Data:
    prompts: Path
    shuffle: bool = True
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    steps: int
    optimizer: Adam = Adam()


@dataclass(frozen=True)
class Recipe:
    data: Data
    method: Union[Distribution, SelfDistillation] = Distribution("dmd", inherit=0.5)  # noqa: UP007
    name: str = field(default="run", metadata={"help": "what the run is called | shown"})
    steps: int = 100
    optimizer: Adam = Adam(lr=2e-6)
    lora: Lora | None = None
    stages: list[Stage] = field(default_factory=list)
    named: dict[str, Stage] = field(default_factory=dict)
    precision: Literal["bf16", "fp32", 8, None] = "bf16"
    limit: int | str | None = None

    def check(self) -> Iterator[str]:
        if self.lora is not None and self.optimizer.lr < 1e-6:
            yield f"lora needs optimizer.lr of 1e-6 or more, given {self.optimizer.lr}"


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def faults(tmp_path: Path, text: str | None, *overrides: str, base: Mapping | None = None) -> list[str]:
    path = None if text is None else write(tmp_path, text)
    with pytest.raises(ConfigurationError) as caught:
        load(Recipe, path, overrides, base=base)
    return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]


MINIMAL = "data:\n  prompts: a.txt\n"


def test_reads_every_type(tmp_path: Path) -> None:
    text = """
# a recipe
data: {prompts: a/b.txt, shuffle: false, weights: {photo: 1, "01": .5}}
method: {kind: sd, teacher: models/z, mode: plain}
name: no
steps: 0x10
optimizer:
  lr: 1e-4
  betas: [0, 0.9]
  clip: .inf
lora:
  rank: 8
stages:
- steps: 1
- {steps: 2, optimizer: {lr: 5}}
named: {warm: {steps: 3}}
precision: 8
limit: "7"
"""
    expected = Recipe(
        data=Data(Path("a/b.txt"), False, {"photo": 1.0, "01": 0.5}),
        method=SelfDistillation("sd", Path("models/z"), "plain"),
        name="no",
        steps=16,
        optimizer=Adam(1e-4, (0.0, 0.9), math.inf),
        lora=Lora(8),
        stages=[Stage(1), Stage(2, Adam(lr=5.0))],
        named={"warm": Stage(3)},
        precision=8,
        limit="7",
    )
    config = load(Recipe, write(tmp_path, text))
    assert config == expected
    assert type(config.stages[1].optimizer.lr) is float
    assert type(config.data.weights["photo"]) is float


def test_without_a_file_there_are_defaults_and_overrides() -> None:
    assert load(Recipe, None, ["data.prompts=a.txt"]) == Recipe(Data(Path("a.txt")))


def test_keys_that_a_section_leaves_out_keep_the_sections_default(tmp_path: Path) -> None:
    config = load(Recipe, write(tmp_path, MINIMAL + "optimizer:\n  clip: 1.0\nmethod:\n  sync: last\n"))
    assert config.optimizer == Adam(lr=2e-6, clip=1.0)  # not Adam's own 1e-5
    assert config.method == Distribution("dmd", inherit=0.5, sync="last")
    other = load(Recipe, None, ["data.prompts=a", "method.kind=sd", "method.teacher=t"])
    assert other.method == SelfDistillation("sd", Path("t"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "method:\n  inheirt: 1\n",
            "recipe.yaml:4: method.inheirt: unknown key; did you mean 'inherit'? accepted: kind, ",
        ),
        (
            "lr: 1\n",
            "recipe.yaml:3: lr: unknown key; it is a key at optimizer.lr, stages[].optimizer.lr or named.<name>",
        ),
        ("xyz: 1\n", "recipe.yaml:3: xyz: unknown key; accepted: data, method, name, steps, optimizer, lora, stages, "),
        (
            "method: {kind: sd, teacher: t, inherit: 1}\n",
            "method.inherit: unknown key; it is a key at method.inherit (kind",
        ),
        ("steps: 1.0\n", "recipe.yaml:3: steps: given 1.0 (float); accepted: int"),
        ("steps: true\n", "recipe.yaml:3: steps: given true; accepted: int"),
        ("steps: '5'\n", "recipe.yaml:3: steps: given '5' (str); accepted: int; without quotes"),
        ("steps: 1_000\n", "recipe.yaml:3: steps: given '1_000' (str); accepted: int"),
        ("steps:\n", "recipe.yaml:3: steps: given null; accepted: int"),
        ("name: 12\n", "recipe.yaml:3: name: given 12 (int); accepted: text; put quotes around it to make it text"),
        ("optimizer: {lr: yes}\n", "recipe.yaml:3: optimizer.lr: given 'yes' (str); accepted: float"),
        ("optimizer: {lr: true}\n", "recipe.yaml:3: optimizer.lr: given true; accepted: float"),
        ("optimizer: {lr: .nan}\n", "recipe.yaml:3: optimizer.lr: given nan; accepted: a number"),
        ("optimizer: {clip: [1]}\n", "recipe.yaml:3: optimizer.clip: given a list; accepted: float or null"),
        ("optimizer: 3\n", "recipe.yaml:3: optimizer: given 3 (int); accepted: a mapping"),
        (
            "optimizer:\n  betas:\n  - 0\n",
            "recipe.yaml:4: optimizer.betas: given a list of 1; accepted: a list of 2: float,",
        ),
        (
            "stages:\n- steps: 1\n- steps: 2\n  optimiser: {}\n",
            "recipe.yaml:6: stages[1].optimiser: unknown key; did you mean 'opt",
        ),
        ("stages:\n- steps: 1\n- {}\n", "recipe.yaml:5: stages[1].steps: missing; accepted: int"),
        ("named: {a: {steps: x}}\n", "recipe.yaml:3: named.a.steps: given 'x' (str); accepted: int"),
        (
            "method: {mode: recompte}\n",
            "method.mode: given 'recompte' (str); did you mean 'recompute'? accepted: 'recompute',",
        ),
        ("method: {kind: dmb}\n", "method.kind: given 'dmb' (str); did you mean 'dmd'? accepted: 'dmd' or 'sd'"),
        ("method: [dmd]\n", "recipe.yaml:3: method: given a list; accepted: a mapping of kind 'dmd' or 'sd'"),
        ("precision: true\n", "recipe.yaml:3: precision: given true; accepted: 'bf16', 'fp32', 8 or null"),
        ("precision: 8.0\n", "recipe.yaml:3: precision: given 8.0 (float); accepted: 'bf16', 'fp32', 8 or null"),
        ("limit: 1.5\n", "recipe.yaml:3: limit: given 1.5 (float); accepted: int, text or null"),
        ("steps: 1\nsteps: 2\n", "recipe.yaml:4: steps: given twice (first on line 3); keep one"),
        ("3: 1\n", "recipe.yaml:3: the key 3 (int) is not text; put it in quotes"),
        ("<<: {a: 1}\n", "recipe.yaml:3: merge keys (<<) are not read; use extends: other.yaml"),
        (
            "name: !!python/object/apply:os.getcwd []\n",
            "recipe.yaml:3: the tag !!python/object/apply:os.getcwd is not read",
        ),
        ("name: !!binary aGk=\n", "recipe.yaml:3: the tag !!binary is not read here"),
        ("name: &a [*a]\n", "recipe.yaml:3: the alias contains itself"),
        ("name: [1\n", "recipe.yaml:4: not YAML: "),
        (
            "method: {sync: last, mode: plain}\n",
            "recipe.yaml:3: method: sync='last' needs two backwards, mode='plain' has",
        ),
        (
            "lora: {rank: 1}\noptimizer: {lr: 1e-7}\n",
            "recipe.yaml: lora needs optimizer.lr of 1e-6 or more, given 1e-07",
        ),
    ],
)
def test_names_what_is_wrong_and_where(tmp_path: Path, text: str, expected: str) -> None:
    found = faults(tmp_path, MINIMAL + text)
    assert len(found) == 1
    assert expected in found[0]


def test_reports_all_faults_at_once(tmp_path: Path) -> None:
    found = faults(
        tmp_path, "stepps: 1\ndata: {shuffle: 'true'}\nmethod: {sync: last, mode: plain}\n", "optimizer.lr=x"
    )
    assert len(found) == 5
    for part in ("stepps", "data.prompts: missing; accepted: path", "data.shuffle: given 'true'", "sync='last'"):
        assert sum(part in problem for problem in found) == 1
    assert "override optimizer.lr=x: optimizer.lr: given 'x' (str); accepted: float" in found
    with pytest.raises(ConfigurationError, match=r"the configuration has 2 faults:\n.*stepps.*\n.*data: missing"):
        load(Recipe, write(tmp_path, "stepps: 1\n"))


def test_missing_sections_are_named(tmp_path: Path) -> None:
    assert faults(tmp_path, None) == ["the configuration: data: missing; accepted: a mapping"]
    assert faults(tmp_path, "# nothing\n") == ["recipe.yaml: data: missing; accepted: a mapping"]
    assert faults(tmp_path, "- 1\n") == ["recipe.yaml:1: given a list; accepted: a mapping"]
    with pytest.raises(ConfigurationError, match=r"none\.yaml: cannot be read: No such file"):
        load(Recipe, tmp_path / "none.yaml")


def test_checks_run_innermost_first_on_defaults_too() -> None:
    found = []

    @dataclass(frozen=True)
    class Noted:
        def check(self) -> list[str]:
            found.append(type(self).__name__)
            return []

    globals().update(_Inner=type("_Inner", (Noted,), {}), Noted=Noted)
    inner = dataclass(frozen=True)(globals()["_Inner"])
    outer = dataclass(frozen=True)(type("_Outer", (Noted,), {"__annotations__": {"a": inner}, "a": inner()}))
    load(outer, None)
    load(outer, None, base={"a": {}})
    assert found == ["_Inner", "_Outer"] * 2


# Overrides


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "lora: {rank: 4}\noptimizer: {betas: [0.1, 0.2]}\n")
    given = ["lora=null", "optimizer.betas=[0, 1e-1]", "name='1=2'", "data.weights.photo=2", "steps=1", "steps=2"]
    config = load(Recipe, path, given)
    assert (config.lora, config.optimizer.betas, config.name, config.steps) == (None, (0.0, 0.1), "1=2", 2)
    assert config.data.weights == {"photo": 2.0}
    assert load(Recipe, path, ["lora.targets=[a]"]).lora == Lora(4, ("a",))
    assert load(Recipe, path, ["lora=null", "lora.rank=2"]).lora == Lora(2)
    assert load(Recipe, path, ["stages=[{steps: 1}]"]).stages == [Stage(1)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            "method.inheirt=1",
            "override method.inheirt=1: method.inheirt: unknown key; did you mean 'inherit'? accepted:",
        ),
        ("stepps=1", "override stepps=1: stepps: unknown key; did you mean 'steps'?"),
        ("steps", "override steps: expected key=value or section.key=value"),
        (".a=1", "override .a=1: expected key=value"),
        ("steps=[1", "override steps=[1: not YAML: "),
        ("name=*.txt", "put quotes around text that has a meaning in YAML"),
        ("stages.0=1", "override stages.0=1: stages is a list at recipe.yaml:3; replace it whole: stages=..."),
        ("lora.rank=x", "override lora.rank=x: lora.rank: given 'x' (str); accepted: int"),
        ("lora.targets=[a]", "override lora.targets=[a]: lora.rank: missing; accepted: int"),
    ],
)
def test_faults_of_overrides_name_the_override(tmp_path: Path, given: str, expected: str) -> None:
    found = faults(tmp_path, MINIMAL + "stages: []\n", given)
    assert len(found) == 1
    assert expected in found[0]


def test_another_kind_does_not_inherit_what_it_lacks(tmp_path: Path) -> None:
    text = MINIMAL + "method:\n  kind: dmd\n  inherit: 0.1\n  sync: last\n  mode: retain\n"
    assert faults(tmp_path, text, "method.kind=sd", "method.teacher=t") == [
        "override method.kind=sd: method.kind: 'sd' has no inherit (recipe.yaml:5), sync (recipe.yaml:6), "
        "given for the kind before; replace the whole section: method={kind: sd, ...}"
    ]
    given = faults(tmp_path, text, "method={kind: sd, teacher: t}", "method.inherit=1")
    assert len(given) == 1 and given[0].startswith("override method.inherit=1: method.inherit: unknown key;")
    config = load(Recipe, write(tmp_path, text), ["method={kind: sd, teacher: t}"])
    assert config.method == SelfDistillation("sd", Path("t"))
    shared = MINIMAL + "method: {kind: dmd, mode: retain}\n"
    config = load(Recipe, write(tmp_path, shared), ["method.kind=sd", "method.teacher=t"])
    assert config.method == SelfDistillation("sd", Path("t"), "retain")


# Files that build on others


def test_files_extend_others_relative_to_themselves(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, MINIMAL + "steps: 1\nname: a\noptimizer: {lr: 1, clip: 2}\nstages: [{steps: 1}]\n", "a.yaml")
    write(tmp_path, "extends: ../a.yaml\nsteps: 2\noptimizer: {lr: 3}\n", "sub/b.yaml")
    top = write(tmp_path, "extends: sub/b.yaml\nstages: [{steps: 5}]\n", "c.yaml")
    config = load(Recipe, top, base={"limit": 9, "steps": 7})
    assert (config.name, config.steps, config.limit) == ("a", 2, 9)
    assert config.optimizer == Adam(lr=3.0, clip=2.0)
    assert config.stages == [Stage(5)]


def test_a_fault_is_placed_in_the_file_that_has_it(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "steps: x\n", "a.yaml")
    found = faults(tmp_path, "extends: a.yaml\n\nname: 1\n")
    assert sorted(problem.split(": given")[0] for problem in found) == ["a.yaml:3: steps", "recipe.yaml:3: name"]


def test_an_extending_file_says_replace_to_change_the_kind(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "method: {kind: dmd, inherit: 1}\n", "a.yaml")
    assert faults(tmp_path, "extends: a.yaml\nmethod: {kind: sd, teacher: t}\n") == [
        "recipe.yaml:2: method.kind: 'sd' has no inherit (a.yaml:3), given for the kind before; "
        "write  method: !replace  to leave out all that stands below"
    ]
    text = "extends: a.yaml\nmethod: !replace\n  kind: sd\n  teacher: t\n"
    assert load(Recipe, write(tmp_path, text)).method == SelfDistillation("sd", Path("t"))


def test_refuses_circles_and_missing_files(tmp_path: Path) -> None:
    write(tmp_path, "extends: recipe.yaml\n", "a.yaml")
    (found,) = faults(tmp_path, "extends: a.yaml\n")
    assert found == "a.yaml:1: extends: goes in a circle: recipe.yaml -> a.yaml -> recipe.yaml"
    (found,) = faults(tmp_path, "steps: 1\nextends: b.yaml\n")
    assert found == "recipe.yaml:2: extends: b.yaml: cannot be read: No such file or directory"
    (found,) = faults(tmp_path, "extends: [a.yaml]\n")
    assert found == "recipe.yaml:1: extends: given a list; accepted: a file, relative to this one"


def test_a_mapping_of_python_may_hold_exponents_as_yaml_1_1_reads_them() -> None:
    base = yaml.safe_load("{data: {prompts: a}, optimizer: {lr: 1e-4}, name: 1e-4}")
    assert base["optimizer"]["lr"] == "1e-4"
    config = load(Recipe, None, base=base)
    assert (config.optimizer.lr, config.name) == (1e-4, "1e-4")
    with pytest.raises(ConfigurationError, match=r"base: optimizer\.lr: given '0\.1' \(str\); accepted: float"):
        load(Recipe, None, base={"data": {"prompts": "a"}, "optimizer": {"lr": "0.1"}})


# Schemas that cannot be read


@dataclass(frozen=True)
class _Untagged:
    a: Union[Adam, Lora] = Adam()  # noqa: UP007


@dataclass(frozen=True)
class _Ambiguous:
    a: str | Path = ""


@dataclass(frozen=True)
class _Anything:
    a: Any = None


@dataclass(frozen=True)
class _Taken:
    extends: str = ""


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (_Untagged, "_Untagged.a: Adam, Lora in a union needs a field kind"),
        (_Ambiguous, "_Ambiguous.a: str and Path look the same"),
        (_Anything, "_Anything.a: typing.Any cannot be configured"),
        (_Taken, "_Taken.extends: the name is taken"),
        (dict, "a schema is a dataclass"),
    ],
)
def test_a_schema_that_cannot_be_read_is_a_type_error(schema: type, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        load(schema, None)


# Dumps


AWKWARD = [
    "1e5",
    "no",
    "null",
    "0o7",
    "1:30",
    "~",
    "<<",
    "=",
    "1_0",
    ".nan",
    "- a",
    "a: b",
    "#",
    "\n",
    "\x85",
    "\u2028",
    "",
]


def recipes() -> st.SearchStrategy[Recipe]:
    text, numbers = st.text(max_size=12), st.floats(allow_nan=False)
    awkward = st.sampled_from(AWKWARD)
    words = text | awkward
    paths = words.filter(bool).map(Path)
    counts = st.integers(-(2**70), 2**70)
    adam = st.builds(Adam, lr=numbers, betas=st.tuples(numbers, numbers), clip=st.none() | numbers)
    stage = st.builds(Stage, steps=counts, optimizer=adam)
    modes = st.sampled_from(["recompute", "retain"])
    return st.builds(
        Recipe,
        data=st.builds(
            Data, paths, st.booleans(), st.dictionaries(words.filter(lambda w: w != "<<"), numbers, max_size=3)
        ),
        method=st.builds(Distribution, st.just("dmd"), numbers, st.sampled_from(["always", "last"]), modes)
        | st.builds(SelfDistillation, st.just("sd"), paths, modes),
        name=words,
        steps=counts,
        optimizer=adam.filter(lambda a: a.lr >= 1e-6),
        lora=st.none() | st.builds(Lora, counts, st.lists(words, max_size=3).map(tuple)),
        stages=st.lists(stage, max_size=2),
        named=st.dictionaries(words.filter(lambda w: w != "<<"), stage, max_size=2),
        precision=st.sampled_from(["bf16", "fp32", 8, None]),
        limit=st.none() | counts | words,
    )


@settings(max_examples=150, deadline=None)
@given(config=recipes())
def test_a_dump_is_the_configuration(tmp_path_factory: pytest.TempPathFactory, config: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "dump.yaml"
    dump(config, path)
    assert load(Recipe, path) == config
    assert yaml.safe_load(path.read_text("utf-8")) == resolved(config)  # to other readers of YAML it says the same
    assert load(Recipe, None, base=json.loads(json.dumps(resolved(config)))) == config


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_text_that_looks_like_something_else_stays_text(tmp_path: Path, text: str) -> None:
    config = Recipe(Data(Path("a"), weights={text: 1.0} if text != "<<" else {}), name=text)
    dump(config, tmp_path / "dump.yaml")
    assert load(Recipe, tmp_path / "dump.yaml") == config
    assert yaml.safe_load((tmp_path / "dump.yaml").read_text("utf-8")) == resolved(config)


def test_resolved_is_complete() -> None:
    assert resolved(Recipe(Data(Path("a")))) == {
        "data": {"prompts": "a", "shuffle": True, "weights": {}},
        "method": {"kind": "dmd", "inherit": 0.5, "sync": "always", "mode": "recompute"},
        "name": "run",
        "steps": 100,
        "optimizer": {"lr": 2e-6, "betas": [0.0, 0.999], "clip": None},
        "lora": None,
        "stages": [],
        "named": {},
        "precision": "bf16",
        "limit": None,
    }


# What is written about a run


def test_the_reference_table_has_every_key() -> None:
    lines = describe(Recipe).splitlines()
    cells = {line[2:].split(" | ")[0].strip(): re.split(r" (?<!\\)\| ?", line) for line in lines[2:]}
    assert "method.inherit (kind dmd)" in cells and "method.teacher (kind sd)" in cells
    assert "stages[].optimizer.lr" in cells and "named.<name>.steps" in cells

    def stripped(key: str) -> list[str]:
        return [cell.strip() for cell in cells[key][1:4]]

    assert stripped("optimizer.lr") == ["float", "2e-06", "step size"]
    assert stripped("stages[].optimizer.lr") == ["float", "1e-05", "step size"]
    assert stripped("data.prompts")[:2] == ["path", "required"]
    assert stripped("method")[:2] == ["a mapping of kind 'dmd' or 'sd'", "kind dmd"]
    assert stripped("lora")[:2] == ["a mapping or null", "null"]
    assert len({len(line) for line in lines}) == 1  # aligned
    assert "called \\| shown" in describe(Recipe)
    known = {key.split(" (kind")[0] for key in cells}
    assert {f"{a}.{b}" for a, x in resolved(Recipe(Data(Path("a")))).items() if isinstance(x, dict) for b in x} <= known


def test_the_environment_is_told_with_and_without_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    told = environment()
    assert told["torch"] == torch.__version__ and told["python"] == sys.version.split()[0]
    assert told["git"] is None and told["twostep_git"] is not None  # the tests run from a checkout
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "--allow-empty", "-m", "x"]):
        (tmp_path / "f").write_text("1")
        subprocess.run(["git", *words], check=True)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    assert environment()["git"] == {"commit": commit, "dirty": False}
    (tmp_path / "f").write_text("2")
    assert environment()["git"] == {"commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", os.devnull)
    assert environment()["git"] is environment()["twostep_git"] is None
    json.dumps(environment())
