// The NFI tab: choose runs and steps, and keep them up to date.
//
// The server answers in JSON. This file requests it (every few seconds: TensorBoard's reload button does not
// reach a plugin's frame), charts.js and alerts.js draw. Nothing is fetched from anywhere else.

import { Alerts } from "./alerts.js";
import { Chart, PHASES, Strip, sharedRange } from "./charts.js";
import { ago, el, forgetColours, said, severityIcon, whole } from "./dom.js";

const POLL = 5000;
const FRESH = 90; // seconds without news after which a run that was not closed no longer counts as live
const NONE = "\u0000none"; // no run has this name

const state = {
  names: [],
  shown: [], // {name, letter, data, series, strip, charts, node}
  range: null, // [first, last] step of the charts; null: everything
  logs: new Map(), // title → whether the user wants it logarithmic
  more: false,
  told: 0, // counts the lists of alerts that differ
  met: null, // the first run, asked for while the page was loading: {name, run, series}
};
const ui = {};

// --- requests -------------------------------------------------------------------------------------

async function get(route, query = {}) {
  const url = `${new URL(route, import.meta.url)}?${new URLSearchParams(query)}`;
  let response;
  try {
    response = await fetch(url);
  } catch {
    throw new Error("TensorBoard does not answer. Is it still running? The tab tries again by itself.");
  }
  const text = await response.text();
  let answer;
  try {
    answer = JSON.parse(text);
  } catch {
    throw new Error(`TensorBoard answered ${response.status} with an unreadable reply. The tab tries again by itself.`);
  }
  if (!response.ok) throw Object.assign(new Error(answer.error ?? `status ${response.status}`), { status: response.status });
  return answer;
}

async function poll(asked) {
  clearTimeout(poll.timer);
  try {
    if (!document.hidden) {
      setRuns((await (asked ?? get("runs"))).runs.map(({ name }) => name));
      await Promise.all(state.shown.map((shown) => update(shown)));
      banner(null);
    }
  } catch (error) {
    if (error.status !== 404) banner(error.message); // 404: a run that went away; the next list is without it
  } finally {
    clearTimeout(poll.timer);
    poll.timer = setTimeout(poll, POLL);
  }
}

// For a new run, send both requests at once.
function meet(name, shown = {}) {
  const met = { name, run: get("run", { run: name, version: "" }), series: ask({ ...shown, name }) };
  for (const answer of [met.run, met.series]) answer.catch(() => {}); // awaited later, unless the other one fails
  return met;
}

async function update(shown) {
  let met = null;
  if (!shown.data) {
    met = state.met?.name === shown.name ? state.met : meet(shown.name, shown);
    state.met = null;
  }
  const early = met?.series ?? null;
  const answer = await (met?.run ?? get("run", { run: shown.name, version: shown.data.version }));
  if (!state.shown.includes(shown)) return;
  if (answer.unchanged) {
    shown.data.seconds_ago = answer.seconds_ago;
    header(shown);
    if (shown.stale) await curves(shown);
    return;
  }
  shown.data = answer;
  const mark = JSON.stringify(answer.alerts);
  if (mark !== shown.mark) Object.assign(shown, { mark, told: ++state.told });
  for (const alert of answer.alerts) {
    alert.run = shown.name;
    alert.key = `${shown.letter}/${alert.id}/${alert.first_step}`;
  }
  draw();
  await curves(shown, early);
}

function ask(shown) {
  const [from, to] = state.range ?? [null, null];
  const window = from === null ? {} : { from: Math.floor(from), to: Math.ceil(to) };
  const specs = shown.data?.record.charts ?? []; // none known yet: the server sends those that are shown at first
  const names = specs.filter((spec) => spec.key || state.more).flatMap((spec) => spec.series.map(({ name }) => name));
  return get("series", { run: shown.name, points: 500, names: names.join(), ...window });
}

async function curves(shown, early = null) {
  const asked = (shown.asked = (shown.asked ?? 0) + 1);
  shown.stale = true; // until the answer is here: if none comes, the next poll asks again
  const series = await (early ?? ask(shown));
  if (asked !== shown.asked || !state.shown.includes(shown)) return; // a newer question is on its way
  shown.series = series;
  shown.stale = false;
  draw();
}

