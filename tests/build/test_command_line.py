"""The command line knows its commands, imports only the chosen one, and reports mistakes as argparse does."""

from __future__ import annotations

import subprocess
import sys

import pytest

from twostep import __version__, cli


def test_unknown_commands_and_no_command_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["no-such-command"], []):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
    assert "invalid choice: 'no-such-command'" in capsys.readouterr().err


def test_help_and_version_list_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in ((["--help"], "doctor"), (["--version"], __version__), (["doctor", "-h"], "--json")):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
        assert expected in capsys.readouterr().out


def test_a_command_whose_module_is_not_installed_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "absent", ("twostep.no_such_module", "is not here"))
    with pytest.raises(SystemExit):
        cli.main(["absent"])


def test_importing_twostep_and_asking_for_help_imports_no_torch() -> None:
    code = "import sys, twostep.cli; twostep.cli.make_parser(None).format_help(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
