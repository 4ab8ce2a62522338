"""SGLang's hook, over a package with SGLang's names. The real SGLang is in ``sglang_suite.py``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from installed import distribution

from dsv4_backends import compat
from dsv4_backends.commands import cli
from dsv4_backends.engines import hook, patching
from dsv4_backends.engines import sglang as engine
from dsv4_backends.engines.sglang.targets import ENVIRON, INTERFACE, OFF
from dsv4_backends.selection import policy

SETTING = """
class EnvBool:
    def __init__(self, default): self.default = default
    def get(self): return self.default
    def __bool__(self): raise RuntimeError("a setting is asked with get()")
"""
DEEP_GEMM = """
def fp8_einsum(*args, **kwargs): return "own einsum"
def fp8_gemm_nt(*args): return "own gemm"
def get_num_sms(): return 7
"""


def _files() -> dict[str, str]:
    """A module for each that a target names, with the functions that are looked for."""
    texts: dict[str, dict[str, str]] = {}
    for target in engine.TARGETS:
        module = texts.setdefault(target.within or target.module, {})
        for name in (target.caller, "" if target.within else target.attribute):
            owner, _, last = name.rpartition(".")
            signature = target.signatures[0] if target.signatures and name == target.caller else ("*args", "**kwargs")
            if owner:
                line = (
                    f"    {last} = EnvBool(True)\n"
                    if owner == "Envs"
                    else f"    def {last}({', '.join(signature)}): ...\n"
                )
                module[owner] = module.get(owner, f"class {owner}:\n") + line
            elif name and name not in module:
                module[name] = f"def {name}({', '.join(signature)}): return {name!r}\n"
    texts[ENVIRON] = {"EnvBool": SETTING, **texts[ENVIRON], "envs": "envs = Envs()\n"}
    texts[INTERFACE] = {"library": "import flash_mla\n", **texts[INTERFACE]}
    files = {f"{name.replace('.', '/')}.py": "".join(parts.values()) for name, parts in texts.items()}
    for path in list(files):
        for parent in list(Path(path).parents)[:-1]:
            files.setdefault(f"{parent}/__init__.py", "")
    return files


FILES = _files()
EINSUM = "sglang/srt/models/deepseek_v4.py"


@pytest.fixture
def fake_sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install it: ``fake_sglang(version, **{path: text})``."""

    def install(version: str = "0.5.23", **changes: str) -> None:
        distribution(tmp_path, "sglang", version, files=FILES | changes)
        monkeypatch.syspath_prepend(str(tmp_path))

    monkeypatch.setenv(f"{policy.PREFIX}DEVICE", "cpu")
    yield install
    engine.undo()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("sglang", *compat.LIBRARIES)]:
        del sys.modules[name]
    assert hook._FINDER not in sys.meta_path


def states(plan: engine.Plan) -> dict[str, str]:
    return {row.target.key: row.state for row in plan.rows}


# ------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("device", ["sm_80", "sm_86", "sm_89"])
def test_below_9(fake_sglang: Callable[..., None], device: str) -> None:
    fake_sglang()
    plan = engine.plan(device)
    assert plan.ok
    assert set(states(plan).values()) == {patching.PLANNED}
    assert len(plan.rows) == len(engine.TARGETS)
    assert "sglang" not in sys.modules


