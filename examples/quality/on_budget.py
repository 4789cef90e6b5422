"""Configurations of one budget of FLOPs (``sizes.BUDGET``): dense models of every width, and wider sparse ones,
with the steps that it allows."""

from __future__ import annotations

from typing import Any

from .config import START_80, Config, config

_SET: dict[str, Any] = {"growth": "random", "drop_fraction": 0.3, "interval": 50}


def _budgeted(name: str, note: str, width: int, **changes: Any) -> Config:
    settings: dict[str, Any] = {"width": width, "length": "match", "decay_law": "independent"}
    return config(name, f"{note}, width {width}", **settings | changes)


ON_BUDGET: tuple[Config, ...] = (
    *(_budgeted(f"dense-{width}-match", "dense", width, kind="dense") for width in (80, 48, 96, 128)),
    _budgeted("wide-128-b8", "static 80 %, B = 8", 128, kind="constant"),
    _budgeted("wide-128-b1-set", "SET 80 %, unstructured", 128, kind="constant", block=1, **_SET),
    _budgeted("wide-96-60", "static 60 %, B = 8", 96, kind="constant", sparsity=0.6),
    _budgeted("wide-128-b8-set", "SET 80 %, B = 8", 128, kind="constant", **_SET),
    _budgeted("wide-128-b4", "static 80 %, B = 4", 128, kind="constant", block=4),
    _budgeted("wide-128-b1", "static 80 %, unstructured", 128, kind="constant", block=1),
    _budgeted("wide-192-90", "static 90 %, B = 8", 192, kind="constant", sparsity=0.9),
    _budgeted("wide-96-start", "80 % from the start, no drop-and-grow", 96, **START_80),
    *(
        _budgeted(f"{name}-rate-{word}", f"{note}, {word} the rate", width, learning_rate=factor, **changes)
        for word, factor in (("half", 0.5), ("double", 2.0), ("quadruple", 4.0))
        for name, note, width, changes in (
            ("dense-80-match", "dense", 80, {"kind": "dense"}),
            ("dense-64-match", "dense", 64, {"kind": "dense"}),
            ("wide-128-b8", "static 80 %, B = 8", 128, {"kind": "constant"}),
            ("wide-128-b1-set", "SET 80 %, unstructured", 128, {"kind": "constant", "block": 1, **_SET}),
        )
    ),
    *(
        _budgeted(f"dense-{width}-{word}", f"dense, {note}, double the rate", width, **more, kind="dense")
        for width in (48, 64, 80)
        for word, note, more in (
            ("more", "half as many FLOPs again", {"budget": 1.5, "learning_rate": 2.0}),
            ("some-more", "a fifth more FLOPs", {"budget": 1.2, "learning_rate": 2.0}),
            ("some-less", "a seventh of the FLOPs fewer", {"budget": 0.86, "learning_rate": 2.0}),
        )
    ),
    *(
        _budgeted(f"dense-{width}-match-rate-double", "dense, double the rate", width, kind="dense", learning_rate=2.0)
        for width in (32, 40, 48, 56, 96)
    ),
    _budgeted("dense-48-match-rate-quadruple", "dense, quadruple the rate", 48, kind="dense", learning_rate=4.0),
    _budgeted("wide-96-b8-rate-double", "static 80 %, B = 8, double the rate", 96, kind="constant", learning_rate=2.0),
    *(
        _budgeted(
            f"wide-96-b{block}-set-rate-double",
            f"SET 80 %, {'unstructured' if block == 1 else f'B = {block}'}, double the rate",
            96,
            kind="constant",
            block=block,
            learning_rate=2.0,
            **_SET,
        )
        for block in (1, 2, 4, 8)
    ),
    *(
        _budgeted(
            f"wide-{width}{'' if percent == 80 else f'-{percent}'}-b2-set-rate-double",
            f"SET {percent} %, B = 2, double the rate",
            width,
            kind="constant",
            block=2,
            learning_rate=2.0,
            **_SET if percent == 80 else _SET | {"sparsity": percent / 100},
        )
        for width, percent in ((128, 80), (80, 80), (80, 70), (96, 90))
    ),
    _budgeted("dense-32-match", "dense", 32, kind="dense"),
    # Denser, so with fewer steps, which take the time that does not depend on the density.
    *(
        _budgeted(
            f"wide-96-70-b{block}-set-rate-double",
            f"SET 70 %, {'unstructured' if block == 1 else f'B = {block}'}, double the rate",
            96,
            kind="constant",
            block=block,
            learning_rate=2.0,
            **_SET | {"sparsity": 0.7},
        )
        for block in (1, 2, 4)
    ),
    # What might help blocks of 8: one thing changed of each.
    *(
        _budgeted(f"wide-{width}-b8{name}", f"static 80 %, B = 8, {note}", width, **{"kind": "constant", **changes})
        for width, name, note, changes in (
            (96, "-rate-quadruple", "quadruple the rate", {"learning_rate": 4.0}),
            (256, "-rate-quadruple", "quadruple the rate", {"learning_rate": 4.0}),
            *(
                (96, f"-{name}-rate-double", f"{note}, double the rate", {"learning_rate": 2.0} | changes)
                for name, note, changes in (
                    ("uniform", "the same density in every layer", {"distribution": "uniform"}),
                    ("attention-60", "attention at 60 %", {"overrides": (("*.attention.*", 0.6, None),)}),
                    ("unscaled", "first weights not rescaled", {"rescale": False}),
                )
            ),
        )
    ),
    *(
        _budgeted(
            f"wide-{width}-{percent}-b8-rate-double",
            f"static {percent} %, B = 8, double the rate",
            width,
            kind="constant",
            sparsity=percent / 100,
            learning_rate=2.0,
        )
        for width, percent in (
            *((64, 50), (80, 70), (96, 70), (80, 60), (96, 60), (96, 50), (112, 70)),
            *((128, 70), (128, 60), (160, 70), (192, 70), (192, 60), (224, 70), (256, 70)),
        )
    ),
    *(
        _budgeted(
            f"wide-96-b8-set-{name}-rate-double",
            f"SET 80 %, B = 8, {note}, double the rate",
            96,
            kind="constant",
            learning_rate=2.0,
            **_SET | changes,
        )
        for name, note, changes in (
            ("l1", "L1 magnitude", {"magnitude": "l1"}),
            ("gentle", "drop 10 %", {"drop_fraction": 0.1}),
            ("early", "events in the first quarter alone", {"until": 0.25}),
        )
    ),
    _budgeted(
        "wide-96-start-rate-double",
        "80 % from the start, dense at the end, double the rate",
        96,
        learning_rate=2.0,
        **START_80,
    ),
    *(
        _budgeted(
            f"wide-{width}-b2-set-rate-quadruple",
            "SET 80 %, B = 2, quadruple the rate",
            width,
            kind="constant",
            block=2,
            learning_rate=4.0,
            **_SET,
        )
        for width in (96, 128)
    ),
    *(
        _budgeted(
            f"wide-{width}-70-b8{name}-rate-double",
            f"{note}, B = 8, double the rate",
            width,
            kind="constant",
            sparsity=0.7,
            learning_rate=2.0,
            **changes,
        )
        for width in (96, 128)
        for name, note, changes in (
            ("-set", "SET 70 %", _SET),
            ("-attention-50", "static 70 %, attention at 50 %", {"overrides": (("*.attention.*", 0.5, None),)}),
        )
    ),
    # Denser attention, in blocks of 8 and of 2.
    *(
        _budgeted(
            f"wide-{width}{'' if percent == 80 else f'-{percent}'}-b{block}{'-set' if law else ''}"
            f"-attention-{attention}{ending}-rate-double",
            f"{'SET' if law else 'static'} {percent} %, B = {block}, attention at {attention} %{note}, double the rate",
            width,
            kind="constant",
            block=block,
            learning_rate=2.0,
            overrides=(("*.attention.*", attention / 100, None),),
            **law | changes | ({} if percent == 80 else {"sparsity": percent / 100}),
        )
        for width, percent, block, law, attention, ending, note, changes in (
            (96, 80, 8, {}, 40, "", "", {}),
            (96, 80, 8, {}, 0, "", "", {}),
            (80, 80, 8, {}, 0, "", "", {}),
            (96, 80, 8, {}, 60, "-unscaled", ", first weights not rescaled", {"rescale": False}),
            (96, 80, 8, {}, 60, "-uniform", ", the same density elsewhere", {"distribution": "uniform"}),
            (96, 80, 8, _SET, 60, "", "", {}),
            (96, 90, 8, {}, 0, "", "", {}),
            (96, 80, 2, _SET, 60, "", "", {}),
            (96, 80, 2, _SET, 0, "", "", {}),
        )
    ),
    # The other methods.
    *(
        _budgeted(f"wide-96-{name}-rate-double", f"{note}, double the rate", 96, learning_rate=2.0, **settings)
        for name, note, settings in (
            ("b2-rigl", "RigL 80 %, B = 2", {"kind": "constant", "block": 2, **_SET | {"growth": "gradient"}}),
            ("b8-rigl", "RigL 80 %, B = 8", {"kind": "constant", **_SET | {"growth": "gradient"}}),
            ("b2-mst", "MST 90 %, B = 2", {"block": 2}),
            ("b2-mst-set", "MST 90 % with SET, B = 2", {"block": 2, "growth": "random"}),
        )
    ),
    # Models wide enough for blocks of 8 to be fine.
    *(
        _budgeted(f"dense-{width}-match-rate-double", "dense, double the rate", width, kind="dense", learning_rate=2.0)
        for width in (112, 128, 160)
    ),
    *(
        _budgeted(
            f"wide-{width}-b{block}{'-set' if law else ''}-rate-double",
            f"{'SET' if law else 'static'} 80 %, B = {block}, double the rate",
            width,
            kind="constant",
            block=block,
            learning_rate=2.0,
            **law,
        )
        for width in (192, 256)
        for block in (8, 4, 2)
        for law in ({}, _SET)
    ),
)
