"""The demo page in headless Chromium: draws, answers, shows; all in integers that Python gives too.

``QSNN_PICTURES=docs/img pytest tests/js/test_page.py`` writes the pictures that the documentation
shows.
"""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsnn_ext.deploy import load, pixel_table
from qsnn_ext.deploy.program import Conv
from qsnn_ext.deploy.reference import ReferenceSession
from recipes.data import datasets
from recipes.data.batches import BatchTransform
from tests.js.browser import Browser, chromium
from tests.js.conftest import JS, load_module
from tests.js.test_module import MODELS, membranes
from tests.recipes.archives import make_cifar

PAGE = JS.parent / "docs" / "demo"
BUILD = load_module(PAGE / "build.py")
CIFAR10 = BUILD.NETWORKS["pictures"]

#: Strokes of digits as people draw them, on paper of side 1.
STROKES = {
    0: [[(0.5, 0.1), (0.25, 0.3), (0.2, 0.6), (0.4, 0.88), (0.65, 0.85), (0.8, 0.5), (0.7, 0.2),
         (0.5, 0.1)]],
    1: [[(0.3, 0.3), (0.5, 0.1), (0.5, 0.9)]],
    2: [[(0.25, 0.25), (0.5, 0.1), (0.72, 0.3), (0.6, 0.55), (0.25, 0.88), (0.78, 0.88)]],
    3: [[(0.25, 0.15), (0.6, 0.12), (0.7, 0.3), (0.45, 0.48), (0.7, 0.65), (0.6, 0.88),
         (0.25, 0.85)]],
    4: [[(0.55, 0.1), (0.2, 0.6), (0.8, 0.6)], [(0.62, 0.4), (0.6, 0.92)]],
    5: [[(0.72, 0.12), (0.3, 0.12), (0.27, 0.45), (0.55, 0.42), (0.75, 0.6), (0.65, 0.85),
         (0.25, 0.88)]],
    6: [[(0.65, 0.12), (0.35, 0.4), (0.25, 0.7), (0.45, 0.9), (0.7, 0.75), (0.55, 0.55),
         (0.28, 0.65)]],
    7: [[(0.2, 0.12), (0.78, 0.12), (0.45, 0.9)], [(0.35, 0.5), (0.8, 0.5)]],
    8: [[(0.7, 0.22), (0.5, 0.1), (0.3, 0.25), (0.7, 0.65), (0.55, 0.9), (0.3, 0.75), (0.7, 0.3)]],
    9: [[(0.7, 0.3), (0.5, 0.12), (0.3, 0.28), (0.45, 0.48), (0.7, 0.35), (0.68, 0.9)]],
}  # fmt: skip


@pytest.fixture(scope="module")
def page(built):
    BUILD.build()
    program = chromium()
    if program is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    browser = Browser(program)
    yield browser
    browser.close()


@pytest.fixture
def demo(page):
    page.window(1280, 900, dark=False)
    page.open((PAGE / "index.html").as_uri())
    page.wait("window.demo")
    page.problems.clear()
    yield page
    assert page.problems == []


def state(browser):
    return browser.evaluate("window.demo.state()")


def draw(browser, digit):
    browser.evaluate("document.getElementById('clear').click()")
    box = browser.evaluate("document.getElementById('paper').getBoundingClientRect().toJSON()")
    for stroke in STROKES[digit]:
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        browser.mouse("mousePressed", *points[0])
        for point in points[1:]:
            browser.mouse("mouseMoved", *point)
        browser.mouse("mouseReleased", *points[-1])


def card(name):
    return json.loads((MODELS / f"{name}.json").read_text())


