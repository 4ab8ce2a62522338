"""Other processes: a fork while other threads work, and pickling."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch

import dsv4_backends
from dsv4_backends import CONTRACTS, NoProviderError, PolicyError, Reason, UnsupportedError, ops, use_providers
from dsv4_backends.runtime import bind
from dsv4_backends.selection import machine, plugins, policy
from dsv4_backends.selection.survey import survey

FORKS = """
import os, sys, threading, time
import torch
torch.set_num_threads(1)
from dsv4_backends import CONTRACTS, ops, reset, use_providers
contract = CONTRACTS["hc_prenorm_gemm"]
arguments = contract.inputs(contract.at_level("smoke")[0], torch.device("cpu"))
ops.hc_prenorm_gemm(**arguments)
stop = False
def resets():
    while not stop:
        reset()
def binds():
    while not stop:
        with use_providers(order=["torch"]):
            ops.hc_prenorm_gemm(**arguments)
threads = [threading.Thread(target=t, daemon=True) for t in (resets, binds, resets)]
for thread in threads:
    thread.start()
children = []
for _ in range(40):
    time.sleep(0.01)
    if (pid := os.fork()) == 0:
        try:
            reset()
            ops.hc_prenorm_gemm(**arguments)
            os._exit(0)
        except BaseException:
            os._exit(1)
    children.append(pid)
end = time.monotonic() + 60
left, failed = set(children), 0
while left and time.monotonic() < end:
    for pid in list(left):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            left.discard(pid)
            failed += status != 0
    time.sleep(0.02)
for pid in left:
    os.kill(pid, 9)
stop = True
print(f"hang {len(left)}, fail {failed}")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_children_of_a_busy_process_call_ops() -> None:
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.stdout.strip() == "hang 0, fail 0", child.stderr[-3000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_while_this_thread_has_the_lock() -> None:
    """The lock is free in the child, whose only thread had it."""
    from dsv4_backends import locks

    with locks.bindings:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                locks.bindings.release()
                locks.bindings.acquire()
                code = 0
            finally:
                os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def test_every_lock_of_the_package_is_in_one_home() -> None:
    import pathlib
    import re

    for package in (dsv4_backends, *map(sys.modules.get, ("dsv4_backend_torch", "dsv4_backend_triton"))):
        if package is None or package.__file__ is None:
            continue
        for path in pathlib.Path(package.__file__).parent.rglob("*.py"):
            if path.name != "locks.py":
                assert not re.search(r"threading\.(R?Lock|Condition|Semaphore)\(", path.read_text("utf-8")), path


def things() -> dict[str, Any]:
    with use_providers({"mqa_logits": "torch"}, order=["torch"], deny=["triton"]) as given:
        resolution = bind.resolution("mqa_logits", "cpu")
    here = machine.probe()
    return {
        **{name: getattr(ops, name) for name in CONTRACTS},
        "policy": given,
        "empty policy": policy.Policy(),
        "resolution": resolution,
        "spec": plugins.load().providers[0],
        "plugins": plugins.load(),
        "reason": Reason("some-code", "a message", "a hint"),
        "device": here.devices[0],
        "simulated": machine.simulate("sm_86").devices[0],
        "machine": here,
        "survey": survey("sm_86", load=False),
        "no provider": NoProviderError("nobody", resolution),
        "policy error": PolicyError("unknown"),
        "unsupported": UnsupportedError("unsupported"),
        "limits": dsv4_backends.Limits(),
        "build": dsv4_backends.Build(name="acme 1", reasons=(Reason("a", "b"),)),
    }


@pytest.mark.parametrize("name", things())
@pytest.mark.parametrize("way", ["pickle", "copy", "deepcopy"])
def test_values_cross(name: str, way: str) -> None:
    value = things()[name]
    make = {"pickle": lambda v: pickle.loads(pickle.dumps(v)), "copy": copy.copy, "deepcopy": copy.deepcopy}[way]
    again = make(value)
    assert type(again) is type(value)
    if isinstance(value, BaseException):
        assert str(again) == str(value)
        assert getattr(again, "resolution", None) == getattr(value, "resolution", None)
    else:
        assert again == value
        if name != "plugins":
            assert hash(again) == hash(value)


def test_a_policy_stays_frozen() -> None:
    again = pickle.loads(pickle.dumps(things()["policy"]))
    with pytest.raises(TypeError):
        again.pins["mqa_logits"] = "triton"


def test_a_public_op_keeps_what_help_shows() -> None:
    assert ops.hc_prenorm_gemm.__module__ == "dsv4_backends.ops"
    assert inspect.signature(ops.hc_prenorm_gemm) == CONTRACTS["hc_prenorm_gemm"].signature
    assert ops.hc_prenorm_gemm.__doc__


def test_an_op_is_the_task_of_a_spawned_process() -> None:
    contract = CONTRACTS["hc_prenorm_gemm"]
    arguments = contract.inputs(contract.at_level("smoke")[0], torch.device("cpu"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(ops.hc_prenorm_gemm, (), arguments)
    assert torch.equal(result[0], ops.hc_prenorm_gemm(**arguments)[0])
