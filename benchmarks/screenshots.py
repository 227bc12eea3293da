r"""The two pictures of the README: the top of a purification's page and of the bench's page, taken by Chromium.

    unbackdoor demo image --out demo
    unbackdoor purify fst demo/victim --clean demo/clean.parquet --data demo/test.parquet \
        --attack demo/victim/attack.json --out purified --alpha 0.5 --epochs 20 --learning-rate 0.02 --batch-size 32
    unbackdoor report docs/results/cells/images -o bench.html
    python benchmarks/screenshots.py purified/report.html --out docs/assets/report.png --height 860
    python benchmarks/screenshots.py bench.html --out docs/assets/bench.png --width 1200 --height 820 --top 315 \
        --filter task=cifar10 "rate=1 %" "budget=1,000 unseen"

Needs `apt-get install chromium chromium-driver`, and selenium, which the dev extra has. The pictures have 256 colours,
so that each stays under 150 KB.
"""

import argparse
import base64
import io
import shutil
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select


def screenshot(page: Path, width: int, height: int, top: int, filters: list[str]) -> Image.Image:
    """The page in a window of `width` x `height` pixels, scrolled down by `top`, with the bench's filters chosen.

    Each of `filters` is `kind=option`: `rate=1 %`. Blanks match the no-break spaces of the page.
    """
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.get(page.resolve().as_uri())
        for kind, _, option in (given.partition("=") for given in filters):
            select = Select(browser.find_element(By.ID, f"filter-{kind}"))
            select.select_by_index([shown.text.replace("\u00a0", " ") for shown in select.options].index(option))
        browser.execute_script("document.activeElement.blur(); window.scrollTo(0, arguments[0])", top)
        png = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    finally:
        browser.quit()
    return Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=1000, help="pixels")
    parser.add_argument("--height", type=int, default=700, help="pixels")
    parser.add_argument("--top", type=int, default=0, help="pixels above the picture")
    parser.add_argument("--filter", nargs="*", default=[], metavar="KIND=OPTION", help="of the bench's page")
    given = parser.parse_args()
    picture = screenshot(given.page, given.width, given.height, given.top, given.filter)
    picture.quantize(256, dither=Image.Dither.NONE).save(given.out, optimize=True)
    print(f"Wrote {given.out}, {given.out.stat().st_size / 1000:.0f} kB.")
