// A run's curves and its phase strip. uPlot draws the curves; this file adds bands, phases and the chosen alert.
/* global uPlot */

import { colour, el, number, whole } from "./dom.js";

// If several phases fall on one pixel, draw the worst, so that no slingshot is lost.
const RANK = { healthy: 0, recovering: 1, absorbing: 2, inflating: 3, imminent: 4, slingshot: 5 };
const HEIGHT = { healthy: 0.2, recovering: 0.32, absorbing: 0.46, inflating: 0.64, imminent: 0.82, slingshot: 1 };
export const PHASES = ["healthy", "absorbing", "inflating", "imminent", "slingshot", "recovering"];
const AXIS = 54;
const TALL = 152;
const STRIP = 60;
const SUPERSCRIPT = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

const isNumber = (value) => typeof value === "number";
const font = "11px system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif";
const ratio = () => window.devicePixelRatio || 1;

function shortStep(step) {
  if (Math.abs(step) >= 1e6) return `${+(step / 1e6).toPrecision(4)}M`;
  return Math.abs(step) >= 1e4 ? `${+(step / 1e3).toPrecision(5)}k` : whole(step);
}

function power(value) {
  const exponent = Math.log10(value);
  if (Math.abs(exponent - Math.round(exponent)) > 1e-6) return "";
  if (exponent > -2.5 && exponent < 3.5) return String(+value.toPrecision(1));
  return "10" + [...String(Math.round(exponent))].map((digit) => SUPERSCRIPT[digit]).join("");
}

// Few powers of ten as ticks. uPlot's own ticks also draw lines between them.
function decades(low, high) {
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
  const every = Math.max(1, Math.ceil((last - first) / 5));
  return Array.from({ length: Math.floor((last - first) / every) + 1 }, (_, i) => 10 ** (last - i * every)).reverse();
}

// The y range of all runs and the band, so that two runs side by side have one scale.
export function sharedRange(spec, log, datas) {
  let low = Infinity, high = -Infinity;
  const take = (value) => {
    if (!isNumber(value) || (log && value <= 0)) return;
    if (value < low) low = value;
    if (value > high) high = value;
  };
  for (const data of datas) for (const { name } of spec.series) (data?.series[name] ?? []).forEach(take);
  if (low > high) return log ? [0.1, 1] : [0, 1];
  if (spec.band) [spec.band.low, spec.band.high].forEach(take);
  if (log) {
    low = 10 ** Math.floor(Math.log10(low) + 1e-9);
    high = 10 ** Math.ceil(Math.log10(high) - 1e-9);
    return low === high ? [low / 10, high * 10] : [low, high];
  }
  if (spec.unit === "fraction") return [0, high > 0.25 ? 1.02 : Math.max(high * 1.1, 1e-3)];
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - pad, high + pad];
}

// Phases as ranges of whole pixels, the worst phase of each pixel: {from, to, phase} in [0, width).
function stretches(run, range, width) {
  const edges = run?.phases ?? []; // null: not loaded yet
  if (!edges.length || width < 1) return [];
  const [low, high] = range;
  const scale = width / (high - low || 1);
  const pixels = new Int8Array(Math.ceil(width)).fill(-1);
  const names = run.record.phases ?? PHASES;
  for (let i = 0; i < edges.length; i++) {
    const start = edges[i][0];
    const end = i + 1 < edges.length ? edges[i + 1][0] : run.extent[1];
    if (end < low || start > high) continue;
    const first = Math.max(0, Math.floor((start - low) * scale));
    const last = Math.min(pixels.length, Math.max(first + 1, Math.floor((end - low) * scale)));
    const rank = RANK[names[edges[i][1]]] ?? 0;
    for (let x = first; x < last; x++) if (rank > pixels[x]) pixels[x] = rank;
  }
  const byRank = Object.keys(RANK).sort((a, b) => RANK[a] - RANK[b]);
  const found = [];
  for (let x = 0; x < pixels.length; x++) {
    const last = found.at(-1);
    if (pixels[x] < 0) continue;
    if (last && last.rank === pixels[x] && last.to === x) last.to = x + 1;
    else found.push({ from: x, to: x + 1, rank: pixels[x], phase: byRank[pixels[x]] });
  }
  return found;
}

