"""Archives: fetched, verified and unpacked whole, or refused with the reason."""

import io
import multiprocessing
import os
import signal
import tarfile
import zipfile
from pathlib import Path

import pytest

from qsnn_ext.errors import DataError
from recipes.data import datasets, files
from recipes.data.files import Archive, Facts, find, md5_of, obtain, unpack, write_atomically
from tests.recipes import archives
from tests.recipes.archives import served


def facts(archive: Archive) -> Facts:
    return Facts("Tiny", "https://example.org/tiny", (archive,), 1, 1)


def make_tar(path: Path, entries: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_zip(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial"))


@pytest.mark.parametrize("make", [make_tar, make_zip], ids=["tar", "zip"])
def test_unpacks_into_place(tmp_path, make):
    suffix = ".tar.gz" if make is make_tar else ".zip"
    archive = make(tmp_path / f"a{suffix}", {"top/x.txt": b"hello", "top/sub/y.txt": b"there"})
    unpack(archive, tmp_path / "here", "top")
    assert (tmp_path / "here/x.txt").read_bytes() == b"hello"
    assert (tmp_path / "here/sub/y.txt").read_bytes() == b"there"
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("make", [make_tar, make_zip], ids=["tar", "zip"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_truncated_archive_leaves_no_folder(tmp_path, make, part):
    suffix = ".tar.gz" if make is make_tar else ".zip"
    noise = bytes(range(256)) * 400
    archive = make(tmp_path / f"a{suffix}", {"top/x.bin": noise, "top/y.bin": noise[::-1]})
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(DataError, match="damaged"):
        unpack(archive, tmp_path / "top")
    assert not (tmp_path / "top").exists()
    assert not leftovers(tmp_path)


def test_a_flipped_byte_inside_a_zip_is_noticed(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"top/x.bin": b"payload" * 50})
    content = bytearray(archive.read_bytes())
    content[content.index(b"payload") + 3] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        unpack(archive, tmp_path / "top")


def test_an_archive_without_the_folder_is_not_the_official_one(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"other/x.txt": b"x"})
    with pytest.raises(DataError, match="holds no folder 'top'"):
        unpack(archive, tmp_path / "top")


def test_old_remains_of_killed_processes_are_cleared(tmp_path):
    old, recent = tmp_path / ".top.123.partial", tmp_path / ".top.456.partial"
    for folder in (old, recent):
        (folder / "x").mkdir(parents=True)
    os.utime(old, (0, 0))
    unpack(make_zip(tmp_path / "a.zip", {"top/x.txt": b"x"}), tmp_path / "top")
    assert not old.exists()
    assert recent.exists()  # may belong to a process at work


@pytest.fixture
def address(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with served(tmp_path) as found:
        yield found


def test_obtain_downloads_what_is_missing(tmp_path, address):
    source = make_zip(tmp_path / "source.zip", {"top/x.txt": b"x"})
    archive = Archive("a.zip", md5_of(source), f"{address}/source.zip")
    path = obtain(archive, facts(archive), tmp_path / "new" / "root", ("sub", ""), fetch=True)
    assert path == tmp_path / "new/root/sub/a.zip"
    assert path.read_bytes() == source.read_bytes()


def test_obtain_refuses_a_download_with_another_md5(tmp_path, address):
    make_zip(tmp_path / "source.zip", {"top/x.txt": b"x"})
    archive = Archive("a.zip", "0" * 32, f"{address}/source.zip")
    with pytest.raises(DataError, match=r"could not be downloaded.*get a\.zip from https"):
        obtain(archive, facts(archive), tmp_path / "root", ("",), fetch=True)
    assert not list((tmp_path / "root").iterdir())


@pytest.mark.parametrize(
    ("url", "fetch", "why"),
    [
        ("http://127.0.0.1:9/a.zip", True, "could not be downloaded"),
        ("http://127.0.0.1:9/a.zip", False, "downloading is off"),
        (None, True, "has no direct download link"),
    ],
)
def test_absent_data_is_one_sentence_on_what_to_put_where(tmp_path, url, fetch, why):
    archive = Archive("a.zip", "0" * 32, url)
    with pytest.raises(DataError) as caught:
        obtain(archive, facts(archive), tmp_path, ("",), fetch=fetch)
    message = str(caught.value)
    assert why in message
    assert f"get a.zip from https://example.org/tiny and put it into {tmp_path}." in message
    assert "\n" not in message


def test_an_interrupted_download_is_named(tmp_path):
    whole = make_zip(tmp_path / "a.zip", {"top/x.txt": b"x" * 1000})
    archive = Archive("a.zip", md5_of(whole), None)
    whole.write_bytes(whole.read_bytes()[:40])
    with pytest.raises(DataError, match=r"a\.zip is incomplete or damaged \(40 bytes"):
        obtain(archive, facts(archive), tmp_path, ("",), fetch=True)


def test_find_takes_the_first_folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/x").touch()
    assert find(tmp_path, "x", ("", "a", "b")) == tmp_path / "b/x"
    assert find(tmp_path, "y", ("", "a", "b")) is None


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new, but")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert not leftovers(tmp_path)


def test_processes_that_prepare_the_same_data_do_not_disturb_each_other(tmp_path):
    facts_ = archives.make("dvsgesture", tmp_path)
    tiny = archives.make("tinyimagenet", tmp_path)

    def prepare(errors):
        try:
            datasets("dvsgesture", tmp_path, facts=facts_)
            datasets("tinyimagenet", tmp_path, facts=tiny)
        except BaseException as error:
            errors.put(repr(error))
            raise

    context = multiprocessing.get_context("fork")
    errors = context.Queue()
    processes = [context.Process(target=prepare, args=(errors,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [p.exitcode for p in processes] == [0] * 4, errors.get(timeout=1)
    assert not leftovers(tmp_path)
    train, _ = datasets("dvsgesture", tmp_path, facts=facts_)
    assert len(train) == 8


def test_a_process_killed_while_unpacking_leaves_nothing_that_looks_whole(tmp_path):
    entries = {f"top/{i}.bin": bytes([i]) * 1000 for i in range(50)}
    archive = make_zip(tmp_path / "a.zip", entries)

    def unpack_and_die(path, folder):
        with zipfile.ZipFile(path) as file:
            for name in file.namelist()[:20]:
                file.extract(name, folder)
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(
        target=lambda: (
            setattr(files, "_unpack_zip", unpack_and_die),
            unpack(archive, tmp_path / "top"),
        )
    )
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    assert len(leftovers(tmp_path)) == 1
    assert not (tmp_path / "top").exists()
    unpack(archive, tmp_path / "top")
    assert len(list((tmp_path / "top").iterdir())) == 50
