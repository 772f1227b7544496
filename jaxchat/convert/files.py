"""Files of PyTorch's, laid out first and then filled in stack by stack, so that memory never holds the model.

A place is (file, offset): where the bytes of a tensor go.
"""

import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from jaxchat.checkpoint import Found
from jaxchat.convert.weights import DTYPES, matrix_shape, named, read_stack, their_names, to_matrices

Place = tuple[Path, int]
Kinds = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and type of every tensor
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def kinds(found: Found, names: dict[str, str]) -> Kinds:
    """Of the tensors that a checkpoint becomes: float32, but where it was imported from a narrower type, that again."""
    narrow = found.meta.get("imported", {}).get("dtypes", {})
    return {
        theirs: (matrix_shape(name, weight), DTYPES[narrow.get(f"{name}.{i}", "float32")])
        for name, weight in named(found.config).items()
        for i, theirs in enumerate(their_names(name, names, found.config))
    }


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return int(np.prod(shape)) * dtype.itemsize


def lay_out_safetensors(folder: Path, tensors: Kinds, shard_size: str) -> dict[str, Place]:
    """model.safetensors, or several and an index of them where one would be larger than shard_size ("5GB").

    The format: 8 bytes of the header's length, the header in JSON, then the tensors' bytes one after the other.
    """
    split = huggingface_hub.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda kind: num_bytes(*kind),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    places = {}
    for filename, names in split.filename_to_tensors.items():
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            shape, dtype = tensors[name]
            start, end = end, end + num_bytes(shape, dtype)
            header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the tensors' bytes begin at a multiple of 8
        with (folder / filename).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        for name in names:
            places[name] = (folder / filename, 8 + len(text) + header[name]["data_offsets"][0])
    return places


def lay_out_pt(path: Path, tensors: Kinds) -> dict[str, Place]:
    """What torch.save would write, but without the tensors' bytes; `mend_checksums` must follow their filling in."""
    with FakeTensorMode():
        empty = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(empty, path)
        loaded = torch.load(path, weights_only=True)
    return {name: (path, tensor.untyped_storage()._checkpoint_offset) for name, tensor in loaded.items()}


def mend_checksums(path: Path):
    """Write the CRC-32 of what was filled in where a zip file has it: behind the bytes, and in the directory."""
    with zipfile.ZipFile(path) as archive:
        entries, directory = archive.infolist(), archive.start_dir
    with path.open("r+b") as file:
        for entry in entries:
            if not entry.flag_bits & 8:
                raise RuntimeError(f"{path}: torch no longer writes {entry.filename} with a data descriptor")
            file.seek(entry.header_offset + 26)
            end = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4))) + entry.file_size
            file.seek(end - entry.file_size)
            checksum, left = 0, entry.file_size
            while left:
                chunk = file.read(min(left, 1 << 24))
                checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
            file.seek(end + 4)  # past the data descriptor's signature
            file.write(struct.pack("<I", checksum))
            file.seek(directory + 16)
            file.write(struct.pack("<I", checksum))
            file.seek(directory + 28)
            directory += 46 + sum(struct.unpack("<HHH", file.read(6)))


def fill(places: dict[str, Place], found: Found, names: dict[str, str], progress: Callable[[str], None]):
    """Read the checkpoint's weights, one stack at a time, and write each matrix to its place."""
    tensors = kinds(found, names)
    for name, weight in named(found.config).items():
        stack = read_stack(found, name, weight)
        for theirs, matrix in zip(
            their_names(name, names, found.config), to_matrices(name, weight, stack), strict=True
        ):
            path, offset = places[theirs]
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(torch.from_numpy(matrix).to(tensors[theirs][1]).view(torch.uint8).numpy())
        del stack
        progress(name)
