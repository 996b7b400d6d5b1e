"""The JavaScript of `report.html`: it draws the curves, and reloads the page during the run.

The script reads the points from the page. Without JavaScript, the page shows the static charts of
`charts`.
"""

SCRIPT = r"""
"use strict";
document.documentElement.classList.add("scripted");
const data = JSON.parse(document.getElementById("points").textContent);
const make = (name, attributes, parent, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
};
const units = (value, digits, sizes) => {
  for (const [size, unit] of sizes)
    if (Math.abs(value) >= size) return Number((value / size).toPrecision(digits)) + unit;
  return String(Number(value.toPrecision(digits)));
};
const compact = (value, digits = 3) =>
  units(value, digits, [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]);
const time = (s, digits = 3) => Math.abs(s) < 60 ? Number(s.toPrecision(digits)) + " s" :
  units(s, digits, [[86400, " d"], [3600, " h"], [60, " min"]]);
const binarySizes = [[2 ** 40, " TiB"], [2 ** 30, " GiB"], [2 ** 20, " MiB"], [1, " B"]];
const show = {
  number: compact,
  rate: (v, digits = 3) => v === 0 ? "0" :
    Math.abs(v) < 1e-3 ? v.toExponential(digits - 1).replace(/\.?0*e/, "e") :
    String(Number(v.toPrecision(digits))),
  count: compact,
  share: (v, digits = 3) => Number((100 * v).toPrecision(digits)) + " %",
  bytes: (v, digits = 3) => units(v, digits, binarySizes),
};
const fine = (v, unit) => unit === "number" ? v.toFixed(4) : show[unit](v, 4);
const labels = (values, format) => {  // with enough digits to distinguish them
  let found = [];
  for (let digits = 3; digits < 10; digits++) {
    found = values.map(v => format(v, digits));
    if (new Set(found).size === found.length) break;
  }
  return found;
};
const axes = { step: compact, tokens: compact, time };
const state = { axis: "tokens", from: null, to: null };
for (const part of location.hash.slice(1).split("&")) {
  const [name, value] = part.split("=");
  if (name === "by" && Object.hasOwn(axes, value)) state.axis = value;
  if ((name === "from" || name === "to") && Number.isFinite(parseFloat(value)))
    state[name] = parseFloat(value);
}
const remember = () => {
  const zoom = state.from === null ? "" : `&from=${state.from}&to=${state.to}`;
  history.replaceState(null, "", `#by=${state.axis}${zoom}`);
};

// ---------------------------------------------------------------------- one chart

const nice = (rough, steps) => {
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * steps.find(factor => factor * power >= rough * 0.999);
};
const spans = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600,
  43200, 86400, 172800, 432000, 864000];
const ticks = (low, high, count, axis) => {
  const rough = (high - low) / Math.max(count, 1);
  if (!(rough > 0)) return [low];
  const gap = axis === "time" && rough > 1 && rough <= 864000
    ? spans.find(span => span >= rough * 0.999) : nice(rough, [1, 2, 5, 10]);
  const found = [];
  for (let i = Math.ceil(low / gap - 1e-9); i * gap <= high + gap * 1e-9; i++)
    found.push(Number((i * gap).toPrecision(12)));
  return found;
};
const binary = (low, high, count) => {
  const gap = 2 ** Math.ceil(Math.log2((high - low) / count)), found = [];
  for (let tick = Math.ceil(low / gap) * gap; tick <= high; tick += gap) found.push(tick);
  return found;
};
const all = data.charts.flatMap(chart => chart.lines.map(line => line.x));
const ends = axis => Math.max(...all.map(x => x[axis][x[axis].length - 1] || 0), 0) || 1;
const range = () =>  // with room for the last dot
  state.from === null ? [0, 1.012 * ends(state.axis)] : [state.from, state.to];
const reach = (xs, from, to) => {  // indices of the first and the last point to draw
  let first = xs.findIndex(x => x >= from), last = xs.findLastIndex(x => x <= to);
  return first < 0 ? [0, -1] : [Math.max(0, first - 1), Math.min(xs.length - 1, last + 1)];
};
const limits = (chart, from, to) => {
  if (chart.kind === "stack") return [0, 1];
  if (state.from === null && chart.limits) return chart.limits;
  let low = Infinity, high = -Infinity;
  for (const line of chart.lines) {
    const xs = line.x[state.axis];
    for (let i = 0; i < xs.length; i++)
      if (xs[i] >= from && xs[i] <= to) {
        low = Math.min(low, line.y[i]);
        high = Math.max(high, line.y[i]);
      }
  }
  if (low > high) return chart.limits || [0, 1];
  const margin = 0.06 * (high - low) || 0.05 * Math.abs(high) || 0.5;
  return [low - margin, high + margin];
};
const draw = figure => {
  const chart = figure.chart, svg = figure.querySelector("svg");
  const W = Math.max(260, Math.round(figure.clientWidth || 700)), H = chart.height;
  const left = 58, right = 12, top = 12, bottom = 44, [from, to] = range();
  const [low, high] = limits(chart, from, to);
  const x = v => left + (W - left - right) * (v - from) / (to - from);
  const y = v => top + (H - top - bottom) * (high - v) / (high - low);
  figure.place = { x, y, W, H, left, right, top, bottom, from, to };
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  svg.replaceChildren();
  make("title", {}, svg, chart.title);
  const format = show[chart.unit], rows = H > 200 ? 6 : 4;
  const heights = (chart.unit === "bytes" ? binary : ticks)(low, high, rows);
  labels(heights, format).forEach((text, i) => {
    const at = y(heights[i]);
    make("path", { class: "grid", d: `M${left} ${at}H${W - right}` }, svg);
    make("text", { x: left - 8, y: at + 4, "text-anchor": "end" }, svg, text);
  });
  const places = ticks(from, to, Math.floor((W - left) / 85), state.axis);
  labels(places, axes[state.axis]).forEach((text, i) => {
    const tick = places[i];
    make("path", { class: "grid", d: `M${x(tick)} ${top}V${H - bottom}` }, svg);
    const anchor = x(tick) > W - 34 ? "end" : "middle";
    const at = { x: Math.min(x(tick), W - 4), y: H - bottom + 21, "text-anchor": anchor };
    make("text", at, svg, text);
  });
  const name = { step: "steps", tokens: "tokens", time: "time" }[state.axis];
  make("text", { x: W - right, y: H - 6, "text-anchor": "end" }, svg, name);
  const size = { width: W - left - right, height: H - top - bottom };
  const box = [left, top, size.width, size.height].join(" ");
  const inner = make("svg", { x: left, y: top, ...size, viewBox: box, class: "inner" }, svg);
  if (chart.kind === "stack") stack(chart, inner, x, y, from, to);
  else for (const line of chart.lines) trace(line, inner, x, y, from, to);
  for (const mark of data.marks)
    if (mark[state.axis] >= from && mark[state.axis] <= to)
      make("path", { class: "mark", d: `M${x(mark[state.axis])} ${top}V${H - bottom}` }, inner);
  figure.cursor = make("path", { class: "cursor" }, svg);
  figure.chosen = make("rect", { class: "chosen", y: top, height: size.height, width: 0 }, svg);
};
const trace = (line, parent, x, y, from, to) => {
  const xs = line.x[state.axis], [first, last] = reach(xs, from, to), places = [];
  for (let i = first; i <= last; i++)
    places.push(x(xs[i]).toFixed(1) + " " + y(line.y[i]).toFixed(1));
  if (!places.length) return;
  make("path", { class: line.look, d: "M" + places.join("L") }, parent);
  if (!line.dots && places.length > 1) return;
  for (const place of places) {
    const [cx, cy] = place.split(" ");
    make("circle", { class: line.look, cx, cy, r: line.look === "best" ? 5 : 3 }, parent);
  }
};
const shares = (chart, i) => {  // each activity's share of the time between points i - 1 and i
  const spent = chart.lines.map(line => line.y[i] - (i ? line.y[i - 1] : 0));
  const total = spent.reduce((a, b) => a + b, 0) || 1;
  return spent.map(value => Math.max(0, value) / total);
};
const stack = (chart, parent, x, y, from, to) => {
  const xs = chart.lines[0].x[state.axis], paths = chart.lines.map(() => "");
  for (let i = 0; i < xs.length; i++) {
    const begin = i ? xs[i - 1] : 0;
    if (xs[i] < from || begin > to) continue;
    let below = 0;
    shares(chart, i).forEach((share, k) => {
      const box = [x(begin), y(below), x(xs[i]), y(below + share)].map(v => v.toFixed(1));
      if (share > 0) paths[k] += `M${box[0]} ${box[1]}H${box[2]}V${box[3]}H${box[0]}Z`;
      below += share;
    });
  }
  chart.lines.forEach((line, k) => {
    make("path", { class: "area " + line.look, d: paths[k] }, parent);
  });
};

// ---------------------------------------------------------------------- hover and zoom

const value = (figure, event) => {
  const place = figure.place, box = figure.querySelector("svg").getBoundingClientRect();
  const at = (event.clientX - box.left) * place.W / box.width;
  const held = Math.min(Math.max(at, place.left), place.W - place.right);
  return place.from + (place.to - place.from) * (held - place.left) /
    (place.W - place.left - place.right);
};
const nearest = (xs, at) => {
  let best = 0;
  for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - at) < Math.abs(xs[best] - at)) best = i;
  return best;
};
const closest = (figure, at, height) => {  // the line nearest to the pointer
  const apart = line => Math.abs(figure.place.y(line.y[nearest(line.x[state.axis], at)]) - height);
  return figure.chart.lines.reduce((a, b) => apart(b) < apart(a) ? b : a);
};
const read = (figure, at, height) => {
  const place = figure.place, x = place.x(at).toFixed(1), many = figure.chart.lines.length > 6;
  const chart = !many || figure.chart.kind === "stack" ? figure.chart :
    { ...figure.chart, lines: [closest(figure, at, height)] };
  figure.cursor.setAttribute("d", `M${x} ${place.top}V${place.H - place.bottom}`);
  const lead = chart.lines.reduce((a, b) => b.y.length > a.y.length ? b : a);
  const i = nearest(lead.x[state.axis], at), xs = lead.x;
  const parts = [`step ${xs.step[i].toLocaleString("en")}`, `${compact(xs.tokens[i])} tokens`,
    time(xs.time[i])];
  if (chart.kind === "stack") {
    const found = shares(chart, i);
    chart.lines.forEach((line, k) => {
      if (found[k] >= 0.0005) parts.push(`${line.name} ${show.share(found[k])}`);
    });
  } else for (const line of chart.lines)
    if (line.look !== "best") {
      const text = fine(line.y[nearest(line.x[state.axis], at)], chart.unit);
      parts.push(figure.chart.lines.length > 1 ? `${line.name} ${text}` : text);
    }
  figure.querySelector(".read").textContent = parts.join(" · ");
};
const forget = figure => {
  figure.cursor?.removeAttribute("d");
  figure.querySelector(".read").textContent = figure.note;
};
let dragging = null;
const wire = figure => {
  const svg = figure.querySelector("svg");
  svg.addEventListener("pointerdown", event => {
    dragging = { figure, from: value(figure, event) };
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", event => {
    const at = value(figure, event), box = svg.getBoundingClientRect();
    read(figure, at, (event.clientY - box.top) * figure.place.H / box.height);
    if (!dragging || dragging.figure !== figure) return;
    const [a, b] = [figure.place.x(dragging.from), figure.place.x(at)];
    figure.chosen.setAttribute("x", Math.min(a, b));
    figure.chosen.setAttribute("width", Math.abs(a - b));
  });
  svg.addEventListener("pointerup", event => {
    if (!dragging) return;
    const [from, to] = [dragging.from, value(figure, event)].sort((a, b) => a - b);
    const wide = figure.place.x(to) - figure.place.x(from) > 8;
    dragging = null;
    figure.chosen.setAttribute("width", 0);
    if (wide) zoom(from, to);
  });
  svg.addEventListener("pointercancel", () => { dragging = null; });
  svg.addEventListener("pointerleave", () => { if (!dragging) forget(figure); });
  svg.addEventListener("dblclick", () => zoom(null, null));
};
const figures = [...document.querySelectorAll("figure.chart")];
const tools = document.getElementById("axis");
const redraw = () => {
  figures.forEach(draw);
  for (const button of tools.querySelectorAll("[data-by]"))
    button.setAttribute("aria-pressed", button.dataset.by === state.axis);
  tools.querySelector("[data-all]").hidden = state.from === null;
};
const zoom = (from, to) => { Object.assign(state, { from, to }); remember(); redraw(); };
if (figures.length) {
  figures.forEach((figure, i) => {
    figure.chart = data.charts[i];
    figure.note = i ? "" : "Drag to zoom, double-click to see all.";
    forget(figure);
    wire(figure);
  });
  tools.hidden = false;
  for (const button of tools.querySelectorAll("[data-by]"))
    button.addEventListener("click", () => { state.axis = button.dataset.by; zoom(null, null); });
  tools.querySelector("[data-all]").addEventListener("click", () => zoom(null, null));
  addEventListener("resize", redraw);
  redraw();
}

// ---------------------------------------------------------------------- while the run is alive

if (data.alive) {
  const news = document.getElementById("news"), loaded = Date.now();
  const check = () => {
    const age = Date.now() / 1000 - data.written, quiet = age > data.quiet_s;
    if (quiet)
      news.textContent = `No update for ${time(Math.round(age))}: the run may have been killed,` +
        " or may be in a long operation.";
    const every = quiet ? 300 : data.reload_s;
    const due = (Date.now() - loaded) / 1000 >= every && age < 86400;
    if (due && !dragging && !document.hidden) location.reload();
  };
  setInterval(check, 1000);
  check();
}
"""

