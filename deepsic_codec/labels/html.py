"""What a notebook shows of arrays, labels and selections: a table and a small picture. Names of strangers are text."""

import struct
import zlib
from base64 import b64encode
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.labels.colours import Colour
from deepsic_codec.stored.array import StoredArray

MAX_EDGE = 256  # pixels of a picture
MAP_EDGE = 128  # of a grid of few chunks
MAX_TEXT = 300  # characters of a cell


def about(stored: StoredArray) -> dict[str, Any]:
    """Return what the metadata of an array say: shape, bands, reference system, codec and error."""
    array, params = stored.array, stored.params
    attributes = array.attrs.asdict()
    bands = attributes.get("long_name")
    targets = {name: getattr(params, name) for name in ("max_error", "rmse", "psnr", "bpp", "quality")}
    target = next(((name, value) for name, value in targets.items() if value is not None), ("quality", None))
    return {
        "array": array.store_path,
        "shape": f"{' x '.join(map(str, array.shape))} ({', '.join(stored.dimension_names)}) {array.dtype}",
        "chunks": f"{' x '.join(map(str, stored.chunks))}, Zarr format {array.metadata.zarr_format}",
        "bands": ", ".join(map(str, bands)) if isinstance(bands, list) else stored.axes.bands(array.shape),
        "reference system": attributes.get("crs", "none"),
        "codec": f"DeepSIC, model {params.model}, semantics {params.semantics}, nodata {params.nodata}",
        "error": "none: lossless" if params.max_error == 0 else f"{target[0]} {target[1]}",
    }


def table(
    rows: Mapping[str, Any],
    picture: NDArray[np.uint8] | None = None,
    counts: Mapping[str, tuple[int, Colour]] = {},
    pictures: Mapping[str, NDArray[np.uint8]] = {},
    sheet: NDArray[np.uint8] | None = None,
) -> str:
    """Return HTML of rows, and of what else there is.

    Parameters
    ----------
    rows : dict
        Names and what they are, as text.
    picture : ndarray, optional
        Picture beside the table, uint8 (H, W) or (H, W, 3).
    counts : dict of str to (int, colour)
        Numbers of chunks of classes, and their colours.
    pictures : dict of str to ndarray
        Pictures of some of these classes, uint8 (H, W, 3).
    sheet : ndarray, optional
        Picture below the table, uint8 (H, W, 3).
    """
    image = ""
    if picture is not None and picture.size:
        step = -(-max(picture.shape[:2]) // MAX_EDGE)
        image = _image(picture[::step, ::step], ' style="float: left"')
    cells = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(str(v)[:MAX_TEXT])}</td></tr>" for k, v in rows.items())
    legend = "".join(
        f'<tr><th>{escape(name[:MAX_TEXT])}</th><td style="border-left: 1em solid rgb{colour}">{number:,} '
        f"{_image(pictures.get(name))}</td></tr>"
        for name, (number, colour) in counts.items()
    )
    return f"<div>{image}<table>{cells}{legend}</table>{_image(sheet)}</div>"


def to_picture(samples: NDArray[Any], stored: StoredArray) -> NDArray[np.uint8]:
    """Return samples (..., bands) of an array as colours, uint8 (..., 3): stretched, unless they are 8-bit colours."""
    bands = samples.shape[-1]
    chosen = [band for band in stored.params.label_numbers or () if band < bands]
    numbers = chosen if len(chosen) in (1, 3) else [0, 1, 2] if bands >= 3 else [0]
    values = samples[..., numbers].astype(np.float64)
    if samples.dtype != np.uint8 or bands not in (1, 3):
        finite = values[np.isfinite(values)]
        low, high = np.percentile(finite, [1, 99]) if len(finite) else (0, 1)
        values = (np.nan_to_num(values, nan=low) - low) * 255 / ((high - low) or 1)
    return np.broadcast_to(np.clip(values, 0, 255), (*samples.shape[:-1], 3)).astype(np.uint8)


def _image(picture: NDArray[np.uint8] | None, style: str = "") -> str:
    if picture is None or not picture.size:
        return ""
    return f'<img alt=""{style} src="data:image/png;base64,{_png(picture)}">'


def enlarged(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a picture of a grid, uint8 (H, W) or (H, W, 3), with squares for pixels."""
    edge = max(1, MAP_EDGE // max(picture.shape[:2]))
    return picture.repeat(edge, axis=0).repeat(edge, axis=1)


def _png(picture: NDArray[np.uint8]) -> str:
    height, width = picture.shape[:2]
    lines = np.pad(picture.reshape(height, -1), ((0, 0), (1, 0)))  # filter 0 of each line

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if picture.ndim == 3 else 0, 0, 0, 0)
    parts = part(b"IHDR", header) + part(b"IDAT", zlib.compress(lines.tobytes())) + part(b"IEND", b"")
    return b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()
