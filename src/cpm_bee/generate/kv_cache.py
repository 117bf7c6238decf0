"""Attention with cached keys and values: the prompt's shared by all beams, the answers' per beam.

Shapes: B beams, P prompt tokens, A tokens fed after the prompt, H heads of dimension D.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from cpm_bee.model.layers import Attend


class KeyValue(NamedTuple):
    """Keys and values of one layer, (H, P, D) for the prompt and (B, H, A, D) for answers."""

    k: torch.Tensor
    v: torch.Tensor


class PromptAttention:
    """Wraps the prompt's attention with itself and keeps each layer's keys and values."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend
        self.layers: dict[int, KeyValue] = {}

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """q, k, v [P, H, D] -> [P, H, D]."""
        # Contiguous, as every later step reads them once in this order.
        self.layers[layer] = KeyValue(*(x.transpose(0, 1).contiguous() for x in (k, v)))
        return self._attend(layer, q, k, v)


class DecodingStep(NamedTuple):
    """What all layers of one step share."""

    parents: torch.Tensor  # (B,) the beam of the last step that each beam continues
    prompt_bias: torch.Tensor  # (H, B, P)
    answer_bias: torch.Tensor  # (B, H, 1, A), the token of this step included


class BeamCache:
    """Keys and values of the prompt and of what each beam has written."""

    def __init__(self, prompt: dict[int, KeyValue]) -> None:
        self._prompt = prompt
        self._answers: dict[int, KeyValue] = {}

    def attend(
        self, step: DecodingStep, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Add one token a beam and attend to all before it: q, k, v [B, H, D] -> [B, H, D]."""
        prompt = self._prompt[layer]
        answers = self._append(step.parents, layer, KeyValue(k.unsqueeze(2), v.unsqueeze(2)))
        q = q / math.sqrt(q.shape[-1])
        # One product for all beams, as the prompt's keys are the same for all.
        to_prompt = q.transpose(0, 1) @ prompt.k.mT + step.prompt_bias  # (H, B, P)
        to_answers = q.unsqueeze(2) @ answers.k.mT + step.answer_bias  # (B, H, 1, A)
        scores = torch.cat([to_prompt.transpose(0, 1), to_answers.squeeze(2)], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)  # (B, H, P + A)
        on_prompt, on_answers = weights.split([prompt.k.shape[1], answers.k.shape[2]], dim=-1)
        from_prompt = (on_prompt.transpose(0, 1) @ prompt.v).transpose(0, 1)  # (B, H, D)
        from_answers = (on_answers.unsqueeze(2) @ answers.v).squeeze(2)  # (B, H, D)
        return from_prompt + from_answers

    def _append(self, parents: torch.Tensor, layer: int, new: KeyValue) -> KeyValue:
        if layer in self._answers:
            pairs = zip(self._answers[layer], new, strict=True)
            new = KeyValue(*(torch.cat([x.index_select(0, parents), y], dim=2) for x, y in pairs))
        self._answers[layer] = new
        return new
