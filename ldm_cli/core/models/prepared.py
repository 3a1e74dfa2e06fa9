"""What layers make of their weights before they multiply, kept from call to call while the weights stay as they are.

On a CPU oneDNN brings a kernel into blocks at every call; for small images that is a good part of an evaluation. The
products are the same, bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_MOST_BYTES = 256 << 20
_here = threading.local()


class PreparedWeights:
    """A store of what was made of weights, which must not be written to as long as it is in use.

    Several threads may use one. It grows up to 256 MiB; what has no room is made anew by each call.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._bytes = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, the calling thread's layers look here."""
        before = getattr(_here, "store", None)
        _here.store = self
        try:
            yield
        finally:
            _here.store = before

    def get(self, weight: Tensor, how: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gave for this weight, as which views of the same memory count, when last asked for `how`."""
        key = weight.data_ptr(), weight.shape, weight.stride(), how
        if key in self._made:
            return self._made[key][0]
        made = make()
        if self._bytes + weight.nbytes <= _MOST_BYTES:
            self._bytes += weight.nbytes
            # With the weight, so that no other one comes to lie where it lay.
            self._made[key] = made, weight
        return made


def prepared(weight: Tensor, how: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives: of the calling thread's store, if it uses one."""
    store = prepared_weights()
    return make() if store is None else store.get(weight, how, make)


def prepared_weights() -> PreparedWeights | None:
    """The store that the calling thread uses, if any; compiled code uses none."""
    if torch.compiler.is_compiling():
        return None
    store: PreparedWeights | None = getattr(_here, "store", None)
    return store
