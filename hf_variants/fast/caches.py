"""A cache that has room for what is still to come, instead of being copied for every token."""

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


# The least number of positions that is added at a time.
LEAST_ROOM = 64


class Room:
    """
    Memory for keys and values, of which a prefix is taken.

    Args:
        keys, values: (batch, kv_heads, capacity, head_dim), uninitialised behind `taken`.
        taken: number of positions with content. Whoever stops short of it shares the memory with someone who went on.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, taken: int):
        self.keys = keys
        self.values = values
        self.taken = taken


class RoomyLayer(DynamicLayer):
    """
    A cache layer whose keys and values are views of a larger memory, to whose end new ones are written.

    What transformers does to a cache (crop, reorder, select, repeat) sets `keys` and `values` anew; then, and where
    another copy of the layer wrote behind them, they move to a memory of their own at the next update. So no tensor
    that was handed out changes.
    """

    # Not one of transformers' own types: a subclass with a name would replace its class there.
    _layer_type = None
    room: Room | None = None
    # Index of the first position of `keys` in the room.
    start = 0
    placed: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def taking_over(cls, layer: DynamicLayer) -> "RoomyLayer":
        """The layer with the content of a plain one."""
        roomy = cls.__new__(cls)
        roomy.__dict__.update(layer.__dict__)
        return roomy

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Append (batch, kv_heads, new length, head_dim); returns all keys and values that the new queries may see.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        room, end = self._make_room(new, key_states, value_states)
        room.keys.narrow(2, end, new).copy_(key_states)
        room.values.narrow(2, end, new).copy_(value_states)
        return self._show(end + new)

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `update`, for one position: (batch, kv_heads, head_dim)."""
        room, end = self._make_room(1, key, value)
        room.keys.select(2, end).copy_(key)
        room.values.select(2, end).copy_(value)
        return self._show(end + 1)

    def _make_room(self, new: int, key: torch.Tensor, value: torch.Tensor) -> tuple[Room, int]:
        """A room with `keys` and `values` in it and `new` free positions behind them, and the index of the first."""
        room = self.room
        # Right after the lazy initialisation, there are no dimensions.
        length = self.keys.shape[-2] if self.keys.numel() else 0
        end = self.start + length
        if (
            room is None
            or self.placed is None
            or self.placed[0] is not self.keys
            or self.placed[1] is not self.values
            or room.taken != end
            or end + new > room.keys.shape[2]
        ):
            capacity = length + new + max(LEAST_ROOM, (length + new) // 2)
            room = self.room = Room(
                key.new_empty((*key.shape[:2], capacity, key.shape[-1])),
                value.new_empty((*value.shape[:2], capacity, value.shape[-1])),
                length,
            )
            if length:
                room.keys.narrow(2, 0, length).copy_(self.keys)
                room.values.narrow(2, 0, length).copy_(self.values)
            self.start, end = 0, length
        return room, end

    def _show(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the room up to `end`: what the queries see and what is kept."""
        room, start = self.room, self.start
        room.taken = end
        self.keys = room.keys.narrow(2, start, end - start)
        self.values = room.values.narrow(2, start, end - start)
        self.placed = (self.keys, self.values)
        return self.placed


class RoomySlidingLayer(RoomyLayer, DynamicSlidingWindowLayer):
    """The same for a sliding window: what leaves the window stays in memory until the room is full."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if getattr(self, "record_past", False):
            # Until `crop`, keys stay that are to be forgotten.
            return DynamicSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)
        return super().update(key_states, value_states, *args, **kwargs)

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if getattr(self, "record_past", False):
            return self.update(key.unsqueeze(2), value.unsqueeze(2))
        return super().append(key, value)

    def _show(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.cumulative_length += end - self.room.taken
        seen = super()._show(end)
        kept = min(end - self.start, self.sliding_window - 1)
        self.start = end - kept
        self.keys = self.room.keys.narrow(2, self.start, kept)
        self.values = self.room.values.narrow(2, self.start, kept)
        self.placed = (self.keys, self.values)
        return seen


# A plain layer -> what takes it over
ROOMY: dict[type, type[RoomyLayer]] = {DynamicLayer: RoomyLayer, DynamicSlidingWindowLayer: RoomySlidingLayer}
PLAIN_OR_ROOMY = frozenset([*ROOMY, *ROOMY.values()])


def can_hold(cache: Cache) -> bool:
    """Whether a cache is transformers' own dynamic one, on one device, with layers that can be taken over."""
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and all(type(layer) in PLAIN_OR_ROOMY for layer in cache.layers)
    )


def make_roomy(cache: Cache) -> None:
    """Have the layers of a dynamic cache taken over, in place."""
    layers = cache.layers
    for index, layer in enumerate(layers):
        roomy = ROOMY.get(type(layer))
        if roomy is not None and layer.is_initialized:
            layers[index] = roomy.taking_over(layer)
