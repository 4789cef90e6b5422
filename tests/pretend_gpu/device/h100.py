"""One H100 that does not exist: torch, Inductor and triton are told about it and never launch anything on it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from .. import compat

# Limits of compute capability 9.0: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
SHARED_MEMORY_PER_BLOCK = 227 * 1024
REGISTERS_PER_THREAD = 255
MULTIPROCESSORS = 132
CAPABILITY = (9, 0)

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=MULTIPROCESSORS,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
    shared_memory_per_block=48 * 1024,
    shared_memory_per_block_optin=SHARED_MEMORY_PER_BLOCK,
    shared_memory_per_multiprocessor=228 * 1024,
    L2_cache_size=50 << 20,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    gcnArchName="",
    uuid="pretend",
    is_integrated=False,
    pci_bus_id=0,
)


class _Driver:
    """A triton driver that answers questions about the target and can do nothing else."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": SHARED_MEMORY_PER_BLOCK,
            "multiprocessor_count": MULTIPROCESSORS,
            "warpSize": 32,
        }
    )

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> Any:
        return target()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda


def target() -> Any:
    """What triton compiles for: CUDA, compute capability 9.0, warps of 32."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)


@functools.cache
def _register_device_guard() -> None:
    """See device_guard.cpp. The library stays loaded; nothing else in the process asks it anything."""
    if torch.backends.cuda.is_built():
        return
    root = Path(torch.__file__).parent
    source = Path(__file__).with_name("device_guard.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder, "device_guard.so"))
        command = [os.environ.get("CXX", "c++"), "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", str(source)]
        command += [f"-L{root / 'lib'}", "-lc10", "-o", library]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            warnings.warn(
                f"no C++ compiler: some operators will not go through the pretend device\n{reason}", stacklevel=2
            )
            return
        ctypes.CDLL(library)


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _answers() -> dict[str, Callable[..., Any]]:
    """What both `torch.cuda` and Dynamo's interface to it are made to say."""
    stream = SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1, device=torch.device("cuda", 0))
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H100,
        "is_bf16_supported": True,
        "current_stream": stream,
        "set_device": None,
        "synchronize": None,
    }
    return {name: _always(value) for name, value in answers.items()}


def _patch_torch_cuda(patch: Callable[[Any, str, Any], Any]) -> None:
    answers = _answers() | {
        "get_device_capability": _always(CAPABILITY),
        "get_device_name": _always(H100.name),
        "is_tf32_supported": _always(True),
        "is_initialized": _always(False),
        "_lazy_init": _always(None),
        "_exchange_device": _always(0),
        "_maybe_exchange_device": _always(0),
        # Dynamo saves and restores the generator's state around compilation.
        "get_rng_state": _always(torch.zeros(16, dtype=torch.uint8)),
        "set_rng_state": _always(None),
    }
    for name, answer in answers.items():
        patch(torch.cuda, name, answer)
    patch(torch.version, "cuda", "13.0")
    # CUDA builds allocate a real tensor to start the context.
    patch(compat.fake_tensor_module(), "init_gpu_context", _always(None))


def _patch_device_interface(patch: Callable[[Any, str, Any], Any]) -> None:
    from torch._dynamo.device_interface import CudaInterface

    answers = _answers() | {
        "get_raw_stream": _always(0),
        "exchange_device": _always(0),
        "maybe_exchange_device": _always(0),
        "get_compute_capability": _always(10 * CAPABILITY[0] + CAPABILITY[1]),
    }
    for name, answer in answers.items():
        patch(CudaInterface, name, staticmethod(answer))
    patch(CudaInterface.Worker, "get_device_properties", staticmethod(_always(H100)))
    patch(CudaInterface.Worker, "current_device", staticmethod(_always(0)))


def _forget_what_is_known() -> None:
    import torch._inductor.utils
    import torch.utils._triton
    from torch._inductor.runtime.hints import DeviceProperties

    compat.clear_caches([torch.utils._triton, torch._inductor.utils, DeviceProperties])


@contextlib.contextmanager
def pretend_h100(*, guard: bool = True) -> Iterator[None]:
    """Make torch, Inductor and triton believe in one idle H100 (sm_90, 132 multiprocessors, 227 KiB shared memory).

    Only questions are answered: tensors on "cuda" must be fake ones, and nothing can be launched. On leaving, the
    process believes what it believed before.

    Args:
        guard: Register a device guard; False where the process has one.
    """
    from torch._dynamo import device_interface
    from torch._inductor.runtime import triton_helpers
    from triton.runtime.driver import driver

    if guard:
        _register_device_guard()
    with contextlib.ExitStack() as stack:

        def patch(where: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(where, name, value, create=True))

        _patch_torch_cuda(patch)
        _patch_device_interface(patch)
        # Generated modules call this on import; it would look for libcuda.
        patch(triton_helpers, "set_driver_to_gpu", _always(None))
        _forget_what_is_known()
        stack.callback(_forget_what_is_known)
        device_interface.get_interface_for_device("cuda")
        stack.enter_context(mock.patch.object(driver, "_active", driver._active))
        driver.set_active(_Driver())
        yield
