"""Samples of image files come in as they are in the file, whatever a library shows of them, or are refused."""

import contextlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deepsic_codec.errors import SourceError, UnsupportedArray
from deepsic_codec.io.images import open_image
from tests.common import check_rejects, photograph

pytest.importorskip("dask.array")
imagecodecs = pytest.importorskip("imagecodecs")
tifffile = pytest.importorskip("tifffile")
rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

GREY, RGB = (24, 37), (24, 37, 3)
GEOTIFF = {"driver": "GTiff", "height": 24, "width": 37, "count": 1}
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def depth(bits, shape=GREY, seed=0):
    """Samples that use all of a number of bits."""
    values = np.random.default_rng(seed).integers(0, 1 << bits, shape)
    values.flat[:2] = 0, (1 << bits) - 1
    return values.astype("u1" if bits <= 8 else "u2")


def png_part(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values, bits, color, *parts):
    """The bytes of a PNG file of any kind."""
    height, width = values.shape[:2]
    rows = values.reshape(height, -1)
    if bits == 16:
        packed = rows.astype(">u2").tobytes()
        packed = [packed[i * len(packed) // height : (i + 1) * len(packed) // height] for i in range(height)]
    else:
        digits = np.unpackbits(rows.astype("u1")[..., None], axis=-1)[..., 8 - bits :].reshape(height, -1)
        packed = [row.tobytes() for row in np.packbits(digits, axis=1)]
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in packed))
    return SIGNATURE + png_part(b"IHDR", header) + b"".join(parts) + png_part(b"IDAT", data) + png_part(b"IEND", b"")


def pnm(kind, values, top):
    height, width = values.shape[:2]
    head = b"%s # a comment\n%d %d\n" % (kind, width, height) + (b"" if kind in (b"P1", b"P4") else b"%d\n" % top)
    if kind in (b"P1", b"P2", b"P3"):
        return head + " ".join(map(str, values.ravel().tolist())).encode()
    if kind == b"P4":
        return head + np.packbits(values, axis=1).tobytes()
    return head + values.astype(">u2" if top > 255 else "u1").tobytes()


GAMMA = png_part(b"gAMA", struct.pack(">I", 20000))
PALETTE = np.random.default_rng(1).integers(0, 256, (16, 3)).astype("u1")

# Name: bytes and samples of the file.
FILES = {
    **{f"grey {bits}.png": (png(depth(bits), bits, 0), depth(bits)) for bits in (1, 2, 4, 8, 16)},
    **{f"gamma {bits}.png": (png(depth(bits), bits, 0, GAMMA), depth(bits)) for bits in (1, 2, 4, 8, 16)},
    **{f"rgb {bits}.png": (png(depth(bits, RGB), bits, 2, GAMMA), depth(bits, RGB)) for bits in (8, 16)},
    **{
        f"palette {bits}.png": (png(depth(bits), bits, 3, png_part(b"PLTE", colors)), depth(bits))
        for bits, colors in {bits: PALETTE[: 1 << bits].tobytes() for bits in (1, 2, 4)}.items()
    },
    **{f"P{kind} {top}.pgm": (pnm(b"P%d" % kind, v, top), v) for kind in (2, 5) for top, v in {
        3: depth(2), 100: depth(6), 255: depth(8), 1023: depth(10), 4095: depth(12), 65535: depth(16)}.items()},
    **{f"P{kind} {top}.ppm": (pnm(b"P%d" % kind, v, top), v) for kind in (3, 6) for top, v in {
        31: depth(5, RGB), 255: depth(8, RGB), 16383: depth(14, RGB), 65535: depth(16, RGB)}.items()},
    "P1.pgm": (pnm(b"P1", depth(1), 1), depth(1)),
    "P4.ppm": (pnm(b"P4", depth(1), 1), depth(1)),
    **{f"grey {bits}.jp2": (imagecodecs.jpeg2k_encode(depth(bits), level=0, reversible=True, bitspersample=bits,
       codecformat="jp2"), depth(bits)) for bits in (8, 9, 10, 11, 12, 13, 14, 15, 16)},
    **{f"rgb {bits}.jp2": (imagecodecs.jpeg2k_encode(depth(bits, RGB), level=0, reversible=True, bitspersample=bits,
       codecformat="jp2"), depth(bits, RGB)) for bits in (8, 12, 16)},
    **{f"grey {bits}.jxl": (imagecodecs.jpegxl_encode(depth(bits), lossless=True, bitspersample=bits), depth(bits))
       for bits in (8, 10, 12, 16)},
    "rgb 16.jxl": (imagecodecs.jpegxl_encode(depth(16, RGB), lossless=True), depth(16, RGB)),
    **{f"rgb {bits}.avif": (imagecodecs.avif_encode(depth(bits, RGB), level=100, bitspersample=bits), depth(bits, RGB))
       for bits in (8, 10, 12)},
    "rgb.webp": (imagecodecs.webp_encode(depth(8, RGB), lossless=True), depth(8, RGB)),
}  # fmt: skip


