"""Videos as files: the MP4, a contact sheet of some of its frames, and the filmstrip, a picture of all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image, PngImagePlugin

SHOWN = 8  # frames of a contact sheet
WIDTH = 256  # pixels, at most, of each of them
GAP = 8  # pixels between two
CRF = "17"  # of x264: the lower the closer, 0 to 51
COUNT = "frames"  # what a filmstrip's PNG notes their number under
BT709 = 1  # the number of this standard in the headers of a video

Frames = Sequence[Image.Image]


def write_mp4(frames: Frames, fps: int, file: Path | BinaryIO) -> None:
    """Write frames of even width and height as H.264 in an MP4 file, `fps` of them a second."""
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": CRF})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"  # what every player can show
        # Players take high-definition video for BT.709 and other video for BT.601 unless the file says which it is.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        for frame in frames:
            picture = av.VideoFrame.from_image(frame.convert("RGB"))
            picture = picture.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def contact_sheet(*videos: Frames) -> Image.Image:
    """A row for each of the videos: `SHOWN` frames, evenly spaced, the first and the last among them."""
    rows = [[_small(video[index]) for index in shown(len(video))] for video in videos]
    width, height = rows[0][0].size
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP), "white")
    for y, row in enumerate(rows):
        for x, frame in enumerate(row):
            sheet.paste(frame, (x * (width + GAP), y * (height + GAP)))
    return sheet


def filmstrip(frames: Frames) -> Image.Image:
    """All frames side by side, none changed; `frames_of` takes them apart again."""
    width, height = frames[0].size
    strip = Image.new("RGB", (width * len(frames), height))
    for index, frame in enumerate(frames):
        strip.paste(frame, (index * width, 0))
    strip.info[COUNT] = str(len(frames))
    return strip


def frames_of(strip: Image.Image) -> tuple[Image.Image, ...]:
    """The frames of a filmstrip, as made or as read from its PNG; of any other picture, itself."""
    count = int(strip.info.get(COUNT, 1))
    width = strip.width // count
    return tuple(strip.crop((index * width, 0, (index + 1) * width, strip.height)) for index in range(count))


def notes_of(image: Image.Image) -> PngImagePlugin.PngInfo | None:
    """What the PNG of a filmstrip must say besides its pixels; None for any other picture."""
    if COUNT not in image.info:
        return None
    notes = PngImagePlugin.PngInfo()
    notes.add_text(COUNT, image.info[COUNT])
    return notes


def shown(count: int) -> list[int]:
    """The indices, of `count` frames, that a contact sheet has."""
    return [round(index) for index in np.linspace(0, count - 1, min(SHOWN, count))]


def _small(frame: Image.Image) -> Image.Image:
    if frame.width <= WIDTH:
        return frame
    return frame.resize((WIDTH, round(frame.height * WIDTH / frame.width)), Image.Resampling.LANCZOS)
