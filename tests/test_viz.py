"""Views of a plan: the folded graph, the drawing, the page in a real browser, and the exports."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fxcompress.pareto import Point
from fxcompress.plan import Alternative, Moment, Plan, TensorPlan
from fxcompress.tools import cli, plan_command, viz_export, viz_graph, viz_html
from fxcompress.tools.values import histograms
from fxcompress.tools.viz_tree import kind_of, module_tree, rows

LAYERS = 12


def tensor(name: str, module: str, spec: str, before: int, after: int, **given: Any) -> TensorPlan:
    plain = TensorPlan(
        name=name,
        module=module,
        source="model.py:3",
        op="mm",
        shape=(before // 64, 16),
        dtype="torch.float32",
        storage_bytes=before,
        smooth_readers=("mul",),
        exact_readers=(),
        recompute=(),
        representation=spec,
        bytes_after=after,
        reason="",
        predicted_variance=0.0 if spec == "keep" else 0.001,
        alternatives=(
            Alternative("keep", before, 0.0),
            Alternative("affine(bits=4)", before // 8, 0.001),
            Alternative("affine(bits=2)", before // 16, 0.01),
        ),
    )
    return replace(plain, **given)


def plan_of(layers: int) -> Plan:
    """Layers alike, but for the last, whose MLP is kept; a tensor of no module; a nasty name."""
    tensors = [tensor("tokens", "", "keep", 640, 640, reason="smaller than 16384 bytes")]
    for i in range(layers):
        kept = i == layers - 1
        alive = (i, 2 * layers - i)
        tensors.append(
            tensor(f"act_{i}", f"layers.{i}.mlp", "keep", 64000, 64000, alive=alive)
            if kept
            else tensor(f"act_{i}", f"layers.{i}.mlp", "affine(bits=4)", 64000, 8000, alive=alive)
        )
        tensors.append(
            tensor(f"mask_{i}", f"layers.{i}.norm", "bits(bits=1)", 8000, 1000, alternatives=())
        )
    tensors.append(tensor("bad", "</script><b>x", "affine(bits=4)", 64000, 8000))
    top = 64000 * layers
    timeline = tuple(
        Moment(
            f"n{i}",
            "forward" if i < layers else "backward",
            top * min(i + 1, 2 * layers - i) // layers,
            top * min(i + 1, 2 * layers - i) // layers // 8,
            f"layers.{min(i, 2 * layers - i - 1)}.mlp",
        )
        for i in range(2 * layers)
    )
    found = Plan("auto", 0.5, tuple(tensors), top, top // 8, note="a note")
    return replace(found, calibrated=True, timeline=timeline)


PLAN = plan_of(LAYERS)


# --- the tree -----------------------------------------------------------------------------------


def test_layers_alike_are_one_row():
    titles = [module.path for module, _ in rows(module_tree(PLAN), 2)]
    assert f"layers.0–{LAYERS - 2}" in titles  # the last one is treated otherwise
    assert f"layers.{LAYERS - 1}" in titles


def test_layers_alike_but_for_their_bits_are_one_row():
    bits = (f"affine(bits={2 + i % 3})" for i in range(LAYERS))
    tensors = tuple(
        replace(t, representation=next(bits)) if t.representation == "affine(bits=4)" else t
        for t in PLAN.tensors
        if t.name != "bad"
    )
    titles = [m.path for m, _ in rows(module_tree(replace(PLAN, tensors=tensors)), 2)]
    assert f"layers.0–{LAYERS - 2}" in titles


def test_every_view_says_what_is_biased():
    """And by how much, where that was measured."""
    coarse = {"representation": "fp8(format=e4m3)", "biased": True}
    tensors = [replace(t, **coarse, predicted_bias=0.01) for t in PLAN.tensors[1:3]]
    plan = replace(PLAN, tensors=tuple(tensors))
    said = "biased by nature: fp8 ×2; by 0.02 of the gradient's squared norm"
    assert said in str(plan).replace("\n", " ")
    assert said in viz_graph.heading(plan)
    assert viz_html.payload(plan, "", None, None, ())["plan"]["note"] == f"a note; {said}"
    unknown = replace(plan, tensors=(replace(tensors[0], predicted_bias=None),))
    assert "was not measured for 1: fxcompress.check" in viz_graph.heading(unknown)


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 9])
def test_every_tensor_is_in_exactly_one_row(depth: int):
    held = [i for _, tensors in rows(module_tree(PLAN), depth) for i in tensors]
    assert sorted(held) == list(range(len(PLAN.tensors)))


@pytest.mark.parametrize(
    ("representation", "bits", "kind"),
    [
        ("keep", 32, "keep"),
        ("masks", 1, "exact"),
        ("bits(bits=1)", 1, "exact"),
        ("affine(bits=4)", 4.5, "4 bit"),
        ("transform(basis=ab,rates=cd)", 2.1, "2 bit"),
        ("transform(basis=ab,rates=cd)", 0.5, "below 1 bit"),
        ("cast(bfloat16)", 16, "16 bit"),
        ("recompute", 0, "recompute"),
    ],
)
def test_kinds(representation: str, bits: float, kind: str):
    assert kind_of(representation, bits) == kind


# --- the graph ----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_edges_hold_all_bytes_and_all_noise(depth: int):
    edges = [e for *_, e in viz_graph.graph(PLAN, depth).edges(data=True) if e["kind"]]
    assert sum(e["bytes_before"] for e in edges) == PLAN.saved_bytes_before
    assert sum(e["bytes_after"] for e in edges) == PLAN.saved_bytes
    assert sum(e["share"] for e in edges) == pytest.approx(1)
    assert {name for e in edges for name in e["tensors"]} == {t.name for t in PLAN.tensors}


def test_reasons_stand_on_the_edges():
    source = viz_graph.dot(PLAN, 2).source
    assert "smaller than 16384 bytes" in source
    assert f"×{LAYERS - 1}" in source


@pytest.mark.skipif(shutil.which("dot") is None, reason="no Graphviz")
def test_svg(tmp_path: Path):
    saved, out = tmp_path / "plan.json", tmp_path / "plan.svg"
    PLAN.save(saved)
    assert cli.main(["viz", str(saved), "-o", str(out)]) == 0
    assert "layers.0–" in out.read_text().replace("&#45;", "-").replace("&#8211;", "–")


def test_bad_output(tmp_path: Path, capsys):
    saved = tmp_path / "plan.json"
    PLAN.save(saved)
    assert cli.main(["viz", str(saved), "-o", str(tmp_path / "plan.pdf")]) == 2
    assert ".html" in capsys.readouterr().err
    assert cli.main(["viz", str(saved), "-o", str(tmp_path / "a.html"), "--depth", "0"]) == 2


# --- exports ------------------------------------------------------------------------------------


def test_model_explorer():
    twice = replace(PLAN, tensors=(*PLAN.tensors, *PLAN.tensors))  # a name in two graphs
    graph = json.loads(viz_export.explorer_graph(twice, "title"))["graphs"][0]
    ids = [node["id"] for node in graph["nodes"]]
    assert len(set(ids)) == len(ids)
    edges = [edge["sourceNodeId"] for node in graph["nodes"] for edge in node["incomingEdges"]]
    assert set(edges) <= set(ids)
    data = json.loads(viz_export.explorer_bits(twice))[graph["id"]]["results"]
    assert set(edges) >= set(data)  # every tensor is read by the backward of its module
    assert data["act_0"]["value"] == pytest.approx(4)
    namespaces = {node["namespace"] for node in graph["nodes"]}
    assert "forward/layers/0/mlp" in namespaces


def test_perfetto():
    events = json.loads(viz_export.perfetto(PLAN))["traceEvents"]
    planned = [e["args"]["bytes"] for e in events if e["name"] == "live bytes, planned"]
    assert planned == [m.planned_bytes for m in PLAN.timeline]
    assert all(e["ts"] >= 0 for e in events if e["ph"] != "M")


# --- the page -----------------------------------------------------------------------------------


def test_page_needs_no_network():
    text = viz_html.page(PLAN, "title")
    assert not re.search(r"""(src|href)\s*=|url\(|@import|fetch\(""", text)
    assert "default-src 'none'" in text
    assert "/*" not in re.sub(r"(?s)<style>.*?</style>", "", text).split('id="data">')[0]
    assert "</script><b>" not in text


MODEL = """
import torch
from torch import nn

def make(batch, size):
    model = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, 1))
    return model, (torch.randn(batch, size),), lambda output: output.square().mean()
