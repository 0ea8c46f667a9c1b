"""Store an image in both Zarr formats, read part of it back, and print its size and labels.

python examples/quickstart.py quickstart-out
"""

import argparse
from pathlib import Path

import numpy as np
import zarr

from deepsic_codec import DeepSIC, chunk_attrs, create_array
from deepsic_codec.io import compare
from deepsic_codec.io.info import describe
from deepsic_codec.io.preview import preview
from deepsic_codec.samples import drone_frame, eurosat_mosaic


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for archives and pictures")
    parser.add_argument("--quality", type=float, default=50, help="1 (smallest) to 100 (best)")
    parser.add_argument("--size", type=int, default=1024, help="edge of the part of the image that is stored")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    image = drone_frame()[: args.size, : args.size]
    codec = DeepSIC(quality=args.quality)

    # Format 2: the codec is the compressor.
    old = zarr.open(
        args.out / "format2.zarr",
        mode="w",
        zarr_format=2,
        compressor=codec,
        shape=image.shape,
        chunks=(256, 256, 3),
        dtype="u1",
        fill_value=None,
    )
    old[:] = image

    # Format 3: create_array takes the arguments of zarr.create_array, and the same codec.
    new = create_array(args.out / "format3.zarr", data=image, chunks=(256, 256, 3), codec=codec, overwrite=True)

    # Readers need not import this package, only install it: zarr finds the codec by its name.
    corner = zarr.open(args.out / "format2.zarr", mode="r")[:100, :200]
    print(f"read {corner.shape} of {old.shape}; formats agree: {np.array_equal(old[:], new[:])}")

    size = describe(new)["size"]
    print(f"{size['array_bytes']:,} bytes became {size['bytes']:,}: {size['bpp']:.2f} bits per pixel")

    # The labels of a chunk are in front of its features, in the first 256 bytes.
    attrs = chunk_attrs(new, (0, 0, 0))
    print(f"chunk (0, 0, 0): {attrs['nbytes']:,} bytes, {attrs['labels'][0]}")

    # Original and decoded image, with an enlarged part.
    decoded = new[:]
    outcome = compare.Outcome.measure(compare.OURS, "drone frame", args.quality, image, decoded, size["bytes"])
    print(f"PSNR {outcome.psnr:.2f} dB, MS-SSIM {outcome.ms_ssim:.4f}")
    compare.picture("drone frame", image, [(outcome, decoded)]).save(args.out / "before-after.png")

    # A picture of an archive with a map of its labels, here land use.
    land = create_array(
        args.out / "land.zarr",
        data=eurosat_mosaic()[: args.size, : args.size],
        chunks=(256, 256, 3),
        codec=DeepSIC(quality=args.quality, label_tile=64),
        overwrite=True,
    )
    preview(land).image.save(args.out / "labels.png")
    print(f"wrote {args.out / 'before-after.png'} and {args.out / 'labels.png'}")


if __name__ == "__main__":
    main()
