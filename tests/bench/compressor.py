"""Bits per byte of `xz -9e` on a configuration's validation text, to set beside a model's.

    python tests/bench/compressor.py configs/quickstart.py

The text is that of the store's validation split, decoded, one document after the other.
"""

import lzma
import sys
from pathlib import Path

import numpy as np

from gptjax import config
from gptjax import tokenizer as tokenizers
from gptjax.data import store


def main() -> None:
    cfg = config.load(sys.argv[1])
    manifest = store.read_manifest(cfg.data.store)
    tokenizer = tokenizers.load(Path(cfg.data.store))
    reader = store.Reader(cfg.data.store, "valid", manifest)
    ids = reader.windows(np.array([0]), len(reader))[0]
    text = tokenizer.decode(ids[ids != manifest.tokenizer["eos_id"]].tolist()).encode()
    expected = manifest.splits["valid"].bytes
    assert len(text) == expected, f"{len(text)} bytes decoded, {expected} in the manifest"
    packed = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    print(f"{len(text):,} bytes, xz -9e {packed:,}: {8 * packed / len(text):.3f} bits per byte")


if __name__ == "__main__":
    main()
