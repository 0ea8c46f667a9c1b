"""Train your own labels and use them on an existing archive. No chunk is written again.

    python examples/own_labels.py labels-out                          # a minute, on bundled tiles
    python examples/own_labels.py labels-out --tiles MY_TILES --photos MY_PHOTOS --minutes 6

MY_TILES has a folder for each class, with images of at least 64 x 64 pixels. MY_PHOTOS has images that show none of the
classes, from which the model learns "unknown".
"""

import argparse
from pathlib import Path

from PIL import Image

from deepsic_codec import DeepSIC, create_array, open_labels
from deepsic_codec.io.preview import preview
from deepsic_codec.labels.relabel import relabel
from deepsic_codec.samples import TILE, eurosat_classes, eurosat_mosaic

# Four new classes, and the classes of the bundled tiles that belong to each.
CLASSES = {
    "Town": ("Residential", "Industrial", "Highway"),
    "Field": ("AnnualCrop", "PermanentCrop", "Pasture", "HerbaceousVegetation"),
    "Wood": ("Forest",),
    "Wet": ("River", "SeaLake"),
}
CLASS_OF = {name: new for new, names in CLASSES.items() for name in names}


def save_tiles(folder: Path) -> None:
    """Write every other tile of the bundled mosaic as <class>/<row>-<column>.png; the rest is for the test."""
    image, classes = eurosat_mosaic(), eurosat_classes()
    for row, names in enumerate(classes):
        for column, name in enumerate(names):
            if (row + column) % 2:
                continue
            class_folder = folder / CLASS_OF[name]
            class_folder.mkdir(parents=True, exist_ok=True)
            tile = image[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
            Image.fromarray(tile).save(class_folder / f"{row:02d}-{column:02d}.png")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for tiles, model, archive and picture")
    parser.add_argument("--tiles", type=Path, help="folder of your classes (default: tiles of the bundled mosaic)")
    parser.add_argument("--photos", type=Path, nargs="*", default=[], help="images of none of the classes")
    parser.add_argument("--minutes", type=float, default=1.0, help="at most (default: 1)")
    parser.add_argument("--steps", type=int, default=300, help="at most (default: 300)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tiles, model = args.tiles or args.out / "tiles", args.out / "own.safetensors"
    if not args.tiles:
        save_tiles(tiles)

    # An archive with the labels of the model that comes with the package.
    array = create_array(
        args.out / "archive.zarr",
        name="land",
        data=eurosat_mosaic(),
        chunks=(256, 256, 3),
        codec=DeepSIC(quality=60, label_tile=TILE),
        overwrite=True,
    )

    # Train the semantic head alone, on quantised features. The decoder and all archives stay unchanged.
    from deepsic_codec.training.settings import Settings
    from deepsic_codec.training.train import train

    train(
        Settings(
            base="base",
            labels=[str(tiles)],
            images=[str(path) for path in args.photos],
            out=str(model),
            run=str(args.out / "run"),
            head_minutes=args.minutes,
            head_steps=args.steps,
            head_batch=64,
            every=100,
        )
    )

    # Labels from stored features, into the index beside the array.
    relabel(args.out / "archive.zarr", str(model), "land")
    labels = open_labels(args.out / "archive.zarr", "land")
    print(f"new names: {', '.join(labels.vocabulary.names)}")
    for name in labels.vocabulary.classes:
        print(f"  {name}: {labels.where(f'{name} > 0.5').count} of {array.nchunks} chunks")

    if not args.tiles:
        scores = [labels.map(name) for name in labels.vocabulary.classes]
        right = total = 0
        for row, names in enumerate(eurosat_classes()):
            for column, name in enumerate(names):
                if (row + column) % 2:  # not trained on
                    best = max(range(len(scores)), key=lambda k: scores[k][row, column])
                    right += labels.vocabulary.classes[best] == CLASS_OF[name]
                    total += 1
        print(f"{right} of {total} test tiles have the right label")
    preview(args.out / "archive.zarr", "land").image.save(args.out / "labels.png")
    print(f"wrote {model} and {args.out / 'labels.png'}")


if __name__ == "__main__":
    main()
