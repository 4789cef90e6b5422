"""The law of losses, fitted to the recorded study; written by ``examples/quality_theory.py --write``."""

from mst_compile.cost.loss_law import Fit, LossLaw

FIT = Fit(
    law=LossLaw(a=0.2211, alpha=0.2659, b=0.7326, beta=0.318, gamma=0.2899, repeats=0.9341),
    error=0.024,
    active=(24600.0, 42500000.0),
    tokens=(1230000.0, 170000000.0),
    repeats=26.3,
)
