"""The model types of the installed transformers, each with the class that stands for it."""

from __future__ import annotations

import re
from typing import Any

# The first mapping that knows a type gives its class: those with a head before those without.
_MAPPINGS = (
    "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM", "CAUSAL_LM", "CTC",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION",
    "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION", "TIME_SERIES_PREDICTION", "SEQUENCE_CLASSIFICATION",
)  # fmt: skip


_PART = re.compile(r"_(text|vision|encoder|audio|decoder|vqmodel|qformer)(_model|_config)?$")


def model_types() -> list[str]:
    """All names of configurations, without those of parts of another type, which run within that."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(name for name in CONFIG_MAPPING_NAMES if not _PART.search(name))


def classes(name: str) -> list[Any]:
    """The model classes of a type, that with a head before the bare one; empty if it has none."""
    import transformers
    from transformers.models.auto import modeling_auto

    found: list[str] = []
    for mapping in (*(f"MODEL_FOR_{m}_MAPPING_NAMES" for m in _MAPPINGS), "MODEL_MAPPING_NAMES"):
        known = getattr(modeling_auto, mapping).get(name)
        names = [known] if isinstance(known, str) else list(known or ())
        if names and (not found or mapping == "MODEL_MAPPING_NAMES"):
            found += names[:1]
    return [c for c in (getattr(transformers, n, None) for n in dict.fromkeys(found)) if c is not None]
