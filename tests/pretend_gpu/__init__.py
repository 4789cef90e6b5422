"""Verify the GPU code that torch.compile generates, on a machine without a GPU.

    from pretend_gpu import Interpreter, check, cross_compile, generate, kernels_of

    made = generate(step, [x, w, b], config={"max_autotune": True, "max_autotune_gemm_backends": "TRITON"})
    for graph in made.graphs.values():                      # forward, backward
        for kernel in kernels_of(graph.source):
            if kernel.kind == "template":
                check(cross_compile(kernel), wgmma=True, stages=3)
    with Interpreter() as interpreter:
        outputs = interpreter.run(made.backward)            # compare with made.backward.outputs

What it shows
    `generate` takes a function through Dynamo, AOTAutograd and Inductor as on a machine with an H100, answering
    autotuning questions by a policy, so that every choice can be walked; `cross_compile` compiles each kernel for sm_90
    with the signature, constants and alignment that Inductor would use, and reads registers, spills, shared memory,
    products and pipelining from the machine code; `Interpreter` runs the generated module as a whole, with the kernels
    interpreted and other calls on CPU tensors, so that its numbers can be held against a reference.

What it cannot show
    Races between programs or warps: programs run one after the other, each as one thread. Hazards of asynchronous
    copies and products: the interpreter has none. Accesses out of bounds, unless they hit memory that is not mapped.
    Rounding of float32 products to tf32, unless asked for, and the order in which a tensor core sums. Errors in
    Triton's or NVIDIA's compiler: what is run is the source, not the machine code. And speed: estimates by hand from
    `Facts` are estimates.

One graph per function (no graph breaks), the Python wrapper, one device; no CUDA graphs, no C++ wrapper, no kernels
combined by "multi_kernel". The graph is the one torch traces for CPU tensors: an operator that chooses an
implementation by device, such as `scaled_dot_product_attention`, has chosen the CPU's. Tensor constants of more than
one element that a graph closes over stay on the CPU and are refused by Inductor. Nothing here knows any project; the
worker imports what it is told to (`preload`). Needed besides torch and triton: numpy, and a C++ compiler where torch is
built without CUDA (see device/device_guard.cpp).

`pretend_gpu.host` has another device, on which whole programs run and no kernel does: real tensors, PyTorch's operators
and autograd's threads, generated wrappers with launches that return at once. It counts launches, allocations and what
the host waits for, and needs a process that has loaded it before torch (`host.library.environment`).

Rooms, each of which imports from those before it alone: `compat`, `device`, `codegen`, `machine`, `interpreter` and
`host`.
"""

from .codegen.generate import generate
from .codegen.generated import Generated, GraphCode, Question, snapshot
from .codegen.kernels import GeneratedKernel, LaunchConfig, kernels_of
from .device.h100 import pretend_h100
from .interpreter.process import Interpreter, Ran, WorkerError
from .machine.crosscompile import cross_compile, cross_compile_jit
from .machine.facts import Facts, check

__all__ = [
    "Facts",
    "Generated",
    "GeneratedKernel",
    "GraphCode",
    "Interpreter",
    "LaunchConfig",
    "Question",
    "Ran",
    "WorkerError",
    "check",
    "cross_compile",
    "cross_compile_jit",
    "generate",
    "kernels_of",
    "pretend_h100",
    "snapshot",
]
