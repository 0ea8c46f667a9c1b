"""What the site's pages take from the code when they are built: the help of every command."""

import os
import re


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace `<!-- help -->` by what `deepsic COMMAND --help` prints, and links to the README by ones to the start."""
    return re.sub(r"<!-- help -->", lambda _: commands(), markdown).replace("](../README.md", "](index.md")


def commands() -> str:
    """Return a section for each command."""
    from deepsic_codec.cli.main import _parser

    os.environ["COLUMNS"] = "100"  # what argparse breaks lines at
    (subparsers,) = [action for action in _parser()._actions if action.dest == "command"]
    parts = []
    for name, parser in subparsers.choices.items():
        parts.append(f"## deepsic {name}\n\n```text\n{parser.format_help().strip()}\n```\n")
    return "\n".join(parts)
