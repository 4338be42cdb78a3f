"""Event files, frames and their cache: DVS-Gesture and DVS-CIFAR10 from tiny archives."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
import torch

from qsnn_ext.errors import ConfigError, DataError
from recipes.data import augment, collate_frames, datasets, dvscifar10, dvsgesture
from recipes.data.aedat import read_aedat2, read_aedat3
from recipes.data.augment import GESTURE_MIRROR, GestureAugment, NeuromorphicAugment
from recipes.data.events import EVENT, make_events, to_frames
from tests.recipes import archives


def events_of(rng, count, start=0, end=1_000_000):
    t, x, y, p = archives.random_events(rng, count, start, end)
    return make_events(x, y, t, p)


@pytest.fixture
def gesture(tmp_path):
    facts = archives.make("dvsgesture", tmp_path)
    datasets("dvsgesture", tmp_path, facts=facts)
    return tmp_path, facts


@pytest.fixture(scope="session")
def cifar_zips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dvscifar10")
    return folder, archives.make("dvscifar10", folder)


@pytest.fixture
def dvscifar(tmp_path, cifar_zips):
    shutil.copytree(cifar_zips[0], tmp_path, dirs_exist_ok=True)
    return tmp_path, cifar_zips[1]


# --- reading -------------------------------------------------------------------------------------


def test_aedat3_gives_what_was_written(tmp_path):
    rng = np.random.default_rng(1)
    t, x, y, p = archives.random_events(rng, 300, 5_000_000, 9_000_000)
    path = tmp_path / "a.aedat"
    path.write_bytes(archives.aedat3(t, x, y, p))
    events, whole = read_aedat3(path)
    assert whole
    assert events.dtype == EVENT
    for name, column in zip("txyp", (t, x, y, p), strict=True):
        np.testing.assert_array_equal(events[name], column)


def test_aedat3_adds_the_overflow_of_the_time(tmp_path):
    path = tmp_path / "a.aedat"
    content = bytearray(archives.aedat3([7], [1], [2], [1]))
    overflow = content.rindex(b"\x00\x00\x00\x00\x01\x00\x00\x00\x01")  # overflow, capacity, ...
    content[overflow] = 3
    path.write_bytes(content)
    assert read_aedat3(path)[0]["t"][0] == 7 + 3 * 2**31


def test_readers_agree_with_spikingjelly(tmp_path):
    try:
        from spikingjelly.datasets import cifar10_dvs, utils
    except (ImportError, OSError) as error:  # needs a torchaudio that fits torch
        pytest.skip(f"spikingjelly.datasets cannot be imported: {error}")
    rng = np.random.default_rng(2)
    columns = archives.random_events(rng, 500, 0, 3_000_000)
    three, two = tmp_path / "three.aedat", tmp_path / "two.aedat"
    three.write_bytes(archives.aedat3(*columns))
    two.write_bytes(archives.aedat2(*columns))
    pairs = [
        (read_aedat3(three)[0], utils.load_aedat_v3(three)),
        (read_aedat2(two), cifar10_dvs._load_origin_data(two)),
    ]
    for ours, theirs in pairs:
        for name in "xytp":
            np.testing.assert_array_equal(ours[name].astype(int), theirs[name].astype(int))
        for by in ("number", "time"):
            expected = utils.integrate_events_by_fixed_frames_number(
                {name: theirs[name].astype(np.int64) for name in "xytp"}, by, 7, 128, 128
            )
            np.testing.assert_array_equal(to_frames(ours, 7, (128, 128), by), expected)


@pytest.mark.parametrize(
    ("reader", "content", "message"),
    [
        (read_aedat2, b"", "does not begin with '#!AER-DAT2'"),
        (read_aedat2, b"#!AER-DAT2.0\r\n# no more", "cut short inside its header"),
        (read_aedat2, b"#!AER-DAT2.0\r\n", "cut short .0 bytes"),
        (read_aedat2, b"#!AER-DAT2.0\r\n" + bytes(12), "cut short .12 bytes"),
        (read_aedat2, b"#!AER-DAT3.1\r\n" + bytes(8), "does not begin with '#!AER-DAT2'"),
        (read_aedat3, b"<html>not found</html>", "does not begin with '#!AER-DAT3.1'"),
    ],
)
def test_files_that_are_no_recordings_are_refused(tmp_path, reader, content, message):
    path = tmp_path / "bad.aedat"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        reader(path)


# --- framing -------------------------------------------------------------------------------------


def test_frames_equal_a_plain_loop_and_lose_no_event():
    rng = np.random.default_rng(3)
    events = events_of(rng, 107)
    for by in ("number", "time"):
        frames = to_frames(events, 10, (128, 128), by)
        expected = np.zeros((10, 2, 128, 128), int)
        t = events["t"] - events["t"][0]
        for i, event in enumerate(events):
            step = i // 10 if by == "number" else t[i] // (t[-1] // 10)
            expected[min(step, 9), int(event["p"]), event["y"], event["x"]] += 1
        np.testing.assert_array_equal(frames, expected)
        assert frames.sum() == 107


def test_frames_equal_tonics_where_nothing_remains():
    tonic = pytest.importorskip("tonic")
    events = events_of(np.random.default_rng(4), 120)
    theirs = tonic.transforms.ToFrame((128, 128, 2), n_event_bins=10)
    np.testing.assert_array_equal(to_frames(events, 10, (128, 128)), theirs(events))
    # The pitfall: with a remainder tonic leaves events out.
    more = np.concatenate([events, events[:7]])
    assert theirs(more).sum() == 120
    assert to_frames(more, 10, (128, 128)).sum() == 127
    assert tonic.io.events_struct == EVENT


def test_frames_of_few_and_of_many_events():
    events = events_of(np.random.default_rng(5), 3)
    assert to_frames(events, 10, (128, 128)).sum((1, 2, 3)).tolist() == [1, 1, 1] + [0] * 7
    one_pixel = np.repeat(events[:1], 70_000)
    assert to_frames(one_pixel, 1, (128, 128)).max() == 70_000
    with pytest.raises(DataError, match="without events"):
        to_frames(events[:0], 10, (128, 128))
    with pytest.raises(DataError, match="outside the sensor"):
        to_frames(events, 10, (1, 1))
    with pytest.raises(ConfigError, match="'number' or 'time'"):
        to_frames(events, 10, (128, 128), "duration")


def test_collate_puts_time_first():
    batch = [(torch.full((4, 2, 3, 3), float(i)), i) for i in range(5)]
    frames, labels = collate_frames(batch)
    assert frames.shape == (4, 5, 2, 3, 3)
    assert frames[:, 3].unique().item() == 3
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert labels.dtype == torch.int64


# --- DVS-Gesture ---------------------------------------------------------------------------------


def test_gestures_are_cut_by_their_table(gesture):
    root, facts = gesture
    train, test = datasets("dvsgesture", root, facts=facts, augment=False, size=128)
    assert (len(train), len(test)) == (8, 4)
    expected = [label - 1 for label in archives.GESTURES]
    assert [train[i][1] for i in range(8)] == expected * 2
    for i in range(4):
        frames, label = test[i]
        assert frames.shape == (16, 2, 128, 128)
        assert frames.dtype == torch.float32
        # 100 events were written into each gesture and 10 into each pause.
        assert frames.sum().item() == pytest.approx(100)
        assert label == expected[i]


def test_gesture_frames_have_the_networks_size(gesture):
    root, facts = gesture
    train, test = datasets("dvsgesture", root, facts=facts, steps=5)
    for dataset in (train, test):
        frames, _ = dataset[0]
        assert frames.shape == (5, 2, 48, 48)
        assert frames.sum() > 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "user02_lab.aedat").unlink(), r"lists user02_lab\.aedat, which is missing"),
        (lambda f: (f / "user24_led_labels.csv").unlink(), r"user24_led_labels\.csv is missing"),
        (lambda f: (f / "trials_to_test.txt").unlink(), r"trials_to_test\.txt is missing"),
        (
            lambda f: (f / "trials_to_train.txt").write_text("user01_led.aedat\n"),
            "list 4 train samples, expected 8",
        ),
        (
            lambda f: (f / "trials_to_train.txt").write_text("../../secret\n"),
            "secret, which is missing",
        ),
        (lambda f: (f / "user01_led_labels.csv").write_text("a,b,c\n1,x\n"), "csv is damaged"),
        (lambda f: (f / "user01_led_labels.csv").write_text("a,b,c\n12,1,2\n"), "class 1..11"),
        (lambda f: (f / "user01_led_labels.csv").write_text("a,b,c\n"), "csv is damaged"),
    ],
)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_half_unpacked_gestures_are_named(gesture, damage, message):
    root, facts = gesture
    damage(root / "DvsGesture")
    with pytest.raises(DataError, match=message):
        datasets("dvsgesture", root, facts=facts)


@pytest.mark.parametrize("kept", [0.2, 0.7, 0.95])
def test_a_recording_cut_short_is_named_and_not_cached(gesture, kept):
    root, facts = gesture
    path = root / "DvsGesture" / "user02_lab.aedat"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) // 8 * 8 + 3])
    with pytest.raises(DataError, match=r"user02_lab\.aedat .*cut short"):
        datasets("dvsgesture", root, facts=facts)
    path.write_bytes(content)
    datasets("dvsgesture", root, facts=facts)


def test_a_tail_cut_after_the_last_gesture_does_no_harm(gesture):
    root, facts = gesture
    path = root / "DvsGesture" / "user02_lab.aedat"
    path.write_bytes(path.read_bytes()[:-13])
    train, _ = datasets("dvsgesture", root, facts=facts, augment=False, size=128)
    assert train[7][0].sum().item() == pytest.approx(100)


def test_a_gesture_without_events_is_named(gesture):
    root, facts = gesture
    table = root / "DvsGesture" / "user01_led_labels.csv"
    table.write_text(table.read_text().replace("11,4000000,4600000", "11,9000000,9600000"))
    with pytest.raises(DataError, match="no events of gesture 11"):
        datasets("dvsgesture", root, facts=facts)


def test_absent_gestures_say_where_to_get_them(tmp_path):
    with pytest.raises(DataError, match=r"get DvsGesture\.tar\.gz from https://ibm\.ent\.box\.com"):
        datasets("dvsgesture", tmp_path)


# --- DVS-CIFAR10 ---------------------------------------------------------------------------------


def held_out(root, facts, split, **options):
    """Return which samples of each class are for testing, by their number of events."""
    train, test = datasets(
        "dvscifar10", root, facts=facts, split=split, augment=False, size=128, **options
    )
    assert (len(train), len(test)) == (90, 10)
    assert sorted(label for _, label in (test[i] for i in range(10))) == list(range(10))
    return [round(test[i][0].sum().item()) - 120 for i in range(10)]


def test_dvscifar10_splits(dvscifar):
    root, facts = dvscifar
    assert held_out(root, facts, "tebn") == [0] * 10
    assert held_out(root, facts, "last") == [9] * 10
    drawn = held_out(root, facts, "random")
    assert len(set(drawn)) > 3
    assert drawn == held_out(root, facts, "random")
    assert drawn != held_out(root, facts, "random", data_seed=1)
    assert len(list((root / "cache").iterdir())) == 1  # all splits share the frames
    with pytest.raises(ConfigError, match="unknown split 'first'"):
        datasets("dvscifar10", root, facts=facts, split="first")


def test_dvscifar10_frames(dvscifar):
    root, facts = dvscifar
    train, test = datasets("dvscifar10", root, facts=facts)
    for dataset in (train, test):
        frames, _ = dataset[0]
        assert frames.shape == (10, 2, 48, 48)
        assert frames.dtype == torch.float32
    assert train[89][1] == 9


def test_dvscifar10_half_unpacked_or_of_another_kind(dvscifar):
    root, facts = dvscifar
    datasets("dvscifar10", root, facts=facts)
    frog = root / "CIFAR10DVS" / "frog"
    (frog / "cifar10_frog_3.aedat").unlink()
    (frog / "cifar10_frog_8.aedat").unlink()
    with pytest.raises(DataError, match=r"lacks 2 of 10 recordings, first cifar10_frog_3\.aedat"):
        datasets("dvscifar10", root, facts=facts)
    shutil.rmtree(frog)
    frog.mkdir()
    (frog / "0.aedat4").touch()
    with pytest.raises(DataError, match="AEDAT 4"):
        datasets("dvscifar10", root, facts=facts)
    shutil.rmtree(frog)
    (root / "frog.zip").unlink()
    with pytest.raises(DataError, match=r"get frog\.zip from https://figshare"):
        datasets("dvscifar10", root, facts=facts, download=False)


def test_dvscifar10_recording_cut_short(dvscifar):
    root, facts = dvscifar
    datasets("dvscifar10", root, facts=facts)
    path = root / "CIFAR10DVS" / "ship" / "cifar10_ship_2.aedat"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"cifar10_ship_2\.aedat is cut short"):
        datasets("dvscifar10", root, facts=facts)


# --- the cache -----------------------------------------------------------------------------------


def test_cache_is_kept_and_keyed_by_its_parameters(gesture, monkeypatch):
    root, facts = gesture
    (first,) = (root / "cache").iterdir()
    assert not list(first.glob("*.partial"))
    assert len(list(first.glob("*.npz"))) == 12
    calls = []
    monkeypatch.setattr(dvsgesture, "read_aedat3", lambda path: calls.append(path))
    datasets("dvsgesture", root, facts=facts)
    assert not calls
    monkeypatch.undo()
    datasets("dvsgesture", root, facts=facts, steps=4)
    assert len(list((root / "cache").iterdir())) == 2


def test_cache_goes_on_where_it_was_interrupted(gesture, monkeypatch):
    root, facts = gesture
    (folder,) = (root / "cache").iterdir()
    (folder / "user02_lab_1.npz").unlink()
    read = read_aedat3
    calls = []
    monkeypatch.setattr(dvsgesture, "read_aedat3", lambda p: calls.append(p.name) or read(p))
    train, _ = datasets("dvsgesture", root, facts=facts, augment=False, size=128)
    assert calls == ["user02_lab.aedat"]
    assert train[5][0].sum().item() == pytest.approx(100)


def test_changed_sources_are_not_served_from_the_cache(dvscifar):
    root, facts = dvscifar
    train, _ = datasets("dvscifar10", root, facts=facts, augment=False, size=128)
    before = train[0][0].sum().item()
    path = root / "CIFAR10DVS" / "airplane" / "cifar10_airplane_1.aedat"
    path.write_bytes(path.read_bytes()[:-80])
    train, _ = datasets("dvscifar10", root, facts=facts, augment=False, size=128)
    assert train[0][0].sum().item() == before - 10


def test_a_damaged_cache_file_is_named(gesture):
    root, facts = gesture
    train, _ = datasets("dvsgesture", root, facts=facts)
    path = train.paths[2]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{path.name} is missing or damaged .* delete"):
        train[2]


def test_an_unwritable_cache_is_reported(tmp_path):
    facts = archives.make("dvsgesture", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="could not be written"):
        datasets("dvsgesture", tmp_path, facts=facts, cache=tmp_path / "file" / "cache")


@pytest.mark.skipif(
    os.geteuid() == 0, reason="run the tests as another user than root, who may write anywhere"
)
def test_a_read_only_data_directory_is_reported(tmp_path):
    facts = archives.make("dvsgesture", tmp_path)
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="could not be unpacked"):
        datasets("dvsgesture", tmp_path, facts=facts)


# --- augmentation --------------------------------------------------------------------------------


def blob(size=48):
    frames = torch.zeros(6, 2, size, size)
    frames[:, :, 20:26, 30:34] = 1.0
    return frames


def test_neuromorphic_augmentation_moves_all_frames_alike():
    torch.manual_seed(0)
    transform = NeuromorphicAugment(48)
    seen = set()
    for _ in range(60):
        frames, label = transform(blob(), 4)
        assert label == 4
        assert frames.shape == (6, 2, 48, 48)
        assert torch.equal(frames, frames[:1, :1].expand_as(frames))
        seen.add(tuple(frames[0, 0].nonzero().flatten().tolist()))
    assert len(seen) > 40


@pytest.mark.parametrize("choice", [0, 1, 2], ids=["roll", "rotate", "shear"])
def test_neuromorphic_augmentation_stays_in_its_bounds(monkeypatch, choice):
    randint = torch.randint
    monkeypatch.setattr(
        augment.torch,
        "randint",
        lambda *a, **k: torch.tensor(choice) if a == (3, ()) else randint(*a, **k),
    )
    torch.manual_seed(0)
    transform = NeuromorphicAugment(48, flip=False)
    point = torch.zeros(1, 2, 48, 48)
    point[..., 8:10, 23:25] = 1.0  # 15 pixels above the centre
    seen = []
    for _ in range(200):
        frames, _ = transform(point, 0)
        rows, columns = frames[0, 0].nonzero().float().unbind(1)
        if len(rows):
            seen.append((rows.mean().item() - 8.5, columns.mean().item() - 23.5))
    down, right = torch.tensor(seen).abs().max(0).values.tolist()
    if choice == 0:
        assert (down, right) == (5, 5)
    elif choice == 1:  # on a circle of 15 pixels: sideways 15 sin 30, down 15 (1 - cos 30)
        assert right == pytest.approx(7.5, abs=1)
        assert down == pytest.approx(2.0, abs=1)
    else:  # sideways 15 tan 30
        assert down == pytest.approx(0.0, abs=0.6)
        assert right == pytest.approx(8.7, abs=1)


def test_mirrored_gestures_change_sides():
    torch.manual_seed(0)
    transform = GestureAugment(48, rotate=0.0)
    frames = torch.zeros(3, 2, 128, 128)
    frames[..., :, :64] = 1.0  # all on the left
    sides = set()
    for _ in range(60):
        moved, label = transform(frames, 1)
        left = moved[..., :24].sum() > moved[..., 24:].sum()
        sides.add((bool(left), label))
    # A wave of the right hand, mirrored, is one of the left hand; never a mixture.
    assert sides == {(True, 1), (False, 2)}
    assert [GESTURE_MIRROR[GESTURE_MIRROR[i]] for i in range(11)] == list(range(11))


def test_resizing_loses_no_event():
    frames = torch.zeros(1, 2, 128, 128)
    frames[0, 1, 61, 37] = 64.0
    small, _ = augment.Resize(48)(frames, 0)
    # Averaging keeps the sum up to the ratio of areas.
    assert small.sum().item() * (128 / 48) ** 2 == pytest.approx(64.0, rel=0.05)


def test_published_counts():
    assert (dvsgesture.DVSGESTURE.train, dvsgesture.DVSGESTURE.test) == (1176, 288)
    assert (dvscifar10.DVSCIFAR10.train, dvscifar10.DVSCIFAR10.test) == (9000, 1000)
    with pytest.raises(dataclasses.FrozenInstanceError):
        dvsgesture.DVSGESTURE.train = 1077
