"""Write the generated parts of the docs and of ``ops.py``: ``python tools/docs.py``. ``--check`` writes nothing.

A generated part is between ``<!-- generated: NAME -->`` and ``<!-- end of generated -->``; in Python the marks are
comments. It is made from the objects that the code uses, so that pages and code agree.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import inspect
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import kept
from kept import Cell
from packaging.version import Version

from dsv4_backends import records
from dsv4_backends.bench import compare, tune
from dsv4_backends.bench import results as bench
from dsv4_backends.bench.provenance import Measured, said_commit
from dsv4_backends.commands import cli, shared
from dsv4_backends.commands import list as list_command
from dsv4_backends.commands import verify as verify_command
from dsv4_backends.contract import CONTRACTS, LEVELS, OpContract, Tolerance
from dsv4_backends.contract.arguments import Form, ScalarArg
from dsv4_backends.runtime import check
from dsv4_backends.selection import machine, plugins, policy, provider, resolve
from dsv4_backends.selection import preferences as measured
from dsv4_backends.selection.capability import describe, sm
from dsv4_backends.selection.survey import Survey

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"((?:<!--|#) generated: (?P<name>\w+)[^\n]*\n).*?((?:<!--|#) end of generated)", re.DOTALL)

WIDTH = 120
"""Columns of the code, as ruff has them."""

SAMPLE_GPU = "8.9"
SAMPLE_PACKAGES = {"torch": "2.13.0", "triton": "3.6.0"}
"""The machine of the README's listing: fixed, so that the page is the same wherever it is made."""

BENCH = "h200-bench.json"
"""The run of ``dsv4-backends bench`` whose figures the docs show."""
BENCH_RANKS = {ranks: f"h200-bench-tp{ranks}.json" for ranks in (2, 4, 8)}
"""The same of one rank of several, for the ops whose sizes depend on their number."""
BENCH_SCALES = "h200-bench-token-major.json"
"""The same of the einsum alone, with the scales as ``bench --scales token-major`` has them."""
BENCH_CODE = "h200-bench-code-sm_80.json"
"""The same of the Triton provider alone, with SM80's instructions (TRITON_OVERRIDE_ARCH)."""
PLAIN_GEMM = "h200-plain-gemm-code-sm_80.json"
TRITON_TIMES = "h200-triton-times.json"
BENCH_PATH = "h200-bench-attention-path.json"
BENCH_PATH_CODE = "h200-bench-attention-path-code-sm_80.json"
SAME_BYTES = "h200-same-bytes.json"
TOPK = "h200-topk.json"
FLOOR = "h200-launch-floor.json"
ACCESS_FLOOR = "h200-access-floor.json"

SERVED_LOGPROBS = "h200-served-logprobs.json"
SERVED_SPEED = "h200-served-speed.json"
SERVED_ONCE = "h200-served-once.json"
FIRST_FALLBACK = {1: 52, 4: 166, 8: 277, 16: 400, 32: 538}
"""Published output tokens a second of vLLM's first Triton fallback (PR #40929), by requests at a time."""
BAR = 1.5
"""The largest distance of a run from native's, as a multiple of vLLM's own noise."""
FLASH_ON = (
    ("8x A100", "8.0", 8, 80, 0.92, 131072),
    ("8x 3090", "8.6", 8, 24, 0.95, 32768),
    ("4x 4090", "8.9", 4, 24, 0.92, 32768),
    ("2x RTX PRO 6000", "12.0", 2, 96, 0.92, 131072),
    ("4x H100", "9.0", 4, 80, 0.92, 131072),
    ("2x H100", "9.0", 2, 80, 0.92, 131072),
)
"""Machines that serve Flash: capability, ranks, GiB of a GPU, the share of it that vLLM takes, longest context."""

ADVICE = {
    "capability": "Nothing, if another provider serves the op: `list` names it. Otherwise look for one that "
    "covers your GPU.",
    "batch-variant": "Nothing, if results may depend on the batch; else install one that claims batch invariance.",
    "slower-kernels": "Install a version of Triton that has the names in the message.",
    "cache-unusable": "Set TRITON_CACHE_DIR to a directory that can be written and has free space.",
    "notices-failed": "Report it to the provider's author.",
    "device-type": "Nothing, unless you expected a GPU: `doctor` shows the driver's answer.",
    "distribution-missing": "Install what the hint names.",
    "distribution-version": "Upgrade or pin the distribution that the message names.",
    "module-missing": "Reinstall the provider's package: its metadata is there and its code is not.",
    "import-failed": "Read the message of the import. A usual cause is a CUDA or torch version "
    "that the library was not built for.",
    "signature": "Report it to the provider's author: the conformance suite finds it.",
    "library-owners": "Uninstall all distributions that the hint names, then install one of them.",
    "library-kernels": "Install a build with these kernels: the hint names some.",
    "library-load": "Read the message of the import. Usually the build was made for another torch, CUDA or Python; "
    "install one that was made for yours.",
    "library-symbol": "Upgrade the library, or dsv4-backends.",
    "library-signature": "Upgrade dsv4-backends; if there is no newer one, report it with the message.",
    "compiler-missing": "Install the CUDA toolkit, and set `CUDA_HOME` if it is not in `/usr/local/cuda`.",
    "probe-failed": "Report it to the provider's author: the message has the cause.",
    "untested": "Run `dsv4-backends verify --op OP --provider NAME`. If it passes, pin the op to the provider.",
    "experimental": "Pin it, name it in the order, or set `DSV4_BACKENDS_EXPERIMENTAL=1`.",
    "denied": "Remove the name from `DSV4_BACKENDS_DENY`, or from `use_providers(deny=...)`.",
    "not-allowed": "Add the name to `DSV4_BACKENDS_ALLOW`, or unset it.",
    "not-pinned": "Nothing, or remove the pin.",
    "device": "Run one process for each GPU, as engines do. The next provider serves the other GPUs.",
    "shape": "Nothing: the next provider serves the call. The log has one line about it.",
    "refuses-failed": "Report it to the author of the provider.",
    "shape-unknown": "Run `check` on the machine with the GPU.",
    "no-provider": "Read the message: it has every provider's reason.",
    "engine-missing": "Install the engine in the same environment.",
    "engine-version": "Use a version that the message names, or set `DSV4_BACKENDS_ENGINE=force` and test.",
    "engine-target": "Report it: a release of the engine has changed this name.",
    "engine-arch": "Nothing: the engine's own function stays in place.",
    "engine-reference": "Install a faster provider (the hint says what is missing), or pin the reference.",
    "engine-served": "Nothing.",
    "engine-option": "Nothing, or set the variable that the hint names.",
    "engine-failed": "Report it with the message.",
    "plugin-metadata": "Reinstall the distribution that the row names.",
    "plugin-import": "Read the message; repair or uninstall the package, or deny it.",
    "plugin-hook": "Report it to the plugin's author, or deny it.",
    "plugin-failed": "Report it to the plugin's author, or deny it.",
    "plugin-type": "Report it to the plugin's author. Good objects from the same hook still serve.",
    "plugin-duplicate": "Uninstall one of the two packages. The one that the message names keeps the name.",
    "plugin-api": "Upgrade dsv4-backends.",
    "engine-source": "Install the version that the hint names, or look for a newer dsv4-backends.",
    "engine-model": "Nothing: the engine's own code serves the model.",
    "engine-dtype": "Nothing, or use a bf16 model, and do not turn FP8 off.",
    "engine-mode": "Follow the hint, or disable the integration for that call.",
    "engine-state": "Follow the hint. First undo other replacements of a module's `forward`.",
}
"""What a user does about each reason code."""


