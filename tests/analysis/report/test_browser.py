"""The report in a real browser: no errors, filters filter, sorting sorts, marks show their runs, keys suffice."""

import itertools
import random
import time
from importlib.resources import files

import numpy as np
import pytest

from analysis.front import knee, pareto_front
from analysis.report.page import page, report_data
from analysis.tables import filled as tables
from qbench.store.records import Outcome
from tests.analysis.conftest import losses, measured
from tests.analysis.report.conftest import HOSTILE, PPL, SPREAD, STORE
from tests.analysis.report.test_sections import declared_of

LABELS = (
    "return [...document.querySelectorAll('#table tbody tr')].map(row => row.cells[0].querySelector('a').textContent)"
)
NUMBERS = "return [...document.querySelectorAll('#table tbody tr')].map(row => parseFloat(row.cells[{}].textContent))"


def count(browser) -> str:
    return browser.execute_script("return document.getElementById('count').textContent")


def search(browser, words: str) -> None:
    box = browser.find_element("id", "search")
    box.clear()
    box.send_keys(words)
    time.sleep(0.3)  # it waits for the end of typing


def choose(browser, selector: str, words: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("css selector", selector)).select_by_visible_text(words)


def test_an_empty_and_a_one_row_database_draw_without_errors(database, store, visit):
    browser = visit(page(report_data(database, STORE)))
    assert "no runs yet" in browser.find_element("id", "overview").text
    store("gptq", 4)
    browser = visit(page(report_data(database, STORE)))
    assert "no run has been measured" in browser.find_element("id", "caption").text
    browser.find_element("link text", "gptq 4-bit").click()
    assert "No layer metrics" in browser.find_element("id", "run").text


def test_filters_and_conditions_leave_the_right_runs(opened):
    assert count(opened) == "14 runs of 14"
    choose(opened, "[data-filter=algo]", "gptq")
    assert count(opened) == "3 runs of 14"
    assert all(label.startswith("gptq") for label in opened.execute_script(LABELS))
    opened.find_element("css selector", "#filters button").click()
    for words, left in (
        ("awq 4-bit", 1),
        ("bits<4", 8),
        ("bits_per_weight<=3.3125 ppl<45", 4),
        ("singular", 1),
        ("zzz", 0),
    ):
        search(opened, words)
        assert count(opened).startswith(f"{left} run"), words
    assert "No run matches" in opened.find_element("id", "table").text


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("bits <4", 8),
        ("bits < 4", 8),
        ("bits= 3 ppl < 45", 4),
        ("bits=4.0", 4),
        ("size>=30,000,000", 8),
        ("ppl<1,000.5", 13),
        ("calib_seed=3", 0),
        ("src=x onerror = window.pwned=2", 4),
    ],
)
def test_conditions_may_be_written_with_spaces_commas_and_equality(opened, words, left):
    search(opened, words)
    assert count(opened) == f"{left} runs of 14"


@pytest.mark.parametrize(
    "word", ["sede<3", "bits<", "4>bits", "bits<4<5", "bits==4", "ppl>1,5", "size<1gb", "constructor<3"]
)
def test_what_looks_like_a_condition_and_is_none_is_named(opened, word):
    search(opened, f"gptq {word}")
    assert count(opened).startswith(f'3 runs of 14; "{word}" is no condition such as bits<4.5 (on size, ')
    assert ", ppl)" in count(opened)
    search(opened, "gptq")
    assert count(opened) == "3 runs of 14"


def test_columns_sort_both_ways_with_the_unknown_last(opened):
    heads = [each.text for each in opened.find_elements("css selector", "#table thead th")]
    column = next(i for i, head in enumerate(heads) if head.startswith("PPL c4-sample"))
    known = sorted([28.0, *(a + b for a, b in itertools.product(PPL.values(), SPREAD.values()))])
    for wanted, direction in ((known, "ascending"), (known[::-1], "descending")):
        opened.find_elements("css selector", "#table thead button")[column].click()
        found = opened.execute_script(NUMBERS.format(column))
        assert found[:-1] == pytest.approx(wanted, rel=0.03)
        assert found[-1] is None or np.isnan(found[-1])
        head = opened.find_elements("css selector", "#table thead th")[column]
        assert head.get_attribute("aria-sort") == direction
    assert opened.execute_script("return document.activeElement.dataset.sort") == "e0"


