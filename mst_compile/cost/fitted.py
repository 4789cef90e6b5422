"""The law of losses, fitted to the recorded study; written by ``examples/quality_theory.py --write``."""

from mst_compile.cost.loss_law import Fit, LossLaw

FIT = Fit(
    law=LossLaw(a=0.4297, alpha=0.1407, b=0.5093, beta=0.5428, gamma=0.3541, repeats=0.8007),
    error=0.027,
    active=(55300.0, 42500000.0),
    tokens=(451000.0, 170000000.0),
    repeats=26.3,
)