# --------------------------------------------------------------------------------------------------- Markdown


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def markdown(text: str) -> str:
    """A docstring's text as Markdown: literals, and the literal blocks that ``::`` begins."""
    blocks: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if blocks and blocks[-1].endswith("::") and block.startswith("    "):
            blocks[-1] = blocks[-1].removesuffix(":")
            blocks.append(f"```text\n{textwrap.dedent(block)}\n```")
        else:
            blocks.append(block.replace("``", "`"))
    return "\n\n".join(blocks)


def sections(doc: str) -> dict[str, str]:
    """A docstring's text under ``""``, and the text under ``Args:`` and its like."""
    found: dict[str, str] = {"": ""}
    name = ""
    for line in inspect.cleandoc(doc).splitlines():
        if match := re.fullmatch(r"(Args|Returns|Raises|Attributes):", line):
            name = match[1]
        elif line and not line.startswith(" ") and name:
            name = ""
        found[name] = f"{found.get(name, '')}{line}\n"
    return found


def entries(section: str) -> Iterator[tuple[str, str]]:
    """``name: text`` pairs of a section; a text goes on in lines that are indented further."""
    body = section.partition("\n")[2]
    for match in re.finditer(r"^    (\w[\w, ]*): (.*(?:\n {5,}.*)*)", body, re.MULTILINE):
        for name in match[1].split(", "):
            yield name, " ".join(match[2].split()).replace("``", "`")


def fields(cls: type) -> str:
    """A dataclass's attributes with their defaults."""
    parameters = inspect.signature(cls).parameters
    rows = []
    for name, text in entries(sections(cls.__doc__ or "")["Attributes"]):
        default = parameters[name].default
        shown = "required" if default is inspect.Parameter.empty else code(repr(default))
        rows.append((code(name), shown, text))
    return table(("field", "default", "meaning"), rows)


# -------------------------------------------------------------------------------------------------- contracts


def _summary(contract: OpContract) -> str:
    """The first sentence of a docstring."""
    text = " ".join(sections(contract.function.__doc__ or "")[""].split("\n\n")[0].split())
    return re.split(r"(?<=\.) |::", text)[0].replace("``", "`").rstrip(".")


def _source(contract: OpContract) -> str:
    match = re.search(r"^Source: (.+)\.$", inspect.cleandoc(contract.function.__doc__ or ""), re.MULTILINE)
    return match[1].replace("``", "`") if match else ""


def ops() -> str:
    rows = [(f"[`{c.name}`](#{c.name})", _summary(c), _source(c)) for c in CONTRACTS.values()]
    return table(("op", "what it computes", "native functions"), rows)


def functions() -> str:
    """The public functions of ``ops.py``: signature and docstring are the contract's own text."""
    return "\n\n".join(map(_function, CONTRACTS.values()))


def _function(contract: OpContract) -> str:
    source = inspect.getsource(contract.function)
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.FunctionDef)
    head = "".join(source.splitlines(keepends=True)[: definition.body[0].end_lineno])
    passed = [f"{name}={name}" if contract.is_keyword(name) else name for name in contract.args]
    # As ruff formats it.
    line = f"    return _{contract.name}({', '.join(passed)})"
    if len(line) > WIDTH:
        line = f"    return _{contract.name}(\n        {', '.join(passed)}\n    )"
    if max(map(len, line.splitlines())) > WIDTH:
        line = "\n".join([f"    return _{contract.name}(", *(f"        {each}," for each in passed), "    )"])
    return f'_{contract.name} = _define(CONTRACTS["{contract.name}"])\n\n\n{head}{line}\n'


def _form(form: Form) -> str:
    when = f" where `{form.when}`" if form.when else ""
    return f"{form.dtypes.replace(' ', ' / ')} `[{form.shape.strip()}]`{when}"


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _argument(contract: OpContract, name: str) -> tuple[str, str, str, str]:
    arg = contract.args[name]
    parameter = contract.signature.parameters[name]
    described = dict(entries(sections(contract.function.__doc__ or "")["Args"]))[name]
    # The form has its own column, so it is cut from the beginning of a text.
    shapes = r"(?:`\[[^`]*\]`(?:,? or )?)+"
    end = r"(?:,? to write [\w ]*to[;.] ?|[;,.] ?)"
    described = re.sub(rf"^(?:\w+(?:, \w+)*(?: or \w+)? {shapes}(?:, or )?)+{end}", "", described).rstrip(".")
    if described.startswith("or ") or _words(described) <= _words(arg.about):
        described = ""
    about = ", ".join(part for part in re.split("[;,] ", arg.about) if not _words(part) <= _words(described))
    if isinstance(arg, ScalarArg) and described:
        about = ""
    meaning = "; ".join(filter(None, (about, described)))
    if isinstance(arg, ScalarArg):
        form = arg.kind + ("" if arg.minimum is None else f", at least {arg.minimum}")
        layout = ""
    else:
        form, layout = "<br>".join(map(_form, arg.forms)), arg.layout
    optional = "" if parameter.default is inspect.Parameter.empty else ", optional"
    return f"{code(name)}{optional}", form, layout, meaning


