"""Two runs beside each other, and thousands of them, in a real browser."""

import copy

import pytest

from analysis.report.page import page, report_data
from tests.analysis.report.conftest import STORE, add_layers, sha_of
from tests.analysis.report.test_browser import choose, count


def test_two_runs_stand_side_by_side(opened):
    opened.find_element("link text", "gptq 4-bit").click()
    options = [each.text for each in opened.find_elements("css selector", "#beside option")]
    choose(opened, "#beside", next(words for words in options if words.startswith("awq 3-bit")))
    opened.find_element("xpath", "//h1[.='gptq 4-bit beside awq 3-bit']")
    assert "Settings that differ" in opened.find_element("id", "run").text


@pytest.mark.parametrize(("width", "abreast"), [(1280, True), (390, False)])
def test_maps_of_two_runs_stand_side_by_side_where_there_is_room(filled, visit, browser, width, abreast):
    pair = [filled.find([sha_of(filled, "gptq", bits)]).popitem()[1].id for bits in (4, 3)]
    add_layers(filled, pair[1])
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    visit(page(report_data(filled, STORE)), f"#run-{pair[0]}-{pair[1]}")
    first, second = (each.rect for each in browser.find_elements("css selector", ".map")[:2])
    assert (second["x"] > first["x"] + first["width"]) == abreast
    assert (second["y"] > first["y"] + first["height"]) == (not abreast)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_arrow_keys_go_through_the_runs_to_put_beside(opened):
    from selenium.webdriver.common.keys import Keys

    opened.find_element("link text", "gptq 4-bit").click()
    assert opened.switch_to.active_element.get_dom_attribute("id") == "run"
    labels = [each.text for each in opened.find_elements("css selector", "#beside option")]
    opened.find_element("id", "beside").send_keys(Keys.ARROW_DOWN)
    for label in labels[1:4]:
        name = label.rpartition(" #")[0]
        opened.find_element("xpath", f"//h1[.='gptq 4-bit beside {name}']")
        chosen = opened.switch_to.active_element
        assert chosen.find_element("css selector", "option:checked").text == label
        chosen.send_keys(Keys.ARROW_DOWN)
    opened.back()
    assert opened.find_element("css selector", "#list:not([hidden])").is_displayed()


def test_the_list_of_runs_to_put_beside_says_where_it_is_cut(filled, opened, visit):
    label = "return document.getElementById('beside').parentElement.firstChild.textContent"
    opened.find_element("link text", "gptq 4-bit").click()
    opened.find_element("id", "beside")  # waits for it
    assert opened.execute_script(label) == "Beside"
    browser = visit(page(tiled(report_data(filled, STORE), 1200)), "#run-1200-2")
    assert browser.execute_script(label) == "Beside (the newest 500 of 1,199 runs of this model)"
    assert len(browser.find_elements("css selector", "#beside option")) == 1 + 500 + 1


def test_five_thousand_runs_are_shown_a_page_at_a_time(filled, visit):
    browser = visit(page(tiled(report_data(filled, STORE), 5000)))
    assert count(browser) == "5,000 runs of 5,000"
    assert len(browser.find_elements("css selector", "#table tbody tr")) == 100


def test_turning_pages_keeps_the_focus_on_their_buttons(filled, visit):
    from selenium.webdriver.common.keys import Keys

    browser = visit(page(tiled(report_data(filled, STORE), 250)))
    pages = browser.find_element("id", "pages")
    pages.find_element("css selector", "button:last-child").send_keys(Keys.ENTER)
    for words, focused in (("101–200 of 250", "Next →"), ("201–250 of 250", "← Back"), ("101–200 of 250", "← Back")):
        assert pages.find_element("tag name", "span").text == words
        assert browser.switch_to.active_element.text == focused
        browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert pages.find_element("tag name", "span").text == "1–100 of 250"


def tiled(data: dict, total: int) -> dict:
    """The same runs again and again, under new ids."""
    data = copy.deepcopy(data)
    n = len(data["ids"])
    source = [index % n for index in range(total)]
    data["ids"] = list(range(1, total + 1))
    for name in ("keys", "labels", "baseline", "attempts", "environment", "specs", "phases"):
        data[name] = [data[name][index] for index in source]
    for column in data["texts"].values():
        column["codes"] = [column["codes"][index] for index in source]
    for column in data["numbers"].values():
        column["values"] = [column["values"][index] for index in source]
    for evaluation in data["evaluations"]:
        at = {run: position for position, run in enumerate(evaluation["run"])}
        runs = [run for run in range(total) if source[run] in at]
        for name in ("value", "stderr", "n", "delta", "deltaStderr", "noise", "best"):
            evaluation[name] = [evaluation[name][at[source[run]]] for run in runs]
        evaluation["run"] = runs
    maps = next(iter(data["layers"]["runs"].values()))
    data["layers"]["runs"] = dict.fromkeys(range(total), maps)
    return data
