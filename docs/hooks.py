"""Hook of MkDocs: put the help of every command into the page that asks for it."""

import os
import re


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace `<!-- help -->` by the help of all commands, and links to the README by links to the start page."""
    return re.sub(r"<!-- help -->", lambda _: commands(), markdown).replace("](../README.md", "](index.md")


def commands() -> str:
    """Return a section for each command."""
    from deepsic_codec.cli.main import build_parser

    os.environ["COLUMNS"] = "100"  # argparse breaks lines there
    (subparsers,) = [action for action in build_parser()._actions if action.dest == "command"]
    parts = []
    for name, parser in subparsers.choices.items():
        parts.append(f"## deepsic {name}\n\n```text\n{parser.format_help().strip()}\n```\n")
    return "\n".join(parts)
