"""The law of losses, fitted to the recorded study; written by ``examples/quality_theory.py --write``."""

from mst_compile.cost.loss_law import Fit, LossLaw

FIT = Fit(
    law=LossLaw(a=0.3669, alpha=0.1597, b=0.5036, beta=0.5495, gamma=0.3192, repeats=0.7725),
    error=0.026,
    active=(55300.0, 42500000.0),
    tokens=(451000.0, 170000000.0),
    repeats=26.3,
)
