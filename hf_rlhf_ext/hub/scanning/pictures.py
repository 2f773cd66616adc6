"""Texts inside pictures: text chunks, comments, EXIF and XMP, compressed ones too."""

import io
import re
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

from PIL import Image

_PRINTABLE = re.compile(rb"[\x20-\x7e]{8,}")
_NO_TEXT = ("icc_profile", "exif")  # a color profile; EXIF is read field by field


def picture_texts(content: bytes) -> Iterator[str]:
    """Yields the texts that a picture holds. A picture that cannot be read holds none."""
    image = _opened(content)
    if image is None:
        return
    yield from _texts(image.info)
    try:
        yield from _texts(getattr(image, "text", {}))  # of PNG, also the chunks behind the pixels
    except Exception:  # a truncated picture
        pass
    for _, segment in getattr(image, "applist", ()):  # of JPEG
        yield from _texts(segment)
    yield from _exif_texts(image)


def holds_archive(content: bytes) -> bool:
    """True if there is a zip archive behind a picture, which viewers do not show."""
    return zipfile.is_zipfile(io.BytesIO(content))


def printable_texts(content: bytes) -> str:
    """Returns all longer runs of printable characters, one per line: what no reader knows is found there."""
    runs = _PRINTABLE.findall(content)
    image = _opened(content)
    profile = None if image is None else image.info.get("icc_profile")  # PNG compresses it
    if isinstance(profile, bytes):
        runs += _PRINTABLE.findall(profile)
    return "\n".join(run.decode("ascii") for run in runs)


def _opened(content: bytes) -> Image.Image | None:
    """Opens a picture without decoding it. None if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size: nothing is decoded that a warning is about
            return Image.open(io.BytesIO(content))
    except Exception:  # Pillow raises many kinds of errors for other content
        return None


def _exif_texts(image: Image.Image) -> Iterator[str]:
    try:
        exif = image.getexif()
        for part in (exif, *(exif.get_ifd(tag) for tag in (0x8769, 0x8825, 0x927C))):  # camera, place, maker
            yield from _texts(dict(part))
    except Exception:  # broken EXIF; its printable runs are searched all the same
        return


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, part in value.items():
            if name not in _NO_TEXT:
                yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, bytes):
        if b"\0" in value[1:3]:  # UTF-16, as Windows writes its comments
            yield value.decode("utf-16-le", errors="replace")
        yield value.decode("utf-8", errors="replace").replace("\0", "\n")
    elif isinstance(value, str):
        yield str(value).replace("\0", "\n")