// Keeps a chart (or strip) as wide as its container; draws it again only if the width changes.
function follow(chart, height) {
  const observer = new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width < 1 || chart.u?.width === width) return;
    if (chart.u) chart.u.setSize({ width, height });
    else chart.build(width);
  });
  observer.observe(chart.plot);
  return observer;
}

const xAxis = () => ({
  stroke: colour("quiet"),
  font,
  size: 20,
  gap: 2,
  space: 64,
  ticks: { show: false },
  grid: { show: false },
  values: (_, steps) => steps.map(shortStep),
});

// The mouse actions of strip and charts: drag to zoom, double-click for all steps, one common cursor.
function pointer(actions, click) {
  return {
    cursor: {
      sync: { key: "nfi", scales: ["x", null] },
      drag: { x: true, y: false, setScale: false },
      y: false,
      focus: { prox: -1 },
      bind: { dblclick: () => () => actions.zoom(null) },
    },
    hooks: {
      setSelect: [
        (u) => {
          const { left, width } = u.select;
          if (width >= 4) actions.zoom([u.posToVal(left, "x"), u.posToVal(left + width, "x")]);
          else if (click) click(u.posToVal(left, "x"), u);
          if (width > 0) u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        },
      ],
    },
  };
}

export class Chart {
  constructor(spec, owner, actions) {
    this.spec = spec;
    this.actions = actions;
    this.owner = owner; // whose curves: {run, letter}
    this.log = spec.log;
    this.data = null;
    this.range = [0, 1];
    this.values = el("div", { class: "values" });
    this.plot = el("div", { class: "plot", tabindex: "0", role: "group", onkeydown: (event) => this.key(event) });
    this.scale = el(
      "button",
      { "aria-pressed": String(this.log), title: "Logarithmic scale", onclick: () => actions.scale(spec.title) },
      "log",
    );
    this.node = el(
      "section",
      { class: "card chart", "data-chart": spec.title },
      el(
        "header",
        {},
        owner.letter ? el("span", { class: `badge ${owner.letter.toLowerCase()}` }, owner.letter) : null,
        el("h3", {}, spec.title),
        spec.unit ? el("span", { class: "unit" }, spec.unit === "fraction" ? "%" : spec.unit) : null,
        this.scale,
      ),
      this.values,
      this.plot,
    );
    this.observer = follow(this, TALL);
  }

  shown() {
    return this.spec.series.filter(({ name }) => this.data?.series[name]?.some((value) => value !== null));
  }

  set(data, range, yRange, log) {
    const before = this.names;
    this.data = data;
    this.range = range;
    this.yRange = yRange;
    this.names = this.shown().map(({ name }) => name).join();
    this.scale.setAttribute("aria-pressed", String(log));
    this.node.classList.toggle("hidden", !data);
    if (this.names !== before || log !== this.log) {
      this.log = log;
      this.rebuild();
    } else if (this.u) {
      this.u.setData(this.columns(), false);
      this.u.setScale("x", { min: range[0], max: range[1] });
    }
    this.read(null);
    const last = this.readings(null).map(({ label, text }) => `${label} ${text}`).join(", ");
    this.plot.setAttribute(
      "aria-label",
      `${this.spec.title}, steps ${whole(range[0])} to ${whole(range[1])}. ${last || "Not measured here"}. ` +
        "Arrows move the cursor, Shift and arrows the window, plus and minus zoom.",
    );
  }

  columns() {
    // uPlot bridges undefined (not measured at this step), and draws a gap for null (measured, not finite).
    const place = (value) => {
      if (value === null) return undefined;
      if (!isNumber(value)) return null;
      return this.log && value <= this.yRange[0] ? this.yRange[0] : value;
    };
    return [this.data.steps, ...this.shown().map(({ name }) => this.data.series[name].map(place))];
  }

