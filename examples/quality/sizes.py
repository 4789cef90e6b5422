"""The sizes of the experiments: models, lengths and settings that all runs of one share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .model import Shape

BASE = "mst-b8"  # the configuration whose FLOPs the dense rivals are given, and that the remedies change


@dataclass(frozen=True)
class Study:
    """Sizes and settings that all runs share.

    ``decay`` is the share of the steps over which the learning rate falls to 0 (warmup-stable-decay), and also for how
    long Mixed Sparsity runs are dense again at their end (``settle``). ``base`` names the configuration whose FLOPs the
    dense rivals are given. ``unique`` leaves so many bytes of the training text, which are repeated; None: all. The
    validation loss is taken ``checks`` times on the way, evenly spaced.
    """

    width: int = 256
    layers: int = 2
    heads: int = 8
    context: int = 128
    batch: int = 8
    steps: int = 1200
    learning_rate: float = 1e-3
    warmup: float = 0.04
    decay: float = 0.15
    weight_decay: float = 0.1
    validation_batches: int = 80
    dtype: str = "bfloat16"
    compile: bool = True
    base: str = BASE
    unique: int | None = None
    checks: int = 0

    @property
    def shape(self) -> Shape:
        return Shape(self.width, self.layers, self.heads, self.context)

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.context


# 42 million weights, for a GPU; 20 tokens for each of the 8.5 million that are left at 80 %, who compete with dense
# models of the same FLOPs, narrower or trained for fewer steps. The rate is a guess from models of this size.
LARGE = Study(
    width=768,
    layers=6,
    heads=12,
    context=256,
    batch=128,
    steps=5200,
    learning_rate=6e-4,
    validation_batches=16,
    base="static-b64",
    checks=10,
)
# Small models of one budget, whatever their width and number of steps: that of a dense model 64 wide which sees a
# hundred tokens a weight. Twenty a weight has the one 96 wide. Hidden weights are three quarters of the base's FLOPs.
# Three times the budget gives twenty to the one 128 wide: there blocks of 8 are fine for a model twice as wide.
BUDGET = Study(
    width=64,
    heads=2,
    context=64,
    batch=64,
    steps=2400,
    learning_rate=4e-3,
    validation_batches=20,
    dtype="float32",
    base="dense",
    checks=9,
)
REGIMES: dict[str, Study] = {
    "plenty": BUDGET,
    "twenty": replace(BUDGET, steps=BUDGET.steps // 5),
    "thrice": replace(BUDGET, steps=BUDGET.steps * 3),
} | {f"repeat-{n}": replace(BUDGET, unique=BUDGET.steps * BUDGET.tokens // n) for n in (4, 16)}
QUICK = Study(width=64, heads=2, context=32, batch=4, steps=60, validation_batches=4, compile=False, dtype="float32")