def check_samples(path, values, **kwargs):
    """Shape, dtype and samples of a file, as a whole and in part. Returns the source."""
    source = open_image(path, **kwargs)
    assert source.values.dtype == values.dtype, source.values.dtype
    np.testing.assert_array_equal(source.values.compute(), values)
    np.testing.assert_array_equal(source.values[3:17, 5:30].compute(), values[3:17, 5:30])
    return source


@pytest.mark.parametrize("name", FILES)
def test_samples_are_those_of_the_file(tmp_path, name):
    data, values = FILES[name]
    (tmp_path / name).write_bytes(data)
    source = check_samples(tmp_path / name, values)
    assert source.lossless == (int(values.max()) < 16 or name.startswith("palette")), "an error changes what they mean"
    if name.startswith("palette"):
        assert source.attributes["color_table"] == PALETTE[: 1 << int(name[8])].tolist()


TIFFS = {  # options of tifffile.imwrite, samples
    **{f"{bits} bits": ({"bitspersample": bits, "photometric": "minisblack"}, depth(bits)) for bits in (2, 4)},
    **{f"{bits} bits": ({"bitspersample": bits, "photometric": "minisblack"}, depth(bits)) for bits in range(9, 16)},
    "1 bit": ({"photometric": "minisblack"}, depth(1) > 0),
    "white is 0": ({"photometric": "miniswhite"}, depth(8)),
    "white is 0, 16 bits": ({"photometric": "miniswhite", "compression": "zlib"}, depth(16)),
    "colour of 16 bits": ({"photometric": "rgb", "compression": "lzw", "predictor": True}, depth(16, RGB)),
    "ink": ({"photometric": "separated", "planarconfig": "contig"}, depth(8, (24, 37, 4))),
    "Lab": ({"photometric": "cielab"}, depth(8, RGB)),
    "a mosaic of colour filters": ({"photometric": "cfa"}, depth(14)),
    "signed": ({"photometric": "minisblack"}, depth(16).view("i2")),
    "signed, 8 bits": ({"photometric": "minisblack"}, depth(8).view("i1")),
    "floats": ({"photometric": "minisblack", "compression": "zlib"}, depth(12).astype("f4") / 7),
    "seven bands": ({"photometric": "minisblack", "planarconfig": "contig"}, depth(16, (24, 37, 7))),
}


