"""Positions of several axes: M-RoPE (time, height, width) and the rows and columns of an image."""

from __future__ import annotations

from rotary_export.errors import RotaryExportError

# Layouts of `mrope_section`, and of the axes of an image (rope type axial).
SECTION_LAYOUTS = ("chunked", "interleaved", "pairs-first")
IMAGE_LAYOUTS = ("rows-first", "columns-first", "alternating", "even-odd", "three-axes")


def assign_axes(layout: str, section: tuple[int, ...], half: int) -> tuple[int, ...]:
    """Assign an axis of the positions to each column of a table.

    Sections of a language model (axes time, height, width):
        "chunked": the sections one after the other, section j from axis j mod 3 (Qwen2-VL).
        "interleaved": axis 0, but for columns 1, 4, ... below 3 * section[1], which have axis 1,
            and 2, 5, ... below 3 * section[2], which have axis 2 (Qwen3-VL).
        "pairs-first": axes 1, 2, 1, 2, ..., then axis 0 (Ernie 4.5 VL).
    Images (axis 0: rows, axis 1: columns):
        "rows-first": axis 0 for the first half of the columns, axis 1 for the second (Qwen2-VL).
        "columns-first": the other way round (Llama 4).
        "alternating": axes 1, 0, 1, 0, ... (Kimi).
        "even-odd": as rows-first; rows have the even frequencies, columns the odd ones (Pixtral).
        "three-axes": a third each (MiniMax M3 VL).

    Args:
        layout: One of the above; empty: positions have one axis.
        section: The columns of each axis, of a section layout.
        half: R/2.

    Returns:
        R/2 axes; empty: positions have one axis.

    Raises:
        RotaryExportError: The layout is unknown, or the sections don't fill the columns.
    """
    if not layout:
        return ()
    if layout in IMAGE_LAYOUTS:
        return _assign_image_axes(layout, half)
    if layout not in SECTION_LAYOUTS:
        known = ", ".join((*SECTION_LAYOUTS, *IMAGE_LAYOUTS))
        raise RotaryExportError(f"axis_layout must be one of {known}, got {layout!r}")
    if len(section) != 3:
        raise RotaryExportError(f"mrope_section must have 3 sections, got {list(section)}")
    axes = _assign_section_axes(layout, section, half)
    if len(axes) != half or sum(section) != half:
        raise RotaryExportError(
            f"mrope_section must sum to rotary_dim / 2 = {half}, got {list(section)}"
        )
    return tuple(axes)


def _assign_section_axes(layout: str, section: tuple[int, ...], half: int) -> list[int]:
    if layout == "chunked":
        return [j % 3 for j, size in enumerate(section) for _ in range(size)]
    if layout == "pairs-first":
        return [1, 2] * section[0] + [0] * section[2]
    axes = [0] * half
    for axis in (1, 2):
        for column in range(axis, min(3 * section[axis], half), 3):
            axes[column] = axis
    return axes


def _assign_image_axes(layout: str, half: int) -> tuple[int, ...]:
    if layout == "alternating":
        return (1, 0) * (half // 2)
    order = {"columns-first": (1, 0), "three-axes": (0, 1, 2)}.get(layout, (0, 1))
    return tuple(axis for axis in order for _ in range(half // len(order)))
