"""The report's page in a real browser: Chromium without a window, driven by selenium."""

import base64
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stores import CONTROL, TRIGGERED, failure, put_many, result, share, spec, victim
from unbackdoor._bench import Store, identity
from unbackdoor._reports.store.run import write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)", allow_module_level=True)
selenium = pytest.importorskip("selenium", reason="needs selenium, which the dev extra has")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

HOSTILE = "</script><script>window.hit=1</script><img src=x onerror=window.hit=1> ]]> \"' =cmd\nnext"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def small(folder: Path) -> Path:
    """Two attacks, one at two rates, one that did not take, a failure, all-to-all, and names that want to be markup."""
    store = Store(folder / "runs")
    badnets, low, weak = victim(), victim(rate=0.01), victim("blended")
    swapped = victim(parameters={"label_rule": "all-to-all"})
    own = victim(HOSTILE, task={"name": HOSTILE})
    for of, success in ((badnets, 1.0), (low, 0.95), (swapped, 0.9), (own, 1.0)):
        rule = {"label_rule": "all-to-all" if of is swapped else "all-to-one"}
        store.put(spec(of, "none"), result(0.96, success, method=None, **rule))
        for place, method in enumerate(("fine-tuning", "fst", "nad")):
            for seed in (0, 1):
                left = max(0.0, success - 0.3 * (place + 1) + 0.02 * seed)
                store.put(spec(of, method, seed), result(0.94 - 0.01 * place, left, seconds=3.0 + place, **rule))
    store.put(spec(weak, "none"), result(0.97, 0.3, implanted=False))
    store.put(spec(weak, "fst"), result(0.5, 0.0, implanted=False))
    store.put(spec(own, HOSTILE, text=HOSTILE), result(0.9, 0.5, warnings=[HOSTILE]))
    store.put(spec(badnets, "nad", 2), failure(HOSTILE))
    flips = {identity(badnets): share(0.02, TRIGGERED)}
    store.put(spec(CONTROL, "none"), result(0.97, flips=flips))
    store.put(spec(CONTROL, "fst"), result(0.91, flips=flips))
    store.place.write("grids/digits-0123abcd.toml", f"# {HOSTILE}")
    write_report(store.address, str(folder / "report.html"))
    return folder / "report.html"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("page"))


def load(browser: Any, path: Path, width: int = 1280, *, dark: bool = False) -> Any:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    for kind in ("performance", "browser"):
        browser.get_log(kind)
    browser.get(path.as_uri())
    return browser


def column(browser: Any, section: str, number: int) -> list[str]:
    """The numbers of a column, without what is small."""
    script = """return [...document.querySelectorAll(arguments[0] + ' tbody tr')]
        .map((line) => line.children[arguments[1]]).map((cell) => (cell.querySelector('b') || cell).textContent)"""
    return list(browser.execute_script(script, section, number))


def test_it_loads_without_errors_and_without_the_network(browser: Any, path: Path) -> None:
    load(browser, path)
    for details in browser.find_elements(By.CSS_SELECTOR, "details"):
        browser.execute_script("arguments[0].open = true", details)
    unpack = "return [...document.querySelectorAll('.cell pre')].every((each) => each.textContent.length > 3)"
    WebDriverWait(browser, 10).until(lambda found: found.execute_script(unpack))
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert asked == {path.as_uri()}
    assert browser.get_log("browser") == []


