"""Pictures of a report as Debian's Chromium shows it: ``python tests/analysis/screenshots.py RUN_DIR OUT``.

Writes ``report.png`` (the top), ``report_browser.png`` (the part to leaf through) and ``report_phone.png`` (dark, 390
pixels wide) of RUN_DIR/report.html.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium of the system's."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def main() -> None:
    """Take the three pictures; of the part to leaf through its first 1,100 pixels."""
    report, out = Path(sys.argv[1]).resolve() / "report.html", Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.goto(report.as_uri())
        page.screenshot(path=out / "report.png")
        section = page.locator("section", has=page.locator("#browser"))
        section.scroll_into_view_if_needed()
        page.wait_for_selector("#browse-list[aria-busy=false]", state="attached")  # its texts come from files
        box = section.bounding_box()
        place = page.evaluate("window.scrollY")
        clip = {"x": box["x"], "y": box["y"] + place, "width": box["width"], "height": min(box["height"], 1100)}
        page.screenshot(path=out / "report_browser.png", clip=clip, full_page=True)
        phone = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        phone.goto(report.as_uri())
        phone.screenshot(path=out / "report_phone.png")


if __name__ == "__main__":
    main()