def _number(value: float) -> str:
    if value in (0.0, float("inf")):
        return ""
    mantissa, exponent = math.frexp(value)
    return f"2^{exponent - 1}" if mantissa == 0.5 else f"{value:g}"


def _tolerance(name: str, tolerance: Tolerance) -> tuple[str, ...]:
    numbers = (tolerance.rtol, tolerance.atol, tolerance.atol_rms, tolerance.calc_diff)
    return (code(name), *map(_number, numbers), tolerance.why)


def _buffer(contract: OpContract, name: str) -> str:
    if name not in contract.buffers:
        return ""
    return f"{code(name)}, written in place" if contract.in_place else code(name)


def _contract(contract: OpContract) -> str:
    doc = sections(contract.function.__doc__ or "")
    meaning = re.sub(r"\nSource: .+\n", "\n", doc[""])
    results = dict(entries(doc["Returns"]))
    if not results:  # a single result has no name
        text = " ".join(doc["Returns"].partition("\n")[2].split())
        results = {contract.returns[0]: text.replace("``", "`")}
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in contract.signature.parameters.values()]
    arguments = [_argument(contract, name) for name in contract.args]
    parts = [
        f"### {contract.name}",
        f"```text\n{contract.name}{inspect.Signature(bare)} -> {', '.join(results)}\n```",
        markdown(meaning),
        table(("argument", "form that is checked", "layout", "meaning"), arguments),
    ]
    if contract.rules:
        rules = (f"- {code(r.argument)}: {r.expected} ({code(r.expression)})" for r in contract.rules)
        parts.append("Checked as well:\n\n" + "\n".join(rules))
    if contract.values:
        rows = [
            (code(v.argument), code(v.low), code(v.high), code(f"column < {v.used}") if v.used else "", v.otherwise)
            for v in contract.values
        ]
        parts.append(table(("values of", "from", "to", "where", "any other value"), rows))
    assert tuple(results) == contract.returns, (contract.name, "a result and its buffer have one name")
    parts.append(
        table(
            ("result", "what comes back", "buffer"),
            ((code(name), results[name].rstrip("."), _buffer(contract, name)) for name in results),
        )
    )
    rows = [_tolerance(name, contract.tolerances[name]) for name in results]
    parts.append(table(("tolerance of", "`rtol`", "`atol`", "`atol_rms`", "`calc_diff`", "why"), rows))
    counts = ", ".join(f"{len(contract.at_level(level))} {level}" for level in LEVELS)
    parts.append(f"Cases: {counts}. Native functions: {_source(contract)}.")
    return "\n\n".join(parts)


def contracts() -> str:
    return "\n\n".join(map(_contract, CONTRACTS.values()))


def cases() -> str:
    rows = [(code(c.name), *(str(len(c.at_level(level))) for level in LEVELS)) for c in CONTRACTS.values()]
    totals = [str(sum(len(c.at_level(level)) for c in CONTRACTS.values())) for level in LEVELS]
    return table(("op", *LEVELS), [*rows, ("all", *totals)])


def layouts() -> str:
    from dsv4_backends.contract import layouts as module  # needs torch

    return markdown(inspect.cleandoc(module.__doc__ or "").partition("\n\n")[2])


# --------------------------------------------------------------------------------------- settings and reasons


def environment() -> str:
    rows = ((code(name), meaning.replace("*", "\\*")) for name, meaning in policy.VARIABLES.items())
    return table(("variable", "meaning"), rows)


def reasons() -> str:
    rows = [(code(name), meaning, ADVICE[name]) for name, meaning in provider.REASONS.items()]
    return table(("code", "meaning", "what to do"), rows)


def tiers() -> str:
    # A comment under a member is not kept at run time, so it is read from the source.
    source = inspect.getsource(provider.Tier)
    members = re.findall(r'(\w+) = \d+\n\s+"""(.+?)"""', source)
    rows = ((code(name.lower()), text.replace("``", "`")) for name, text in members)
    return table(("tier", "meaning"), rows)


# ------------------------------------------------------------------------------------------- command and list


