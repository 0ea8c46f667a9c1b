"""The codec of Zarr format 2, which is also the codec to use without Zarr."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numcodecs.abc import Codec
from numcodecs.compat import ensure_ndarray
from numcodecs.registry import register_codec

from deepsic_codec.codec.batching import raise_first
from deepsic_codec.codec.chunk import prepare_chunk
from deepsic_codec.codec.decode import DECODER, decode_symbols, parse_payload
from deepsic_codec.codec.encode import ENCODER
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.codec.reduced import check_scale, decode_reduced, parse_start
from deepsic_codec.errors import CorruptPayload, UnsupportedArray


class DeepSIC(CodecParams, Codec):
    """Codec that stores image chunks as arithmetic-coded features or wavelets, with their labels in front.

    A chunk has one or more images, with or without an axis "c" of up to 256 bands. Samples are integers of 8 or 16 bits
    or float32; or bool or integers of 32 or 64 bits, which need `max_error`; or float64, with the precision of float32.
    Labels come from three bands (`label_bands`), or from one. `deepsic_codec.create_array` takes the codec for both
    Zarr formats; `zarr.open(..., zarr_format=2, compressor=DeepSIC())` takes it as it is.

    Parameters
    ----------
    model : str
        Name of the model that encodes, or the first hexadecimal digits of its decoder identity.
    quality : float, optional
        From 1 (fewest bytes) to 200 (best), in steps of 0.01; features end at 100. The quantiser's step falls from 200
        over 4 (at 100) to 1/64 of 255ths of the range of values. The default is 50. `psnr`, `bpp`, `rmse` and
        `max_error` are alternatives; with `max_error` it says how labels are computed, and is 20 by default.
    axes : str
        Letter of each axis of the array, in order: y, x, at most one c (channels), and any of t, z, n. Slices along
        t, z and n are separate images of the chunk.
    semantics : {"pre", "post", "none"}
        "pre" computes labels while encoding and stores them, "post" computes them from the stored features, or from
        the pixels of chunks that have none, when they are read, "none" does neither.
    label_tile : int or (int, int), optional
        Height and width of a label tile in pixels, multiples of 64. By default a chunk has at most 4 tiles along each
        axis.
    label_pooling : {"max", "mean"}
        How the scores of the cells of 64 x 64 pixels in a tile become its scores. "max": a tile has what one of its
        cells shows, so that queries find small things in large tiles. "mean": a tile is named by what it shows as a
        whole, by the mean of the log odds of its cells; for large tiles of pictures of which a cell shows too little,
        such as aerial ones. Small things are then found only with smaller tiles.
    label_bands : int, str, or three of them, optional
        The bands that labels are scored on, by number from 0 or by name: one, or those that show red, green and blue.
        By default the first three, or the first of fewer. Chunks with it are coded as wavelets. Names are those of the
        attribute `long_name` of an array, if it is a list, or of a coordinate of text.
    embedding : bool
        Store an embedding of each label tile, for `Labels.similar` and new labels from examples: 48 bytes a tile with
        the packaged head. Tiles that show the same have embeddings that point in about the same direction.
    nodata : number, optional
        Value of samples without data, which may be NaN for float32 (the attribute and metadata then say "NaN"). Such
        samples are restored exactly at any quality. No other sample is restored to that value: it becomes the next
        larger or smaller one instead. If it is None, NaN means no data in float32, and so does a single value more than
        256 value ranges outside of the range.
    effort : int
        Time that the encoder spends on fewer bytes at the same quality: 0 is fastest, 1 (the default) takes a little
        longer, 2 to 4 take many times as long, for data that is written once and read often. Decoding is equally fast
        for all. With 0 and 1, equal pixels give equal payloads on every machine.
    tune : {"mse", "ms-ssim"}
        Error measure that the encoder minimises. "ms-ssim" needs an effort of at least 2.
    transform : {"auto", "features", "wavelet"}
        What the samples become before they are quantised. "features" are those of the learned networks, "wavelet"
        stands for a wavelet transform of spectral components, which has no ceiling. "auto" takes wavelets, except for
        chunks of three bands of uint8 without `value_range` or `label_bands`: a part of each is coded as features up to
        a quality of 100, and features are taken where they need fewer bytes than wavelets with the same error. Unless
        "features" is passed, chunks of at most 64 values in each band are stored without loss where that takes at most
        2 % more bytes.
    spectral : {"auto", "none"} or matrix
        Transform that turns bands into components before wavelets, so that what bands have in common is coded once.
        "auto" fits it to each chunk, and leaves it out where it does not pay, as for bands that show different things.
        "none" codes each band by itself; as features, too. A matrix (bands, bands) with orthonormal rows is applied to
        every chunk; its rows are the components.
    value_range : "chunk", (low, high), or list of pairs, optional
        Range of values that `quality` and `psnr` refer to, for all bands or for each band. By default `create_array`
        with data, `dask.store` and `deepsic ingest` measure it over the array for dtypes of 16 bits and float32, for
        each band and without a few values far from all others. Chunks that are encoded without it refer to the range of
        an integer dtype, and float32 needs one for `quality` and `psnr`. "chunk" measures it in every chunk and band,
        whose steps then differ. Values outside of it are kept as precisely as others;
        only features clip them, and divide the range into 16320 steps.
    max_error : float, optional
        Bound on the absolute error of every sample, in data units; 0 is lossless (not for floats). Samples are
        predicted from their neighbours, whatever the transform.
    psnr : float, optional
        Target PSNR of each chunk in dB, instead of `quality`; the peak is 255 for uint8 without `value_range`, else
        the value range. Wavelets take two trials where rates fall evenly, features up to a dozen. Where samples in
        steps, as `max_error` stores them, take fewer bytes for as small an error, they are stored instead. A target
        out of reach gives the nearest PSNR.
    bpp : float, optional
        Target size of each payload in bits per pixel (slices x height x width, all bands together), instead of
        `quality`; searched in the same way.
    rmse : float, optional
        Target root mean square error of each chunk over all samples that are data, in their units, instead of
        `quality`. Only for wavelets.
    head : str, optional
        Name of the head that labels and embeds, of a head file or of a model with the decoder of `model`, such as
        "scenes"; by default the head of `model`. Array metadata has its SHA-256.
    decoder : str, optional
        SHA-256 identity of the decoder. Array metadata always has them. By default they are looked up by `model` when
        metadata is written or a chunk is encoded, and ModelNotFound is raised then if there is no such model.

    Raises
    ------
    ConfigurationError
        For a parameter out of range.
    """

    codec_id = "deepsic"

    def encode(self, buf: Any, quality_map: Any = None) -> bytes:
        """Encode a chunk, an array with the axes of the codec; raises UnsupportedArray for others.

        With `quality_map`, pixels have qualities of their own: see `deepsic_codec.create_array`.
        """
        chunk = prepare_chunk(self, _as_array(buf), quality_map=quality_map)
        return raise_first(ENCODER.submit([chunk]))[0]

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Decode a payload to an array of the chunk's shape and memory order, or into `out`."""
        array = self.decode_batch([buf])[0]
        if out is not None:
            return _fill(out, array)
        # Only the codec of a stored array has the decoder's identity; who calls one of that is zarr.
        return array if self.decoder is None else array.view(_StoredChunk)

    def encode_batch(self, bufs: Sequence[Any]) -> list[bytes]:
        """Encode chunks of any shapes in one call; a GPU needs large batches to be fast."""
        return raise_first(ENCODER.submit([prepare_chunk(self, _as_array(buf)) for buf in bufs]))

    def decode_batch(self, bufs: Sequence[Any]) -> list[np.ndarray]:
        """Decode payloads in one call."""
        return raise_first(DECODER.submit([parse_payload(ensure_ndarray(buf).data, params=self) for buf in bufs]))

    def decode_preview(self, buf: Any, scale: int = 8) -> np.ndarray:
        """Decode a payload, or the start of one of wavelets, to a part of its rows and columns.

        Of a start, the bytes up to the last checksum are verified and decoded. If they are fewer than the size needs,
        the result has less detail. Only whole payloads of features, of a bound on the error, or of few bytes can be
        decoded.

        Parameters
        ----------
        buf : bytes-like
            A payload, or its start.
        scale : {8, 1, 2, 4, 16}
            Rows and columns of the chunk in one of the result, a mean of them, about.

        Returns
        -------
        ndarray
            Rows and columns divided by `scale`, rounded up.

        Raises
        ------
        ConfigurationError
            For another scale.
        CorruptPayload
            If the payload is damaged, or ends before its first checksum.
        """
        check_scale(scale)
        data = ensure_ndarray(buf).data
        return decode_reduced(parse_start(data, scale, params=self, limit=data.nbytes), scale)

    def decode_features(self, buf: Any) -> np.ndarray:
        """Decode a payload to its symbols, int16 (slices, images x latents, rows, columns), without pixels."""
        return decode_symbols(parse_payload(ensure_ndarray(buf).data, params=self))

    def get_config(self) -> dict[str, Any]:
        """Return the array metadata of this codec."""
        return {"id": self.codec_id, **self.to_json()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Make a codec from array metadata without its "id"."""
        return cls.from_json(config)


def _as_array(buf: Any) -> np.ndarray:
    try:
        return ensure_ndarray(buf)
    except TypeError as error:
        raise UnsupportedArray(f"expected an array, got {type(buf).__name__}: {error}") from None


class _StoredChunk(np.ndarray):
    """A decoded chunk that refuses to become one of another dtype or shape.

    In format 2 a codec is not told dtype and shape of its array. Zarr takes decoded bytes for such samples, whatever
    they are, with `view(dtype)`, `reshape(-1)` and `reshape(shape)`.
    """

    _shape: tuple[int, ...]

    def __array_finalize__(self, source: Any) -> None:
        self._shape = getattr(source, "_shape", self.shape)

    def view(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], np.dtype) and args[0] != self.dtype:
            raise CorruptPayload(f"header: samples of {self.dtype}, expected {args[0]}")
        return super().view(*args, **kwargs)

    def reshape(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], tuple) and args[0] != self._shape:
            raise CorruptPayload(f"header: chunk shape {self._shape}, expected {args[0]}")
        return super().reshape(*args, **kwargs)


def _fill(out: Any, array: np.ndarray) -> Any:
    """Copy `array` into a buffer: by index if the shape is the same, else in its memory order, as numcodecs does."""
    target = ensure_ndarray(out)
    if target.nbytes != array.nbytes:
        raise UnsupportedArray(
            f"out: the buffer has {target.nbytes} bytes, but the chunk has {array.nbytes}; pass a buffer of the "
            "same size"
        )
    if target.shape != array.shape or target.dtype.newbyteorder("=") != array.dtype.newbyteorder("="):
        flat = array.reshape(-1, order="A").view(target.dtype)
        order = "F" if target.flags.f_contiguous and not target.flags.c_contiguous else "C"
        array = flat.reshape(target.shape, order=order)
    np.copyto(target, array)
    return out


register_codec(DeepSIC)  # for checkouts that are not installed; an installed package is found by its entry point
