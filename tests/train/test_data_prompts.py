"""The same prompts come out of every kind of file, and a file that is not right says where."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twostep.train.data import Prompts, read_prompts

PROMPTS = ["a red circle", "two lines\u2028in one prompt", "造像 café", "x" * 500, "a red circle", '"quoted", {braces}']


def write_text(path: Path, prompts: list[str]) -> Path:
    path.write_bytes("\r\n \n".join(prompts).encode())
    return path


def write_json_lines(path: Path, prompts: list[str]) -> Path:
    path.write_text("\n\n".join(json.dumps({"caption": p, "id": 1}, ensure_ascii=False) for p in prompts), "utf-8")
    return path


def write_parquet(path: Path, prompts: list[str]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files are read by pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": list(range(len(prompts))), "text": prompts})
    parquet.write_table(table, path, row_group_size=2)
    return path


def write_dataset(path: Path, prompts: list[str]) -> Path:
    datasets = pytest.importorskip("datasets", reason="a dataset's folder is read by datasets")
    datasets.Dataset.from_dict({"id": list(range(len(prompts))), "prompt": prompts}).save_to_disk(path)
    return path


KINDS: dict[str, Callable[[Path, list[str]], Path]] = {
    "p.txt": write_text,
    "p.jsonl": write_json_lines,
    "p.parquet": write_parquet,
    "folder": write_dataset,
}


@pytest.mark.parametrize("kind", KINDS)
def test_reads_prompts_by_number(kind: str, tmp_path: Path) -> None:
    prompts = read_prompts(KINDS[kind](tmp_path / kind, PROMPTS))
    assert isinstance(prompts, Prompts) and len(prompts) == 6
    assert list(prompts) == PROMPTS and prompts[:] == PROMPTS
    assert [prompts[i] for i in range(-6, 6)] == PROMPTS * 2
    assert prompts[4:1:-2] == PROMPTS[4:1:-2] and prompts[6:] == [] and prompts[[]] == []
    assert prompts[[5, 0, 0, -1]] == [PROMPTS[5], PROMPTS[0], PROMPTS[0], PROMPTS[5]]
    assert PROMPTS[2] in prompts and "no" not in prompts
    for wrong in (6, -7):
        with pytest.raises(IndexError, match=f"number {wrong} was asked for, and .* has 6"):
            prompts[wrong]
    with pytest.raises(TypeError, match="expected an int, a slice or a list"):
        prompts[1.0]  # type: ignore[call-overload]


def test_the_fingerprint_is_of_the_prompts_not_of_the_file(tmp_path: Path) -> None:
    whole = {read_prompts(write(tmp_path / kind, PROMPTS)).fingerprint for kind, write in KINDS.items()}
    assert len(whole) == 1
    others = [PROMPTS[::-1], PROMPTS[:-1], [*PROMPTS[:-1], PROMPTS[-1] + "."], ["".join(PROMPTS)]]
    found = {read_prompts(write_text(tmp_path / f"{i}.txt", other)).fingerprint for i, other in enumerate(others)}
    assert len(found | whole) == 5


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_any_text_survives_json_lines(prompts: list[str], tmp_path: Path) -> None:
    assert list(read_prompts(write_json_lines(tmp_path / "p.jsonl", prompts))) == prompts


def test_names_the_line_that_is_wrong(tmp_path: Path) -> None:
    def failing(name: str, content: bytes, **settings: Any) -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"^prompts: ") as caught:
            read_prompts(tmp_path / name, **settings)
        return str(caught.value)

    assert "line 3 is not UTF-8 (byte 4 of the line is 0xe9)" in failing("a.txt", "one\n\ncaf\xe9".encode("latin-1"))
    assert "line 2 is not JSON" in failing("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n')
    assert "line 1 is list, expected an object" in failing("a.jsonl", b'["a"]')
    assert "line 1: 'prompt' holds half of a surrogate" in failing("a.jsonl", b'{"prompt": "a \\ud800 ring"}')
    assert "line 2: 'prompt' is int, expected a str" in failing("a.jsonl", b'{"prompt": "a"}\n{"prompt": 3}')
    missing = failing("a.jsonl", b'{"prompt": "a"}\n\n{"text": "a", "id": 1}')
    assert "line 3 has no 'prompt'; there are 'text', 'id'" in missing
    unnamed = failing("a.jsonl", b'{"words": "a"}')
    assert "line 1 has no 'prompt' or 'caption' or 'text'; there are 'words': name one (data.column" in unnamed
    assert "has no 'b'; there are 'prompt'" in failing("a.jsonl", b'{"prompt": "a"}', column="b")
    for empty in ("e.txt", "e.jsonl"):
        assert "has no prompts in it" in failing(empty, b"\n  \n")
    assert "column 'x' was given, and" in failing("c.txt", b"a", column="x")
    assert "is a .csv, expected .txt, .jsonl, .parquet" in failing("p.csv", b"a")
    with pytest.raises(ValueError, match="does not exist; give a"):
        read_prompts(tmp_path / "nowhere.txt")


def test_takes_prompt_before_caption_before_text_unless_told(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('\ufeff{"text": "t", "caption": "c", "prompt": "", "words": "w"}', "utf-8")
    assert list(read_prompts(tmp_path / "p.jsonl")) == [""]  # the unconditional prompt is one, in JSON
    assert list(read_prompts(tmp_path / "p.jsonl", column="words")) == ["w"]


def test_parquet_says_what_is_wrong(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files are read by pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"prompt": [1, 2], "words": ["a", None], "other": ["c", "d"]})
    parquet.write_table(table, tmp_path / "p.parquet")
    assert list(read_prompts(tmp_path / "p.parquet", column="other")) == ["c", "d"]
    for column, message in (
        (None, "the column 'prompt' of .* is int64, expected strings"),
        ("words", r"row 1 of .* has no 'words' \(null\)"),
        ("no", "has no 'no'; there are 'prompt', 'words', 'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / "p.parquet", column=column)
    (tmp_path / "half.parquet").write_bytes((tmp_path / "p.parquet").read_bytes()[:-40])
    with pytest.raises(ValueError, match="is not a whole parquet file"):
        read_prompts(tmp_path / "half.parquet")
    parquet.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="has no prompts in it"):
        read_prompts(tmp_path / "empty.parquet", column="other")


def test_a_datasets_folder_says_what_is_wrong(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="a dataset's folder is read by datasets")
    data = datasets.Dataset.from_dict({"prompt": [1, 2], "words": ["a", None], "other": ["c", "d"]})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "two")
    data.select([1, 0]).save_to_disk(tmp_path / "turned")  # an indices mapping
    assert list(read_prompts(tmp_path / "two" / "train", column="other")) == ["c", "d"]
    assert list(read_prompts(tmp_path / "turned", column="other")) == ["d", "c"]
    (tmp_path / "plain").mkdir()
    for folder, column, message in (
        ("two", None, "holds the splits test, train; give one, such as .*test"),
        ("one", None, "the column 'prompt' of .* is int64, expected strings"),
        ("one", "words", r"row 1 of .* has no 'words' \(null\)"),
        ("one", "no", "has no 'no'; there are 'prompt', 'words', 'other'"),
        ("plain", None, "has no state.json"),
    ):
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / folder, column=column)


@pytest.mark.parametrize(("kind", "module"), [("p.parquet", "pyarrow"), ("folder", "datasets")])
def test_says_what_to_install(kind: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = KINDS[kind](tmp_path / kind, PROMPTS)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"needs {module} to be read; install it: pip install {module}"):
        read_prompts(path)
