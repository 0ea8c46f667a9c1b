"""Where models are: the packaged ones, folders that the user names, and models that archives contained."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from deepsic_codec import config
from deepsic_codec.errors import ModelMismatch, ModelNotFound
from deepsic_codec.model.file import HeadInfo, ModelInfo, read_file

#: Hexadecimal digits of a whole identity.
DIGITS = 64
#: Folder of the packaged models.
PACKAGED = Path(__file__).resolve().parent.parent / "models"


@dataclass(frozen=True)
class Alias:
    """The model behind a short name: its name, `<alias>-<first 8 digits of the decoder>`, and its two identities.

    Its file is `<name>.safetensors` in `PACKAGED`.
    """

    name: str
    decoder: str
    head: str


#: Names that stand for one packaged model each, whatever files there are.
ALIASES: dict[str, Alias] = {
    "base": Alias(
        "base-407b2baf",
        "407b2bafba2782513697d52174b6e6d09c8debc301ee57806b02cf789f2d80e4",
        "5f8b532a509bd22a604ac80e7d77336813c98ccc51c9cebe2550f19f9a045a30",
    ),
}


#: Names that stand for one packaged head each: those of its file.
HEAD_ALIASES = {"scenes": "scenes-407b2baf"}


def resolve(name: str, head: str | None = None) -> tuple[str, str]:
    """Identities of the decoder and the head of a model; reads no file if the name is an alias, and there is no `head`.

    Raises
    ------
    ModelNotFound, ModelMismatch
        If there is no such model, or no such head for it: see `find_head`.
    """
    alias = ALIASES.get(name) or find_model(name)
    return alias.decoder, alias.head if head is None else find_head(head, alias.decoder)


def find_head(name: str, decoder: str) -> str:
    """Return the identity of a head for a decoder: of a head file, or of a model that has one.

    Heads are looked for where models are, in the same order; those from archives by their identity only.

    Parameters
    ----------
    name : str
        Alias or name of a head or a model, or at least 8 digits of the head's identity.
    decoder : str
        Identity of the decoder.

    Raises
    ------
    ModelNotFound
        If there is no such head.
    ModelMismatch
        If those of this name are for other decoders.
    """
    alias = ALIASES.get(name)
    known = HEAD_ALIASES.get(name) or (alias.name if alias else name)
    by_hash = _is_hash(name)
    others = []
    for info, from_archive in _infos():
        if (info.name == known and not from_archive) or (by_hash and info.head.startswith(name)):
            if info.decoder == decoder:
                return info.head
            others.append(info)
    if others:
        raise ModelMismatch(
            f"head {name!r} is for decoder {others[0].decoder[:16]} ({others[0].path}), but the model has decoder "
            f"{decoder[:16]}; use a head for this decoder"
        )
    raise ModelNotFound(f"no head {name!r}; searched {_places()}. {_advice(name)}")


def _advice(name: str) -> str:
    text = "Set DEEPSIC_MODEL_PATH to the folder of its file"
    return text + (", and name it without .safetensors" if name.endswith(".safetensors") else "")


def _is_hash(name: str) -> bool:
    return len(name) >= 8 and set(name) <= set("0123456789abcdef")


def _places() -> str:
    return ", ".join(str(place) for place in [*_user_places(), *_archive_folders()])


def find_model(name: str = "base", *, head: str | None = None, preferred: str | None = None) -> ModelInfo:
    """Find a model along the setting `model_path`, in the package, and among models from archives, in this order.

    The first file that fits is returned; files of a folder are tried in the order of their names. Several files may
    have one decoder, and any of them decodes the payloads of another one. `head` and `preferred` choose between them
    for labels and for encoding.

    Payloads have only the first digits of the two identities. Where models of different identities share them, the
    packaged one is meant; among others there is no telling.

    Parameters
    ----------
    name : str
        Alias or name of a model, or at least 8 hexadecimal digits of its decoder's identity.
    head : str, optional
        Leading digits of the identity of its head; by default that of the alias, otherwise any. All zeros mean any.
    preferred : str, optional
        Name or alias of the model to choose where several fit: models with one decoder and head may still encode
        differently.

    Raises
    ------
    ModelNotFound
        If there is none; the message has the identity and every place that was searched.
    ModelMismatch
        If models of different identities fit the first digits, and none of them is packaged.
    """
    if (alias := ALIASES.get(name)) is not None:
        name, head, preferred = alias.decoder, head or alias.head, preferred or alias.name
    if preferred in ALIASES:
        preferred = ALIASES[preferred].name
    head = head if head and set(head) != {"0"} else ""
    by_hash = _is_hash(name)
    short = (by_hash and len(name) < DIGITS) or 0 < len(head) < DIGITS
    fitting: list[tuple[bool, ModelInfo]] = []  # and whether it is preferred
    for info, from_archive in _models():
        if not info.head.startswith(head):
            continue
        # embedded models are found by hash only, never by name
        if (info.name == name and not from_archive) or (by_hash and info.decoder.startswith(name)):
            is_preferred = preferred is None or (info.name == preferred and not from_archive)
            if is_preferred and not short:
                return info
            fitting.append((is_preferred, info))
    if fitting:
        if short:
            fitting = _of_one_identity(fitting, with_head=bool(head))
        return next((info for is_preferred, info in fitting if is_preferred), fitting[0][1])
    subject = f"with decoder {name}" if by_hash else f"named {name!r}"
    subject += f" and head {head}" if head else ""
    raise ModelNotFound(
        f"no model {subject}; searched {_places()}. {_advice(name)}. If "
        "the model is embedded in the archive, call deepsic_codec.open_archive(URL) once; from then "
        "on, zarr.open and xarray.open_zarr find it too"
    )


def _of_one_identity(fitting: list[tuple[bool, ModelInfo]], with_head: bool) -> list[tuple[bool, ModelInfo]]:
    """Return those of the packaged identity, or all if they have one identity; raise ModelMismatch for several."""

    def identity(info: ModelInfo) -> tuple[str, str]:
        return info.decoder, info.head if with_head else ""

    identities = {identity(info): info for _, info in reversed(fitting)}
    if len(identities) > 1:
        packaged = [identity(info) for _, info in fitting if Path(info.path).parent == PACKAGED]
        if not packaged:
            one, other, *_ = identities.values()
            raise ModelMismatch(
                f"two models fit the first digits that a payload has of its model: decoder {one.decoder} and head "
                f"{one.head} ({one.path}), decoder {other.decoder} and head {other.head} ({other.path}); read the "
                "payload through its array, whose metadata has the whole hashes, or remove one of the files"
            )
        return [one for one in fitting if identity(one[1]) == packaged[0]]
    return fitting


def cache_folder() -> Path | None:
    """Folder for models that archives contained, None if it is in the home of a user who has none."""
    return _expanded(config.get().cache)


def _expanded(place: str) -> Path | None:
    try:
        return Path(place).expanduser()
    except RuntimeError:  # neither HOME nor an entry for the user
        return None


def add_folder(folder: Path) -> None:
    """Also search a folder for models by their identity, for the rest of the process."""
    if folder not in _added:
        _added.append(folder)


_added: list[Path] = []


@lru_cache(maxsize=256)
def _cached_info(path: str, modified: int) -> ModelInfo | HeadInfo | None:
    try:
        return read_file(path)
    except (ModelMismatch, ModelNotFound):
        return None


def _infos() -> Iterator[tuple[ModelInfo | HeadInfo, bool]]:
    """Models and heads in the order in which they are looked for, and whether each comes from an archive."""
    for path, from_archive in _candidates():
        try:
            modified = path.stat().st_mtime_ns
        except OSError:  # a link that leads nowhere
            continue
        info = _cached_info(str(path), modified)
        if info is not None:
            yield info, from_archive


def _models() -> Iterator[tuple[ModelInfo, bool]]:
    """Models with the heads of their files, and then models with the heads of other files for their decoder."""
    infos = list(_infos())
    models = [(info, from_archive) for info, from_archive in infos if isinstance(info, ModelInfo)]
    yield from models
    for head, head_from_archive in infos:
        if isinstance(head, HeadInfo):
            for info, from_archive in models:
                if (info.decoder, info.architecture.get("family")) == (head.decoder, head.family):
                    yield info.with_head(head), from_archive and head_from_archive


def _user_places() -> Iterable[Path]:
    return [*filter(None, map(_expanded, config.get().model_path)), PACKAGED]


def _archive_folders() -> list[Path]:
    cache = cache_folder()
    return [*([cache] if cache else []), *(folder for folder in _added if folder != cache)]


def _candidates() -> Iterator[tuple[Path, bool]]:
    """Files to try, and whether each comes from an archive."""
    for places, from_archive in ((_user_places(), False), (_archive_folders(), True)):
        for place in places:
            if place.is_dir():
                yield from ((path, from_archive) for path in sorted(place.glob("*.safetensors")))
            elif place.is_file():
                yield place, from_archive
