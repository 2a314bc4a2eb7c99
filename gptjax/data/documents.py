"""The places in the text that documents of a store come from."""

from collections.abc import Callable, Collection

from gptjax.config import Config
from gptjax.data import provenance, sources
from gptjax.data.files import Counts
from gptjax.data.split import Split
from gptjax.errors import DataError


def check_text(cfg: Config) -> None:
    """Raises DataError where a local store was made of other text than is there now, in which its
    documents have other places."""
    if "://" not in cfg.data.store and (changes := provenance.changes(cfg)):
        more = f" and {len(changes) - 1} more changes" if len(changes) > 1 else ""
        raise DataError(
            f"{cfg.data.store}: its text is not what it was made of ({changes[0]}{more}), so the "
            "files of its documents cannot be named; leave --files away"
        )


def places_of(
    cfg: Config, numbers: Collection[int], tell: Callable[[int], None] = lambda read: None
) -> dict[int, str]:
    """The file and the place in it of training documents of a store, by their numbers.

    Reads the configured sources again, up to the last of these documents; `tell` is called with the
    characters read. Documents that are not found are left out. Raises DataError for sources that
    cannot be read.
    """
    held_out = sources.resolve(cfg.data.valid_sources, "data.valid_sources")
    found = sources.without(sources.resolve(cfg.data.sources), held_out)
    places: dict[int, str] = {}
    counts, number, read, last = Counts(), 0, 0, max(numbers, default=-1)
    documents = (d for source in found for d in source.documents(cfg.data, counts))
    for side, document in Split.of(cfg, found, held_out).apply(documents, counts):
        if number > last:
            break
        read += len(document.text)
        tell(read)
        if side == "train":
            if number in numbers:
                places.setdefault(number, document.key)
            number += document.ends
    return places