  rebuild() {
    const width = Math.floor(this.plot.clientWidth);
    this.u?.destroy();
    this.u = null;
    if (width > 0) this.build(width);
  }

  build(width) {
    if (!this.data) return;
    const shared = pointer(this.actions);
    const series = this.shown().map((_, i) => ({
      stroke: colour(`series-${i + 1}`),
      width: 1.5,
      dash: [[], [6, 3], [2, 3]][i],
      points: { show: this.data.steps.length < 40, size: 4 },
    }));
    this.u = new uPlot(
      {
        width,
        height: TALL,
        legend: { show: false },
        padding: [8, 10, 0, 0],
        cursor: { ...shared.cursor, dataIdx: (u, index, at) => this.nearest(u.data[index], at) },
        scales: {
          x: { time: false, range: () => this.range },
          y: { distr: this.log ? 3 : 1, range: () => this.yRange },
        },
        axes: [
          xAxis(),
          {
            stroke: colour("quiet"),
            font,
            size: AXIS,
            gap: 4,
            space: 26,
            ticks: { show: false },
            grid: { stroke: colour("line"), width: 1 },
            ...(this.log ? { splits: (_u, _axis, low, high) => decades(low, high), filter: (_, splits) => splits } : {}),
            values: (_, splits) =>
              splits.map((value) =>
                value === null ? "" : this.log ? power(value) : number(+value.toPrecision(6), this.spec.unit),
              ),
          },
        ],
        series: [{}, ...series],
        hooks: {
          ...shared.hooks,
          drawClear: [(u) => this.background(u)],
          draw: [(u) => this.foreground(u)],
          setCursor: [(u) => this.read(u.cursor.left >= 0 ? u.cursor.idx : null)],
        },
      },
      this.columns(),
      this.plot,
    );
  }

  nearest(column, at) {
    for (let i = 0; column && i < column.length; i++) {
      if (column[at - i] !== undefined && column[at - i] !== null) return at - i;
      if (column[at + i] !== undefined && column[at + i] !== null) return at + i;
    }
    return at;
  }

  // Values at a point of the curves. null: the last measured values, which a thinned curve may not contain.
  readings(index) {
    return this.shown().map((item, i) => {
      if (index === null) return { ...item, text: number(this.data.latest[item.name], this.spec.unit) };
      const raw = this.data.series[item.name];
      const at = raw[index] === null ? this.nearest(this.u.data[i + 1], index) : index;
      return { ...item, text: number(raw[at], this.spec.unit) };
    });
  }

  // A thinned curve shows the smallest and the largest value of several steps, not the value at this step.
  place() {
    return this.data.exact ? "step " : "extremes near step ";
  }

  read(index) {
    if (!this.data) return;
    const values = this.readings(index);
    const shown = values.map(({ label, meaning, text }, i) => {
      const line = ["solid", "dashed", "dotted"][i];
      const mark = el("i", { class: "dash" });
      mark.style.borderTop = `2px ${line} var(--series-${i + 1})`;
      return el("span", { title: meaning }, mark, el("span", { class: "cut" }, label), el("b", {}, text));
    });
    if (index !== null && values.length) shown.unshift(el("span", {}, this.place(), el("b", {}, whole(this.data.steps[index]))));
    this.values.replaceChildren(...(shown.length ? shown : [el("span", {}, "not measured in these steps")]));
  }

