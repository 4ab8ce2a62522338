"""Broken plugins and distributions: each is a row with its cause, and the reference serves.

All kinds are in one environment and one process, which runs every command and calls an op.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from installed import distribution

from dsv4_backends.selection import foreign

HEAD = """
import os, sys, time
import dsv4_backends as d
class Panic(BaseException): pass
class Mute(Exception):
    def __str__(self): raise RuntimeError('no text')
class NoRepr:
    def __repr__(self): raise RuntimeError('no repr')
def refuses_false(q, kv, weights, row_starts, row_ends, *, out=None): return False
def spec(**over):
    impl = dict(op='mqa_logits', target='@M@:serve', devices=('cuda', 'cpu')) | over.pop('impl', {})
    return d.ProviderSpec(**(dict(name='@N@', summary='fake', tier=d.Tier.NATIVE,
        implementations=(d.Implementation(**impl),)) | over))
from dsv4_backends.contract.indexer.meaning import mqa_logits as _contract
import inspect
def serve(*args, **kwargs): raise AssertionError('it must not be reached')
serve.__signature__ = inspect.signature(_contract)
def with_signature(function):
    function.__signature__ = inspect.signature(_contract)
    return function
"""
HOOK = "@d.hookimpl\ndef dsv4_providers():\n    "


@dataclass(frozen=True)
class Kind:
    """A plugin, the code of the reason that its row must have, and words of it."""

    name: str
    source: str
    code: str
    words: str


def hook(name: str, body: str, code: str, words: str) -> Kind:
    return Kind(name, HOOK + body.replace("\n", "\n    "), code, words)


def field(name: str, over: str, words: str) -> Kind:
    return hook(name, f"return spec({over})", "plugin-failed", words)


def probe(name: str, body: str, words: str) -> Kind:
    source = f"{HOOK}return spec(probe='@M@:probe')\ndef probe(load):\n    {body}\n"
    return Kind(name, source, "probe-failed", words)


def refuses(name: str, body: str, words: str) -> Kind:
    source = (
        f"{HOOK}return spec(impl=dict(refuses='@M@:refuses'))\n"
        f"@with_signature\ndef refuses(*args, **kwargs):\n    {body}\n"
    )
    return Kind(name, source, "refuses-failed", words)


KINDS = (
    Kind("i_error", "raise ImportError('libacme is missing')", "plugin-import", "libacme is missing"),
    Kind("i_exit", "raise SystemExit(3)", "plugin-import", "SystemExit: 3"),
    Kind("i_panic", "raise Panic('rust')", "plugin-import", "Panic: rust"),
    Kind("i_genexit", "raise GeneratorExit()", "plugin-import", "GeneratorExit"),
    Kind("i_mute", "raise Mute()", "plugin-import", "Mute (its message cannot be shown: __str__ raised"),
    Kind(
        "i_cause",
        "raise ImportError('outer') from Mute()",
        "plugin-import",
        "outer (its cause's message cannot be shown",
    ),
    Kind("i_syntax", "def broken(:", "plugin-import", "SyntaxError"),
    Kind("i_deep", "def f(): f()\nf()", "plugin-import", "RecursionError"),
    Kind("i_long", "raise ValueError('x' * 10**6)", "plugin-import", "xxx ..."),
    Kind("i_hang", "time.sleep(3600)", "plugin-import", "did not finish within 1 s"),
    Kind("i_nohook", "x = 1", "plugin-hook", "has no function dsv4_providers"),
    Kind("i_getattr", "def __getattr__(name): raise Panic(name)", "plugin-hook", ""),
    hook("h_hang", "time.sleep(3600)", "plugin-failed", "did not finish within 1 s"),
    hook("h_panic", "raise Panic('rust')", "plugin-failed", "Panic: rust"),
    hook("h_mute", "raise Mute()", "plugin-failed", "its message cannot be shown"),
    hook("h_none", "pass", "plugin-type", "returned None"),
    hook("h_text", "return 'acme'", "plugin-type", "str 'acme'"),
    hook("h_number", "return 7", "plugin-type", "int 7"),
    hook("h_dict", "return {'a': spec()}", "plugin-type", "returned dict"),
    hook("h_norepr", "return [NoRepr()]", "plugin-type", "a NoRepr without a repr"),
    hook("h_late", "yield spec()\nraise Panic('late')", "plugin-failed", "Panic: late"),
    hook("h_endless", "while True: yield spec()", "plugin-type", "more than 256"),
    hook("h_twice", "for _ in 'ab': yield spec(impl=dict(op='another_op'))", "plugin-duplicate", "provides that name"),
    field("f_twice", "implementations=2 * spec().implementations", "got two with the same claim and refuses"),
    hook("h_ours", "return spec(name='torch')", "plugin-duplicate", "provides that name"),
    hook("h_future", "return spec(api=99)", "plugin-api", "interface 99"),
    hook("h_bare", "return object.__new__(d.ProviderSpec)", "plugin-type", "AttributeError"),
    hook(
        "h_derived",
        "class S(d.ProviderSpec):\n    def __post_init__(self): pass\n"
        "return S(name='@N@', summary=1, tier=9, implementations=5)",
        "plugin-type",
        "",
    ),
    hook("h_mutated", "s = spec()\nobject.__setattr__(s, 'tier', 'high')\nreturn s", "plugin-type", "tier must be"),
    field("f_name", "name='Acme'", "name must be an identifier"),
    field("f_name_type", "name=NoRepr()", "name must be an identifier"),
    field("f_summary", "summary=None", "summary must be text, got None"),
    field("f_tier", "tier=0", "tier must be a Tier, got 0"),
    field("f_impls", "implementations=[]", "implementations must be a tuple"),
    field("f_impls_type", "implementations=('x',)", "implementations must be a tuple of Implementation"),
    field("f_hint", "hint=3", "hint must be text, got 3"),
    field("f_api", "api='2'", "api must be an int, got '2'"),
    field("f_api_bool", "api=True", "api must be an int, got True"),
    field("f_probe", "probe=len", "probe must be 'package.module:function'"),
    field("f_requires", "requires='triton'", "requires must be a tuple"),
    field("f_requires_type", "requires=(3,)", "requires must be a tuple"),
    field("f_requires_text", "requires=('triton >= = 3',)", "requires must be PEP 508"),
    field("f_op", "impl=dict(op='Op')", "op must be an identifier"),
    field("f_target", "impl=dict(target='here')", "target must be 'package.module:function'"),
    field("f_refuses", "impl=dict(refuses=len)", "refuses must be 'package.module:function'"),
    field("f_devices", "impl=dict(devices='cpu')", "devices must be a tuple"),
    field("f_devices_list", "impl=dict(devices=['cpu'])", "devices must be a tuple"),
    field("f_devices_tpu", "impl=dict(devices=('tpu',))", "devices must be a tuple of 'cuda' and 'cpu'"),
    field("f_claim", "impl=dict(capability='>=8.0')", "capability must be a tuple"),
    field("f_claim_list", "impl=dict(capability=['>=8.0'])", "capability must be a tuple"),
    field("f_claim_number", "impl=dict(capability=(8.0,))", "capability must be a tuple"),
    field("f_claim_text", "impl=dict(capability=('>>8',))", "capability must be a tuple of specifier sets"),
    field("f_priority", "impl=dict(priority='high')", "priority must be an int, got 'high'"),
    field("f_determinism", "impl=dict(deterministic='yes')", "deterministic must be True or False"),
    field("f_note", "impl=dict(note=None)", "note must be text"),
    probe("p_none", "return None", "did not return a mapping"),
    probe("p_list", "return [d.Build()]", "did not return a mapping"),
    probe("p_values", "return {'mqa_logits': 1}", "did not return Build objects"),
    probe("p_keys", "return {7: d.Build()}", "did not return Build objects"),
    probe("p_reasons", "return {'mqa_logits': d.Build(reasons='broken')}", "reasons must be a tuple of Reason"),
    probe("p_reason", "return {'mqa_logits': d.Build(reasons=('broken',))}", "reasons must be a tuple of Reason"),
    probe("p_owners", "return {'mqa_logits': d.Build(owners='acme')}", "owners must be a tuple of text"),
    probe("p_claim", "return {'mqa_logits': d.Build(capability=['==9.0'])}", "capability must be a tuple"),
    probe("p_name", "return {'mqa_logits': d.Build(name=3)}", "name must be text"),
    probe("p_message", "return {'mqa_logits': d.Build(reasons=(d.Reason('a', 3),))}", "message must be text"),
    probe("p_panic", "raise Panic('rust')", "Panic: rust"),
    probe("p_mute", "raise Mute()", "its message cannot be shown"),
    probe("p_hang", "time.sleep(3600)", "did not finish within 1 s"),
    probe("p_arguments", "return probe()", "TypeError"),
    Kind("t_panic", HOOK + "return spec(impl=dict(target='@M@_target:serve'))", "import-failed", "Panic: rust"),
    Kind("t_missing", HOOK + "return spec(impl=dict(target='@M@:nothing'))", "import-failed", "AttributeError"),
    Kind("t_signature", HOOK + "return spec(impl=dict(target='json:dumps'))", "signature", "json"),
    Kind("t_value", HOOK + "return spec(impl=dict(target='os:name'))", "signature", "no signature"),
    Kind("t_module", HOOK + "return spec(impl=dict(target='nowhere.at:all'))", "module-missing", "nowhere"),
    refuses("r_false", "return False", "returned False, expected a Reason or None"),
    refuses("r_text", "return 'too wide'", "returned 'too wide'"),
    refuses("r_norepr", "return NoRepr()", "a NoRepr without a repr"),
    refuses("r_panic", "raise Panic('rust')", "Panic: rust"),
    refuses("r_mute", "raise Mute()", "its message cannot be shown"),
    Kind(
        "o_prints",
        "print('IMPORT')\nos.write(1, b'RAW')\nos.system('echo CHILD')\nimport ctypes\n"
        "ctypes.CDLL(None).puts(b'FROM C')\nsys.__stdout__.write('KEPT')\n"
        f"{HOOK}print('HOOK')\n    yield spec(probe='@M@:probe', requires=('nothing-of-the-kind',))\n"
        "def probe(load):\n    print('PROBE')\n    return {}\n",
        "distribution-missing",
        "nothing-of-the-kind",
    ),
    Kind(
        "o_surrogate",
        HOOK + "return spec(summary='lone \\udc80 surrogate', requires=('nothing-of-the-kind',), hint='\\ud800')",
        "distribution-missing",
        "\ud800",
    ),
    Kind("o_version", HOOK + "return spec(requires=('odd-version>=3.6',))", "distribution-version", "not-a-version"),
    Kind("o_metadata", HOOK + "return spec(requires=('odd-metadata>=1',))", "distribution", "odd-metadata"),
)

DRIVER = """
import contextlib, io, json, sys
from dsv4_backends.selection import foreign
from dsv4_backends.commands import cli
foreign.LIMIT = 1.0
codes = {}
for name, command in {
    "list": ["list", "--json"], "list text": ["list"], "explain": ["explain", "mqa_logits", "--json"],
    "explain text": ["explain", "mqa_logits"], "plugins": ["plugins", "--json"], "plugins text": ["plugins"],
    "doctor": ["doctor", "--json"], "doctor text": ["doctor"],
    "verify": ["verify", "--op", "hc_prenorm_gemm", "--json"],
}.items():
    print("\\n@@@", name, flush=True)
    codes[name] = cli.main(command)
