"""Inputs for any model of transformers, by its forward's signature and its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.shrink import IMAGE, LENGTH

_BINS = (
    "num_mel_bins", "input_feat_per_channel", "feature_size", "feature_projection_input_dim", "input_dim", "n_mels",
    "mel_dim", "input_size",
)  # fmt: skip


def _find(config: Any, *names: str) -> Any:
    """The first value of one of the names, in a configuration or, if it has none, in its parts."""
    from transformers import PretrainedConfig

    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig):
            found = _find(part, *names)
            if found is not None:
                return found
    return None


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return int(size.get("height", IMAGE)), int(size.get("width", IMAGE))
    if isinstance(size, list | tuple):
        return (int(size[0]), int(size[-1])) if size else (IMAGE, IMAGE)
    return (int(size), int(size)) if size else (IMAGE, IMAGE)


class Made:
    """Inputs by name for a batch and a length."""

    def __init__(self, model: nn.Module, batch: int = 2, length: int = LENGTH) -> None:
        self.model, self.config = model, model.config
        self.batch, self.length = batch, length
        self.accepts = inspect.signature(model.forward).parameters
        self.generator = torch.Generator().manual_seed(batch * 1000 + length)

    def ids(self) -> Tensor:
        vocabulary = min(100, int(_find(self.config, "vocab_size") or 100))
        return torch.randint(3, vocabulary, (self.batch, self.length), generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator)

    def image(self) -> Tensor:
        channels = _find(self.config, "num_channels", "in_channels", "in_chans", "input_channels") or 3
        size = _pair(_find(self.config, "image_size", "img_size", "input_image_size"))
        return self.normal(int(channels), *size)

    def features(self) -> Tensor:
        bins = int(_find(self.config, *_BINS) or 80)
        positions = _find(self.config, "max_source_positions")
        return self.normal(bins, 2 * int(positions)) if positions else self.normal(bins, 64)

    def decoder(self) -> dict[str, Tensor]:
        return {"decoder_input_ids": self.ids()} if "decoder_input_ids" in self.accepts else {}

    def patches(self, name: str, grid: str) -> dict[str, Tensor]:
        """Images as patches in a row, with the grids that they are of."""
        patch = int(_find(self.config, "patch_size") or 14)
        temporal = int(_find(self.config, "temporal_patch_size") or 1)
        channels = int(_find(self.config, "in_channels", "in_chans", "num_channels") or 3)
        pixels = torch.randn(16 * self.batch, channels * temporal * patch**2, generator=self.generator)
        return {name: pixels, grid: torch.tensor([[1, 4, 4]] * self.batch)}

    def with_images(self, text: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Words with a place for each part of an image, as many as the model makes of one."""
        token = _find(self.config, "image_token_id", "image_token_index")
        if token is None or not hasattr(self.model, "get_image_features") or "input_ids" not in text:
            return
        images: dict[str, Any] = {"pixel_values": self.image()}
        if "image_grid_thw" in self.accepts:
            images = self.patches("pixel_values", "image_grid_thw")
        try:
            with torch.no_grad():
                found = self.model.get_image_features(**images)  # type: ignore[operator]
        except Exception:
            return
        found = getattr(found, "pooler_output", found)
        parts = list(found) if isinstance(found, list | tuple) else [found]
        places = sum(p.numel() // p.shape[-1] for p in parts) // self.batch
        ids = torch.cat(
            [text["input_ids"][:, :2], torch.full((self.batch, places), token), text["input_ids"][:, 2:]], 1
        )
        extra = {"mm_token_type_ids": (ids == token).long()} if "mm_token_type_ids" in self.accepts else {}
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | images | extra

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Sets of inputs that the model may take, the most likely first."""
        has = self.accepts.__contains__
        text = {"input_ids": self.ids(), "attention_mask": torch.ones(self.batch, self.length, dtype=torch.long)}
        text = {k: v for k, v in text.items() if has(k)}
        if has("bbox"):
            box = torch.tensor([1, 2, 8, 9]).expand(self.batch, self.length, 4)
            yield text | {"bbox": box} | ({"pixel_values": self.image()} if has("pixel_values") else {})
            yield text | {"bbox": box}
        if has("grid_thw"):
            yield self.patches("pixel_values" if has("pixel_values") else "hidden_states", "grid_thw")
        if has("pixel_values") and has("input_ids"):
            yield from self.with_images(text)
            yield text | {"pixel_values": self.image()} | self.decoder()
        if has("input_ids"):
            yield text | self.decoder()
            yield {"input_ids": text["input_ids"]} | self.decoder()
        if has("pixel_values"):
            yield {"pixel_values": self.image()} | self.decoder()
            yield {"pixel_values": self.image()} | ({"decoder_input_ids": self.ids()})
            frames = int(_find(self.config, "num_frames", "frames") or 4)
            yield {"pixel_values": self.image()[:, None].repeat(1, frames, 1, 1, 1)}
        if has("pixel_values_videos"):
            frames = int(_find(self.config, "frames_per_clip", "num_frames") or 4)
            yield {"pixel_values_videos": self.image()[:, None].repeat(1, frames, 1, 1, 1)}
        for name in ("input_features", "audio_features"):
            if has(name):
                found = self.features()
                yield {name: found} | self.decoder()
                yield {name: found.transpose(1, 2).contiguous()} | self.decoder()
        if has("input_values"):
            yield {"input_values": self.normal(4000)} | self.decoder()
            yield {"input_values": self.normal(1, 4000)} | self.decoder()
            yield {"input_values": self.ids()} | self.decoder()
            bins = int(_find(self.config, "num_mel_bins") or 80)
            yield {"input_values": self.normal(int(_find(self.config, "max_length") or 64), bins)}
            yield {
                "input_values": self.normal(self.length, bins),
                "decoder_input_values": self.normal(self.length, bins),
            }
            yield {"input_values": self.ids(), "decoder_input_values": self.normal(self.length, bins)}
        if has("past_values"):
            channels = int(_find(self.config, "num_input_channels") or 1)
            length = int(_find(self.config, "context_length") or 32)
            yield {"past_values": self.normal(length, channels)}
            yield {"past_values": self.normal(length)}
        if has("inputs"):
            yield {"inputs": self.ids()}
            yield {"inputs": self.normal(self.length, int(_find(self.config, "d_model") or 32))}
        if has("hidden_states"):
            yield {"hidden_states": self.normal(self.length, int(_find(self.config, "hidden_size") or 64))}
        if has("inputs_embeds"):
            yield {"inputs_embeds": self.normal(self.length, int(_find(self.config, "hidden_size", "d_model") or 64))}
        if has("x"):
            yield {"x": self.image()}
