"""Training data: sources, skipped and refused images, crops, mosaics."""

import io
import zipfile

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deepsic_codec.errors import ConfigurationError
from deepsic_codec.training.data import LabelledTiles, Photographs, Pool, _mirrored, jittered, read_images
from tests.common import check_rejects, photograph


def write(path, *shape, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photograph(*shape, 3, seed=seed)).save(path)
    return path


def png(*shape):
    out = io.BytesIO()
    Image.fromarray(photograph(*shape, 3)).save(out, "PNG")
    return out.getvalue()


def test_folder_zip_and_zarr_give_the_same_pixels(tmp_path):
    image = photograph(70, 80, 3)
    write(tmp_path / "folder" / "a.png", 70, 80)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/a.png", png(70, 80))
        archive.writestr("readme.txt", "no image")
    for i, (shape, value) in enumerate([((70, 80, 3), image), ((2, 70, 80, 3), np.stack([image] * 2))]):
        zarr.create_array(str(tmp_path / f"{i}.zarr"), shape=shape, chunks=shape, dtype="u1")[...] = value
    for source in ("folder", "folder/a.png", "a.zip", "0.zarr", "1.zarr"):
        images = [pixels for _, pixels in read_images(tmp_path / source)]
        assert len(images) == (2 if source == "1.zarr" else 1)
        for pixels in images:
            np.testing.assert_array_equal(pixels, image)


def test_large_and_grey_zarr_arrays_become_blocks(tmp_path):
    grey = photograph(1100, 70)
    array = zarr.create_array(str(tmp_path / "g.zarr"), shape=grey.shape, chunks=(64, 64), dtype="u1")
    array[...] = grey
    first, second = [pixels for _, pixels in read_images(tmp_path / "g.zarr")]
    np.testing.assert_array_equal(first[..., 1], grey[:1024])
    np.testing.assert_array_equal(second[..., 1], grey[-1024:])  # overlaps, so that it is large enough for crops


def test_crops_are_parts_of_the_images_in_all_eight_orientations():
    image = photograph(9, 11, 3)
    pool = Pool([photograph(20, 5, 3, seed=5), image], "cpu")
    crops = pool.crops(np.ones(300, int), 9, np.random.default_rng(0)).numpy()
    expected = [np.rot90(image[:, x : x + 9], k)[:, ::d] for x in range(3) for k in range(4) for d in (1, -1)]
    numbers = {next(i for i, part in enumerate(expected) if np.array_equal(part, crop)) for crop in crops}
    assert len(numbers) == 24


def test_photographs_are_held_out_and_crops_reduced(tmp_path):
    for i in range(20):
        write(tmp_path / f"{i:02d}.png", 64 + 8 * i, 130, seed=i)
    photos = Photographs([tmp_path], crop=64)
    assert len(photos.held_out) == 2 and len(photos.pool.shortest) == 18
    crops = photos.crops(16, 64, np.random.default_rng(1))
    assert crops.shape == (16, 3, 64, 64) and crops.min() >= 0 and crops.max() <= 255
    assert torch.equal(crops, crops.round()) and crops.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(crops, photos.crops(16, 64, np.random.default_rng(1)))


def test_unreadable_images_are_counted_and_named(tmp_path):
    for i in range(3):
        write(tmp_path / "p" / f"{i}.png", 64, 64)
    (tmp_path / "p" / "broken.png").write_bytes(png(64, 64)[:200])
    (tmp_path / "p" / "text.jpg").write_text("not an image")
    photos = Photographs([tmp_path / "p"], crop=64)
    assert len(photos.skipped) == 2 and photos.skipped[0].startswith("broken.png (")
    assert len(photos.pool.shortest) + len(photos.held_out) == 3


def test_sources_that_cannot_be_trained_on(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    write(tmp_path / "one" / "a.png", 64, 64)
    write(tmp_path / "small" / "a.png", 64, 64)
    write(tmp_path / "small" / "b.png", 63, 90)
    for source, words in [
        ("empty", "no readable image"),
        ("missing", "does not exist"),
        ("notes.txt", "is no folder, zip file, image or Zarr array"),
        ("one", "only one image"),
        ("small", "1 of 2 images are smaller than 64x64|b.png (63x90)|--crop"),
    ]:
        check_rejects(ConfigurationError, words, Photographs, [tmp_path / source], crop=64)


@pytest.fixture
def classes(tmp_path):
    for name in ("Dune", "Lake"):
        for i in range(4):
            write(tmp_path / "t" / name / f"{i}.png", 70, 64 + i, seed=i)
    return tmp_path / "t"


def test_mosaics_have_the_labels_of_their_cells(tmp_path):
    for i, name in enumerate(("Dark", "Light")):
        for k in range(4):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (64, 64), (200 * i,) * 3).save(tmp_path / name / f"{k}.png")
    tiles = LabelledTiles([tmp_path])
    assert tiles.classes == ["Dark", "Light"] and len(tiles.labels) == 6 and len(tiles.test_labels) == 2
    pixels, labels = tiles.mosaics(3, 4, np.random.default_rng(0))
    assert pixels.shape == (3, 3, 256, 256) and labels.shape == (3, 4, 4)
    cells = pixels[:, 0].reshape(3, 4, 64, 4, 64).mean((2, 4))
    assert torch.equal(cells, labels.float() * 200)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 2.0))
