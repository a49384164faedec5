"""Pictures beside a result: a few images, their attack and what the defense makes of both.

They are 8-bit pictures for looking at, not data: no number comes from them. Never imports torch.
"""

import base64
import binascii
import io
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, Field

from dbp_bench.declaration import Strict, read_json
from dbp_bench.result import write_atomically

SCHEMA: Literal[1] = 1
NOTE: Final = "8-bit pictures for looking at, not data: no number comes from them"
_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_LARGEST: Final = 1 << 20
"""The most bytes that a picture on a page may have."""


def _png(text: str) -> str:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("not base64") from None
    if not raw.startswith(_SIGNATURE) or len(raw) > _LARGEST:
        raise ValueError("not a PNG picture of at most a megabyte")
    return text


Png = Annotated[str, AfterValidator(_png)]
"""A PNG file in base64."""


class Sample(Strict):
    """One image, at one draw of the defense's noise."""

    id: int
    label: int
    clean: Png
    adversarial: Png
    noised: Png | None
    """The adversarial image as the first network of the purifier sees it, from diffusion space
    [-1, 1]; null where no network is called."""
    purified: Png
    """The adversarial image after purification."""
    said_clean: int
    """The class that the defense predicts for the clean image."""
    said_adversarial: int


class Samples(Strict):
    """The pictures of one result; the file lies beside it."""

    schema_version: Literal[1] = Field(alias="schema")
    note: str
    track: str
    defense: str
    threat: str
    seed: int
    draw: int
    """The draw of the defense's noise in all pictures; where draws are known, the one shown."""
    result_sha256: str
    """sha256 of the result file that they belong to."""
    compared: int
    """The number of outcomes that were computed again when the pictures were made."""
    differing: int
    """The number of these that differed from the result's."""
    images: list[Sample]

    def write(self, path: Path) -> None:
        """Write the file, all of it or nothing."""
        write_atomically(path, self.model_dump_json(by_alias=True, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """The samples in the file at `path`.

        Raises:
            BadResult: It holds none.
        """
        return read_json(path, cls, "samples of a result")


def samples_path(result: Path) -> Path:
    """The path of the pictures of the result at the path `result`."""
    return result.with_name(f"samples-{result.name}")


def png(rows: list[bytes], channels: int) -> bytes:
    """A PNG file of 8-bit pixels, grey (one channel) or RGB (three).

    Args:
        rows: Rows of pixels, top to bottom, each with its channels together.
        channels: 1 or 3.

    Raises:
        ValueError: There are no pixels, or not the same number in every row.
    """
    if channels not in (1, 3) or not rows or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError(f"{len(rows)} rows of pixels with {channels} channels: not a picture.")
    from PIL import Image

    size = (len(rows[0]) // channels, len(rows))
    buffer = io.BytesIO()
    Image.frombytes("RGB" if channels == 3 else "L", size, b"".join(rows)).save(buffer, "png")
    return buffer.getvalue()