def test_the_front_is_that_of_the_figures(filled, opened):
    data = report_data(filled, STORE)
    evaluation = data["evaluations"][0]
    runs = [run for run in evaluation["run"] if not data["baseline"][run]]
    values = dict(zip(evaluation["run"], evaluation["value"], strict=True))
    costs = [data["numbers"]["bits_per_weight"]["values"][run] for run in runs]
    front = pareto_front(np.array(costs), np.array([values[run] for run in runs]))
    wanted = {f"#run-{data['ids'][run]}" for run, on in zip(runs, front, strict=True) if on}
    opened.execute_script("document.getElementById('front-list').open = true")
    links = opened.find_elements("css selector", "#front-list a")
    assert {each.get_dom_attribute("href") for each in links} == wanted


def test_any_front_is_what_no_point_dominates(browser):
    source = (files("analysis.report") / "assets" / "front.js").read_text()
    chance = random.Random(0)
    cases = [[(chance.randrange(5), chance.randrange(5)) for _ in range(chance.randrange(9))] for _ in range(300)]
    script = source + "return arguments[0].map(points => onFront(points.map(([x, loss]) => ({x, loss}))))"
    for case, found in zip(cases, browser.execute_script(script, cases), strict=True):
        costs, losses = (np.array([point[axis] for point in case]) for axis in (0, 1))
        assert found == pareto_front(costs, losses).tolist(), case
    bends = source + "return arguments[0].map(points => points.indexOf(kneeOf(points, arguments[1])))"
    fronts = [
        list(zip(itertools.count(2), sorted(chance.sample(range(1, 99), chance.randrange(7)), reverse=True)))
        for _ in range(200)
    ]
    for logarithmic in (False, True):
        given = [[{"x": x, "loss": loss} for x, loss in front] for front in fronts]
        found = browser.execute_script(bends, given, logarithmic)
        for front, at in zip(fronts, found, strict=True):
            costs, losses = (np.array([point[axis] for point in front], dtype=float) for axis in (0, 1))
            expected = knee(costs, losses, logarithmic=logarithmic)
            assert at == (-1 if expected is None else expected), front


def test_pointing_at_a_mark_shows_its_run_and_a_click_opens_it(filled, opened):
    from selenium.webdriver.common.action_chains import ActionChains

    where = """
        const plot = document.getElementById("plot");
        const { xaxis, yaxis } = plot._fullLayout;
        const box = plot.getBoundingClientRect();
        const left = xaxis._offset + xaxis.d2p(3.3125) - box.width / 2;
        return [left, yaxis._offset + yaxis.d2p(arguments[0]) - box.height / 2];
    """
    plot = opened.find_element("id", "plot")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    x, y = opened.execute_script(where, PPL["gptq"] + SPREAD[3])
    pointer = ActionChains(opened).move_to_element_with_offset(plot, round(x), round(y))
    pointer.perform()
    time.sleep(0.2)
    tip = opened.find_element("id", "tip")
    assert tip.is_displayed()
    assert tip.find_element("tag name", "strong").text == "gptq 3-bit"
    lines = [each.text for each in tip.find_elements("css selector", "p:first-child span")]
    assert any(line.startswith("PPL c4-sample, window-512: ") and "±" in line for line in lines)
    assert any("Δ from full precision: +" in line for line in lines)
    pointer.click().perform()
    assert opened.find_element("css selector", "#run h1").text == "gptq 3-bit"
    opened.back()
    assert opened.find_element("css selector", "#list:not([hidden])").is_displayed()


def test_keys_alone_reach_marks_runs_and_maps(opened):
    from selenium.webdriver.common.keys import Keys

    opened.execute_script("document.getElementById('chart').focus()")
    press = lambda key: opened.switch_to.active_element.send_keys(key)  # noqa: E731
    press(Keys.END)
    said = opened.execute_script("return document.getElementById('spoken').textContent")
    assert "4-bit" in said
    press(Keys.HOME)
    assert "2-bit" in opened.execute_script("return document.getElementById('spoken').textContent")
    assert opened.find_element("css selector", "#tip strong").text == "gptq 2-bit"
    assert opened.find_element("id", "ring").is_displayed()
    press(Keys.ESCAPE)
    assert not opened.execute_script("return document.getElementById('tip').checkVisibility()")
    for _ in range(12):
        press(Keys.ARROW_RIGHT)
        if "gptq 4-bit" in opened.execute_script("return document.getElementById('spoken').textContent"):
            break
    press(Keys.ENTER)
    assert opened.find_element("css selector", "#run h1").text == "gptq 4-bit"
    assert f"Failed measurement: arc, p\nEvaluationError: {HOSTILE}" in opened.find_element("id", "run").text
    cell = opened.find_element("css selector", '.map td[tabindex="0"]')
    cell.send_keys(Keys.ARROW_RIGHT)
    assert opened.find_element("css selector", ".readout").text == "block 1 self_attn.q_proj: 0.02"


