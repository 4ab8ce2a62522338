"""The probes of DeepGEMM and FlashMLA: every reason, with distributions that are made of files."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dsv4_backend_deep_gemm
import dsv4_backend_flash_mla
import pytest
import torch
from dsv4_backend_deep_gemm import probe as deep_gemm_probe
from dsv4_backend_flash_mla import probe as flash_mla_probe
from fakes import install
from fakes.deep_gemm import HEADERS_25, HEADERS_28, Pybind
from fakes.flash_mla import BUILT_FOR, SINCE_2026_09_30
from packaging.version import Version

from dsv4_backends import Build, ProviderSpec, Reason
from dsv4_backends.runtime import bind
from dsv4_backends.selection import builds, provider
from dsv4_backends.selection.libraries import Parameter, accepts, parameters
from dsv4_backends.selection.machine import CPU, Device
from dsv4_backends.selection.policy import Policy
from dsv4_backends.selection.resolve import Candidate
from dsv4_backends.selection.survey import choose

(DEEP_GEMM,) = dsv4_backend_deep_gemm.dsv4_providers()
(FLASH_MLA,) = dsv4_backend_flash_mla.dsv4_providers()
INSTALLED = {"triton": "3.6.0"}
IMPORT = "from fakes.{module} import {line}\nglobals().update({line}())\n"
DEEP_GEMM_25 = IMPORT.format(module="deep_gemm", line="tokenspeed")
DEEP_GEMM_28 = IMPORT.format(module="deep_gemm", line="vllm")
FLASH_MLA_SOURCE = IMPORT.format(module="flash_mla", line="source")


def _forget() -> None:
    bind.reset()
    deep_gemm_probe.deep_gemm.cache_clear()
    flash_mla_probe.flash_mla.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("deep_gemm", "flash_mla", "vllm")]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path to install into, and an nvcc."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    for name in ("CUDA_PATH", "DG_JIT_USE_NVRTC", "DG_JIT_NVCC_COMPILER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    place = tmp_path / "site"
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))
    _forget()
    yield place
    _forget()


def deep_gemm(place: Path, distribution: str = "tokenspeed-deepgemm", version: str = "2.5.0", **options: Any) -> None:
    options = {"source": DEEP_GEMM_25, "headers": HEADERS_25, **options}
    package = options.pop("package", "deep_gemm")
    install(place, distribution, version, package, **options)


def flash_mla(place: Path, distribution: str = "tokenspeed-flashmla", version: str = "1.0.0", **options: Any) -> None:
    install(place, distribution, version, "flash_mla", **{"source": FLASH_MLA_SOURCE, "compiled": BUILT_FOR, **options})


def judged(
    spec: ProviderSpec, op: str, capability: str = "9.0", ask: Callable[..., Any] | None = builds.load
) -> Candidate:
    device = Device("cuda", 0, "Fake GPU", Version(capability)) if capability else CPU
    (candidate,) = choose(op, device, INSTALLED, (spec,), Policy(), ask).candidates
    return candidate


def only(candidate: Candidate) -> Reason:
    (reason,) = candidate.reasons
    assert reason.code in provider.REASONS
    return reason


# ------------------------------------------------------------------------------------------------------ found


def test_nothing_is_installed() -> None:
    for spec, op, hint in ((DEEP_GEMM, "mqa_logits", "deepgemm"), (FLASH_MLA, "sparse_mla_decode", "flashmla")):
        reason = only(judged(spec, op))
        assert reason.code == "distribution-missing"
        assert f"tokenspeed-{hint}" in reason.hint
        # To install it would not help here.
        assert only(judged(spec, op, "8.6")).message == "needs compute capability 9.0 or 10.0, not 8.6"
        assert only(judged(spec, op, "")).code == "device-type"


@pytest.mark.parametrize(
    ("distribution", "version", "line"),
    [
        ("tokenspeed-deepgemm", "2.5.0.post20260424", "tokenspeed"),
        ("sgl-deep-gemm", "0.1.4.post1", "sgl"),
        ("deep-gemm", "2.6.1+local", "tokenspeed"),
        ("deep-gemm", "3.0", "vllm"),
    ],
)
def test_deep_gemm_is_found(site: Path, distribution: str, version: str, line: str) -> None:
    deep_gemm(site, distribution, version, source=IMPORT.format(module="deep_gemm", line=line))
    for op in deep_gemm_probe.OPS:
        candidate = judged(DEEP_GEMM, op)
        assert candidate.accepted, candidate.reasons
        assert candidate.build is not None
        assert candidate.build.name == f"{distribution} {version}"


@pytest.mark.parametrize(
    ("distribution", "line"), [("tokenspeed-flashmla", "source"), ("sgl-flash-mla", "sgl"), ("flash-mla", "vllm")]
)
def test_flash_mla_is_found(site: Path, distribution: str, line: str) -> None:
    flash_mla(site, distribution, source=IMPORT.format(module="flash_mla", line=line))
    for op in flash_mla_probe.FUNCTIONS:
        assert judged(FLASH_MLA, op).accepted
        assert only(judged(FLASH_MLA, op, "12.0")).message == (
            f"{distribution} 1.0.0 was built for compute capability 9.0 or 10.0, not 12.0"
        )
        newer = judged(FLASH_MLA, op, "10.3")
        assert newer.accepted
        assert newer.warning is not None
        assert newer.warning.code == "untested"


def test_vllms_copy_is_found_and_comes_second(site: Path) -> None:
    copy = {"package": "vllm.third_party.deep_gemm", "source": DEEP_GEMM_28, "headers": HEADERS_28}
    deep_gemm(site, "vllm", "0.33.0", **copy)
    candidate = judged(DEEP_GEMM, "fp8_einsum")
    assert candidate.accepted, candidate.reasons
    assert candidate.build is not None
    assert candidate.build.name == "deep_gemm in vllm 0.33.0"
    assert deep_gemm_probe.deep_gemm().cleans is False
    _forget()
    deep_gemm(site)
    _forget()
    candidate = judged(DEEP_GEMM, "fp8_einsum")
    assert candidate.build is not None
    assert candidate.build.name == "tokenspeed-deepgemm 2.5.0"
    assert candidate.build.owners == ("tokenspeed-deepgemm 2.5.0", "the copy in vllm 0.33.0")


def test_a_copy_without_a_distribution_serves(site: Path) -> None:
    deep_gemm(site, "", source=f"__version__ = '2.8.1'\n{DEEP_GEMM_28}", headers=HEADERS_28)
    candidate = judged(DEEP_GEMM, "mqa_logits")
    assert candidate.accepted, candidate.reasons
    assert candidate.build is not None
    assert candidate.build.name == "deep_gemm 2.8.1 without a distribution"


def test_each_op_says_what_it_was_built_for(site: Path) -> None:
    deep_gemm(site, "deep-gemm", "2.8.1", source=DEEP_GEMM_28, headers=HEADERS_28)
    claims = {op: build.capability for op, build in builds.look(DEEP_GEMM).items()}
    # On SM100 this line's logits take MX scales and come as bf16, which is not the contract's op.
    assert claims["mqa_logits"] == claims["paged_mqa_logits"] == ("==9.0", "==12.0")
    assert claims["fp8_einsum"] == claims["hc_prenorm_gemm"] == ("==9.0", "==10.0", "==12.0")


@pytest.mark.parametrize("library", ["deep_gemm", "flash_mla"])
def test_an_upgrade_that_supports_this_gpu_changes_the_choice(site: Path, library: str) -> None:
    """A library that newly supports an architecture serves there, with no change of ours."""
    if library == "deep_gemm":
        spec, op = DEEP_GEMM, "hc_prenorm_gemm"
        deep_gemm(site)
    else:
        spec, op = FLASH_MLA, "sparse_mla_prefill"
        flash_mla(site)
    assert only(judged(spec, op, "11.0")).code == "capability"
    for path in site.glob("*.dist-info"):
        (path / "METADATA").unlink()
        path.rmdir()
    if library == "deep_gemm":
        deep_gemm(site, version="4.0", headers=("sm110_tf32_hc_prenorm_gemm.cuh",))
    else:
        said = BUILT_FOR.replace(b"SM90a and SM100f", b"SM90a, SM100f and SM110a")
        flash_mla(site, version="2.0", compiled=said)
    _forget()
    candidate = judged(spec, op, "11.0")
    assert candidate.accepted, candidate.reasons
    assert candidate.warning is None


# ---------------------------------------------------------------------------------------------------- reasons


def test_two_owners(site: Path) -> None:
    deep_gemm(site)
    deep_gemm(site, "sgl-deep-gemm", "0.1.4")
    reason = only(judged(DEEP_GEMM, "mqa_logits"))
    assert reason.code == "library-owners"
    assert "tokenspeed-deepgemm 2.5.0 and sgl-deep-gemm 0.1.4 both own the module deep_gemm" in reason.message
    assert reason.hint.startswith("pip uninstall tokenspeed-deepgemm sgl-deep-gemm")


def test_too_old(site: Path) -> None:
    deep_gemm(site, version="2.4.2")
    reason = only(judged(DEEP_GEMM, "mqa_logits"))
    assert reason.code == "distribution-version"
    assert reason.message == "tokenspeed-deepgemm 2.4.2 is installed, needs >=2.5"


def test_files_are_gone(site: Path) -> None:
    install(site, "sgl-flash-mla", "1.0.0", "elsewhere", "")
    reason = only(judged(FLASH_MLA, "sparse_mla_prefill"))
    assert reason.code == "module-missing"
    assert "sgl-flash-mla 1.0.0 is installed and the package flash_mla cannot be found" in reason.message


def test_no_compiler(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep_gemm(site)
    monkeypatch.setenv("CUDA_HOME", str(site))
    builds.forget()
    reason = only(judged(DEEP_GEMM, "hc_prenorm_gemm"))
    assert reason.code == "compiler-missing"
    assert f"CUDA_HOME is {site}" in reason.message
    monkeypatch.setenv("DG_JIT_USE_NVRTC", "1")
    builds.forget()
    assert judged(DEEP_GEMM, "hc_prenorm_gemm").accepted


def test_without_kernels(site: Path) -> None:
    deep_gemm(site, headers=("sm90_tf32_hc_prenorm_gemm.cuh",))
    assert only(judged(DEEP_GEMM, "mqa_logits")).code == "library-kernels"
    assert judged(DEEP_GEMM, "hc_prenorm_gemm").accepted


@pytest.mark.parametrize("compiled", [SINCE_2026_09_30, b"something else"])
def test_flash_mla_without_hopper(site: Path, compiled: bytes) -> None:
    flash_mla(site, "flash-mla", "2026.9.30", compiled=compiled)
    for capability in ("9.0", "10.0"):
        reason = only(judged(FLASH_MLA, "sparse_mla_decode", capability))
        assert reason.code == "library-kernels"
        assert ("since 2026.09.30" in reason.message) == (compiled is SINCE_2026_09_30)


APPMANA = f"# has flash_sparse_mla_decode\n{IMPORT.format(module='flash_mla', line='appmana')}"


@pytest.mark.parametrize("version", ["0.9", "2.0.0"])
@pytest.mark.parametrize("ask", [None, builds.load])
def test_another_library_under_the_name_is_recognised(site: Path, version: str, ask: Callable[..., Any] | None) -> None:
    """AppMana's wheel is called flash-mla too. Nothing that would overwrite it is suggested."""
    flash_mla(site, "flash-mla", version, source=APPMANA, compiled=None)
    for op in flash_mla_probe.FUNCTIONS:
        reason = only(judged(FLASH_MLA, op, ask=ask))
        assert reason.code == "library-signature"
        assert f"flash-mla {version} is AppMana's library for SM8x and SM12x" in reason.message
        assert not [name for name in ("pip", *flash_mla_probe.DISTRIBUTIONS) if name in reason.hint]
    candidate = judged(FLASH_MLA, "sparse_mla_decode", "8.6")
    assert candidate.build is not None
    assert candidate.build.name == f"flash-mla {version}"
    assert {reason.code for reason in candidate.reasons} == {"capability"}


