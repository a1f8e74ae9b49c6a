"""The Xet storage behind a Hub: chunks in xorbs, files as terms over them in shards. Reads what hf_xet uploads.

A file is taken in only if its chunks, put together again, have the sha256 that its shard claims. Hashes of xorbs are
keyed blake3, which the standard library lacks: they are taken as names. Formats: https://github.com/huggingface/xet-core.
"""

import hashlib
import re
import struct
import time
from itertools import accumulate

from hub_store import RefusedError

CHUNK_HEADER = 8  # version, compressed size (24 bit), scheme, size (24 bit)
XORB_FOOTER = b"XETBLOB"
SHARD_TAG = b"HFRepoMetaData\0"
SHARD_HEADER, SHARD_ENTRY = 48, 48
BOOKEND = b"\xff" * 32
WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30


def hex_of(raw):
    """A hash as Xet prints it: four little-endian 64-bit numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def lz4(frame):
    """Decompress an LZ4 frame."""
    if frame[:4] != b"\x04\x22\x4d\x18":
        raise RefusedError(400, "no LZ4 frame")
    flags, at, out = frame[4], 7 + 8 * (frame[4] >> 3 & 1), bytearray()
    while size := int.from_bytes(frame[at : at + 4], "little"):
        block = frame[at + 4 : at + 4 + (size & 0x7FFFFFFF)]
        at += 4 + len(block) + 4 * (flags >> 4 & 1)
        if size >> 31:
            out += block
        else:
            lz4_block(block, out)
    return bytes(out)


def lz4_block(block, out):
    at = 0

    def long(size):
        nonlocal at
        if size == 15:
            while True:
                at += 1
                size += block[at - 1]
                if block[at - 1] != 255:
                    break
        return size

    while True:
        token, at = block[at], at + 1
        literals = long(token >> 4)
        out += block[at : at + literals]
        at += literals
        if at >= len(block):
            return
        offset, at = int.from_bytes(block[at : at + 2], "little"), at + 2
        length, start = long(token & 15) + 4, len(out) - offset
        pattern = bytes(out[start : start + length])
        out += (pattern * (length // len(pattern) + 1))[:length]


def ungrouped(data):
    """Put four groups of bytes, the first ones of each four, the second ones, ..., back in order."""
    out, at = bytearray(len(data)), 0
    for group in range(4):
        size = len(out[group::4])
        out[group::4] = data[at : at + size]
        at += size
    return bytes(out)


SCHEMES = {0: bytes, 1: lz4, 2: lambda data: ungrouped(lz4(data))}


def chunks_of(xorb):
    """Return the end of each chunk in a xorb, and the chunks."""
    at, ends, chunks = 0, [], []
    while at < len(xorb) and xorb[at : at + len(XORB_FOOTER)] != XORB_FOOTER:
        packed, size = (int.from_bytes(xorb[at + i : at + i + 3], "little") for i in (1, 5))
        data = SCHEMES[xorb[at + 4]](xorb[at + CHUNK_HEADER : at + CHUNK_HEADER + packed])
        if xorb[at] or len(data) != size:
            raise RefusedError(400, "a damaged xorb")
        at += CHUNK_HEADER + packed
        ends.append(at)
        chunks.append(data)
    return ends, chunks


class XetStore:
    def __init__(self):
        self.xorbs = {}  # hash -> (bytes, ends of chunks, chunks)
        self.files = {}  # hash -> terms: (xorb, first chunk, end, size)
        self.hash_of = {}  # sha256 -> hash

    def add_shard(self, shard):
        """Take in the files of a shard; return their contents by sha256."""
        if not shard.startswith(SHARD_TAG):
            raise RefusedError(400, "no shard")
        at, contents = SHARD_HEADER, {}
        while shard[at : at + 32] != BOOKEND:
            name, flags, count = struct.unpack_from("<32sII", shard, at)
            at += SHARD_ENTRY
            terms = [self.term(shard, at + SHARD_ENTRY * i) for i in range(count)]
            at += SHARD_ENTRY * count * (2 if flags & WITH_VERIFICATION else 1)
            content = b"".join(b"".join(self.xorbs[xorb][2][start:end]) for xorb, start, end, _ in terms)
            if not flags & WITH_METADATA or hex_of(shard[at : at + 32]) != hashlib.sha256(content).hexdigest():
                raise RefusedError(400, "a file's chunks do not have the sha256 that its shard claims")
            at += SHARD_ENTRY
            self.files[hex_of(name)] = terms
            self.hash_of[hashlib.sha256(content).hexdigest()] = hex_of(name)
            contents[hashlib.sha256(content).hexdigest()] = content
        return contents

    def term(self, shard, at):
        raw, _, size, start, end = struct.unpack_from("<32s4I", shard, at)
        xorb = self.xorbs.get(hex_of(raw))
        if xorb is None or sum(map(len, xorb[2][start:end])) != size:
            raise RefusedError(400, "a shard names chunks that are not stored, or of another size")
        return hex_of(raw), start, end, size


class XetRoutes:
    """Requests of hf_xet, for a handler whose hub has a `xet` store."""

    routes = (
        ("GET", r"/api/models/([^/]+/[^/]+)/xet-(read|write)-token/([^/]+)", "xet_token"),
        ("POST", r"/xet/v1/xorbs/default/([0-9a-f]{64})", "xorb"),
        ("POST", r"/xet/v1/shards", "shard"),
        ("GET", r"/xet/v1/reconstructions/([0-9a-f]{64})", "reconstruction"),
        ("GET", r"/xorbs/([0-9a-f]{64})", "xorb_bytes"),
    )

    def xet_token(self, repo_id, scope, revision, body, fault):
        (self.writable if scope == "write" else self.readable)(repo_id)
        expiry = int(time.time()) + 3600
        names = {"casUrl": f"{self.hub.url}/xet", "accessToken": f"xet_{scope}", "exp": expiry}
        headers = {"X-Xet-Cas-Url": names["casUrl"], "X-Xet-Access-Token": names["accessToken"]}
        self.answer(names, 200, headers | {"X-Xet-Token-Expiration": str(expiry)})

    def xet_scope(self, *scopes):
        if self.headers.get("Authorization", "").removeprefix("Bearer xet_") not in scopes:
            raise RefusedError(401, "no Xet token of this scope")

    def xorb(self, name, body, fault):
        self.xet_scope("write")
        known = name in self.hub.xet.xorbs
        self.hub.xet.xorbs[name] = (body, *chunks_of(body))
        self.answer({"was_inserted": not known})

    def shard(self, body, fault):
        self.xet_scope("write")
        with self.hub.lock:
            self.hub.objects |= self.hub.xet.add_shard(body)
        self.answer({"result": 1})

    def reconstruction(self, name, body, fault):
        self.xet_scope("read", "write")
        terms = self.hub.xet.files.get(name)
        if terms is None:
            raise RefusedError(404, "no such file")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        before = list(accumulate((size for *_, size in terms), initial=0))
        if start >= before[-1]:
            raise RefusedError(416, "behind the end")
        wanted = [(term, offset) for term, offset in zip(terms, before) if offset + term[3] > start]
        fetch = {}
        for (xorb, first, end, _), _ in wanted:
            ends = [0, *self.hub.xet.xorbs[xorb][1]]
            where = {"range": {"start": first, "end": end}, "url": f"{self.hub.cdn_url}/xorbs/{xorb}"}
            fetch.setdefault(xorb, []).append(where | {"url_range": {"start": ends[first], "end": ends[end] - 1}})
        answer = {"offset_into_first_range": start - wanted[0][1], "fetch_info": fetch}
        answer["terms"] = [
            {"hash": xorb, "unpacked_length": size, "range": {"start": first, "end": end}}
            for (xorb, first, end, size), _ in wanted
        ]
        self.answer(answer)

    def xorb_bytes(self, name, body, fault):
        self.ranged(self.hub.xet.xorbs[name][0], fault)