def test_marks_hidden_by_the_legend_stay_hidden_and_are_passed_over_by_keys(opened):
    from selenium.webdriver.common.keys import Keys

    hidden = """
        const off = document.getElementById("plot").data.filter((each) => each.visible === "legendonly");
        return [...new Set(off.map((each) => each.name))].sort();
    """
    toggle = "//*[@class='legend']//*[@class='traces'][.//*[.='{}']]//*[contains(@class, 'legendtoggle')]"
    said = "return document.getElementById('spoken').textContent"
    for name in ("gptq", "front"):
        opened.find_element("xpath", toggle.format(name)).click()
        time.sleep(0.5)  # a second click within 0.3 s would be a double click
    assert opened.execute_script(hidden) == ["front", "gptq"]
    search(opened, "awq")
    assert opened.execute_script(hidden) == ["front"]
    search(opened, "bits<4")
    assert opened.execute_script(hidden) == ["front", "gptq"]
    opened.execute_script("document.getElementById('chart').focus()")
    found = set()
    for _ in range(7):
        opened.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
        found.add(opened.execute_script(said).partition(" ")[0])
    assert found == {"awq", "rtn", HOSTILE.partition(" ")[0]}
    assert "gptq" not in opened.find_element("id", "tip").text
    opened.find_element("xpath", toggle.format("gptq")).click()
    time.sleep(0.5)
    assert opened.execute_script(hidden) == ["front"]
    opened.switch_to.active_element.send_keys(Keys.HOME)
    assert opened.execute_script(said).startswith("gptq 2-bit")


def test_the_figure_says_names_as_they_are_and_offers_no_upload(opened):
    legend = opened.execute_script("return [...document.querySelectorAll('.legendtext')].map(each => each.textContent)")
    assert legend == [f"{HOSTILE[:59]}…", "awq", "gptq", "rtn", "front"]
    choose(
        opened,
        "#evaluation",
        next(each.text for each in opened.find_elements("css selector", "#evaluation option") if HOSTILE in each.text),
    )
    title = opened.execute_script("return document.querySelector('.ytitle').textContent")
    assert title == f"perplexity, {HOSTILE}"[:59] + "…"
    assert opened.execute_script("return document.querySelectorAll('.modebar-btn').length") == 0
    context = opened.execute_script(
        "const {_context: c} = document.getElementById('plot'); return [c.showSendToCloud, c.plotlyServerURL]"
    )
    assert context == [False, ""]


def test_the_figure_reads_no_markup_in_names(filled, visit):
    data = report_data(filled, STORE)
    data["evaluations"][0]["task"] = "<b>x</b> &amp; <a href='https://a.org'>y</a>"
    browser = visit(page(data))
    title = browser.execute_script("return document.querySelector('.ytitle').textContent")
    assert title.startswith("perplexity, <b>x</b> &amp; <a href='https://a.org'>y</a>")
    assert browser.execute_script("return document.querySelectorAll('#plot a').length") == 0


def test_the_figure_draws_bars_faded_marks_front_knee_and_full_precision(opened):
    drawn = opened.execute_script("""
        const plot = document.getElementById("plot");
        const marks = plot.data.filter((each) => each.customdata);
        return {
            bars: plot.querySelectorAll("path.yerror").length,
            faded: marks.filter((each) => each.opacity < 1).flatMap((each) => each.y),
            front: plot.data.find((each) => each.name === "front").y,
            text: [...plot.querySelectorAll(".textpoint, .annotation-text")].map((each) => each.textContent),
            lines: plot.querySelectorAll(".shapelayer path").length,
        };
    """)
    assert drawn["bars"] == len(PPL) * len(SPREAD)
    assert len(drawn["faded"]) == drawn["bars"] - len(SPREAD)
    assert drawn["front"] == pytest.approx([PPL["gptq"] + each for each in SPREAD.values()], rel=0.03)
    assert sorted(drawn["text"]) == ["full precision 28, 16 bits ▸", "knee"]
    assert drawn["lines"] == 1


def test_weights_in_full_precision_stand_behind_a_break(filled, store, visit):
    for kv, value in (("int8_token", 28.2), ("int2_token", 70.0)):
        done = Outcome(bits_per_weight=32.0, quantize_s=1.0)
        store("rtn", None, measured(losses(np.log(value))), outcome=done, kv_format=kv)
    browser = visit(page(report_data(filled, STORE)))
    figure = "const {xaxis, xaxis2} = document.getElementById('plot')._fullLayout;"
    low, high = browser.execute_script(figure + "return xaxis.range")
    assert high - low < 4, "the axis is as wide as the quantized weights need"
    assert browser.execute_script(figure + "return xaxis2.ticktext") == ["32"]
    assert "Behind the break" in browser.find_element("id", "caption").text
    browser.execute_script("document.getElementById('chart').focus()")
    browser.switch_to.active_element.send_keys("\ue010")  # End
    assert "bits/weight: 32" in browser.execute_script("return document.getElementById('spoken').textContent")
    assert browser.find_element("id", "ring").is_displayed()
    choose(browser, "#cost", "quantizing")
    assert browser.execute_script("return document.getElementById('plot')._fullLayout.xaxis2 === undefined")