def test_a_build_of_appmanas_with_flash_mlas_functions_is_judged_by_them(site: Path) -> None:
    flash_mla(site, "flash-mla", "3.0", source=f"# flash_sparse_mla_decode, flash_mla_sparse_fwd\n{FLASH_MLA_SOURCE}")
    assert judged(FLASH_MLA, "sparse_mla_decode").accepted


def test_sgl_without_its_legacy_half(site: Path) -> None:
    source = "from fakes.flash_mla import sgl\nglobals().update(sgl(legacy=False))\n"
    flash_mla(site, "sgl-flash-mla", source=source)
    reason = only(judged(FLASH_MLA, "sparse_mla_decode"))
    assert reason.code == "library-kernels"
    assert "without its legacy kernels" in reason.message


@pytest.mark.parametrize("ask", [builds.load, builds.load_apart])
def test_does_not_load(site: Path, ask: Callable[..., Any]) -> None:
    source = "raise OSError('Could not load\\n this library') from OSError('undefined symbol')"
    deep_gemm(site, "sgl-deep-gemm", "0.2.5", source=source)
    reason = only(judged(DEEP_GEMM, "fp8_einsum", ask=ask))
    assert reason.code == "library-load"
    words = "sgl-deep-gemm 0.2.5 does not load: OSError: Could not load this library (undefined symbol)"
    assert reason.message == words


