"""Put an archive on S3 and query its labels without fetching pixels.

    python examples/s3_query.py s3-out                      # against a server that this script starts (moto)
    python examples/s3_query.py s3-out --url s3://my-bucket/land.zarr

Credentials and endpoint come from the environment, as for any program that uses S3 (AWS_ACCESS_KEY_ID, ...).
"""

import argparse
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from deepsic_codec import DeepSIC, consolidate_labels, create_array, open_labels
from deepsic_codec.io.preview import preview
from deepsic_codec.samples import eurosat_mosaic


@contextmanager
def local_server() -> Iterator[str]:
    """Start an S3 server on this machine, with an empty bucket, and point this process to it."""
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # otherwise it logs every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    s3fs.S3FileSystem().mkdir("my-bucket")
    try:
        yield "s3://my-bucket/land.zarr"
    finally:
        server.stop()


def run(url: str, out: Path, expression: str) -> None:
    """Write an archive, index it, query it, and fetch the matches."""
    array = create_array(
        url,
        name="land",
        data=eurosat_mosaic(),
        chunks=(256, 256, 3),
        codec=DeepSIC(quality=50, label_tile=64),
        overwrite=True,
    )
    consolidate_labels(url, "land")
    print(f"wrote {url}: {array.nchunks} chunks")

    # From here on, only the URL is needed.
    labels = open_labels(url, "land")
    found = labels.where(expression)
    read = labels.bytes_read + found.bytes_read
    total = int(labels.index.group["nbytes"][...].sum())
    print(f"{expression}: {found.count} of {found.mask.size} chunks, by reading {read:,} bytes of {total:,}")
    for match in found.iter_arrays():  # only these chunks are fetched and decoded
        path = out / f"match-{'-'.join(map(str, match.chunk))}.png"
        Image.fromarray(match.array).save(path)
        print(f"wrote {path}")
    preview(url, "land", where=expression).image.save(out / "where.png")
    preview(url, "land").image.save(out / "labels.png")
    print(f"wrote {out / 'where.png'} and {out / 'labels.png'}")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for pictures")
    parser.add_argument("--url", help="where the archive goes (default: a server on this machine)")
    parser.add_argument("--where", default="River > 0.5", help="query expression (default: River > 0.5)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.url:
        run(args.url, args.out, args.where)
        return
    with local_server() as url:
        run(url, args.out, args.where)


if __name__ == "__main__":
    main()
