"""Whose fault numbers are that are none: the CPU computes them once more, of weights read anew.

Weights that are numbers may overflow as they are computed with, on any card alike: a language model
published in bfloat16 that is asked for in float16, an SDXL VAE that doesn't ask for single
precision. Whoever sends tasks may name such a model, and would put one card after the other in
doubt. So the part that made none of its numbers is asked again, on the CPU and in the same dtype;
if it makes none there either, no card is to blame, and other nodes won't do better, but may be
asked for it in another dtype: `TaskUnsupported`. What can't be asked again stays the card's.

The card gets no say: neither its copy of the weights is used nor anything that it computes, but the
input. So a card that has gone bad can't acquit itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import structlog
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from cluster.core.errors import (
    Cancelled,
    ClusterError,
    DeviceFault,
    DeviceFaultKind,
    TaskUnsupported,
)
from cluster.inference.parts import PartSource, load, look

_NARROW: Final = frozenset({torch.float16, torch.bfloat16})
_SUMS: Final = frozenset(
    {
        functional.linear,
        functional.conv2d,
        functional.scaled_dot_product_attention,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.bmm,
        torch.Tensor.bmm,
        torch.addmm,
        torch.baddbmm,
        torch.einsum,
    }
)
_UNKNOWN: Final = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    MemoryError,
    ClusterError,
)
"""What says nothing of the part: it can't be had, or not as it was there, or not in time."""
_log = structlog.get_logger(__name__)


class NoNumbers(DeviceFault):
    """A bad result of the part of that role. `makes_numbers`: whether another copy of the part, on
    the CPU, makes a good one of the same input."""

    def __init__(self, message: str, role: str, makes_numbers: Callable[[Any], bool]) -> None:
        super().__init__(DeviceFaultKind.BAD_RESULT, message)
        self.role = role
        self.makes_numbers = makes_numbers

    def __reduce__(
        self,
    ) -> tuple[type[DeviceFault], tuple[DeviceFaultKind, str], dict[str, str]]:
        """Plain, as nobody else can ask."""
        return DeviceFault, (self.kind, str(self)), {"trace": self.trace}


Copied = Callable[[str], AbstractContextManager[Any]]
"""Another copy of the part of a role on the CPU, read anew."""


@contextmanager
def copied_bare(parts: Mapping[str, PartSource], role: str) -> Iterator[Any]:
    """As `Copied`, of parts that nothing is put on."""
    if parts[role].bits is not None:
        raise LookupError("weights that are quantized are made on a card alone")
    yield load(parts[role], torch.device("cpu"))


def judged(
    fault: DeviceFault, copied: Copied, threads: int | None
) -> TaskUnsupported | DeviceFault:
    """The fault by whose it is: no card's, or that card's, which it stays where it isn't known.

    `threads` are for the CPU: it is only asked whether, so its bits don't matter. Raises
    `Cancelled`.
    """
    plain = DeviceFault(fault.kind, str(fault))
    if not isinstance(fault, NoNumbers):
        return plain
    try:
        with _in_a_hurry(threads), copied(fault.role) as copy, torch.inference_mode(), _WideSums():
            makes = fault.makes_numbers(copy)
    except Cancelled:
        raise
    except _UNKNOWN as error:
        if not isinstance(error, ClusterError):
            _log.warning("not_asked_again", part=fault.role, exc_info=True)
        return plain
    if makes:
        return plain
    return TaskUnsupported(f"{fault.role}: beyond what its dtype holds, on the CPU too: {fault}")


@contextmanager
def _in_a_hurry(threads: int | None) -> Iterator[None]:
    computing = torch.get_num_threads()
    wanted = torch.are_deterministic_algorithms_enabled()
    lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_num_threads(threads or computing)
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted, warn_only=lenient)
        torch.set_num_threads(computing)


class _WideSums(TorchFunctionMode):
    """Sums in single precision, rounded to 16 bits where it was these that were summed: as a card
    does it, and a CPU without instructions for 16 bits takes minutes for what takes it seconds so.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = (args, kwargs or {})
        if func not in _SUMS:
            return func(*given[0], **given[1])
        look()
        narrow = {each.dtype for each in tree_leaves(given) if isinstance(each, torch.Tensor)}
        if not narrow & _NARROW:
            return func(*given[0], **given[1])
        wide = tree_map(_widened, given)
        return func(*wide[0], **wide[1]).to(next(iter(narrow & _NARROW)))


def _widened(value: Any) -> Any:
    narrow = isinstance(value, torch.Tensor) and value.dtype in _NARROW
    return value.float() if narrow else value