def test_crashes_and_prints_only_in_the_child(site: Path) -> None:
    flash_mla(site, source="import os\nprint('hello')\nos.abort()\n")
    reason = only(judged(FLASH_MLA, "sparse_mla_prefill", ask=builds.load_apart))
    assert reason.code == "library-load"
    assert "ended with signal 6" in reason.message
    flash_mla(site, "", source="print('hello', flush=True)\n" + FLASH_MLA_SOURCE)
    _forget()
    assert judged(FLASH_MLA, "sparse_mla_prefill", ask=builds.load_apart).accepted
    assert "flash_mla" not in sys.modules


def test_symbol_and_signature(site: Path) -> None:
    changed = (
        "from fakes.deep_gemm import *\nglobals().update(sgl())\ndel get_paged_mqa_logits_metadata\n"
        "def fp8_einsum(expr, b, a, d, c=None, recipe=None): ...\n"
        "def tf32_hc_prenorm_gemm(a, b, d, sqr_sum, num_splits=None, *, stream): ...\n"
        "fp8_mqa_logits = Pybind('fp8_mqa_logits(*args, **kwargs)', None)\n"
    )
    deep_gemm(site, source=changed)
    codes = {op: only(judged(DEEP_GEMM, op)).code for op in deep_gemm_probe.OPS}
    assert codes.pop("paged_mqa_logits") == "library-symbol"
    assert set(codes.values()) == {"library-signature"}
    assert "fp8_einsum has (expr, b, a, d, c, recipe)" in only(judged(DEEP_GEMM, "fp8_einsum")).message
    assert "no signature that can be read" in only(judged(DEEP_GEMM, "mqa_logits")).message


