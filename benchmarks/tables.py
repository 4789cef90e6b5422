"""Turn the ledger into the tables of README and docs/benchmarks.md and a plot, so that no figure is typed by hand.

python -m benchmarks.tables            # print the tables
python -m benchmarks.tables --write    # put them between the pages' markers and draw docs/speedup.png
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path
from typing import Any

from .ledger import LEDGER

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
PLOT = ROOT / "docs" / "speedup.png"
MACHINE = "AMD EPYC, family 26"  # in the processor's name: Zen 5, the machine of the README
ZEN4 = "AMD EPYC (avx2 avx512f avx512_bf16)"  # measured before rows named families
PORTABLE = "(avx2)"  # Zen 3
GPU = "H100"
_CASE = re.compile(r"(?P<layer>\d+->\d+) M=(?P<tokens>\d+) B=(?P<block>\d+) d=(?P<density>[\d.]+)")
_GPU_CASE = re.compile(
    r"M=(?P<tokens>\d+) N=(?P<n>\d+) K=(?P<k>\d+) B=(?P<block>\d+)(?: for=[\d.]+)? d=(?P<density>[\d.]+) sum"
)
_EXPERTS_CASE = re.compile(r"(?P<experts>\d+) experts (?P<layer>\d+->\d+) M=\d+ B=\d+ d=(?P<density>[\d.]+)")
_MODEL_CASE = re.compile(r"(?P<model>\w+) (?P<what>\w+) d=(?P<density>[\d.]+)")
_MODEL_DENSITIES = (1, 0.5, 0.2, 0.05)
_FORMS = {"mst": "as trained", "packed": "packed"}  # of a sparse model's weights at inference, by side
_ATTENTION = re.compile(r"T=(?P<length>\d+) heads=\S+ (?P<pattern>\w+)")


def read() -> list[dict[str, str]]:
    """All rows; of equal measurements the newest counts."""
    with LEDGER.open(newline="") as file:
        rows = list(csv.DictReader(file))
    newest = {(r["benchmark"], r["case"], r["side"], r["threads"], r["dtype"], r["cpu"]): r for r in rows}
    return list(newest.values())


def layer_rows(rows: list[dict[str, str]], machine: str = MACHINE) -> list[dict[str, str]]:
    """Rows of the layer benchmark on one machine, by default the README's, with the parts of their case."""
    found = []
    for row in rows:
        ours = row["benchmark"] == "layers" and machine in row["cpu"]
        case = _CASE.fullmatch(row["case"]) if ours else None
        if case:
            found.append(row | case.groupdict())
    return found


