"""Models of the architectures that people train, small, with random weights, and batches for them.

Those of Hugging Face are its own; a mixture of experts, an MLP, an MLP-Mixer are written as they usually are. Wide
enough that products count, small enough that a step takes a fraction of a second on two cores; ``tiny`` is one where
everything but the products does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 4096


@dataclass(frozen=True)
class Case:
    """A model and what it is given.

    Attributes:
        model: on the CPU, in float32.
        batch: keyword arguments of a forward pass that returns an object with ``loss``, or the loss.
        prompt: token numbers ``[1, length]`` that it can continue, or None.
    """

    model: nn.Module
    batch: dict[str, Tensor]
    prompt: Tensor | None = None


def _tokens(batch: int, length: int, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def _text(model: nn.Module, batch: int, length: int, vocabulary: int = VOCABULARY) -> Case:
    ids = _tokens(batch, length, vocabulary)
    return Case(model, {"input_ids": ids, "labels": ids}, ids[:1, :16].contiguous())


def _gpt2(width: int, layers: int, length: int, batch: int, vocabulary: int) -> Case:
    config = GPT2Config(
        n_embd=width, n_layer=layers, n_head=max(2, width // 64), n_positions=length, vocab_size=vocabulary,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return _text(_causal(GPT2LMHeadModel(config)), batch, length, vocabulary)


def _causal(model: nn.Module) -> nn.Module:
    model.loss_type = "ForCausalLM"  # what transformers falls back to, with a warning that breaks Dynamo's graph in two
    return model


def gpt2() -> Case:
    return _gpt2(384, 4, 256, 4, VOCABULARY)


def tiny() -> Case:
    return _gpt2(128, 2, 64, 4, 256)


def llama() -> Case:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return _text(_causal(LlamaForCausalLM(config)), 4, 256)


def mixtral() -> Case:
    """A mixture of experts as transformers holds them, all of a layer in one Parameter: two of eight a token."""
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=768, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return _text(_causal(MixtralForCausalLM(config)), 4, 256)


def bert() -> Case:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=384, num_hidden_layers=4, num_attention_heads=6, intermediate_size=1536,
        max_position_embeddings=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    case = _text(BertForMaskedLM(config), 4, 256)
    return Case(case.model, case.batch | {"attention_mask": torch.ones(4, 256, dtype=torch.long)})


def t5() -> Case:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=384, d_kv=64, d_ff=1024, num_layers=2, num_heads=6, dropout_rate=0.0,
        decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return _text(T5ForConditionalGeneration(config), 4, 256)


def vit() -> Case:
    config = ViTConfig(
        hidden_size=384, num_hidden_layers=4, num_attention_heads=6, intermediate_size=1536, image_size=96,
        patch_size=8, num_labels=100, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return _images(ViTForImageClassification(config), 8, 96)


def convnext() -> Case:
    """Depthwise convolutions between linear layers."""
    config = ConvNextConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], image_size=128, num_labels=100)
    return _images(ConvNextForImageClassification(config), 8, 128)


def _images(model: nn.Module, batch: int, size: int) -> Case:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return Case(model, {"pixel_values": images, "labels": torch.randint(0, 100, (batch,), generator=generator)})


class _Classifier(nn.Module):
    """Any module, and cross-entropy behind it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.body(x).float(), y)


def _classified(body: nn.Module, *shape: int) -> Case:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, generator=generator)
    return Case(_Classifier(body), {"x": x, "y": torch.randint(0, 10, (shape[0],), generator=generator)})


def mlp() -> Case:
    """Wide layers and a large batch."""
    body = nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
        nn.Linear(1024, 10),
    )  # fmt: skip
    return _classified(body, 4096, 784)


class _Mixing(nn.Module):
    """A layer of MLP-Mixer (Tolstikhin et al., 2021): over patches, then over channels."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.patches = nn.Sequential(nn.Linear(patches, 2 * width), nn.GELU(), nn.Linear(2 * width, patches))
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches(self.first(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.second(x))


class _Mixer(nn.Module):
    def __init__(self, patches: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(192, width)
        self.layers = nn.Sequential(*(_Mixing(patches, width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(x))).mean(1))


def mixer() -> Case:
    return _classified(_Mixer(64, 384, 4), 16, 64, 192)


class _Experts(nn.Module):
    """Experts that take tokens.

    Args:
        tokens_choose: each token its best two experts, so that an expert takes so many as choose it: Dynamo, at which
            sizes depend on values, compiles none of it. Else each expert its best tokens (Zhou et al., 2022).
    """

    def __init__(self, width: int, count: int, tokens_choose: bool) -> None:
        super().__init__()
        self.tokens_choose = tokens_choose
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scores = self.router(flat).float().softmax(-1)
        out = torch.zeros_like(flat)
        best = scores.topk(2, -1) if self.tokens_choose else scores.topk(2 * len(flat) // len(self.experts), 0)
        for number, expert in enumerate(self.experts):
            if self.tokens_choose:
                token, slot = torch.where(best.indices == number)
                weight = best.values[token, slot]
            else:
                token, weight = best.indices[:, number], best.values[:, number]
            mine = expert(flat[token]) * weight[:, None]
            out = out.index_add(0, token, mine.to(out.dtype))
        return out.view_as(x)


class _Routed(nn.Module):
    """A causal language model with experts in place of its MLPs."""

    def __init__(self, width: int, layers: int, count: int, tokens_choose: bool) -> None:
        super().__init__()
        self.heads = width // 64
        self.embed, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.experts = nn.ModuleList(_Experts(width, count, tokens_choose) for _ in range(layers))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.embed(x)
        batch, length, width = x.shape
        for i, (qkv, out, experts) in enumerate(zip(self.qkv, self.out, self.experts, strict=True)):
            q, k, v = qkv(self.norms[2 * i](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(seen.transpose(1, 2).reshape(batch, length, width))
            x = x + experts(self.norms[2 * i + 1](x))
        return F.cross_entropy(self.head(x).float().flatten(0, 1), y.flatten())


def _routed(tokens_choose: bool) -> Case:
    ids = _tokens(4, 256)
    return Case(_Routed(256, 2, 4, tokens_choose), {"x": ids, "y": ids})


def moe() -> Case:
    return _routed(tokens_choose=False)


def moe_eager() -> Case:
    """Of which no backend sees a graph."""
    return _routed(tokens_choose=True)


MODELS: dict[str, Callable[[], Case]] = {
    f.__name__: f for f in (gpt2, llama, mixtral, bert, vit, t5, moe, moe_eager, mlp, mixer, convnext, tiny)
}


def build(name: str) -> Case:
    """A model, the same weights at every call."""
    torch.manual_seed(0)
    return MODELS[name]()