def _parsers(parser: argparse.ArgumentParser, above: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command with its parser, a command of a command too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield f"{above}{name}", sub
                yield from _parsers(sub, f"{above}{name} ")


def exit_codes() -> str:
    """What exit code 1 of each command means."""
    rows = ((code(name), shared.FINDINGS[name] or "never") for name, _ in _parsers(cli.parser()))
    return table(("command", "exit code 1"), rows)


def commands() -> str:
    rows = []
    for name, sub in _parsers(cli.parser()):
        words = [f"dsv4-backends {name}"]
        for action in sub._actions:
            if action.dest == "help" or isinstance(action, argparse._SubParsersAction):
                continue
            shown = str(action.metavar or "|".join(map(str, action.choices or ())) or action.dest.upper())
            flag = action.option_strings[0] if action.option_strings else ""
            if action.nargs == 0:
                words.append(f"[{flag}]")
            else:
                words.append(f"[{flag} {shown}]" if flag else shown)
        rows.append((code(" ".join(words)), sub.description or ""))
    return table(("command", "what it does"), rows)


def _in_tree() -> plugins.Plugins:
    return plugins.Plugins(tuple(p for p in plugins.load().plugins if p.distribution == plugins.IN_TREE))


def _probe_module(spec: provider.ProviderSpec) -> Any:
    """The module that looks for a provider's library; None without one."""
    return None if spec.probe is None else importlib.import_module(spec.probe.partition(":")[0])


def providers() -> str:
    rows = []
    for spec in sorted(_in_tree().providers, key=lambda spec: (spec.tier, spec.name)):
        served = {i.op for i in spec.implementations}
        where = set()
        for implementation in spec.implementations:
            if "cuda" in implementation.devices:
                claim = getattr(_probe_module(spec), "KNOWN", implementation.capability)
                where.add("any NVIDIA GPU" if claim == (">=0",) else f"compute capability {describe(claim)}")
            if "cpu" in implementation.devices:
                where.add("CPU")
        count = "all" if served == set(CONTRACTS) else ", ".join(code(op) for op in CONTRACTS if op in served)
        owners = list(getattr(_probe_module(spec), "DISTRIBUTIONS", ()))
        some = [f"one of {', '.join(map(code, owners))}"] if owners else []
        needs = ", ".join([*map(code, spec.requires), *some]) or "-"
        rows.append((code(spec.name), spec.tier.label, count, ", ".join(sorted(where)), needs, spec.summary))
    return table(("provider", "tier", "ops", "runs on", "needs", "description"), rows)


def listing() -> str:
    """What ``list`` prints for a fixed machine and our own providers."""
    version = Version(SAMPLE_GPU)
    gpu = machine.simulate(SAMPLE_GPU).gpus[0]
    here = machine.Machine((gpu,), installed=SAMPLE_PACKAGES, simulated=True)
    loaded = _in_tree()
    choices = _choices(gpu, SAMPLE_PACKAGES, loaded, _builds(loaded, {}))
    shown = list_command.text(Survey(here, loaded, ((gpu, choices),)))
    return f"```console\n$ dsv4-backends list --device sm_{version.major}{version.minor}\n{shown}\n```"


# --------------------------------------------------------------------------------------------------- engines


def targets() -> str:
    return _targets("vllm", "vLLM")


def sglang_targets() -> str:
    return _targets("sglang", "SGLang")


def _targets(name: str, title: str) -> str:
    from dsv4_backends.engines import load
    from dsv4_backends.engines.patching import Target
    from dsv4_backends.selection.capability import describe

    def where(target: Target) -> str:
        words = [describe(target.lacking)] if target.lacking else []
        words += [f"without {code(target.without)}"] if target.without else []
        words = [" or ".join(words)] if words else []
        return ", ".join([*words, *([f"option {code(target.option)}"] if target.option else [])])

    rows = ((code(t.key.replace(":", ".")), t.about, code(t.op), where(t)) for t in load(name).targets)
    return table(("replaced", f"role in {title}", "op", "only"), rows)


def compat() -> str:
    from dsv4_backends import compat as package  # needs torch

    rows = []
    for library in package.LIBRARIES:
        ours = getattr(package, library)
        for name in ours.__all__:
            text = inspect.cleandoc(getattr(ours, name).__doc__ or "").split("\n\n")[0].replace("``", "`")
            rows.append((code(f"{library}.{name}"), " ".join(text.split()).rstrip(".")))
    return table(("name", "what it does"), rows)


# ----------------------------------------------------------------------------------------- writing a provider


def provider_fields() -> str:
    return fields(provider.ProviderSpec)


def implementation_fields() -> str:
    return fields(provider.Implementation)


def checks() -> str:
    from dsv4_backends.testing import checks as module  # needs torch

    functions = {"signature": module.check_signature, "coverage": module.check_coverage, **module.CHECKS}
    rows = ((code(name), (f.__doc__ or "").replace("``", "`")) for name, f in functions.items())
    return table(("check", "what must hold"), rows)


def _kept(name: str) -> Path:
    return ROOT / "docs" / "results" / name


def _all_kept(cls: type[T], before: str, after: str = "") -> list[tuple[str, T]]:
    """Every file of a kind, with what its name says between the two parts, the GPU apart."""
    found = sorted(_kept("").glob(f"*-{before}*{after}.json"))
    return [(path.stem.partition(f"-{before}")[2], records.read(cls, path)) for path in found]


def _measured_on(result: Measured) -> str:
    """Where, when and how a result file was made."""
    host = result.machine
    packages = ", ".join(f"{name} {version}" for name, version in host.packages.items())
    return (
        f"Measured on {result.date}: {host.devices[0].name}, Python {host.python}, {packages}, "
        f"{said_commit(result.commit)}. To redo it: `{result.command}`."
    )


def overhead() -> str:
    result = records.read(kept.Overhead, _kept("h200-overhead.json"))
    rows = [
        (code(r.op), str(r.tensors), *(f"{us:.2f}" for us in (r.direct_us, r.call_us, r.added_us, r.check_us)))
        for r in result.rows
    ]
    header = ("op", "tensors", "direct, µs", "through `dsv4_backends.ops`, µs", "added, µs", "whole check, µs")
    return f"{_measured_on(result)}\n\n{table(header, rows)}"


def verified() -> str:
    result = records.read(verify_command.Report, _kept("h200-verify-torch.json"))
    rows = [
        (
            code(r.op) if index == 0 else "",
            f"{r.cases - len(r.failures)} of {r.cases}" if index == 0 else "",
            code(name),
            f"{error.share:.2g}",
            f"{error.calc_diff:.1g}",
        )
        for r in result.rows
        for index, (name, error) in enumerate(r.errors.items())
    ]
    header = ("op", "passed", "result", "worst error, share of the tolerance", "worst calc_diff")
    return f"{_measured_on(result)}\n\n{table(header, rows)}"


def performance() -> str:
    """The tables of a kept run of ``bench``, one for each op: a column for each provider."""
    result = _judged(BENCH)
    rates = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in records.plain(result.rates).items())
    made_of = "; ".join(
        f"`{name}` with {', '.join(f'{n} {v}' for n, v in versions.items())}"
        for name, versions in result.providers.items()
        if versions
    )
    parts = [_measured_on(result), f"Measured in the same run: {rates}. Providers: {made_of or 'see above'}."]
    parts += _bench_tables(result)
    return "\n\n".join([*parts, f"{bench.verdict(result.rows)}."])


def performance_ranks() -> str:
    """One rank of several: how the Triton provider compares with the library over the rows of an op."""
    results = {ranks: _judged(name) for ranks, name in BENCH_RANKS.items()}
    lines = []
    for ranks, result in results.items():
        for op in CONTRACTS:
            rows = [row for row in result.rows if row.op == op and len(row.rivals) == 2 and "triton" in row.rivals]
            if not rows:
                continue
            (native,) = rows[0].rivals.keys() - {"triton"}
            found = sorted((row.rivals[native] / row.rivals["triton"], row.name) for row in rows)
            middle = statistics.median(ratio for ratio, _ in found)
            numbers = (f"{found[0][0]:.2f}", found[0][1], f"{middle:.2f}", f"{found[-1][0]:.2f}")
            lines.append((str(ranks), code(op), code(native), str(len(rows)), *numbers))
    header = ("ranks", "op", "library", "rows", "least", "on", "median", "most")
    judged = [row for result in (_judged(BENCH), *results.values()) for row in result.rows]
    measured_on = "\n".join(f"- {_measured_on(result)}" for result in results.values())
    return f"{measured_on}\n\n{table(header, lines)}\n\nWith the rows above, {bench.verdict(judged)}."


