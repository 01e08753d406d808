"""A convolution at a given input size, as plain data: which input position each tap of its kernel reads.

The whole-map form (Gao et al. 2020) replaces a convolution by one linear map from H·W·C_in to H'·W'·C_out
numbers, channel last.  A checkpoint holds the kernel alone; sizes, stride, padding, dilation and groups are
kept here.  A tap only shifts: along each axis the output at o reads the input at one position, or none where
zeros are padded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from mpoc.errors import UsageError

# Of an axis, and of its taps times its outputs: no image or sound comes near.
_WIDEST = 1 << 20
_MOST_STEPS = 1 << 24
PADDING_MODES = ("zeros", "circular", "reflect", "replicate")
_Size = Annotated[int, ("minimum", 1)]


@dataclass(frozen=True)
class Geometry:
    """One number an axis in each tuple: (length), (height, width) or (depth, height, width)."""

    size: Annotated[tuple[_Size, ...], "of the input, e.g. (2, 2)"]
    output_size: tuple[_Size, ...]
    kernel_size: tuple[_Size, ...]
    stride: tuple[_Size, ...]
    # How much follows the last position is in output_size.
    padding: Annotated[tuple[Annotated[int, ("minimum", 0)], ...], "before the first position"]
    dilation: tuple[_Size, ...]
    groups: _Size
    padding_mode: Annotated[str, ("enum", PADDING_MODES)]

    @property
    def positions(self) -> tuple[int, int]:
        """Output and input positions: H'·W' and H·W."""
        return math.prod(self.output_size), math.prod(self.size)

    def shifts(self, axis: int) -> list[list[tuple[int, int]]]:
        """For each tap along ``axis``: the pairs (output position, input position) that it joins."""
        found: list[list[tuple[int, int]]] = []
        for tap in range(self.kernel_size[axis]):
            pairs = ((o, self._reads(axis, o, tap)) for o in range(self.output_size[axis]))
            found.append([(o, p) for o, p in pairs if p is not None])
        return found

    def _reads(self, axis: int, output: int, tap: int) -> int | None:
        """The input position that ``tap`` reads for this output position; None: a padded zero."""
        size = self.size[axis]
        place = output * self.stride[axis] - self.padding[axis] + tap * self.dilation[axis]
        if 0 <= place < size:
            return place
        if self.padding_mode == "circular":
            return place % size
        if self.padding_mode == "reflect":
            return -place if place < 0 else 2 * (size - 1) - place
        return min(max(place, 0), size - 1) if self.padding_mode == "replicate" else None

    def check(self, shape: tuple[int, ...]) -> None:
        """Whether this can be the geometry of a kernel of ``shape``.

        Raises:
            ValueError: it cannot.
        """
        lists = (self.output_size, self.kernel_size, self.stride, self.padding, self.dilation)
        whole = bool(self.size) and all(len(numbers) == len(self.size) for numbers in lists)
        positive = min(*self.size, *self.output_size, *self.stride, *self.dilation, self.groups, 1) == 1
        fits = whole and positive and min(self.padding, default=0) >= 0 and self.kernel_size == shape[2:]
        fits = fits and self.is_modest and all(map(self._reaches, range(len(self.size))))
        if not fits or shape[0] % self.groups or self.padding_mode not in PADDING_MODES:
            raise ValueError(f"{self} is no geometry of a kernel of shape {shape}")

    @property
    def is_modest(self) -> bool:
        """Whether no axis takes long to walk along."""
        steps = zip(self.kernel_size, self.output_size, strict=True)
        widest = max(*self.size, *self.padding, *self.dilation, *self.stride)
        return widest <= _WIDEST and max(k * o for k, o in steps) <= _MOST_STEPS

    def _reaches(self, axis: int) -> bool:
        """Whether the outputs along an axis are those of a padding that is wide enough, and not too wide."""
        size, padding = self.size[axis], self.padding[axis]
        span = self.dilation[axis] * (self.kernel_size[axis] - 1)
        after = (self.output_size[axis] - 1) * self.stride[axis] + span + 1 - size - padding
        mirrored = {"reflect": size - 1, "circular": size}.get(self.padding_mode, max(padding, span))
        return -self.stride[axis] < after <= max(padding, span) and max(padding, after) <= mirrored


def make_geometry(
    shape: tuple[int, ...],
    size: tuple[int, ...],
    stride: tuple[int, ...] = (1,),
    padding: tuple[int, ...] | None = None,
    dilation: tuple[int, ...] = (1,),
    groups: int = 1,
    padding_mode: str = "zeros",
    padding_after: tuple[int, ...] | None = None,
) -> Geometry:
    """The geometry of a convolution, checked.

    Args:
        shape: of the kernel, (C_out, C_in / groups, k, …).
        size: of the input, one number an axis.
        stride: one number for all axes, or one an axis; so are ``padding`` and ``dilation``.
        padding: on both sides; None for dilation · (k − 1) / 2, which at stride 1 keeps the size.
        dilation: distance of neighbouring taps.
        groups: of channels.
        padding_mode: one of ``PADDING_MODES``.
        padding_after: at the end, where it differs from ``padding``.

    Raises:
        UsageError: the numbers do not fit each other.
    """
    kernel = shape[2:]
    axes = len(kernel)
    stride, dilation = _each(stride, axes, "strides"), _each(dilation, axes, "dilations")
    if padding is None:
        padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    padding = _each(padding, axes, "paddings")
    after = padding if padding_after is None else padding_after
    if len(size) != axes:
        raise UsageError(f"input size {_by(size)} for a kernel of size {_by(kernel)}: one number an axis")
    if min(*size, *stride, *dilation, groups) < 1 or min(padding) < 0:
        raise UsageError("sizes, strides, dilations and groups are whole numbers from 1, paddings from 0")
    if shape[0] % groups:
        raise UsageError(f"{shape[0]} output channels do not divide into {groups} groups")
    if padding_mode not in PADDING_MODES:
        raise UsageError(f"padding mode {padding_mode!r} is none of {', '.join(PADDING_MODES)}")
    widest = {"reflect": -1, "circular": 0}.get(padding_mode)
    if widest is not None and any(p > n + widest for p, n in zip((*padding, *after), size * 2, strict=True)):
        raise UsageError(f"padding {_by(padding)} is too wide to be {padding_mode} at input size {_by(size)}")
    output = tuple(
        (size[a] + padding[a] + after[a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1
        for a in range(axes)
    )
    if min(output) < 1:
        raise UsageError(f"a kernel of size {_by(kernel)} does not fit into an input of size {_by(size)}")
    found = Geometry(size, output, kernel, stride, padding, dilation, groups, padding_mode)
    if not found.is_modest:
        raise UsageError(f"input size {_by(size)}, stride, padding or dilation is too large for one map")
    return found


def _each(numbers: tuple[int, ...], axes: int, what: str) -> tuple[int, ...]:
    if len(numbers) not in (1, axes):
        raise UsageError(f"{_by(numbers)}: {what} are one number, or one for each of {axes} axes")
    return numbers * axes if len(numbers) == 1 else numbers


def _by(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))


def factors_by_axis(factors: tuple[int, ...], axes: tuple[int, ...]) -> tuple[tuple[int, ...], ...] | None:
    """For each site, the part of its factor that belongs to each axis; None where they do not align.

        factors_by_axis((2, 8, 2), (2, 2, 8)) == ((2, 1, 1), (1, 2, 4), (1, 1, 2))

    Args:
        factors: of one side, most significant first.
        axes: the sizes of that side's axes, channels last; the products of both are equal.
    """
    left = list(axes)
    axis, sites = 0, []
    for factor in factors:
        parts = [1] * len(axes)
        while factor > 1:
            while left[axis] == 1:
                axis += 1
            shared = min(factor, left[axis])
            if factor % shared or left[axis] % shared:
                return None
            parts[axis] = shared
            factor //= shared
            left[axis] //= shared
        sites.append(tuple(parts))
    return tuple(sites)
