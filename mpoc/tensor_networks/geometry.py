"""The geometry of a convolution at a given input size: which input position each tap of its kernel reads.

The whole-map form (Gao et al. 2020) replaces a convolution by one linear map from H·W·C_in to H'·W'·C_out
numbers, channel last. A checkpoint holds the kernel alone, so sizes, stride, padding, dilation and groups are
recorded here. A tap is a shift: along each axis, the output at o reads one input position, or none in zero
padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from mpoc.errors import UsageError

# Limits on the length of an axis, and on its taps times its outputs, far above those of images and sound.
_WIDEST = 1 << 20
_MOST_STEPS = 1 << 24
PADDING_MODES = ("zeros", "circular", "reflect", "replicate")
_Size = Annotated[int, ("minimum", 1)]


@dataclass(frozen=True)
class Geometry:
    """Each tuple has one number per axis: (length), (height, width) or (depth, height, width)."""

    size: Annotated[tuple[_Size, ...], "size of the input, e.g. (2, 2)"]
    output_size: tuple[_Size, ...]
    kernel_size: tuple[_Size, ...]
    stride: tuple[_Size, ...]
    # The padding after the last position follows from output_size.
    padding: Annotated[tuple[Annotated[int, ("minimum", 0)], ...], "padding before the first position"]
    dilation: tuple[_Size, ...]
    groups: _Size
    padding_mode: Annotated[str, ("enum", PADDING_MODES)]

    @property
    def positions(self) -> tuple[int, int]:
        """Numbers of output and input positions: H'·W' and H·W."""
        return math.prod(self.output_size), math.prod(self.size)

    def shifts(self, axis: int) -> list[list[tuple[int, int]]]:
        """The pairs (output position, input position) that each tap along ``axis`` joins."""
        shifts: list[list[tuple[int, int]]] = []
        for tap in range(self.kernel_size[axis]):
            pairs = ((o, self._reads(axis, o, tap)) for o in range(self.output_size[axis]))
            shifts.append([(o, p) for o, p in pairs if p is not None])
        return shifts

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
        """Check that this can be the geometry of a kernel of ``shape``.

        Raises:
            ValueError: it cannot.
        """
        lists = (self.output_size, self.kernel_size, self.stride, self.padding, self.dilation)
        whole = bool(self.size) and all(len(numbers) == len(self.size) for numbers in lists)
        positive = min(*self.size, *self.output_size, *self.stride, *self.dilation, self.groups, 1) == 1
        fits = whole and positive and min(self.padding, default=0) >= 0 and self.kernel_size == shape[2:]
        fits = fits and self.is_modest and all(map(self._reaches, range(len(self.size))))
        if not fits or shape[0] % self.groups or self.padding_mode not in PADDING_MODES:
            raise ValueError(f"{self} cannot be the geometry of a kernel of shape {shape}")

    @property
    def is_modest(self) -> bool:
        """Whether every axis is short enough to be walked along."""
        steps = zip(self.kernel_size, self.output_size, strict=True)
        widest = max(*self.size, *self.padding, *self.dilation, *self.stride)
        return widest <= _WIDEST and max(k * o for k, o in steps) <= _MOST_STEPS

    def _reaches(self, axis: int) -> bool:
        """Whether the number of outputs along an axis follows from a padding that is possible."""
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
    """Make and check the geometry of a convolution.

    ``stride``, ``padding`` and ``dilation`` have one number for all axes, or one per axis.

    Args:
        shape: shape of the kernel, (C_out, C_in / groups, k, …).
        size: size of the input, one number per axis.
        stride: distance of neighbouring outputs.
        padding: added on both sides; None: dilation · (k − 1) / 2, which keeps the size at stride 1.
        dilation: distance of neighbouring taps.
        groups: number of channel groups.
        padding_mode: one of ``PADDING_MODES``.
        padding_after: positions added at the end, if other than ``padding``.

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
        raise UsageError(f"input size {_by(size)} for a kernel of size {_by(kernel)}: one number per axis")
    if min(*size, *stride, *dilation, groups) < 1 or min(padding) < 0:
        raise UsageError("sizes, strides, dilations and groups must be positive, paddings not negative")
    if shape[0] % groups:
        raise UsageError(f"{shape[0]} output channels do not divide into {groups} groups")
    _check_padding(padding_mode, padding, after, size)
    spans = (d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    steps = zip(size, padding, after, spans, stride, strict=True)
    output = tuple((n + p + q - span) // step + 1 for n, p, q, span, step in steps)
    if min(output) < 1:
        raise UsageError(f"a kernel of size {_by(kernel)} does not fit into an input of size {_by(size)}")
    geometry = Geometry(size, output, kernel, stride, padding, dilation, groups, padding_mode)
    if not geometry.is_modest:
        raise UsageError(f"input size {_by(size)}, stride, padding or dilation is too large for one map")
    return geometry


def _check_padding(
    mode: str, padding: tuple[int, ...], after: tuple[int, ...], size: tuple[int, ...]
) -> None:
    """Refuse an unknown padding mode, or padding that reflects or wraps more than the input."""
    if mode not in PADDING_MODES:
        raise UsageError(f"padding mode {mode!r}: not one of {', '.join(PADDING_MODES)}")
    widest = {"reflect": -1, "circular": 0}.get(mode)
    if widest is not None and any(p > n + widest for p, n in zip((*padding, *after), size * 2, strict=True)):
        raise UsageError(f"padding {_by(padding)} is too wide for mode {mode} at input size {_by(size)}")


def _each(numbers: tuple[int, ...], axes: int, what: str) -> tuple[int, ...]:
    if len(numbers) not in (1, axes):
        raise UsageError(f"{_by(numbers)}: {what} must be one number, or one for each of {axes} axes")
    return numbers * axes if len(numbers) == 1 else numbers


def _by(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))


def factors_by_axis(factors: tuple[int, ...], axes: tuple[int, ...]) -> tuple[tuple[int, ...], ...] | None:
    """Split each site's factor into its parts along the axes; None if factors and axes do not align.

        factors_by_axis((2, 8, 2), (2, 2, 8)) == ((2, 1, 1), (1, 2, 4), (1, 1, 2))

    Args:
        factors: factors of one side, most significant first.
        axes: sizes of that side's axes, channels last, with the same product.
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
