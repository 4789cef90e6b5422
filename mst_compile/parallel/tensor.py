"""Follow tensor parallelism (``parallelize_module``): a weight's sparse state goes to the DTensor that takes its place.

All styles of ``torch.distributed.tensor.parallel`` cut a Parameter and register the DTensor with the module that held
it, as programs do by hand with ``distribute_tensor``. PyTorch calls hooks there.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mst_compile.blocks.shards import check_placement, is_sharded
from mst_compile.state.binding import bind
from mst_compile.state.ownership import owned


def _registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    weight = owned(module, name)
    if weight is None or parameter is None or not is_sharded(parameter):
        return  # what takes the place of a weight otherwise is looked at when an optimizer steps
    if tuple(parameter.shape) == weight.shape:
        check_placement(weight.name, parameter)
        if bind(parameter, weight):
            weight.forget()


register_module_parameter_registration_hook(_registered)  # type: ignore[arg-type]