CHART_PAGE_STYLE = """
figure.chart { margin: 0; min-width: 0; }
.charts { display: grid; gap: 0 14px; }
@media print, (min-width: 900px) {
  .scripted .charts { grid-template-columns: 1fr 1fr; }
  .charts .tall, .charts .needs-script { grid-column: 1 / -1; }
}
@media (max-width: 600px) {
  .tall .read, .needs-script .read { min-height: 3em; }
}
figure.chart svg { touch-action: pan-y; cursor: crosshair; user-select: none; }
svg.inner { overflow: hidden; }
.read { margin: 3px 0 0; color: var(--soft); font-size: 12.5px; min-height: 1.5em;
  font-variant-numeric: tabular-nums; }
.scripted figure.chart svg text { font-size: 11.5px; }
.needs-script { display: none; }
.scripted .needs-script { display: block; }
path.cursor { stroke: var(--soft); stroke-width: 1; }
rect.chosen { fill: var(--blue); opacity: .16; }
#axis { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; margin: 0 0 6px; }
#axis[hidden], #axis [hidden] { display: none; }
#axis button { font: inherit; font-size: 13px; padding: 4px 12px; border-radius: 7px;
  border: 1px solid var(--rule); background: var(--card); color: var(--ink); cursor: pointer; }
#axis button[aria-pressed=true] { border-color: var(--blue); color: var(--blue); }
svg path.area { stroke: none; }
:root { --purple: #7b5bb5; --gold: #b3861b; --grey: #9aa3af; }
@media screen and (prefers-color-scheme: dark) {
  :root { --purple: #b79be8; --gold: #d9b45a; --grey: #6d7683; }
}
path.compute { fill: var(--blue); } path.data { fill: var(--orange); }
path.evaluation { fill: var(--green); } path.saving { fill: var(--purple); }
path.compiling { fill: var(--gold); } path.other { fill: var(--grey); }
.legend .compute::before { background: var(--blue); }
.legend .data::before { background: var(--orange); }
.legend .evaluation::before { background: var(--green); }
.legend .saving::before { background: var(--purple); }
.legend .compiling::before { background: var(--gold); }
.legend .other::before { background: var(--grey); }
.state { border: 1px solid var(--rule); border-left: 4px solid var(--green); border-radius: 8px;
  background: var(--card); padding: 8px 14px; margin: 0 0 14px; }
.state.stopped { border-left-color: var(--orange); }
.state small { display: block; color: var(--soft); }
@media print {
  #axis, #news { display: none; }
  figure.chart, figure, .tiles div { break-inside: avoid; }
}
"""
