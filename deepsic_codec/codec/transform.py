"""The choice between features and wavelets, for chunks that either may code in fewer bytes.

Features take fewer bytes than wavelets on tiles of Sentinel-2, and on some photographs at low rates. No parameter says
what a chunk shows, so a part of it is coded both ways, unless an estimate of the bytes of wavelets is enough.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import inf, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepsic_codec.codec.chunk import ChunkToEncode, EncodeTask, scheduler_of
from deepsic_codec.codec.params import CodecParams
from deepsic_codec.codec.rate_search import encode_tasks
from deepsic_codec.codec.wavelet import WaveletEncoder
from deepsic_codec.model.threads import parallel_map
from deepsic_codec.payload.constants import MAX_QUALITY
from deepsic_codec.payload.wavelet import encode_wavelet

if TYPE_CHECKING:
    from deepsic_codec.model.batch import Encoded
    from deepsic_codec.model.file import ModelInfo

# Edge of the windows of a chunk that are coded for the choice, their largest number, and the pixels of a chunk for one.
WINDOW, MAX_WINDOWS, PIXELS = 128, 4, 8 * 128**2
# Centres of the windows, as shares of the height and the width; of one window, the middle.
CENTRES = ((0.25, 0.25), (0.75, 0.75), (0.25, 0.75), (0.75, 0.25))
# Bytes of wavelets in a chunk, as a share of those in its windows: contexts learn more, and levels are more.
WHOLE_SHARE = 0.92
# Wavelets of which an estimate says that they take no more than this share of the bytes of features are not coded: it
# is too high where it is wrong.
SURE_SHARE = 0.9
# Chunks of so few pixels are coded often, and features of more bytes are compared with the estimate: to code wavelets,
# too, would take more time than it saves bytes.
SMALL, FEW_BYTES = 64**2, 100


def choose_transforms(
    chunks: Sequence[ChunkToEncode], info: "ModelInfo"
) -> tuple[list[ChunkToEncode], dict[int, bytes]]:
    """Choose how chunks of one model are coded.

    Returns
    -------
    list of ChunkToEncode
        The chunks, which now say how they are coded.
    dict of int to bytes
        Payloads of those that were coded as a whole for the choice, by their number.
    """
    undecided = [number for number, chunk in enumerate(chunks) if chunk.undecided]
    if not undecided:
        return list(chunks), {}
    trials = parallel_map(lambda number: _Trial(chunks[number], info), undecided)
    by_task = {trial.task: trial for trial in trials}
    qualities = {task: trial.quality for task, trial in by_task.items() if trial.quality <= MAX_QUALITY}

    def finish(task: EncodeTask, encoded: "Encoded") -> tuple[bool, bytes | None]:
        """Tell whether wavelets are better; return the payload of the whole chunk if they are not."""
        wavelets = by_task[task].wavelets_take_less(encoded)
        return wavelets, None if wavelets or not by_task[task].whole else task.pack(encoded)

    results = encode_tasks(qualities, scheduler_of(info), finish, features=True, pixels=True, symbols=False)
    decided, payloads = list(chunks), {}
    for number, trial in zip(undecided, trials, strict=True):
        wavelets, payload = results.get(trial.task, (True, None))
        params = chunks[number].params.changed(transform="wavelet" if wavelets else "features")
        decided[number] = replace(chunks[number], params=params)
        if payload is not None:
            payloads[number] = payload
    return decided, payloads


class _Trial:
    """Windows of a chunk, as a chunk of its own.

    Attributes
    ----------
    whole : bool
        Whether they are the whole chunk.
    task : EncodeTask
    quality : float
        That of the chunk, or about the one that reaches its target; infinite without data.
    """

    def __init__(self, chunk: ChunkToEncode, info: "ModelInfo") -> None:
        samples = chunk.axes.to_samples(chunk.array)
        parts = windows(samples)
        self._all = parts.shape == samples.shape
        self.whole = self._all and chunk.params.quality is not None
        params = chunk.params.changed(transform="features")
        if self.whole:
            trial = replace(chunk, params=params)
        else:
            params = params.changed(axes="nyxc", semantics="none", embedding=False, label_tile=None)
            trial = ChunkToEncode(params, parts, "C")
        self.task = EncodeTask(trial, info)
        if self.task.scaled.empty:
            self.quality = inf
        else:
            self._wavelets = WaveletEncoder(self.task.scaled, params)
            self.quality = self._quality(params)

    def _quality(self, params: CodecParams) -> float:
        if params.quality is not None:
            return params.quality
        if params.psnr is not None:
            code = self._wavelets.code_for_error(10 ** (-params.psnr / 20), 1.0)
        else:
            assert params.bpp is not None
            samples = self.task.scaled.samples
            code = self._wavelets.code_for_bytes(params.bpp * samples.size / samples.shape[-1] / 8)
        return self._wavelets.quality_of(code)

    def wavelets_take_less(self, encoded: "Encoded") -> bool:
        """Tell whether wavelets with the error of coded features take fewer bytes."""
        assert encoded.features is not None
        error = self._error(self.task.decode(encoded.pixels))
        code = self._wavelets.code_for_error(max(error, 1e-3), self.task.scaled.extent)
        estimate, nbytes = self._wavelets.estimated_bytes(code), len(encoded.features)
        if estimate < SURE_SHARE * nbytes:
            return True
        if self._wavelets.samples <= SMALL * self.task.scaled.samples.shape[-1] and nbytes > FEW_BYTES:
            return estimate < nbytes
        matrix = self._wavelets.matrix_bytes(code)
        coded = self._wavelets.at_code(code)
        # Errors are close to each other, and bytes about inversely proportional to them.
        change = max(self._error(self._wavelets.decode(coded)), 1e-3) / max(error, 1e-3)
        if self._all:
            taken: float = sum(len(encode_wavelet(one)) for one in coded.wavelets)
        else:
            taken = WHOLE_SHARE * coded.nbytes
        return change * taken + matrix < nbytes

    def _error(self, decoded: NDArray[Any]) -> float:
        """Return the root mean square error of samples with data."""
        scaled = self.task.scaled
        squares = np.square(decoded.astype(np.int64) - scaled.samples)
        if scaled.mask is not None:
            squares = squares[~np.broadcast_to(scaled.mask, squares.shape)]
        # The sum of integers does not depend on their order, as the mean of floating-point numbers does.
        return sqrt(int(squares.sum()) / squares.size)


def windows(samples: NDArray[Any]) -> NDArray[Any]:
    """Return parts (windows, height, width, bands) of samples (slices, height, width, bands), spread over them."""
    slices, height, width, _ = samples.shape
    count = min(MAX_WINDOWS, max(1, slices * height * width // PIXELS))
    rows, columns = min(WINDOW, height), min(WINDOW, width)
    parts = []
    for number, (y, x) in enumerate(CENTRES[:count] if count > 1 else ((0.5, 0.5),)):
        top, left = int((height - rows) * y), int((width - columns) * x)
        parts.append(samples[(2 * number + 1) * slices // (2 * count), top : top + rows, left : left + columns])
    return np.stack(parts)
