"""Keys and values of a prompt, shared by all beams, and of the tokens that each beam wrote."""

from __future__ import annotations

import torch

from cpm_bee.model.cached_attention import KeyValue


class BeamCache:
    """A `KeyValueCache` for the beams of one record, by layer.

    A beam of the next step continues one of the last step: `continue_beams` says which, and
    `append` reorders the keys and values of its layer.
    """

    def __init__(self) -> None:
        self._prompt: dict[int, KeyValue] = {}  # (H, P, D)
        self._answers: dict[int, KeyValue] = {}  # (B, H, A, D)
        self._parents: torch.Tensor | None = None

    def set_prompt(self, layer: int, prompt: KeyValue) -> None:
        """See `KeyValueCache`."""
        self._prompt[layer] = prompt

    def prompt(self, layer: int) -> KeyValue:
        """See `KeyValueCache`."""
        return self._prompt[layer]

    def continue_beams(self, parents: torch.Tensor) -> None:
        """Set the beam of the last step that each beam of the next one continues, [B]."""
        self._parents = parents

    def append(self, layer: int, new: KeyValue) -> KeyValue:
        """See `KeyValueCache`; call it once for each layer and step."""
        if layer in self._answers:
            assert self._parents is not None, "continue_beams comes before each step"
            k, v = (x.index_select(0, self._parents) for x in self._answers[layer])
            new = KeyValue(torch.cat([k, new.k], dim=2), torch.cat([v, new.v], dim=2))
        self._answers[layer] = new
        return new