@pytest.mark.parametrize("layout", [{}, {"tile": (16, 16)}, {"byteorder": ">"}, {"bigtiff": True}], ids=str)
@pytest.mark.parametrize("kind", TIFFS)
def test_samples_of_tiff_files(tmp_path, kind, layout):
    options, values = TIFFS[kind]
    if "bitspersample" in options and ("tile" in layout or "byteorder" in layout):
        pytest.skip("tifffile cannot write such files of packed bits")
    tifffile.imwrite(tmp_path / "a.tif", values, **options, **layout)
    expected = values.astype("u1") if values.dtype == bool else values
    source = check_samples(tmp_path / "a.tif", expected)
    name = {"white is 0": "MINISWHITE", "ink": "SEPARATED", "Lab": "CIELAB", "a mosaic of colour filters": "CFA"}
    assert source.attributes.get("photometric") == name.get(kind.partition(",")[0])
    assert source.lossless == (expected.dtype == "u1" and int(expected.max()) < 16)


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("order", ["BIG", "LITTLE"])
def test_packed_bits_in_either_byte_order(tmp_path, bits, order):
    options = {**GEOTIFF, "dtype": "uint16", "nbits": bits, "ENDIANNESS": order, "tiled": True}
    with rasterio.open(tmp_path / "a.tif", "w", **options, blockxsize=16, blockysize=16) as file:
        file.write(depth(bits), 1)
    check_samples(tmp_path / "a.tif", depth(bits))


@pytest.mark.parametrize("kind", ["white is 0", "ink", "Lab", "12 bits", "1 bit", "colour of 16 bits"])
def test_a_georeference_changes_no_samples(tmp_path, kind):
    """Another library reads files with one."""
    options, values = TIFFS[kind]
    tag = (42113, "s", 0, "7", True)  # GDAL_NODATA
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=[tag], **options)
    source = check_samples(tmp_path / "a.tif", values.astype("u1") if values.dtype == bool else values)
    assert source.attributes["nodata"] == 7
    assert source.attributes.get("photometric") == {
        "white is 0": "MINISWHITE",
        "ink": "SEPARATED",
        "Lab": "CIELAB",
    }.get(kind)


@pytest.mark.parametrize("planar", [True, False])
@pytest.mark.parametrize("is_georeferenced", [True, False])
def test_jpeg_in_tiff_is_rgb(tmp_path, planar, is_georeferenced):
    values = photograph(*RGB)
    tags = [(42113, "s", 0, "7", True)] if is_georeferenced else []
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", compression="jpeg", extratags=tags)
    source = open_image(tmp_path / "a.tif")
    assert "photometric" not in source.attributes
    assert np.abs(source.values.compute().astype(int) - values).mean() < 12


def test_other_ycbcr_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", photograph(*RGB), photometric="ycbcr")
    check_rejects(UnsupportedArray, "YCbCr|convert", open_image, tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["tif", "png", "bmp", "gif"])
def test_palettes_are_numbers_with_a_table_of_colours(tmp_path, suffix):
    """No number becomes another one, and no class becomes a colour."""
    values = depth(4)
    image = Image.fromarray(values, "P")
    image.putpalette(PALETTE.tobytes())
    image.save(tmp_path / f"a.{suffix}")
    source = open_image(tmp_path / f"a.{suffix}")
    colors = np.array(source.attributes["color_table"])[source.values.compute()]
    np.testing.assert_array_equal(colors, PALETTE[values])
    assert source.lossless and source.axes == "yx"
    if suffix in ("tif", "png", "bmp"):
        np.testing.assert_array_equal(source.values, values)


def test_the_palette_of_a_geotiff(tmp_path):
    table = {number: (*color, 255) for number, color in enumerate(PALETTE.tolist())}
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", height=24, width=37, count=1, dtype="uint8", nodata=0
    ) as file:
        file.write(depth(4), 1)
        file.write_colormap(1, table)
    source = check_samples(tmp_path / "a.tif", depth(4))
    colors = [color[:3] for color in source.attributes["color_table"][:16]]
    assert source.lossless and colors == PALETTE.tolist()


def test_a_palette_keeps_its_transparency(tmp_path):
    parts = png_part(b"PLTE", PALETTE.tobytes()), png_part(b"tRNS", bytes([0, 7]))
    (tmp_path / "a.png").write_bytes(png(depth(4), 4, 3, *parts))
    source = check_samples(tmp_path / "a.png", depth(4))
    assert source.attributes["color_table"] == np.column_stack([PALETTE, [0, 7, *[255] * 14]]).tolist()