def _judged(name: str) -> bench.Result:
    """A kept run of ``bench``, with the choice that the shipped table makes."""
    result = bench.read(_kept(name))
    return tune.chosen(measured.read(measured.FOLDER / "sm_90.json"), result)


def performance_scales() -> str:
    """The einsum's table with scales that DeepGEMM has to transpose."""
    result = _judged(BENCH_SCALES)
    return "\n\n".join([_measured_on(result), *_bench_tables(result)])


def performance_code() -> str:
    """What the kernels for SM80 take with SM80's own instructions."""
    result = bench.read(_kept(BENCH_CODE))
    return "\n\n".join([_measured_on(result), *_bench_tables(result)])


def plain_gemm() -> str:
    """Two ops next to a plain GEMM, with SM80's instructions."""
    result = records.read(kept.PlainGemm, _kept(PLAIN_GEMM))
    rows = [
        (code(r.op), r.name, f"{r.us:.1f}", f"{r.tflops:.0f}", f"{r.plain:.0f}", f"{r.tflops / r.plain:.2f}")
        for r in result.rows
    ]
    header = ("op", "row", "`triton`, µs", "its TFLOP/s", "the GEMM's", "ratio")
    return f"{_measured_on(result)}\n\n{table(header, rows)}"


def performance_triton() -> str:
    """How the times move from one release of Triton to another: by op and provider, and the rows that moved."""
    result = records.read(kept.TritonTimes, _kept(TRITON_TIMES))
    by: dict[tuple[str, str], list[float]] = {}
    for row in result.rows:
        by.setdefault((row.op, row.provider), []).append(row.after / row.before)
    lines = [
        (code(op), code(name), str(len(found)), *(f"{of(found):.3f}" for of in (min, statistics.median, max)))
        for (op, name), found in by.items()
    ]
    moved = [
        (code(r.op), r.row, code(r.provider), f"{r.before:.1f}", f"{r.after:.1f}", f"{r.after / r.before:.2f}")
        for r in result.rows
        if abs(r.after / r.before - 1) > compare.NOISE
    ]
    after = result.machine.packages["triton"]
    ratios = table(("op", "provider", "rows", "least", "median", "most"), lines)
    names = ("op", "row", "provider", f"Triton {result.before}, µs", f"{after}, µs", "ratio")
    return "\n\n".join(
        [
            f"{_measured_on(result)} The other release: {result.before}.",
            f"Time with {after} divided by that with {result.before}:",
            ratios,
            f"The table of the measured choice was made with {result.before}. With {after}, {result.choice}.",
            f"Rows that moved by more than {compare.NOISE:.0%}:",
            table(names, moved),
        ]
    )


def performance_path() -> str:
    """The ops around attention next to vLLM's own kernels, as far as they are kept."""
    parts = []
    for name, of in ((BENCH_PATH, "As itself"), (BENCH_PATH_CODE, "With SM80's instructions")):
        result = bench.read(_kept(name))
        parts += [f"**{of}.** {_measured_on(result)}", *_bench_tables(result)]
    return "\n\n".join(parts)


def same_bytes() -> str:
    """How many bytes of our results are not those of vLLM's kernels, by op and result."""
    result = records.read(kept.SameBytes, _kept(SAME_BYTES))
    rows = [(code(r.op), code(r.result), str(r.calls), f"{r.written:,}", str(r.differ)) for r in result.rows]
    return f"{_measured_on(result)}\n\n{table(('op', 'result', 'calls', 'bytes written', 'that differ'), rows)}"


def topk_times() -> str:
    """The top-k ops next to the two calls that they replace."""
    result = records.read(kept.Topk, _kept(TOPK))
    rows = [
        (code(r.op), r.name, f"{r.us:.1f}", f"{r.two_calls_us:.1f}", f"{r.two_calls_us / r.us:.2f}")
        for r in result.rows
    ]
    header = ("op", "row", "`triton`, µs", "logits and `torch.topk`, µs", "speed-up")
    return f"{_measured_on(result)}\n\n{table(header, rows)}"


def launch_floor() -> str:
    """Small calls next to empty kernels of the same grids, and to such with dependent reads."""
    result = records.read(kept.Floor, _kept(FLOOR))

    rows = [
        (
            code(r.op),
            r.name,
            f"{r.call:.1f}",
            *(f"{r.call - us:+.1f}" for us in (r.empty, r.two, r.three)),
            str(r.launches),
        )
        for r in result.rows
    ]
    header = ("op", "row", "call, µs", "over empty kernels", "over two reads", "over three reads", "launches")
    return f"{_measured_on(result)}\n\n{table(header, rows)}"


def access_floor() -> str:
    """Calls next to kernels that move the same bytes, and to such that make the same loads and stores."""
    if not _kept(ACCESS_FLOOR).exists():
        return "Not measured."
    result = records.read(kept.Floor, _kept(ACCESS_FLOOR))
    rows = [
        (
            r.name,
            *(f"{us:.1f}" for us in (r.floor, r.stream, r.access, r.call)),
            *(f"{r.call / us:.2f}" for us in (r.floor, r.access)),
        )
        for r in result.rows
        if r.floor and r.stream and r.access
    ]
    times = ("floor, µs", "same bytes, µs", "loads and stores, µs", "call, µs")
    header = ("row", *times, "call / floor", "call / loads and stores")
    return f"{_measured_on(result)}\n\n{table(header, rows)}"


def _bench_tables(result: bench.Result) -> list[str]:
    parts = []
    for op in CONTRACTS:
        rows = [row for row in result.rows if row.op == op]
        names = list(dict.fromkeys(timing.label for row in rows for timing in row.timings))
        if not names:
            continue
        lines = []
        for row in rows:
            times, rivals = row.timed, row.rivals
            cells = []
            for name in names:
                us = times.get(name)
                share = f"{result.rate(row, us).floor_share:.0%}" if us else ""
                cells.append(f"{us:.1f} ({share})" if us else "-")
            best = min(rivals, key=lambda name: rivals[name], default="")
            reached = result.rate(row, times[best]) if best else None
            speed = f"{reached.tflops:.4g}, {reached.gbps:.0f}" if reached else "-"
            auto = row.auto or "-"
            ratio = f" ({times[best] / times[auto]:.2f})" if auto in times and len(rivals) > 1 else ""
            lines.append((row.name, *cells, speed, code(auto) + ratio))
        header = ("row", *(f"`{name}`, µs" for name in names), "best: TFLOP/s, GB/s", "auto (best time / its time)")
        parts += [f"#### {op}", table(header, lines)]
    return parts


