"""``mode="reduce-overhead"``: nothing of ours keeps Inductor from recording a graph, and index tensors do not move.

What a recorded graph does is not seen here: the recorder is replaced by one that notes what it is given.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pretend_gpu.host.library import environment

TESTS = Path(__file__).resolve().parents[1]
PROGRAM = """
import json, sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from torch import nn
from pretend_gpu.host.device import idle_h100
from torch._inductor import compile_fx, output_code
from mst_compile import sparsify, Constant, sparsifier
from mst_compile.graph.backend import mst
from mst_compile.state.binding import of
found, seen = {{}}, []

def record(model, *, static_input_idxs=(), **rest):
    seen.append(sorted(static_input_idxs))
    return model

compile_fx.cudagraphify = record
with idle_h100() as idle:
    layers = [nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256)]
    with idle.computing():
        model = sparsify(nn.Sequential(*layers).to("cuda"), Constant(0.5, growth="random", interval=3), block=32)
    adam = torch.optim.AdamW(model.parameters(), fused=True)
    mode = {{"mode": "reduce-overhead", "options": {{"mst.dense_threshold": 1.0}}}}
    run = torch.compile(lambda x: model(x).sum(), backend=lambda g, e: mst(g, e, **mode))
    x, weights = torch.ones(64, 256, device="cuda"), [of(layer.weight) for layer in (layers[0], layers[2])]
    where, masks, graphs = [], [], []
    for step in range(7):
        run(x).backward()
        adam.step()
        adam.zero_grad()
        where.append([w.index.data_ptr() for w in weights])
        masks.append([w.changes for w in weights])
        graphs.append(len(seen))
print(json.dumps({{"seen": seen, "where": where, "masks": masks, "graphs": graphs,
                  "skips": torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]}}))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    program = PROGRAM.format(tests=str(TESTS), root=str(TESTS.parent))
    ran = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_both_passes_are_recorded(found: dict[str, Any]) -> None:
    assert found["skips"] == 0
    assert found["graphs"][0] == found["graphs"][-1] == 2  # forward and backward, and none for an event


def test_indices_are_inputs_that_do_not_move(found: dict[str, Any]) -> None:
    forward, backward = found["seen"]
    # Two weights, two biases and two indices of the seven inputs: not the activations.
    assert len(forward) == 6
    assert len(backward) >= 2
    assert found["masks"][0] != found["masks"][-1]
    assert all(where == found["where"][0] for where in found["where"])
