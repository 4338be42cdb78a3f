"""The exported C program compiles without a warning and prints the integers Python computes."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from qsnn_ext import footprint, models
from qsnn_ext import layers as own_layers
from qsnn_ext.deploy import DeployedModel, export_c, lower, pixel_table
from qsnn_ext.deploy.export import RUNTIME, resident_size
from qsnn_ext.deploy.fileformat import dump_program, parse_program
from qsnn_ext.deploy.program import Affine, Conv
from qsnn_ext.deploy.reference import ReferenceSession
from qsnn_ext.errors import ConfigError, InputError, InputTypeError
from tests.deploy.networks import FramesLoop, PLIFNet, calibrate, make_dyadic, quantize
from tests.deploy.random_programs import random_block, random_input, random_program

GCC = shutil.which("gcc") or shutil.which("cc")
FLAGS = ["-std=c99", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Wpedantic", "-Werror"]
TARGETS = {
    "plain": [GCC],
    "native": [GCC, "-march=native"],
    "no vectors": [GCC, "-DQSNN_PLAIN"],
    "32 bit": [GCC, "-m32"],
    "arm": ["arm-linux-gnueabihf-gcc", "-static"],
    # The runtime's vectors under these: test_sanitizers.py. What is written for a model has none.
    # Without optimization, which takes seven times as long to compile and checks the same.
    "sanitized": [GCC, "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"],
}
PACKAGES = {"32 bit": "gcc-multilib", "arm": "gcc-arm-linux-gnueabihf qemu-user"}


def raw(program, codes) -> bytes:
    """Input codes as an exported program reads them: bytes or int16."""
    lo, hi = program.input_range
    return codes.astype(np.uint8 if lo >= 0 and hi <= 255 else np.int16).tobytes()


PROBE = '#include <stdio.h>\nint main(void) { return puts("") < 0; }\n'


def compiler(target, folder) -> list[str]:
    """Compile command of a target; skips where the machine cannot build for it."""
    command, packages = TARGETS[target], PACKAGES.get(target, "gcc")
    if command[0] is None or shutil.which(command[0]) is None:
        pytest.skip(f"{command[0] or 'gcc'} is not installed: apt-get install {packages}")
    probe = folder / "probe.c"
    probe.write_text(PROBE)
    done = subprocess.run(
        [*command, str(probe), "-o", str(folder / "probe")], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no libraries for {target}: apt-get install {packages}")
    return command


PROGRAMS = [
    (random_program, 3),
    (random_program, 8),
    (random_program, 21),
    (random_block, 1),
    (random_program, 64),  # a current of the step before
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """For every program its sources, an input as the C program reads it, and Python's answers."""
    found = []
    for make, seed in PROGRAMS:
        program = make(seed)
        folder = tmp_path_factory.mktemp(f"{make.__name__}{seed}")
        export_c(program, folder, "stdio", verbose=False)
        assert (folder / "qsnn.c").read_text() == (RUNTIME / "qsnn.c").read_text()
        x = random_input(program, np.random.default_rng(seed), 1, 4)
        session = ReferenceSession(program)
        answers = [a.reshape(-1) for t in range(4) for a in session.step(x[:, t])]
        found.append((folder, raw(program, x), np.concatenate(answers)))
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_same_bits_as_python(target, exported, tmp_path):
    compile_, *options = compiler(target, tmp_path)
    command = [compile_, *FLAGS, *options]
    runner = []
    if target == "arm":
        qemu = shutil.which("qemu-arm") or shutil.which("qemu-arm-static")
        if qemu is None:
            pytest.skip(f"qemu-arm is not installed: apt-get install {PACKAGES[target]}")
        runner = [qemu]
    runtime = tmp_path / "qsnn.o"  # of every program the same
    for folder, given, expected in exported:
        source = folder / "qsnn.c"
        if not runtime.exists():
            subprocess.run([*command, "-c", str(source), "-o", str(runtime)], check=True)
        own = sorted(str(p) for p in folder.glob("*.c") if p != source)
        binary = str(tmp_path / folder.name)
        subprocess.run([*command, *own, str(runtime), "-o", binary], check=True)
        done = subprocess.run([*runner, binary], input=given, capture_output=True, check=True)
        np.testing.assert_array_equal(np.array(done.stdout.split(), int), expected)