def measured_choice() -> str:
    """The tables that are shipped."""
    parts = []
    for path in sorted(measured.FOLDER.glob("*.json")):
        made = measured.read(path)
        made_by = [
            f"{source.device}, {source.date}, {', '.join(f'{n} {v}' for n, v in source.packages.items())}, "
            f"{said_commit(source.commit)}: `{source.command}`"
            for source in made.sources
        ]
        rows = [(code(p.op), p.where.replace("<", "&lt;"), code(p.prefer), code(p.over), p.ratios) for p in made.named]
        header = ("op", "where", "prefer", "over", "speed-up, at least")
        parts.append(
            f"Compute capability {made.capability}, measured on {'; '.join(made_by)}:\n\n{table(header, rows)}"
        )
    return "\n\n".join(parts) or "No table comes with this version: the order of the tiers holds everywhere."


def native_builds() -> str:
    """The distributions that the probes find."""
    rows = []
    for spec in _in_tree().providers:
        if (module := _probe_module(spec)) is None:
            continue
        for name, versions in module.DISTRIBUTIONS.items():
            rows.append((code(spec.name), code(f"{name}{versions}"), code(spec.name)))
        for name, path in module.VENDORED.items():
            rows.append((code(spec.name), f"{code(name)}, which brings a copy", code(path)))
    return table(("provider", "distribution", "module"), sorted(rows, key=lambda row: row[0]))


def native_listings() -> str:
    """The output of ``list`` with each release line installed, on the machines that the suite ran on."""
    shown = []
    for line, made in _all_kept(kept.Conformance, "native-conformance-"):
        if "--torch-device" in made.command:  # the builds of another line, once more
            continue
        text = list_command.text(_with_libraries(made))
        name, when = made.machine.devices[0].name, f"tested on {made.date}, {said_commit(made.commit)}"
        shown.append(f"With the {line} builds, {name} ({when}):\n\n```console\n$ dsv4-backends list\n{text}\n```")
    return "\n\n".join(shown) or "Not kept yet."


def _with_libraries(made: kept.Conformance) -> Survey:
    """The choice on the GPU of a run, with its packages and its builds of native libraries."""
    gpu = made.machine.devices[0]
    installed = {name: made.machine.packages[name] for name in ("torch", "triton")}
    loaded = _in_tree()
    builds = _builds(loaded, made.libraries)
    return Survey(machine.Machine((gpu,), installed), loaded, ((gpu, _choices(gpu, installed, loaded, builds)),))


def _builds(loaded: plugins.Plugins, libraries: Mapping[str, str]) -> Mapping[str, Mapping[str, provider.Build]]:
    """What the probes find where these builds of libraries are installed, by provider, and no others."""
    builds = {}
    for spec in loaded.providers:
        if (probe := _probe_module(spec)) is None:
            continue
        build = libraries.get(spec.name, "")
        reason = provider.Reason("distribution-missing", f"{spec.name} is not installed", probe.HINT)
        found = provider.Build(name=build, capability=probe.KNOWN, reasons=() if build else (reason,))
        builds[spec.name] = dict.fromkeys(CONTRACTS, found)
    return builds


def _choices(
    gpu: machine.Device,
    installed: Mapping[str, str],
    loaded: plugins.Plugins,
    builds: Mapping[str, Mapping[str, provider.Build]] | None = None,
) -> tuple[resolve.Resolution, ...]:
    made = functools.partial(resolve.resolve, builds=builds, findable=lambda _: True)
    known = measured.preferences(gpu)
    return tuple(made(op, gpu, installed, loaded.providers, policy.Policy(), preferences=known) for op in CONTRACTS)


def _conformance(which: str) -> str:
    """The kept results of the conformance suite: a row for each file."""
    rows, header, usual = [], "", None
    for _, result in _all_kept(kept.Conformance, which):
        header = header or f"{_measured_on(result)}\n\n"
        triton = result.machine.packages.get("triton")
        usual = usual or triton
        counts = result.counts
        cells = (counts["passed"], counts["failed"], result.refused, counts["skipped"] - result.refused)
        simulated = result.machine.devices[0].name
        if "TRITON_OVERRIDE_ARCH" in result.command:
            simulated += ", its instructions too"
        label = ", ".join(result.libraries.values()) or simulated
        if "--torch-device" in result.command:
            label += "; tensors on cuda:1, cuda:0 current"
        if triton != usual:
            label += f"; Triton {triton}"
        if not result.complete:
            label += "; ended by its time limit"
        ops = ", ".join(code(op) for op in re.findall(r"--op (\w+)", result.command)) or "all of that commit"
        rows.append((label, ops, said_commit(result.commit), result.level, *map(str, cells)))
    names = ("builds", "ops", "commit", "level", "passed", "failed", "refused by shape", "skipped otherwise")
    return f"{header}{table(names, rows)}" if rows else "Not run yet."


def native_conformance() -> str:
    """The results of the conformance suite for each release line."""
    return _conformance("native-conformance-")


def triton_conformance() -> str:
    """Those of the Triton provider: with its kernels for the GPU, and with those of other architectures."""
    return _conformance("triton-conformance-")


def native_overhead() -> str:
    """What the adapters add, worst row of each op and mode, by release line."""
    rows, header = [], ""
    for line, result in _all_kept(kept.NativeOverhead, "native-overhead-"):
        header = header or f"{_measured_on(result)}\n\n"
        measured = [row for row in result.rows if not row.error]
        for op in CONTRACTS:
            for mode in ("step", "call"):
                found = [row for row in measured if (row.op, row.mode) == (op, mode)]
                if found:
                    gpu = max(found, key=lambda row: row.gpu_added_percent)
                    host = max(row.host_added_us for row in found)
                    cells = (f"{gpu.gpu_added_percent:.1f}", gpu.case, f"{host:.1f}")
                    rows.append((line, code(op), mode, str(len(found)), *cells))
    names = ("builds", "op", "mode", "sizes", "GPU time added at worst, %", "at", "host time added at worst, µs")
    return f"{header}{table(names, rows)}" if rows else "Not measured yet."