import torch
from dsv4_backends import CONTRACTS, ops, resolution
from dsv4_backends.runtime import bind
contract = CONTRACTS["mqa_logits"]
arguments = contract.inputs(contract.at_level("smoke")[0], torch.device("cpu"))
ops.mqa_logits(**arguments)
rows = {}
bindings = bind.current()
chain = bindings.chains["mqa_logits", torch.device("cpu")]
for candidate in chain.resolution.candidates:
    rows[candidate.name] = [[r.code, str(r)] for r in candidate.reasons]
print("\\n@@@ rows", flush=True)
print(json.dumps([rows, bind.stats()["mqa_logits"]]))
print("\\n@@@ codes", flush=True)
print(json.dumps(codes))
"""


def install(folder: Path, kind: Kind) -> None:
    """A distribution with that plugin alone."""
    module = f"{kind.name}_plugin"
    source = (HEAD + kind.source).replace("@M@", module).replace("@N@", kind.name)
    points = {"dsv4_backends": {kind.name: module}}
    distribution(folder, f"{kind.name.replace('_', '-')}-kernels", files={f"{module}.py": source}, points=points)


def environment(folder: Path) -> None:
    def odd(name: str, points: bytes = b"", version: str = "1.0", metadata: bytes | None = None) -> None:
        """With bytes as they are."""
        files = {"METADATA": metadata} if metadata is not None else {}
        files |= {"entry_points.txt": points} if points else {}
        distribution(folder, name, version, metadata=files)

    for kind in KINDS:
        install(folder, kind)
    (folder / "t_panic_plugin_target.py").write_text("class Panic(BaseException): pass\nraise Panic('rust')")
    (folder / "d_good.py").write_text(HEAD.replace("@M@", "d_good") + HOOK + "return ()")
    good = b"[dsv4_backends]\n%s = d_good\n"
    odd("d-nometa", good % b"d_nometa")
    (folder / "d_nometa-1.0.dist-info" / "METADATA").unlink()
    odd("d-noname", good % b"d_noname", metadata=b"Metadata-Version: 2.1\n")
    latin = "Metadata-Version: 2.1\nName: d-latin\nVersion: 1.0\nAuthor: \xdc\n".encode("latin-1")
    odd("d-latin", good % b"d_latin", metadata=latin)
    odd("d-points", good % b"d_points" + b"# \xff\xfe\n")
    odd("d-stranger", b"[console_scripts]\n# \xff\n")
    odd("d-malformed", b"[dsv4_backends]\nno equals sign\n")
    odd("d-unclosed", b"[dsv4_backends\nd = d_good\n[other]\na = b\n")
    odd("d-unclosed-second", b"[other]\na = b\n[dsv4_backends\nd = d_good\n")
    odd("d-value", b"[dsv4_backends]\nd_value = not a module!\n")
    odd("odd-metadata", metadata=b"Name: odd-metadata\nVersion: \xff\n")
    odd("odd-version", version="not-a-version")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("hostile")
    environment(folder)
    variables = {n: v for n, v in os.environ.items() if not n.startswith("DSV4_BACKENDS_")}
    child = subprocess.run(
        [sys.executable, "-c", DRIVER],
        env=variables
        | {"PYTHONPATH": str(folder), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
        # torch looks for entry points of its own when it is imported, and raises where one cannot be read.
        | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        timeout=400,
    )
    assert child.returncode == 0, child.stderr.decode(errors="replace")[-4000:]
    parts = child.stdout.decode("utf-8").split("\n@@@ ")
    assert parts[0] == ""
    return {name: text for name, _, text in (part.partition("\n") for part in parts[1:])}


def test_every_command_ends_and_prints_its_answer_alone(outcome: dict[str, Any]) -> None:
    codes = json.loads(outcome["codes"])
    assert codes.pop("verify") == 0
    assert set(codes.values()) <= {0, 1}, codes
    for name in ("list", "explain", "plugins", "doctor", "verify"):
        json.loads(outcome[name])
    everything = "".join(outcome.values())
    for printed in ("IMPORT", "RAW", "CHILD", "FROM C", "KEPT", "HOOK", "PROBE"):
        assert f"\n{printed}" not in everything
    assert "mqa_logits" in outcome["list text"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_row_with_its_cause(outcome: dict[str, Any], kind: Kind) -> None:
    """In `plugins` if loading the plugin fails; otherwise in the reasons of a call of the op."""
    rows, _ = json.loads(outcome["rows"])
    (plugin,) = [p for p in json.loads(outcome["plugins"])["plugins"] if p["name"] == kind.name]
    found = [(r["code"], r["message"]) for r in plugin["problems"]] or [tuple(r) for r in rows[kind.name]]
    if kind.code == "refuses-failed":  # it holds for one call, and the choice stays
        assert found == []
        return
    assert any(code.startswith(kind.code) and kind.words in message for code, message in found), found
    if plugin["problems"]:
        assert kind.name in outcome["plugins text"]
        assert any(
            kind.name in finding["message"] and not finding["ok"]
            for finding in json.loads(outcome["doctor"])["findings"]
        )


def test_the_reference_served(outcome: dict[str, Any]) -> None:
    rows, calls = json.loads(outcome["rows"])
    assert {name for name, count in calls.items() if count} == {"torch"}
    assert rows["torch"] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("d_nometa", ""),
        ("d_noname", ""),
        ("d_latin", ""),
        ("d-points", "entry_points.txt cannot be read"),
        ("d-malformed", "entry_points.txt cannot be read"),
        ("d-unclosed", "entry_points.txt cannot be read: ValueError: the header [dsv4_backends has no closing bracket"),
        ("d-unclosed-second", "entry_points.txt cannot be read"),
        ("d_value", "the entry point 'not a module!' is not module or module:attribute"),
    ],
)
def test_distributions(outcome: dict[str, Any], name: str, words: str) -> None:
    (plugin,) = [p for p in json.loads(outcome["plugins"])["plugins"] if p["name"] == name]
    assert plugin["distribution"]
    assert [words in r["message"] for r in plugin["problems"]] == ([True] if words else [])


def test_a_stranger_of_another_group_is_no_row(outcome: dict[str, Any]) -> None:
    assert "stranger" not in outcome["plugins"]


def test_ctrl_c_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4_backends.selection import foreign

    def interrupted() -> None:
        raise KeyboardInterrupt

    with foreign.as_command(), pytest.raises(KeyboardInterrupt):
        foreign.run(interrupted)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.code == "refuses-failed"], ids=lambda kind: kind.name)
def test_a_broken_refuses_refuses(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pin shows its error, since no other provider may serve."""
    import torch

    from dsv4_backends import CONTRACTS, NoProviderError, ops, reset, use_providers

    install(tmp_path, kind)
    monkeypatch.syspath_prepend(str(tmp_path))
    reset()
    contract = CONTRACTS["mqa_logits"]
    arguments = contract.inputs(contract.at_level("smoke")[0], torch.device("cpu"))
    with use_providers({"mqa_logits": kind.name}), pytest.raises(NoProviderError) as caught:
        ops.mqa_logits(**arguments)
    assert kind.words in str(caught.value)


def test_an_engine_whose_metadata_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4_backends.engines import vllm

    distribution(tmp_path, "vllm", "0.33.0", metadata={"METADATA": b"Name: vllm\nVersion: \xff\n"})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert vllm.version() is None


def test_a_panic_in_a_kernel_is_an_error_of_its_case() -> None:
    class Panic(BaseException):
        """As pyo3's PanicException."""

    def panics(x: int) -> int:
        raise Panic(f"at {x}")

    with pytest.raises(RuntimeError, match="Panic: at 3"):
        foreign.contained(panics, 3)
    with pytest.raises(KeyboardInterrupt):
        foreign.contained(lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
