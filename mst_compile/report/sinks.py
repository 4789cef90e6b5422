"""Where scalars go besides files: TensorBoard and Weights & Biases, of which neither is a dependency."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mst_compile.errors import MissingPackageError

_TIMES = {"seconds", "compile_seconds", "wall_seconds", "tokens_per_s"}
OWN = {"density", "sparsity", "flops", "flops_of_dense", "events", "dropped", "grown"} | _TIMES  # a recorder's columns


class Sink(Protocol):
    """Something that takes scalars."""

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take scalars of one step, by name."""

    def close(self) -> None:
        """There will be no more."""


def need(module: str, what: str, install: str) -> Any:
    """The module of this name.

    Raises:
        MissingPackageError: it is not installed; ``what`` was asked for, ``install`` is what pip is told.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"{what} needs a package that is not installed ({error.name}): pip install {install}"
        ) from error


def named(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record as loggers show them: the recorder's own in a group "mst", the user's as they are."""
    numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
    return {f"mst/{name}" if name in OWN else name: value for name, value in numbers.items()}


class TensorBoard:
    """Scalars for TensorBoard, in ``folder``; ``first`` is the first step that will be written: later ones that are
    there already, of a run that was broken off, are not shown any more."""

    def __init__(self, folder: Path, first: int) -> None:
        module = need("torch.utils.tensorboard", "tensorboard=True", "tensorboard")
        self._open = lambda: module.SummaryWriter(str(folder), purge_step=first)
        self._writer: Any = None

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._writer is None:  # not before there is something to write: a Recorder that is refused writes nothing
            self._writer = self._open()
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """Scalars for Weights & Biases: a run of its own, or the one with the identity ``known``.

    Attributes:
        identity: of the run, empty until something was written.
    """

    def __init__(self, folder: Path, known: str, arguments: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        self._module = need("wandb", "wandb=...", "wandb")
        chosen: dict[str, Any] = {"dir": str(folder), "name": about["label"], "config": dict(about)}
        if known:
            chosen |= {"id": known, "resume": "allow"}
        self._arguments = chosen | dict(arguments)
        self._run: Any = None
        self.identity = known

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._run is None:
            self._run = self._module.init(**self._arguments)
            self.identity = str(self._run.id)
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
