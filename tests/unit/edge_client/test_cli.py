"""The commands as a person meets them: what they print, and their status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from edge_client.executorch_runtime import LIBRARY_VARIABLE
from edge_client.home import Home
from edge_client.journal import Journal, read_state
from edge_client.preparation import prepare
from fedtt.cli import main
from fedtt.errors import RuntimeFailure

HEAVY = ("onnxruntime", "aiohttp", "tokenizers", "cryptography", "safetensors", "torch", "transformers")


def fedtt(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "lights on", "label": "on"}\n{"text": "lights off", "label": "off"}\n')
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, which is all there is of an error."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def test_importing_the_commands_imports_nothing_heavy() -> None:
    code = f"import sys, edge_client, edge_client.cli; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_device_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, edge_client.session, edge_client.inference, edge_client.client_commands, onnxruntime;"
    code += "print([m for m in ('torch', 'transformers', 'onnx', 'sqlalchemy') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_what_a_device_imports_is_declared_in_its_extra() -> None:
    root = Path(__file__).parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["edge"]
    known = {re.split(r"[<>=]", line)[0] for line in declared} | {"edge_client", "fedtt"}
    code = "\n".join(path.read_text() for path in (root / "edge_client").glob("*.py"))
    imported = set(re.findall(r"^ *(?:from|import) (\w+)", code, re.MULTILINE))
    assert imported - known - sys.stdlib_module_names == set()


@pytest.mark.parametrize(
    "command",
    [["client", c] for c in ("run", "add", "status", "pause", "resume", "leave", "forget")]
    + [["predict"], ["evaluate"]],
)
def test_every_command_shows_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert f"examples:\n  fedtt {' '.join(command)}" in capsys.readouterr().out


def test_examples_are_added_and_counted(home: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fedtt("client", "add", "--home", home, "--text", "wake me", "--label", "on") == 0
    assert fedtt("client", "add", "--home", home, "--data", rows) == 0
    assert fedtt("client", "add", "--home", home, "--data", rows, "--json") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["1 examples are kept", "3 examples are kept"]
    assert json.loads(out[2]) == {"examples": 3}


def test_status_says_what_the_device_keeps(
    home: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fedtt("client", "add", "--home", home, "--data", rows)
    fedtt("client", "pause", "--home", home)
    capsys.readouterr()
    assert fedtt("client", "status", "--home", home, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["examples"], found["paused"], found["running"], found["enrolled"]) == (
        2,
        True,
        False,
        False,
    )
    fedtt("client", "resume", "--home", home)
    capsys.readouterr()
    assert fedtt("client", "status", "--home", home) == 0
    assert "paused          False" in capsys.readouterr().out


def test_status_is_there_while_a_download_gives_its_file_the_name(home: Path) -> None:
    part, whole, ended = home / "bundles" / "base.bin.part", home / "bundles" / "base.bin", threading.Event()
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x")

    def publish() -> None:
        while not ended.is_set():
            part.rename(whole)
            whole.rename(part)

    publishing = threading.Thread(target=publish)
    publishing.start()
    try:
        assert [fedtt("client", "status", "--home", home) for _ in range(100)] == [0] * 100
    finally:
        ended.set()
        publishing.join()


def test_taking_part_needs_a_yes_where_nobody_can_be_asked(
    home: Path, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDTT_CONSENT", raising=False)
    run = ("client", "run", "--home", home, "--server", "http://127.0.0.1:9", "--token", "t", "--data", rows)
    assert fedtt(*run) == 2
    err = capsys.readouterr().err
    assert "on your 2 examples" in err
    assert "Never sent: your texts and their labels." in err
    assert err.splitlines()[-1].startswith(
        "fedtt: error: consent = 'unasked' is not allowed: agree with --yes"
    )
    assert not (home / "identity.key").exists(), "no key is made before the owner agrees"


def test_an_unencrypted_address_is_pointed_out(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDTT_CONSENT", raising=False)
    fedtt("client", "run", "--home", home, "--server", "http://models.example", "--token", "t")
    assert "http:// is not encrypted" in capsys.readouterr().err
    fedtt("client", "run", "--home", home, "--server", "https://models.example", "--token", "t")
    assert "not encrypted" not in capsys.readouterr().err


def test_consent_may_be_given_in_the_environment_and_an_unreachable_server_is_one_line(
    home: Path, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTT_CONSENT", "yes")
    run = (
        "client",
        "run",
        "--home",
        home,
        "--server",
        "http://127.0.0.1:9",
        "--token",
        "t",
        "--once",
        "--json",
    )
    assert fedtt(*run) == 2
    retrying, ended = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (retrying["event"], ended["event"]) == ("retrying", "ended")
    assert "Connection refused" in retrying["error"]


@pytest.fixture
def enrolled(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that belongs to http://127.0.0.1:9, with its owner's consent."""
    monkeypatch.delenv("FEDTT_CONSENT", raising=False)
    device = Journal(Home(home))
    device.update(server="http://127.0.0.1:9", device="0" * 32, enrolled=True, consented_at=1.0)
    return home