def vllm_runs() -> str:
    """The kept results of the tests over the real vLLM on a GPU: a row for each choice of providers."""
    parts = []
    for _, result in _all_kept(kept.VllmRuns, "engine-vllm"):
        rows = []
        for name, run in result.runs.items():
            bad = run.failures + run.errors
            calls = [
                f"{code(op)} {', '.join(f'{who} {count}' for who, count in sorted(by.items()))}"
                for op, by in run.served.items()
            ]
            passed = run.tests - run.skipped - bad
            rows.append((name, str(passed), str(bad), str(run.skipped), "; ".join(calls)))
        names = ("providers", "passed", "failed", "skipped", "calls of each op, and who served them")
        parts.append(f"{_measured_on(result)} vLLM {result.vllm}.\n\n{table(names, rows)}")
    return "\n\n".join(parts) or "Not run yet."


def flash_on() -> str:
    """What Flash's weights take on a rank of each machine, and what is left."""
    rows = []
    for name, capability, tp, gib, share, context in FLASH_ON:
        (made,) = check.check("flash", tp=tp, max_model_len=context, device=f"sm_{capability.replace('.', '')}")
        assert made.memory is not None
        weights, taken = (made.memory.weights or 0) / 2**30, share * gib
        left = f"{taken - weights:.1f} GiB" if taken - weights >= 0.05 else f"none: {weights - taken:.1f} GiB too much"
        one = f"{made.memory.sequence / 2**30:.2f} GiB for {context}"
        rows.append((name, capability, str(tp), f"{weights:.1f} GiB", f"{taken:.1f} of {gib} GiB ({share})", left, one))
    header = (
        "machine",
        "capability",
        "TP",
        "weights of a rank",
        "vLLM takes of a GPU",
        "left",
        "cache of one sequence",
    )
    return table(header, rows)


def _served(name: str, cls: type[T]) -> T | None:
    return records.read(cls, _kept(name)) if _kept(name).exists() else None


def _model(result: kept.Served) -> str:
    """What was served, and on what."""
    what = f"vLLM {result.vllm}, {result.layers} layers, {result.experts} experts in {result.weights}"
    return f"{_measured_on(result)} {what}"


def _distance(found: kept.Distance) -> tuple[str, str, str]:
    return f"{found.mean:.4f}", f"{found.max:.2f}", f"{found.top1:.2%}"


def served_logprobs() -> str:
    """How far each run's logprobs are from native's, beside native's distance from itself."""
    result = _served(SERVED_LOGPROBS, kept.ServedLogprobs)
    if result is None:
        return "Not measured."
    own = [noise.mean for noise in result.noise]
    rows = [("native", noise.composition, *_distance(noise), *("" for _ in own)) for noise in result.noise]
    rows += [
        (code(p.run), p.composition, *_distance(p), *(f"{p.mean / mean:.2f}" for mean in own)) for p in result.pairs
    ]
    verdict = "\n".join(
        f"- Above {BAR} times `native`'s own difference with {code(noise.composition)}: {', '.join(over) or 'none'}."
        for noise in result.noise
        for over in [sorted({code(p.run) for p in result.pairs if p.mean > BAR * noise.mean})]
    )
    ratios = [f"mean / native's with {noise.composition}" for noise in result.noise]
    header = ("run", "composition", "mean", "max", "top-1 agreement", *ratios)
    lengths = ", ".join(map(str, result.lengths))
    made = f"{_model(result)}, prompts of {lengths} tokens.\n\n{table(header, rows)}\n\n{verdict}"
    if result.reference:
        far = ", ".join(f"{code(one.run)} {one.mean:.3f}" for one in result.reference)
        made += f"\n\nMean difference from `torch`, the reference: {far}."
    return made


def served_speed() -> str:
    """Output tokens a second and latencies of each run, whether anything was compiled meanwhile, and GPU time; the
    longest outputs first."""
    found = [result for _, result in _all_kept(kept.ServedSpeed, "served-speed")]
    found.sort(key=lambda result: -result.output)
    return "\n\n".join(map(_served_speed, found)) or "Not measured."


def _served_speed(result: kept.ServedSpeed) -> str:
    by_run = {run.run: {row.requests: row for row in run.rows} for run in result.runs}
    native = by_run.get("native", {})
    rows = []
    for count in sorted({count for found in by_run.values() for count in found}):
        cells = []
        for run, found in by_run.items():
            row, base = found.get(count), native.get(count)
            if row is None:
                cells.append("-")
                continue
            share = f" ({row.tokens_a_second / base.tokens_a_second:.2f})" if base and run != "native" else ""
            per_token = "" if row.token_ms is None else f", {row.token_ms:.2f} ms"
            cells.append(f"{row.tokens_a_second:.1f}{share}, {row.first_token_ms:.0f} ms{per_token}")
        rows.append((str(count), *cells, str(FIRST_FALLBACK.get(count, "-"))))
    header = ("requests", *map(code, by_run), "first fallback, two RTX PRO 6000")
    compiled = []
    for run in result.runs:
        reported = "" if run.reported is None else f", {run.reported} reported by vLLM's monitor"
        odd = f", {' and '.join(map(str, run.odd))} requests served too" if run.odd else ""
        count = f"kernels that Triton compiled while serving: {len(run.compiled_while_serving)}"
        files = ", ".join(map(code, run.compiled_while_serving))
        spread = [f"{max(row.seconds) / min(row.seconds):.2f}" for row in run.rows if row.seconds]
        slowest = f" Slowest pass / best, by row: {', '.join(spread)}." if spread else ""
        compiled.append(
            f"- {code(run.run)}: up in {run.start_s:.0f} s, {count}{files and f' ({files})'}{reported}{odd}.{slowest}"
        )
    made = f"TP {result.tp}, {result.input} tokens in, {result.output} out, best of {result.passes} passes"
    given = f"--layers {result.layers} --tp {result.tp} --output {result.output} --passes {result.passes}"
    if any(run.profile for run in result.runs):
        given += " --profile"
    made += f"; today's tools take `SPEED='{given}'` for it"
    columns = "A cell: output tokens a second (share of native's), time to first token, time per output token after it."
    parts = [f"{_model(result)}, {made}. {result.note}".strip(), columns, table(header, rows), "\n".join(compiled)]
    if profiles := [(run.run, each) for run in result.runs for each in run.profile]:
        about = "GPU time of one step: 8 prompts of 1024 tokens, or 8 requests' next token. Kernels overlap."
        parts += [
            about,
            table(
                ("step", "run", "all kernels", "the longest"),
                [
                    (each.what, code(run), *_step_profile(each))
                    for run, each in sorted(profiles, key=lambda p: p[1].what)
                ],
            ),
        ]
    return "\n\n".join(parts)


