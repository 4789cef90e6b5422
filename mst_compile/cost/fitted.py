"""The law of losses, fitted to the recorded study; written by ``examples/quality_theory.py --write``."""

from mst_compile.cost.loss_law import Fit, LossLaw

FIT = Fit(
    law=LossLaw(a=0.3893, alpha=0.1514, b=0.5041, beta=0.549, gamma=0.3242, repeats=0.7858),
    error=0.026,
    active=(55300.0, 42500000.0),
    tokens=(451000.0, 170000000.0),
    repeats=26.3,
)
