"""The law of losses, fitted to the recorded study; written by ``examples/quality_theory.py --write``."""

from mst_compile.cost.loss_law import Fit, LossLaw

FIT = Fit(
    law=LossLaw(a=0.3711, alpha=0.1582, b=0.5036, beta=0.5496, gamma=0.3204, repeats=0.774),
    error=0.025,
    active=(55300.0, 42500000.0),
    tokens=(451000.0, 170000000.0),
    repeats=26.3,
)
