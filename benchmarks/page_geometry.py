"""Measure an HTML page in headless Chromium: overlapping or clipped text, errors, requests.

    python benchmarks/page_geometry.py runs/a/report.html --pictures build/pictures

Every width, in light and in dark, gets a line; the exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from browser import Browser, program

WIDTHS = (390, 768, 1280)
MEASURE = r"""
(() => {
  const found = [], root = document.documentElement;
  const name = (node, box) =>
    `${node.tagName} ${JSON.stringify(node.textContent.trim().slice(0, 30))} at ` +
    `${Math.round(box.left)},${Math.round(box.top + scrollY)}`;
  const inBox = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 &&
    a.top < b.bottom - 1 && b.top < a.bottom - 1;
  if (root.scrollWidth > innerWidth)
    found.push(`the page is ${root.scrollWidth} wide and not ${innerWidth}`);
  const chosen = document.querySelector("[data-by][aria-pressed=true]");
  for (const axis of ["time", "step", "tokens"]) {
    document.querySelector(`[data-by=${axis}]`)?.click();
    for (const svg of document.querySelectorAll("svg.chart, figure > svg")) {
      const frame = svg.getBoundingClientRect();
      if (!frame.width) continue;
      const texts = [...svg.querySelectorAll("text")].map(t => [t, t.getBoundingClientRect()]);
      texts.forEach(([a, one], i) => {
        if (/NaN|undefined|Infinity/.test(a.textContent)) found.push(`no number: ${name(a, one)}`);
        if (one.left < frame.left - 0.5 || one.right > frame.right + 0.5 ||
            one.top < frame.top - 0.5 || one.bottom > frame.bottom + 0.5)
          found.push(`clipped: ${name(a, one)}`);
        if (one.height < 8) found.push(`too small to read: ${name(a, one)}`);
        for (const [b, other] of texts.slice(i + 1))
          if (one.left < other.right && other.left < one.right && one.top < other.bottom &&
              other.top < one.bottom) found.push(`overlap: ${name(a, one)} and ${name(b, other)}`);
      });
      if (!svg.querySelector("path:not(.grid):not(.cursor), circle, rect:not(.chosen)"))
        found.push("an empty chart");
      if (/NaN/.test(svg.innerHTML)) found.push(`no number by ${axis} in ${svg.textContent}`);
    }
  }
  chosen?.click();
  const blocks = [...document.querySelectorAll(
    "h1, h2, h3, .state, .tiles div, button, .read, .plain, td, th, summary, figcaption, pre, " +
    ".legend span, footer")]
    .filter(node => node.offsetParent && !node.closest("details:not([open]) > :not(summary)"))
    .map(node => [node, node.getBoundingClientRect()]);
  blocks.forEach(([a, one], i) => {
    if (one.left < -0.5) found.push(`left of the page: ${name(a, one)}`);
    if (getComputedStyle(a).overflowX !== "auto" && a.scrollWidth > a.clientWidth + 1 &&
        a.clientWidth) found.push(`wider than its box: ${name(a, one)}`);
    if (/^T[DH]$/.test(a.tagName) && a.textContent.trim().length > 2 && one.width < 30)
      found.push(`too narrow to read: ${name(a, one)}`);
    for (const [b, other] of blocks.slice(i + 1))
      if (inBox(one, other) && !a.contains(b) && !b.contains(a) &&
          (a.closest(".wide") === b.closest(".wide") || !a.closest(".wide") && !b.closest(".wide")))
        found.push(`overlap: ${name(a, one)} and ${name(b, other)}`);
  });
  for (const box of document.querySelectorAll(".wide")) {
    const cell = box.querySelector("th:first-child");
    if (cell && getComputedStyle(cell).position === "sticky" && box.scrollWidth > box.clientWidth &&
        cell.offsetWidth > 0.6 * box.clientWidth)
      found.push(`hides the other columns: ${name(cell, cell.getBoundingClientRect())}`);
  }
  for (const cell of document.querySelectorAll("h1, h2, h3, button, th, td")) {
    if (!cell.offsetParent) continue;
    const walk = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    for (let node = walk.nextNode(); node; node = walk.nextNode())
      for (const word of node.data.matchAll(/[^\s/]{2,12}(?=\s|$)/g)) {
        const range = document.createRange();
        range.setStart(node, word.index);
        range.setEnd(node, word.index + word[0].length);
        const tops = new Set([...range.getClientRects()].map(box => Math.round(box.top)));
        const whole = word.index === 0 || /\s/.test(node.data[word.index - 1]);
        if (whole && tops.size > 1)
          found.push(`broken: ${word[0]} in ${name(cell, cell.getBoundingClientRect())}`);
      }
  }
  return { found, charts: document.querySelectorAll("svg.chart, figure > svg").length,
    texts: blocks.length, dark: matchMedia("(prefers-color-scheme: dark)").matches,
    width: innerWidth };
})()
"""


def faults(browser: Browser, page: Path | str, width: int, *, dark: bool) -> list[str]:
    """Load a page and measure it.

    Returns:
        A sentence about everything that is wrong; messages of the console and requests are.
    """
    seen = browser.open(page, width, dark=dark)
    measured = browser.evaluate(MEASURE)
    assert (measured["dark"], measured["width"]) == (dark, width)
    assert measured["texts"] > 3
    found: list[str] = measured["found"]
    logged = [f"logged: {text}" for text in seen.logged]
    return [*found, *logged, *(f"asked for {address}" for address in seen.requests)]


def main() -> int:
    """Measure each page at every width and in both colours."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pages", nargs="+", help="files, or addresses of --watch")
    parser.add_argument(
        "--pictures", type=Path, help="directory for pictures and PDFs of the pages"
    )
    options = parser.parse_args()
    if program() is None:
        parser.error("there is no Chromium. Debian and Ubuntu: apt-get install chromium")
    total = 0
    with Browser() as browser:
        for number, page in enumerate(options.pages):
            place = page if page.startswith("http") else Path(page)
            for width in WIDTHS:
                for dark in (False, True):
                    found, look = faults(browser, place, width, dark=dark), "dark" * dark or "light"
                    total += len(found)
                    print(f"{page} {width} {look}: {len(found)} faults")
                    for fault in found[:12]:
                        print(f"  {fault}")
                    if options.pictures is not None:
                        options.pictures.mkdir(parents=True, exist_ok=True)
                        name = options.pictures / f"{number}-{width}-{look}"
                        name.with_suffix(".png").write_bytes(browser.picture())
            if options.pictures is not None:
                (options.pictures / f"{number}.pdf").write_bytes(browser.printed())
    return bool(total)


if __name__ == "__main__":
    sys.exit(main())
