"""Files that go with a Hugging Face folder's weights, copied as they are: tokenizer, generation."""

import shutil
from pathlib import Path

from gptjax.errors import DataError

_BESIDE = (
    *("tokenizer*.json", "tokenizer.model", "vocab.*", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template*", "generation_config.json"),
)


def carry(source: Path, target: Path) -> None:
    """Copies tokenizer and generation files into a folder. Raises DataError as `check_links`."""
    check_links(source)
    target.mkdir(exist_ok=True)
    for pattern in _BESIDE:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


def check_links(folder: Path) -> None:
    """Raises DataError for a link that leaves the folder: it would carry what it points to along.

    Links of the Hugging Face hub's cache, snapshots/REVISION/FILE -> blobs/HASH, stay in the cache;
    safetensors files may lie anywhere, because nothing else is read as one.
    """
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parents[1] / "blobs")
    for file in folder.glob("*"):
        if file.is_symlink() and file.suffix != ".safetensors":
            target = file.resolve()
            if not any(target.is_relative_to(place) for place in allowed):
                raise DataError(
                    f"{file}: is a link to {target}, outside of its folder; put the file itself "
                    "there, or remove the link"
                )
