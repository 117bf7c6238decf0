"""Keys and values of the records that are being generated, in memory that is allocated once."""

from __future__ import annotations

import math

import numpy as np
import torch

from cpm_bee.model.cached_attention import KeyValue, Window
from cpm_bee.model.config import ModelConfig


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """The memory for the keys and values of one token in all layers."""
    layers = sum(config.has_attention(i) for i in range(config.num_layers))
    return 2 * layers * config.num_heads * config.dim_head * dtype.itemsize


class SlotCache:
    """A `KeyValueCache` of slots with the same number of columns, (slots, H, columns, D) a layer.

    A row is the key or value of one head, numbered over (slot, head, column).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._heads, self._dim = config.num_heads, config.dim_head
        self._layers = [i for i in range(config.num_layers) if config.has_attention(i)]
        self._dtype, self._device = dtype, device
        self._memory: dict[int, KeyValue] = {}  # of each layer, flat
        self._num_tokens = 0
        self._columns = 0

    def divide(self, num_slots: int, columns: int) -> None:
        """Divide the memory into slots, whose contents are undefined but finite.

        Memory is allocated only if more is needed than ever before.
        """
        self._columns = columns
        if num_slots * columns > self._num_tokens:
            self._num_tokens = num_slots * columns
            size = (self._num_tokens * self._heads, self._dim)
            self._memory = {}  # frees the old memory first
            for layer in self._layers:
                self._memory[layer] = KeyValue(self._zeros(size), self._zeros(size))

    def _zeros(self, size: tuple[int, int]) -> torch.Tensor:
        if self._device.type != "cpu":
            return torch.zeros(size, dtype=self._dtype, device=self._device)
        # Unlike torch.zeros, NumPy leaves it to the system to zero pages when they are first used:
        # those that no record needs take no memory.
        values = np.zeros(math.prod(size) * self._dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(values).view(self._dtype).view(size)

    def rows(self, slots: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """The rows of all heads of tokens in slots [N] and columns [N]; [N * H]."""
        head = torch.arange(self._heads, device=slots.device)
        return ((slots[:, None] * self._heads + head) * self._columns + columns[:, None]).flatten()

    def write(self, layer: int, rows: torch.Tensor, new: KeyValue) -> None:
        """See `KeyValueCache`."""
        for memory, values in zip(self._memory[layer], new, strict=True):
            memory.index_copy_(0, rows, values.flatten(0, 1).to(memory.dtype))

    def window(self, layer: int, window: Window) -> KeyValue:
        """See `KeyValueCache`."""
        size = self._heads * self._columns
        rows = slice(window.slots.start * size, window.slots.stop * size)
        k, v = (x[rows].view(-1, self._columns, self._dim) for x in self._memory[layer])
        return KeyValue(k[:, window.columns], v[:, window.columns])

    def move(self, source: int, target: int, columns: slice) -> None:
        """Copy the columns of one slot to another one."""
        for layer in self._layers:
            for new, old in zip(
                self.window(layer, Window(slice(target, target + 1), columns)),
                self.window(layer, Window(slice(source, source + 1), columns)),
                strict=True,
            ):
                new.copy_(old)
