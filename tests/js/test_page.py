"""The demo page in headless Chromium: draws, answers, shows; all in integers that Python gives too.

``QSNN_PICTURES=docs/img pytest tests/js/test_page.py`` writes the pictures that the documentation
shows.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import numpy as np
import pytest

from qsnn_ext.deploy import load, pixel_table
from qsnn_ext.deploy.reference import ReferenceSession
from tests.js.browser import Browser, chromium
from tests.js.conftest import JS, load_module
from tests.js.test_module import MODELS, membranes

PAGE = JS.parent / "docs" / "demo"

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
    load_module(PAGE / "build.py").build()
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


def expect(got, codes, name):
    """What the page shows of a run, against the NumPy reference."""
    program = load(MODELS / f"{name}.qsnn").program
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
    assert got["answer"] == str(int(np.argmax(total)))


def digit_codes(pixels):
    net = load(MODELS / "digits.qsnn")
    table = pixel_table(net.program, card("digits")["mean"], card("digits")["std"])
    codes = table[0][np.asarray(pixels)].reshape(1, 16, 16).astype(np.int32)
    return [codes] * net.program.timesteps


@pytest.mark.parametrize("digit", STROKES)
def test_a_drawn_digit(demo, digit):
    draw(demo, digit)
    got = state(demo)
    expect(got, digit_codes(got["pixels"]), "digits")
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
        expect(got, digit_codes(got["pixels"]), "digits")
        seen.append(got["pixels"])
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize("digit", range(10))
def test_examples(demo, digit):
    demo.key(str(digit))
    got = state(demo)
    pixels = np.frombuffer(base64.b64decode(card("digits")["samples"][digit]), np.uint8)
    assert got["pixels"] == pixels.tolist()
    expect(got, digit_codes(got["pixels"]), "digits")
    assert got["answer"] == str(card("digits")["predicted"][digit])


@pytest.mark.parametrize("index", [2, 7])
def test_event_camera(demo, index):
    demo.evaluate("document.getElementById('tab-events').click()")
    demo.key(str(index))
    got = state(demo)
    assert (got["view"], got["index"]) == ("events", index)
    frames = np.frombuffer(base64.b64decode(card("events")["samples"][index]), np.uint8)
    expect(got, frames.reshape(card("events")["shape"]).astype(np.int32), "events")
    demo.wait("window.demo.state().shown === 3")  # it plays by itself
    demo.evaluate("document.getElementById('play').click()")
    assert state(demo)["playing"] is False


def test_by_keyboard_alone(demo):
    """Draws a one with the arrow keys, and looks at another neuron."""
    demo.evaluate("document.getElementById('clear').click()")
    demo.evaluate("document.getElementById('paper').focus()")
    for key in ["ArrowUp"] * 10 + [" "] + ["ArrowDown"] * 20 + [" "]:
        demo.key(key)
    got = state(demo)
    expect(got, digit_codes(got["pixels"]), "digits")
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
@pytest.mark.parametrize("width", [1280, 390])
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


def test_says_what_to_do_without_its_bundle(page, tmp_path):
    for name in ("index.html", "demo.css", "demo.js"):
        (tmp_path / name).write_text((PAGE / name).read_text())
    page.open((tmp_path / "index.html").as_uri())
    page.wait("!document.getElementById('failure').hidden")
    assert "make demo-web" in page.evaluate("document.getElementById('failure').textContent")
    page.problems.clear()


def test_the_page_is_small_and_asks_nobody(built):
    size = load_module(PAGE / "build.py").build()
    assert size < 500_000
    for name in ("index.html", "demo.css", "demo.js", "bundle.js"):
        text = (PAGE / name).read_text()
        assert "http://" not in text, name
        assert "https://" not in text, name
