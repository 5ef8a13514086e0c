"""Contact sheet: some clips of a cache as one picture, a line of frames each, its prompt above."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from afd_data.files import atomic_write
from afd_data.members import read_member_at
from afd_data.video import read_video

FRAMES = 8
CELL_PX, TEXT_PX, GAP_PX = 120, 18, 4


def write_sheet(folder: Path, rows: Sequence[dict], out: Path) -> None:
    """Write a PNG: a line for each row of the index, with frames that are spread evenly over its clip.

    The same clips give the same bytes.  Raises UserError when a video cannot be read.
    """
    from PIL import Image, ImageDraw, ImageFont

    line_px = CELL_PX + TEXT_PX + GAP_PX
    sheet = Image.new("RGB", (FRAMES * (CELL_PX + GAP_PX), line_px * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=TEXT_PX - 6)
    for line, row in enumerate(rows):
        draw.text(
            (2, line * line_px), f"{row['key']}  {' '.join(row['prompt'].split())}"[:150], fill="black", font=font
        )
        frames = read_video(read_member_at(folder, row, "mp4"), "pyav", row["key"]).frames
        for column, index in enumerate(np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)):
            scale = CELL_PX / max(frames.shape[1:3])
            size = (max(1, round(frames.shape[2] * scale)), max(1, round(frames.shape[1] * scale)))
            resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            cell = Image.fromarray(frames[index]).resize(size, resample)
            sheet.paste(cell, (column * (CELL_PX + GAP_PX), line * line_px + TEXT_PX))
    data = io.BytesIO()
    sheet.save(data, "PNG")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file:
        file.write(data.getvalue())
