"""HTML pages for reports; each is a single file and loads nothing from the network."""

from __future__ import annotations

import base64
import hashlib
import html


def html_page(
    title: str,
    style: str,
    body: str,
    source: str,
    *,
    script: str = "",
    reload_s: int | None = None,
    reload_without_script_s: int | None = None,
) -> str:
    """Return a complete HTML page.

    Args:
        style: CSS to add to the common style.
        body: HTML, already escaped.
        source: the file that the page is drawn from, named in the footer.
        script: JavaScript of the page; browsers block every other script in the page.
        reload_s: seconds after which the browser reloads the page; None for never.
        reload_without_script_s: the same for browsers that do not run scripts.
    """
    policy, head, foot = "default-src 'none'; style-src 'unsafe-inline'", "", ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        foot = f"<script>{script}</script>\n"
    if reload_s is not None:
        head = f'<meta http-equiv="refresh" content="{reload_s}">\n'
    if reload_without_script_s is not None:
        refresh = f'<meta http-equiv="refresh" content="{reload_without_script_s}">'
        head += f"<noscript>{refresh}</noscript>\n"
    return _PAGE.format(
        title=escape(title),
        style=_STYLE + style,
        body=body,
        source=escape(source),
        policy=policy,
        head=head,
        foot=foot,
    )


def escape(text: str) -> str:
    """Escape text for HTML; control characters, which HTML forbids, become U+FFFD."""
    return html.escape(
        "".join(
            c if c in "\n\t" or (ord(c) >= 0x20 and not 0x7F <= ord(c) < 0xA0) else "\ufffd"
            for c in text.replace("\r\n", "\n")
        )
    )


def unbroken(text: str) -> str:
    """Escape text for HTML so that browsers do not break `--flag` or `a-b` after a hyphen."""
    return " ".join(
        f"<span class='word'>{escape(word)}</span>" if "-" in word else escape(word)
        for word in text.split(" ")
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
{head}<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
<footer>Drawn from {source} by consyn-jax.</footer>
</main>
{foot}</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --back: #fbfbfc; --card: #fff; --ink: #1d2430;
  --soft: #667080; --rule: #e2e5ea; }
:root { --blue: #3b6fb6; --orange: #d9731a; --green: #2f8f5b; }
@media screen and (prefers-color-scheme: dark) {
  :root { --back: #14171c; --card: #1b1f26; --ink: #e4e7ec; --soft: #98a2b0; --rule: #2d333d;
    --blue: #7aa7e6; --orange: #f0a05a; --green: #63c58f; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 900px; margin: 0 auto; padding: 28px 16px 48px; }
h1 { font-size: 26px; margin: 0 0 16px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 32px 0 10px; }
.tiles { display: grid; gap: 10px; margin: 14px 0;
  grid-template-columns: repeat(auto-fit, minmax(min(190px, 46%), 1fr)); }
.tiles div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 10px 14px; }
.tiles span, .tiles small { display: block; color: var(--soft); font-size: 12.5px; }
.tiles b { font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
figcaption { color: var(--soft); font-size: 12.5px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.wide { overflow: auto; max-height: 480px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 8px; }
table { width: 100%; border-collapse: collapse; font-size: 13.5px; }
th { text-align: left; font-weight: 600; color: var(--soft); white-space: nowrap; }
th, td { padding: 5px 14px; border-bottom: 1px solid var(--rule); vertical-align: top;
  overflow-wrap: break-word; font-variant-numeric: tabular-nums; }
tr:last-child td { border-bottom: 0; }
.word { display: inline-block; max-width: 100%; overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; }
@media (max-width: 600px) { th, td { padding: 5px 10px; } }
@media print {
  :root { color-scheme: light; --back: #fff; }
  .wide, pre { max-height: none; }
  h2, h3, summary { break-after: avoid; }
  tr, .tiles div { break-inside: avoid; }
}
footer { margin-top: 32px; color: var(--soft); font-size: 12.5px; }
"""
