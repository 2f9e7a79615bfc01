"""One tensor in one file: a header block, then the payload. No torch.

Layout (little endian)
    0   8   magic ``VBTIER\\r\\n`` (a text-mode copy breaks it)
    8   4   version
    12  4   bytes of the header block, a multiple of 4096, so that the payload is aligned for direct I/O
    16  4   bytes of the JSON text
    20  4   CRC-32 of the whole header block, this field read as zero: padding included, so no bit is unchecked
    24      JSON: store, key, generation, dtype, shape, codec, payload_bytes, payload_crc32; then zero padding
    header block   payload, to the end of the file

CRC-32 from the standard library: it finds every single flipped bit and every burst up to 32 bits. On one core it ran at
2.2 GB/s where blake2b ran at 1.0 (64 MiB, Python 3.11, x86-64), beside disks of 2.0 to 2.4 GB/s.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import asdict, dataclass

MAGIC = b"VBTIER\r\n"
VERSION = 1
BLOCK_BYTES = 4096
_FIXED = struct.Struct("<8sIIII")


class FormatError(Exception):
    """A header that cannot be trusted. The store turns it into CorruptTensorError, which names key and file."""

    def __init__(self, rule: str, expected: object, got: object) -> None:
        super().__init__(f"{rule}: expected {expected}, got {got}")
        self.rule = rule
        self.expected = expected
        self.got = got


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself.

    Args:
        store: id of the folder it was written for; a file carried over from elsewhere is refused.
        key: of the tensor, any text.
        generation: counts the writes of a folder; the newest of a key is its value.
        dtype: torch's name without ``torch.``.
        shape: of the contiguous tensor.
        payload_bytes, payload_crc32: of the payload.
        codec: how the payload encodes the tensor; ``raw`` is the tensor's bytes.
    """

    store: str
    key: str
    generation: int
    dtype: str
    shape: tuple[int, ...]
    payload_bytes: int
    payload_crc32: int
    codec: str = "raw"


def key_digest(key: str) -> str:
    """File-system-safe stand-in for a key: 32 hexadecimal digits. Keys may hold ``/``, ``..``, NUL, or be empty."""
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def file_name(key: str, generation: int) -> str:
    """``<digest>-<generation>.tensor``: each write has its own name, so none replaces another before it is complete."""
    return f"{key_digest(key)}-{generation:016x}.tensor"


def encode(header: Header) -> bytes:
    """The header block."""
    text = json.dumps(asdict(header), sort_keys=True).encode("ascii")
    block_bytes = -(-(_FIXED.size + len(text)) // BLOCK_BYTES) * BLOCK_BYTES
    body = text.ljust(block_bytes - _FIXED.size, b"\0")
    checksum = zlib.crc32(body, zlib.crc32(_FIXED.pack(MAGIC, VERSION, block_bytes, len(text), 0)))
    return _FIXED.pack(MAGIC, VERSION, block_bytes, len(text), checksum) + body


def block_bytes(start: bytes) -> int:
    """Length of the header block, from its first 4096 bytes.

    Raises:
        FormatError: not a file of ours, or of a version we do not read.
    """
    if len(start) < BLOCK_BYTES:
        raise FormatError("header_truncated", f">= {BLOCK_BYTES} bytes", len(start))
    magic, version, length, _, _ = _FIXED.unpack_from(start)
    if magic != MAGIC:
        raise FormatError("magic", MAGIC, magic)
    if version != VERSION:
        raise FormatError("version", VERSION, version)
    if length < BLOCK_BYTES or length % BLOCK_BYTES:
        raise FormatError("header_length", f"a multiple of {BLOCK_BYTES}", length)
    return int(length)


def decode(block: bytes) -> Header:
    """The header in a whole header block.

    Raises:
        FormatError: any bit of it is not as written.
    """
    length = block_bytes(block)
    if len(block) != length:
        raise FormatError("header_truncated", length, len(block))
    _, _, _, text_bytes, checksum = _FIXED.unpack_from(block)
    body = block[_FIXED.size :]
    computed = zlib.crc32(body, zlib.crc32(_FIXED.pack(MAGIC, VERSION, length, text_bytes, 0)))
    if computed != checksum:
        raise FormatError("header_checksum", f"{checksum:#010x}", f"{computed:#010x}")
    fields = json.loads(body[:text_bytes])
    return Header(**(fields | {"shape": tuple(fields["shape"])}))
