"""Measure an HTML page in headless Chromium: overlapping or clipped text, errors, requests.

    python benchmarks/page_geometry.py runs/a/report.html

Every width, in light and in dark, gets a line; the exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTHS = (390, 768, 1280)
MEASURE = r"""
addEventListener("load", () => setTimeout(() => {
  const found = [], root = document.documentElement;
  const name = (node, box) =>
    `${node.tagName} ${JSON.stringify(node.textContent.trim().slice(0, 30))} at ` +
    `${Math.round(box.left)},${Math.round(box.top + scrollY)}`;
  if (root.scrollWidth > innerWidth)
    found.push(`the page is ${root.scrollWidth} wide and not ${innerWidth}`);
  for (const axis of ["time", "step", "tokens"]) {
    document.querySelector(`[data-by=${axis}]`)?.click();
    for (const svg of document.querySelectorAll("figure svg.chart")) {
      const frame = svg.getBoundingClientRect();
      const texts = [...svg.querySelectorAll("text")].map(t => [t, t.getBoundingClientRect()]);
      texts.forEach(([a, one], i) => {
        if (/NaN|undefined|Infinity/.test(a.textContent)) found.push(`no number: ${name(a, one)}`);
        if (one.left < frame.left || one.right > frame.right + 0.5 || one.top < frame.top ||
            one.bottom > frame.bottom + 0.5) found.push(`clipped: ${name(a, one)}`);
        for (const [b, other] of texts.slice(i + 1))
          if (one.left < other.right && other.left < one.right && one.top < other.bottom &&
              other.top < one.bottom) found.push(`overlap: ${name(a, one)} and ${name(b, other)}`);
      });
      if (!svg.querySelector("path:not(.grid):not(.cursor)")) found.push("an empty chart");
      if (/NaN/.test(svg.innerHTML)) found.push(`no number by ${axis} in ${svg.textContent}`);
    }
  }
  const blocks = [...document.querySelectorAll(
    "h1, h2, h3, .state, .tiles div, button, .read, .plain, td, th, summary, figcaption, pre")]
    .filter(node => node.offsetParent && !node.closest("details:not([open]) > :not(summary)"))
    .map(node => [node, node.getBoundingClientRect()]);
  blocks.forEach(([a, one], i) => {
    if (one.left < -0.5) found.push(`left of the page: ${name(a, one)}`);
    if (getComputedStyle(a).overflowX !== "auto" && a.scrollWidth > a.clientWidth + 1 &&
        a.clientWidth) found.push(`wider than its box: ${name(a, one)}`);
    for (const [b, other] of blocks.slice(i + 1))
      if (!a.contains(b) && !b.contains(a) && !a.closest(".wide") && !b.closest(".wide") &&
          one.left < other.right - 1 && other.left < one.right - 1 && one.top < other.bottom - 1 &&
          other.top < one.bottom - 1)
        found.push(`overlap: ${name(a, one)} and ${name(b, other)}`);
  });
  parent.postMessage(JSON.stringify({ found, charts: document.querySelectorAll(
    "figure svg.chart").length, texts: blocks.length, dark: matchMedia(
    "(prefers-color-scheme: dark)").matches, width: innerWidth }), "*");
}, 100));
"""


FRAME = """<!doctype html><meta charset="utf-8"><style>body {{ margin: 0 }}</style>
<iframe src="page.html" width="{width}" height="1000" style="border: 0"></iframe>
<script>addEventListener("message", event => {{
  const result = document.createElement("pre");
  result.id = "measured";
  result.textContent = event.data;
  document.body.append(result);
}});</script>"""


def measure(page: Path, width: int, *, dark: bool, directory: Path) -> dict[str, object]:
    """Lay the page out and measure it; `console` has what the browser logged for it."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    copy = directory / "page.html"
    copy.write_text(text.replace("</body>", f"<script>{MEASURE}</script></body>"))
    frame = directory / "frame.html"  # as a window of Chromium is never narrower than 500
    frame.write_text(FRAME.format(width=width))
    colours = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", colours]
    options += ["--window-size=1400,1100", "--virtual-time-budget=2000"]
    logged = ["--enable-logging=stderr", f"--user-data-dir={directory / 'profile'}"]
    command = ["chromium", *options, *logged]
    done = subprocess.run(
        [*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120
    )
    shown = subprocess.run(  # as it is: with its policy, and without the measuring script
        [*command, "--dump-dom", page.resolve().as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    if found is None:
        sys.exit(f"The page was not measured.\n{done.stderr[-2000:]}")
    measured: dict[str, object] = json.loads(
        found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    )
    measured["console"] = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    return measured


def main(pages: list[str]) -> int:
    """Measure each page at every width and in both colours."""
    faults = 0
    for page in map(Path, pages):
        for width in WIDTHS:
            for dark in (False, True):
                with tempfile.TemporaryDirectory() as directory:
                    result = measure(page, width, dark=dark, directory=Path(directory))
                wrong = [*result["found"], *result["console"]]  # type: ignore[misc]
                assert result["dark"] is dark
                assert result["width"] == width
                faults += len(wrong)
                look = "dark" if dark else "light"
                print(
                    f"{page.name} {width} {look}: {result['charts']} charts, "
                    f"{result['texts']} texts, {len(wrong)} faults"
                )
                for fault in wrong[:12]:
                    print(f"  {fault}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
