from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from installed import provider
from packaging.version import Version

from dsv4_backends import CONTRACTS, OPS, Build, __version__
from dsv4_backends.commands import cli
from dsv4_backends.commands import list as listing
from dsv4_backends.selection import machine, plugins, policy, preferences, resolve
from dsv4_backends.selection.survey import Survey

SMS = ["cpu", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"]


def native(target: str = "json:dumps", *, tier: str = "NATIVE", code: str = "", **fields: Any) -> str:
    """A plugin for Hopper and Blackwell."""
    of_op = {"capability": fields.pop("capability", ("==9.0", "==10.0")), "devices": fields.pop("devices", ("cuda",))}
    fields = {"requires": ("acme-kernels>=3",)} | fields
    return provider({"mqa_logits": {"target": target, **of_op}}, tier=tier, code=code, **fields)


NATIVE = native()


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
    rows = [line for line in lines[4:] if not line.startswith(" ")]  # several reasons take several lines
    assert [line.split()[0] for line in rows] == list(OPS)
    assert all(line.split()[1] != "none" for line in rows)
    assert max(map(len, lines)) <= 100
    code, data = as_json(capsys, "list", "--device", device)
    assert [row["op"] for row in data["devices"][0]["ops"]] == list(OPS)
    assert all(row["selected"] for row in data["devices"][0]["ops"])


def test_reasons_stand_in_the_ops_own_row(fake_plugin: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    fake_plugin("acme", NATIVE, version="2.0")
    _, out, _ = run(capsys, "list", "--device", "sm_86")
    (row,) = [line for line in out.splitlines() if line.startswith("mqa_logits")]
    assert row.split()[:3] == ["mqa_logits", "triton", "portable"]
    assert "acme, deep_gemm: needs compute capability 9.0 or" in row
    assert "acme-kernels" not in out  # to install it would change nothing
    _, out, _ = run(capsys, "list", "--device", "sm_90")
    assert "acme-kernels 2.0 is installed, needs >=3" in out
    _, data = as_json(capsys, "list", "--device", "sm_86")
    (op,) = [op for op in data["devices"][0]["ops"] if op["op"] == "mqa_logits"]
    assert [r["code"] for r in op["candidates"][0]["reasons"]] == ["capability"]


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
    fake_plugin("acme", native(tier="EXPERIMENTAL"), version="3.1")
    monkeypatch.setenv("DSV4_BACKENDS_DENY", "triton")
    _, out, _ = run(capsys, "list", "--device", "sm_90")
    assert " ".join(out.split()).count("acme: experimental providers serve only when asked for") == 1
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
    assert "pinned to acme" in row
    assert "untested: tested on compute capability 9.0 or 10.0" in out


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
    assert "pinned to acme, which does not implement it" in " ".join(out.split())


def test_a_denied_plugin_has_its_reason_on_every_op(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not imported, so its ops are unknown."""
    monkeypatch.setenv("DSV4_BACKENDS_DENY", "triton")
    monkeypatch.setenv("DSV4_BACKENDS_PIN", "fp8_einsum=triton")
    denied = "triton: denied by DSV4_BACKENDS_DENY; it was not imported"
    code, out, _ = run(capsys, "list", "--device", "sm_86")
    assert code == 1
    assert " ".join(out.split()).count(denied) == len(OPS) - 1
    assert "pinned to triton, whose plugin gives no provider: denied by DSV4_BACKENDS_DENY" in " ".join(out.split())
    assert "does not implement" not in out
    _, data = as_json(capsys, "list", "--device", "sm_86")
    for op in data["devices"][0]["ops"]:
        (absent,) = op["absent"]
        assert (absent["plugin"], [r["code"] for r in absent["reasons"]]) == ("triton", ["denied"])
    _, out, _ = run(capsys, "explain", "mqa_logits", "--device", "sm_86")
    assert "triton: [denied] denied by DSV4_BACKENDS_DENY; it was not imported" in out


H200 = """
NVIDIA H200 (compute capability 9.0, sm_90)
dsv4-backends {version}, torch 2.11.0, triton 3.6.0, tokenspeed-flashmla 1.0.0.post20260429,
tokenspeed-deepgemm 2.5.0.post20260424

OP                         PROVIDER           TIER      OTHERWISE, AND WHY NOT A BETTER ONE
sparse_mla_prefill         triton (measured)  portable  otherwise flash_mla: sizes that were not
                                                          measured
sparse_mla_decode          triton (measured)  portable  otherwise flash_mla: h_q=128, b * s_q >= 46;
                                                          sizes that were not measured
gather_dequant_kv          triton             portable  -
mqa_logits                 deep_gemm          native    -
paged_mqa_logits           triton (measured)  portable  otherwise deep_gemm: sizes that were not
                                                          measured
indexer_topk               triton             portable  -
paged_indexer_topk         triton             portable  -
indexer_q_rope_quant       triton             portable  -
compress_norm_rope_insert  triton             portable  -
indexer_compress_insert    triton             portable  -
fp8_einsum                 deep_gemm          native    triton (measured): h=8|16 d=1024 r=4096, b
                                                          <= 64
inverse_rope_quant         triton             portable  -
inverse_rope               triton             portable  -
hc_prenorm_gemm            deep_gemm          native    triton (measured): n=24 k=16384|28672, m <=
                                                          64
"""


def test_list_says_the_measured_choice_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H200 with both native libraries, under a table of measurements as it is shipped."""
    device = machine.Device("cuda", 0, "NVIDIA H200", Version("9.0"))
    installed = {"torch": "2.11.0", "triton": "3.6.0"}
    loaded = plugins.load()
    names = {
        "flash_mla": "tokenspeed-flashmla 1.0.0.post20260429",
        "deep_gemm": "tokenspeed-deepgemm 2.5.0.post20260424",
    }
    builds = {key: dict.fromkeys(OPS, Build(name=name, capability=("==9.0",))) for key, name in names.items()}

    def pairs(op: str, over: str, *ranges: tuple[str, int | None]) -> list[preferences.Preference]:
        return [preferences.Preference(op, shapes, 1, high, "triton", over, 1.1, "X") for shapes, high in ranges]

    known = [
        *pairs("sparse_mla_prefill", "flash_mla", ("h_q=64 topk>256", None), ("h_q=64 topk<=256", None)),
        *pairs("sparse_mla_decode", "flash_mla", ("h_q=64", None), ("h_q=128", 45), ("h_q=32", None)),
        *pairs("paged_mqa_logits", "deep_gemm", ("h=64 d=128", None)),
        *pairs("fp8_einsum", "deep_gemm", ("h=8 d=1024 r=4096", 64), ("h=16 d=1024 r=4096", 64)),
        *pairs("hc_prenorm_gemm", "deep_gemm", ("n=24 k=16384", 64), ("n=24 k=28672", 64)),
    ]
    shown = [op for op in OPS if f"\n{op} " in H200]  # an op that is added later need not be shown
    found = tuple(
        resolve.resolve(
            op, device, installed, loaded.providers, policy.Policy(), builds=builds, preferences=known, findable=bool
        )
        for op in shown
    )
    text = listing.text(Survey(machine.Machine((device,), installed), loaded, ((device, found),)))
    assert text == H200.strip().format(version=__version__)
    summaries = {r.op: r.serves().summary for r in found}
    assert summaries["sparse_mla_decode"] == "triton (measured, else flash_mla)"
    assert summaries["fp8_einsum"] == "deep_gemm (triton where measured)"
    assert summaries["mqa_logits"] == "deep_gemm"
    # The same object says it for a call.
    decode = found[1]
    assert decode.serves(((46, 1, 128, 512), (46, 1, 128))).shown == "flash_mla"
    assert decode.serves(((45, 1, 128, 512), (45, 1, 128))).shown == "triton (measured)"
    assert decode.serves(((1, 1, 24, 512), (1, 1, 128))).shown == "flash_mla"


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


def test_doctor_names_what_kubernetes_set(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_BACKENDS_PORT", "tcp://10.0.0.7:80")
    code, out, _ = run(capsys, "doctor", "--device", "cpu")
    assert code == 0
    assert "ignored, set by Kubernetes for services named dsv4-backends*: DSV4_BACKENDS_PORT" in out


def test_doctor_imports_what_was_chosen(fake_plugin: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    fake_plugin("acme", native("json:nothing"), version="3.1")
    code, out, _ = run(capsys, "doctor", "--device", "sm_90")
    assert code == 1
    assert "json:nothing raised AttributeError" in out


def test_doctor_asks_what_a_call_asks(fake_plugin: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    fake_plugin("acme", NATIVE, version="3.1")  # json.dumps is no mqa_logits
    code, data = as_json(capsys, "doctor", "--device", "sm_90")
    assert code == 1
    (bad,) = [f for f in data["findings"] if not f["ok"]]
    assert bad["check"] == "signature"
    assert bad["message"].startswith("mqa_logits on simulated sm_90 GPU: acme: json:dumps has (")
    # And it says who serves instead.
    assert {"check": "served", "ok": True, "message": "mqa_logits on simulated sm_90 GPU: triton"} in data["findings"]


@pytest.mark.parametrize("capability", ["9.0", "10.0"])
def test_doctor_finds_a_probe_that_raised(
    fake_plugin: Callable[..., None], capsys: pytest.CaptureFixture[str], capability: str
) -> None:
    code = "def probe(load):\n    raise RuntimeError('no such file')\n"
    fake_plugin("acme", native(capability=(f"=={capability}",), requires=(), probe="acme_plugin:probe", code=code))
    code, data = as_json(capsys, "doctor", "--device", "sm_90")
    assert code == 1
    (library,) = [f for f in data["findings"] if f["message"].startswith("acme: ")]
    assert (library["check"], library["ok"]) == ("library", False)
    assert "nothing installed" not in library["message"]
    assert "[probe-failed] the probe acme_plugin:probe raised RuntimeError: no such file" in library["message"]


def test_verify(capsys: pytest.CaptureFixture[str]) -> None:
    cases = len(CONTRACTS["hc_prenorm_gemm"].at_level("smoke"))
    code, out, err = run(capsys, "verify", "--op", "hc_prenorm_gemm", "--torch-device", "cpu")
    assert code == 0
    assert f"hc_prenorm_gemm  torch     {cases}/{cases}" in out
    assert out.rstrip().endswith("all passed")
    assert f"hc_prenorm_gemm torch 1/{cases} small" in err
    code, data = as_json(capsys, "verify", "--op", "hc_prenorm_gemm", "--provider", "torch")
    assert data["ok"]
    assert data["rows"][0]["cases"] == cases
    assert 0 < data["rows"][0]["errors"]["out"]["share"] < 1


def test_verify_finds_a_wrong_provider(fake_plugin: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    source = """
        def mqa_logits(q, k, k_scale, weights, row_starts, row_ends, *, max_seqlen_k=None, out=None):
            import torch
            if max_seqlen_k: raise RuntimeError("no compressed form")
            return torch.zeros(q.shape[0], k.shape[0])
    """
    fake_plugin("acme", native("acme_plugin:mqa_logits", devices=("cpu",), requires=(), code=source))
    code, out, _ = run(capsys, "verify", "--op", "mqa_logits", "--provider", "acme", "--torch-device", "cpu")
    assert code == 1
    assert "FAILED mqa_logits acme: compressed: RuntimeError: no compressed form" in out
    assert "0.0 instead of -inf" in out


def test_verify_says_when_there_is_nothing_to_run(
    fake_plugin: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_plugin("acme", native("json:nothing", devices=("cpu",), requires=()))
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
        (["verify", "--provider", "nobody"], "providers: unknown provider 'nobody'"),
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
