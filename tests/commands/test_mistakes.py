"""What users get wrong, over all commands: one line, never "a bug", and JSON with ``--json``."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_results import result_of, row_of
from installed import distribution, provider

from dsv4_backends import __main__ as entry
from dsv4_backends import records
from dsv4_backends.bench import run as runner
from dsv4_backends.commands import cli, render, shared
from dsv4_backends.commands import doctor as doctor_command
from dsv4_backends.contract import CONTRACTS
from dsv4_backends.testing import checks
from dsv4_backends.testing import verify as verifying

OP = "hc_prenorm_gemm"
CALLING = {
    "verify": ["verify", "--op", OP],
    "warmup": ["warmup", "--model", "flash", "--op", OP],
    "bench": ["bench", "--op", OP, "--model", "flash"],
}
"""The commands that call ops, as they are typed."""
EVERY = {
    "list": ["list"],
    "explain": ["explain", OP],
    "plugins": ["plugins"],
    "doctor": ["doctor"],
    "check": ["check", "--model", "flash"],
    "engine": ["engine", "vllm"],
    **CALLING,
    "bench compare": ["bench", "compare", "a.json", "a.json"],
    "tune": ["tune", "a.json"],
}
GPUS = torch.cuda.device_count()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    records.write(result_of(row_of("mqa_logits", "one", a=10.0)), tmp_path / "a.json")
    (tmp_path / "folder").mkdir()
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], *words: str, code: int = cli.USAGE) -> None:
    assert cli.main(argv) == code
    captured = capsys.readouterr()
    assert "bug" not in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.startswith("dsv4-backends: ")
    for word in words:
        assert word in captured.err


DEVICES = ["banana", "mps", "meta", "", f"cuda:{GPUS + 98}", *(["cuda"] if not GPUS else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("command", CALLING)
def test_a_torch_device_that_is_not_here(command: str, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, [*CALLING[command], "--torch-device", device], "device: ", device)


@pytest.mark.parametrize("command", ["list", "explain", "doctor", "check", "engine"])
def test_an_empty_device(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, [*EVERY[command], "--device", ""], "expected cpu or a GPU such as sm_86 or 8.6, got ''")


@pytest.mark.parametrize(
    ("command", "flag"), [("check", "--tp"), ("check", "--next-n"), ("bench", "--tp"), ("warmup", "--max-tokens")]
)
def test_a_number_that_is_none(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*EVERY[command], flag, "two"])
    assert caught.value.code == cli.USAGE
    assert f"argument {flag}: expected a whole number, got 'two'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "warmup", "bench"])
def test_a_model_without_a_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, [command, "--model", ""], "model: expected a path, got ''")


@pytest.mark.parametrize("argv", [["bench", "compare", "b.json", "a.json"], ["tune", "b.json"]])
@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"])
def test_a_result_that_is_no_json(
    argv: list[str], content: bytes, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "b.json").write_bytes(content)
    refused(capsys, argv, "b.json: expected JSON in UTF-8, got something else: ")


TOO_LONG = "x" * 300 + ".svg"


@pytest.mark.parametrize("file", ["nowhere/result.svg", "folder", "", "a.json/b.svg", TOO_LONG, "/proc/x.svg"])
@pytest.mark.parametrize(
    ("before", "option"),
    [(CALLING["bench"], "--json"), (CALLING["bench"], "--plot"), (["tune", "a.json"], "--output")],
    ids=["json", "plot", "output"],
)
def test_a_file_that_cannot_be_written_is_said_first(
    before: list[str], option: str, file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(runner, "bench", lambda *_: pytest.fail("measured first"))
    refused(capsys, [*before, option, file], f"got {file!r}" if file in ("", "folder") else "svg")
    assert sorted(os.listdir()) == ["a.json", "folder"]


@pytest.mark.parametrize("argv", [["bench", "--plot", "plot.bmp"], ["bench", "plot", "a.json", "plot.bmp"]])
def test_a_plot_that_nothing_draws(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "bench", lambda *_: pytest.fail("measured first"))
    refused(capsys, argv, "plot: expected a file that ends with .svg, .png, .pdf, got 'plot.bmp'")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(capsys, [*argv[:-1], "plot.svg"], "needs matplotlib")


def test_what_is_there_stays_until_it_is_replaced(folder: Path) -> None:
    kept = folder / "kept.json"
    kept.write_text("before")
    kept.chmod(0o640)
    shared.require_writable("--json", str(kept))
    assert kept.read_text() == "before"
    shared.write("--json", str(kept), "after")
    assert kept.read_text() == "after"
    assert kept.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "folder", "kept.json"]


@pytest.mark.parametrize("argv", [["bench", "compare", "b.json", "b.json"], ["bench", "plot", "b.json", "b.svg"]])
@pytest.mark.parametrize("lost", ["rates", "rows", "device"])
def test_a_result_that_lacks_something(
    argv: list[str], lost: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    result = json.loads((folder / "a.json").read_text())
    (folder / "b.json").write_text(json.dumps({**result, lost: {} if lost != "rows" else [{"op": 1}]}))
    refused(capsys, argv, "b.json: expected what dsv4-backends bench --json writes")
    (folder / "b.json").write_text("[" * 200_000)
    refused(capsys, argv, "b.json: ")


# ------------------------------------------------------------------------------------------------------- --json

REFUSED = [
    (["list", "--device", "banana"], 2, "PolicyError"),
    (["explain", OP, "--device", ""], 2, "PolicyError"),
    (["check", "--model", "nobody.json"], 2, "PolicyError"),
    (["check", "--model", "flash", "--tp", "3"], 2, "PolicyError"),
    (["check", "--model", "flash", "--tp", "0"], 2, "UsageError"),
    (["warmup", "--model", "flash", "--tp", "3"], 2, "PolicyError"),
    (["engine", "nonesuch"], 2, "UsageError"),
    (["verify", "--provider", "nobody"], 2, "PolicyError"),
    (["verify", "--provider", "deep_gemm", "--op", "sparse_mla_decode"], 1, "NoProviderError"),
    (["bench", "--model", "nobody.json"], 2, "PolicyError"),
    (["bench", "compare", "nobody.json", "a.json"], 2, "PolicyError"),
    (["tune", "nobody.json"], 2, "PolicyError"),
]


@pytest.mark.parametrize(
    ("argv", "code", "kind"),
    REFUSED,
    ids=str,
)
def test_a_refusal_as_json(argv: list[str], code: int, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "UsageError":
        with pytest.raises(SystemExit) as stopped:
            cli.main([*argv, "--json"])
        assert stopped.value.code == code
    else:
        assert cli.main([*argv, "--json"]) == code
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert answer["schema_version"] == 1
    assert answer["error"]["exit_code"] == code
    assert answer["error"]["type"] == kind
    assert answer["error"]["message"]
    assert answer["error"]["message"] in captured.err


def test_an_internal_error_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(args: object) -> int:
        raise KeyError("surprise")

    monkeypatch.setattr("dsv4_backends.commands.plugins.run", explode)
    assert cli.main(["plugins", "--json"]) == cli.INTERNAL
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "KeyError"


# ------------------------------------------------------------------------------------------------------- Ctrl-C


def stop_after(count: int) -> Callable[..., Any]:
    """A function for the place of ``checks.errors``: Ctrl-C comes within the call after ``count`` of them."""
    real, calls = checks.errors, 0

    def errors(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > count:
            raise KeyboardInterrupt
        return real(*args)

    return errors


def test_verify_interrupted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["verify", "--op", "mqa_logits", "--op", OP, "--torch-device", "cpu"]
    cases = len(CONTRACTS["mqa_logits"].at_level("smoke"))
    monkeypatch.setattr(checks, "errors", stop_after(cases + 3))
    assert cli.main(argv) == cli.INTERRUPTED == 130
    captured = capsys.readouterr()
    assert f"mqa_logits       torch     {cases}/{cases}" in captured.out
    assert f"{OP}  torch     3/3" in captured.out
    assert captured.out.rstrip().endswith("interrupted: not all cases ran")
    assert captured.err.splitlines()[-1] == "dsv4-backends: interrupted"
    monkeypatch.undo()
    monkeypatch.setattr(checks, "errors", stop_after(3))
    assert cli.main([*argv, "--json"]) == cli.INTERRUPTED
    answer = json.loads(capsys.readouterr().out)
    assert answer["interrupted"]
    assert not answer["ok"]
    assert [(row["op"], row["cases"]) for row in answer["rows"]] == [("mqa_logits", 3)]
    with pytest.raises(verifying.Interrupted) as stopped:
        verifying.verify([OP], device="cpu")
    assert stopped.value.rows == []


@pytest.mark.parametrize("to_file", [True, False])
def test_bench_interrupted(
    to_file: bool, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, rows = runner._row, []

    def stop(row: Any, *args: Any) -> Any:
        if rows:
            raise KeyboardInterrupt
        rows.append(row)
        return real(row, *args)

    monkeypatch.setattr(runner, "_row", stop)
    argv = ["bench", "--op", OP, "--op", "mqa_logits", "--provider", "torch", "--torch-device", "cpu", "--json"]
    assert cli.main([*argv, "kept.json"] if to_file else argv) == cli.INTERRUPTED
    captured = capsys.readouterr()
    kept = json.loads((folder / "kept.json").read_text() if to_file else captured.out)
    assert [row["op"] for row in kept["rows"]] == [rows[0].op]
    assert captured.err.splitlines()[-1] == "dsv4-backends: interrupted"
    if to_file:
        assert rows[0].name in captured.out


@pytest.mark.parametrize("name", EVERY)
def test_every_command_interrupted(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(args: object) -> int:
        raise KeyboardInterrupt

    module = sys.modules[f"dsv4_backends.commands.{name.split()[0]}"]
    monkeypatch.setattr(module, "run_compare" if "compare" in name else "run", stop)
    assert cli.main([*EVERY[name], "--json"]) == cli.INTERRUPTED
    captured = capsys.readouterr()
    assert captured.err == "dsv4-backends: interrupted\n"
    assert json.loads(captured.out)["error"]["exit_code"] == 130


def test_a_result_that_can_no_longer_be_written_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["bench", "--op", OP, "--provider", "torch", "--torch-device", "cpu", "--json", "/dev/full"]
    assert cli.main(argv) == cli.USAGE
    captured = capsys.readouterr()
    assert "tiny m=4" in captured.out
    assert (
        captured.err.splitlines()[-1] == "dsv4-backends: --json: '/dev/full' cannot be written: No space left on device"
    )


# ------------------------------------------------------------------------------------------- streams and the home


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    python = f"{sys.executable} -m dsv4_backends"
    return subprocess.run(
        ["bash", "-c", command.replace("DSV4", python)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_microseconds_on_an_ascii_pipe(folder: Path) -> None:
    done = shell("DSV4 bench compare a.json a.json", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    changed = json.loads((folder / "a.json").read_text())
    changed["rows"][0]["timings"][0] |= {"us": 30.0, "q1": 30.0, "q3": 30.0}
    (folder / "b.json").write_text(json.dumps(changed))
    for poor in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}):
        done = shell("DSV4 bench compare a.json b.json", **poor)
        assert (done.returncode, done.stderr) == (1, "")
        assert "BEFORE us" in done.stdout
    handled = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="dsv4_backends")
    handled.write("µ \ud800 \u2260")
    handled.flush()
    assert handled.buffer.getvalue() == b"\xb5 \\ud800 \\u2260"  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", ["plugins", "plugins --json", "--help", "list --help", "--version"])
def test_streams_that_take_nothing(command: str) -> None:
    done = shell(f"DSV4 {command} >&-")
    assert done.returncode == 2
    assert done.stderr == "dsv4-backends: standard output cannot be written: Bad file descriptor\n"
    done = shell(f"DSV4 {command} 2>&-")
    assert (done.returncode, done.stdout != "") == (0, True)
    done = shell(f"DSV4 {command} >&- 2>&-")
    assert done.returncode == 2
    done = shell(f"DSV4 {command} 2>/dev/full")
    assert (done.returncode, done.stdout != "") == (0, True)
    done = shell(f"DSV4 {command} >/dev/full")
    assert done.returncode == 2
    assert done.stderr == "dsv4-backends: standard output cannot be written: No space left on device\n"
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_errors_for_a_stream_that_takes_nothing() -> None:
    for stderr in ("2>&-", "2>/dev/full"):
        done = shell(f"DSV4 list --device banana {stderr}")
        assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_no_home_and_the_root_as_home(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    a = tmp_path / "a"
    a.mkdir()
    text = f"{a}/x and {a}b/y and /mnt{a}/z, {a}"
    monkeypatch.setenv("HOME", str(a))
    assert render.home_relative(text) == f"~/x and {a}b/y and /mnt{a}/z, ~"
    for home in ("/", "", "nowhere", f"{a}b", "/dev/null"):
        monkeypatch.setenv("HOME", home)
        assert render.home_relative(text) == text
    found = [doctor_command.Finding("one", True, "/opt/lib/x")]
    monkeypatch.setenv("HOME", "/")
    assert "/opt/lib/x" in doctor_command.text(found)
    assert doctor_command.as_json(found)["findings"][0]["message"] == "/opt/lib/x"
    monkeypatch.delenv("HOME")

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert render.home_relative(text) == text
    assert cli.main(["doctor", "--device", "cpu"]) == cli.OK


# ------------------------------------------------------------------------------------- torch that does not import

WITHOUT_TORCH = """
import contextlib, io, json, sys
from dsv4_backends.commands import cli
answers = {}
for name, argv in json.loads(sys.argv[1]).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(argv)
    answers[name] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(answers))