  background(u) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    for (const { from, to, phase } of stretches(this.owner.run(), this.range, bbox.width)) {
      if (phase === "healthy") continue;
      ctx.fillStyle = colour(`phase-${phase}`);
      ctx.globalAlpha = phase === "slingshot" ? 0.3 : 0.12;
      ctx.fillRect(bbox.left + from, bbox.top, to - from, bbox.height);
      ctx.globalAlpha = 0.9;
      ctx.fillRect(bbox.left + from, bbox.top + bbox.height - 3 * ratio(), to - from, 3 * ratio());
    }
    ctx.globalAlpha = 1;
    const band = this.spec.band;
    if (band) {
      const top = u.valToPos(band.high, "y", true), bottom = u.valToPos(band.low, "y", true);
      const rgb = colour("band");
      ctx.fillStyle = `rgba(${rgb}, 0.13)`;
      ctx.fillRect(bbox.left, top, bbox.width, bottom - top);
      ctx.strokeStyle = `rgba(${rgb}, 0.85)`;
      ctx.lineWidth = ratio();
      ctx.setLineDash([4 * ratio(), 3 * ratio()]);
      ctx.beginPath();
      ctx.moveTo(bbox.left, top);
      ctx.lineTo(bbox.left + bbox.width, top);
      ctx.stroke();
    }
    ctx.restore();
  }

  foreground(u) {
    this.chosen(u);
    const { ctx, bbox } = u;
    const { band } = this.spec;
    if (!band) return;
    const top = u.valToPos(band.high, "y", true);
    const above = top - bbox.top > 16 * ratio();
    ctx.save();
    ctx.font = `${10 * ratio()}px system-ui, sans-serif`;
    ctx.textBaseline = above ? "bottom" : "top";
    ctx.textAlign = "left";
    const at = [`${band.means} ≥ ${number(band.high)}`, bbox.left + 4 * ratio(), top + (above ? -2 : 3) * ratio()];
    ctx.lineWidth = 3 * ratio(); // a halo: curves pass behind the words
    ctx.lineJoin = "round";
    ctx.strokeStyle = colour("card");
    ctx.strokeText(...at);
    ctx.fillStyle = colour("quiet");
    ctx.fillText(...at);
    ctx.restore();
  }

  chosen(u) {
    const alert = this.owner.chosen();
    if (!alert) return;
    const { ctx, bbox } = u;
    const from = Math.max(bbox.left, u.valToPos(alert.first_step, "x", true));
    const to = Math.min(bbox.left + bbox.width, u.valToPos(alert.last_step, "x", true));
    if (to < bbox.left || from > bbox.left + bbox.width) return;
    ctx.save();
    ctx.fillStyle = colour("focus"); // lines only: a fill would hide which phases it lies over
    ctx.fillRect(from, bbox.top, Math.max(1, to - from), 3 * ratio());
    for (const x of [from, to]) ctx.fillRect(Math.round(x), bbox.top, ratio(), bbox.height);
    ctx.restore();
  }

  key(event) {
    const [low, high] = this.range;
    const span = high - low;
    const sideways = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (sideways && event.shiftKey) this.actions.zoom([low + 0.2 * span * sideways, high + 0.2 * span * sideways]);
    else if (sideways && this.u) {
      const width = this.u.over.clientWidth;
      const left = this.u.cursor.left >= 0 ? this.u.cursor.left : width / 2;
      const moved = Math.min(width - 1, Math.max(0, left + (sideways * width) / 60));
      this.u.setCursor({ left: moved, top: 10 });
      const read = this.readings(this.u.cursor.idx);
      const step = whole(this.data.steps[this.u.cursor.idx]);
      this.actions.say(`${this.place()}${step}: ${read.map(({ label, text }) => `${label} ${text}`).join(", ")}`);
    } else if (event.key === "+" || event.key === "=") this.actions.zoom([low + span / 4, high - span / 4]);
    else if (event.key === "-") this.actions.zoom([low - span / 2, high + span / 2]);
    else if (event.key === "0") this.actions.zoom(null);
    else return;
    event.preventDefault();
  }

  destroy() {
    this.observer.disconnect();
    this.u?.destroy();
  }
}

const MOVES = {
  ArrowLeft: ["phase", -1], ArrowRight: ["phase", 1], ArrowUp: ["alert", -1], ArrowDown: ["alert", 1],
  Home: ["phase", -Infinity], End: ["phase", Infinity],
};

