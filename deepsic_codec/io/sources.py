"""Sources of `deepsic ingest`: files, folders of files, Zarr arrays and groups."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from deepsic_codec.errors import ConfigurationError, DeepSICError, SourceError, UnsupportedArray
from deepsic_codec.io.images import SUFFIXES, ImageSource, open_image
from deepsic_codec.io.require import require
from deepsic_codec.io.zarr_source import is_zarr, open_zarr


def open_sources(
    locations: Iterable[str | Path],
    *,
    axes: str | None = None,
    drop_alpha: bool = False,
    skip: Callable[[str], None] | None = None,
) -> Iterator[ImageSource]:
    """Open files, folders and Zarr arrays.

    Parameters
    ----------
    locations : iterable of str or Path
        Image files; folders, of which all images are opened in the order of their paths; Zarr arrays and groups, by
        path or URL.
    axes : str, optional
        Axes of Zarr arrays whose dimensions have no known names.
    drop_alpha : bool
        Leave out alpha channels.
    skip : callable, optional
        Called with a message for each source that cannot be read; the others follow. Each file is decoded once
        beforehand.

    Yields
    ------
    ImageSource
        One for each file or array.

    Raises
    ------
    SourceError
        If a source cannot be read.
    UnsupportedArray
        If the codec cannot store an image.
    ConfigurationError
        If two sources have the same name.
    """
    require("images", "dask")
    names: dict[str, Path | str] = {}
    for location, name in _expand(locations):
        try:
            if isinstance(location, Path) and location.suffix.lower() in SUFFIXES:
                sources = [replace(open_image(location, drop_alpha=drop_alpha), name=name)]
                if skip is not None:
                    _decode_all(sources[0])
            else:
                sources = list(open_zarr(location, name, axes))
        except (DeepSICError, OSError) as error:
            if skip is None:
                raise
            skip(str(error))
            continue
        for source in sources:
            if source.name in names:
                source = replace(source, name=f"{source.name}-{Path(str(location)).suffix.strip('.')}")
            if source.name in names:
                raise ConfigurationError(
                    f"{names[source.name]} and {location} would both be array {source.name!r}; rename one of them"
                )
            names[source.name] = location
            yield source


def stack(sources: Sequence[ImageSource], name: str) -> ImageSource:
    """Join images of equal size to one array with a first axis n.

    Raises
    ------
    UnsupportedArray
        If there are no images, or their sizes differ.
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
    if "n" in first.axes:
        raise UnsupportedArray(
            f"{first.name} already has an axis n ({first.axes}), the axis of a stack; store these images without "
            "--stack"
        )
    files = [source.attributes.get("source", source.name) for source in sources]
    return ImageSource(name, da.stack([source.values for source in sources]), f"n{first.axes}", {"sources": files})


def _expand(locations: Iterable[str | Path]) -> Iterator[tuple[Path | str, str]]:
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
        files = sorted(child for child in path.rglob("*") if child.suffix.lower() in SUFFIXES and child.is_file())
        if not files:
            raise SourceError(f"{path}: the folder has no images ({', '.join(SUFFIXES)})")
        yield from ((child, child.relative_to(path).with_suffix("").as_posix()) for child in files)


def _decode_all(source: ImageSource) -> None:
    import dask

    with dask.config.set(scheduler="sync"):
        for block in source.values.blocks.ravel():
            block.compute()
