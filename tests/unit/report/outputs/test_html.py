from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_memtrain.core import (
    MIB,
    CategoryBytes,
    MemoryBreakdown,
    ModuleMemory,
    TechniqueRecord,
    TimelineEvent,
    format_bytes,
)
from lightning_memtrain.report.memory_report import MemoryReport, StepPeak, StepTimes
from lightning_memtrain.report.outputs.html import render_html, save_html
from tests.helpers.browser import Visit, visit
from tests.helpers.reports import deep_report, out_of_memory_report, tiny_report

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&amp;%%data%%\u2028"


def embedded(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="report-data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def hostile_report() -> MemoryReport:
    report = out_of_memory_report()
    module = ModuleMemory(HOSTILE, HOSTILE, 0, 0, 0, 0, MIB)
    fit = replace(report.stages["fit"], modules=(module,), peak_event=HOSTILE)
    failure = replace(report.out_of_memory, message=HOSTILE)
    environment = {**report.environment, HOSTILE: HOSTILE}
    technique = TechniqueRecord(HOSTILE, {HOSTILE: HOSTILE}, (HOSTILE,))
    report = replace(report, environment=environment, techniques=(technique,))
    return replace(report, model=HOSTILE, stages={"fit": fit}, out_of_memory=failure)


def marked_report(names: list[str]) -> MemoryReport:
    """A stage whose timeline has these events, each of the same bytes, but for the one called 'peak, ...'."""
    held = CategoryBytes({"parameters": MIB})
    high = CategoryBytes({"parameters": MIB, "activations": MIB})
    events = tuple(
        TimelineEvent(i, name, high if name.startswith("peak") else held) for i, name in enumerate(names)
    )
    fit = MemoryBreakdown(device="cpu", at_peak=high, maxima=high, timeline=events)
    return replace(tiny_report(), stages={"fit": fit}, steps=(), growth={})


def test_page_asks_for_nothing_outside_of_itself() -> None:
    page = render_html(out_of_memory_report())
    assert "default-src 'none'" in page
    outside = re.sub(r"http://www\.w3\.org/2000/svg", "", page)
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+|@import|url\(", outside)
    assert re.findall(r'<(?:link|script|img|iframe)[^>]*(?:src|href)="([^"]*)"', page) == ["data:,"]


def test_page_holds_the_whole_report() -> None:
    report = out_of_memory_report()
    plain = json.loads(json.dumps(report.to_dict()))
    data = embedded(render_html(report))
    timeline = plain["stages"]["fit"].pop("timeline")
    columns = data["stages"]["fit"].pop("timeline")
    assert [columns["names"][name] for name in columns["name"]] == [event["name"] for event in timeline]
    for category, sizes in columns["held"].items():
        assert sizes == [event["held"][category] for event in timeline]
    steps = data["steps"]["fit"]
    assert steps["count"] == 4
    assert steps["peak_bytes"] == [step["peak_bytes"] for step in plain["steps"]]
    for name in ("model", "environment", "growth", "ranks", "out_of_memory", "created", "techniques"):
        assert data[name] == plain[name]
    assert data["stages"]["fit"] == plain["stages"]["fit"]


def test_names_cannot_break_out_of_the_page() -> None:
    page = render_html(hostile_report())
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert embedded(page)["model"] == HOSTILE
    assert embedded(page)["stages"]["fit"]["modules"][0]["name"] == HOSTILE


def test_many_steps_are_thinned_to_the_highest_of_each_stretch() -> None:
    steps = tuple(StepPeak(i, "fit", 10 + (i == 4321), False) for i in range(5000))
    data = embedded(render_html(replace(tiny_report(), steps=steps)))["steps"]["fit"]
    assert data["count"] == 5000
    assert len(data["step"]) == 1667
    assert max(data["peak_bytes"]) == 11
    assert data["step"][data["peak_bytes"].index(11)] == 4321


def test_page_is_saved_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "memory_report.html"
    save_html(tiny_report(), path)
    assert path.read_text(encoding="utf-8") == render_html(tiny_report())


# ---- in a browser ---------------------------------------------------------------------------------------


def undisturbed(seen: Visit) -> Visit:
    """The visit, after making sure that the page neither complained nor asked for anything."""
    assert seen.console == []
    assert seen.requests == []
    return seen


def test_browser_shows_the_exact_numbers(tmp_path: Path) -> None:
    script = """
      return {
        title: document.title, heading: text("h1"), peak: text("#peak"),
        groups: texts(".groups b"), tiles: texts(".tiles dd"),
        categories: [...document.querySelectorAll("#categories tbody tr, #categories tfoot tr")].map(
          (row) => [...row.querySelectorAll("th, td:not(.bar)")].map((cell) => cell.textContent.trim())),
        growth: texts("#growth tbody td"), marker: text("#timeline-chart .strong"),
        legend: texts(".legend button"), oom: text("#out-of-memory h2"),
        holders: texts("#out-of-memory li b"),
        environment: texts("#environment dd"),
      };"""
    report = out_of_memory_report()
    assert undisturbed(visit(render_html(report), tmp_path, script)).answer == {
        "title": "Memory report: TinyModel",
        "heading": "TinyModel",
        "peak": "56.00 MiB",
        "groups": ["4.00 MiB", "9.00 MiB", "43.00 MiB"],
        "tiles": [
            "forward head",
            "50.00 MiB",
            "6.00 MiB",
            "2.00 MiB",
            "4.00 MiB",
            "55.00 MiB to 56.00 MiB",
        ],
        "categories": [
            ["parameters", "4.00 MiB", "7.1%", "4.00 MiB"],
            ["gradients", "1.00 MiB", "1.8%", "4.00 MiB"],
            ["optimizer state", "8.00 MiB", "14.3%", "8.00 MiB"],
            ["activations", "32.00 MiB", "57.1%", "32.00 MiB"],
            ["of which recomputed", "2.00 MiB", "3.6%", "6.00 MiB"],
            ["buffers", "0 B", "0.0%", "0 B"],
            ["inputs", "2.00 MiB", "3.6%", "2.00 MiB"],
            ["temporary", "3.00 MiB", "5.4%", "5.00 MiB"],
            ["workspace", "6.00 MiB", "10.7%", ""],
            ["allocator", "56.00 MiB", "100.0%", ""],
        ],
        "growth": ["head", "3.00 MiB", "12", "(outside of any submodule)", "1.00 MiB", "1"],
        "marker": "ledger peak 50.00 MiB",
        "legend": ["parameters", "optimizer state", "gradients", "inputs", "activations", "temporary"],
        "oom": "Out of memory in fit, step 4, with 56.00 MiB held",
        "holders": [
            "activations, 32.00 MiB: ",
            "activations of body (Linear), 24.00 MiB: ",
            "activations of head (Linear), 11.00 MiB: ",
        ],
        "environment": list(report.environment.values()),
    }


def test_browser_sorts_and_filters_modules(tmp_path: Path) -> None:
    script = """
      const button = (key) => document.querySelector(`#modules th[data-key=${key}] button`);
      const sorted = () => document.querySelector("#modules th[aria-sort]");
      const direction = () => sorted().getAttribute("aria-sort");
      const state = () => [texts("#modules tbody .mono"), sorted().dataset.key, direction()];
      const seen = [state()];
      button("saved_bytes").click(); seen.push(state());
      button("saved_bytes").click(); seen.push(state());
      button("name").click(); seen.push(state());
      const search = document.querySelector("#modules input");
      search.value = "CONV"; search.dispatchEvent(new Event("input")); seen.push(state());
      return seen;"""
    report = tiny_report()
    sizes = [
        ("a.conv", 1, 6),
        ("a.bn", 9, 2),
        ("b10", 5, 1),
        ("b9", 4, 7),
        *((f"c{i}", 0, 0) for i in range(5)),
    ]
    modules = tuple(ModuleMemory(name, "T", 0, 0, 0, 0, made, saved) for name, made, saved in sizes)
    fit = replace(report.stages["fit"], modules=modules)
    seen = undisturbed(visit(render_html(replace(report, stages={"fit": fit})), tmp_path, script)).answer
    rest = [f"c{i}" for i in range(5)]
    assert seen == [
        [["a.bn", "b10", "b9", "a.conv", *rest], "total", "descending"],
        [["b9", "a.conv", "a.bn", "b10", *rest], "saved_bytes", "descending"],
        [[*rest, "b10", "a.bn", "a.conv", "b9"], "saved_bytes", "ascending"],
        [["a.bn", "a.conv", "b9", "b10", *rest], "name", "ascending"],
        [["a.conv"], "name", "ascending"],
    ]


def test_browser_changes_stage_with_the_keyboard(tmp_path: Path) -> None:
    script = """
      const tabs = [...document.querySelectorAll("[role=tab]")];
      const selected = () => tabs.map((tab) => tab.getAttribute("aria-selected"));
      const state = () => [selected(), text("#peak"), text("#timeline"), text("#categories tfoot th")];
      const first = state();
      tabs[0].focus();
      tabs[0].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
      return [first, state(), document.activeElement === tabs[1]];"""
    first, second, focused = undisturbed(visit(render_html(tiny_report()), tmp_path, script)).answer
    assert first[:2] == [["true", "false"], "56.00 MiB"]
    assert first[3] == "allocator"
    assert second == [
        ["false", "true"],
        "50.00 MiB",
        "Timeline of one stepNo timeline was recorded.",
        "ledger",
    ]
    assert focused


def test_browser_opens_on_training_and_tells_other_stages_in_short(tmp_path: Path) -> None:
    report = tiny_report()
    fit = report.stages["fit"]
    larger = replace(fit, at_peak=CategoryBytes({"activations": 99 * MIB}), maxima=fit.maxima)
    report = replace(report, stages={"validate": larger, "fit": fit})
    script = """
      const tabs = [...document.querySelectorAll("[role=tab]")];
      const folds = () => [...document.querySelectorAll("#panel details")].map((fold) => fold.open);
      const first = [tabs.map((tab) => tab.textContent), text("#peak"), folds()];
      tabs[1].click();
      return [first, text("#peak"), folds(), document.querySelector("details #modules") !== null];"""
    seen = undisturbed(visit(render_html(report), tmp_path, script)).answer
    assert seen == [[["fit", "validate"], "56.00 MiB", []], "99.00 MiB", [False], True]


def test_browser_tells_what_steps_took(tmp_path: Path) -> None:
    times = {"fit": StepTimes(0.0124, 47, 0.05, 4, 0.2), "validate": StepTimes(None, 0, 1.5, 1, 1.5)}
    script = """
      const tile = () => [...document.querySelectorAll(".tiles div")].map((one) => one.textContent)
        .find((one) => one.startsWith("Step time"));
      const first = tile();
      document.querySelectorAll("[role=tab]")[1].click();
      return [first, tile()];"""
    seen = undisturbed(visit(render_html(replace(tiny_report(), step_times=times)), tmp_path, script)).answer
    assert seen == [
        "Step time12.4 ms\nmedian of 47; 4 measured steps: 150 ms more in all",
        "Step time1.5 s\nall steps were measured",
    ]


def test_browser_tells_an_events_bytes_to_the_pointer_and_the_keyboard(tmp_path: Path) -> None:
    script = """
      const chart = document.querySelector("#timeline-chart");
      const press = (key) => chart.dispatchEvent(new KeyboardEvent("keydown", { key }));
      const spoken = () => chart.getAttribute("aria-valuetext");
      const tip = () => [text("#timeline-chart .tip b"), texts("#timeline-chart .tip td"), spoken()];
      const box = chart.getBoundingClientRect();
      chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + 70, clientY: box.top + 50 }));
      const seen = [tip()];
      press("ArrowRight"); press("ArrowRight"); press("ArrowRight"); seen.push(tip());
      press("End"); seen.push(tip()[0]);
      press("Escape"); seen.push(document.querySelector("#timeline-chart .tip").hidden);
      return seen;"""
    seen = undisturbed(visit(render_html(tiny_report()), tmp_path, script)).answer
    state = ["inputs", "2.00 MiB", "optimizer state", "8.00 MiB", "parameters", "4.00 MiB"]
    assert seen[0] == ["step", [*state, "total", "14.00 MiB"], "step: 14.00 MiB"]
    assert seen[1][0] == "peak, in forward head"
    assert seen[1][1][:4] == ["temporary", "3.00 MiB", "activations", "32.00 MiB"]
    assert seen[1][2] == "peak, in forward head: 50.00 MiB"
    assert seen[2:] == ["backward", True]


def test_browser_hides_a_category_on_demand(tmp_path: Path) -> None:
    script = """
      const areas = () => [...document.querySelectorAll("#timeline-chart [data-category]")];
      const shown = () => areas().map((path) => path.dataset.category);
      const all = shown();
      const buttons = [...document.querySelectorAll(".legend button")];
      buttons.find((button) => button.textContent === "activations").click();
      return [all, shown(), texts("#timeline-chart text")[1]];"""
    every, fewer, tick = undisturbed(visit(render_html(tiny_report()), tmp_path, script)).answer
    assert every == ["parameters", "optimizer_state", "gradients", "inputs", "activations", "temporary"]
    assert fewer == [category for category in every if category != "activations"]
    assert tick == "5 MiB"


def test_browser_draws_ten_thousand_events_in_few_columns_and_keeps_the_peak(tmp_path: Path) -> None:
    script = """
      const path = document.querySelector("#timeline-chart [data-category=activations]").getAttribute("d");
      const rows = document.querySelectorAll("#modules tbody tr").length;
      const events = texts("#timeline-chart text").pop();
      return [path.length, text("#timeline-chart .strong"), events, text(".more"), rows];"""
    report = deep_report(num_blocks=40, events_per_module=25)
    fit = report.stages["fit"]
    assert len(fit.timeline) == 10_002
    length, marker, events, more, rows = undisturbed(visit(render_html(report), tmp_path, script)).answer
    assert length < 30_000
    assert marker == f"ledger peak {format_bytes(fit.ledger_peak_bytes)}"
    assert events == "10,002 events"
    assert (more, rows) == ("Show all 200 modules", 20)


def test_browser_shows_techniques_and_what_the_allocator_reserved(tmp_path: Path) -> None:
    script = """
      return {
        names: texts("#techniques h3"), settings: texts("#techniques dt, #techniques dd"),
        events: texts("#techniques li"), folded: texts("#techniques summary"),
        lists: document.querySelectorAll("#techniques .technique > ol").length, tiles: texts(".tiles div"),
      };"""
    few, many = ("step 3: halved",), tuple(f"step {i}: grown" for i in range(7))
    techniques = (
        TechniqueRecord("Microbatching", {"size": 16, "budget": None, "recover": True, "exact": False}, few),
        TechniqueRecord("RigL", {"sparsity": 0.8}, many),
        TechniqueRecord("Plain"),
    )
    fit = tiny_report().stages["fit"]
    fit = fit.with_allocator_peak(fit.allocator_peak_bytes, reserved_bytes=64 * MIB, num_alloc_retries=2)
    report = replace(tiny_report(), stages={"fit": fit}, techniques=techniques)
    shown = undisturbed(visit(render_html(report), tmp_path, script)).answer
    assert shown["names"] == ["Microbatching", "RigL", "Plain"]
    settings = ["size", "16", "budget", "none", "recover", "yes", "exact", "no", "sparsity", "0.8"]
    assert shown["settings"] == settings
    assert shown["events"] == [*few, *many]
    assert (shown["folded"], shown["lists"]) == (["7 events"], 1)
    for tile in (
        "Reserved by the allocator64.00 MiB",
        "Allocation retries in this step2",
        "TechniquesMicrobatching\nRigL\nPlain",
    ):
        assert tile in shown["tiles"]


_STRIPS = """
  const strips = (name) => [...document.querySelectorAll(`#timeline-chart .${name}`)];
  const widths = strips("mark").map((strip) => Math.round(Number(strip.getAttribute("width"))));
  const spans = strips("mark").map((strip) => strip.textContent);
  const [low] = strips("mark").map((strip) => Number(strip.getAttribute("y")));
  const written = (y) => [...document.querySelectorAll("#timeline-chart text")]
    .filter((label) => Number(label.getAttribute("y")) === y + 12).map((label) => label.textContent);
  const phases = written(low - 20);
"""


@pytest.mark.parametrize(
    ("width", "labels"),
    [
        (1200, ["microbatch 1 of 2", "microbatch 2 of 2"]),
        (360, ["1/2", "2/2"]),
    ],
)
def test_browser_gives_marks_a_strip_of_their_own(width: int, labels: list[str], tmp_path: Path) -> None:
    script = f"""
      page.style.width = "{width}px";
      await until(() => drawn(document));
      {_STRIPS}
      const chart = document.querySelector("#timeline-chart");
      const press = (key) => chart.dispatchEvent(new KeyboardEvent("keydown", {{ key }}));
      const spoken = () => [chart.getAttribute("aria-valuetext"), text("#timeline-chart .tip .block")];
      press("ArrowUp"); press("ArrowRight"); const heard = [spoken()];
      for (let times = 0; times < 5; times++) press("ArrowRight");
      heard.push(spoken());
      press("End");
      heard.push([chart.getAttribute("aria-valuetext"), document.querySelectorAll(".tip .block").length]);
      return [spans, widths.map((size) => Math.round(10 * size / widths[0])), written(low), phases, heard];"""
    part = ["forward body", "peak, in forward body", "backward", "backward body"]
    names = ["microbatch 1 of 2", *part, "microbatch 2 of 2", *part, "optimizer step"]
    page = render_html(marked_report(names))
    spans, widths, written, phases, heard = undisturbed(visit(page, tmp_path, script)).answer
    assert spans == ["microbatch 1 of 2", "microbatch 2 of 2"]
    assert widths == [10, 10]
    assert written == labels
    # The marks do not interrupt the strip above theirs; on a phone, longer words do not fit into it.
    wide = ["forward", "backward", "forward", "backward", "optimizer"]
    assert phases == (wide if width == 1200 else ["forward", "forward"])
    assert heard == [
        ["forward body, in microbatch 1 of 2: 1.00 MiB", "in microbatch 1 of 2"],
        ["forward body, in microbatch 2 of 2: 1.00 MiB", "in microbatch 2 of 2"],
        ["optimizer step: 1.00 MiB", 0],
    ]


def test_browser_labels_very_many_marks_together(tmp_path: Path) -> None:
    count = 200
    names = [
        name
        for i in range(count)
        for name in (f"microbatch {i + 1} of {count}", *["forward body"] * 9, *["backward body"] * 9)
    ]
    script = f"{_STRIPS} return [spans.length, widths[0], written(low), phases.length];"
    page = render_html(marked_report([*names, "update", "optimizer step"]))
    num_spans, width, written, num_phases = undisturbed(visit(page, tmp_path, script)).answer
    assert num_spans == count + 1
    assert 1 <= width <= 6
    assert written == [f"microbatch \u00d7 {count}"]
    assert num_phases == 0


def test_browser_has_one_strip_where_nothing_was_marked(tmp_path: Path) -> None:
    script = 'return [document.querySelectorAll(".mark").length, text("#timeline-chart svg") !== ""];'
    assert undisturbed(visit(render_html(tiny_report()), tmp_path, script)).answer == [0, True]


def test_browser_takes_hostile_names_as_text(tmp_path: Path) -> None:
    script = """
      const shown = [text("h1"), text("#modules tbody .mono"), text("#out-of-memory .mono")];
      shown.push(...texts("#techniques h3, #techniques dt, #techniques dd, #techniques li"));
      return [document.title, ...shown, document.images.length];"""
    title, *shown, images = undisturbed(visit(render_html(hostile_report()), tmp_path, script)).answer
    assert shown == [HOSTILE] * 7
    assert images == 0
    assert title.startswith("Memory report: </script>")


def test_browser_writes_bytes_as_the_terminal_does(tmp_path: Path) -> None:
    numbers = random.Random(0)
    # Eighths of a unit are where rounding to two decimals meets exact ties.
    sizes = [int(2**power * eighths / 8) for power in (10, 20, 30) for eighths in range(8, 60)]
    sizes += [numbers.randrange(2**40) for _ in range(200)] + [0, 1, 1023]
    modules = tuple(ModuleMemory(f"m{i:03}", "T", 0, 0, 0, 0, size) for i, size in enumerate(sizes))
    report = replace(tiny_report(), stages={"fit": replace(tiny_report().stages["fit"], modules=modules)})
    script = """
      document.querySelector(".more").click();
      document.querySelector("#modules th[data-key=name] button").click();
      return texts("#modules tbody td:nth-child(4)");"""
    shown = undisturbed(visit(render_html(report), tmp_path, script)).answer
    assert shown == [format_bytes(size) if size else "0" for size in sizes]


def test_browser_writes_shares_as_the_terminal_does(tmp_path: Path) -> None:
    # Sixteenths meet ties of one decimal: Python and the page both go to the even digit.
    sizes = {"parameters": 1, "gradients": 3, "optimizer_state": 5, "activations": 7}
    held = CategoryBytes(sizes)
    fit = MemoryBreakdown(device="cpu", at_peak=held, maxima=held)
    page = render_html(replace(tiny_report(), stages={"fit": fit}))
    shown = undisturbed(visit(page, tmp_path, 'return texts("#categories tbody td:nth-child(3)");')).answer
    assert shown[:4] == [f"{size / 16:.1%}" for size in sizes.values()]
    assert shown[:4] == ["6.2%", "18.8%", "31.2%", "43.8%"]


def test_browser_shows_a_report_without_stages(tmp_path: Path) -> None:
    report = replace(tiny_report(), stages={}, steps=(), growth={})
    seen = undisturbed(visit(render_html(report), tmp_path, 'return texts("section.card")[0];'))
    assert seen.answer == "No step was profiled."


def test_page_works_in_a_frame_and_on_a_phone(tmp_path: Path) -> None:
    script = """
      const frame = document.createElement("iframe");
      frame.srcdoc = JSON.parse(text("#inner"));
      frame.style.width = "360px";
      document.body.prepend(frame);
      await new Promise((done) => { frame.onload = done; });
      const inner = frame.contentDocument;
      await until(() => inner.querySelector("#timeline-chart svg") && drawn(inner));
      return [inner.querySelector("#peak").textContent, inner.querySelector("#timeline-chart svg") !== null,
        inner.documentElement.scrollWidth <= frame.clientWidth];"""
    page = json.dumps(render_html(tiny_report())).replace("<", "\\u003c")
    outer = f'<!doctype html><body><script type="application/json" id="inner">{page}</script></body>'
    seen = visit(outer, tmp_path, script)
    assert seen.answer == ["56.00 MiB", True, True]
    assert seen.console == []


def test_a_page_that_asks_for_something_would_be_caught(tmp_path: Path) -> None:
    page = render_html(tiny_report()).replace(
        "<body>", '<body><img src="http://127.0.0.1:9/pixel.png" alt="">'
    )
    seen = visit(page, tmp_path)
    assert any("violates the following Content Security Policy" in line for line in seen.console)
    with pytest.raises(AssertionError):
        undisturbed(seen)