def expect(got, codes, path):
    """What the page shows of a run, against the NumPy reference."""
    program = load(path).program
    session = ReferenceSession(program)
    layer, neuron = got["chosen"]["layer"], got["chosen"]["neuron"]
    total = 0
    for t, step in enumerate(got["answers"]):
        (answer,) = session.step(codes[t][None])
        assert step == answer.reshape(-1).tolist(), t
        total = total + answer.reshape(-1)
        levels = membranes(program, session.state())[program.neurons[layer].name]
        assert got["membranes"][t] == levels[neuron], t
    assert len(got["answers"]) == program.timesteps
    assert got["answer"] == json.loads(program.metadata["classes"])[int(np.argmax(total))]


def digit_codes(pixels):
    net = load(MODELS / "digits.qsnn")
    table = pixel_table(net.program, card("digits")["mean"], card("digits")["std"])
    codes = table[0][np.asarray(pixels)].reshape(1, 16, 16).astype(np.int32)
    return [codes] * net.program.timesteps


@pytest.mark.parametrize("digit", STROKES)
def test_a_drawn_digit(demo, digit):
    draw(demo, digit)
    got = state(demo)
    expect(got, digit_codes(got["pixels"]), MODELS / "digits.qsnn")
    assert got["answer"] == str(digit)
    assert all(n > 0 for step in got["spikes"][1:] for n in step)


def test_answers_at_every_stroke(demo):
    demo.evaluate("document.getElementById('clear').click()")
    assert state(demo)["answers"] is None
    box = demo.evaluate("document.getElementById('paper').getBoundingClientRect().toJSON()")
    seen = []
    for y in (0.2, 0.5, 0.8):
        kind = "mouseMoved" if seen else "mousePressed"
        demo.mouse(kind, box["x"] + box["width"] / 2, box["y"] + y * box["height"])
        got = state(demo)
        expect(got, digit_codes(got["pixels"]), MODELS / "digits.qsnn")
        seen.append(got["pixels"])
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize("digit", range(10))
def test_examples(demo, digit):
    demo.key(str(digit))
    got = state(demo)
    pixels = np.frombuffer(base64.b64decode(card("digits")["samples"][digit]), np.uint8)
    assert got["pixels"] == pixels.tolist()
    expect(got, digit_codes(got["pixels"]), MODELS / "digits.qsnn")
    assert got["answer"] == str(card("digits")["predicted"][digit])


@pytest.mark.parametrize("index", [2, 7])
def test_event_camera(demo, index):
    demo.evaluate("document.getElementById('tab-events').click()")
    demo.key(str(index))
    got = state(demo)
    assert (got["view"], got["index"]) == ("events", index)
    frames = np.frombuffer(base64.b64decode(card("events")["samples"][index]), np.uint8)
    codes = frames.reshape(card("events")["shape"]).astype(np.int32)
    expect(got, codes, MODELS / "events.qsnn")
    demo.wait("window.demo.state().shown === 3")  # it plays by itself
    demo.evaluate("document.getElementById('play').click()")
    assert state(demo)["playing"] is False


def picture_codes(pixels):
    """Codes of a picture [3, 32, 32] at every step, as the recipes normalize it."""
    card = json.loads(CIFAR10.with_suffix(".json").read_text())
    transform = BatchTransform(tuple(card["mean"]), tuple(card["std"]))
    x = transform(np.asarray(pixels, np.uint8).reshape(1, 3, 32, 32).transpose(0, 2, 3, 1), [0])
    net = load(CIFAR10)
    return list(net.codes(x.numpy())) * net.program.timesteps


def expect_picture(got, pixels):
    assert got["view"] == "pictures"
    assert got["pixels"] == np.asarray(pixels).reshape(-1).tolist()
    expect(got, picture_codes(pixels), CIFAR10)
    assert all(n > 0 for step in got["spikes"] for n in step)


