"""Rates measured on machines that may not be at hand, by name, as benchmarks/ledger.csv holds them; written by
``python -m benchmarks.hardware``, and held to the ledger by a test.

``dense_s``: seconds of forward, grad-input and grad-weight of a layer [tokens, N, K], of which ``grad_weight`` is the
last one's share. ``sparse``: block -> (density, all three, grad-weight), as shares of ``dense_s``. ``step``: a whole
training step of GPT-2 small, AdamW included, at its density .1, and the products in it.
"""

from __future__ import annotations

from typing import Any

MEASURED: dict[str, Any] = {
    "H100": {
        "source": "NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, 2026-11-27",
        "dtype": "bfloat16",
        "layers": [
            {
                "shape": (16384, 4096, 4096),
                "dense_s": 0.001996,
                "grad_weight": 0.3394,
                "sparse": {
                    32: [
                        (0.05, 0.3117, 0.136),
                        (0.1, 0.4737, 0.1879),
                        (0.2, 0.8033, 0.2958),
                        (0.3, 1.156, 0.4165),
                        (0.5, 1.831, 0.6509),
                        (1.0, 3.393, 1.166),
                    ],
                    64: [
                        (0.05, 0.2101, 0.08637),
                        (0.1, 0.2961, 0.1141),
                        (0.2, 0.5057, 0.185),
                        (0.3, 0.7262, 0.2629),
                        (0.5, 1.143, 0.4064),
                        (1.0, 2.11, 0.7624),
                    ],
                    128: [
                        (0.05, 0.2018, 0.07569),
                        (0.1, 0.2501, 0.09454),
                        (0.2, 0.357, 0.1405),
                        (0.3, 0.4809, 0.1899),
                        (0.5, 0.7246, 0.2881),
                        (1.0, 1.272, 0.5268),
                    ],
                },
            },
            {
                "shape": (16384, 3072, 768),
                "dense_s": 0.0003352,
                "grad_weight": 0.3413,
                "sparse": {
                    32: [
                        (0.05, 0.8196, 0.4373),
                        (0.1, 0.8804, 0.4342),
                        (0.2, 1.054, 0.4428),
                        (0.3, 1.335, 0.5565),
                        (0.5, 1.856, 0.733),
                        (1.0, 2.886, 0.9336),
                    ],
                    64: [
                        (0.083, 0.5632, 0.2083),
                        (0.101, 0.5688, 0.2112),
                        (0.2, 0.6184, 0.2153),
                        (0.3, 0.8217, 0.3238),
                        (0.5, 1.085, 0.3775),
                        (1.0, 1.818, 0.6331),
                    ],
                    128: [
                        (0.167, 0.6112, 0.2234),
                        (0.201, 0.6435, 0.2341),
                        (0.299, 0.7514, 0.2813),
                        (0.5, 0.9558, 0.3669),
                        (1.0, 1.396, 0.5449),
                    ],
                },
            },
        ],
        "step": {
            "tokens": 16384,
            "features": 198528,
            "weights": 49,
            "dense_s": 0.03704,
            "dense_products_s": 0.01703,
            "sparse_s": 0.04109,
            "sparse_products_s": 0.01428,
        },
    }
}

# Bytes a second that each of the cards sends and receives at a time, by the maker's data sheet: not measured.
BANDWIDTH: dict[str, tuple[float, str]] = {"H100": (450e9, "NVIDIA's data sheet, NVLink of an SXM card, one direction")}