def test_what_the_environment_sets_counts(fake_sglang: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sglang()
    monkeypatch.setenv("SGLANG_OPT_USE_TOPK_V2", "1")
    plan = engine.plan("sm_80")
    (row,) = (row for row in plan.rows if row.state != patching.PLANNED)
    assert (row.target.attribute, row.state) == ("Envs.SGLANG_OPT_USE_TOPK_V2", patching.NOT_NEEDED)
    assert "SGLANG_OPT_USE_TOPK_V2=1 is set in the environment" in str(row.reasons[0])


@pytest.mark.parametrize("value", ["", "maybe", "2", " 1"])
def test_a_value_that_sglang_does_not_read(
    fake_sglang: Callable[..., None], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """SGLang warns and takes the default, which is ours."""
    fake_sglang()
    monkeypatch.setenv("SGLANG_OPT_USE_TOPK_V2", value)
    assert states(engine.plan("sm_80"))[f"{ENVIRON}:Envs.SGLANG_OPT_USE_TOPK_V2"] == patching.PLANNED
    for text in ("0", "No", "TRUE"):
        monkeypatch.setenv("SGLANG_OPT_USE_TOPK_V2", text)
        assert states(engine.plan("sm_80"))[f"{ENVIRON}:Envs.SGLANG_OPT_USE_TOPK_V2"] == patching.NOT_NEEDED


def test_below_8(
    fake_sglang: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sglang()
    monkeypatch.setenv(f"{policy.PREFIX}PIN", "*=torch")
    plan = engine.plan("sm_75")
    assert {row.reasons[0].code for row in plan.rows} == {"engine-arch"}
    assert set(states(plan).values()) == {patching.REFUSED}
    assert cli.main(["engine", "sglang", "--device", "sm_75"]) == 1
    out = capsys.readouterr().out
    assert " ".join(out.split()).count("bfloat16, which sglang does not have on compute capability 7.5") == 1
    assert "planned" not in out
    assert "torch" not in out
    assert "--moe-runner-backend" not in out
    monkeypatch.setenv(f"{policy.PREFIX}DEVICE", "sm_75")
    engine.apply()
    assert hook.waiting() == ()
    assert not compat.installed("deep_gemm")


def test_long_names_fit_into_the_table(
    fake_sglang: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another release, forced: its reasons have whole names of SGLang's."""
    fake_sglang("0.5.24", **{EINSUM: "", "sglang/srt/layers/attention/dsv4/indexer.py": "def other(): ...\n"})
    monkeypatch.setenv(f"{policy.PREFIX}ENGINE", "force")
    assert cli.main(["engine", "sglang", "--device", "sm_90"]) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "C4IndexerBackendMixin.forward_c4_indexer: expected" in "".join(out.split()).replace(
        "forward_c4_indexer:expected", "forward_c4_indexer: expected"
    )


def test_what_a_user_has_to_add_below_9(fake_sglang: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    fake_sglang()
    assert cli.main(["engine", "sglang", "--device", "sm_86"]) == 0
    out = capsys.readouterr().out
    assert "--moe-runner-backend marlin" in out
    assert max(map(len, out.splitlines())) <= 100
    assert cli.main(["engine", "sglang", "--device", "sm_90"]) == 0
    assert "--moe-runner-backend" not in capsys.readouterr().out


@pytest.mark.parametrize("device", ["sm_90", "sm_100"])
def test_from_9_on_with_its_libraries(fake_sglang: Callable[..., None], device: str) -> None:
    fake_sglang(**{"deep_gemm/__init__.py": DEEP_GEMM, "flash_mla/__init__.py": ""})
    plan = engine.plan(device)
    assert plan.ok
    not_needed = {row.target for row in plan.rows if row.state == patching.NOT_NEEDED}
    assert not_needed == {target for target in engine.TARGETS if target.lacking}
    assert not any(
        row.target.attribute.endswith("JIT_DEEPGEMM") or row.target.module == "flash_mla" for row in plan.rows
    )


def test_on_12(fake_sglang: Callable[..., None]) -> None:
    fake_sglang()
    plan = engine.plan("sm_120")
    assert plan.ok
    assert set(states(plan).values()) == {patching.NOT_NEEDED}


@pytest.mark.parametrize("version", ["0.5.22", "0.5.23.post1", "0.5.23rc1", "0.5.24", "0.6.0"])
def test_other_releases_are_refused(
    fake_sglang: Callable[..., None], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_sglang(version)
    plan = engine.plan()
    assert {row.reasons[0].code for row in plan.rows} == {"engine-version"}
    engine.apply()
    assert hook.waiting() == ()
    assert not compat.installed("deep_gemm")
    engine.undo()
    assert engine.plan(force=True).ok


def test_the_reference_does_not_stand_for_a_library(
    fake_sglang: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_sglang(**{"deep_gemm/__init__.py": DEEP_GEMM, "flash_mla/__init__.py": ""})
    monkeypatch.setenv(f"{policy.PREFIX}DENY", "triton,deep_gemm,flash_mla")
    plan = engine.plan("sm_90")
    refused = {row.target.op for row in plan.rows if row.state == patching.REFUSED}
    assert refused == {target.op for target in engine.TARGETS if target.op and not target.lacking}
    assert all(row.reasons[0].code == "engine-reference" for row in plan.rows if row.state == patching.REFUSED)


def test_sglangs_own_list_of_plugins(
    fake_sglang: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sglang()
    monkeypatch.setenv(f"{policy.PREFIX}ENGINE", "vllm,sglang")
    for names in ("", "dsv4_backends", "mine, dsv4_backends"):
        monkeypatch.setenv("SGLANG_PLUGINS", names)
        assert engine.plan().ok
    monkeypatch.setenv("SGLANG_PLUGINS", "mine")
    assert not engine.plan().ok
    assert cli.main(["engine", "sglang"]) == 1
    assert "SGLANG_PLUGINS=mine does not name dsv4_backends" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setenv(f"{policy.PREFIX}ENGINE", "sglang")
    assert cli.main(["doctor"]) == 1
    assert f": 0 of {len(engine.TARGETS)} names are replaced" in " ".join(capsys.readouterr().out.split())


# ------------------------------------------------------------------------------------------- in this process


def test_inert_without_the_variable(fake_sglang: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sglang()
    for value in ("", "0", "vllm"):
        monkeypatch.setenv(f"{policy.PREFIX}ENGINE", value)
        engine.register()
        assert (engine.ENGINE.rows, hook.waiting()) == ((), ())
        assert not {"deep_gemm", "sglang"} & sys.modules.keys()


@pytest.mark.parametrize("value", ["1", "sglang", "vllm,sglang"])
def test_replaced_and_put_back(fake_sglang: Callable[..., None], monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    fake_sglang()
    monkeypatch.setenv(f"{policy.PREFIX}ENGINE", value)
    engine.register()
    environ = importlib.import_module(ENVIRON)
    interface = importlib.import_module(INTERFACE)  # without the wheel it could not be imported
    assert all(getattr(environ.envs, name).get() is False for name in OFF)
    assert interface.get_mla_metadata()[0].have_initialized is False
    out, squares = torch.empty(1, 2, 24), torch.empty(1, 2)
    front: Any = importlib.import_module("deep_gemm")
    front.tf32_hc_prenorm_gemm(torch.ones(2, 64).bfloat16(), torch.ones(24, 64), out, squares, 1)
    assert out.unique().tolist() == [64.0]
    (row,) = (row for row in engine.plan().rows if row.target.key == "deep_gemm:tf32_hc_prenorm_gemm")
    assert (row.state, row.calls) == (patching.REPLACED, 1)
    rows, before = engine.ENGINE.rows, interface.get_mla_metadata
    engine.register()
    assert engine.ENGINE.rows is rows
    assert interface.get_mla_metadata is before
    assert engine.undo() == []
    assert interface.get_mla_metadata(*[None] * 6) == "get_mla_metadata"
    assert all(getattr(environ.envs, name).get() is True for name in OFF)
    assert "deep_gemm" not in sys.modules


def test_what_is_refused_stays_the_librarys(fake_sglang: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    """A name whose caller differs is not replaced, while other names of its library are."""
    fake_sglang(
        **{"deep_gemm/__init__.py": DEEP_GEMM, "flash_mla/__init__.py": "", EINSUM: "def _fp8_wo_a_einsum(x): ...\n"}
    )
    early = importlib.import_module("deep_gemm")
    engine.apply()
    front: Any = importlib.import_module("deep_gemm")
    assert front is not early
    assert front.fp8_einsum() == "own einsum"
    assert front.fp8_gemm_nt() == "own gemm"
    assert states(engine.plan())["deep_gemm:fp8_einsum"] == patching.REFUSED
    assert "deep_gemm:fp8_einsum is not replaced" in caplog.text
    assert "dsv4_backends.compat" in front.fp8_mqa_logits.__module__
    engine.undo()
    assert sys.modules["deep_gemm"] is early
    assert front.fp8_einsum() == "own einsum"  # whoever keeps the module of ours
    assert not hasattr(front, "fp8_mqa_logits")


def test_what_no_op_covers_is_counted(fake_sglang: Callable[..., None]) -> None:
    fake_sglang(**{"deep_gemm/__init__.py": DEEP_GEMM})
    engine.apply()
    front: Any = importlib.import_module("deep_gemm")
    one = torch.ones(1)
    assert front.fp8_einsum("abc,abc->abc", (one, one), (one, one), one) == "own einsum"
    (row,) = (row for row in engine.plan().rows if row.target.attribute == "fp8_einsum")
    assert (row.calls, row.passed_on) == (1, 1)


def test_a_users_own_front_is_left_alone(fake_sglang: Callable[..., None]) -> None:
    fake_sglang()
    with compat.install("deep_gemm"):
        front: Any = sys.modules["deep_gemm"]
        before = front.fp8_einsum
        engine.apply()
        assert sys.modules["deep_gemm"] is front
        assert front.fp8_einsum is not before
        engine.undo()
        assert sys.modules["deep_gemm"] is front
        assert front.fp8_einsum is before


def test_an_error_half_way_is_undone_and_seen(
    fake_sglang: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_sglang()
    monkeypatch.setenv(f"{policy.PREFIX}ENGINE", "sglang")
    environ = importlib.import_module(ENVIRON)
    real = hook.when_imported

    def fail(name: str, callback: hook.Callback) -> None:
        if name == INTERFACE:
            raise RuntimeError("a fault of the hook's own")
        real(name, callback)

    with monkeypatch.context() as patch:
        patch.setattr(hook, "when_imported", fail)
        engine.register()  # does not raise
    assert "a fault of the hook's own" in caplog.text
    assert hook.waiting() == ()
    assert not compat.installed("deep_gemm")
    assert all(getattr(environ.envs, name).get() is True for name in OFF)
    plan = engine.plan()
    assert set(states(plan).values()) == {patching.FAILED}
    assert not plan.ok
    assert all("a fault of the hook's own" in str(row.reasons[0]) for row in plan.rows)
