"""Make a small configuration of any model type of transformers, by the names of its sizes.

Nothing here knows single models: what a size is called says what becomes of it. Sizes that follow from others (a head's
from the width, the kinds of layers from their number) are left to the configuration to derive, where it does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

WIDTH, HEADS, SIZE, VOCABULARY, LENGTH = 64, 2, 32, 160, 12
IMAGE = 64  # pixels along an edge
_BASE = {
    "chunk_size_feed_forward", "transformers_version", "architectures", "dtype", "id2label", "label2id", "problem_type",
    "is_encoder_decoder", "return_dict", "output_hidden_states",
}  # fmt: skip

# The first rule whose pattern a name matches counts.
_RULES: list[tuple[str, Callable[[int], int]]] = [
    (r"vocab_size$|vocab_size_per_layer_input$", lambda v: min(v, VOCABULARY)),
    (r"first_k_dense_replace$|num_dense_layers$|num_shared_experts$|n_shared_experts$", lambda v: min(v, 1)),
    (r"n_groups?$|topk_group$|num_expert_group$", lambda v: 1),
    (r"(per_tok|top_?k|top_k_experts|moe_k)$", lambda v: min(v, 2)),
    (r"experts$", lambda v: min(v, 4)),
    (r"(num_)?(key_value|kv)_heads$|num_key_value_groups$|num_query_groups$", lambda v: 1),
    (r"mamba_(n|num)_heads$|linear_num_(key|value)_heads$", lambda v: min(v, 8)),
    (r"heads$|n_head$", lambda v: min(v, HEADS)),
    (r"kv_lora_rank$|q_lora_rank$|lora_rank$|_lora_dim$|state_size$|d_state$|dt_rank$", lambda v: min(v, 16)),
    (r"head_dim$|d_kv$|d_head$|dim_head$|head_size$|qk_dim$", lambda v: min(v, SIZE)),
    (r"(num_hidden|num|n|encoder|decoder)_layers?$|_layers$|^layers$|depth$|num_blocks$", lambda v: min(v, 2)),
    (r"moe_intermediate_size$|expert_intermediate_size$", lambda v: min(v, WIDTH // 2)),
    (r"intermediate_size|ffn_dim$|d_ff$|n_inner$|d_inner$|ffn_hidden_size$|feedforward(_dim)?$|ffn_size$|intermediate_dim$",
     lambda v: min(v, 2 * WIDTH)),
    (r"hidden_size|d_model$|n_embd$|embed_dim$|embedding_dim$|embedding_size$|^dim$|hidden_dim$|projection_dim$|"
     r"proj_dim$|width$|projection_size$|emb_dim$|output_dim$|lru_width$|_hidden$|query_dim$|model_dim$|in_dim$|"
     r"pooler_output_size$|fusion_hidden|latent_dim$", lambda v: min(v, WIDTH)),
    (r"num_queries$|num_latents$|num_query_tokens$|d_latents$|n_latents$", lambda v: min(v, 16)),
    (r"max_position|n_positions$|max_2d_position|n_ctx$|max_sequence_length$|context_length$", lambda v: min(v, 128)),
    (r"max_source_positions$|max_target_positions$", lambda v: min(v, 64)),
    (r"image_size$|img_size$|^resolution$|crop_size$", lambda v: IMAGE if v > IMAGE else v),
    (r"num_frames$", lambda v: min(v, 4)),
]  # fmt: skip
_HYBRID = {"layer_types", "layers_block_type", "attn_layer_period", "block_types", "attention_types", "mlp_layer_types"}
_LAYERS = re.compile(r"^(num_hidden|n|num)_layers?$")
_ALWAYS = re.compile(r"layers?$|vocab_size|experts$|drop|prob$|depths$|spec_augment|token")
_TOKEN = re.compile(r"(token_id|token_index|_idx|_token|token_ids?)$")


def _int(name: str, value: int) -> int:
    for pattern, rule in _RULES:
        if re.search(pattern, name):
            return rule(value) if value > 0 else value
    return value


def _value(name: str, value: Any, layers: int) -> Any:
    """What becomes of one field; the same object if nothing does."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return False if name == "apply_spec_augment" else value
    if isinstance(value, float) and ("drop" in name or (name.startswith("mask_") and name.endswith("_prob"))):
        return 0.0
    if isinstance(value, int):
        if _TOKEN.search(name):
            return value if value < VOCABULARY - 40 else VOCABULARY - 40 + hash_of(name) % 40
        found = _int(name, value)
        return layers if found == 2 and layers != 2 and _LAYERS.search(name) else found
    if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
        return _listed(name, value)
    return value


def _listed(name: str, value: Any) -> Any:
    kind = type(value)
    if name in ("depths", "num_blocks", "layers", "stage_num_blocks", "encoder_layers", "layer_depths"):
        return kind(1 for _ in value)
    if name in ("hidden_sizes", "embed_dims", "dims", "encoder_hidden_sizes", "embed_dim") and value[0] > 32:
        return kind(max(16, 16 * round(2 * v / value[0])) for v in value)
    if name == "mrope_section":
        return kind((4, 6, 6))
    return value


def hash_of(name: str) -> int:
    """A number of a name that is the same in every process."""
    return sum((i + 1) * ord(c) for i, c in enumerate(name))


def fields(config: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a configuration that are its own, with their values."""
    for name in type(config).__dataclass_fields__:
        if name not in _BASE and name in vars(config):
            yield name, vars(config)[name]


def small(config: Any, layers: int | None = None, level: int = 0, sections: tuple[int, ...] = ()) -> Any:
    """A small configuration of the type of ``config``, which has the defaults.

    Args:
        layers: how many; None: two, or four where layers are of several kinds.
        level: 0 shrinks all that the rules name, 1 the numbers of layers, experts and words alone.
        sections: how rotary embeddings of images share a head out, for the types that want to know.
    """
    from transformers import PretrainedConfig

    own = dict(fields(config))
    was = next((v for n, v in own.items() if _LAYERS.search(n) and isinstance(v, int)), None)
    if layers is None:
        layers = 4 if own.keys() & _HYBRID else 2
    given: dict[str, Any] = {}
    for name, value in own.items():
        if isinstance(value, PretrainedConfig):
            given[name] = small_backbone() if _is_timm(value) else small(value, None, level, sections)
        elif name == "backbone_config" and value is None:
            given[name] = small_backbone()
        elif name == "rope_parameters" and sections:
            given[name] = (
                {"rope_type": "default", "rope_theta": 10000.0} | (value or {}) | {"mrope_section": [*sections]}
            )
        elif name == "vocab_size" and value is None:
            given[name] = VOCABULARY
        elif isinstance(value, list) and len(value) == was and was > layers:
            given[name] = value[:layers]
        elif level == 0 or _ALWAYS.search(name):
            new = _value(name, value, layers)
            if new != value:
                given[name] = new
    heads = own.get("num_attention_heads")
    if isinstance(heads, int) and heads == own.get("num_key_value_heads") and "num_key_value_heads" in given:
        given["num_key_value_heads"] = given.get("num_attention_heads", heads)
    made = type(config)(**given)
    for name, value in (("use_cache", False), ("pad_token_id", 0)):
        if (name == "use_cache" and hasattr(made, name)) or not hasattr(made, name):
            setattr(made, name, value)
    return made


def _is_timm(config: Any) -> bool:
    return type(config).__name__ in ("TimmBackboneConfig", "TimmWrapperConfig")


def small_backbone() -> Any:
    """A convolutional backbone where the default is one of timm's."""
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
