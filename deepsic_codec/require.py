"""Check for optional packages before work begins."""

from importlib.util import find_spec

from deepsic_codec.errors import MissingPackage


def require(extra: str, *packages: str, purpose: str = "") -> None:
    """Raise MissingPackage unless packages are installed; none of them is imported.

    Parameters
    ----------
    extra : str
        Extra of deepsic-codec that brings the packages.
    *packages : str
        Names under which they are imported.
    purpose : str
        What needs them, for the message.
    """
    missing = [name for name in packages if not _is_installed(name)]
    if missing:
        names = " and ".join("pillow" if name == "PIL" else name.replace(".", "-") for name in missing)
        subject = f"{purpose} needs the package {names}, which is missing" if purpose else f"missing package {names}"
        raise MissingPackage(f"{subject}; run pip install 'deepsic-codec[{extra}]'")


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package around a module is missing
        return False
