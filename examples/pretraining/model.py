"""The model: an unmodified Hugging Face GPT-2, and what decides its FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GPT2Config, GPT2LMHeadModel

# GPT-2's head is its token embedding too, and a sparse embedding costs a small model more than it saves.
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Shape:
    """What decides the FLOPs of a GPT-2."""

    d_model: int
    layers: int
    heads: int
    context: int
    vocabulary: int

    @property
    def linear_size(self) -> int:
        """Weights of all linear layers, LM head included."""
        return 12 * self.layers * self.d_model**2 + self.vocabulary * self.d_model

    @property
    def attention_flops(self) -> int:
        """Training FLOPs of attention per token."""
        return 12 * self.context * self.d_model * self.layers


def build_model(shape: Shape) -> GPT2LMHeadModel:
    """GPT-2 as transformers has it, from a configuration."""
    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.context,
        n_embd=shape.d_model,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    # transformers finds no loss by this class's name, warns and falls back to this one; the warning splits the graph.
    model.loss_type = "ForCausalLM"
    return model