"""


def test_histograms_count_every_element(tmp_path: Path):
    (tmp_path / "made.py").write_text(MODEL)
    spec = f"{tmp_path / 'made.py'}:make"
    plan = plan_command.make(spec, 256, 64, policy="uniform4")
    task = plan_command.task_of(spec, 256, 64)
    found = histograms(plan, plan_command.recorded(task))
    coded = {t.name for t in plan.tensors if t.representation == "affine(bits=4)"}
    assert coded
    for name in coded:
        values, error = found[name]
        assert sum(values["counts"]) == sum(error["counts"]) == 256 * 64
        step = (values["high"] - values["low"]) / 15  # of a group that spans all, at most
        assert -step < error["low"] < 0 < error["high"] < step
    page = viz_html.page(plan, "title", 1, found)
    assert "Quantization error" in page


def test_values_need_a_model(tmp_path: Path, capsys):
    saved = tmp_path / "plan.json"
    PLAN.save(saved)
    assert cli.main(["viz", str(saved), "--values", "-o", str(tmp_path / "a.html")]) == 2
    assert "--values needs a MODEL" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        "window-size=1400,1400",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


class Page:
    """The page in the browser, by what a user sees and does."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.one(selector).text

    def ribbon(self, name: str) -> Any:
        (found,) = (r for r in self.all(".ribbon") if r.text.startswith(name))
        return found

    def slide(self, value: int) -> None:
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        self.driver.execute_script(script, self.one("#slider"), value)


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Page]:
    path = tmp_path / "plan.html"
    shown = {"bad": [{"title": "Values", "low": -1.0, "high": 2.5, "counts": [1, 5, 2]}]}
    path.write_text(viz_html.page(replace(PLAN, measured_peak_bytes=123456), "title", 2, shown))
    browser.get(path.as_uri())
    yield Page(browser)
    assert browser.get_log("browser") == []  # no error, nothing refused