def test_a_broken_probe_is_a_reason() -> None:
    for target, words in (("json:nothing", "AttributeError"), ("json:dumps", "did not return")):
        spec = ProviderSpec(
            name="acme", summary="", tier=provider.Tier.NATIVE, implementations=DEEP_GEMM.implementations, probe=target
        )
        reason = only(judged(spec, "mqa_logits", ask=None))
        assert reason.code == "probe-failed"
        assert words in reason.message or "AttributeError" in reason.message
    with pytest.raises(ValueError, match="probe must be"):
        ProviderSpec(name="acme", summary="", tier=provider.Tier.NATIVE, implementations=(), probe="acme.probe")


# ------------------------------------------------------------------------------------------------- who is asked


def test_nothing_is_imported_while_something_cheaper_refuses(site: Path) -> None:
    deep_gemm(site)
    for capability, policy in (("8.6", Policy()), ("", Policy()), ("9.0", Policy(deny=frozenset({"deep_gemm"})))):
        device = Device("cuda", 0, "GPU", Version(capability)) if capability else CPU
        choose("mqa_logits", device, INSTALLED, (DEEP_GEMM,), policy, builds.load)
        assert "deep_gemm" not in sys.modules
    judged(DEEP_GEMM, "mqa_logits")
    assert "deep_gemm" in sys.modules


