"""Compare DeepSIC with JPEG, JPEG 2000, WebP, AVIF and JPEG XL on your images, at equal bytes.

    python examples/compare_codecs.py compare-out
    python examples/compare_codecs.py compare-out a.png b.tif --bpp 0.5

`deepsic compare` does the same from the command line.
"""

import argparse
from pathlib import Path

from deepsic_codec.io import compare
from deepsic_codec.io.images import read_rgb
from deepsic_codec.samples import drone_frame


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for pictures")
    parser.add_argument("images", type=Path, nargs="*", help="image files (default: a bundled one)")
    parser.add_argument("--quality", type=float, default=50, help="quality of DeepSIC, 1 to 100")
    parser.add_argument("--bpp", type=float, help="bits per pixel for all, instead of a quality")
    parser.add_argument("--codecs", nargs="*", default=list(compare.DEFAULT), help="codecs to compare with")
    parser.add_argument("--size", type=int, default=768, help="edge of the part of the bundled image")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    images = [(path.name, read_rgb(path)) for path in args.images]
    images = images or [("drone-frame", drone_frame()[-args.size :, -args.size :])]

    print(f"{'image':<16} {'codec':<16} {'bytes':>9} {'bpp':>6} {'PSNR':>6} {'MS-SSIM':>8} {'encode':>8} {'decode':>8}")
    for name, original, results in compare.at_equal_bytes(
        images, quality=args.quality, bpp=args.bpp, codecs=args.codecs
    ):
        for one, _ in results:
            print(
                f"{name[:16]:<16} {one.codec:<16} {one.nbytes:>9,} {one.bpp:>6.3f} {one.psnr:>6.2f} "
                f"{one.ms_ssim:>8.4f} {one.encode_seconds:>6.2f} s {one.decode_seconds:>6.2f} s"
            )
        compare.picture(name, original, results).save(args.out / f"{Path(name).stem}.png")
        print(f"wrote {args.out / f'{Path(name).stem}.png'}")

    curves = compare.curves(images, codecs=args.codecs)
    compare.plot(args.out / "curve.png", curves, ", ".join(name for name, _ in images))
    print(f"wrote {args.out / 'curve.png'}")


if __name__ == "__main__":
    main()