def test_header_says_what_was_planned_and_measured(page: Page):
    cards = page.text("#cards")
    assert f"{PLAN.saved_bytes_before / 1e6:.2f} MB" in cards
    assert f"{PLAN.saved_bytes / 1e6:.2f} MB" in cards
    assert "0.12 MB" in cards
    assert "not run" in cards  # saved bytes were not measured
    assert page.text("#note") == "a note"


def test_click_on_a_tensor_tells_all_about_it(page: Page):
    page.ribbon("bad").click()
    details = page.text("#details")
    for expected in ("bad", "model.py:3", "1000×16 float32", "mul", "</script><b>x"):
        assert expected in details
    listed = [row.text.split()[0] for row in page.all("#alternatives tbody tr")]
    assert listed == ["keep", "affine(bits=4)", "affine(bits=2)"]
    assert page.text("#alternatives tr.chosen").startswith("affine(bits=4)")
    assert len(page.all("#rows tr.chosen")) == 1
    assert len(page.all("#details .histogram rect")) == 3


def test_kept_tensors_say_why(page: Page):
    assert "smaller than 16384 bytes" in page.ribbon("tokens").text


def test_folded_layers_open(page: Page):
    title = f"layers.0–{LAYERS - 2} ×{LAYERS - 1}"
    group = f'[data-path="layers.0–{LAYERS - 2}"]'
    assert title in page.text(group)
    page.one(f"{group} .each").click()
    paths = [row.get_attribute("data-path") for row in page.all(".row")]
    assert {f"layers.{i}" for i in range(LAYERS)} <= set(paths)
    page.one(f"{group} .heading").click()
    assert title in page.text(group)


def test_depth(page: Page):
    before = len(page.all(".row"))
    page.one("#shallower").click()
    assert len(page.all(".row")) < before
    page.one("#deeper").click()
    page.one("#deeper").click()
    assert len(page.all(".row")) > before


def test_search(page: Page):
    page.one("#search").send_keys("mask_3")
    assert page.text("#found").startswith("1 of")
    assert len(page.all("#rows tr")) == 1
    lit = [r for r in page.all(".ribbon") if "dim" not in r.get_attribute("class")]
    assert len(lit) == 1
    page.one("#search").send_keys("\n")
    assert page.text("#details h2") == "mask_3"
    page.one("#search").clear()
    page.one("#search").send_keys("no such thing")
    assert page.text("#found").startswith("0 of")


