import zipfile
from types import SimpleNamespace

import pytest
from PIL import Image

from deepsic_codec.samples import drone_frame, eurosat_classes, eurosat_mosaic

CLASSES = ("Forest", "Highway", "River")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of twelve photographs and a zip file of 24 labelled tiles of three classes, from the bundled images."""
    folder = tmp_path_factory.mktemp("images")
    photos = folder / "photos"
    photos.mkdir()
    frame = drone_frame()
    for i in range(12):
        Image.fromarray(frame[(i // 4) * 200 :, (i % 4) * 300 :][:160, : 160 + i]).save(photos / f"{i:02d}.png")
    mosaic, names = eurosat_mosaic(), eurosat_classes()
    tiles = folder / "tiles.zip"
    counts = dict.fromkeys(CLASSES, 0)
    with zipfile.ZipFile(tiles, "w") as archive:
        for r, row in enumerate(names):
            for c, name in enumerate(row):
                if counts.get(name, 8) < 8:
                    path = folder / "tile.png"
                    Image.fromarray(mosaic[64 * r : 64 * r + 64, 64 * c : 64 * c + 64]).save(path)
                    archive.write(path, f"train/{name}/{counts[name]}.png")
                    counts[name] += 1
    assert set(counts.values()) == {8}
    return SimpleNamespace(photos=str(photos), tiles=str(tiles), classes=CLASSES)