// --- choice of runs -------------------------------------------------------------------------------

function setRuns(names) {
  if (names.join("\n") === state.names.join("\n") && ui.built) return;
  state.names = names;
  ui.built = true;
  ui.empty.classList.toggle("hidden", names.length > 0);
  ui.page.classList.toggle("hidden", !names.length);
  ui.controls.classList.toggle("hidden", !names.length);
  const kept = state.shown.map(({ name }) => name).filter((name) => names.includes(name));
  const first = kept[0] ?? names[0];
  options(ui.first, names, first);
  options(ui.second, names, kept[1] ?? NONE, "nothing");
  // A new run does not change the shown runs or their open parts.
  if (chosen().join("\n") !== state.shown.map(({ name }) => name).join("\n")) show();
}

const chosen = () => [ui.first.value, ui.second.value].filter((name) => state.names.includes(name));

function options(select, names, chosen, none) {
  select.replaceChildren(
    ...(none ? [el("option", { value: NONE }, none)] : []),
    ...names.map((name) => el("option", { value: name }, name.length > 120 ? `${name.slice(0, 120)}…` : name)),
  );
  select.value = chosen ?? "";
}

function show() {
  const wanted = chosen();
  for (const shown of state.shown) {
    shown.strip.destroy();
    shown.charts.forEach((chart) => chart.destroy());
  }
  const before = new Map(state.shown.map((shown) => [shown.name, shown]));
  state.shown = wanted.map((name, i) => {
    const old = before.get(name);
    const shown = { name, letter: "AB"[i], data: null, series: old?.series ?? null, charts: new Map() };
    const owner = {
      run: () => shown.data,
      chosen: () => (ui.alerts.open?.letter0 === shown.letter ? ui.alerts.open : null),
      letter: wanted.length > 1 ? shown.letter : null,
      name,
    };
    shown.owner = owner;
    shown.strip = new Strip(owner, actions);
    shown.head = el("div");
    shown.said = el("div");
    shown.node = el("section", { class: "card run", "data-run": name }, shown.head, shown.strip.node, legend(), shown.said);
    return shown;
  });
  ui.runs.replaceChildren(...state.shown.map(({ node }) => node));
  ui.runs.className = wanted.length > 1 ? "runs two" : "runs";
  ui.charts.className = wanted.length > 1 ? "charts two" : "charts one";
  ui.charts.replaceChildren();
  ui.alerts.clear();
}

function legend() {
  const swatch = (phase) => {
    const mark = el("i", { class: "swatch" });
    mark.style.background = `var(--phase-${phase})`;
    return el("span", {}, mark, phase);
  };
  return el("div", { class: "legend", "aria-hidden": "true" }, PHASES.map(swatch));
}

// --- choice of steps-------------------------------------------------------------------------------

function extent() {
  const known = state.shown.map(({ data }) => data?.extent).filter(Boolean);
  if (!known.length) return [0, 1];
  const low = Math.min(...known.map(([first]) => first)), high = Math.max(...known.map(([, last]) => last));
  return low === high ? [low - 1, high + 1] : [low, high];
}

