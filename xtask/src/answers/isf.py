# SPDX-License-Identifier: Apache-2.0 OR MIT
"""isf.py BTF SYMBOLS BANNER ISF: writes volatility3's symbol file of a kernel.

BTF is the kernel's own description of its types, SYMBOLS has a line "ADDRESS NAME" for each symbol, BANNER is what
linux_banner holds. The symbol file has the types and symbols that volatility3 would get from dwarf2json, but that only
init_task has a type.
"""
import base64
import json
import struct
import sys

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FLOAT, PROTO, ENUM64 = 1, 2, 3, 4, 5, 6, 16, 13, 19
# typedef, volatile, const, restrict, type tag
REFERENCES = (8, 9, 10, 11, 18)
# Bytes behind each type, for each of its entries or once.
EACH = {STRUCT: 12, UNION: 12, 15: 12, ENUM64: 12, ENUM: 8, PROTO: 8}
ONCE = {INT: 4, 14: 4, 17: 4, ARRAY: 12}

VOID = {"kind": "base", "name": "void"}


class Btf:
    def __init__(self, blob):
        _, _, _, head, type_at, type_len, text_at, text_len = struct.unpack_from("<HBBIIIII", blob)
        text = blob[head + text_at : head + text_at + text_len]
        self.name = lambda at: text[at : text.index(b"\0", at)].decode()
        self.types = [None]
        at, end = head + type_at, head + type_at + type_len
        while at < end:
            name, info, size = struct.unpack_from("<III", blob, at)
            kind, count = info >> 24 & 0x7F, info & 0xFFFFFF
            more = EACH.get(kind, 0) * count + ONCE.get(kind, 0)
            self.types.append((kind, self.name(name), info >> 31, count, size, blob[at + 12 : at + 12 + more]))
            at += 12 + more

    def label(self, number):
        return self.types[number][1] or f"unnamed_{number}"

    def typed(self, number):
        """A type as another one refers to it."""
        if number == 0:
            return VOID
        kind, name, _, _, size, rest = self.types[number]
        if kind == PTR:
            return {"kind": "pointer", "subtype": self.typed(size)}
        if kind == ARRAY:
            element, _, length = struct.unpack("<III", rest)
            return {"kind": "array", "count": length, "subtype": self.typed(element)}
        if kind in REFERENCES:
            return self.typed(size)
        if kind in (STRUCT, UNION):
            return {"kind": "struct" if kind == STRUCT else "union", "name": self.label(number)}
        if kind in (ENUM, ENUM64):
            return {"kind": "enum", "name": self.label(number)}
        if kind in (INT, FLOAT):
            return {"kind": "base", "name": name}
        if kind == PROTO:
            return {"kind": "function"}
        return VOID

    def fields(self, number):
        """The members of a structure or union."""
        _, _, has_bits, count, _, rest = self.types[number]
        fields = {}
        for index, (name, member, at) in enumerate(struct.iter_unpack("<III", rest)):
            bits = at >> 24 if has_bits else 0
            at = at & 0xFFFFFF if has_bits else at
            label = self.name(name)
            field = {"type": self.typed(member), "offset": at // 8}
            if bits:
                # Within the word of the member's type that has it.
                word = 8 * self.size(member)
                field["offset"] = at // word * word // 8
                field["type"] = {"kind": "bit_field", "bit_position": at % word, "bit_length": bits, "type": field["type"]}
                field["type"]["kind"] = "bitfield"
            if not label:
                field["anonymous"] = True
            fields[label or f"unnamed_field_{index}"] = field
        return fields

    def size(self, number):
        kind, _, _, _, size, _ = self.types[number]
        return self.size(size) if kind in REFERENCES else size

    def enumerators(self, number):
        kind, _, is_signed, count, _, rest = self.types[number]
        form = ("<IIi" if is_signed else "<III") if kind == ENUM64 else ("<Ii" if is_signed else "<II")
        for entry in struct.iter_unpack(form, rest):
            yield self.name(entry[0]), entry[1] if kind == ENUM else entry[2] << 32 | entry[1]


def main():
    blob, symbols, banner, isf = (open(path, "rb") for path in sys.argv[1:4]), None, None, sys.argv[4]
    blob, symbols, banner = (file.read() for file in blob)
    btf = Btf(blob)
    base = {
        "void": {"size": 0, "signed": False, "kind": "void", "endian": "little"},
        "pointer": {"size": 8, "signed": False, "kind": "int", "endian": "little"},
    }
    user, enums = {}, {}
    for number, found in enumerate(btf.types[1:], 1):
        kind, name, _, _, size, rest = found
        if kind in (INT, FLOAT):
            encoding = rest[3] if rest else 0
            word = "float" if kind == FLOAT else "bool" if encoding & 4 else "char" if size == 1 else "int"
            base.setdefault(name, {"size": size, "signed": bool(encoding & 1), "kind": word, "endian": "little"})
        elif kind in (STRUCT, UNION):
            word = "struct" if kind == STRUCT else "union"
            user.setdefault(btf.label(number), {"size": size, "kind": word, "fields": btf.fields(number)})
        elif kind in (ENUM, ENUM64):
            values = dict(btf.enumerators(number))
            enums.setdefault(btf.label(number), {"size": size, "base": "int" if size == 4 else "long long unsigned int", "constants": values})
    table = {}
    for line in symbols.decode().splitlines():
        address, name = line.split(" ", 1)
        table.setdefault(name, {"address": int(address, 16)})
    table["init_task"]["type"] = {"kind": "struct", "name": "task_struct"}
    table["linux_banner"]["type"] = {"kind": "array", "count": len(banner), "subtype": {"kind": "base", "name": "char"}}
    table["linux_banner"]["constant_data"] = base64.b64encode(banner).decode()
    metadata = {"format": "6.2.0", "producer": {"name": "kvmmem", "version": "0.0.0"}, "linux": {}}
    with open(isf, "w") as file:
        json.dump({"metadata": metadata, "base_types": base, "user_types": user, "enums": enums, "symbols": table}, file)


main()
