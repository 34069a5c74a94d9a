"""Damage of every kind that a file can come with, the same for the same seed."""

import json
import random
import struct
from typing import Any

NUMBERS = [0, 1, -1, 7, 255, 2**16, 2**31 - 1, 2**31, 2**40, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan")]
OTHERS = [
    None, True, False, "", "x", "../../etc/passwd", "\x00", "\u202e", "${x}", "[", [], {}, [[]], {"": None}, "9" * 400,
]  # fmt: skip
WORDS = [
    b"\x00", b"\xff\xff\xff\xff", b"\n", b": ", b"- ", b"[", b"]", b"{", b"}", b"&a ", b"*a", b"!!python/name:os ",
    b"|", b"'", b'"', b"#", b"\t", b"eval(", b")", b"1e999", b"-1", b"null", b"~", b"re:(a+)+", b"0", b"\xf0\x9f",
    b"<<: ", b"%YAML",
]  # fmt: skip


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """One to four changes: bytes overwritten, inserted, removed, repeated, moved, or the end cut off."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data) + 1)
        length = min(draw.choice([1, 1, 2, 4, 8, 64]), len(data) - place)
        match draw.randrange(8):
            case 0 if length:
                data[place] ^= 1 << draw.randrange(8)
            case 1:
                data[place : place + length] = draw.randbytes(length)
            case 2:
                data[place:place] = draw.choice(WORDS)
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[place : place + length] * draw.choice([1, 2, 50])
            case 5:
                other = draw.randrange(len(data) + 1)
                data[place:place] = data[other : other + 16]
            case 6 if draw.random() < 0.3:
                del data[place:]
            case _:
                if place + 8 <= len(data):
                    number = int(draw.choice([n for n in NUMBERS if isinstance(n, int)])) & (2**64 - 1)
                    data[place : place + 8] = struct.pack("<Q", number)
    return bytes(data)


def mutate_json(value: Any, draw: random.Random) -> Any:
    """The value with one entry, somewhere in it, replaced, removed, renamed, doubled or moved."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(list(value))
        changed = dict(value)
        match draw.randrange(6):
            case 0:
                del changed[name]
            case 1:
                changed[draw.choice(["", name + "x", draw.choice(list(value))])] = changed.pop(name)
            case _:
                changed[name] = mutate_json(value[name], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        changed_list = list(value)
        match draw.randrange(4):
            case 0:
                del changed_list[place]
            case 1:
                changed_list[place:place] = changed_list * draw.choice([1, 3])
            case _:
                changed_list[place] = mutate_json(value[place], draw)
        return changed_list
    if isinstance(value, int | float) and draw.random() < 0.7:
        return draw.choice([*NUMBERS, value + 1, value - 1, value * 1000, -value])
    return draw.choice([*NUMBERS, *OTHERS, str(value), [value], {"x": value}])


def mutate_safetensors(content: bytes, draw: random.Random) -> bytes:
    """Damage below or above the JSON header: raw bytes, or the header rewritten so that it parses again."""
    if draw.random() < 0.3:
        return mutate_bytes(content, draw)
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    body = content[8 + size :]
    match draw.randrange(5):
        case 0:
            body = mutate_bytes(body, draw) if draw.random() < 0.5 else _same_length(body, draw)
        case 1:  # inside the metadata's own JSON
            metadata = header.get("__metadata__", {})
            name = next((name for name, text in metadata.items() if text.startswith("{")), None)
            if name is not None:
                metadata[name] = json.dumps(mutate_json(json.loads(metadata[name]), draw))
        case 2:
            header["__metadata__"] = mutate_json(header.get("__metadata__", {}), draw)
        case _:
            header = mutate_json(header, draw)
    try:
        text = json.dumps(header).encode("utf-8", "surrogatepass")
    except ValueError:
        text = b"{}"
    return struct.pack("<Q", len(text)) + text + body


def _same_length(body: bytes, draw: random.Random) -> bytes:
    data = bytearray(body)
    for _ in range(draw.randint(1, 8)):
        if data:
            data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)
