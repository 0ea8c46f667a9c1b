"""Sources of `deepsic ingest`: files, folders of files, Zarr arrays and groups."""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

from deepsic_codec.errors import DeepSICError, SourceError, UnsupportedArray
from deepsic_codec.io.images import SUFFIXES, ImageSource, open_image
from deepsic_codec.io.zarr_source import PlainNode, is_zarr, open_zarr
from deepsic_codec.require import require
from deepsic_codec.stored.embedded import PREFIX as MODEL
from deepsic_codec.stored.location import SUFFIX

APPLE_DOUBLE = b"\0\5\x16\7"  # the first bytes of such a file
RESERVED = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
# Attributes that say what the samples of a stack mean.
SHARED = ("color_table", "photometric", "scale_factor", "add_offset", "scales", "offsets", "units")
# A date, maybe with a time, in tags and names; products of Sentinel and Landsat have the acquisition first.
TIME = re.compile(
    r"(?<!\d)((?:19|20)\d\d)([-_:]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])"
    r"(?:[T ]([01]\d|2[0-3]):?([0-5]\d):?([0-5]\d))?(?!\d)"
)
PRODUCT = re.compile(r"S[1-6][A-D]_|L[COTEM]0\d_")
TIME_TAGS = ("acquisitiondatetime", "datetime", "sensingtime", "productstarttime", "acquisitiondate", "dateacquired")
RESERVED_PREFIXES = ("__", MODEL)  # Zarr format 3 keeps names that begin with __ for itself


def open_sources(
    locations: Iterable[str | Path],
    *,
    axes: str | None = None,
    drop_alpha: bool = False,
    keep_alpha: bool = False,
    skip: Callable[[str], None] | None = None,
    follow_links: bool = False,
    left_out: Callable[[str], None] = warnings.warn,
    renamed: Callable[[str], None] = warnings.warn,
    plain: Callable[[PlainNode], None] | None = None,
) -> Iterator[ImageSource]:
    """Open files, folders and Zarr arrays.

    Parameters
    ----------
    locations : iterable of str or Path
        Image files; folders, of which all images are opened in the order of their paths; Zarr arrays and groups, by
        path or URL.
    axes : str, optional
        Axes of Zarr arrays whose dimensions have no known names.
    drop_alpha, keep_alpha : bool
        Leave out alpha channels and masks; keep alpha channels as bands. See `deepsic_codec.io.images.open_image`.
    skip : callable, optional
        Called with a message for each source that cannot be read; the others follow. Each file is decoded once
        beforehand.
    follow_links : bool
        Follow symbolic links that lead out of a folder. Otherwise they are left out: whoever made the folder may have
        made them, and they may lead to any file of the machine.
    left_out, renamed : callable
        Called with a message for what is left out, such a link or a second image of a file, and for each source whose
        name is changed.
    plain : callable, optional
        Called with what Zarr groups have beside images; without it, such arrays are left out.

    Yields
    ------
    ImageSource
        One for each file or array. All have names that no other source has: see `ArrayNames`.

    Raises
    ------
    SourceError
        If a source cannot be read.
    UnsupportedArray
        If the codec cannot store an image.
    """
    require("images", "dask")
    names = ArrayNames()
    for location, name in _expand(locations, follow_links, left_out):
        try:
            if isinstance(location, Path) and location.suffix.lower() in SUFFIXES:
                sources = [replace(open_image(location, drop_alpha=drop_alpha, keep_alpha=keep_alpha), name=name)]
                if skip is not None:
                    _decode_all(sources[0])
            else:
                nodes: list[PlainNode] = []
                sources = list(open_zarr(location, name, axes, plain=nodes.append))
                for node in nodes:
                    if plain is not None:
                        plain(node)
                    elif node.is_array:
                        left_out(f"{location}/{node.path}: is not stored, because it is no image")
        except (DeepSICError, OSError) as error:
            if skip is None:
                raise
            skip(str(error))
            continue
        for source in sources:
            chosen = names.choose(source.name, Path(str(location)).suffix.strip("."))
            if chosen != source.name:
                renamed(f"{location}: is array {chosen!r}, as {source.name!r} is taken or cannot be a name")
            for message in source.left_out:
                left_out(f"{message} is not stored")
            yield replace(source, name=chosen)


