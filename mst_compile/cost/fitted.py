"""The law of losses, fitted to the recorded study; written by ``examples/quality_theory.py --write``."""

from mst_compile.cost.loss_law import Fit, LossLaw

FIT = Fit(
    law=LossLaw(a=0.2398, alpha=0.2528, b=0.7432, beta=0.3147, gamma=0.2823, repeats=1.042),
    error=0.024,
    active=(24600.0, 42500000.0),
    tokens=(1230000.0, 170000000.0),
    repeats=26.3,
)
