"""The law of losses, fitted to the recorded study; written by ``examples/quality_theory.py --write``."""

from mst_compile.cost.loss_law import Fit, LossLaw

FIT = Fit(
    law=LossLaw(a=0.1872, alpha=0.3197, b=0.524, beta=0.5254, gamma=0.351, repeats=0.8981),
    error=0.036,
    active=(78700.0, 42500000.0),
    tokens=(451000.0, 170000000.0),
    repeats=16.0,
)
