"""Small models with attention in many forms, for the tests and for the table of what the pass finds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, softmax

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

VOCABULARY, LENGTH, BATCH, WIDTH, HEADS = 50, 12, 2, 32, 4
SIZE = WIDTH // HEADS


@dataclasses.dataclass
class Case:
    """A model with its input.

    Attributes:
        replaced: how many attentions have to become ``mst::attention``.
        kept: a part of the reason of each other attention, in order.
        compare: which positions of the result to compare; queries at padding have no defined result.
    """

    name: str
    implementation: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    replaced: int
    kept: tuple[str, ...] = ()
    compare: Tensor | None = None

    def loss(self, model: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        """The model's result and a scalar of all of it that is compared."""
        torch.manual_seed(0)
        out = first_tensor(model(*self.args, **self.kwargs))
        seen = out if self.compare is None else out[self.compare]
        weights = torch.linspace(-1, 1, seen.numel()).view(seen.shape)
        return seen, (seen * weights).sum()


def first_tensor(out: Any) -> Tensor:
    """The main result of a model."""
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if hasattr(out, "values") else out[0]
    return out


class NanoAttention(nn.Module):
    """As nanoGPT writes it: flash, or by hand with a mask in a buffer."""

    def __init__(self, flash: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_dropout = nn.Dropout(dropout)
        self.flash, self.rate = flash, dropout
        self.register_buffer("bias", torch.tril(torch.ones(LENGTH + 4, LENGTH + 4))[None, None])

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        q, k, v = (t.view(batch, length, HEADS, SIZE).transpose(1, 2) for t in (q, k, v))
        if self.flash:
            rate = self.rate if self.training else 0
            y = scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=rate, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
            att = att.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))  # type: ignore[index]
            y = self.attn_dropout(softmax(att, dim=-1)) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class NanoGPT(nn.Module):
    """Embeddings, two blocks, a head."""

    def __init__(self, flash: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH + 4, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = nn.ModuleList(NanoAttention(flash, dropout) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for norm, attention in zip(self.norms, self.attention, strict=True):
            x = x + attention(norm(x))
        return self.head(x)


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with a causal mask, that of a buffer or a hint."""

    def __init__(self, hint: bool, dropout: float = 0.0, padded: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.hint = hint
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        self.register_buffer("mask", mask < 0 if padded else mask)  # both masks have to be of one type

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        padding = None if keep is None else keep == 0
        return self.encoder(x, mask=self.mask, is_causal=self.hint, src_key_padding_mask=padding)


class VisionBlock(nn.Module):
    """Attention and MLP as timm's ``vision_transformer.Block`` has them."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.fused, self.scale = fused, SIZE**-0.5

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused:
            y = scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        else:
            y = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, two blocks, a head; a stand-in for timm's."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.Sequential(*(VisionBlock(fused) for _ in range(2)))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.head(self.blocks(x)[:, 0])


def _hugging_face(name: str, implementation: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny random model of transformers and its keyword arguments."""
    import transformers as hf

    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    decoder = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "max_position_embeddings": LENGTH + 4, "attn_implementation": implementation,
    }  # fmt: skip
    no_dropout = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    if name in ("GPT-2", "GPT-2 upcast"):
        gpt2 = hf.GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH + 4, n_embd=WIDTH, n_layer=2, n_head=HEADS, bos_token_id=0,
            eos_token_id=0, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, use_cache=False,
            attn_implementation=implementation, reorder_and_upcast_attn="upcast" in name,
        )  # fmt: skip
        return hf.GPT2LMHeadModel(gpt2), {"input_ids": ids}
    if name == "Llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, use_cache=False, **decoder)), {
            "input_ids": ids
        }
    if name.startswith("Mistral"):
        window = 4 if "window" in name else None
        mistral = hf.MistralConfig(num_key_value_heads=2, sliding_window=window, use_cache=False, **decoder)
        return hf.MistralForCausalLM(mistral), {"input_ids": ids}
    if name == "DeepSeek-V3":
        latent = hf.DeepseekV3Config(
            q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, use_cache=False,
            num_key_value_heads=HEADS, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=2, **decoder,
        )  # fmt: skip
        return hf.DeepseekV3ForCausalLM(latent), {"input_ids": ids}
    if name == "BERT":
        return hf.BertModel(hf.BertConfig(**decoder, **no_dropout)), {"input_ids": ids}
    if name == "T5":
        t5 = hf.T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=SIZE, num_layers=1, num_heads=HEADS, d_ff=2 * WIDTH,
            dropout_rate=0.0, decoder_start_token_id=0, use_cache=False, attn_implementation=implementation,
        )  # fmt: skip
        return hf.T5ForConditionalGeneration(t5), {"input_ids": ids, "decoder_input_ids": ids}
    del decoder["vocab_size"], decoder["max_position_embeddings"]
    return hf.ViTModel(hf.ViTConfig(image_size=16, patch_size=8, **decoder, **no_dropout)), {
        "pixel_values": torch.randn(BATCH, 3, 16, 16)
    }


def right_padding() -> Tensor:
    """An attention mask whose second sequence is short."""
    keep = torch.ones(BATCH, LENGTH, dtype=torch.long)
    keep[1, -5:] = 0
    return keep


_FULL = "not causal"
_HUGGING_FACE: list[tuple[str, bool, int, tuple[str, ...]]] = [
    ("GPT-2", False, 2, ()),
    ("GPT-2", True, 2, ()),
    ("Llama", False, 2, ()),
    ("Llama", True, 2, ()),
    ("DeepSeek-V3", False, 2, ()),
    ("DeepSeek-V3", True, 2, ()),
    ("Mistral", False, 2, ()),
    ("Mistral, window", False, 0, ("fewer keys",) * 2),
    ("BERT", False, 0, (_FULL,) * 2),
    ("BERT", True, 0, (_FULL,) * 2),
    ("T5", False, 0, ("parameter", "parameter", _FULL)),
    ("ViT", False, 0, (_FULL,) * 2),
]


def _of_hugging_face(row: int, implementation: str) -> Case:
    name, padded, replaced, kept = _HUGGING_FACE[row]
    model, kwargs = _hugging_face(name, implementation)
    compare = None
    if padded:
        kwargs["attention_mask"] = right_padding()
        compare = kwargs["attention_mask"].bool()
    return Case(name + (", padded" if padded else ""), implementation, model, (), kwargs, replaced, kept, compare)


def _own() -> dict[str, Callable[[], Case]]:
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    x, image = torch.randn(BATCH, LENGTH, WIDTH), torch.randn(BATCH, 3, 16, 16)
    keep = right_padding()
    drops = "drop out"
    return {
        "nanoGPT-flash": lambda: Case("nanoGPT", "sdpa", NanoGPT(True), (ids,), {}, 2),
        "nanoGPT-manual": lambda: Case("nanoGPT", "manual", NanoGPT(False), (ids,), {}, 2),
        "nanoGPT-flash-dropout": lambda: Case(
            "nanoGPT, dropout", "sdpa", NanoGPT(True, 0.1), (ids,), {}, 0, (drops, drops)
        ),
        "nanoGPT-manual-dropout": lambda: Case(
            "nanoGPT, dropout", "manual", NanoGPT(False, 0.1), (ids,), {}, 0, (drops, drops)
        ),
        "encoder-hint": lambda: Case("nn.TransformerEncoder", "is_causal", Encoder(True), (x,), {}, 2),
        "encoder-mask": lambda: Case("nn.TransformerEncoder", "mask", Encoder(False), (x,), {}, 2),
        "encoder-padded": lambda: Case(
            "nn.TransformerEncoder, padded", "mask", Encoder(False, padded=True), (x, keep), {}, 2, (), keep.bool()
        ),
        "vit-fused": lambda: Case(
            "ViT as in timm", "sdpa", VisionTransformer(True), (image,), {}, 0, (_FULL, _FULL)
        ),
        "vit-manual": lambda: Case(
            "ViT as in timm", "manual", VisionTransformer(False), (image,), {}, 0, (_FULL, _FULL)
        ),
    }  # fmt: skip


def cases() -> dict[str, Callable[[], Case]]:
    """All cases by name; building one is cheap, and seeded."""
    found = _own()
    for row, (name, padded, _, _) in enumerate(_HUGGING_FACE):
        for implementation in ("sdpa", "eager"):
            key = f"{name}{'-padded' if padded else ''}-{implementation}".replace(", ", "-")
            found[key] = lambda row=row, implementation=implementation: _of_hugging_face(row, implementation)
    found["GPT-2-upcast-eager"] = lambda: Case(
        "GPT-2, upcast", "eager", *_flat(_hugging_face("GPT-2 upcast", "eager")), 2
    )
    return {key: _seeded(make) for key, make in found.items()}


def _flat(built: tuple[nn.Module, dict[str, Any]]) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    return built[0], (), built[1]


def _seeded(make: Callable[[], Case]) -> Callable[[], Case]:
    def build() -> Case:
        torch.manual_seed(0)
        return make()

    return build