def test_jitter_varies_cells_within_their_range(seed, strength):
    rng = np.random.default_rng(seed)
    cells = torch.from_numpy(rng.integers(0, 256, (5, 64, 64, 3))).float()
    before = cells.clone()
    result = jittered(cells, strength, np.random.default_rng(seed))
    assert torch.equal(cells, before), "the input stays unchanged"
    assert result.shape == cells.shape and result.dtype == cells.dtype
    assert float(result.min()) >= 0 and float(result.max()) <= 255 and torch.equal(result, result.round())
    assert all(not torch.equal(*pair) for pair in zip(result, cells, strict=True))
    assert torch.equal(result, jittered(cells, strength, np.random.default_rng(seed)))
    assert torch.equal(jittered(cells, 0.0, rng), cells), "no strength, no change"


def test_jitter_moves_a_cell_and_changes_its_light():
    """A dark square on grey becomes a darker square on another grey, at a position nearby."""
    cells = torch.full((200, 64, 64, 3), 120.0)
    cells[:, 24:40, 24:40] = 60
    result = jittered(cells, 1.0, np.random.default_rng(0))
    dark = result.mean(3) < result.mean((1, 2, 3))[:, None, None]
    rows = torch.stack([d.any(1).nonzero()[0, 0] for d in dark])
    assert {*rows.tolist()} == set(range(16, 33)), "moved by up to 8 pixels either way"
    ground = result[:, 0, 0]
    assert 5 < float(ground.std(0).mean()) < 15 and bool((ground != ground[:, :1]).any()), "light and colour differ"
    assert bool((result[:, 0, 0] > result.amin((1, 2))).all())


def test_a_cell_is_mirrored_at_its_first_and_last_pixel():
    assert np.array_equal(_mirrored(np.arange(-8, 72)), np.pad(np.arange(64), 8, mode="reflect"))


def test_mosaics_are_jittered_on_request(classes):
    tiles = LabelledTiles([classes])
    plain, repeated = (tiles.mosaics(2, 2, np.random.default_rng(3))[0] for _ in range(2))
    varied, labels = tiles.mosaics(2, 2, np.random.default_rng(3), 1.0)
    assert torch.equal(plain, repeated) and varied.shape == plain.shape and not torch.equal(varied, plain)
    assert torch.equal(labels, tiles.mosaics(2, 2, np.random.default_rng(3))[1])


def test_csv_of_labels(classes, tmp_path):
    rows = [f"{c}/{i}.png,{c.lower()}" for c in ("Dune", "Lake") for i in range(4)]
    (tmp_path / "t" / "a.csv").write_text("file,label\n" + "\n".join(rows))
    assert LabelledTiles([classes / "a.csv"]).classes == ["dune", "lake"]
    (tmp_path / "elsewhere.csv").write_text("\n".join(rows))
    assert len(LabelledTiles([tmp_path / "elsewhere.csv"], root=str(classes)).labels) == 6
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        for name in ("Dune/0.png", "Dune/1.png", "Lake/0.png", "Lake/1.png", "Lake/2.png"):
            archive.write(classes / name, name)
    (tmp_path / "z.csv").write_text("Dune/0.png,a\nDune/1.png,a\nLake/0.png,b\nLake/1.png,b\n")
    assert len(LabelledTiles([tmp_path / "z.csv"], root=str(tmp_path / "t.zip")).labels) == 2
    for text, words in [
        ("Dune/0.png,a\nDune/9.png,a\nx.png,a\n", "names 2 files that are not in|Dune/9.png, x.png|--label-root"),
        ("Dune/0.png\n", "expected file,label|row 1"),
        ("Dune/0.png,a\nDune/1.png,a\nLake/0.png,b\n", "only one image of class b"),
    ]:
        (tmp_path / "bad.csv").write_text(text)
        check_rejects(ConfigurationError, words, LabelledTiles, [tmp_path / "bad.csv"], root=str(classes))
    check_rejects(ConfigurationError, "cannot be read", LabelledTiles, [tmp_path / "no.csv"])


def test_labelled_sources_that_cannot_be_trained_on(classes, tmp_path):
    write(tmp_path / "flat" / "a.png", 64, 64)
    write(tmp_path / "u" / "unknown" / "a.png", 64, 64)
    write(tmp_path / "u" / "unknown" / "b.png", 64, 64)
    write(tmp_path / "s" / "Dune" / "a.png", 64, 40)
    (tmp_path / "none").mkdir()
    for source, words in [
        ("flat", "is in no folder of a class"),
        ("u", "every model has a class 'unknown'"),
        ("s", "smaller than 64x64"),
        ("none", "no readable image"),
    ]:
        check_rejects(ConfigurationError, words, LabelledTiles, [tmp_path / source])
    write(classes / "Cliff" / "a.png", 64, 64)
    check_rejects(ConfigurationError, "only one image of class Cliff", LabelledTiles, [classes])
