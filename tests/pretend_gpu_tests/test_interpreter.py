"""The process that runs generated code: errors, options, and memory that nobody wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pretend_gpu import Interpreter, WorkerError, generate

from .cases import by_hand


def test_errors_reach_the_parent_and_the_worker_goes_on(interpreter: Interpreter) -> None:
    x = torch.ones(16)
    with pytest.raises(WorkerError, match="not enough values to unpack") as raised:
        interpreter.run_on(by_hand("pass"), [x])
    assert "in the worker:\nTraceback" in str(raised.value)
    with pytest.raises(WorkerError, match=r"(?s)no_such_name.*in kernel kernel, grid \(1, 1, 1\)"):
        interpreter.run_on(by_hand("tl.store(out + i, no_such_name)"), [x, x, x])
    with pytest.raises(WorkerError, match="atomic addition of bfloat16"):
        interpreter.run_on(by_hand("tl.atomic_add(out + i, tl.load(a + i))"), [x.bfloat16()] * 3)
    made = generate(torch.sin, [torch.randn(4)])
    with pytest.raises(WorkerError, match="expected size 5==4"):  # sizes are asserted as generated
        interpreter.run_on(made.forward.source, [torch.randn(5)])
    source = by_hand("tl.store(out + i, tl.load(a + i) + tl.load(b + i))")
    assert torch.equal(interpreter.run_on(source, [x, x, x]).outputs[0], x + x)


EXTERN = """
import torch
from torch._inductor.select_algorithm import ExternKernelChoice

def thrice(x, *, out):
    return torch.mul(x, 3, out=out)

print("noise on standard output")
ExternKernelChoice(thrice, name="pretend_gpu_test_thrice", has_out_variant=True)
"""


def test_worker_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tf32, modules to import first, noise on stdout, and a worker that dies."""
    (tmp_path / "pretend_gpu_test_extern.py").write_text(EXTERN)
    monkeypatch.syspath_prepend(str(tmp_path))
    dot = "tl.dot(tl.load(a + square), tl.load(b + square), input_precision='PRECISION')"
    eye = torch.eye(16)
    x = torch.full((16, 16), 1 + 2**-10 + 2**-11)
    call = "extern_kernels.pretend_gpu_test_thrice(a, out=out); _ = (a, b, out, 1, 1, 1)"
    extern = by_hand("pass").replace("kernel.run(a, b, out, 1, 1, 1, stream=0)", call)
    with Interpreter(tf32=True, preload=["pretend_gpu_test_extern"]) as interpreter:
        for precision, kept in (("tf32", 1 + 2**-10), ("ieee", 1 + 2**-10 + 2**-11)):
            source = by_hand(f"tl.store(out + square, {dot.replace('PRECISION', precision)})")
            got = interpreter.run_on(source, [x, eye, torch.empty(16, 16)]).outputs[0]
            assert torch.equal(got, torch.full((16, 16), kept))
        assert torch.equal(interpreter.run_on(extern, [x, x, torch.empty(16, 16)]).outputs[0], 3 * x)
        with pytest.raises(WorkerError, match="exit code 3"):
            interpreter.run_on("import os\nos._exit(3)", [])
    with pytest.raises(WorkerError, match="context manager"):
        interpreter.run_on(extern, [])


def test_memory_that_was_never_written_is_seen(interpreter: Interpreter) -> None:
    made = generate(lambda x: (x + 1).relu(), [torch.randn(40)])
    store = "tl.store(out_ptr0 + (x0), "
    assert store in made.forward.source
    unwritten = "\n".join(x for x in made.forward.source.splitlines() if store not in x)
    (y,) = interpreter.run_on(unwritten, made.forward.inputs).outputs
    assert y.isnan().all()