def test_another_server_is_asked_about_by_name_and_refused_without_a_yes(
    enrolled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("client", "run", "--home", enrolled, "--once", "--server", "http://127.0.0.1:7")
    assert fedtt(*run) == 2
    err = capsys.readouterr().err
    assert "belongs to http://127.0.0.1:9 and is to go over to http://127.0.0.1:7" in err
    assert "Sent to http://127.0.0.1:7: how that part changed" in err
    assert "agree with --yes" in err.splitlines()[-1]
    state = read_state(Home(enrolled))
    assert state is not None
    assert (state.server, state.enrolled) == ("http://127.0.0.1:9", True)


def test_with_a_yes_the_device_goes_to_the_other_server_and_stays_there(
    enrolled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("client", "run", "--home", enrolled, "--once")
    assert fedtt(*run, "--server", "http://127.0.0.1:7", "--yes") == 2
    assert "http://127.0.0.1:7 did not answer" in capsys.readouterr().out
    assert fedtt(*run) == 2
    out, err = capsys.readouterr()
    assert "http://127.0.0.1:7 did not answer" in out
    assert err == "", "the same address is not asked about again"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "--server = None is not allowed: the address of the aggregator, for the first run"),
        (["run", "--server", "ftp://x", "--yes"], "server = 'ftp://x' is not allowed: an address like https"),
        (["run", "--server", "http://[x"], "server = 'http://[x' is not allowed: an address like https"),
        (["run", "--server", "http://h:abc"], "server = 'http://h:abc' is not allowed: an address like"),
        (["run", "--server", "http://h:99999999"], "'http://h:99999999' is not allowed: an address like"),
        (["run", "--server", "http://a..b", "--yes"], "server = 'http://a..b' is not allowed: an address"),
        (["run", "--server", "http://127.0.0.1:9", "--yes"], "token = '' is not allowed: an enrolment token"),
        (
            ["run", "--server", "http://127.0.0.1:9", "--yes", "--cache-limit-mb", "0"],
            "cache_limit_bytes = 0 is not allowed: 1 or more; --cache-limit-mb counts in MiB",
        ),
        (["run", "--server", "http://127.0.0.1:9", "--threads", "0"], "threads = 0 is not allowed: 1..1024"),
        (["run", "--server", "http://127.0.0.1:9", "--data", "none.csv"], "none.csv cannot be read"),
        (["add", "--data", "none.csv"], "none.csv cannot be read (No such file or directory)"),
        (["add", "--text", " "], "an example needs a text that is not empty"),
        (["add", "--data", "none.csv", "--label", "on"], "--label = 'on' is not allowed: goes with --text"),
        (["add", "--data", "x.csv", "--text-pair", "on"], "--text-pair = 'on' is not allowed: goes with"),
        (["status"], "does not exist: name the device's directory with --home"),
        (["pause"], "does not exist"),
        (["leave"], "does not exist"),
        (["forget"], "does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    home: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedtt("client", *arguments, "--home", home) == 2
    line = error_of(capsys)
    assert line.startswith("fedtt: error: ")
    assert message in line


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (
            None,
            "the ExecuTorch library is not here (none.so): install the fedtt-executorch wheel, or build it",
        ),
        (b"no library", "is not an ExecuTorch library of fedtt"),
    ],
    ids=["missing", "another"],
)
def test_a_client_without_its_library_says_so_before_it_asks_for_anything(
    home: Path,
    tmp_path: Path,
    library: bytes | None,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "none.so"
    if library is not None:
        path.write_bytes(library)
    monkeypatch.setenv(LIBRARY_VARIABLE, str(path))
    run = ("client", "run", "--home", home, "--server", "http://127.0.0.1:9", "--token", "t", "--yes")
    assert fedtt(*run, "--runtime", "executorch") == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("fedtt: error: ")
    assert message in err
    assert not home.exists()
    with pytest.raises(RuntimeFailure, match=re.escape(message)):
        prepare("executorch")


def test_nor_does_one_without_onnx_runtime(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # which Python takes for a module that is not there
    run = ("client", "run", "--home", home, "--server", "http://127.0.0.1:9", "--token", "t", "--yes")
    assert fedtt(*run) == 2
    assert error_of(capsys) == "fedtt: error: onnxruntime is not installed: pip install 'fedtt[edge]'"
    assert not home.exists()
    with pytest.raises(RuntimeFailure, match=r"onnxruntime cannot be loaded .* pip install"):
        prepare()


def test_a_paused_device_does_not_run_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.mkdir()
    fedtt("client", "pause", "--home", home)
    assert fedtt("client", "run", "--home", home, "--server", "http://127.0.0.1:9", "--yes", "--once") == 2
    assert "is paused by its owner: fedtt client resume" in error_of(capsys)


def test_leaving_before_enrolling_is_no_error(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.mkdir()
    assert fedtt("client", "leave", "--home", home) == 0
    assert "was not enrolled" in capsys.readouterr().out
    assert list(home.iterdir()) == [], "nothing that would make it a device's directory"


def test_forgetting_a_device_that_never_enrolled_asks_no_server(
    home: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fedtt("client", "add", "--home", home, "--data", rows)
    assert fedtt("client", "forget", "--home", home) == 0
    assert not home.exists()


def test_forgetting_another_directory_is_one_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "versions").mkdir(parents=True)
    assert fedtt("client", "forget", "--home", home) == 2
    assert "is no device's directory" in error_of(capsys)
    assert [path.name for path in home.iterdir()] == ["versions"]


def test_a_directory_that_is_no_version_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedtt("predict", tmp_path, "hello") == 2
    assert "is not a version: it has no config.json" in error_of(capsys)
    assert fedtt("evaluate", tmp_path, tmp_path / "none.csv") == 2
    assert "none.csv cannot be read" in error_of(capsys)


def test_the_public_names_are_sorted_and_all_there() -> None:
    import edge_client

    assert edge_client.__all__ == sorted(edge_client.__all__)
    for name in edge_client.__all__:
        assert getattr(edge_client, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = edge_client.nothing