@pytest.mark.skipif(GCC is None or shutil.which("nm") is None, reason="needs gcc and nm")
def test_no_heap(tmp_path):
    export_c(random_program(3), tmp_path, verbose=False)
    subprocess.run(
        [GCC, *FLAGS, "-c", str(tmp_path / "qsnn.c"), "-o", str(tmp_path / "qsnn.o")], check=True
    )
    symbols = subprocess.run(
        ["nm", "-u", str(tmp_path / "qsnn.o")], capture_output=True, text=True, check=True
    ).stdout
    needed = {line.split()[-1] for line in symbols.splitlines()}
    assert needed <= {"memcpy", "memset", "memmove", "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}


def test_sizes_are_printed(tmp_path, capsys):
    program = random_program(3)
    size = export_c(program, tmp_path)
    assert size == resident_size(program)
    printed = capsys.readouterr().out
    for name, value in vars(size).items():
        assert f"{value:,}" in printed, name
    assert f"flash {size.flash:,}" in printed
    assert f"RAM {size.ram:,}" in printed
    assert "code is not counted" in printed


RESIDENT = {
    "resnet19": (lambda: models.resnet19(width=0.15, bits="1w-2u", in_channels=2), None),
    "resnet19-snntorch": (
        lambda: models.resnet19(width=0.15, bits="1w-4u", in_channels=2, host="snntorch"), None),
    "vgg16": (lambda: models.vgg16(width=0.15, T=2, bits="1w-2u", in_channels=2), None),
    "vggsnn": (lambda: models.vggsnn(width=0.15, T=3, bits="1w-8u"), None),
    "delayed reset": (lambda: quantize(FramesLoop()), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", RESIDENT)
def test_sizes_are_those_of_the_footprint(name, tmp_path):
    make, steps = RESIDENT[name]
    side = 32 if name == "vgg16" else 16
    x = torch.rand(2, 2, side, side) if steps is None else torch.rand(steps, 2, 2, side, side)
    net = calibrate(make(), x)
    said = footprint(net, input_shape=(2, side, side), time_steps=steps, accounting="resident")
    program = lower(net, x)
    size = export_c(program, tmp_path, verbose=False)
    assert size.weights == said.parts["weights"]
    assert size.membranes == said.parts["membrane"]
    # Scales, batch norm and neurons are fixed point here and real numbers there.
    channels = sum(op.multiplier.size for op in program.ops if isinstance(op, Conv | Affine))
    tables = sum(
        n.leak.size + n.threshold.size + n.bounds.size + n.reset_value.size for n in program.neurons
    )
    assert size.constants == 9 * channels + 4 * tables
    # Beside the membranes only the last spikes of delayed resets, and less than a cache line per
    # neuron layer, are kept.
    delayed = [program.values[n.source].shape for n in program.neurons if n.delay != "none"]
    assert bool(delayed) == (steps is not None)
    last_spikes = sum(4 * h * w * -(-c // 32) for c, h, w in delayed)
    assert 0 <= size.resets - last_spikes < 64 * len(program.neurons)
    # And the sums are what the C program has: its arrays, and nothing else.
    header = (tmp_path / "model.h").read_text()
    words = [int(n) for n in re.findall(r"uint32_t \w+\[(\d+)\];", header)]
    macros = {k: int(v) for k, v in re.findall(r"#define MODEL_(\w+_SIZE) (\d+)", header)}
    code = 1 if "typedef uint8_t model_code" in header else 2
    assert size.ram == 4 * (sum(words) + macros["OUTPUT_SIZE"]) + code * macros["INPUT_SIZE"]
    source = (tmp_path / "model.c").read_text()
    assert size.flash == 4 * int(re.search(r"constants\[2 \+ (\d+)\]", source)[1])


class TestPixelTable:
    MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]

    def program(self, channels=3):
        net = make_dyadic(quantize(PLIFNet()))
        net.features[0] = own_layers.QuantConv2d(channels, 16, 3, padding=1)
        g = torch.Generator().manual_seed(1)
        pixels = torch.randint(0, 256, (2, channels, 8, 8), generator=g)
        mean, std = (torch.tensor(v[:channels]).view(-1, 1, 1) for v in (self.MEAN, self.STD))
        x = (pixels.float() / 255 - mean) / std
        return lower(net, x), pixels.numpy(), x

    @pytest.mark.parametrize("channels", [1, 3])
    def test_same_codes_as_from_floats(self, channels):
        program, pixels, x = self.program(channels)
        table = pixel_table(program, self.MEAN[:channels], self.STD[:channels])
        assert table.shape == (channels, 256)
        assert table.dtype == np.int16
        looked_up = table[np.arange(channels)[:, None, None], pixels]
        np.testing.assert_array_equal(looked_up, DeployedModel(program).codes(x))

    def test_refusals(self, tmp_path):
        program, _, _ = self.program()
        for mean, std in (([0.5] * 2, 1.0), (0.5, 0.0), (float("nan"), 1.0), (0.5, [-1, 1, 1])):
            with pytest.raises(InputError):
                pixel_table(program, mean, std)
        for bad in (np.zeros((1, 256), np.int16), np.zeros((3, 256)), "table"):
            with pytest.raises(InputTypeError, match="pixel_table"):
                export_c(program, tmp_path, pixels=bad)

    @pytest.mark.skipif(GCC is None, reason="needs a C compiler")
    def test_in_c(self, tmp_path):
        """A program that is given pixels, looks them up, and answers like Python."""
        program, pixels, x = self.program()
        table = pixel_table(program, self.MEAN, self.STD)
        size = export_c(program, tmp_path, "stdio", pixels=table, verbose=False)
        assert size.pixels == 3 * 256 * 2
        assert size.flash == resident_size(program).flash + size.pixels
        main = (tmp_path / "main.c").read_text()
        main = main.replace("static model_code input", "static uint8_t input")
        main = main.replace("model_step(", "model_step_pixels(")
        (tmp_path / "main.c").write_text(main)
        binary = tmp_path / "net"
        sources = sorted(str(p) for p in tmp_path.glob("*.c"))
        subprocess.run([GCC, *FLAGS, *sources, "-o", str(binary)], check=True)
        given = pixels[0].astype(np.uint8).tobytes() * program.timesteps
        done = subprocess.run([str(binary)], input=given, capture_output=True, check=True)
        expected = DeployedModel(program).integers(x[:1])[0].reshape(-1)
        np.testing.assert_array_equal(np.array(done.stdout.split(), int), expected)

    def test_mean_and_std_in_place_of_a_table(self, tmp_path):
        program, _, _ = self.program()
        table = pixel_table(program, self.MEAN, self.STD)
        export_c(program, tmp_path / "a", pixels=table, verbose=False)
        export_c(program, tmp_path / "b", mean=self.MEAN, std=self.STD, verbose=False)
        assert (tmp_path / "a" / "model.c").read_text() == (tmp_path / "b" / "model.c").read_text()
        header = (tmp_path / "b" / "model.h").read_text()
        assert "#define MODEL_INPUT_MEAN {0.4914, 0.4822, 0.4465}" in header
        assert "#define MODEL_INPUT_STD {0.247, 0.2435, 0.2616}" in header
        for bad in ({"mean": 0.5}, {"std": 0.5}, {"mean": 0.5, "std": 0.5, "pixels": table}):
            with pytest.raises(ConfigError, match="mean and std"):
                export_c(program, tmp_path, **bad)


EVIL = [
    "*/ int x; /*", "**//\n#error owned\n/*", "\n#include </etc/passwd>", "a\\\nb", "??/\n",
    "é\u202e", "\ud83d", "\x1b[31m", '"; system("id"); "', "", "x" * 10_000,
]  # fmt: skip


CLASSES = "/* named in model_class_names */"
NAMES = re.compile(
    r"\n(?:extern )?const char \*const model_class_names\[\d+\]"
    r'(?:;| = \{\n(?:    "(?:[A-Za-z0-9 +,:-]|\\[0-7]{3})*",\n)*\};)\n'
)


@pytest.mark.parametrize("text", EVIL)
def test_a_file_writes_no_code(text, tmp_path):
    """Of what a file chooses only numbers and [A-Za-z0-9_] reach the compiler."""
    program = random_program(3)
    names = [f"{text[:400]}{k}" for k in range(program.values[program.outputs[0]].elements)]
    program.metadata = {"model": text, "note": text, "classes": json.dumps(names)}
    for k, value in enumerate(program.values):
        program.values[k] = dataclasses.replace(value, name=f"{text[:400]}{k}")
    for k, op in enumerate(program.ops):
        op.name = f"{text[:400]}{k}"
    plain = random_program(3)
    export_c(parse_program(dump_program(program)), tmp_path / "evil", verbose=False)
    export_c(plain, tmp_path / "plain", verbose=False)
    for file in sorted((tmp_path / "plain").iterdir()):
        ours = file.read_text()
        theirs = (tmp_path / "evil" / file.name).read_text(encoding="ascii")
        if file.name in ("model.h", "model.c"):  # strings, of plain characters and octal escapes
            theirs, found = NAMES.subn("", theirs)
            assert found == (len(program.outputs) == 1), file.name
            theirs = theirs.replace(f"#define MODEL_CLASSES {len(names)} {CLASSES}\n", "")
        if file.name == "model.h":
            first, ours = ours.split("\n", 1)
            assert first == "/* model: written by qsnn_ext.deploy.export_c. */"
            first, theirs = theirs.split("\n", 1)
            assert re.fullmatch(r"/\* \w{1,64}: written by qsnn_ext\.deploy\.export_c\. \*/", first)
        assert ours == theirs, file.name


@pytest.mark.skipif(GCC is None, reason="needs a C compiler")
def test_a_model_beside_another_runtime_does_not_compile(tmp_path):
    export_c(random_program(3), tmp_path, verbose=False)
    records = tmp_path / "qsnn_records.h"
    records.write_text(records.read_text().replace("#define QSNN_LAYOUT ", "#define QSNN_LAYOUT 1"))
    done = subprocess.run(
        [GCC, "-std=c99", "-fsyntax-only", str(tmp_path / "model.c")],
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert "written by different versions" in done.stderr


def test_windows_reads_bytes(tmp_path):
    """There a stream of text ends at the byte 0x1A; the program switches before it reads."""
    export_c(random_program(3), tmp_path, "stdio", verbose=False)
    main = (tmp_path / "main.c").read_text()
    assert main.index("_setmode(0, _O_BINARY)") < main.index("fread(")
    compiler = shutil.which("x86_64-w64-mingw32-gcc")
    if compiler is None:
        pytest.skip("no compiler for Windows: apt-get install gcc-mingw-w64-x86-64")
    sources = sorted(str(p) for p in tmp_path.glob("*.c"))
    subprocess.run([compiler, *FLAGS, *sources, "-o", str(tmp_path / "net.exe")], check=True)


def test_optimize_is_one_of_two(tmp_path):
    with pytest.raises(ConfigError, match="optimize='small' must be"):
        export_c(random_program(3), tmp_path, optimize="small")
    program = random_block(1)
    small = export_c(program, tmp_path, verbose=False)
    fast = export_c(program, tmp_path, optimize="speed", verbose=False)
    assert small.flash < fast.flash
    assert small.weights == fast.weights
