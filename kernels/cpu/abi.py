"""The structs of ``abi.h`` as ctypes sees them. The build refuses a library whose structs differ (:func:`checks`)."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from dataclasses import fields

from mst_compile.rules import patterns

ERRORS = {-1: "unsupported block size", -2: "unsupported dtypes", -3: "out of memory", -4: "unsupported shape"}

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_CPP = {_L: "int64_t", _I: "int32_t", _F: "float"}


class Spmm(ctypes.Structure):
    _fields_ = (
        ("x", _P),
        ("ldx", _L),
        ("w", _P),
        ("ldw", _L),
        ("rows", _L),
        ("cols", _L),
        ("index", _P),
        ("bias", _P),
        ("y", _P),
        ("ldy", _L),
        ("m", _L),
        ("x_dtype", _I),
        ("w_dtype", _I),
        ("bias_dtype", _I),
        ("block", _I),
        ("outputs_are_rows", _I),
        ("threads", _I),
    )


class Packed(ctypes.Structure):
    _fields_ = (
        ("x", _P),
        ("ldx", _L),
        ("w", _P),
        ("index", _P),
        ("bias", _P),
        ("y", _P),
        ("ldy", _L),
        ("m", _L),
        ("outputs", _L),
        ("reduction", _L),
        ("dtype", _I),
        ("bias_dtype", _I),
        ("block", _I),
        ("threads", _I),
    )


class GradWeight(ctypes.Structure):
    _fields_ = (
        ("a", _P),
        ("lda", _L),
        ("b", _P),
        ("ldb", _L),
        ("m", _L),
        ("rows", _L),
        ("cols", _L),
        ("index", _P),
        ("out", _P),
        ("ldo", _L),
        ("colsum", _P),
        ("in_dtype", _I),
        ("out_dtype", _I),
        ("block", _I),
        ("colsum_of_a", _I),
        ("threads", _I),
    )


class SpmmGroups(ctypes.Structure):
    _fields_ = (("products", _P), ("count", _L), ("threads", _I))


class GradWeightGroups(ctypes.Structure):
    _fields_ = (("products", _P), ("count", _L), ("threads", _I))


class ZeroInactive(ctypes.Structure):
    _fields_ = (
        ("w", _P),
        ("ldw", _L),
        ("rows", _L),
        ("cols", _L),
        ("index", _P),
        ("element_size", _I),
        ("block", _I),
        ("threads", _I),
    )


class BlockSumsq(ctypes.Structure):
    _fields_ = (
        ("w", _P),
        ("ldw", _L),
        ("rows", _L),
        ("cols", _L),
        ("out", _P),
        ("dtype", _I),
        ("block", _I),
        ("threads", _I),
    )


class Heads(ctypes.Structure):
    _fields_ = (("data", _P), ("batch", _L), ("head", _L), ("token", _L))


class Parts(ctypes.Structure):
    _fields_ = tuple((part.name, _L) for part in fields(patterns.Parts))


class Attention(ctypes.Structure):
    _fields_ = (
        *((name, _L) for name in ("batch", "heads", "key_heads", "length", "size")),
        ("parts", Parts),
        *((name, _I) for name in ("dtype", "threads")),
        ("scale", _F),
        *((name, _P) for name in ("key_mask", "lse")),
        *((name, Heads) for name in ("q", "k", "v", "out", "grad", "dq", "dk", "dv")),
    )


def packer(structure: type[ctypes.Structure]) -> struct.Struct:
    """What makes the bytes of a struct out of its fields in order, in a fraction of the time that ctypes takes."""
    codes = {_P: "P", _L: "q", _I: "i", _F: "f"}
    made = struct.Struct(f"@{''.join(codes[kind] for _, kind, *_ in structure._fields_)}0P")  # padded as C++ does it
    if made.size != ctypes.sizeof(structure):
        raise TypeError(f"{structure.__name__} takes {ctypes.sizeof(structure)} bytes and its fields {made.size}")
    return made


STRUCTURES = (
    Spmm, SpmmGroups, Packed, GradWeight, GradWeightGroups, ZeroInactive, BlockSumsq, Heads, Parts, Attention,
)  # fmt: skip


def _checks(structure: type[ctypes.Structure]) -> Iterator[str]:
    struct = f"Mst{structure.__name__}"
    yield f"sizeof({struct}) == {ctypes.sizeof(structure)}"
    for name, kind, *_ in structure._fields_:
        yield f"offsetof({struct}, {name}) == {getattr(structure, name).offset}"
        field = f"decltype({struct}::{name})"
        if kind is _P:
            yield f"std::is_pointer_v<{field}>"
        else:
            yield f"std::is_same_v<{field}, {_CPP.get(kind, f'Mst{kind.__name__}')}>"


def checks() -> str:
    """``layout.h``: what C++ must agree to for its structs to be those of this file."""
    lines = ["// Made from abi.py.", "#pragma once", "#include <cstddef>", "#include <type_traits>", '#include "abi.h"']
    lines += [f"static_assert({check});" for structure in STRUCTURES for check in _checks(structure)]
    return "\n".join(lines) + "\n"
