"""The .qsnn file: what is written is read back, and nothing else is accepted."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from qsnn_ext.deploy.fileformat import (
    _checksum,
    dump_program,
    load_program,
    parse_program,
    save_program,
)
from qsnn_ext.deploy.model import DeployedModel
from qsnn_ext.deploy.program import Add, Affine, Program, Value
from qsnn_ext.errors import FormatError
from tests.deploy.fuzz import mutate
from tests.deploy.random_programs import random_input, random_program


@pytest.fixture(scope="module")
def content() -> bytes:
    return dump_program(random_program(7, length=10))


def rebuild(content: bytes, edit) -> bytes:
    """Change header and program with ``edit(header, program)``; the checksum is made to match."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    metadata = header.pop("__metadata__")
    program = json.loads(metadata["program"])
    edit(header, program, metadata)
    metadata["program"] = json.dumps(program)
    metadata["sha256"] = _checksum(metadata["program"], header, data)
    encoded = json.dumps({"__metadata__": metadata, **header}).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def test_no_product_of_an_addition_overflows_on_the_way():
    """The sum fits int32, the first product alone does not, and the engine adds step by step."""

    def shifted(name: str, target: int, bias: int) -> Affine:
        one = np.ones(1, np.int32)
        return Affine(name, 0, target, one, one.astype(np.uint8), one * bias)

    values = [Value(name, (1, 1, 1), 0) for name in ("input", "a", "b", "sum")]
    program = Program(
        values,
        [shifted("less", 1, -1000), shifted("more", 2, 2**30), Add("sum", (1, 2), (1, 2), 3)],
        (3,),
        input_range=(0, 0),
    )
    with pytest.raises(FormatError, match="sum: its result may exceed int32"):
        program.validate()


@pytest.mark.parametrize("seed", range(12))
def test_round_trip(seed, tmp_path):
    program = random_program(seed, length=9)
    save_program(program, tmp_path / "net.qsnn")
    again = load_program(tmp_path / "net.qsnn")
    assert dump_program(again) == dump_program(program)
    x = random_input(program, np.random.default_rng(seed), 2, 3).swapaxes(0, 1)
    for a, b in zip(
        DeployedModel(program).integers(x), DeployedModel(again).integers(x), strict=True
    ):
        np.testing.assert_array_equal(a, b)


# As the first writer of format version 1 left it: two layers and a neuron.
FIRST = (
    "c-"
    "pm9y>8nu5U!IUK<7R{!Knjlh?FcbUOQ#!*2y*mTBK|u`YTDL2n@exAEIy20`8HNQzcFUxM&r~(tXGK?&IAtVpnhc"
    "wL^JcOUnhfJkQa5hssvh+@d-9YMKUNbSJe@Z36%StJCd9^BSz(65a8tmu89Pi^USDrt9qz;RVG6(-"
    "n?zG@Y$5c#5{Ud*mR~$U7=kj&SmTw@-"
    "*1zQTZaKH1K_!OIeT3d~E?@LGDLI3lL)b>XlG49oRK0_U87aVvErD@Ozw9j&oi2{{5fE`(|}4vDb;bEr@iw@``E!"
    "i{cwuZisOA61`auidh-uCUdSEHaiw!B{J6hF2|(hnHx}weWGR7E*htR9fcnW2|=wS@C=CXxc`4sF11(@?8?uD64o"
    "iRHBykT64E>-"
    "t<*9mVH{x(1(#|Iu;%Ow_5sM_ZH^K_d8zsnuxv_LPmS_Q<s~9SH9QN*#ic<+;|}$3C%Fvj>W248Y{bFrH`Wz<}P?"
    "Wy_TKic9a0fZoMZC-SFZ(YDO?@9yInkkXYH67J9bd!?`hAPG>0`n~cY#WIReJC2U<rGaiv7CA5fA!4pPA$<{oRoL"
    "<L~ELf411r<e^#n;zKlrn+#7)8^%udM1SCAB-U!rpfhxNl+_QaNh@M+f<1-"
    "IgWHlkpv3D<8jB+?*B3FiBk~nO2hDz8p$$avDrh9MceOw=mq>wi2&UoD#$o$3yyc+c)Ao?Qx2eBt-j@mHYo&X9-"
    "9WoUkJWcLV)$c=Sv-"
    "8^Y=In^c>v9Y=q8Qb3ByvkbE|F#KijXDLpTz;Jf=(*$QUOwOtP8}>y0GXxpMSsDn;R+W$U&t6ZSr8pakcYZ9xEL!"
    "dN@Bj663E$3Nhr?k4Pk0>MxAa5!q`vtMHU`HJc)lAjx9(zeyX!67mp{eT<YF@U4O4kQvj"
)


def test_a_file_of_the_first_writer_is_still_read():
    content = zlib.decompress(base64.b85decode(FIRST))
    program = parse_program(content)
    assert (program.input_bits, program.input_scale) == (8, 0.5)
    assert dump_program(program) == content.replace(b'"version":"1"', b'"version":"2"')
    answer = DeployedModel(program).integers(np.array([[[[1.0, -2.0]], [[3.5, 60.0]]]]))[0]
    np.testing.assert_array_equal(answer, [[[[[1, 1]], [[9, 9]]]]] * 2)


