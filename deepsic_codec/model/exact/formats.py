"""Fixed-point formats of the transforms: what the integers of each layer stand for, and their ranges.

Values are integers in units of a power of two. A layer multiplies integers of 8 bits, sums them without error, adds a
bias, and shifts the sum down with rounding:

    out = clamp(floor((sum_i w_i a_i + bias) / 2^shift + 1/2))

which gives the same integers on every machine, in any order of summation (`docs/integer-transforms.md`).
"""

from dataclasses import dataclass

#: Bits after the binary point of: input pixels less 128 (64 grey levels are one), inputs of 1x1 convolutions, hidden
#: values of a block, the residual stream, latents, normalised latents, output pixels (64ths of a grey level).
PIXEL_BITS, READ_BITS, HIDDEN_BITS, STREAM_BITS = 6, 5, 6, 9
LATENT_BITS, NORMAL_BITS, OUTPUT_BITS = 8, 9, 12
#: Companded latents, which the semantic head reads, and logits, which it writes.
COMPAND_BITS, LOGIT_BITS, LOGIT_MAX = 9, 8, 2047
#: Bits by which values of an embedding are coarser than logits.
EMBEDDING_SHIFT = 4
#: Ranges of the integers: 8 bits, 12 bits signed, twice that before modulation.
READ_LOW, READ_HIGH, HIDDEN_HIGH, STREAM_MAX, STEM_MAX = -128, 127, 255, 2047, 4095
#: Each of the two parts that make a pixel, so that their sum has 16 bits.
PIXEL_MAX = 16383
#: Two digits to the base 128: a high one of 8 bits and a low one of 7 bits.
DIGIT = 128
WIDE_MAX = 127 * DIGIT + 63
#: Weights have 8 bits; sums of products stay below these bounds, so that float32 holds them exactly with their bias
#: (spatial ones also in algorithms that are not exact, such as Winograd's).
WEIGHT_MAX, PRODUCT_SUM, SPATIAL_SUM, BIAS_MAX = 127, 2.0**23, 2.0**19, 2**22
#: A spatial sum is at most 2^20 with its bias and with the half that rounds.
SPATIAL_BIAS_MAX, SPATIAL_EXPONENT_MAX = 2**18, 15
#: Largest exponent of a weight's unit.
EXPONENT_MAX = 20
#: Fraction bits and largest integer of modulation factors.
MODULATION_BITS, MODULATION_MAX = 8, 2047
#: Hidden channels of a residual block for each of its channels.
EXPANSION = 2
#: Whole qualities, each of which has entries of its own in tables.
QUALITIES = 100
#: Fraction bits of dequantiser steps, in units of latents.
STEP_BITS = 8
#: Step of the quantisers with a trellis, in steps of that without.
TRELLIS_STEP = 1.25
#: Units per whole quality of the qualities in payloads.
HUNDREDTHS = 100
#: Units per grey level of images in int16.
UNITS_PER_LEVEL = 1 << PIXEL_BITS


@dataclass(frozen=True)
class Format:
    """Fraction bits and ranges of the integers that a layer reads and writes."""

    in_bits: int
    in_max: int
    out_bits: int
    low: float
    high: float
    spatial: bool = False
    wide_input: bool = False  # of two digits, each multiplied by itself
    wide_weight: bool = False

    @property
    def bound(self) -> float:
        """Bound of sums of the products that are computed in one matrix product."""
        return SPATIAL_SUM if self.spatial else PRODUCT_SUM

    @property
    def bias_max(self) -> int:
        """Largest bias, in units of the sums."""
        return SPATIAL_BIAS_MAX if self.spatial else BIAS_MAX

    @property
    def weight_max(self) -> int:
        """Largest weight."""
        return WIDE_MAX if self.wide_weight else WEIGHT_MAX

    @property
    def exponents(self) -> tuple[int, int]:
        """Least and largest exponent of a weight's unit."""
        lowest = max(0, self.out_bits - self.in_bits)
        if self.wide_weight and self.wide_input:
            lowest += 8  # the product of the two low digits is left out, 7 bits below the rest
        return lowest, SPATIAL_EXPONENT_MAX if self.spatial else EXPONENT_MAX

    @property
    def shifts(self) -> tuple[int, int]:
        """Least and largest shift from sums to the integers that the layer writes."""
        lowest, highest = self.exponents
        return lowest + self.in_bits - self.out_bits, highest + self.in_bits - self.out_bits


SPATIAL = Format(STREAM_BITS, STREAM_MAX, READ_BITS, READ_LOW, READ_HIGH, spatial=True)
UP = Format(READ_BITS, -READ_LOW, HIDDEN_BITS, 0, HIDDEN_HIGH)
DOWN = Format(HIDDEN_BITS, HIDDEN_HIGH, STREAM_BITS, -(2.0**15), 2.0**15)
#: From pixels, from the stream, and from normalised latents to the input of a modulation.
STEM = Format(PIXEL_BITS, -READ_LOW, STREAM_BITS, -STEM_MAX, STEM_MAX)
INNER = Format(READ_BITS, -READ_LOW, STREAM_BITS, -STEM_MAX, STEM_MAX)
LATENT_STEM = Format(NORMAL_BITS, WIDE_MAX, STREAM_BITS, -STEM_MAX, STEM_MAX, wide_input=True)
#: From the stream to latents and to pixels; the linear shortcuts.
TO_LATENT = Format(READ_BITS, -READ_LOW, LATENT_BITS, -WIDE_MAX, WIDE_MAX)
TO_PIXEL = Format(READ_BITS, -READ_LOW, OUTPUT_BITS, -PIXEL_MAX, PIXEL_MAX)
#: Layers of the semantic head.
COMPANDED_STEM = Format(COMPAND_BITS, WIDE_MAX, STREAM_BITS, -STEM_MAX, STEM_MAX, wide_input=True)
TO_LOGIT = Format(HIDDEN_BITS, HIDDEN_HIGH, LOGIT_BITS, -LOGIT_MAX, LOGIT_MAX)
LINEAR_IN = Format(PIXEL_BITS, -READ_LOW, LATENT_BITS, -(2.0**20), 2.0**20, wide_weight=True)
#: Layers of the filter at full resolution: from grey levels to hidden values, and to what is added to pixels.
FILTER_UP = Format(PIXEL_BITS, -READ_LOW, HIDDEN_BITS, 0, HIDDEN_HIGH)
FILTER_DOWN = Format(HIDDEN_BITS, HIDDEN_HIGH, OUTPUT_BITS, -PIXEL_MAX, PIXEL_MAX)
LINEAR_OUT = Format(LATENT_BITS, WIDE_MAX, OUTPUT_BITS, -PIXEL_MAX, PIXEL_MAX, wide_input=True, wide_weight=True)

#: Formats of the layers of each network, by name; those of residual blocks are in a table of their own.
ANALYSIS_LAYERS = {"linear": LINEAR_IN, "stem": STEM, "reduce": INNER, "out": TO_LATENT}
SYNTHESIS_LAYERS = {"linear": LINEAR_OUT, "stem": LATENT_STEM, "expand": INNER, "out": TO_PIXEL}
#: Largest factor of the filter's results, in units of 2^-MODULATION_BITS: its products stay below 2^24.
FILTER_SCALE_MAX = 1023
FILTER_LAYERS = {"filter_up": FILTER_UP, "filter_down": FILTER_DOWN}
HEAD_LAYERS = {"stem": COMPANDED_STEM, "hidden": UP, "out": TO_LOGIT}
BLOCK_LAYERS = {"spatial": SPATIAL, "up": UP, "down": DOWN}
