"""The command as people meet it; a small program of our own joins through a real entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from fedtt.cli import main

COMMANDS = (
    *("export", "serve", "demo", "evaluate", "predict", "client run", "client forget", "device list"),
    *("version list", "version download", "task create", "task list", "task show", "task pause"),
    *("task resume", "task stop", "token create", "token revoke"),
)

_PROGRAM = '''
import os, sys
from fedtt.cli import add_command, add_group, print_json
from fedtt.errors import ConfigError, FedttError

def _say(args):
    print_json({"word": args.word}) if args.json else print(args.word)
    return args.status

def _fail(args):
    raise ConfigError("port", 99999, "a number from 0 to 65535")

def _quote(args):
    raise FedttError(args.word)

def _open(args):
    open(args.word)

def _stop(args):
    raise KeyboardInterrupt

def _lack(args):
    import no_such_library

def _pour(args):
    for n in range(100_000):
        print(n, flush=True)

def register(commands):
    group = add_group(commands, "parrot", about="repeat what is said", examples="fedtt parrot say hello")
    say = add_command(group, "say", about="say a word", run=_say, examples="""
        fedtt parrot say hello
        fedtt parrot say hello --json
    """)
    say.add_argument("word")
    say.add_argument("--status", type=int)
    for name, run in {"quote": _quote, "open": _open}.items():
        foreign = add_command(group, name, about=name, run=run, examples=f"fedtt parrot {name} WORD")
        foreign.add_argument("word")
    for name, run in {"fail": _fail, "stop": _stop, "pour": _pour, "lack": _lack}.items():
        add_command(group, name, about=name, run=run, examples=f"fedtt parrot {name}")
'''


@pytest.fixture
def parrot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that holds an installed program `parrot`, and `ghost`, whose package is not there."""
    (tmp_path / "parrot_program.py").write_text(_PROGRAM)
    (tmp_path / "ghost_program.py").write_text("import a_package_that_is_not_there\n")
    info = tmp_path / "parrot-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: parrot\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fedtt.commands]\nparrot = parrot_program:register\nghost = ghost_program:register\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "parrot_program", raising=False)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What `fedtt ARGV…` prints where argparse itself ends the program with status 0."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_shows_how_to_call_it(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, *command.split(), "--help")
    assert f"  fedtt {command}" in text.partition("examples:\n")[2]
    assert "--json" in text


def test_the_help_of_the_whole_lists_the_programs_and_begins_somewhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed(capsys, "--help")
    assert "examples:\n  fedtt demo\n" in text
    assert all(f"    {command.split()[0]} " in text for command in COMMANDS)


def test_the_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version") == f"fedtt {version('fedtt')}\n"


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedtt", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"fedtt {version('fedtt')}\n"


@pytest.mark.usefixtures("parrot")
def test_people_get_text_machines_get_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parrot", "say", "hello"]) == 0
    assert capsys.readouterr().out == "hello\n"
    assert main(["parrot", "say", "hello", "--json", "--status", "3"]) == 3
    out = capsys.readouterr().out
    assert out.endswith("\n")
    assert json.loads(out) == {"word": "hello"}


@pytest.mark.usefixtures("parrot")
def test_the_examples_of_a_command_stand_below_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "parrot", "say", "--help")
    assert text.endswith("examples:\n  fedtt parrot say hello\n  fedtt parrot say hello --json\n")
    assert "Say a word." in text


@pytest.mark.usefixtures("parrot")
def test_an_error_is_one_line_on_stderr_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parrot", "fail"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "fedtt: error: port = 99999 is not allowed: a number from 0 to 65535\n"


@pytest.mark.usefixtures("parrot")
@pytest.mark.parametrize("command", ["quote", "open"])
def test_what_others_wrote_of_an_error_moves_no_cursor_and_begins_no_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parrot", command, "\x1b[2Jno\nfedtt: all is well\x9b\u202e ε"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(r"fedtt: error: \x1b[2Jno\nfedtt: all is well\x9b\u202e ε")
    assert line[:-1].isprintable()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_word_is_printed_on_an_output_of_any_encoding(parrot: Path, encoding: str) -> None:
    word = "é ε … \U0001f600"
    command = [sys.executable, "-m", "fedtt", "parrot", "say", word]
    root = Path(__file__).parents[3]
    environment = {"PYTHONPATH": str(parrot), "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    for_people, for_machines = (
        subprocess.run([*command, *options], capture_output=True, check=False, env=environment, cwd=root)
        for options in ([], ["--json"])
    )
    assert (for_people.returncode, for_machines.returncode) == (0, 0)
    assert (for_people.stderr, for_machines.stderr) == (b"", b"")
    assert for_people.stdout == f"{word}\n".encode(encoding, "backslashreplace")
    assert json.loads(for_machines.stdout) == {"word": word}
    assert for_machines.stdout.count(b"\n") == 1


@pytest.mark.usefixtures("parrot")
def test_an_interrupt_is_status_130_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parrot", "stop"]) == 130
    assert capsys.readouterr().err == "fedtt: stopped\n"


def test_a_reader_who_leaves_early_is_no_error(parrot: Path) -> None:
    command = f"{sys.executable} -m fedtt parrot pour | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["/bin/bash", "-c", command],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(parrot)},
        cwd=Path(__file__).parents[3],
    )
    assert done.stdout == "0\n0\n"
    assert done.stderr == ""


def test_a_full_disk_behind_the_output_is_one_line(parrot: Path) -> None:
    done = subprocess.run(
        ["/bin/bash", "-c", f"{sys.executable} -m fedtt parrot say hello > /dev/full"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(parrot)},
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 2
    assert done.stderr == "fedtt: error: reading or writing failed: No space left on device\n"


@pytest.mark.usefixtures("parrot")
def test_a_command_without_its_library_names_it_and_the_extra(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["parrot", "lack"]) == 2
    expected = "fedtt: error: this command needs no_such_library: pip install 'fedtt[parrot]'\n"
    assert capsys.readouterr().err == expected


@pytest.mark.usefixtures("parrot")
def test_a_program_whose_extra_is_missing_stays_visible_and_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "not installed (pip install 'fedtt[ghost]')" in printed(capsys, "--help")
    assert main(["ghost"]) == 2
    assert capsys.readouterr().err == (
        "fedtt: error: 'fedtt ghost' needs the package a_package_that_is_not_there: "
        "pip install 'fedtt[ghost]'\n"
    )


def test_a_mistake_of_the_caller_reaches_the_terminal_as_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTT_ADMIN_TOKEN", "not asked for before the file is read")
    task = tmp_path / "task.toml"
    task.write_text('name = "t"\n[rounds]\ncount = 0\ncohort = 1\n')
    assert main(["task", "create", str(task), "--bundle", str(tmp_path)]) == 2
    expected = f"fedtt: error: {task}: rounds.count = 0 is not allowed: Expected `int` >= 1\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["task"], ["task", "create"]])
def test_a_call_that_cannot_be_understood_shows_the_usage(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: fedtt")
