"""Compare on-disk token stores by random window reads, on one core with a warm page cache.

A 1-D array of Zipf-distributed uint16 tokens is written to each store; then batches of random
windows (16 x 257 and 32 x 1025 tokens, at multiples of width - 1) are read through one open
handle, the first batch checked. The stores take turns, round after round; the tables have medians.
The memmap rows read the very files that TensorStore wrote: with only the `bytes` codec, a chunk
file (or the leading part of a shard file) is the raw little-endian tokens in order.

Run: python tests/bench/store.py [--tokens 67108864] [--seconds 1.0]
"""

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before any thread pool starts

import numpy as np  # noqa: E402
import tensorstore as ts  # noqa: E402
from array_record.python import array_record_module as array_record  # noqa: E402

Read = Callable[[np.ndarray], np.ndarray]  # window ids [B] -> tokens [B, width]
Open = Callable[[Path, int], Read]
Stores = dict[str, tuple[Path, Open]]

CHUNK, INNER = 16 << 20, 4096  # tokens per file, and per inner chunk of a shard
ROUNDS = 5
BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
ZSTD = {"name": "zstd", "configuration": {"level": 3}}
LAYOUTS = {"chunks": [], "shards": [BYTES], "zstd shards": [BYTES, ZSTD]}  # codecs of inner chunks


def write_zarr(path: Path, tokens: np.ndarray, inner: list[dict]) -> None:
    shard = {"chunk_shape": [INNER], "codecs": inner, "index_codecs": [BYTES]}
    codec = {"name": "sharding_indexed", "configuration": shard} if inner else BYTES
    grid = {"name": "regular", "configuration": {"chunk_shape": [CHUNK]}}
    metadata = {"shape": tokens.shape, "data_type": "uint16", "chunk_grid": grid, "codecs": [codec]}
    spec = {"driver": "zarr3", "kvstore": f"file://{path}/", "store_data_equal_to_fill_value": True}
    ts.open(spec | {"metadata": metadata}, create=True).result().write(tokens).result()


def open_zarr(path: Path, width: int, cache: int = 0) -> Read:
    context = {"cache_pool": {"total_bytes_limit": cache}}
    context |= {name: {"limit": 1} for name in ("data_copy_concurrency", "file_io_concurrency")}
    spec = {"driver": "zarr3", "kvstore": f"file://{path}/", "context": context}
    recheck = {"recheck_cached_data": "open", "recheck_cached_metadata": "open"}
    store = ts.open(spec | recheck, read=True).result()

    def window(start: int) -> ts.TensorStore:
        return store[start : start + width].translate_to[0]

    return lambda ids: ts.stack([window(i * (width - 1)) for i in ids]).read().result()


def open_memmap(path: Path, width: int) -> Read:
    files = sorted((path / "c").iterdir(), key=lambda file: int(file.name))
    chunks = [np.memmap(file, "<u2", "r")[:CHUNK] for file in files]

    def window(start: int) -> np.ndarray:  # it may run on into the next file
        chunk, offset = divmod(start, CHUNK)
        part = chunks[chunk][offset : offset + width]
        return part if len(part) == width else np.r_[part, chunks[chunk + 1][: width - len(part)]]

    return lambda ids: np.stack([window(i) for i in (ids * (width - 1)).tolist()])


def write_records(path: Path, tokens: np.ndarray, width: int, codec: str) -> None:
    writer = array_record.ArrayRecordWriter(str(path), f"group_size:1,{codec}")
    for start in range(0, len(tokens) - width + 1, width - 1):
        writer.write(tokens[start : start + width].tobytes())
    writer.close()


def open_records(path: Path, width: int) -> Read:
    options = "readahead_buffer_size:0,max_parallelism:0"
    reader = array_record.ArrayRecordReader(str(path), options)
    return lambda ids: np.stack([np.frombuffer(r, "<u2") for r in reader.read(ids.tolist())])


def measure(stores: Stores, tokens: np.ndarray, batch: int, width: int, seconds: float) -> None:
    count = (len(tokens) - 1) // (width - 1)
    rates, opens = defaultdict(list), defaultdict(list)
    for name, (path, open_) in list(stores.items()) * ROUNDS:
        start = time.perf_counter()
        read = open_(path, width)
        opens[name].append(time.perf_counter() - start)
        rng, done = np.random.default_rng(len(rates[name])), 0
        ids = rng.integers(0, count, batch)
        np.testing.assert_array_equal(read(ids), tokens[ids[:, None] * (width - 1) + range(width)])
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds / ROUNDS or not done:
            done += len(read(rng.integers(0, count, batch)))
        rates[name].append(done / elapsed)
        del read  # frees its cache outside the next timing
    print(f"\n| {batch} x {width} tokens | windows/s | MB on disk | open, ms |\n|---|--:|--:|--:|")
    for name, (path, _) in stores.items():
        rate, opened = np.median(rates[name]), 1e3 * np.median(opens[name])
        size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
        print(f"| {name} | {rate:,.0f} | {size / 1e6:.1f} | {opened:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=64 << 20)
    parser.add_argument("--seconds", type=float, default=1.0, help="per store and window size")
    args = parser.parse_args()
    tokens = (np.random.default_rng(0).zipf(1.1, args.tokens) % 4096).astype("<u2")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        stores: Stores = {}
        for name, inner in LAYOUTS.items():
            write_zarr(path := root / name, tokens, inner)
            if "zstd" not in name:
                stores[f"memmap of zarr3 {name}"] = path, open_memmap
            stores[f"zarr3 {name}"] = path, open_zarr
            stores[f"zarr3 {name}, 256 MiB cache"] = path, partial(open_zarr, cache=256 << 20)
        for batch, width in ((16, 257), (32, 1025)):
            for codec in ("uncompressed", "zstd:3"):
                write_records(path := root / f"{codec}-{width}", tokens, width, codec)
                stores[f"ArrayRecord, {codec}"] = path, open_records
            measure(stores, tokens, batch, width, args.seconds)


if __name__ == "__main__":
    main()
