"""Make the pictures of the README from a run of its first command.

    python scripts/site/pictures.py build/quickstart

trains the quickstart into that directory in a pseudo-terminal, and writes docs/assets/terminal.svg
(the terminal in the middle of the run) and, where there is chromium, docs/assets/report.png.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from html import escape
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "docs" / "assets"
COLUMNS, ROWS = 80, 60
SHOWN_AT = re.compile(r"step 2(4[1-9]|5\d)/300")  # the moment that is drawn
SIZE, ADVANCE, LINE, MARGIN = 13, 7.8, 18, 14  # pixels
INK, PAPER = "#d4d4d4", "#1b1d1e"
NAMED = ("#3b3b3b", "#f2777a", "#8fd18a", "#e6c07b", "#6ba7e8", "#c594c5", "#56c7c7", "#d4d4d4")
CONTROL = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|([\r\n])|\x1b.|([^\x1b\r\n]+)")
Style = tuple[str, bool, bool]  # colour, bold, dim
PLAIN: Style = (INK, False, False)
Cell = tuple[str, Style]


class Screen:
    """The text of a terminal, with as much of its control codes as rich uses."""

    def __init__(self) -> None:
        self.lines: list[list[Cell]] = [[]]
        self._row = self._column = 0
        self._style = PLAIN

    def feed(self, text: str) -> None:
        """Take in what a program prints."""
        for match in CONTROL.finditer(text):
            numbers, command, newline, printed = match.groups()
            if printed:
                self._print(printed)
            elif newline == "\r":
                self._column = 0
            elif newline == "\n":
                self._row, self._column = self._row + 1, 0
                while len(self.lines) <= self._row:
                    self.lines.append([])
            elif command == "A":
                self._row = max(0, self._row - int(numbers or 1))
            elif command == "K":
                self.lines[self._row] = [] if numbers == "2" else self._line()[: self._column]
            elif command == "m":
                self._style = styled(self._style, numbers)

    def text(self) -> str:
        """The lines without their styles."""
        return "\n".join("".join(character for character, _ in line) for line in self.lines)

    def _line(self) -> list[Cell]:
        return self.lines[self._row]

    def _print(self, text: str) -> None:
        line = self._line()
        line += [(" ", PLAIN)] * (self._column - len(line))
        line[self._column : self._column + len(text)] = [(c, self._style) for c in text]
        self._column += len(text)


def styled(style: Style, numbers: str) -> Style:
    """The style after a control code `m`."""
    codes = [int(number or 0) for number in numbers.split(";")]
    colour, bold, dim = style
    while codes:
        code = codes.pop(0)
        if code == 0:
            colour, bold, dim = PLAIN
        elif code in (1, 2, 22):
            bold, dim = code == 1, code == 2
        elif 30 <= code <= 37 or 90 <= code <= 97:
            colour = NAMED[code % 10]
        elif code == 39:
            colour = INK
        elif code == 38 and codes[:1] == [5]:
            colour, codes = indexed(codes[1]), codes[2:]
        elif code == 38:
            colour, codes = "#{:02x}{:02x}{:02x}".format(*codes[1:4]), codes[4:]
    return colour, bold, dim


def indexed(number: int) -> str:
    """A colour of the usual 256."""
    if number < 16:
        return NAMED[number % 8]
    if number >= 232:
        grey = 8 + 10 * (number - 232)
        return f"#{grey:02x}{grey:02x}{grey:02x}"
    levels = (0, 95, 135, 175, 215, 255)
    red, green, blue = (number - 16) // 36, (number - 16) // 6 % 6, (number - 16) % 6
    return f"#{levels[red]:02x}{levels[green]:02x}{levels[blue]:02x}"


def drawing(screen: Screen) -> str:
    """The screen as SVG, which loads no font: every run of text has its width."""
    lines = screen.lines
    while not lines[-1]:
        lines = lines[:-1]
    width, height = COLUMNS * ADVANCE + 2 * MARGIN, len(lines) * LINE + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="{SIZE}">',
        f'<rect width="100%" height="100%" rx="8" fill="{PAPER}"/>',
    ]
    for number, line in enumerate(lines):
        y = MARGIN + LINE * number + SIZE
        for start, end in runs(line):
            text = "".join(character for character, _ in line[start:end])
            if not text.strip():
                continue
            colour, bold, dim = line[start][1]
            look = f'fill="{colour}"' + ' font-weight="bold"' * bold + ' opacity="0.6"' * dim
            parts.append(
                f'<text x="{MARGIN + ADVANCE * start:g}" y="{y:g}" {look} xml:space="preserve" '
                f'textLength="{ADVANCE * len(text):g}">{escape(text)}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


def runs(line: list[Cell]) -> list[tuple[int, int]]:
    """Where the style of a line changes."""
    edges = [i for i in range(1, len(line)) if line[i][1] != line[i - 1][1]]
    edges = [0, *edges, len(line)]
    return list(pairwise(edges))


def train(output: Path) -> str:
    """Train the quickstart in a terminal, and return the drawing of a moment of it."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    recipe = ["--config", "configs/quickstart.yaml", "--output", str(output)]
    command = [sys.executable, "-m", "consyn_jax.cli.train", *recipe, "--overwrite"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "", "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, stdout=slave, stderr=slave, env=environment, cwd=ROOT)
    os.close(slave)
    screen, shown, rest = Screen(), "", b""
    screen.feed("$ consyn-train --config configs/quickstart.yaml\n")
    while True:
        try:
            data = rest + os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        # A control code or a character may be cut.
        cut = max(data.rfind(b"\n"), data.rfind(b"m"), data.rfind(b"K")) + 1
        rest, whole = data[cut:], data[:cut].decode("utf-8", "ignore")
        screen.feed(whole)
        if not shown and SHOWN_AT.search(screen.text()):
            shown = drawing(screen)
    if running.wait() or not shown:
        sys.exit(f"The run ended with {running.returncode}:\n{screen.text()[-3000:]}")
    return shown


def photograph(page: Path, target: Path) -> None:
    """A picture of the top of a page, as headless Chromium shows it, in 256 colours."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as directory:
        picture = Path(directory) / "page.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += ["--window-size=920,1500", "--blink-settings=preferredColorScheme=1"]
        place = [f"--user-data-dir={directory}/profile", f"--screenshot={picture}"]
        command = ["chromium", *options, *place, page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        # The octree keeps rare colours, such as the green of a dot.
        drawn = Image.open(picture).convert("RGB")
        drawn.quantize(256, Image.Quantize.FASTOCTREE).save(target, optimize=True)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="where the run goes; a run there is deleted")
    output = parser.parse_args().output
    ASSETS.mkdir(exist_ok=True)
    (ASSETS / "terminal.svg").write_text(train(output), encoding="utf-8")
    if shutil.which("chromium"):
        photograph(output / "report.html", ASSETS / "report.png")
    else:
        print("There is no chromium, so docs/assets/report.png stays as it is.")


if __name__ == "__main__":
    main()
