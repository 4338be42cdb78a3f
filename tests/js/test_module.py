"""The JavaScript module reads .qsnn files and gives the integers Python gives, in both builds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from qsnn_ext.deploy import DeployedModel, load
from qsnn_ext.deploy.fileformat import dump_program, save_program
from qsnn_ext.deploy.program import OP_TYPES, Conv
from qsnn_ext.deploy.reference import ReferenceSession
from tests.deploy.random_programs import random_block, random_input, random_program
from tests.js.conftest import JS

MODELS = JS.parent / "recipes" / "results" / "devices"
STEPS = 3


def membranes(program, state):
    """State words without the last spike, as signed codes."""
    found = {}
    for n in program.neurons:
        word = state[n.name][0].astype(np.int64)
        if n.bits < 32:
            code = word & (2**n.bits - 1)
            word = np.where(code >= 2 ** (n.bits - 1), code - 2**n.bits, code)
        found[n.name] = word.reshape(-1).tolist()
    return found


def test_same_integers_as_python(node, tmp_path):
    programs = [random_program(seed) for seed in range(60)]
    programs += [random_block(seed) for seed in range(10)]
    kinds = {(type(op).__name__, getattr(op, "binary", None)) for p in programs for op in p.ops}
    assert {kind for kind, _ in kinds} == set(OP_TYPES), kinds
    assert any(op.groups > 1 for p in programs for op in p.ops if isinstance(op, Conv))
    tasks, inputs = [], []
    for k, program in enumerate(programs):
        save_program(program, tmp_path / f"{k}.qsnn")
        x = random_input(program, np.random.default_rng(k), 1, STEPS)
        inputs.append(x)
        codes = [x[0, t].reshape(-1).tolist() for t in range(STEPS)]
        tasks.append({"program": f"{k}.qsnn", "codes": codes})
    for program, x, got in zip(programs, inputs, node(tasks), strict=True):
        session = ReferenceSession(program)
        expected = [a.reshape(-1) for t in range(STEPS) for a in session.step(x[:, t])]
        assert got["outputs"] == np.concatenate(expected).tolist()
        state = membranes(program, session.state())
        assert {layer["name"]: layer["membranes"] for layer in got["layers"]} == state


def test_spikes_of_a_layer_are_those_that_python_counts(node, tmp_path):
    """A program whose answers are its spikes."""
    program = load(MODELS / "digits.qsnn").program
    program.outputs = tuple(n.target for n in program.neurons)
    program.metadata.pop("output_ranks", None)
    save_program(program, tmp_path / "spikes.qsnn")
    x = random_input(program, np.random.default_rng(0), 1, STEPS)
    codes = [x[0, t].reshape(-1).tolist() for t in range(STEPS)]
    (got,) = node([{"program": "spikes.qsnn", "codes": codes}])
    session = ReferenceSession(program)
    for t in range(STEPS):
        last = session.step(x[:, t])
    for layer, spikes in zip(got["layers"], last, strict=True):
        assert layer["spikes"] == spikes.reshape(-1).tolist(), layer["name"]
    assert sum(sum(layer["spikes"]) for layer in got["layers"]) > 0


@pytest.mark.parametrize("name", ["digits", "events"])
def test_networks_of_the_demo(node, tmp_path, name):
    net = load(MODELS / f"{name}.qsnn", backend="numpy")
    rng = np.random.default_rng(5)
    codes = random_input(net.program, rng, 1, net.program.timesteps)
    (tmp_path / "net.qsnn").write_bytes((MODELS / f"{name}.qsnn").read_bytes())
    steps = [codes[0, t].reshape(-1).tolist() for t in range(net.program.timesteps)]
    (got,) = node([{"program": "net.qsnn", "codes": steps}])
    assert got["outputs"] == net.integers(codes.swapaxes(0, 1))[0].reshape(-1).tolist()
    assert tuple(got["inputShape"]) == net.input_shape
    assert got["timesteps"] == net.program.timesteps


def test_same_codes_of_real_inputs(node, tmp_path):
    program = load(MODELS / "digits.qsnn").program
    rng = np.random.default_rng(3)
    halves = (rng.integers(-50, 50, 100) + 0.5) * program.input_scale
    x = np.concatenate([rng.normal(0, 2, 1 * 16 * 16 - 104), halves, [0.0, -0.0, 1e9, -1e9]])
    for metadata in ({}, {"input_gain": "0.31", "input_bias": "-0.7"}):
        program.metadata.update(metadata)
        save_program(program, tmp_path / "net.qsnn")
        (got,) = node([{"program": "net.qsnn", "real": x.tolist()}])
        with pytest.warns(UserWarning, match="clipped"):
            expected = DeployedModel(program).codes(x.reshape(1, 16, 16))
        assert got["codes"] == expected.reshape(-1).tolist()


def test_damaged_files_are_refused(node, tmp_path):
    """Every change of a byte; and files that are whole but hold no valid program."""
    good = dump_program(random_program(3))
    rng = np.random.default_rng(0)
    broken = [b"", b"\0" * 8, good[:100], good[:-1], good + b"\0"]
    for at in rng.integers(0, len(good), 60):
        changed = bytearray(good)
        changed[at] ^= 1 << int(rng.integers(0, 8))
        broken.append(bytes(changed))
    for k, content in enumerate(broken):
        (tmp_path / f"{k}.qsnn").write_bytes(content)
    answers = node([{"program": f"{k}.qsnn"} for k in range(len(broken))])
    length = 8 + int.from_bytes(good[:8], "little")
    for content, answer in zip(broken, answers, strict=True):
        # Padding of the header is the only part of a file that no checksum covers.
        same = len(content) == len(good) and content[:length].rstrip() == good[:length].rstrip()
        assert "refused" in answer or (same and content[length:] == good[length:]), answer


HOSTILE = {
    "a source that is not there": lambda d: d["ops"][0].update(source=99),
    "a negative source": lambda d: d["ops"][0].update(source=-1),
    "written twice": lambda d: d["ops"][-1].update(target=d["ops"][0]["target"]),
    "a huge value": lambda d: d["values"][1].__setitem__(1, [65536, 65536, 1]),
    "a fraction of a pixel": lambda d: d["values"][1].__setitem__(1, [1.5, 1, 1]),
    "too many bit planes": lambda d: d["values"][0].__setitem__(2, 17),
    "an output that is not there": lambda d: d.update(outputs=[500]),
    "no outputs": lambda d: d.update(outputs=[]),
    "a range beyond 16 bits": lambda d: d.update(input_range=[-40000, 40000]),
    "an unknown operation": lambda d: d["ops"][0].update(op="constructor"),
    "one field too many": lambda d: d["ops"][0].update(extra=1),
    "impossible ranks": lambda d: d["metadata"].update(output_ranks="9"),
    "no time steps": lambda d: d.update(timesteps=0),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_invalid_programs_are_refused(node, tmp_path, name, monkeypatch):
    """Files with a sound checksum, as someone would write them on purpose."""
    from qsnn_ext.deploy import fileformat

    program = random_program(3)
    real = json.dumps

    def dumps(d, **options):
        if isinstance(d, dict) and "ops" in d:
            HOSTILE[name](d)
        return real(d, **options)

    monkeypatch.setattr(fileformat.json, "dumps", dumps)
    content = dump_program(program)
    monkeypatch.undo()
    (tmp_path / "bad.qsnn").write_bytes(content)
    (answer,) = node([{"program": "bad.qsnn"}])
    assert "refused" in answer
    assert "checksum" not in answer["refused"]
    with pytest.raises(Exception, match=r"."):
        load(tmp_path / "bad.qsnn")


OPEN, CLOSED = "[" * 200_000, "]" * 200_000
NESTED = {
    "objects in a tensor": '"t": ' + '{"a":' * 200_000 + "1" + "}" * 200_000,
    "lists in a tensor": f'"t": {OPEN}1{CLOSED}',
    "lists for a type": f'"t": {{"dtype": {OPEN}1{CLOSED}}}',
}


@pytest.mark.parametrize("name", NESTED)
def test_deeply_nested_headers_are_refused(node, tmp_path, name):
    metadata = json.dumps({"format": "qsnn", "version": "2", "program": "{}", "sha256": ""})
    header = f'{{"__metadata__": {metadata}, {NESTED[name]}}}'.encode()
    (tmp_path / "bad.qsnn").write_bytes(len(header).to_bytes(8, "little") + header)
    (answer,) = node([{"program": "bad.qsnn"}])
    assert "refused" in answer


MISTAKES = {
    "session.step(null)": "step takes an array of numbers",
    "session.step()": "step takes an array of numbers",
    "session.step(new Float32Array(256).fill(0.5))": "code 0.5 is not one of",
    "session.spikes('length')": "there is no layer length",
    "session.spikes(1.5)": "there is no layer 1.5",
    "model.codes(null)": "codes takes an array of numbers",
    "model.codes('a')": "codes takes an array of numbers",
    "model.codes([])": "input of 0 numbers",
    "model.integers(undefined)": "integers takes an array of numbers",
    "model.integers(new Int32Array(100))": "100 codes; this program takes 256",
    "model.pixelTable()": "mean undefined must be finite",
    "model.pixelTable(0, 0)": "std 0 finite and positive",
    "model.pixelTable(0, 1, 1)": "there is no channel 1; the input has 1",
    "loadWith(file)": "load needs the engine that compileEngine gives",
    "loadWith(file, {})": "load needs the engine that compileEngine gives",
}


def test_mistakes_in_use_are_answered(built):
    if shutil.which("node") is None:
        pytest.skip("node is not installed: apt-get install nodejs")
    calls = ",\n".join(f"() => {call}" for call in MISTAKES)
    script = f"""
        import {{ readFile }} from "node:fs/promises";
        import {{ QSNNError, load }} from "./index.js";
        import {{ load as loadWith }} from "./src/model.js";
        const file = await readFile(process.argv[1]);
        const model = await load(file), session = model.session();
        const said = (call) => {{
          try {{ call(); return "nothing"; }} catch (error) {{
            return error instanceof QSNNError ? error.message : String(error.stack);
          }}
        }};
        const zeros = new Int32Array(256), last = model.integers(zeros).at(-1)[0];
        console.log(JSON.stringify({{
          said: [{calls}].map(said),
          same: String(model.integers([...zeros]).at(-1)[0]) === String(last),
        }}));
    """
    done = subprocess.run(
        ["node", "--input-type=module", "-e", script, str(MODELS / "digits.qsnn")],
        cwd=built, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    for (call, expected), answer in zip(MISTAKES.items(), got["said"], strict=True):
        assert expected in answer, call
    assert got["same"]


def test_a_runtime_that_could_not_be_read_is_asked_for_again(built):
    """In a browser: the server is away, answers with an error page, then works."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed: apt-get install nodejs")
    script = """
        import { readFile } from "node:fs/promises";
        import { register } from "node:module";
        // The package as if it had been served: its own address is no file's.
        const root = new URL("file://" + process.cwd() + "/");
        const hooks = `export async function load(url, context, next) {
          if (!url.endsWith("/index.js")) return next(url, context);
          const given = await next(url, context);
          return { ...given, source: String(given.source).replaceAll(
            "import.meta.url", "'https://example.org/qsnn/index.js'") };
        }`;
        register(`data:text/javascript,${encodeURIComponent(hooks)}`);
        let mode = "away";
        globalThis.fetch = async (url) => {
          if (mode === "away") throw new TypeError("fetch failed");
          if (mode === "error page") return new Response("<html>", { status: 404 });
          return new Response(await readFile(new URL(String(url).slice(25), root)));
        };
        const { QSNNError, load } = await import(new URL("index.js", root));
        const file = await readFile(process.argv[1]), said = [];
        for (mode of ["away", "error page", "works"])
          said.push(await load(file).then((m) => m.timesteps, (e) => `${e.name}: ${e.message}`));
        console.log(JSON.stringify(said));
    """
    done = subprocess.run(
        ["node", "--input-type=module", "-e", script, str(MODELS / "digits.qsnn")],
        cwd=built, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    away, page, works = json.loads(done.stdout)
    assert away == "TypeError: fetch failed"
    assert page.startswith("QSNNError: the runtime https://example.org/qsnn/dist/")
    assert page.endswith("cannot be read: status 404")
    assert works == 4


def test_declarations_name_what_the_module_exports():
    """index.d.ts and the sources have the same classes, methods and functions."""
    declared = (JS / "index.d.ts").read_text()
    model = (JS / "src" / "model.js").read_text()
    for name in ("Model", "Session"):
        body = re.search(rf"class {name} \{{(.*?)^\}}", declared, re.S | re.M)[1]
        methods = set(re.findall(r"^  (\w+)\(", body, re.M))
        source = re.search(rf"^export class {name} \{{(.*?)^\}}", model, re.S | re.M)[1]
        written = set(re.findall(r"^  (\w+)\(.*\{$", source, re.M)) - {"constructor"}
        assert methods == written, name
    assert {"load", "compileEngine"} <= set(re.findall(r"export function (\w+)", declared))


def test_the_package_is_complete(built):
    package = json.loads((JS / "package.json").read_text())
    for name in package["files"]:
        assert (JS / name).exists(), name
    for name, limit in (("qsnn.wasm", 60_000), ("qsnn-simd.wasm", 60_000)):
        assert 10_000 < (JS / "dist" / name).stat().st_size < limit


def test_mistakes_are_answered(built):
    """A name in place of a file's bytes, bytes of no file, a layer that is not there."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed: apt-get install nodejs")
    script = """
        import { readFile } from "node:fs/promises";
        import { load } from "./index.js";
        const said = async (call) => {
          try { await call(); } catch (error) { return `${error.name}: ${error.message}`; }
        };
        const file = await readFile(process.argv[1]);
        const session = (await load(file)).session();
        console.log(JSON.stringify([
          await said(() => load("net.qsnn")), await said(() => load(undefined)),
          await said(() => load(new ArrayBuffer(3))), await said(() => session.spikes(99)),
          await said(() => session.membranes(-1)),
          (await load(new Uint8Array(file).buffer)).timesteps,
        ]));
    """
    done = subprocess.run(
        ["node", "--input-type=module", "-e", script, str(MODELS / "digits.qsnn")],
        cwd=built, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name, nothing, short, spikes, membranes, steps = json.loads(done.stdout)
    for answer in (name, nothing):
        assert answer.startswith("QSNNError: load takes the bytes of a file")
    assert short == "QSNNError: it is too short to be a .qsnn file"
    assert spikes == "QSNNError: there is no layer 99; model.layers has 8"
    assert membranes == "QSNNError: there is no layer -1; model.layers has 8"
    assert steps == 4
