"""The idle device: what runs on it is counted, and computes what the CPU does where that is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_gpu.host.device import idle_h100
from pretend_gpu.host.library import environment

TESTS = Path(__file__).resolve().parents[1]

PROGRAM = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
from pretend_gpu.host.device import idle_h100
found = {{}}

def count(trace):
    return {{"operators": dict(trace.operators), "waits": [w.what for w in trace.waits], "launches": trace.launches,
            "allocations": trace.allocations, "stacks": [w.stack[-1].split()[-1] for w in trace.waits]}}

with idle_h100() as idle:
    torch.manual_seed(0)
    host = torch.nn.Linear(8, 4)
    there = torch.nn.Linear(8, 4)
    there.load_state_dict(host.state_dict())
    there = there.to("cuda")
    x = torch.randn(3, 8)

    def step(model, x):
        adam = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
        for _ in range(2):
            loss = model(x).square().sum()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
        return float(loss), float(norm), [p.detach().cpu().tolist() for p in model.parameters()]

    with idle.computing():
        found["same"] = [step(host, x), step(there, x.cuda())]
        y = torch.arange(6.0, device="cuda").view(2, 3)
        found["values"] = [(y @ y.t()).tolist(), y[y > 2].tolist(), y.t()[1].tolist(), torch.cat([y, y]).sum().item()]
    y = torch.ones(64, 64, device="cuda")

    def waiting_here():
        bool((y > 0).any())
        y.cpu()
        y.nonzero()

    with idle.tracing() as trace:
        z = torch.relu(y @ y) + 1
        torch._foreach_mul_([y, z], 2.0)
        y.view(-1)[5:7].t()
        torch.ones(4).pin_memory().to("cuda", non_blocking=True)
    found["no wait"] = count(trace)
    with idle.tracing() as trace:
        torch.ones(4).to("cuda")
        waiting_here()
    found["waits"] = count(trace)
    versions = y._version
    torch._foreach_add_([y], 1.0)
    found["versions"] = y._version - versions
    first = torch.empty(1000, device="cuda").data_ptr()
    found["again"] = torch.empty(1000, device="cuda").data_ptr() == first

    compiled = torch.compile(lambda a: torch.nn.functional.gelu(a).sum(), dynamic=False)
    a = torch.ones(64, 64, device="cuda", requires_grad=True)
    compiled(a).backward()
    with idle.tracing() as trace:
        compiled(a).backward()
    found["compiled"] = count(trace) | {{"kernels": sum(trace.kernels.values())}}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    program = PROGRAM.format(tests=str(TESTS))
    ran = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_it_computes_what_a_cpu_does(found: dict[str, Any]) -> None:
    host, there = found["same"]
    assert host[0] == pytest.approx(there[0], rel=1e-5)
    assert host[1] == pytest.approx(there[1], rel=1e-5)
    for one, other in zip(host[2], there[2], strict=True):
        assert torch.allclose(torch.tensor(one), torch.tensor(other), rtol=1e-4)
    assert found["values"] == [[[5, 14], [14, 50]], [3, 4, 5], [1, 4], 30]


def test_what_waits_for_nothing(found: dict[str, Any]) -> None:
    assert found["no wait"]["waits"] == []
    operators = found["no wait"]["operators"]
    assert operators["_foreach_mul_.Scalar"] == 1
    assert operators["upload"] == 1
    assert sum(operators.values()) == found["no wait"]["launches"] == 5  # mm, relu, add, the two above; views are none


def test_every_wait_is_found_where_it_is(found: dict[str, Any]) -> None:
    assert found["waits"]["waits"] == ["upload", "aten::_local_scalar_dense", "download", "aten::nonzero"]
    assert found["waits"]["stacks"] == ["<module>", "waiting_here", "waiting_here", "waiting_here"]


def test_versions_and_addresses_are_as_on_a_gpu(found: dict[str, Any]) -> None:
    assert found["versions"] == 1
    assert found["again"]


def test_compiled_code_launches_its_kernels(found: dict[str, Any]) -> None:
    assert found["compiled"]["waits"] == []
    assert 2 <= found["compiled"]["kernels"] <= 4


def test_there_is_none_in_this_process() -> None:
    with pytest.raises(RuntimeError, match="start it with"), idle_h100():
        pass
