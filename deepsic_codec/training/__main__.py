"""``python -m deepsic_codec.training``: `deepsic train` where only torch, numba, safetensors and rich are installed."""

from __future__ import annotations

import argparse
import sys

from deepsic_codec.cli import train as cli
from deepsic_codec.errors import DeepSICError


def main() -> int:
    """Train; 0 for success, 1 for an error, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m deepsic_codec.training")
    cli.add_train(parser)
    try:
        cli.run_train(parser.parse_args())
    except KeyboardInterrupt:
        return 130
    except DeepSICError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