class ArrayNames:
    """Gives each array of an archive a name of its own.

    A name is changed if another array has it, if one of two arrays would lie within the other, and if it is that of
    something else: of metadata, of a label index, of an embedded model.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._groups: set[str] = set()  # that have an array of these names

    def choose(self, name: str, suffix: str = "") -> str:
        """Return a name that is free, and is taken from now on: `name` if that is possible.

        Parameters
        ----------
        name : str
            Path in the archive, with "/" between its parts.
        suffix : str
            Of the file, such as "png"; it tells files apart whose names differ in nothing else.
        """
        *groups, last = name.split("/")
        suffix = _allowed_part(suffix, "image").replace("/", "-")
        name = "/".join([*(_allowed_part(group, "images") for group in groups), _allowed_part(last, suffix)])
        flat = name.replace("/", "-")
        choices = chain((name, f"{name}-{suffix}", flat), (f"{flat}-{number}" for number in count(2)))
        chosen = next(filter(self._is_free, choices))
        self._names.add(chosen)
        self._groups.update(_groups_of(chosen))
        return chosen

    def _is_free(self, name: str) -> bool:
        taken = name in self._names or name in self._groups or not self._names.isdisjoint(_groups_of(name))
        return not taken


def _groups_of(name: str) -> Iterator[str]:
    """Yield the paths of all groups around an array."""
    for position, letter in enumerate(name):
        if letter == "/":
            yield name[:position]


def _allowed_part(part: str, suffix: str) -> str:
    """Return a part of a path, with `suffix` added if the part itself means something else in an archive."""
    part = part.replace("\\", "-").strip()  # a separator for zarr
    if not part.strip("."):
        return suffix or "image"
    if part.startswith(RESERVED_PREFIXES):
        part = f"{suffix}-{part}"
    return f"{part}-{suffix}" if part.lower() in RESERVED or part.endswith(SUFFIX) else part


def stack(sources: Sequence[ImageSource], name: str) -> ImageSource:
    """Join images of equal size to one array with a first axis t, if each has a time of its own, else n.

    Raises
    ------
    UnsupportedArray
        If there are no images, or their sizes, dtypes, NoData values or tables of colours differ.
    """
    import dask.array as da

    if not sources:
        raise UnsupportedArray("there are no images to stack; name at least one")
    first = sources[0]
    for source in sources:
        if (source.values.shape, source.axes) != (first.values.shape, first.axes):
            raise UnsupportedArray(
                f"{source.name} is {source.values.shape} ({source.axes}), but {first.name} is {first.values.shape} "
                f"({first.axes}); a stack needs images of equal size"
            )
        if source.values.dtype != first.values.dtype:
            raise UnsupportedArray(
                f"{source.name} has samples of {source.values.dtype}, but {first.name} of {first.values.dtype}; a "
                "stack needs one dtype: convert some of the files"
            )
        for key in SHARED:
            if source.attributes.get(key) != first.attributes.get(key):
                raise UnsupportedArray(
                    f"{source.name} and {first.name} have different attributes {key}, so that equal samples mean "
                    "different things; store these images without --stack"
                )
    if "n" in first.axes:
        raise UnsupportedArray(
            f"{first.name} already has an axis n ({first.axes}), the axis of a stack; store these images without "
            "--stack"
        )
    nodata = {json.dumps(source.attributes.get("nodata")) for source in sources}
    if len(nodata) > 1:
        raise UnsupportedArray(
            f"the images have different NoData values ({', '.join(sorted(nodata))}), and a stack has one; store these "
            "images without --stack, or give all the same value first"
        )
    values = da.stack([source.values for source in sources])
    times = None if "t" in first.axes else times_of(sources)
    axis, dimension = ("n", "n") if times is None else ("t", "time")
    return ImageSource(
        name,
        values,
        axis + first.axes,
        _joined_attributes(sources) | ({} if times is None else {"times": times}),
        lossless=any(source.lossless for source in sources),
        shifted=any(source.shifted for source in sources),
        left_out=tuple(message for source in sources for message in source.left_out),
        dimensions=None if first.dimensions is None else (dimension, *first.dimensions),
        reads=tuple(location for source in sources for location in source.reads),
    )


def times_of(sources: Sequence[ImageSource]) -> list[str] | None:
    """Return when images were taken, in ISO 8601, from their tags or names; None unless each has a time of its own."""
    times = [_time_of(source) for source in sources]
    return [time for time in times if time is not None] if None not in times and len({*times}) == len(times) else None


def _time_of(source: ImageSource) -> str | None:
    tags = source.attributes.get("tags")
    items = tags.items() if isinstance(tags, Mapping) else ()
    told = {str(key).lower().replace("_", ""): str(value) for key, value in items}
    name = Path(str(source.attributes.get("source", source.name))).stem
    for text in (*(told[key] for key in TIME_TAGS if key in told), name):
        matches = list(dict.fromkeys(match.group(1, 3, 4, 5, 6, 7) for match in TIME.finditer(text)))
        if len(matches) == 1 or (matches and PRODUCT.match(text)):
            year, month, day, *clock = matches[0]
            time = f"{year}-{month}-{day}T{':'.join(number or '00' for number in clock)}"
            with suppress(ValueError):  # 31 February
                return datetime.fromisoformat(time).isoformat()
    return None


def _joined_attributes(sources: Sequence[ImageSource]) -> dict[str, Any]:
    """Return the attributes that images have in common; `images` lists the others of each image, if there are any."""
    first, *others = ({**source.attributes, "source": None} for source in sources)
    common = {key: value for key, value in first.items() if all(key in item and item[key] == value for item in others)}
    different = [{key: value for key, value in item.items() if key not in common} for item in (first, *others)]
    files = [source.attributes.get("source", source.name) for source in sources]
    del common["source"]
    return {"sources": files, **common, **({"images": different} if any(different) else {})}


def _expand(
    locations: Iterable[str | Path], follow_links: bool, left_out: Callable[[str], None]
) -> Iterator[tuple[Path | str, str]]:
    """Yield the path or URL of each file and Zarr node, and its name."""
    for location in locations:
        text = str(location)
        if "://" in text:
            yield text, Path(text.rstrip("/").rpartition("/")[2]).stem
            continue
        path = Path(text)
        if not path.exists():
            raise SourceError(f"{path}: no such file or folder")
        if path.is_file() or is_zarr(path):
            yield path, path.stem
            continue
        files, links = _images(path, follow_links)
        for link in links:
            left_out(f"{link}: is a symbolic link that leads out of the folder {path}; --follow-links reads it")
        if not files:
            but = f"; {len(links)} symbolic links, such as {links[0]}, lead out of it" if links else ""
            raise SourceError(f"{path}: the folder has no images ({', '.join(SUFFIXES)}){but}")
        yield from ((child, child.relative_to(path).with_suffix("").as_posix()) for child in files)


def _images(folder: Path, follow_links: bool) -> tuple[list[Path], list[Path]]:
    """Return the image files of a folder, and the symbolic links that lead out of it and are not followed."""
    root = folder.resolve()
    files, links, visited = [], [], {root}
    for parent, subfolders, names in os.walk(folder, followlinks=follow_links):
        for name in [*subfolders, *names]:
            path = Path(parent, name)
            is_image = name not in subfolders and path.suffix.lower() in SUFFIXES
            if path.is_symlink() and not follow_links and not path.resolve().is_relative_to(root):
                links += [path] if is_image or name in subfolders else []
            elif is_image and path.is_file() and not _is_apple_double(path):
                files.append(path)
        if follow_links:  # a folder that a link leads back to is not entered twice
            resolved = {name: Path(parent, name).resolve() for name in subfolders}
            subfolders[:] = [name for name in subfolders if resolved[name] not in visited]
            visited.update(resolved.values())
    return sorted(files), sorted(links)


def _is_apple_double(path: Path) -> bool:
    """Tell whether a file has what macOS stores beside another file: ._a.png beside a.png."""
    if not path.name.startswith("._"):
        return False
    with path.open("rb") as file:
        return file.read(4) == APPLE_DOUBLE


def _decode_all(source: ImageSource) -> None:
    import dask

    with dask.config.set(scheduler="sync"):
        for block in source.values.blocks.ravel():
            block.compute()
