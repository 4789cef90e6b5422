"""Put the result of a run of the example into the ledger, and its figures into docs/.

make demo && python -m benchmarks.pretrain runs/pretrain_gpt
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from .ledger import record
from .tables import ROOT

FIGURES = {"loss.png": "pretrain_loss.png", "masks_mst.png": "pretrain_masks.png"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the example's output folder")
    args = parser.parse_args()
    found = json.loads((args.run / "results.json").read_text())
    options = found["options"]
    torch.set_num_threads(found["machine"]["threads"])  # the ledger names them
    case = (
        f"gpt2 d={options['d_model']} L={options['layers']} T={options['context']} batch={options['batch']} "
        f"{'published' if options['published'] else 'default'} hidden-rate={options['hidden_rate']} "
        f"steps={options['steps']}"
    )
    for run in found["results"]:
        note = f"{run['label']}: val. loss {run['val_loss']:.3f}, {run['training_flops'] / 1e12:.1f} TFLOP"
        ratio = 1 / run["seconds_vs_dense"]
        record("pretrain", case, run["run"], run["training_seconds"], ratio, run["steps"], options["dtype"], note)
    for name, target in FIGURES.items():
        shutil.copyfile(args.run / name, ROOT / "docs" / target)


if __name__ == "__main__":
    main()
