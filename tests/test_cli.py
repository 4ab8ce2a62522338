from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from dsv4_backends import OPS
from dsv4_backends.commands import cli
from dsv4_backends.commands import list as listing

SMS = ["cpu", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"]

NATIVE = """
import dsv4_backends as d
@d.hookimpl
def dsv4_providers():
    yield d.ProviderSpec(name="acme", summary="fake", tier=d.Tier.NATIVE,
        requires=("acme-kernels>=3",), implementations=(
        d.Implementation(op="mqa_logits", target="json:dumps", capability=("==9.0", "==10.0")),))
"""


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def as_json(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, Any]:
    code, out, _ = run(capsys, *argv, "--json")
    data = json.loads(out)
    assert data["schema_version"] == 1
    return code, data


@pytest.mark.parametrize("device", SMS)
def test_list_on_every_device(capsys: pytest.CaptureFixture[str], device: str) -> None:
    code, out, _ = run(capsys, "list", "--device", device)
    assert code == 0
    lines = out.splitlines()
    assert device == "cpu" or f"simulated {device} GPU" in lines[0]
    rows = [line for line in lines[3:] if not line.startswith(" ")]  # several reasons take several lines
    assert [line.split()[0] for line in rows] == list(OPS)
    assert all(line.split()[1] != "none" for line in lines[3:])
    code, data = as_json(capsys, "list", "--device", device)
    assert [row["op"] for row in data["devices"][0]["ops"]] == list(OPS)
    assert all(row["selected"] for row in data["devices"][0]["ops"])


def test_reasons_stand_in_the_ops_own_row(fake_plugin: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    fake_plugin("acme", NATIVE, version="2.0")
    _, out, _ = run(capsys, "list", "--device", "sm_86")
    (row,) = [line for line in out.splitlines() if line.startswith("mqa_logits")]
    assert row.split()[:3] == ["mqa_logits", "triton", "portable"]
    assert "acme: needs compute capability 9.0 or 10.0, this GPU is 8.6; triton serves it" in row
    assert "acme-kernels 2.0 is installed, needs >=3" in row
    _, data = as_json(capsys, "list", "--device", "sm_86")
    (op,) = [op for op in data["devices"][0]["ops"] if op["op"] == "mqa_logits"]
    assert [r["code"] for r in op["candidates"][0]["reasons"]] == ["capability", "distribution-version"]


def test_explain(fake_plugin: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    fake_plugin("acme", NATIVE, version="3.1")
    code, out, _ = run(capsys, "explain", "mqa_logits", "--device", "sm_103")
    assert code == 0
    assert out.index(" triton: selected") < out.index(" acme: can serve")
    assert "[untested] tested on compute capability 9.0 or 10.0, this GPU is the newer 10.3" in out
    code, data = as_json(capsys, "explain", "mqa_logits", "--device", "sm_90")
    assert data["devices"][0]["selected"] == "acme"


@pytest.mark.parametrize("device", SMS[1:])
def test_triton_serves_every_gpu(capsys: pytest.CaptureFixture[str], device: str) -> None:
    code, data = as_json(capsys, "list", "--device", device)
    assert code == 0
    assert [op["selected"] for op in data["devices"][0]["ops"]] == ["triton"] * len(OPS)


def test_experimental_providers_are_said_and_can_be_had(
    fake_plugin: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_plugin("acme", NATIVE.replace("NATIVE", "EXPERIMENTAL"), version="3.1")
    monkeypatch.setenv("DSV4_BACKENDS_DENY", "triton")
    _, out, _ = run(capsys, "list", "--device", "sm_90")
    assert out.count("acme: experimental providers serve only when asked for") == 1
    monkeypatch.setenv("DSV4_BACKENDS_EXPERIMENTAL", "1")
    _, data = as_json(capsys, "list", "--device", "sm_90")
    (op,) = [op for op in data["devices"][0]["ops"] if op["op"] == "mqa_logits"]
    assert op["selected"] == "acme"


def test_untested_selection_is_said_in_list(
    fake_plugin: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_plugin("acme", NATIVE, version="3.1")
    monkeypatch.setenv("DSV4_BACKENDS_PIN", "mqa_logits=acme")
    _, out, _ = run(capsys, "list", "--device", "sm_103")
    (row,) = [line for line in out.splitlines() if line.startswith("mqa_logits")]
    assert "acme" in row
    assert "untested: tested on compute capability 9.0 or 10.0" in row


def test_a_pin_that_cannot_be_met_is_a_finding(
    fake_plugin: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_plugin("acme", NATIVE, version="3.1")
    monkeypatch.setenv("DSV4_BACKENDS_PIN", "mqa_logits=acme")
    code, out, _ = run(capsys, "list", "--device", "sm_86")
    assert code == 1
    assert "none" in next(line for line in out.splitlines() if line.startswith("mqa_logits"))
    code, out, _ = run(capsys, "explain", "mqa_logits", "--device", "sm_86")
    assert code == 1
    assert "pinned to acme, so no other" in out
    monkeypatch.setenv("DSV4_BACKENDS_PIN", "fp8_einsum=acme")
    code, out, _ = run(capsys, "list", "--device", "sm_90")
    assert code == 1
    assert "pinned to acme, which does not implement it" in out


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, "doctor", "--device", "cpu")
    assert code == 0
    assert out.rstrip().endswith("nothing found")
    monkeypatch.setenv("DSV4_BACKENDS_DENY", "triton")
    code, data = as_json(capsys, "doctor", "--device", "sm_86")
    assert code == 1  # a GPU that only the reference serves is worth a finding
    assert {f["check"] for f in data["findings"] if not f["ok"]} == {"served"}


def test_doctor_reports_bad_settings_and_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSV4_BACKENDS_ODER", "torch")
    code, out, _ = run(capsys, "doctor", "--device", "cpu")
    assert code == 1
    assert "did you mean 'DSV4_BACKENDS_ORDER'" in out
    assert "1 finding" in out
    assert "mqa_logits on CPU: torch" in out


def test_doctor_imports_what_was_chosen(fake_plugin: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    fake_plugin("acme", NATIVE.replace("json:dumps", "json:nothing"), version="3.1")
    code, out, _ = run(capsys, "doctor", "--device", "sm_90")
    assert code == 1
    assert "json:nothing raised AttributeError" in out


def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "verify", "--op", "hc_prenorm_gemm", "--torch-device", "cpu")
    assert code == 0
    assert "hc_prenorm_gemm  torch     9/9" in out
    assert out.rstrip().endswith("all passed")
    assert "hc_prenorm_gemm torch 1/9 small" in err
    code, data = as_json(capsys, "verify", "--op", "hc_prenorm_gemm", "--provider", "torch")
    assert data["ok"]
    assert data["rows"][0]["cases"] == 9
    assert 0 < data["rows"][0]["errors"]["out"]["share"] < 1


def test_verify_finds_a_wrong_provider(fake_plugin: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    source = NATIVE.replace('requires=("acme-kernels>=3",), ', "").replace(
        '("==9.0", "==10.0")', '(">=0",), devices=("cpu",)'
    )
    source = source.replace("json:dumps", "acme_plugin:mqa_logits") + (
        "def mqa_logits(q, k, k_scale, weights, row_starts, row_ends, *, max_seqlen_k=None, out=None):\n"
        "    import torch\n"
        "    if max_seqlen_k: raise RuntimeError('no compressed form')\n"
        "    return torch.zeros(q.shape[0], k.shape[0])\n"
    )
    fake_plugin("acme", source)
    code, out, _ = run(capsys, "verify", "--op", "mqa_logits", "--provider", "acme", "--torch-device", "cpu")
    assert code == 1
    assert "FAILED mqa_logits acme: compressed: RuntimeError: no compressed form" in out
    assert "0.0 instead of -inf" in out


def test_verify_says_when_there_is_nothing_to_run(
    fake_plugin: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    source = NATIVE.replace('"acme-kernels>=3",', "").replace('("==9.0", "==10.0")', '(">=0",), devices=("cpu",)')
    fake_plugin("acme", source.replace("json:dumps", "json:nothing"))
    code, out, err = run(capsys, "verify", "--op", "fp8_einsum", "--provider", "acme", "--torch-device", "cpu")
    assert (code, out) == (1, "")
    assert "nothing to verify: acme implements none of fp8_einsum" in err
    code, out, err = run(capsys, "verify", "--op", "mqa_logits", "--provider", "acme", "--torch-device", "cpu")
    assert (code, out) == (1, "")
    assert "importing json:nothing raised AttributeError" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["list", "--device", "h100"], "expected cpu or a GPU such as sm_86"),
        (["verify", "--provider", "nobody"], "unknown provider 'nobody'"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert words in err


@pytest.mark.parametrize("argv", [[], ["nothing"], ["explain", "nothing"], ["verify", "--level", "huge"]])
def test_argparse_errors(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2


def test_bad_setting_is_usage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_BACKENDS_DENY", "torch")
    code, _, err = run(capsys, "list")
    assert code == 2
    assert "'torch' cannot be denied" in err


def test_internal_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(args: object) -> int:
        raise KeyError("surprise")

    monkeypatch.setattr(listing, "run", explode)
    code, _, err = run(capsys, "list")
    assert code == 3
    assert "this is a bug in dsv4-backends" in err


def test_survives_a_pipe_that_closes() -> None:
    command = f"{sys.executable} -m dsv4_backends explain mqa_logits | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith("mqa_logits on ")
    assert "\x1b" not in done.stdout


def test_help_lists_every_variable() -> None:
    from dsv4_backends.selection.policy import VARIABLES

    text = cli.parser().format_help()
    assert all(name in text for name in VARIABLES)


def test_a_missing_numpy_is_not_worth_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run(capsys, "plugins")
        warnings.warn("Failed to initialize NumPy: No module named 'numpy' (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(w.message) for w in seen] == ["something else"]