@pytest.mark.parametrize("kind", ["grey", "rgb", "progressive", "cmyk", "ycck", "12 bits"])
def test_jpeg(tmp_path, kind):
    values = photograph(32, 48, 4, seed=3)
    path = tmp_path / "a.jpg"
    if kind == "12 bits":
        path.write_bytes(imagecodecs.jpeg_encode(values[..., 0].astype("u2") * 16, bitspersample=12, level=98))
        source = open_image(path)
        assert source.values.dtype == np.uint16
        assert np.abs(source.values.compute().astype(int) - values[..., 0].astype(int) * 16).mean() < 40
        return
    image = {"grey": values[..., 0], "cmyk": values, "ycck": values}.get(kind, values[..., :3])
    if kind == "ycck":
        path.write_bytes(imagecodecs.jpeg_encode(255 - values, level=98, colorspace="CMYK", outcolorspace="YCCK"))
    else:
        Image.fromarray(image, "CMYK" if kind == "cmyk" else None).save(
            path, quality=98, progressive=kind == "progressive"
        )
    source = open_image(path)
    assert source.values.shape == image.shape and source.values.dtype == np.uint8
    if kind != "ycck":
        assert np.abs(source.values.compute().astype(int) - image).mean() < 8
    assert source.attributes.get("photometric") == ("SEPARATED" if image.shape[-1] == 4 else None)


def test_a_turned_photograph_says_so(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photograph(*RGB)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").attributes["orientation"] == 6
    tifffile.imwrite(tmp_path / "a.tif", photograph(*RGB), photometric="rgb", extratags=[(274, "H", 1, 3, True)])
    assert open_image(tmp_path / "a.tif").attributes["orientation"] == 3


def test_photographs_with_other_images(tmp_path):
    """A smaller one is a preview, one of equal size is content that is named."""
    photo, other = (Image.fromarray(photograph(40, 60, 3, seed=seed)) for seed in (1, 2))
    photo.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[photo.resize((30, 20))])
    assert open_image(tmp_path / "a.jpg").left_out == ()
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "c.jpg").write_bytes(
        whole[: whole.rindex(b"\xff\xd8\xff")]
    )  # as copied by a program without its preview
    expected = open_image(tmp_path / "a.jpg").values
    np.testing.assert_array_equal(open_image(tmp_path / "c.jpg").values, expected)
    photo.save(tmp_path / "b.jpg", "MPO", save_all=True, append_images=[other])
    (message,) = open_image(tmp_path / "b.jpg").left_out
    assert "image 2 of 2" in message


def test_images_beside_the_first_of_a_tiff_are_named(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(photograph(40, 60), photometric="minisblack")
        file.write(photograph(20, 30), photometric="minisblack", subfiletype=1)  # an overview
        file.write(photograph(25, 25, 3), photometric="rgb")
    source = check_samples(tmp_path / "a.tif", photograph(40, 60))
    (message,) = source.left_out
    assert "25 x 25 x 3" in message


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_suffix_says_nothing(tmp_path, name):
    """The content of a file decides how it is read."""
    for data in (FILES["grey 12.jp2"][0], FILES["P5 4095.pgm"][0]):
        (tmp_path / name).write_bytes(data)
        check_samples(tmp_path / name, depth(12))
    tifffile.imwrite(tmp_path / name, depth(12), bitspersample=12)
    check_samples(tmp_path / name, depth(12))


def test_images_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for name in ("grey 8.png", "rgb.webp", "rgb 8.avif"):
        (tmp_path / name).write_bytes(FILES[name][0])
        check_samples(tmp_path / name, FILES[name][1])
    assert Image.MAX_IMAGE_PIXELS == 10, "a setting of the process"


@given(st.binary(max_size=60), st.sampled_from([b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"]))
@settings(deadline=None, max_examples=60)
def test_damaged_pnm_files(tmp_path_factory, data, kind):
    path = tmp_path_factory.getbasetemp() / "damaged.pgm"
    path.write_bytes(kind + b" 3 2 9 " + data)
    with contextlib.suppress(SourceError):
        assert open_image(path).values.compute().dtype.kind == "u"
