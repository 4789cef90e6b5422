"""The example script end to end, tiny: what it writes, resuming, and the compiled path."""

from __future__ import annotations

import csv
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

for needed in ("tokenizers", "tqdm", "matplotlib", "transformers"):
    pytest.importorskip(needed)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import pretrain_gpt  # noqa: E402
from pretraining import data, flops, options  # noqa: E402

ALL_RUNS = "dense,mst,small,static,short"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentence = "the quick brown fox jumps over a lazy dog and then it sleeps under one old tree"
    drawn = random.Random(0).choices(sentence.split(" "), k=12_000)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("\n".join(" ".join(drawn[i : i + 12]) for i in range(0, len(drawn), 12)))
    return file


def arguments(text: Path, out: Path, *more: str) -> list[str]:
    tiny = (
        "--tokenizer bytes --d-model 32 --layers 1 --heads 2 --context 32 --batch 2 --steps 20 --chunk 4 --no-compile"
    )
    return ["--data", str(text), "--out", str(out), *tiny.split(), *more]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "scalars.jsonl").read_text().splitlines()]


def test_writes_everything(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = pretrain_gpt.main(arguments(text, tmp_path, "--runs", ALL_RUNS))
    by_run = {r["run"]: r for r in results}
    assert list(by_run) == ALL_RUNS.split(",")
    for name in by_run:
        assert len(losses(tmp_path / name)) == by_run[name]["steps"]
        with open(tmp_path / name / "scalars.csv") as file:
            rows = list(csv.DictReader(file))
        assert [float(row["loss"]) for row in rows] == losses(tmp_path / name)
        assert float(rows[-1]["flops"]) == by_run[name]["training_flops"]
        assert (tmp_path / name / "model.pt").exists()
    for file in ("results.json", "results.md", "loss.png", "density.png", "masks_mst.png", "masks_static.png"):
        assert (tmp_path / file).stat().st_size > 0, file
    assert by_run["mst"]["density"] == 1.0
    snapshots = torch.load(tmp_path / "mst" / "checkpoint.pt", weights_only=True)["snapshots"]
    moments = [moment.split(",")[0] for moment in snapshots]  # this schedule has no warm-up
    assert moments == ["plateau begins", "plateau ends", "restoration", "end"]
    assert by_run["static"]["density"] == pytest.approx(0.2, abs=0.1)
    assert by_run["mst"]["flops_vs_dense"] < 0.8
    assert "loaded into plain transformers" in capsys.readouterr().out


def test_runs_share_data_and_first_weights(text: Path, tmp_path: Path) -> None:
    pretrain_gpt.main(arguments(text, tmp_path, "--runs", "dense,mst", "--published"))
    dense, mst = losses(tmp_path / "dense"), losses(tmp_path / "mst")
    assert dense[0] == mst[0]  # the warm-up starts dense
    assert dense[5:] != mst[5:]


def test_resumed_run_equals_uninterrupted_one(text: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain_gpt.main(arguments(text, whole, "--runs", "mst"))
    assert pretrain_gpt.main(arguments(text, parts, "--runs", "mst", "--stop-at", "7")) == []
    pretrain_gpt.main(arguments(text, parts, "--runs", "mst", "--resume"))
    assert losses(parts / "mst") == losses(whole / "mst")
    one, other = (torch.load(folder / "mst" / "model.pt", weights_only=True) for folder in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_scalars_survive_a_crash_after_a_checkpoint(text: Path, tmp_path: Path) -> None:
    pretrain_gpt.main(arguments(text, tmp_path, "--runs", "dense", "--stop-at", "6"))
    before = losses(tmp_path / "dense")
    with open(tmp_path / "dense" / "scalars.jsonl", "a") as file:  # rows that no checkpoint covers
        file.write('{"step": 7, "loss": 0.0}\n')
    pretrain_gpt.main(arguments(text, tmp_path, "--runs", "dense", "--resume"))
    assert losses(tmp_path / "dense")[:6] == before
    assert len(losses(tmp_path / "dense")) == 20


def test_resume_refuses_other_options(text: Path, tmp_path: Path) -> None:
    pretrain_gpt.main(arguments(text, tmp_path, "--runs", "dense", "--stop-at", "2"))
    with pytest.raises(SystemExit, match="lr"):
        pretrain_gpt.main(arguments(text, tmp_path, "--runs", "dense", "--resume", "--lr", "0.5"))


def test_compiled_run_follows_eager_run(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the progress bar says that it compiles while it does, not when it has."""
    eager = arguments(text, tmp_path / "eager", "--runs", "mst", "--steps", "12")
    pretrain_gpt.main(eager)
    assert "compiling" not in capsys.readouterr().err
    compiled = arguments(text, tmp_path / "compiled", "--runs", "mst", "--steps", "12")
    compiled.remove("--no-compile")
    results = pretrain_gpt.main(compiled)
    bar = re.split(r"[\r\n]+", capsys.readouterr().err)
    said = [bool(re.match(r"mst +compiling:.*0/12", line)) for line in bar]
    stepped = [bool(re.match(r"mst +: .*loss", line)) for line in bar]
    assert any(said)
    assert said.index(True) < stepped.index(True)
    assert not bar[-1].startswith("mst    compiling")
    assert losses(tmp_path / "compiled" / "mst") == pytest.approx(losses(tmp_path / "eager" / "mst"), rel=1e-3)
    assert results[0]["compile_seconds"] > 0


def test_byte_pairs_round_trip(text: Path, tmp_path: Path) -> None:
    first = data.load_corpus([text], "bpe", 300, 0, tmp_path)
    again = data.load_corpus([text], "bpe", 300, 0, tmp_path)  # from tokenizer.json
    assert first.vocabulary <= 300
    assert torch.equal(first.train, again.train)
    assert first.decode(first.encode("the quick brown fox")) == "the quick brown fox"


def test_batches_depend_on_seed_and_step_alone() -> None:
    tokens = torch.arange(1000, dtype=torch.int32)
    one = data.training_batch(tokens, 4, 16, seed=3, step=5)
    data.training_batch(tokens, 4, 16, seed=3, step=6)
    assert torch.equal(one, data.training_batch(tokens, 4, 16, seed=3, step=5))
    assert not torch.equal(one, data.training_batch(tokens, 4, 16, seed=4, step=5))
    assert one.shape == (4, 16)
    assert torch.equal(one[:, 1:] - one[:, :-1], torch.ones(4, 15, dtype=torch.long))


def test_matching_width_meets_the_budget() -> None:
    chosen = options.parse(["--d-model", "384", "--steps", "400"])
    shape = flops.Shape(384, 4, 6, 256, 2048)
    budget = flops.planned_flops(shape, 2048, 400, chosen.mixed_sparsity())
    small = flops.matching_width(shape, 2048, 400, budget)
    assert 2 / 3 <= small.d_model / small.heads / 64 <= 4 / 3
    assert flops.planned_flops(small, 2048, 400) == pytest.approx(budget, rel=0.06)


def test_learning_rate_decays_only_while_dense() -> None:
    chosen = options.parse(["--steps", "100", "--settle", "0.2", "--lr", "1.0"])
    rates = [chosen.learning_rate(step, 100) for step in range(100)]
    schedule = chosen.mixed_sparsity()
    assert max(rates) == 1.0
    assert all(rate == 1.0 for rate in rates[10 : schedule.restoration_end + 1])
    assert rates[-1] < 0.1


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on(text: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as a checkpoint is being written: the one before is whole, and the end is the same."""
    script = Path(pretrain_gpt.__file__)
    more = ["--runs", "mst", "--checkpoint-every", "1", "--eval-every", "100"]
    pretrain_gpt.main(arguments(text, tmp_path / "whole", *more))
    out = tmp_path / "killed"
    command = [sys.executable, str(script), *arguments(text, out, *more)]
    killed = 0
    for resume in ([], ["--resume"]):
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        checkpoint, writing = out / "mst" / "checkpoint.pt", out / "mst" / "checkpoint.tmp"
        seen = checkpoint.stat().st_mtime_ns if resume else -1
        while process.poll() is None:
            if writing.exists() and checkpoint.exists() and checkpoint.stat().st_mtime_ns != seen:
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.0005)  # writing takes longer
        process.wait()
        state = torch.load(checkpoint, weights_only=True)
        assert 0 < state["step"] < 20
    assert killed == 2
    pretrain_gpt.main(arguments(text, out, *more, "--resume"))
    assert losses(out / "mst") == losses(tmp_path / "whole" / "mst")