def densities_table(rows: list[dict[str, str]], machine: str, dtype: str = "float32") -> str:
    """Speed-up of each layer shape over the density, by block, on one machine."""
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        ours = row["benchmark"] == "never_slower" and machine in row["cpu"] and row["dtype"] == dtype
        case = _CASE.fullmatch(row["case"]) if ours else None
        if case:
            at = f"{round(float(case['density']), 2):g}"
            cells.setdefault((case["layer"], case["block"]), {})[at] = float(row["ratio"])
    measured = [float(at) for ratios in cells.values() for at in ratios]
    asked = (1, 0.9, 0.8, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
    shown = [f"{d:g}" for d in asked if any(abs(at - d) < 0.011 for at in measured)]
    lines = ["| layer | block | " + " | ".join(f"d = {d}" for d in shown) + " |", "|---|---|" + "---|" * len(shown)]
    for (layer, block), ratios in cells.items():
        # Blocks of 32 in a small layer do not give every density.
        near = [min(ratios, key=lambda at, d=d: abs(float(at) - float(d))) for d in shown]
        values = [
            f"{ratios[a]:.2f}x" if abs(float(a) - float(d)) < 0.011 else "" for a, d in zip(near, shown, strict=True)
        ]
        lines.append(f"| {layer} | {block} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def layers_table(rows: list[dict[str, str]], machine: str = MACHINE, short: bool = False) -> str:
    """Smallest and largest speed-up over the layer shapes, by dtype, threads, density and block.

    Args:
        short: two threads, and blocks that are chosen without asking for them.
    """
    cells: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for row in layer_rows(rows, machine):
        if short and (row["threads"] != "2" or int(row["block"]) < 4):
            continue
        key = (row["dtype"], row["threads"], f"{round(float(row['density']), 1):.1f}")
        cells.setdefault(key, {}).setdefault(int(row["block"]), []).append(float(row["ratio"]))
    blocks = sorted({b for by_block in cells.values() for b in by_block})
    lines = ["| dtype | threads | density | " + " | ".join(f"B = {b}" for b in blocks) + " |"]
    lines.append("|---|---|---|" + "---|" * len(blocks))
    for dtype, threads, density in sorted(cells, key=lambda key: (key[0] != "float32", *key)):
        by_block = cells[dtype, threads, density]
        values = [f"{min(by_block[b]):.1f} to {max(by_block[b]):.1f}x" if b in by_block else "" for b in blocks]
        lines.append(f"| {dtype} | {threads} | {density} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def model_table(rows: list[dict[str, str]], machine: str = MACHINE) -> str:
    """Whole training steps, whole schedules, memory, overhead."""
    lines = ["| what | dense (inductor) | mst | ratio |", "|---|---|---|---|"]
    by_case: dict[tuple[str, str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["case"].endswith(" steps"):
            continue  # of benchmarks/first_step.py, in a table of its own
        if row["benchmark"] in ("train_step", "schedule", "memory") and machine in row["cpu"]:
            key = (row["benchmark"], row["case"], f"{row['dtype']}, {row['threads']} threads")
            by_case.setdefault(key, {})[row["side"]] = row
    units = {
        "train_step": ("training step", "s"),
        "schedule": ("whole schedule", "s"),
        "memory": ("peak memory", "MiB"),
    }
    for (benchmark, case, conditions), sides in by_case.items():
        if not {"inductor", "mst"} <= sides.keys():
            continue
        what, unit = units[benchmark]
        dense, sparse = (float(sides[s]["median_s"]) for s in ("inductor", "mst"))
        digits = 0 if unit == "MiB" else 2
        ratio = sparse / dense if benchmark == "memory" else dense / sparse
        left, right = (f"{value:.{digits}f} {unit}" for value in (dense, sparse))
        lines.append(f"| {what}: {case}, {conditions} | {left} | {right} | **{ratio:.2f}x** |")
    return "\n".join(lines)


def architectures_table(rows: list[dict[str, str]], machine: str = MACHINE) -> str:
    """Speed-up of whole steps and calls of many architectures, by density."""
    cells: dict[tuple[str, str, str], dict[float, str]] = {}
    for row in rows:
        case = _MODEL_CASE.fullmatch(row["case"]) if row["benchmark"] == "models" and machine in row["cpu"] else None
        if case:
            key = (case["model"], case["what"], row["dtype"])
            near = min(_MODEL_DENSITIES, key=lambda d: abs(float(case["density"]) - d))
            cells.setdefault(key, {})[near] = f"{float(row['ratio']):.2f}x"
    lines = ["| model | what | dtype | " + " | ".join(f"d = {d:g}" for d in _MODEL_DENSITIES) + " |"]
    lines.append("|---|---|---|" + "---|" * len(_MODEL_DENSITIES))
    order = ("train", "evaluate", "generate")
    for key in sorted(cells, key=lambda key: (order.index(key[1]), key[2] != "float32", key[0])):
        values = [cells[key].get(d, "") for d in _MODEL_DENSITIES]
        lines.append(f"| {' | '.join(key)} | {' | '.join(values)} |")
    return "\n".join(lines)


def experts_table(rows: list[dict[str, str]], machine: str = MACHINE) -> str:
    """Speed-up of products of experts over the density; in brackets over a loop of dense products."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        ours = row["benchmark"] == "experts" and machine in row["cpu"]
        case = _EXPERTS_CASE.fullmatch(row["case"]) if ours else None
        if case:
            key = case["experts"], case["layer"], row["dtype"]
            loop = float(row["note"].partition(" ")[0])
            cells.setdefault(key, {})[f"{float(case['density']):.1f}"] = f"{float(row['ratio']):.2f}x ({loop:.1f}x)"
    shown = sorted({d for ratios in cells.values() for d in ratios}, reverse=True)
    lines = ["| experts | layer | dtype | " + " | ".join(f"d = {d}" for d in shown) + " |"]
    lines.append("|---|---|---|" + "---|" * len(shown))
    lines += [f"| {' | '.join(key)} | {' | '.join(cells[key].get(d, '') for d in shown)} |" for key in sorted(cells)]
    return "\n".join(lines)


def first_step_table(rows: list[dict[str, str]], machine: str = MACHINE) -> str:
    """Processor time of first steps, compilation included, and peak memory of later ones."""
    lines = ["| model | dtype | first step | of it ours | peak memory |", "|---|---|---|---|---|"]
    found: dict[tuple[str, str], dict[tuple[str, str], dict[str, str]]] = {}
    for row in rows:
        if row["benchmark"] in ("first_step", "memory") and machine in row["cpu"]:
            key = (row["case"].removesuffix(" steps"), row["dtype"])
            found.setdefault(key, {})[row["benchmark"], row["side"]] = row
    for (case, dtype), sides in found.items():
        if ("first_step", "mst") in sides:
            first, memory = sides["first_step", "mst"], sides["memory", "mst"]
            own = first["note"].rpartition("; ")[2]
            lines.append(
                f"| {case} | {dtype} | {float(first['ratio']):.2f} of dense, {float(first['median_s']):.0f} s | {own} "
                f"| {float(memory['ratio']):.3f} of dense, {float(memory['median_s']):.0f} MiB |"
            )
    return "\n".join(lines)


def attention_table(rows: list[dict[str, str]], machine: str = MACHINE, dtype: str = "float32") -> str:
    """Speed-up of attention over causal SDPA on two threads, by length and pattern."""
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        case = _ATTENTION.match(row["case"]) if row["benchmark"] == "attention" and machine in row["cpu"] else None
        if case and (row["dtype"], row["threads"]) == (dtype, "2"):
            cells.setdefault(case["pattern"], {})[int(case["length"])] = f"{float(row['ratio']):.1f}x"
    lengths = sorted({length for by_length in cells.values() for length in by_length})
    lines = ["| pattern | " + " | ".join(f"T = {length}" for length in lengths) + " |", "|---|" + "---|" * len(lengths)]
    for pattern in ("full", "local", "strided", "sparse", "fixed"):
        lines.append(f"| {pattern} | " + " | ".join(cells.get(pattern, {}).get(n, "") for n in lengths) + " |")
    return "\n".join(lines)


def inference_table(rows: list[dict[str, str]], machine: str = MACHINE) -> str:
    """Speed-up of a layer without gradients, by weights and tokens, at the default density."""
    cells: dict[tuple[str, str, str, str], dict[int, str]] = {}
    for row in rows:
        case = _CASE.fullmatch(row["case"]) if row["benchmark"] == "inference" and machine in row["cpu"] else None
        if case and float(case["density"]) == 0.2:
            key = (row["dtype"], case["layer"], case["block"], _FORMS[row["side"]])
            cells.setdefault(key, {})[int(case["tokens"])] = f"{float(row['ratio']):.1f}x"
    tokens = sorted({count for by_tokens in cells.values() for count in by_tokens})
    lines = ["| dtype | layer | block | weights | " + " | ".join(f"{n} token{'s' * (n > 1)}" for n in tokens) + " |"]
    lines.append("|---|---|---|---|" + "---|" * len(tokens))
    for key in sorted(cells, key=lambda key: (key[0] != "float32", key[1], int(key[2]), key[3])):
        by_tokens = cells[key]
        lines.append(f"| {' | '.join(key)} | " + " | ".join(by_tokens.get(n, "") for n in tokens) + " |")
    return "\n".join(lines)


def generation_table(rows: list[dict[str, str]], machine: str = MACHINE) -> str:
    """Text generated with a cache of keys and values: tokens a second."""
    lines = ["| model | dtype | weights | tokens a second | MiB of tensors | speed-up |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["benchmark"] == "inference" and machine in row["cpu"] and row["note"].startswith("tokens/s"):
            said = dict(part.split(": ") for part in row["note"].split("; "))
            parts = (row["case"], row["dtype"], _FORMS[row["side"]], said["tokens/s"], said.get("MiB", ""))
            lines.append(f"| {' | '.join(parts)} | {float(row['ratio']):.2f}x |")
    return "\n".join(lines)


def parallel_table(rows: list[dict[str, str]], machine: str = MACHINE) -> str:
    """A training step on one process and on tensor-parallel ranks, and what their collectives take of it."""
    cases: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["benchmark"] == "tensor_parallel" and machine in row["cpu"]:
            cases.setdefault(row["case"], {})[row["side"]] = row
    lines = ["| step, one thread a rank | dense (inductor) | mst | ratio | all-reduce alone |", "|---|---|---|---|---|"]
    for case, sides in cases.items():
        dense, ours = (1e3 * float(sides[side]["median_s"]) for side in ("inductor", "mst"))
        moved = f"{1e3 * float(sides['all-reduce']['median_s']):.1f} ms" if "all-reduce" in sides else ""
        lines.append(f"| {case}, float32 | {dense:.0f} ms | {ours:.0f} ms | **{dense / ours:.2f}x** | {moved} |")
    return "\n".join(lines)


def pretrain_table(rows: list[dict[str, str]]) -> str:
    """The newest runs of the example on one machine: loss, FLOPs and time, whatever they show."""
    lines = ["| run | validation loss, training FLOPs | training time | against dense |", "|---|---|---|---|"]
    found = [row for row in rows if row["benchmark"] == "pretrain"]
    for row in found:
        if (row["case"], row["cpu"]) == (found[-1]["case"], found[-1]["cpu"]):
            label, _, result = row["note"].partition(": ")
            lines.append(f"| {label} | {result} | {float(row['median_s']):.0f} s | {float(row['ratio']):.2f}x |")
    return "\n".join(lines)


def gpu_layers_table(rows: list[dict[str, str]]) -> str:
    """Speed-up of a layer's three products over cuBLAS on a GPU, by shape, block and density."""
    shown = (0.3, 0.2, 0.125, 0.1)
    cells: dict[tuple[int, int, int, int], dict[float, float]] = {}
    # "for": tiles were chosen for the density that was run, as they are for a schedule's plateau.
    for row in sorted(rows, key=lambda row: (row["date"], " for=" in row["case"])):
        ours = row["benchmark"] == "gpu_layers" and GPU in row["cpu"] and row["side"] == "mst"
        case = _GPU_CASE.fullmatch(row["case"]) if ours else None
        density = next((d for d in shown if case and abs(float(case["density"]) - d) < 0.005), None)
        if case and density:
            layer = (int(case["tokens"]), int(case["n"]), int(case["k"]), int(case["block"]))
            cells.setdefault(layer, {})[density] = float(row["ratio"])
    lines = [
        "| tokens | layer | block | " + " | ".join(f"d = {d}" for d in shown) + " |",
        "|---|---|---" + "|---" * 4 + "|",
    ]
    for (tokens, n, k, block), ratios in sorted(cells.items(), key=lambda item: (-item[0][1] * item[0][2], item[0])):
        values = [f"{ratios[d]:.2f}x" if d in ratios else "" for d in shown]
        lines.append(f"| {tokens} | {k}->{n} | {block} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def gpu_models_table(rows: list[dict[str, str]]) -> str:
    """Attention against causal SDPA, and whole steps against Inductor, on a GPU."""
    against = {"gpu_attention": ("attention", "causal SDPA"), "gpu_train_step": ("training step", "inductor")}
    lines = ["| what | against | speed-up |", "|---|---|---|"]
    for row in rows:
        if row["benchmark"] in against and row["side"] == "mst" and GPU in row["cpu"] and row["ratio"] != "nan":
            what, rival = against[row["benchmark"]]
            lines.append(f"| {what}: {row['case']}, {row['dtype']} | {rival} | {float(row['ratio']):.2f}x |")
    return "\n".join(lines)


def tables(rows: list[dict[str, str]]) -> dict[str, str]:
    """Name of a table in the pages -> the table."""
    return {
        "layers": layers_table(rows),
        "layers, two threads": layers_table(rows, short=True),
        "models": model_table(rows),
        "architectures": architectures_table(rows),
        "experts": experts_table(rows),
        "first steps": first_step_table(rows),
        "parallel": parallel_table(rows),
        "pretrain": pretrain_table(rows),
        "attention": attention_table(rows),
        "inference": inference_table(rows),
        "generation": generation_table(rows),
        "attention, bfloat16": attention_table(rows, dtype="bfloat16"),
        "densities": densities_table(rows, MACHINE, "bfloat16"),
        "densities, float32": densities_table(rows, MACHINE),
        "densities, portable": densities_table(rows, PORTABLE),
        "layers, zen4": layers_table(rows, ZEN4),
        "models, zen4": model_table(rows, ZEN4),
        "attention, zen4": attention_table(rows, ZEN4),
        "layers, portable": layers_table(rows, PORTABLE),
        "models, portable": model_table(rows, PORTABLE),
        "layers, gpu": gpu_layers_table(rows),
        "models, gpu": gpu_models_table(rows),
    }


def filled(page: Path, rows: list[dict[str, str]]) -> str:
    """A page's text with what stands between ``<!-- ledger:NAME -->`` and ``<!-- end -->`` replaced by the tables."""
    text = page.read_text()
    for name, table in tables(rows).items():
        text = re.sub(rf"(<!-- ledger:{name} -->\n).*?(<!-- end -->)", rf"\g<1>{table}\n\g<2>", text, flags=re.S)
    return text


def write(rows: list[dict[str, str]]) -> None:
    """Put the tables into the pages."""
    for page in (README, PAGE):
        page.write_text(filled(page, rows))


def plot(rows: list[dict[str, str]]) -> Any:
    """Figure of a layer's speed-up over density, a line a block, against 1/density; the default density is marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from mst_compile import MixedSparsity

    default = 1 - MixedSparsity(100).sparsity
    ours = [r for r in layer_rows(rows) if (r["threads"], r["layer"]) == ("2", "768->3072")]
    dtypes = sorted({r["dtype"] for r in ours}, reverse=True)
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(5.2 * len(dtypes), 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    # Masks have whole numbers of blocks: 0.101 stands at 0.1.
    ticks = sorted({default, *(round(float(r["density"]), 2) for r in ours)})
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        mine = [r for r in ours if r["dtype"] == dtype]
        axis.axvline(default, color="#999999", lw=1, ls="--", label=f"default density, {default:g}")
        axis.plot(ticks, [1 / d for d in ticks], "k:", label="1 / density")
        for block in sorted({int(r["block"]) for r in mine}):
            points = sorted((float(r["density"]), float(r["ratio"])) for r in mine if int(r["block"]) == block)
            axis.plot(*zip(*points, strict=True), marker="o", ms=5, label=f"blocks of {block}")
        axis.set(xscale="log", yscale="log", xlabel="density", title=dtype)
        speeds = [1, 2, 3, 5, 7, 10, 15]
        axis.set_yticks(speeds, [f"{t}x" for t in speeds])
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("speed-up over torch.compile(inductor)")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("A layer of 768 → 3072, forward + backward, 2 threads", fontsize=11)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="update the pages and docs/speedup.png")
    args = parser.parse_args()
    rows = read()
    if args.write:
        write(rows)
        plot(rows).savefig(PLOT, dpi=120)
    else:
        print(*(f"{name}\n\n{table}" for name, table in tables(rows).items()), sep="\n\n")


if __name__ == "__main__":
    main()
