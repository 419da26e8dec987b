"""`twostep bench` says what is wrong with its arguments, and has made nothing by then."""

from __future__ import annotations

from pathlib import Path

import pytest

from twostep.cli import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "--seconds", "0"], "--seconds is 0.0, expected a number above 0"),
        (["bench", "--ops", "rop"], "'rop' is not one of norm_modulate"),
        (["bench", "--dtypes", "float8"], "'float8' is not one of float32, bfloat16, float16"),
        (["bench", "--threads", "0"], "--threads is 0, expected at least 1"),
        (["bench", "unroll", "--repetitions", "0"], "--repetitions is 0, expected at least 1"),
        (["bench", "unroll", "--depths", "0"], "--depths has 0, expected at least 1"),
        (["bench", "unroll", "--shape", "2x64x200"], "--shape is 2x64x200, and its width must be a multiple of 64"),
        (["bench", "launch", "--threads", "-1"], "--threads is -1, expected at least 1"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_a_mistake_leaves_no_folder(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--out", str(tmp_path / "results")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