// The whole run at a glance: phases by colour and height, alerts by shape, the window that the charts show.
// For the keyboard it is a slider over the run's steps that stops at phases and at alerts.
export class Strip {
  constructor(owner, actions) {
    this.owner = owner;
    this.actions = actions;
    this.at = null; // where the keyboard is: {kind, key, from, to, text, alert}
    const redraw = () => this.u?.redraw(false);
    this.plot = el("div", {
      class: "plot", role: "slider", tabindex: "0", "aria-orientation": "horizontal",
      onkeydown: (event) => this.key(event), onfocus: redraw, onblur: redraw,
    });
    this.node = el("div", { class: "strip" }, this.plot);
    this.extent = [0, 1];
    this.range = null;
    this.observer = follow(this, STRIP);
  }

  set(extent, range) {
    this.extent = extent;
    this.range = range;
    this.describe();
    if (!this.u) return this.rebuild();
    this.u.setData([extent, [0, 0]], false);
    this.u.setScale("x", { min: extent[0], max: extent[1] });
  }

  rebuild() {
    const width = Math.floor(this.plot.clientWidth);
    this.u?.destroy();
    this.u = null;
    if (width > 0) this.build(width);
  }

  describe() {
    const latest = this.stops("phase", -1).at(-1);
    const now = this.at ?? latest;
    const label = `Phases and alerts of ${this.owner.name.slice(0, 200)}. ` +
      "Left and right go from phase to phase, up and down from alert to alert, Enter zooms there.";
    const values = {
      "aria-label": label,
      "aria-valuemin": this.extent[0],
      "aria-valuemax": this.extent[1],
      "aria-valuenow": now?.from ?? this.extent[0],
      "aria-valuetext": this.at?.text ?? (latest ? `now ${latest.text}` : "No reading yet"),
    };
    for (const [name, value] of Object.entries(values)) this.plot.setAttribute(name, value);
  }

  // The keyboard's stops in the order of the steps, from index ``start`` on.
  stops(kind, start = 0) {
    const run = this.owner.run();
    const between = (from, to) => (from === to ? `step ${whole(from)}` : `steps ${whole(from)} to ${whole(to)}`);
    if (kind === "alert") {
      return (run?.alerts ?? []).slice(start).map((alert) => ({
        kind, alert, key: alert.key, from: alert.first_step, to: alert.last_step,
        text: `${alert.severity} alert, ${alert.what ?? alert.kind}, ${between(alert.first_step, alert.last_step)}`,
      }));
    }
    const edges = (run?.phases ?? []).slice(start), names = run?.record.phases ?? PHASES;
    return edges.map(([from, phase], i) => {
      const to = i + 1 < edges.length ? edges[i + 1][0] : run.extent[1];
      return { kind, key: `${from}`, from, to, text: `${names[phase]}, ${between(from, to)}` };
    });
  }

  key(event) {
    if (event.key === "Enter" || event.key === " ") {
      if (!this.at) return;
      if (this.at.alert) this.actions.reveal(this.at.alert);
      else {
        const pad = Math.max(2, 0.1 * (this.at.to - this.at.from));
        this.actions.zoom([this.at.from - pad, this.at.to + pad]);
      }
    } else if (event.key in MOVES && !event.ctrlKey && !event.metaKey && !event.altKey) {
      const [kind, by] = MOVES[event.key];
      const stops = this.stops(kind);
      if (!stops.length) return;
      const here = this.at?.kind === kind ? stops.findIndex(({ key }) => key === this.at.key) : -1;
      let next;
      if (Math.abs(by) > 1) next = by < 0 ? 0 : stops.length - 1;
      else if (here >= 0) next = here + by;
      else if (!this.at) next = by < 0 ? stops.length - 1 : 0;
      else if (by > 0) next = stops.findIndex(({ from }) => from >= this.at.from);
      else next = stops.findLastIndex(({ from }) => from <= this.at.from);
      if (next === -1 && by > 0) next = stops.length; // nothing later: stay at the last one
      this.at = stops[Math.min(stops.length - 1, Math.max(0, next))];
      this.describe();
      this.u?.redraw(false);
    } else return;
    event.preventDefault();
  }