def test_hostile_text_appears_as_text(browser: Any, path: Path) -> None:
    load(browser, path)
    browser.execute_script("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    ready = "return document.querySelector('#lines').textContent.includes('warnings')"
    WebDriverWait(browser, 10).until(lambda found: found.execute_script(ready))
    assert browser.execute_script("return window.hit") is None
    assert browser.execute_script("return document.images.length") == 0
    for place in (
        "#filter-task",
        "#filter-attack",
        "#filter-method",
        "#blocks",
        "#settings",
        "#failed",
        "#lines",
        "#grids",
    ):
        assert "<img src=x onerror=window.hit=1>" in browser.execute_script(
            "return document.querySelector(arguments[0]).textContent", place
        )


def test_a_cell_has_its_command_and_its_whole_record(browser: Any, path: Path) -> None:
    load(browser, path)
    cell = browser.find_element(By.CSS_SELECTOR, "#lines details")
    key = cell.find_element(By.TAG_NAME, "code").text
    cell.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    WebDriverWait(browser, 20).until(
        lambda _: any(len(each.text) > 100 for each in cell.find_elements(By.TAG_NAME, "pre"))
    )
    command, record = (each.text for each in cell.find_elements(By.TAG_NAME, "pre"))
    assert command == f"unbackdoor bench runs/grids/digits-0123abcd.toml --out runs --rerun all --only {key}"
    kept = json.loads((path.parent / "runs" / "cells" / f"{key}.json").read_text())
    assert json.loads(record) == {"spec": kept["spec"], "result": kept["result"]}


def test_sorting_by_mouse_and_keyboard(browser: Any, path: Path) -> None:
    load(browser, path)
    before = column(browser, "#settings", 7)
    button = "#settings th:nth-child(8) button"
    browser.find_element(By.CSS_SELECTOR, button).click()
    numbers = [float(text) for text in column(browser, "#settings", 7) if text != "–"]
    assert numbers == sorted(numbers)
    assert numbers
    assert column(browser, "#settings", 7)[-1] == "–"  # what is absent comes last
    assert browser.find_element(By.CSS_SELECTOR, "#settings th:nth-child(8)").get_attribute("aria-sort") == "ascending"
    focused = browser.switch_to.active_element
    assert "attack success" in focused.text  # the heading keeps the focus
    focused.send_keys(Keys.ENTER)
    turned = [float(text) for text in column(browser, "#settings", 7) if text != "–"]
    assert turned == sorted(numbers, reverse=True)
    browser.switch_to.active_element.send_keys(Keys.SPACE)
    assert column(browser, "#settings", 7) == before
    browser.find_element(By.CSS_SELECTOR, "#blocks table thead tr:last-child th:nth-child(2) button").click()
    first = "#blocks div:first-child > .scroll"
    success = [float(text) for text in column(browser, first, 1)]
    assert success == sorted(success)
    assert len(success) == 5


def test_the_worst_and_the_mean_are_over_the_attacks_that_are_shown(browser: Any, path: Path) -> None:
    load(browser, path)
    titles = [each.text for each in browser.find_elements(By.CSS_SELECTOR, "#blocks h3")]
    number = next(at for at, title in enumerate(titles, 1) if title.startswith("digits") and "all-to-all" not in title)
    block = f"#blocks > div:nth-child({number}) > .scroll"
    place = column(browser, block, 0).index("fst")
    assert [column(browser, block, at)[place] for at in (1, 2)] == ["41.0", "38.5"]  # 5 %: 40, 42; 1 %: 35, 37
    Select(browser.find_element(By.ID, "filter-rate")).select_by_visible_text("5\u00a0%")
    Select(browser.find_element(By.ID, "filter-attack")).select_by_visible_text("badnets")
    assert "success over attacks" not in browser.find_element(By.ID, "blocks").text


def test_filters_leave_the_baselines_and_the_control(browser: Any, path: Path) -> None:
    load(browser, path)
    Select(browser.find_element(By.ID, "filter-task")).select_by_visible_text("digits")
    Select(browser.find_element(By.ID, "filter-attack")).select_by_visible_text("badnets")
    Select(browser.find_element(By.ID, "filter-rate")).select_by_index(1)  # the highest
    Select(browser.find_element(By.ID, "filter-method")).select_by_visible_text("fst")
    assert set(column(browser, "#settings", 0)) == {"none", "fine-tuning", "fst"}
    assert set(column(browser, "#settings", 1)) == {"badnets", "clean control"}
    assert set(column(browser, "#settings", 2)) == {"5\u00a0%", "–"}
    assert browser.find_element(By.ID, "shown").text.startswith("5 of ")
    assert browser.find_element(By.CSS_SELECTOR, "#blocks thead").text.count("badnets") == 1
    browser.find_element(By.CSS_SELECTOR, "#filters button").send_keys(Keys.ENTER)
    shown, total = browser.find_element(By.ID, "shown").text.split(" settings")[0].split(" of ")
    assert shown == total


def test_a_column_that_was_sorted_by_may_be_filtered_away(browser: Any, path: Path) -> None:
    load(browser, path)
    browser.find_element(By.CSS_SELECTOR, "#blocks table thead tr:last-child th:nth-child(5) button").click()
    attacks = Select(browser.find_element(By.ID, "filter-attack"))
    for name in [option.text for option in attacks.options]:
        attacks.select_by_visible_text(name)
        assert browser.find_element(By.ID, "shown").text
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_numbers_flags_and_pictures_are_there(browser: Any, path: Path) -> None:
    load(browser, path)
    blocks = browser.find_element(By.ID, "blocks").text
    assert "† not implanted" in blocks
    assert "✕ 1 failed" in blocks
    assert "clean flips 2.0" in blocks
    assert "71.0\n± 1.4, n = 2" in blocks  # fine-tuning: 70 and 72 %
    assert "all-to-all attacks" in blocks
    for place in ("scatter", "rates", "costs"):
        assert browser.find_elements(By.CSS_SELECTOR, f"#{place} svg .mark")
    headings = [each.text for each in browser.find_elements(By.CSS_SELECTOR, "#scatter h3")]
    assert headings == ["All-to-all attacks"]


def test_everything_can_be_reached_by_the_keyboard(browser: Any, path: Path) -> None:
    load(browser, path)
    reached = []
    for _ in range(14):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(
            browser.execute_script("return document.activeElement.id || document.activeElement.textContent.trim()")
        )
    for name in ("To the tables", "filter-attack", "filter-method", "Show all", "method"):
        assert name in reached
    outline = browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [375, 1280])
def test_it_fits_a_phone_and_both_schemes(browser: Any, path: Path, width: int, dark: bool, tmp_path: Path) -> None:
    load(browser, path, width, dark=dark)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    colours = (
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor].map((c) => c.match(/\\d+/g))"
    )
    text, page = (sum(map(int, found)) for found in browser.execute_script(colours))
    assert (text > 600 > 100 > page) if dark else (text < 100 < 600 < page)
    picture = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    (tmp_path / "page.png").write_bytes(base64.b64decode(picture["data"]))  # for whoever wants to look


def loaded(browser: Any) -> Any:
    """Milliseconds until everything was there; 0 before."""
    return browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")


@pytest.mark.thorough
def test_a_thousand_cells_load_in_two_seconds(browser: Any, tmp_path: Path) -> None:
    store = put_many(tmp_path / "runs", 1000)
    write_report(store.address, str(tmp_path / "report.html"))
    took = []
    for _ in range(5):  # the fastest: other work on the machine slows the others down
        load(browser, tmp_path / "report.html")
        took.append(WebDriverWait(browser, 20).until(loaded))
        if took[-1] < 2000:
            break
        time.sleep(1)
    assert min(took) < 2000, took
    assert "1,344 cells" in browser.find_element(By.ID, "shown").text