def test_slider_walks_from_least_noise_to_fewest_bytes(page: Page):
    plan = page.text("#rung")
    assert plan.startswith("the plan")

    def saved(text: str) -> float:
        return float(re.search(r"saved ([\d.]+) MB", text)[1])

    last = int(page.one("#slider").get_attribute("max"))
    found = []
    for rung in (0, last // 2, last):
        page.slide(rung)
        assert "estimate" in page.text("#rung")
        found.append(saved(page.text("#rung")))
    assert found[0] > found[1] > found[2]
    assert found[0] == pytest.approx((PLAN.saved_bytes_before - LAYERS * 7000) / 1e6, abs=0.011)
    assert "at 2 bits" in page.ribbon("bad").text  # the graph shows the rung
    page.one("#planned").click()
    assert page.text("#rung") == plan
    assert "at 4 bits" in page.ribbon("bad").text


def test_timeline_leads_to_what_is_held(page: Page):
    line = page.one("#timeline")
    page.driver.execute_script("arguments[0].scrollIntoView()", line)
    line.click()  # its middle
    assert "layers." in page.text("#moment")
    assert page.text("#details h2").startswith("Held at n1")
    page.driver.execute_script("scrollTo(0, 0)")
    page.one("#details li").click()
    assert page.all("#timeline .alive")


def test_table_sorts(page: Page):
    (heading,) = (h for h in page.all("#headings th") if h.text == "MB after")
    heading.click()
    sizes = [float(row.find_elements("css selector", "td")[8].text) for row in page.all("#rows tr")]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    "plan",
    [
        Plan("auto", None, (), 0, 0, note="left as plain Inductor"),
        replace(PLAN, tensors=(replace(PLAN.tensors[1], shape=("s0", 4), alternatives=()),)),
        replace(PLAN, timeline=(), gap=0.02, graphs=3),
    ],
)
def test_odd_plans_open(plan: Plan, browser: Any, tmp_path: Path):
    path = tmp_path / "odd.html"
    path.write_text(viz_html.page(plan, "odd"))
    browser.get(path.as_uri())
    page = Page(browser)
    assert len(page.all("#rows tr")) == len(plan.tensors)
    assert page.text("#title") == "odd"
    assert browser.get_log("browser") == []


def test_zoom(page: Page):
    page.one("#fit").click()
    width = page.one("#drawing").size["width"]
    page.one("#in").click()
    assert page.one("#drawing").size["width"] > width
    page.one("#out").click()
    page.one("#out").click()
    assert page.one("#drawing").size["width"] < width


def test_measured_curve(browser: Any, tmp_path: Path):
    measured = tuple(90_000 + 1000 * i for i in range(2 * LAYERS))
    path = tmp_path / "measured.html"
    path.write_text(viz_html.page(replace(PLAN, measured=measured), "title"))
    browser.get(path.as_uri())
    page = Page(browser)
    names = [line.get_attribute("data-name") for line in page.all("#timeline polyline")]
    assert [name.split(",")[0] for name in names] == ["all kept", "planned", "measured"]
    ticks = page.text("#memory")
    assert f"approximate {measured[-1] / 1e6:.2f} MB" in ticks
    line = page.one("#timeline")
    page.driver.execute_script("arguments[0].scrollIntoView()", line)
    line.click()
    assert f"{measured[LAYERS] / 1e6:.2f} MB measured" in page.text("#moment")
    assert browser.get_log("browser") == []


def test_slider_over_the_pareto_curve(browser: Any, tmp_path: Path):
    def point(spec: str, share: int) -> Point:
        tensors = tuple(
            replace(t, representation=spec, bytes_after=t.storage_bytes // share)
            if t.representation == "affine(bits=4)"
            else t
            for t in PLAN.tensors
        )
        plan = replace(PLAN, tensors=tensors)
        return Point(10**6 // share, plan.saved_bytes, 1e-3 * share, 0.1, plan)

    points = [point("affine(bits=2)", 16), point("affine(bits=8)", 4), point("keep", 1)]
    path = tmp_path / "points.html"
    path.write_text(viz_html.page(PLAN, "title", 2, points=points))
    browser.get(path.as_uri())
    page = Page(browser)
    assert page.one("#slider").get_attribute("max") == "2"
    found = []
    for at, shown in enumerate(["bad: keep", "bad at 8 bits", "bad at 2 bits"]):
        page.slide(at)
        assert page.text("#rung").startswith(f"point {at + 1} of 3: planned peak")
        found.append(float(re.search(r"peak ([\d.]+) MB", page.text("#rung"))[1]))
        assert page.ribbon("bad").text.startswith(shown)
        assert f"planned at point {at + 1}" in page.text("#memory")
    assert found == [1.0, 0.25, 0.06]
    page.one("#planned").click()
    assert "at 4 bits" in page.ribbon("bad").text
    assert browser.get_log("browser") == []