def random_pixels(seed, height=32, width=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def open_file(browser, path):
    """As a visitor does who chooses a file; waits for what comes of it."""
    browser.evaluate("window.before = window.demo.state().opened")
    node = browser.call("Runtime.evaluate", expression="document.getElementById('file')")
    browser.call("DOM.setFileInputFiles", files=[str(path)], objectId=node["result"]["objectId"])
    browser.wait("window.demo.state().opened > window.before && !window.demo.state().opening")
    return state(browser)


def refusal(browser):
    shown = browser.evaluate("!document.getElementById('refused').hidden")
    return browser.evaluate("document.getElementById('refused').textContent") if shown else None


def image_on_page(browser):
    """What is painted of the picture: [32, 32, 4]."""
    context = "document.getElementById('picture').getContext('2d')"
    return np.array(browser.evaluate(f"[...{context}.getImageData(0, 0, 32, 32).data]")).reshape(
        32, 32, 4
    )


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (160, 100), (20, 30)])
def test_a_picture_of_ones_own(demo, tmp_path, height, width):
    """The middle is cut out and every pixel is the mean of what it covers; then all is exact."""
    pixels = random_pixels(height, height, width)
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    got = open_file(demo, tmp_path / "mine.png")
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side].astype(float)
    # Each pixel as 32 x 32, so that every part is whole blocks of side x side.
    square = square.repeat(32, 0).repeat(32, 1)
    means = square.reshape(32, side, 32, side, 3).mean((1, 3)).transpose(2, 0, 1)
    seen = np.array(got["pixels"]).reshape(3, 32, 32)
    assert np.abs(seen - means).max() <= 0.5 + 1e-6
    expect_picture(got, seen)
    assert (got["source"], got["truth"], got["tally"]) == ("mine.png", None, None)
    painted = image_on_page(demo)
    assert (painted[..., 3] == 255).all()
    assert np.array_equal(painted[..., :3].transpose(2, 0, 1), seen)


