"""The backend under Accelerate: what works, what does not, and what docs/upstream/accelerate.md would change."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin
from helpers import DEBUG, Blocks, static
from torch import nn
from training import loss_of
from transformers import Trainer, TrainingArguments

from mst_compile import param_groups, sparsifier, sparsify
from mst_compile.errors import MSTWarning

TEXT = (Path(__file__).parents[2] / "docs" / "upstream" / "accelerate.md").read_text()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


# -- what works today --------------------------------------------------------------------------------------------------


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="mst", options=DEBUG)
    return model


def wrapped(model: nn.Module) -> Any:
    return torch.compile(model, backend="mst", options=DEBUG)


@pytest.mark.filterwarnings(f"error::{MSTWarning.__module__}.{MSTWarning.__name__}")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("how", [in_place, wrapped])
def test_a_model_compiled_before_prepare(how: Callable[[nn.Module], Any], precision: str) -> None:
    model = sparsify(Blocks(), static())
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    optimizer = torch.optim.AdamW(param_groups(model), 1e-2)
    prepared, optimizer = accelerator.prepare(how(model), optimizer)
    for _ in range(2):
        accelerator.backward(loss_of(prepared, torch.randn(16, 32)))
        optimizer.step()
        optimizer.zero_grad()
    assert sparsifier(prepared).step_count == 2
    uses = [weight.uses for weight in sparsifier(model).weights.values()]
    assert all(seen.matched or seen.served for seen in uses)
    assert not [reason for seen in uses for reason in seen.unmatched]
    plain = accelerator.unwrap_model(prepared, keep_torch_compile=False)
    assert list(plain.state_dict()) == list(Blocks().state_dict())


# -- what does not -----------------------------------------------------------------------------------------------------


NAMED: dict[str, Callable[[], Any]] = {
    "argument": lambda: Accelerator(cpu=True, dynamo_backend="mst"),
    "plugin": lambda: TorchDynamoPlugin(backend="mst"),
    "environment": lambda: Accelerator(cpu=True),
    "trainer": lambda: Trainer(Blocks(), TrainingArguments(torch_compile=True, torch_compile_backend="mst")),
}


@pytest.mark.parametrize("how", NAMED)
def test_the_enumeration_refuses_the_name(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where this no longer raises, the guide and docs/upstream/accelerate.md have something to tell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "mst" if how == "environment" else "no")
    with pytest.raises(ValueError, match="'MST' is not a valid DynamoBackend"):
        NAMED[how]()


@pytest.mark.parametrize("compiled", [True, False])
def test_modules_of_pytorch_itself_are_not_compiled_in_place(compiled: bool) -> None:
    """By PyTorch before 2.14, under any backend; ``torch.compile(model)`` does."""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    if compiled:
        fast: Any = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        fast = model
    fast(torch.randn(4, 32))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == int(compiled or torch.__version__ >= "2.14")


# -- the change --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """Accelerate's module of plugins with the change."""
    (version,) = re.findall(r"tried on accelerate ([\d.]+)", TEXT)
    if accelerate.__version__ != version or shutil.which("git") is None:
        pytest.skip(f"the change is written for accelerate {version} and applied by git")
    (diff,) = re.findall(r"```diff\n(.*?)```", TEXT, re.DOTALL)
    folder, installed = tmp_path_factory.mktemp("accelerate"), Path(accelerate.__file__).parent
    files = re.findall(r"^\+\+\+ b/src/accelerate/(\S+)", diff, re.MULTILINE)
    assert sorted(files) == ["commands/launch.py", "utils/dataclasses.py"]
    for file in files:
        (folder / "src/accelerate" / file).parent.mkdir(parents=True)
        shutil.copy(installed / file, folder / "src/accelerate" / file)
    subprocess.run(["git", "apply", "-"], input=diff.encode(), cwd=folder, check=True)
    name = "accelerate.utils.changed_dataclasses"
    spec = importlib.util.spec_from_file_location(name, folder / "src/accelerate/utils/dataclasses.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    compile((folder / "src/accelerate/commands/launch.py").read_text(), "launch.py", "exec")
    yield module
    del sys.modules[name]


def test_the_change_accepts_what_dynamo_knows(changed: ModuleType) -> None:
    plugin = changed.TorchDynamoPlugin(backend="mst")
    assert plugin.to_kwargs() == {"backend": "mst"}
    member = changed.DynamoBackend("MST")
    assert member is plugin.backend is pickle.loads(pickle.dumps(member)) is copy.deepcopy(member)
    assert member != changed.DynamoBackend.NO
    assert "MST" not in changed.DynamoBackend.list()
    assert changed.TorchDynamoPlugin().backend is changed.DynamoBackend.NO
    with pytest.raises(ValueError, match="'NOBODYS' is not a valid DynamoBackend"):
        changed.TorchDynamoPlugin(backend="nobodys")


def test_the_test_to_add(changed: ModuleType) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {"TorchDynamoPlugin": changed.TorchDynamoPlugin, "DynamoBackend": changed.DynamoBackend, "pytest": pytest}
    exec(code, names)
    try:
        names["test_dynamo_backend_that_a_package_registers"]()
    finally:
        torch._dynamo.backends.registry._BACKENDS.pop("somebodys_own", None)
        torch._dynamo.backends.registry._COMPILER_FNS.pop("somebodys_own", None)


def test_an_accelerator_compiles_with_the_changed_plugin(changed: ModuleType) -> None:
    model = sparsify(Blocks(), static())
    accelerator = Accelerator(cpu=True, dynamo_plugin=changed.TorchDynamoPlugin(backend="mst", options=DEBUG))
    prepared = accelerator.prepare(model)
    loss_of(prepared, torch.randn(16, 32)).backward()
    assert all(weight.uses.matched or weight.uses.served for weight in sparsifier(model).weights.values())