def test_a_call_binds_the_library_or_says_why_not(
    site: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On the way of a call the library is imported in this process, and a refusal goes to the next provider."""
    deep_gemm(site, source="raise OSError('no such symbol')")
    here = Device("cuda", 0, "Fake GPU", Version("9.0"))
    monkeypatch.setattr("dsv4_backends.selection.machine.device_of", lambda device: here)
    name, _ = bind.implementation("hc_prenorm_gemm", torch.device("cpu"))
    assert name == "triton"
    assert "hc_prenorm_gemm: deep_gemm: tokenspeed-deepgemm 2.5.0 does not load: OSError: no such symbol" in caplog.text
    assert "[library-load]" in caplog.text
    (site / "deep_gemm" / "__init__.py").write_text(DEEP_GEMM_25)
    _forget()
    name, function = bind.implementation("hc_prenorm_gemm", torch.device("cpu"))
    assert (name, function.__module__) == ("deep_gemm", "dsv4_backend_deep_gemm.hyper_connection")


def test_the_commands_report_it(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv4_backends.commands import cli

    monkeypatch.setenv("DSV4_BACKENDS_MEASURED", "0")
    deep_gemm(site)
    flash_mla(site)
    flash_mla(site, "sgl-flash-mla")
    assert cli.main(["list", "--device", "sm_90"]) == 0
    listed = capsys.readouterr().out
    assert "tokenspeed-deepgemm 2.5.0" in listed.splitlines()[1]
    assert ["mqa_logits", "deep_gemm", "native", "-"] in [line.split() for line in listed.splitlines()]
    assert "both own the module flash_mla" in " ".join(listed.split())
    assert cli.main(["explain", "mqa_logits", "--device", "sm_90"]) == 0
    assert "   tokenspeed-deepgemm 2.5.0\n" in capsys.readouterr().out
    assert cli.main(["doctor", "--device", "sm_90"]) == 1
    told = capsys.readouterr().out
    assert "deep_gemm: tokenspeed-deepgemm 2.5.0" in told
    assert "flash_mla: tokenspeed-flashmla 1.0.0, sgl-flash-mla 1.0.0: [library-owners]" in told
    assert "deep_gemm" not in sys.modules


def test_doctor_reports_another_library(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dsv4_backends.commands import cli

    flash_mla(site, "flash-mla", "2.0.0", source=APPMANA, compiled=None)
    cli.main(["doctor", "--device", "sm_86"])
    assert "flash-mla 2.0.0 is AppMana's library" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- signatures


def test_parameters() -> None:
    def python(a: int, b: int = 1, *rest: int, c: int, **more: int) -> None: ...

    def shown(function: Any) -> list[str]:
        return [f"{p.name}{'!' if p.required else ''}" for p in parameters(function) or ()]

    assert shown(python) == ["a!", "b", "rest", "c!", "more"]
    doc = "f(a: Tuple[int, int], b: Dict = {'x, y': 1}, c: str = 'nk, mn', d: torch.dtype = torch.float32) -> None"
    assert shown(Pybind(doc, python)) == ["a!", "b", "c", "d"]
    assert shown(torch.ops.aten.relu.default) == ["self!"]
    assert shown(torch._C._jit_set_profiling_mode) == ["arg0!"]  # a real one of pybind11
    assert parameters(Pybind("f(*args, **kwargs)\nOverloaded function.", python)) is None
    assert parameters(Pybind("words", python)) is None
    assert accepts(python, ("a", "x")) == "(a, b, rest, c, more)"
    assert Parameter("a", True) in (parameters(python) or ())
    assert Build() == Build(name="", owners=(), capability=None, reasons=())