"""


@pytest.mark.parametrize(
    "cause", ["ImportError('libtorch_cuda.so: undefined symbol')", "OSError('libtorch_cuda.so: cannot open')"]
)
def test_torch_that_does_not_import(cause: str, folder: Path) -> None:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(f"raise {cause}\n")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(EVERY)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    answers = json.loads(done.stdout)
    for name, (code, out, err) in answers.items():
        assert "bug" not in err, (name, err)
        if name in (*CALLING, "check"):
            assert (code, out) == (1, ""), (name, err)
            assert "torch does not import" in err
            assert "libtorch_cuda.so" in err
        elif name == "doctor":
            assert code == 1
            assert "libtorch_cuda.so" in out
        elif name == "tune":
            assert "mqa_logits one: expected a row of this version's bench" in err
        else:
            assert out, (name, err)
    assert answers["list"][0] == 0


# ------------------------------------------------------------------------------------------------------ progress


def test_a_log_shows_that_cases_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["verify", "--op", OP, "--torch-device", "cpu"]
    assert cli.main(argv) == cli.OK
    assert len(capsys.readouterr().err.splitlines()) == 1  # it takes no five seconds
    monkeypatch.setattr("dsv4_backends.commands.verify.LOG_SECONDS", 0.0)
    assert cli.main(argv) == cli.OK
    assert len(capsys.readouterr().err.splitlines()) == len(CONTRACTS[OP].at_level("smoke"))


def test_exit_codes_are_all_documented() -> None:
    assert all(f"{code} " in shared.EXIT_CODES for code in (0, 1, 2, 3, shared.INTERRUPTED))


def test_interrupted_while_it_is_imported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "dsv4_backends.commands.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "dsv4_backends.commands.cli")
    monkeypatch.delattr("dsv4_backends.commands.cli")
    monkeypatch.setattr(sys, "meta_path", [Stop(), *sys.meta_path])
    assert entry.main() == 130
    assert capsys.readouterr().err == "dsv4-backends: interrupted\n"


@pytest.mark.parametrize("name", CALLING)
def test_a_torch_device_is_called_by_its_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, [*CALLING[name], "--torch-device", "banana"], "--torch-device: expected a torch device such as")


def test_a_result_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["bench", "plot", "nofile.json", "x.png"], "nofile.json: no such file\n")


def test_what_an_exit_handler_prints_is_not_the_answer(tmp_path: Path) -> None:
    code = """
        import atexit, ctypes, os, sys
        @atexit.register
        def junk():
            print("junk")
            sys.__stdout__.write("junk")
            os.write(1, b"junk")
            ctypes.CDLL(None).puts(b"junk")
    """
    files = {"late_plugin.py": provider({}, name="late", code=code)}
    distribution(tmp_path, "late", files=files, points={"dsv4_backends": {"late": "late_plugin"}})
    for command in ("list --json", "plugins --json", "list --json --device banana"):
        done = shell(f"DSV4 {command}", PYTHONPATH=str(tmp_path))
        json.loads(done.stdout)
        assert done.stderr.count("junk") in (0, 4)
    done = shell("DSV4 list", PYTHONPATH=str(tmp_path))
    assert done.stderr.count("junk") == 4
    assert "junk" not in done.stdout