def _step_profile(profile: kept.StepProfile) -> tuple[str, str]:
    """Milliseconds of a step: all, and the kernels that take the most, by the name without its template."""
    times: dict[str, float] = {}
    for each in profile.kernels:
        name = each.name.removeprefix("void ").partition("<")[0].partition("(")[0].rpartition("::")[2]
        times[name] = times.get(name, 0.0) + each.ms / profile.steps
    longest = sorted(times.items(), key=lambda item: -item[1])[:6]
    return f"{profile.total_ms / profile.steps:.2f} ms", ", ".join(f"{code(name)} {ms:.2f}" for name, ms in longest)


def served_once() -> str:
    """What ran once: speculative decoding, and a long prompt."""
    result = _served(SERVED_ONCE, kept.ServedOnce)
    if result is None:
        return "Not measured."
    lines = [
        f"- MTP with one speculative token, {code(run.run)}: {run.requests} requests, {run.tokens} tokens each, "
        f"in {run.seconds:.1f} s."
        for run in result.mtp
    ]
    lines += [
        f"- One prompt of {run.prompt:,} tokens, {code(run.run)}: first token after {run.first_token_s:.1f} s, at most "
        f"{run.peak_mib:.0f} MiB beyond weights and caches."
        for run in result.long
    ]
    return f"{_model(result)}.\n\n" + "\n".join(lines)


def transformers_bench() -> str:
    """A model of transformers with and without the integration; the figures first, which compare two rows each."""
    parts = []
    for _, result in _all_kept(kept.ModelRuns, "transformers"):
        figures = [(name, f"{value:.3g}") for name, value in result.figures.items()]
        rows = []
        for row in result.rows:
            if not row.row.startswith(("prefill", "decode")):
                continue
            cells = (row.outcome, "-", "-")
            if row.seconds is not None and row.peak_extra_bytes is not None:
                waits = "-" if row.host_waits_per_step is None else str(row.host_waits_per_step)
                cells = (f"{row.seconds * 1e3:.1f}", f"{row.peak_extra_bytes / 2**30:.2f}", waits)
            served = {name for counts in row.served.values() for name in counts}
            rows.append((row.side, row.row, *cells, ", ".join(map(code, sorted(served))) or "-"))
        names = ("side", "row", "ms", "extra memory at most, GiB", "waits of the host in a step", "providers")
        about = f"The model: {result.model}. transformers {result.transformers}."
        if not result.complete:
            about += " The run is not complete."
        parts.append(
            f"{_measured_on(result)}\n\n{about}\n\n{table(names, rows)}\n\n{table(('figure', 'value'), figures)}"
        )
    return "\n\n".join(parts) or "Not measured yet."


def build_fields() -> str:
    return fields(provider.Build)


def matrix_summary() -> str:
    rows = []
    for made in kept.matrices():
        for capability, total in made.totals.items():
            cells = [cells[capability] for cells in made.kernels.values() if capability in cells]
            rows.append(
                (
                    sm(Version(capability)),
                    made.triton,
                    str(total.kernels),
                    str(sum(bool(cell.error) for cell in cells)),
                    f"{total.shared / 1024:.1f} of {made.shared_limit[capability] / 1024:.0f}",
                    str(total.registers),
                    str(sum(cell.stack > 0 for cell in cells)),
                    str(max((cell.stack for cell in cells), default=0)),
                )
            )
    rows.sort(key=lambda row: int(row[0].removeprefix("sm_")))
    header = (
        "architecture",
        "Triton",
        "kernels",
        "bad",
        "most shared memory, KiB",
        "most registers",
        "with any stack",
        "most stack, bytes a thread",
    )
    commands = " and ".join(sorted({f"`{made.command}`" for made in kept.matrices()}))
    dates = sorted({f"{made.date}, {said_commit(made.commit)}" for made in kept.matrices()})
    return f"Compiled on {'; '.join(dates)}. To redo it: {commands}.\n\n{table(header, rows)}"


def matrix_stack() -> str:
    """One row for each kernel and architecture with stack by any release of Triton."""
    all_made = kept.matrices()
    names = list(dict.fromkeys(name for made in all_made for name in made.kernels))
    rows = []
    for capability in sorted({where for made in all_made for where in made.totals}, key=Version):
        for name in names:
            stacks = [made.kernels.get(name, {}).get(capability, Cell()).stack for made in all_made]
            if any(stacks):
                rows.append((sm(Version(capability)), name, *map(str, stacks)))
    header = ("architecture", "kernel and constants", *(f"Triton {made.triton}" for made in all_made))
    return table(header, rows)


PARTS: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        build_fields,
        cases,
        checks,
        commands,
        compat,
        contracts,
        environment,
        flash_on,
        functions,
        exit_codes,
        implementation_fields,
        layouts,
        listing,
        measured_choice,
        native_builds,
        native_conformance,
        native_listings,
        native_overhead,
        matrix_stack,
        matrix_summary,
        ops,
        overhead,
        performance,
        performance_ranks,
        performance_scales,
        performance_triton,
        performance_code,
        plain_gemm,
        performance_path,
        launch_floor,
        access_floor,
        same_bytes,
        topk_times,
        provider_fields,
        providers,
        reasons,
        served_logprobs,
        served_once,
        served_speed,
        targets,
        sglang_targets,
        tiers,
        transformers_bench,
        vllm_runs,
        triton_conformance,
        verified,
    )
}


def pages() -> list[Path]:
    """Every page of the docs."""
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def written() -> list[Path]:
    """Every file with generated parts."""
    return [*pages(), *(ROOT / "dsv4_backends").glob("ops.py")]


def render(text: str) -> str:
    """A page's text with every generated part made again."""
    return MARK.sub(lambda m: f"{m[1]}\n{PARTS[m['name']]()}\n\n{m[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the generated parts of the docs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is not current")
    check = parser.parse_args().check
    stale = 0
    for page in written():
        before = page.read_text(encoding="utf-8")
        after = render(before)
        if before != after:
            stale += 1
            print(f"{page.relative_to(ROOT)} {'is not current' if check else 'written'}")
            if not check:
                page.write_text(after, encoding="utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