def test_a_network_of_version_1_answers_as_it_did():
    """``written/version_1.qsnn`` was lowered, written and run by the package of version 1."""
    folder = Path(__file__).parent / "written"
    assert b'"version":"1"' in (folder / "version_1.qsnn").read_bytes()
    program = load_program(folder / "version_1.qsnn")
    known = np.load(folder / "version_1.npz")
    answer = DeployedModel(program)(known["x"].astype(np.float32) / 16)
    np.testing.assert_array_equal(answer, known["answer"])
    assert known["answer"].any()


def test_safetensors_reads_it(content):
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load(content)
    assert any(name.endswith(".bounds") for name in tensors)


def test_every_truncation_is_refused(content):
    for end in [*range(0, 200), *range(200, len(content), 97)]:
        with pytest.raises(FormatError):
            parse_program(content[:end])
    with pytest.raises(FormatError):
        parse_program(content + b"\0")


def test_every_flipped_byte_of_the_data_is_refused(content):
    rng = np.random.default_rng(0)
    for at in rng.integers(8, len(content), 300):
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(rng.integers(8))
        try:
            program = parse_program(bytes(damaged))
        except FormatError:
            continue
        # A space of the padding turned into another white space is no damage.
        assert dump_program(program) == content


HOSTILE = {
    "future version": (lambda h, p, m: m.update(version="3"), "version '3'.*upgrade"),
    "not qsnn": (lambda h, p, m: m.update(format="gguf"), "no qsnn program"),
    "huge shape": (lambda h, p, m: p["values"][0].__setitem__(1, [65536] * 3), "shape"),
    "negative shape": (lambda h, p, m: p["values"][0].__setitem__(1, [-1, 2, 2]), "shape"),
    "float shape": (lambda h, p, m: p["values"][0].__setitem__(1, [1.5, 2, 2]), "shape"),
    "bool shape": (lambda h, p, m: p["values"][0].__setitem__(1, [True, 2, 2]), "shape"),
    "planes": (lambda h, p, m: p["values"][1].__setitem__(2, 99), "planes"),
    "no such value": (lambda h, p, m: p["ops"][0].update(source=999), "not written before"),
    "negative index": (lambda h, p, m: p["ops"][0].update(source=-1), "not written before"),
    "cycle": (lambda h, p, m: p["ops"][0].update(source=p["ops"][0]["target"]), "not written"),
    "unknown op": (lambda h, p, m: p["ops"][0].update(op="__import__"), "unknown kind"),
    "unhashable op": (lambda h, p, m: p["ops"][0].update(op=[]), "malformed"),
    "missing field": (lambda h, p, m: p["ops"][0].pop("name"), "lacks a field"),
    "extra field": (lambda h, p, m: p["ops"][0].update(x=1), "one too many"),
    "zero timesteps": (lambda h, p, m: p.update(timesteps=0), "timesteps"),
    "bad scale": (lambda h, p, m: p.update(input_scale=-1), "scale"),
    "no outputs": (lambda h, p, m: p.update(outputs=[]), "outputs"),
    "output index": (lambda h, p, m: p.update(outputs=[10**9]), "output"),
    "reduction": (lambda h, p, m: p.update(reduction="max"), "reduction"),
    "input range": (lambda h, p, m: p.update(input_range=[0, 10**6]), "16 bits"),
    "tensor shape": (lambda h, p, m: next(iter(h.values())).update(shape=[2**31, 2**31]), "fit"),
    "tensor type": (lambda h, p, m: next(iter(h.values())).update(dtype="F64"), "unknown type"),
    "tensor place": (
        lambda h, p, m: next(iter(h.values())).update(data_offsets=[2**40, 2**41]), "malformed"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_with_a_right_checksum(content, name):
    edit, message = HOSTILE[name]
    with pytest.raises(FormatError, match=message):
        parse_program(rebuild(content, edit))


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\0" * 8, b"\xff" * 64, struct.pack("<Q", 2**63), struct.pack("<Q", 4) + b"{{{{",
        struct.pack("<Q", 200_000) + b"[" * 200_000, struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 16) + b'{"a":NaN,"b":1e9}', b"\x80\x04\x95" + b"." * 30,
    ],
)  # fmt: skip
def test_other_bytes(raw):
    with pytest.raises(FormatError):
        parse_program(raw)


def test_overflowing_arithmetic_is_refused():
    program = random_program(7, length=10)
    program.neurons[0].leak[...] = 2**31 - 1
    with pytest.raises(FormatError, match=r"int32|leak"):
        program.validate()


def test_mutations_never_crash():
    rng = np.random.default_rng(1)
    files = [dump_program(random_program(s, length=6)) for s in range(4)]
    for _ in range(1500):
        try:
            parse_program(mutate(files[int(rng.integers(4))], rng))
        except FormatError:
            continue
