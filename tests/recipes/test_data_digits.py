"""scikit-learn's digits as images and before the simulated camera, and the two entry points."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier
from torch.utils.data import DataLoader

from qsnn_ext.errors import ConfigError, DataError
from recipes.data import NAMES, DataSpec, collate_frames, datasets, digits, seed_worker, spec
from recipes.data.__main__ import main
from recipes.data.camera import Camera


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="session")
def events(root):
    return datasets("digits-events", root, augment=False)


# --- entry points --------------------------------------------------------------------------------


def test_specs():
    assert spec("cifar100") == DataSpec("cifar100", 100, 3, (32, 32), False, None)
    assert spec("dvsgesture") == DataSpec("dvsgesture", 11, 2, (48, 48), True, 16)
    assert spec("digits", size=32).size == (32, 32)
    assert spec("digits-events", size=24, steps=6).steps == 6
    assert len(NAMES) == 9


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar", {}, "unknown data set 'cifar': use one of cifar10"),
        ("cifar10", {"size": 64}, "leave size away"),
        ("cifar10", {"steps": 4}, "no frames: leave steps away"),
        ("digits", {"size": 4}, "at least 8"),
        ("dvsgesture", {"steps": 0}, "at least 1"),
    ],
)
def test_options_that_a_data_set_does_not_have(tmp_path, name, options, message):
    with pytest.raises(ConfigError, match=message):
        spec(name, **options)
    with pytest.raises(ConfigError, match=message):
        datasets(name, tmp_path, **options)


def test_a_file_is_no_data_directory(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(DataError, match="is a file: name a directory"):
        datasets("digits", tmp_path / "x")


@pytest.mark.parametrize("name", ["digits", "digits-events"])
def test_items_are_what_the_spec_says(root, name):
    wanted = spec(name)
    for dataset in datasets(name, root):
        x, label = dataset[0]
        shape = (wanted.channels, *wanted.size)
        assert x.shape == ((wanted.steps, *shape) if wanted.events else shape)
        assert x.dtype == torch.float32
        assert isinstance(label, int)


# --- images --------------------------------------------------------------------------------------


def test_split_is_fixed_stratified_and_complete():
    train, test = digits.split()
    assert (len(train), len(test)) == (1347, 450)
    assert sorted([*train, *test]) == list(range(1797))
    again, _ = digits.split()
    assert (train == again).all()
    labels = load_digits().target
    for label in range(10):
        share = (labels[test] == label).sum() / (labels == label).sum()
        assert share == pytest.approx(450 / 1797, abs=0.01)


@pytest.mark.parametrize("size", [8, 16, 32])
def test_images_are_the_digits_normalised(root, size):
    train, test = datasets("digits", root, size=size, augment=False)
    pixels = torch.stack([train[i][0] for i in range(len(train))])
    assert pixels.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert pixels.std().item() == pytest.approx(1.0, abs=1e-5)
    _, indices = digits.split()
    for position in (0, 200, 449):
        image, label = test[position]
        original = load_digits().images[indices[position]]
        small = torch.nn.functional.adaptive_avg_pool2d(image, 8)[0].numpy()
        assert np.corrcoef(small.ravel(), original.ravel())[0, 1] > 0.97
        assert label == load_digits().target[indices[position]]


def test_augmentation_moves_the_digit_a_little(root):
    torch.manual_seed(0)
    train, test = datasets("digits", root)
    plain, _ = datasets("digits", root, augment=False)
    moved = torch.stack([train[7][0] for _ in range(50)])
    assert moved.flatten(1).unique(dim=0).shape[0] > 40
    # What is uncovered is background, so nothing is darker than the darkest pixel there was.
    assert moved.min() >= plain[7][0].min() - 1e-5
    likeness = [np.corrcoef(m.ravel(), plain[7][0].ravel())[0, 1] for m in moved.numpy()]
    assert np.mean(likeness) > 0.5
    assert torch.equal(test[7][0], test[7][0])


# --- the camera ----------------------------------------------------------------------------------


def slow_pixel(light, threshold, step):
    """One pixel, one event at a time: the definition of the sensor."""
    reference, events = light[0], []
    for index in range(1, len(light)):
        before, now = light[index - 1], light[index]
        while abs(now - reference) >= threshold:
            sign = 1 if now > reference else -1
            reference += sign * threshold
            fraction = (reference - before) / (now - before)
            events.append((int((index - 1 + min(max(fraction, 0), 1)) * step), sign > 0))
    return sorted(events)


def test_events_equal_the_definition_of_the_sensor():
    rng = np.random.default_rng(0)
    camera = Camera(size=3)
    steps = 3 * camera.substeps
    light = np.cumsum(rng.normal(0, 0.5, (4, steps + 1, 3, 3)), axis=1)
    threshold = np.full((4, 3, 3), 0.4) * rng.uniform(0.9, 1.1, (4, 3, 3))
    sample, x, y, t, p = camera._crossings(light, threshold)
    total = 0
    for n in range(4):
        for row in range(3):
            for column in range(3):
                mine = (sample == n) & (y == row) & (x == column)
                expected = slow_pixel(
                    light[n, :, row, column], threshold[n, row, column], camera.saccade / 20
                )
                found = sorted(zip(t[mine].tolist(), (p[mine] == 1).tolist(), strict=True))
                assert [q for _, q in found] == [q for _, q in expected]
                np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], atol=1)
                total += len(found)
    assert total > 500


def test_the_sensor_sees_the_picture_from_where_the_gaze_is():
    rng = np.random.default_rng(1)
    camera = Camera(size=12)
    pictures = rng.uniform(size=(2, 9, 9))
    gaze = rng.uniform(-2, 2, (2, 4, 2))
    gaze[0, 0] = (0.0, -1.0)
    seen = camera._see(pictures, gaze)
    # A centred 9x9 picture on 12 pixels begins at pixel 1; one pixel further when looking left.
    np.testing.assert_allclose(seen[0, 0, 1:10, 2:11], pictures[0])
    for n in range(2):
        for step in range(4):
            rows, columns = (np.arange(12) - 1 + offset for offset in gaze[n, step])
            grid = np.meshgrid(rows, columns, indexing="ij")
            padded = np.pad(pictures[n], 8)
            expected = map_coordinates(padded, [axis + 8 for axis in grid], order=1)
            np.testing.assert_allclose(seen[n, step], expected, atol=1e-12)


def test_a_dark_picture_gives_noise_only():
    camera = Camera(size=16, noise=2.0)
    recordings = camera.record(np.zeros((50, 8, 8)))
    expected = 2.0 * 16 * 16 * 0.3
    assert np.mean([len(e) for e in recordings]) == pytest.approx(expected, rel=0.1)
    assert not len(Camera(size=16, noise=0.0).record(np.zeros((1, 8, 8)))[0])


def test_what_leaves_a_pixel_comes_back():
    """The gaze returns to where it began, so ON and OFF events of a pixel balance."""
    camera = Camera(size=24, noise=0.0)
    (events,) = camera.record(digits.pictures(14)[:1, 0].numpy())
    assert len(events) > 200
    balance = np.zeros((24, 24), int)
    np.add.at(balance, (events["y"], events["x"]), np.where(events["p"], 1, -1))
    assert np.abs(balance).max() <= 1  # one threshold of hysteresis may remain
    assert (np.diff(events["t"]) >= 0).all()
    assert events["t"].min() >= 0
    assert events["t"].max() <= camera.duration


def test_recordings_depend_on_index_and_seed_only():
    camera = Camera(size=16)
    pictures = digits.pictures(12)[:3, 0].numpy()
    first = camera.record(pictures, seed=1)
    for a, b in zip(first, camera.record(pictures, seed=1), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first[0], camera.record(pictures[:1], seed=1)[0])
    assert (
        len(first[0]) != len(camera.record(pictures, seed=2)[0])
        or (first[0] != camera.record(pictures, seed=2)[0]).any()
    )


def test_events_show_the_digits(events):
    """A linear classifier on the events of all steps tells the digits apart."""
    train, test = events
    x, y = train.frames.sum(1).reshape(1347, -1), train.labels
    classifier = RidgeClassifier(alpha=1000.0).fit(x, y)
    assert classifier.score(test.frames.sum(1).reshape(450, -1), test.labels) > 0.85


def test_events_are_cached_by_their_parameters(tmp_path, few_digits):

    def load(**options):
        digits.recordings.cache_clear()
        return datasets("digits-events", tmp_path, size=12, augment=False, **options)[0]

    first = load()
    (path,) = (tmp_path / "cache").glob("digits-events-*.npz")
    before = path.stat().st_mtime_ns
    np.testing.assert_array_equal(load().frames, first.frames)
    assert path.stat().st_mtime_ns == before
    # A damaged cache is simulated anew.
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    np.testing.assert_array_equal(load().frames, first.frames)
    assert len(path.read_bytes()) == len(whole)
    # Other numbers of frames share the events.
    assert load(steps=3).frames.sum() == first.frames.sum()
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_repeats_with_the_same_seed(root, workers):
    train, _ = datasets("digits-events", root)

    def batch(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        loader = DataLoader(
            train,
            16,
            shuffle=True,
            num_workers=workers,
            collate_fn=collate_frames,
            worker_init_fn=seed_worker,
            generator=torch.Generator().manual_seed(seed),
        )
        frames, labels = next(iter(loader))
        assert frames.shape == (10, 16, 2, 32, 32)
        assert labels.dtype == torch.int64
        return frames

    first = batch(5)
    assert torch.equal(first, batch(5))
    assert not torch.equal(first, batch(6))


# --- looking at the data -------------------------------------------------------------------------


def test_command_line_draws_samples(root, tmp_path, capsys):
    for name, size in (("digits", (540, 54)), ("digits-events", (966, 306))):
        png = tmp_path / "new" / f"{name}.png"
        assert main([name, "--data-dir", str(root), "--png", str(png), "--samples", "3"]) == 0
        assert Image.open(png).size == size
    assert "1,347 training and 450 test samples" in capsys.readouterr().out


def test_command_line_says_what_is_missing(tmp_path, capsys):
    assert main(["dvsgesture", "--data-dir", str(tmp_path)]) == 1
    assert "error: DVS-Gesture was not found" in capsys.readouterr().err