const actions = {
  zoom(range) {
    const [low, high] = extent();
    if (range) {
      const span = Math.max(4, Math.min(range[1] - range[0], high - low));
      const from = Math.max(low, Math.min(range[0], high - span));
      range = [from, Math.min(high, from + span)];
      if (range[0] <= low && range[1] >= high) range = null;
    }
    state.range = range;
    draw(); // at once with what is here; finer data follow
    clearTimeout(actions.timer);
    actions.timer = setTimeout(actions.fetch, 80);
  },
  fetch: () => Promise.all(state.shown.filter(({ data }) => data).map((shown) => curves(shown))).catch((error) => banner(error.message)),
  scale(title) {
    state.logs.set(title, !isLog(specs().find((spec) => spec.title === title)));
    draw();
  },
  say(text) {
    ui.spoken.replaceChildren(text);
  },
  chooseNear(owner, step, u) {
    const reach = Math.abs(u.posToVal(8, "x") - u.posToVal(0, "x"));
    const near = ui.alerts.all
      .filter((alert) => alert.run === owner.name && alert.first_step - reach <= step && step <= alert.last_step + reach)
      .sort((a, b) => Math.abs(a.first_step - step) - Math.abs(b.first_step - step))[0];
    if (near) ui.alerts.choose(near, true);
  },
  reveal(alert) {
    ui.alerts.choose(alert, true);
  },
  choose(alert) {
    if (!alert) return actions.zoom(null);
    const shown = state.shown.find(({ name }) => name === alert.run);
    const tau = Number(shown?.data.record.tau) || 20;
    const pad = Math.max(3 * tau, 0.5 * (alert.last_step - alert.first_step), 10);
    actions.zoom([alert.first_step - pad, alert.last_step + pad]);
  },
  detail: (alert) => get("alert", { run: alert.run, id: alert.id, first: alert.first_step }),
};

function more() {
  state.more = !state.more;
  draw();
  actions.fetch();
}

// --- drawing --------------------------------------------------------------------------------------

const isLog = (spec) => state.logs.get(spec.title) ?? spec.log;

function specs() {
  const found = new Map();
  for (const { data } of state.shown) {
    for (const spec of data?.record.charts ?? []) if (!found.has(spec.title)) found.set(spec.title, spec);
  }
  return [...found.values()];
}

function draw() {
  const known = state.shown.filter(({ data }) => data);
  if (!known.length) return;
  const full = extent(), range = state.range ?? full;
  const several = state.shown.length > 1;
  ui.window.replaceChildren(`steps ${whole(range[0])}–${whole(range[1])}`);
  ui.reset.disabled = !state.range;
  for (const shown of known) {
    header(shown);
    shown.strip.set(full, state.range);
  }
  const all = known.flatMap(({ data, letter }) =>
    data.alerts.map((alert) => Object.assign(alert, { letter: several ? letter : null, letter0: letter })));
  const version = JSON.stringify([several, known.map(({ told }) => told)]);
  const finished = known.every(({ data }) => data.record.closed);
  const reserved = known.some(({ data }) => data.problems.length || data.record.notes?.length);
  ui.alerts.set(all, finished, reserved, version);

  const ready = known.filter(({ series }) => series);
  if (!ready.length) return; // the curves come next

  const measured = specs().filter((spec) =>
    spec.series.some(({ name }) => ready.some(({ series }) => series.measured.includes(name))));
  const wanted = measured.filter((spec) => spec.key || state.more);
  const nodes = [];
  for (const spec of wanted) {
    const log = isLog(spec);
    const yRange = sharedRange(spec, log, ready.map(({ series }) => series));
    for (const shown of ready) {
      if (!shown.charts.has(spec.title)) {
        const own = shown.data.record.charts?.find(({ title }) => title === spec.title) ?? spec;
        shown.charts.set(spec.title, new Chart(own, shown.owner, actions));
      }
      nodes.push([shown.charts.get(spec.title), shown, yRange, log]);
    }
  }
  const cards = nodes.map(([chart]) => chart.node);
  const classes = ready.map(absorbing).filter(Boolean);
  const hidden = measured.length - wanted.length;
  ui.more.classList.toggle("hidden", !hidden && !state.more);
  ui.more.replaceChildren(state.more ? "Fewer quantities" : `${hidden} more quantities`);
  if (!cards.length) cards.push(el("p", { class: "card run quiet" }, "Attached. The first measured step appears here by itself."));
  const order = [...cards, ...classes, ui.more, ui.keys];
  const here = [...ui.charts.children];
  // Do not move the cards of charts without need: a moved card loses the focus.
  if (order.length !== here.length || order.some((node, i) => node !== here[i])) {
    const focused = document.activeElement;
    ui.charts.replaceChildren(...order);
    if (focused?.isConnected) focused.focus({ preventScroll: true });
  }
  for (const [chart, shown, yRange, log] of nodes) chart.set(shown.series, range, yRange, log);
  if (!ui.painted) {
    ui.painted = true;
    requestAnimationFrame(() => setTimeout(() => performance.mark("nfi-painted"), 0));
  }
}

