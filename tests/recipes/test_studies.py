"""The demo, the ablation, the tables and the figures, on runs of a few steps."""

import csv
import json

import pytest

from qsnn_ext.errors import ConfigError
from recipes import ablation, demo, paper_figures, paper_tables
from recipes.cifar10_resnet19 import config
from recipes.engine.many import run_here
from recipes.gather import follows_protocol, run_results


@pytest.fixture(scope="module")
def demonstrated(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, demo.main(seeds=1, epochs=1, width=1 / 32, limit_batches=1, out=out)


@pytest.mark.slow
def test_the_demo_trains_all_four_and_draws(demonstrated):
    out, results = demonstrated
    assert {name: len(runs) for name, runs in results.items()} == {
        demo.FULL: 1, demo.PLAIN: 1, demo.UNTUNED: 1, demo.WSDR: 1
    }  # fmt: skip
    assert (out / "firing_rates_and_signs.png").read_bytes()[:4] == b"\x89PNG"
    assert results[demo.FULL][0]["weight_bytes"] > 10 * results[demo.WSDR][0]["weight_bytes"]
    lines = demo.table(results).splitlines()
    assert len(lines) == 6
    assert f"{results[demo.WSDR][0]['last_accuracy']:.2f}" in lines[-1]


@pytest.mark.slow
def test_figures_from_the_demo(demonstrated, tmp_path):
    written = paper_figures.main([demonstrated[0]], tmp_path)
    names = {p.name for p in written}
    assert {f"figure{n}.{kind}" for n in (2, 3, 4, 5) for kind in ("png", "svg")} == names
    for path in written:
        start = path.read_bytes()[:60]
        assert start[:4] == b"\x89PNG" if path.suffix == ".png" else b"<?xml" in start


@pytest.mark.slow
def test_the_study_writes_what_it_measured(tmp_path, monkeypatch):
    # Processes of their own are tests/faults/test_killed_study.py's; each would load torch anew.
    monkeypatch.setattr(ablation, "run_all", lambda configs, processes: run_here(configs))
    options = {
        "variants": ["ws-dr", "plain"],
        "seeds": 2,
        "untuned_seeds": 2,
        "settings": ["adam:0.01"],
        "epochs": 1,
        "width": 1 / 32,
        "size": 8,
        "limit_batches": 1,
        "runs": tmp_path / "runs",
        "results": tmp_path,
    }
    content = ablation.main(**options)
    rows = content["rows"]
    assert [(r["variant"], r["setting"], r["tuned"], r["n"]) for r in rows] == [
        ("ws-dr", "adam:0.01", True, 2),
        ("ws-dr", "sgd:0.5", False, 2),
        ("plain", "adam:0.01", True, 2),
        ("plain", "sgd:0.5", False, 2),
    ]
    runs = [r["last_accuracy"] for r in run_results([tmp_path / "runs" / "ws-dr"])]
    assert len(runs) == 5  # two counted at each of two settings, one for tuning
    assert rows[0]["mean"] == pytest.approx(sum(rows[0]["accuracies"]) / 2, abs=1e-3)
    assert set(rows[0]["accuracies"]) <= {round(r, 4) for r in runs}
    assert json.loads((tmp_path / "ablation-digits.json").read_text())["rows"] == rows
    with open(tmp_path / "ablation-digits.csv", newline="") as file:
        assert [r["variant"] for r in csv.DictReader(file)] == [r["variant"] for r in rows]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("result.json")}
    assert ablation.main(**options)["rows"] == rows
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("result.json")}


@pytest.mark.parametrize("setting", ["sgd", "rmsprop:0.1", "adam:fast"])
def test_settings_that_cannot_be(setting):
    with pytest.raises(ConfigError, match=r"sgd:0\.1"):
        ablation.optimization(setting)


def test_the_common_setting_may_be_left_out(tmp_path, monkeypatch):
    found = lambda configs, processes: ((c, {"last_accuracy": c.lr}) for c in configs)  # noqa: E731
    monkeypatch.setattr(ablation, "run_all", found)
    options = {"variants": ["ws-dr"], "runs": tmp_path / "runs", "results": tmp_path}
    content = ablation.main(seeds=2, untuned_seeds=0, settings=["adam:0.01"], **options)
    assert [(r["setting"], r["n"]) for r in content["rows"]] == [("adam:0.01", 2)]
    with pytest.raises(ConfigError, match="--seeds"):
        ablation.main(seeds=0)


def test_figure_5_of_a_study_of_other_variants():
    row = {"variant": "frozen scale", "tuned": True, "mean": 90.0, "std": None, "n": 1}
    assert len(paper_figures.figure_5({"study": "resnet19 on digits", "rows": [row]}).axes) == 1


def test_unknown_variants_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"'wsrd'; there are: .*ws-dr"):
        ablation.main(variants=["wsrd"], results=tmp_path)


def test_some_variants_do_not_replace_the_whole_study():
    with pytest.raises(ConfigError, match="--results"):
        ablation.main(variants=["plain"])


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_variants_are_what_they_are_called(name):
    made = config(data="digits").but(**ablation.VARIANTS[name])
    assert made.variant == {
        "plain": "plain", "full precision": "plain", "weight regulation": "weight",
        "spike regulation": "spike",
    }.get(name.split(",")[0], "wsdr")  # fmt: skip


def result(bits="1w-2u", accuracy=(94.0, 93.0), **changes):
    made = config().but(bits=bits, **changes)
    return {
        "recipe": made.recipe,
        "variant": made.variant,
        "best_accuracy": accuracy[0],
        "last_accuracy": accuracy[1],
        "config": made.to_dict(),
    }


def test_table_1_is_blank_where_nothing_was_run():
    text = paper_tables.table_1([result(), result(accuracy=(92.0, 91.5), seed=1)])
    lines = [line.split() for line in text.splitlines()[2:]]
    assert len(lines) == 20
    filled = [line for line in lines if len(line) > 3]
    assert filled == [["cifar10", "1w-2u", "95.20", "93.00", "92.25", "2", "300"]]


@pytest.mark.parametrize(
    "change",
    [
        {"width": 0.5},
        {"limit_batches": 3},
        {"preset": "official"},
        {"steps": 1},
        {"data": "digits"},
        {"wsdr": False},
        {"network": "vgg16"},
        {"recipe": "dvscifar10_vggsnn", "network": "vggsnn"},
    ],
)
def test_runs_that_depart_from_the_protocol_stay_out_of_table_1(change):
    departed = result(**change)
    assert all(len(line.split()) == 3 for line in paper_tables.table_1([departed]).splitlines()[2:])
    assert follows_protocol(result())


def test_table_2_has_the_papers_36_cells():
    lines = [line.split() for line in paper_tables.table_2_text().splitlines()[2:]]
    assert len(lines) == 12
    for cells in lines:
        for ours, paper in zip(cells[2::2], cells[3::2], strict=True):
            assert float(ours) == pytest.approx(float(paper), abs=0.0101)


def test_sign_flips_are_counted(tmp_path, capsys, monkeypatch):
    from recipes import sign_flips

    monkeypatch.setattr(sign_flips, "CASES", sign_flips.CASES[1:3])  # standardised, and not
    sign_flips.main(steps=3, out=tmp_path / "flips.csv")
    rows = (tmp_path / "flips.csv").read_text().splitlines()
    assert len(rows) == 1 + len(sign_flips.CASES)
    assert "standardised layer" in capsys.readouterr().out
