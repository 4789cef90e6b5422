"""Figures and the page: of runs of all kinds, with names that mean something in HTML and in matplotlib."""

from __future__ import annotations

import html
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from mst_compile import Constant, MixedSparsity, sparsify
from mst_compile.__main__ import main
from mst_compile.report import Recorder, figures, read

EVIL = "_a</title><script>alert(1)</script>&$x_{"


class Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(32, 32))
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.name)(x)


def record(folder: Path, schedule: Any, *, label: str | None = None, bad: bool = False, steps: int = 12) -> Path:
    torch.manual_seed(0)
    model = Named("<i>$layer")
    if schedule is not None:
        sparsify(model, schedule, block=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(model, folder, tokens_per_step=4, label=label, notes={"<u>note": "<s>x"}) as recorder:
        for i in range(steps):
            model(torch.randn(4, 32)).square().mean().backward()
            optimizer.step()
            loss = math.nan if bad else 1 / (i + 1)
            recorder.log(loss=loss, val_loss=loss if i % 4 == 3 else None, **{"<b>": i})
        recorder.sample("<img src=x onerror=alert(2)>")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "dense": record(folder / "dense", None),
        "sparse": record(folder / "sparse", MixedSparsity.published(12, interval=2, warmup=0.25)),
        "no events": record(folder / "still", Constant(0.7, growth="none")),
        "nan": record(folder / "nan", MixedSparsity(12), bad=True),
        "html": record(folder / "evil", MixedSparsity(12), label=EVIL),
        "empty": record(folder / "empty", MixedSparsity(12), steps=0),
    }


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def page(capsys: pytest.CaptureFixture[str], out: Path, *folders: Path) -> str:
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    return out.read_text()


@pytest.mark.parametrize("name", ["dense", "sparse", "no events", "nan", "html", "empty"])
def test_a_page_of_one_run(
    name: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page(capsys, tmp_path / "page.html", runs[name])
    shown = html.unescape(re.sub(r"<[^>]+>", " ", text))
    assert "MixedSparsity(total_steps=12" in shown or name in ("dense", "no events")
    assert ("Phases" in shown) == (name in ("sparse", "nan", "html"))
    assert ("None" in shown) == (name in ("dense", "no events", "empty"))
    assert "<s>x" in shown
    assert "Named, 1,056 parameters" in shown
    images = text.count("data:image/svg+xml;base64,")
    assert images == {"dense": 1, "sparse": 3, "no events": 3, "nan": 2, "html": 3, "empty": 1}[name]


def test_all_runs_compared(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of theirs is taken for HTML, and nothing is loaded from anywhere."""
    text = page(capsys, tmp_path / "page.html", *runs.values(), runs["dense"])
    tags = Tags()
    tags.feed(text)
    assert not {tag for tag, _ in tags.found} & {"script", "link", "iframe", "i", "b", "u", "s", "object"}
    for tag, attributes in tags.found:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href"):
            assert str(attributes.get(name, "data:")).startswith("data:")
    assert "url(" not in text
    shown = html.unescape(re.sub(r"<[^>]+>", " ", text))
    for words in (EVIL, "<i>$layer.weight", "dense (1)", "dense (2)", "sparse against dense (1)"):
        assert words in shown, words
    assert "less" in shown


def test_what_was_saved(runs: dict[str, Path]) -> None:
    from mst_compile.report.page import savings

    (line,) = savings([read(runs["sparse"]), read(runs["dense"])])
    flops = [read(runs[name]).last("flops") for name in ("sparse", "dense")]
    assert None not in flops
    assert f"{1 - flops[0] / flops[1]:.0%} less" in line  # type: ignore[operator]
    (alone,) = savings([read(runs["sparse"])])
    assert "of the FLOPs of its dense model" in alone


def test_figures_as_files(runs: dict[str, Path], tmp_path: Path) -> None:
    for name, files in (("sparse", {"loss.png", "density.png", "masks.png"}), ("dense", {"loss.png"})):
        written = figures.draw([read(runs[name])], tmp_path)
        assert {file.name for file in written} == files
        assert all(file.read_bytes().startswith(b"\x89PNG") for file in written)


def test_legends_are_complete_and_no_label_lies_on_another(runs: dict[str, Path]) -> None:
    histories = [read(runs[name]) for name in ("dense", "sparse", "html", "nan")]
    drawn = dict(figures.figures(histories))
    for name, figure in drawn.items():
        figure.draw_without_rendering()
        if name in ("loss", "density"):
            labels = " ".join(text.get_text() for text in figure.legends[0].get_texts())
            assert all(h.label in labels for h in histories if h.sparse or name == "loss")
        legend = figure.legends[0].get_window_extent()
        for axis in figure.axes:
            assert not legend.overlaps(axis.get_window_extent())
            names = [text.get_window_extent() for text in axis.texts]
            assert not any(a.overlaps(b) for i, a in enumerate(names) for b in names[:i])
            assert not any(text.overlaps(axis.get_window_extent()) for text in names)


def test_blocks_are_square(runs: dict[str, Path]) -> None:
    figure = figures.mask_figure(read(runs["sparse"]))
    figure.draw_without_rendering()
    assert all(axis.get_aspect() == 1 for axis in figure.axes)


def test_names_of_weights_break_at_dots() -> None:
    assert figures._short("transformer.h.0.attn.c_attn.weight") == "transformer.h.0.\nattn.c_attn"
    long = figures._short("decoder.layers.11.feed_forward_without_any_dot.weight").split("\n")
    assert all(len(line) <= 18 for line in long)
    assert "".join(long).endswith("feed_forward_without_any_dot")


def test_a_mean_goes_over_what_is_not_finite() -> None:
    values = figures.smooth([1.0, math.nan, 1.0, math.inf, 1.0], 3)
    assert [math.isnan(v) for v in values] == [False, True, False, True, False]
    assert [v for v in values if not math.isnan(v)] == pytest.approx([1.0, 1.0, 1.0])


def test_what_cannot_be_reported(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no recorded run" in capsys.readouterr().err
    assert main(["report", str(runs["dense"]), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "--out must name a file" in capsys.readouterr().err