  build(width) {
    const shared = pointer(this.actions, (step, u) => this.actions.chooseNear(this.owner, step, u));
    this.u = new uPlot(
      {
        width,
        height: STRIP,
        legend: { show: false },
        padding: [14, 10, 0, 0],
        cursor: { ...shared.cursor, points: { show: false } },
        scales: { x: { time: false, range: () => this.extent }, y: { range: () => [0, 1] } },
        axes: [xAxis(), { size: this.owner.letter ? AXIS - 4 : 4, splits: () => [], ticks: { show: false }, grid: { show: false } }],
        series: [{}, { show: false }],
        hooks: { ...shared.hooks, draw: [(u) => this.draw(u)] },
      },
      [this.extent, [0, 0]],
      this.plot,
    );
  }

  draw(u) {
    const { ctx, bbox } = u;
    ctx.save();
    for (const { from, to, phase } of stretches(this.owner.run(), this.extent, bbox.width)) {
      const height = HEIGHT[phase] * bbox.height;
      ctx.fillStyle = colour(`phase-${phase}`);
      ctx.fillRect(bbox.left + from, bbox.top + bbox.height - height, to - from, height);
    }
    if (this.range) {
      const [from, to] = this.range.map((step) => u.valToPos(step, "x", true));
      const right = bbox.left + bbox.width;
      ctx.fillStyle = colour("card");
      ctx.globalAlpha = 0.65;
      ctx.fillRect(bbox.left, bbox.top, Math.max(0, from - bbox.left), bbox.height);
      ctx.fillRect(Math.min(right, to), bbox.top, Math.max(0, right - to), bbox.height);
      ctx.globalAlpha = 1;
      ctx.strokeStyle = colour("focus");
      ctx.lineWidth = 1.5 * ratio();
      const left = Math.max(bbox.left, from);
      ctx.strokeRect(left, bbox.top, Math.max(2 * ratio(), Math.min(right, to) - left), bbox.height);
    }
    this.marks(u);
    if (this.at && this.plot.matches(":focus")) {
      const [from, to] = [this.at.from, this.at.to].map((step) => u.valToPos(step, "x", true));
      ctx.strokeStyle = colour("text");
      ctx.lineWidth = 2 * ratio();
      ctx.strokeRect(from - 2 * ratio(), ratio(), Math.max(4 * ratio(), to - from + 4 * ratio()), bbox.top + bbox.height - ratio());
    }
    ctx.restore();
  }

  marks(u) {
    const { ctx, bbox } = u;
    const r = ratio();
    const order = { info: 0, warning: 1, critical: 2 };
    const slots = new Map(); // one mark each 7 pixels, the most severe
    for (const alert of this.owner.run()?.alerts ?? []) {
      const x = u.valToPos(alert.first_step, "x", true);
      if (x < bbox.left - 1 || x > bbox.left + bbox.width + 1) continue;
      const slot = Math.round(x / (7 * r));
      if (!slots.has(slot) || order[slots.get(slot).severity] < order[alert.severity]) slots.set(slot, { x, severity: alert.severity });
    }
    for (const { x, severity } of slots.values()) {
      const y = bbox.top - 7 * r, s = 4.5 * r;
      ctx.fillStyle = colour(severity in order ? severity : "quiet");
      ctx.beginPath();
      if (severity === "critical") {
        ctx.moveTo(x, y - s); ctx.lineTo(x + s, y); ctx.lineTo(x, y + s); ctx.lineTo(x - s, y);
      } else if (severity === "warning") {
        ctx.moveTo(x, y - s); ctx.lineTo(x + s, y + s * 0.8); ctx.lineTo(x - s, y + s * 0.8);
      } else ctx.arc(x, y, s * 0.8, 0, 7);
      ctx.fill();
    }
  }

  destroy() {
    this.observer.disconnect();
    this.u?.destroy();
  }
}