function header(shown) {
  const { record, phases, alerts, seconds_ago: seconds, readings, problems } = shown.data;
  const signature = JSON.stringify([record, phases.at(-1), alerts.length, seconds, readings, problems, shown.owner.letter]);
  if (signature === shown.signature) return;
  shown.signature = signature;
  const phase = (record.phases ?? PHASES)[phases.at(-1)?.[1]];
  const mark = el("i", { class: "swatch" });
  mark.style.background = `var(--phase-${phase})`;
  const last = shown.data.extent?.[1];
  const live = !record.closed && seconds < FRESH;
  const status = record.closed
    ? `finished · step ${whole(last ?? 0)}`
    : live ? `live · step ${whole(last ?? 0)}` : `no news for ${ago(seconds).replace(" ago", "")} · step ${whole(last ?? 0)}`;
  const slingshots = alerts.filter(({ kind }) => kind === "slingshot").length;
  shown.head.replaceChildren(
    el(
      "header",
      {},
      shown.owner.letter ? el("span", { class: `badge ${shown.owner.letter.toLowerCase()}` }, shown.owner.letter) : null,
      el("h2", { class: "clip" }, said(shown.name)),
      phase ? el("span", { class: "pill" }, mark, phase) : null,
      el("span", { class: "pill" }, live ? el("i", { class: "pulse" }) : null, status),
      slingshots ? el("span", { class: "pill" }, severityIcon("critical"), `${slingshots} slingshot${slingshots > 1 ? "s" : ""}`) : null,
    ),
    el("dl", { class: "facts" }, (record.facts ?? []).map(([label, text]) =>
      el("div", {}, el("dt", {}, label), el("dd", { class: "clip" }, said(text))))),
  );
  const open = shown.said.querySelector("details")?.open;
  const notes = [...problems, ...(record.replays ?? []), ...(record.notes ?? []).map(({ message, step }) => `step ${whole(step ?? 0)}: ${message}`)];
  shown.said.replaceChildren(
    ...(notes.length
      ? [el("details", { class: "said", open: open || problems.length > 0 },
          el("summary", {}, problems.length ? "Not everything could be read" : `Notes (${notes.length})`),
          el("ul", {}, notes.map((note) => el("li", {}, said(note)))))]
      : []),
  );
}

function absorbing(shown) {
  const classes = (shown.data.record.classes ?? []).slice(0, 10);
  if (!classes.length) return null;
  const signature = JSON.stringify(classes);
  if (signature === shown.absorbed?.signature) return shown.absorbed.node;
  const most = Math.max(...classes.map(([, count]) => count)) || 1;
  const node = el(
    "section",
    { class: "card classes", "data-classes": shown.name },
    el("header", { class: "facts" }, shown.owner.letter ? el("span", { class: `badge ${shown.owner.letter.toLowerCase()}` }, shown.owner.letter) : null,
      el("h3", {}, "Classes with the most absorbed rows"), el("span", {}, "rows seen")),
    el("ol", {}, classes.map(([name, count]) => {
      const bar = el("span", { class: "bar" });
      bar.style.width = `${(100 * count) / most}%`;
      return el("li", {}, said(typeof name === "number" ? `class ${name}` : name, { class: "cut" }), bar, el("span", {}, whole(count)));
    })),
  );
  shown.absorbed = { signature, node };
  return node;
}

function banner(text) {
  ui.banner.classList.toggle("hidden", !text);
  if (text && ui.banner.textContent !== text) ui.banner.replaceChildren(said(text));
}

// --- the page -------------------------------------------------------------------------------------

