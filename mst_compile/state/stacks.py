"""Stacks of matrices in one Parameter of three dimensions, as mixtures of experts hold them: which become sparse."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from mst_compile.lowering import device as devices

# What classes and attributes are called that hold experts: of a stack nothing else says that its matrices are weights.
_WORDS = ("expert", "moe")
# What models call the number of experts that a token goes to, in modules or their configuration.
_CHOSEN = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "experts_per_tok", "top_k", "topk", "moe_topk",
    "moe_top_k", "moe_k", "top_k_experts", "moe_router_topk", "num_selected_experts", "num_selects",
    "num_active_experts",
)  # fmt: skip
_LEAST = devices.FINEST_BLOCK


def is_stack(parameter: Tensor, holders: Iterable[tuple[nn.Module, str]]) -> bool:
    """Whether a parameter is a stack of matrices that something may be multiplied with, by its form: kernels of
    convolutions have as many dimensions."""
    if parameter.dim() != 3 or not parameter.is_floating_point() or parameter.shape[0] < 2:
        return False
    of_another_kind = any(isinstance(m, nn.Bilinear) or "conv" in type(m).__name__.lower() for m, _ in holders)
    return min(parameter.shape[1:]) >= _LEAST and not of_another_kind


def of_experts(aliases: Iterable[str], holders: Iterable[tuple[nn.Module, str]]) -> bool:
    """Whether a stack is one of experts, by its names or the class that holds it."""
    said = [*aliases, *(type(module).__name__ for module, _ in holders)]
    return any(word in name.lower() for name in said for word in _WORDS)


def visits(model: nn.Module, aliases: Iterable[str], matrices: int) -> int:
    """To how many of a stack's matrices a token goes, as the modules around it say, or the routers and the
    configurations that these hold, the innermost first; 1 where none does.

    FLOPs are counted by it, and nothing else: what is multiplied is decided by the model.
    """
    for name in aliases:
        path = name.split(".")[:-1]
        around = [model.get_submodule(".".join(path[:end])) for end in range(len(path), -1, -1)]
        for module in around:
            config = getattr(module, "config", None)
            holders = [module, *module.children(), config, getattr(config, "text_config", None)]
            said = (getattr(holder, word, None) for holder in holders if holder is not None for word in _CHOSEN)
            found = next((n for n in said if type(n) is int and 0 < n <= matrices), None)
            if found is not None:
                return found
    return 1


def why_not(parameter: Tensor) -> str | None:
    """Why no stack of this form can be sparse; None if it can."""
    rows = parameter.shape[1]
    if rows % _LEAST:
        return f"a stack of matrices of {rows} rows, which no block of {_LEAST} or more divides"
    return None


def problem(stack: Tensor) -> str:
    """What keeps a stack whose matrices do not lie one below the other from being trained sparse, and what to do."""
    return (
        f"is a stack of matrices {tuple(stack.shape)} with strides {stack.stride()}, whose rows do not follow one "
        "another: replace it by nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))"
    )