def test_a_large_photo_and_a_transparent_picture(demo, tmp_path):
    y, x = np.mgrid[0:1500, 0:2100]
    photo = np.stack([y * 255 // 1500, x * 255 // 2100, (x + y) // 15], -1).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.jpg", quality=95)
    got = open_file(demo, tmp_path / "photo.jpg")
    box = Image.open(tmp_path / "photo.jpg").crop((300, 0, 1800, 1500)).resize((32, 32), Image.BOX)
    seen = np.array(got["pixels"]).reshape(3, 32, 32)
    assert np.abs(seen - np.asarray(box).transpose(2, 0, 1).astype(int)).max() <= 4
    expect_picture(got, seen)
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "nothing.png")
    assert set(open_file(demo, tmp_path / "nothing.png")["pixels"]) == {255}


GIVEN = {"drop": ("DragEvent", "dataTransfer"), "paste": ("ClipboardEvent", "clipboardData")}


@pytest.mark.parametrize("how", GIVEN)
def test_a_picture_is_dropped_or_pasted(demo, how):
    pixels = random_pixels(7)
    kind, field = GIVEN[how]
    send = f"document.body.dispatchEvent(new {kind}('{how}', {{ {field}: x, bubbles: true }}))"
    demo.evaluate(
        f"""(async () => {{
          const x = new DataTransfer();
          const bytes = await (await fetch("data:image/png;base64,{BUILD.png(pixels)}")).blob();
          x.items.add(new File([bytes], "given.png", {{ type: "image/png" }}));
          {send};
        }})()"""
    )
    demo.wait("window.demo.state().source === 'given.png'")
    expect_picture(state(demo), pixels.transpose(2, 0, 1))
    demo.evaluate(f"(() => {{ const x = new DataTransfer(); {send}; }})()")
    demo.wait("!document.getElementById('refused').hidden")
    assert "no file" in refusal(demo)


def test_records_of_the_binary_version(demo, tmp_path):
    """Two records: each answer is Python's, its label stands beside it, right ones are counted."""
    net = load(CIFAR10)
    pictures = [random_pixels(seed).transpose(2, 0, 1) for seed in (1, 2)]
    codes = [np.stack(picture_codes(p))[:, None] for p in pictures]
    said = [int(net.integers(c)[0].sum(0).reshape(-1).argmax()) for c in codes]
    labels = [said[0], (said[1] + 1) % 10]  # the first is right, the second is not
    content = b"".join(bytes([k]) + p.tobytes() for k, p in zip(labels, pictures, strict=True))
    (tmp_path / "two.bin").write_bytes(content)
    got = open_file(demo, tmp_path / "two.bin")
    expect_picture(got, pictures[0])
    assert (got["index"], got["truth"], got["tally"]) == (0, labels[0], [1, 1])
    assert demo.evaluate("document.getElementById('previous').disabled")
    demo.evaluate("document.getElementById('next').focus()")
    demo.key("Enter")
    got = state(demo)
    expect_picture(got, pictures[1])
    assert (got["index"], got["truth"], got["tally"]) == (1, labels[1], [1, 2])
    assert demo.evaluate("document.getElementById('next').disabled")
    demo.evaluate(
        "((s) => { s.value = 2; s.dispatchEvent(new Event('input')); })"
        "(document.getElementById('step'))"
    )
    text = demo.evaluate("document.querySelector('.truth').innerText")
    assert f"labeled {json.loads(net.program.metadata['classes'])[labels[1]]}: wrong" in text
    assert "1 of 2 right (50.0 %)" in text
    # Anew, and all at once.
    assert open_file(demo, tmp_path / "two.bin")["tally"] == [1, 1]
    demo.evaluate("document.getElementById('all').click()")
    demo.wait("!window.demo.state().testing")
    assert state(demo)["tally"] == [1, 2]
    demo.evaluate(
        "((r) => { r.value = 99; r.dispatchEvent(new Event('change')); })"
        "(document.getElementById('record'))"
    )
    assert state(demo)["index"] == 1  # the last
    # A picture of one's own has no label; the count is there again when a record is.
    Image.fromarray(random_pixels(3)).save(tmp_path / "mine.png")
    got = open_file(demo, tmp_path / "mine.png")
    assert (got["truth"], got["tally"]) == (None, None)
    demo.evaluate("document.getElementById('all').click()")
    demo.wait("!window.demo.state().testing")
    assert state(demo)["tally"] == [1, 2]
    assert state(demo)["source"] == "two.bin"


RECORD = bytes([3]) + bytes(3072)
REFUSED = {
    "empty.bin": (b"", "empty.bin has 0 bytes"),
    "short.bin": (2 * RECORD[:-1], "short.bin has 6,144 bytes"),
    "long.bin": (RECORD + b"\0", "long.bin has 3,074 bytes"),
    "labels.bin": (RECORD + b"\x0a" + RECORD[1:], "labels.bin is damaged or no file of CIFAR-10"),
    "test_batch.bin": (2 * RECORD, "test_batch.bin has 6,146 bytes, but CIFAR-10's"),
    "words.png": (b"no picture", "words.png cannot be read as a picture"),
    "cut.png": (base64.b64decode(BUILD.png(random_pixels(0)))[:40], "cut.png cannot be read"),
    "archive.tar.gz": (b"\x1f\x8b\x08", "archive.tar.gz cannot be read as a picture"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(demo, tmp_path, name):
    """By name, with what was on show left as it was."""
    Image.fromarray(random_pixels(3)).save(tmp_path / "mine.png")
    before = open_file(demo, tmp_path / "mine.png")
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    after = open_file(demo, tmp_path / name)
    assert message in refusal(demo)
    assert (after["pixels"], after["answer"]) == (before["pixels"], before["answer"])
    open_file(demo, tmp_path / "mine.png")
    assert refusal(demo) is None


def test_without_pictures_it_says_how_to_get_them(demo):
    demo.evaluate("document.getElementById('tab-pictures').click()")
    assert state(demo)["answers"] is None
    hint = demo.evaluate("document.getElementById('hint').innerText")
    assert "test_batch.bin" in hint
    assert "make demo-web DATA_DIR" in hint


def counts(browser):
    """Bits and bytes: name -> what is said."""
    return browser.evaluate(
        "Object.fromEntries([...document.querySelectorAll('#counts dl div')]"
        ".map((row) => [row.children[0].textContent, row.children[1].textContent]))"
    )


@pytest.mark.parametrize("name", BUILD.NETWORKS)
def test_counts_are_those_of_the_network_on_show(demo, tmp_path, name):
    """With nothing to look at too: the view of pictures begins so."""
    for other in ("digits", "events", name):
        demo.evaluate(f"document.getElementById('tab-{other}').click()")
    program = load(BUILD.NETWORKS[name]).program
    weights = {True: 0, False: 0}
    for op in program.ops:
        if isinstance(op, Conv):
            _, rows, _ = op.weight.shape
            weights[op.binary] += rows * program.values[op.target].shape[0]
    got = counts(demo)
    assert got["1-bit weights"] == f"{weights[True]:,}"
    assert got["8-bit weights (first and last layer)"] == f"{weights[False]:,}"
    assert got["file with everything"] == f"{BUILD.NETWORKS[name].stat().st_size:,} bytes"
    neurons = sum(program.values[n.target].elements for n in program.neurons)
    assert got["membrane potentials"] == f"{neurons:,} × 2 bits = {neurons // 4:,} bytes"
    if name == "digits":
        demo.evaluate("document.getElementById('clear').click()")
    if name != "events":
        assert counts(demo)["spikes for this answer"] == "–"
        assert counts(demo)["time for this answer"] == "–"


def test_pictures_that_lie_beside_the_page(page, tmp_path):
    """Twenty, as ``make demo-web DATA_DIR=...`` writes them; here they are of chance."""
    for name in BUILD.PAGE:
        (tmp_path / name).write_text((PAGE / name).read_text())
    images = [random_pixels(seed) for seed in range(20)]
    given = {"samples": [BUILD.png(image) for image in images], "labels": [*range(10)] * 2}
    (tmp_path / "pictures.js").write_text(BUILD.pictures_script(given))
    page.window(1280, 900, dark=False)
    page.open((tmp_path / "index.html").as_uri())
    page.wait("window.demo")
    page.evaluate("document.getElementById('tab-pictures').click()")
    got = state(page)
    expect_picture(got, images[0].transpose(2, 0, 1))
    assert (got["index"], got["truth"]) == (0, 0)
    assert "DATA_DIR" not in page.evaluate("document.getElementById('hint').innerText")
    page.key("7")
    expect_picture(state(page), images[7].transpose(2, 0, 1))
    page.evaluate("document.querySelectorAll('.examples button')[13].click()")
    got = state(page)
    expect_picture(got, images[13].transpose(2, 0, 1))
    assert (got["truth"], got["tally"][1]) == (3, 3)
    # Another view and back: the same picture.
    page.evaluate("document.getElementById('tab-digits').click()")
    assert state(page)["view"] == "digits"
    page.evaluate("document.getElementById('tab-pictures').click()")
    expect_picture(state(page), images[13].transpose(2, 0, 1))


def test_pictures_are_chosen_by_chance(tmp_path):
    """Two of each class, whatever the network says of them; any copy of the data set gives them."""
    labels = np.random.default_rng(0).integers(0, 10, 500).tolist()
    picked = BUILD.chosen(labels)
    assert [labels[i] for i in picked] == [*range(10)] * 2
    assert len(set(picked)) == 20
    assert picked == BUILD.chosen(labels) != BUILD.chosen(labels, seed=1)
    facts = make_cifar("cifar10", tmp_path, per_batch=100)
    got = BUILD.cifar_pictures(tmp_path, facts)
    assert got["labels"] == [*range(10)] * 2
    _, test = datasets("cifar10", tmp_path, facts=facts, augment=False)
    for sample, i in zip(got["samples"], BUILD.chosen(test.labels), strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(sample)))
        assert np.array_equal(np.asarray(image), test.images[i])


def test_by_keyboard_alone(demo):
    """Draws a one with the arrow keys, and looks at another neuron."""
    demo.evaluate("document.getElementById('clear').click()")
    demo.evaluate("document.getElementById('paper').focus()")
    for key in ["ArrowUp"] * 10 + [" "] + ["ArrowDown"] * 20 + [" "]:
        demo.key(key)
    got = state(demo)
    expect(got, digit_codes(got["pixels"]), MODELS / "digits.qsnn")
    assert got["answer"] == "1"
    demo.key("n")
    assert state(demo)["chosen"]["neuron"] == got["chosen"]["neuron"] + 1
    demo.key("l")
    assert state(demo)["chosen"]["layer"] == got["chosen"]["layer"] + 1
    demo.key("Delete")
    assert state(demo)["answers"] is None


def test_a_neuron_is_chosen_with_the_mouse(demo):
    box = demo.evaluate(
        "document.querySelectorAll('#layers canvas')[0].getBoundingClientRect().toJSON()"
    )
    # Three by three channels of 16 x 16 with a line between: channel 1, row 2, column 5.
    x, y = (17 + 5.5) / 50 * box["width"], 2.5 / 50 * box["height"]
    demo.evaluate("window.scrollTo(0, 0)")
    for kind in ("mousePressed", "mouseReleased"):
        demo.mouse(kind, box["x"] + x, box["y"] + y)
    assert state(demo)["chosen"] == {"layer": 0, "neuron": 256 + 2 * 16 + 5}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_pictures(page, width, dark, tmp_path):
    """Fits the window, and looks different in the dark; keeps the pictures where one asks."""
    page.window(width, 900, dark=dark, phone=width < 500)
    page.open((PAGE / "index.html").as_uri())
    page.wait("window.demo")
    draw(page, 3)
    page.evaluate("document.getElementById('play').click()")
    page.evaluate(
        "((s) => { s.value = 4; s.dispatchEvent(new Event('input')); })"
        "(document.getElementById('step'))"
    )
    assert state(page)["shown"] == 3
    assert page.evaluate("document.documentElement.scrollWidth") == width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, ground[4:-1].split(","))) < 100) == dark
    before = ground
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.evaluate("document.getElementById('theme').click()")
    asked = os.environ.get("QSNN_PICTURES")
    folder = Path(asked) if asked else tmp_path
    path = folder / f"demo-{width}-{'dark' if dark else 'light'}.png"
    page.picture(path)
    assert path.stat().st_size > 20_000
    for view in ("events", "pictures"):
        page.evaluate(f"document.getElementById('tab-{view}').click()")
        assert page.evaluate("document.documentElement.scrollWidth") == width, view
    long = tmp_path / "a-picture-whose-long-name-is-one-word.png"
    Image.fromarray(random_pixels(1)).save(long)
    open_file(page, long)
    (tmp_path / "two.bin").write_bytes(2 * RECORD)
    open_file(page, tmp_path / "two.bin")
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_says_what_to_do_without_its_bundle(page, tmp_path):
    for name in set(BUILD.PAGE) - {"bundle.js", "pictures.js"}:
        (tmp_path / name).write_text((PAGE / name).read_text())
    page.open((tmp_path / "index.html").as_uri())
    page.wait("!document.getElementById('failure').hidden")
    assert "make demo-web" in page.evaluate("document.getElementById('failure').textContent")
    page.problems.clear()


def test_the_page_is_small_and_asks_nobody(built):
    size = BUILD.build()
    assert size < 500_000
    for name in BUILD.PAGE:
        text = (PAGE / name).read_text()
        assert "http://" not in text, name
        assert "https://" not in text, name