def test_equal_sizes_get_one_tick(filled, visit):
    data = report_data(filled, STORE)
    data["numbers"]["model_bytes"]["values"] = [3_674_620] * len(data["ids"])
    browser = visit(page(data))
    choose(browser, "#cost", data["numbers"]["model_bytes"]["title"])
    ticks = "return [...document.querySelectorAll('.xtick')].map((each) => each.textContent)"
    assert browser.execute_script(ticks) == ["3.67 MB"]


def test_only_a_metric_with_a_better_direction_has_dominated_runs(filled, visit):
    data = report_data(filled, STORE)
    assert "Faded: dominated." in visit(page(data)).find_element("id", "caption").text
    data["evaluations"][0]["better"] = 0
    browser = visit(page(data))
    assert "dominated" not in browser.find_element("id", "caption").text
    browser.find_element("id", "chart").send_keys("\ue010")  # End
    assert not browser.execute_script("return document.getElementById('spoken').textContent").endswith("front")


def test_another_measurement_may_be_the_cost(opened):
    options = [each.text for each in opened.find_elements("css selector", "#cost option")]
    other = next(words for words in options if HOSTILE in words)
    choose(opened, "#cost", other)
    assert opened.execute_script("return document.querySelector('.xtitle').textContent").endswith("…")
    drawn = opened.execute_script("return document.querySelectorAll('#plot path.yerror').length")
    assert drawn == len(PPL) * len(SPREAD)


def test_the_sections_are_listed_linked_and_reachable_by_keys(opened):
    links = opened.find_elements("css selector", "#contents a")
    titles = [each.text for each in links]
    assert titles[:3] == ["Accuracy against cost", "Results", "Declared tables"]
    for each in links:
        assert opened.execute_script("return !!document.querySelector(arguments[0])", each.get_dom_attribute("href"))
    links[titles.index("Best practice")].click()
    assert opened.execute_script("return document.getElementById('best').getBoundingClientRect().top") < 200
    regions = opened.find_elements("css selector", "#sections .scroll")
    assert regions
    assert all(each.get_dom_attribute("tabindex") == "0" and each.get_dom_attribute("aria-label") for each in regions)
    images = opened.execute_script(
        "return [...document.querySelectorAll('#fronts img')].map((each) => [each.alt, each.src])"
    )
    assert images
    assert all(alt and source.startswith("data:image/svg+xml;base64,") for alt, source in images)
    assert HOSTILE in opened.find_element("id", "sections").text


def test_the_best_and_what_ties_with_it_are_marked(filled, opened):
    evaluation = report_data(filled, STORE)["evaluations"][0]
    cells = "return [...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[1].textContent)"
    starred = [each for each in opened.execute_script(cells) if each.endswith("*")]
    assert len(starred) == sum(evaluation["best"]) > 0
    assert opened.find_element("id", "marked").is_displayed()


def test_a_declared_tables_value_leads_to_its_run(database, store, visit):
    found = tables.filled(database, declared_of(store))
    browser = visit(page(report_data(database, STORE, [found])))
    table = browser.find_element("css selector", "#declared table")
    assert [each.text for each in table.find_elements("css selector", "tbody tr:nth-child(3) > *")][1] == "not run"
    assert browser.find_elements("css selector", "#declared .block:has(> .scroll > table) > figure > img")
    table.find_element("css selector", "tbody tr:nth-child(3) strong a").click()
    assert browser.find_element("css selector", "#run h1").text == "gptq 4-bit"


def test_the_figure_is_saved_as_png(opened, tmp_path):
    opened.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    opened.find_element("xpath", "//button[.='Save as PNG']").click()
    saved = tmp_path / "pareto.png"
    deadline = time.monotonic() + 10
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert saved.read_bytes().startswith(b"\x89PNG")


def test_a_name_from_the_database_is_text(opened):
    choose(opened, "[data-filter=algo]", HOSTILE)
    assert opened.execute_script(LABELS)[0].startswith(HOSTILE)
    opened.find_element("css selector", "#table tbody a").click()
    assert opened.find_element("css selector", "#run h1").text.startswith(HOSTILE)


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("fragment", ["", "#run-2", "#run-2-3"])
def test_no_screen_scrolls_sideways(filled, visit, browser, width, fragment):
    phone = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    visit(page(report_data(filled, STORE)), fragment)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
