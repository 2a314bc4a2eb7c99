"""Fetches the manual pages of a language as text files.

    python tests/reference/fetch_manpages.py PACKAGE FOLDER

Debian's packages manpages (English), manpages-de (German) and others; of each page the lines of
text, without requests to troff.
"""

import gzip
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def fetch(package: str, folder: Path) -> None:
    """Downloads a package; the folder then holds a text file for each page.

    Raises CalledProcessError or FileNotFoundError where apt-get cannot have it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        download = ["apt-get", "download", "-qq", package]
        subprocess.run(download, cwd=scratch, check=True, capture_output=True)
        (archive,) = Path(scratch).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, scratch], check=True)
        for page in sorted(Path(scratch).rglob("man*/*.gz")):
            if page.is_symlink():
                continue
            lines = gzip.decompress(page.read_bytes()).decode("utf-8", "replace").splitlines()
            text = [re.sub(r"\\f.|\\", "", line) for line in lines if line[:1] not in (".", "'")]
            (folder / f"{page.stem}.txt").write_text("\n".join(text))


if __name__ == "__main__":
    fetch(sys.argv[1], Path(sys.argv[2]))
