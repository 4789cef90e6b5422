"""The table of measured rates that ``mst_compile.forecast(..., hardware=...)`` reads, out of the ledger.

    python -m benchmarks.hardware

prints it for ``mst_compile/cost/hardware_table.py``; a test holds that file to the ledger. Taken are the newest rows of
each shape, block and density, as users get the kernels (rows tuned ``for=`` one density are left out).
"""

from __future__ import annotations

import csv
import pprint
import re
from typing import Any

from .ledger import LEDGER

CARDS = {"H100": "NVIDIA H100 80GB HBM3"}
SHAPES = ((16384, 4096, 4096), (16384, 3072, 768))
_LAYER = r"M=(\d+) N=(\d+) K=(\d+) B=(\d+) d=(\S+) (sum|grad-weight)"
_STEP = r"gpt-small d=(\d+) L=(\d+) V=(\d+) T=(\d+) batch=(\d+) B=(\d+) d=(\S+)"


def derive(name: str) -> dict[str, Any]:
    """Rates of one card: seconds, and shares of the dense product's seconds, rounded to four digits."""
    with LEDGER.open() as file:
        rows = [row for row in csv.DictReader(file) if row["cpu"].startswith(CARDS[name]) and row["ratio"] != "nan"]
    layers = [_layer(rows, shape) for shape in SHAPES]
    used = [row for row in rows if row["benchmark"] in ("gpu_layers", "gpu_train_step", "gpu_step_kernels")]
    last = used[-1]
    return {
        "source": f"{last['cpu'].split(' (')[0]}, torch {last['torch']}, {last['date']}",
        "dtype": last["dtype"],
        "layers": layers,
        "step": _step(rows),
    }


def _layer(rows: list[dict[str, str]], shape: tuple[int, int, int]) -> dict[str, Any]:
    times: dict[tuple[int, float, str, str], float] = {}
    for row in rows:
        found = re.fullmatch(_LAYER, row["case"]) if row["benchmark"] == "gpu_layers" else None
        if found and tuple(map(int, found.groups()[:3])) == shape:
            times[int(found[4]), float(found[5]), found[6], row["side"]] = float(row["median_s"])
    cells = sorted({(block, density) for block, density, *_ in times})
    sparse: dict[int, list[tuple[float, float, float]]] = {}
    for block, density in cells:
        dense = times[block, density, "sum", "dense"]
        shares = (times[block, density, what, "mst"] / dense for what in ("sum", "grad-weight"))
        sparse.setdefault(block, []).append((density, *(_digits(x) for x in shares)))  # type: ignore[arg-type]
    at = next(cell for cell in cells if round(cell[1], 1) == 0.2)
    dense = times[(*at, "sum", "dense")]
    share = _digits(times[(*at, "grad-weight", "dense")] / dense)
    return {"shape": shape, "dense_s": _digits(dense), "grad_weight": share, "sparse": sparse}


def _step(rows: list[dict[str, str]]) -> dict[str, Any]:
    """A whole step of GPT-2 small, dense and sparse, and its products."""
    steps: dict[str, float] = {}
    products: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["benchmark"] == "gpu_train_step":
            found = re.fullmatch(_STEP, row["case"])
            assert found, row["case"]
            steps[row["side"]] = float(row["median_s"])
        elif row["benchmark"] == "gpu_step_kernels" and row["case"].endswith((" templates", " dense products")):
            products[row["side"], row["case"].split(found[0])[1].strip()] = float(row["median_s"])  # type: ignore[index]
    assert found
    width, depth, vocabulary, length, batch = map(int, found.groups()[:5])
    # Rows and columns of all linear weights, of which activations are read and written: c_attn, c_proj, c_fc, c_proj.
    features = depth * width * (4 + 2 + 5 + 5) + vocabulary + width
    sums = {side: sum(s for (of, _), s in products.items() if of == side) for side in steps}
    return {
        "tokens": batch * length,
        "features": features,
        "weights": 4 * depth + 1,
        "dense_s": _digits(steps["inductor"]),
        "dense_products_s": _digits(sums["inductor"]),
        "sparse_s": _digits(steps["mst"]),
        "sparse_products_s": _digits(sums["mst"]),
    }


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    pprint.pp({name: derive(name) for name in CARDS}, width=116)