function build() {
  const select = (label) => el("select", { "aria-label": label, onchange: () => (show(), void poll()) });
  ui.first = select("Run");
  ui.second = select("Compare with");
  ui.window = el("span", { class: "window" });
  ui.reset = el("button", { disabled: true, title: "Esc", onclick: () => actions.zoom(null) }, "All steps");
  ui.controls = el("div", { class: "controls" },
    el("label", {}, el("span", {}, "run"), ui.first), el("label", {}, el("span", {}, "against"), ui.second),
    el("span", { class: "space" }), ui.window, ui.reset);
  ui.banner = el("div", { class: "banner hidden", role: "alert" });
  ui.alerts = new Alerts(actions);
  ui.runs = el("div", { class: "runs" });
  ui.charts = el("div", { class: "charts one" });
  ui.more = el("button", { class: "more", onclick: more });
  const key = (text) => el("kbd", {}, text);
  ui.keys = el("p", { class: "keys" }, "Drag to zoom, double-click for all steps. Keys: ", key("/"), " filter, ", key("↑"), " ", key("↓"),
    " alerts, ", key("←"), " ", key("→"), " phases or cursor, ", key("Shift"), " ", key("←"), " ", key("→"), " move, ", key("+"), " ", key("−"), " zoom, ", key("Esc"), " all steps");
  ui.page = el("main", { class: "page hidden" }, ui.runs, ui.alerts.node, ui.charts);
  ui.empty = el("main", { class: "card empty hidden" },
    el("h2", {}, "No monitored run in this log directory"),
    el("p", {}, "A run appears here as soon as the monitor writes into a directory below the one that TensorBoard was started with:"),
    el("pre", {}, 'pip install "nfi-monitor[tensorboard]"\n\nwith Monitor(model, optimizer, run_dir="runs/7"):\n    ...  # the training loop, unchanged\n\ntensorboard --logdir runs'),
    el("p", { class: "quiet" }, "Runs of nfi-monitor versions before this tab are shown under Scalars, Custom scalars and Text. This page looks for new runs every five seconds."));
  ui.spoken = el("div", { class: "spoken", "aria-live": "polite" });
  document.body.append(
    el("div", { class: "top" }, el("h1", {}, "NFI monitor"), ui.controls), ui.banner, ui.page, ui.empty, ui.spoken);
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select");
    if (event.key === "/" && !typing) {
      ui.alerts.search.focus();
      event.preventDefault();
    } else if (event.key === "Escape" && !typing) {
      if (ui.alerts.open) ui.alerts.choose(null);
      else actions.zoom(null);
    }
  });
  document.addEventListener("visibilitychange", () => document.hidden || poll());
}

// TensorBoard marks its page as dark. Outside of TensorBoard, follow the system's setting.
function theme() {
  let host = null;
  try {
    host = window.parent !== window ? window.parent.document.body : null;
  } catch {
    host = null; // framed by a page of another origin
  }
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const dark = host ? host.classList.contains("dark-mode") : system.matches;
    if (dark === document.documentElement.classList.contains("dark")) return;
    document.documentElement.classList.toggle("dark", dark);
    forgetColours();
    for (const shown of state.shown) {
      shown.strip.rebuild();
      shown.charts.forEach((chart) => chart.rebuild());
    }
  };
  if (host) new MutationObserver(apply).observe(host, { attributes: true, attributeFilter: ["class"] });
  system.addEventListener("change", apply);
  apply();
}

const loaded = (tag, attributes) =>
  new Promise((resolve, reject) => {
    const node = el(tag, attributes);
    node.onload = resolve;
    node.onerror = () => reject(new Error(`${attributes.src ?? attributes.href} did not load. Reload the page.`));
    document.head.append(node);
  });

export async function render() {
  performance.mark("nfi-start");
  document.documentElement.lang = "en";
  document.title = "NFI monitor";
  document.head.append(el("meta", { name: "viewport", content: "width=device-width" }));
  const file = (name) => new URL(name, import.meta.url).href;
  const asked = get("runs"); // the server looks while the styles load
  const first = asked.then(({ runs }) => (state.met = runs.length ? meet(runs[0].name) : null));
  first.catch(() => {}); // poll() says what went wrong
  try {
    await Promise.all([
      loaded("link", { rel: "stylesheet", href: file("uPlot.min.css") }),
      loaded("link", { rel: "stylesheet", href: file("style.css") }),
      loaded("script", { src: file("uPlot.iife.min.js") }),
    ]);
  } catch (error) {
    document.body.append(error.message);
    return;
  }
  build();
  theme();
  await poll(asked);
}
