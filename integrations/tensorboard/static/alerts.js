// The list of alerts, newest first and filtered. An open alert shows its evidence and advice.

import { SEVERITIES, el, said, severityIcon, whole } from "./dom.js";

const AT_ONCE = 40; // rows before the first paint; the others follow in idle time, none is left out
const BATCH = 50;
const ROW = 45; // pixels, as in style.css
const idle = window.requestIdleCallback
  ? (work) => requestIdleCallback(work, { timeout: 500 })
  : (work) => setTimeout(work, 30, { timeRemaining: () => 8 });

export class Alerts {
  // actions: choose(alert or null), detail(alert) → promise of the whole record
  constructor(actions) {
    this.actions = actions;
    this.all = [];
    this.on = new Set(SEVERITIES);
    this.state = "";
    this.words = [];
    this.open = null;
    this.job = 0;
    this.chips = new Map();
    this.count = el("span", { class: "quiet", role: "status" });
    this.search = el("input", {
      type: "search", placeholder: "Filter: mechanism, layer, words…", "aria-label": "Filter alerts by text",
      oninput: () => {
        this.words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
        this.render();
      },
    });
    this.states = el(
      "select",
      { "aria-label": "State", onchange: () => ((this.state = this.states.value), this.render()) },
      el("option", { value: "" }, "all"),
      el("option", { value: "firing" }, "firing"),
      el("option", { value: "resolved" }, "over"),
    );
    this.list = el("div", { class: "list", onkeydown: (event) => this.key(event) });
    const chips = SEVERITIES.map((severity) => {
      const count = el("span", {}, "0");
      const chip = el(
        "button",
        { "aria-pressed": "true", "data-severity": severity, onclick: () => this.toggle(severity, chip) },
        severityIcon(severity), severity, count,
      );
      this.chips.set(severity, count);
      return chip;
    });
    this.node = el(
      "aside",
      { class: "card alerts", "aria-label": "Alerts" },
      el(
        "div",
        { class: "filters" },
        el("header", {}, el("h2", {}, "Alerts"), this.count),
        el("div", { class: "chips" }, chips),
        el("div", { class: "line" }, this.search, this.states),
      ),
      this.list,
    );
  }

  toggle(severity, chip) {
    if (!this.on.delete(severity)) this.on.add(severity);
    chip.setAttribute("aria-pressed", String(this.on.has(severity)));
    this.render();
  }

  clear() {
    this.job++;
    this.all = [];
    this.open = this.version = null;
    this.count.replaceChildren();
    this.list.replaceChildren();
  }

  // ``version`` changes when an alert changes. Rows that stay the same are not moved.
  // ``reserved``: there are notes, or unreadable records, that may be the reason why there is no alert.
  set(alerts, finished, reserved, version) {
    if (version === this.version && finished === this.finished && reserved === this.reserved) return;
    Object.assign(this, { version, finished, reserved });
    this.all = [...alerts].sort((a, b) => b.first_step - a.first_step || b.last_step - a.last_step);
    if (this.open) this.open = this.all.find((alert) => alert.key === this.open.key) ?? null;
    for (const [severity, count] of this.chips) {
      count.replaceChildren(whole(this.all.filter((alert) => alert.severity === severity).length));
    }
    this.render();
  }

  matches(alert) {
    if (SEVERITIES.includes(alert.severity) && !this.on.has(alert.severity)) return false;
    if (this.state && alert.state !== this.state) return false;
    if (!this.words.length) return true;
    const text = [alert.id, alert.what, alert.phase, alert.headline, alert.mechanism, alert.layer, alert.run]
      .join(" ").toLowerCase();
    return this.words.every((word) => text.includes(word));
  }

  render() {
    const job = ++this.job;
    const shown = this.all.filter((alert) => this.matches(alert));
    const { length } = this.all;
    this.count.replaceChildren(shown.length === length ? whole(length) : `${whole(shown.length)} of ${whole(length)}`);
    if (!shown.length) {
      const why = length
        ? "No alert matches the filter."
        : this.finished
          ? this.reserved
            ? "No alert in this run. Its notes say how it was watched."
            : "No alert: no sign of a slingshot in this run."
          : "No alert so far. The first one appears here by itself.";
      this.list.replaceChildren(el("p", { class: "quiet" }, why));
      return;
    }
    const top = this.list.scrollTop;
    const focused = document.activeElement?.closest?.(".alert")?.dataset.key;
    // Draw the scrolled-to rows and the row with the focus at once, too.
    const seen = top ? Math.ceil((top + this.list.clientHeight) / ROW) : 0;
    let from = Math.max(AT_ONCE, seen, focused ? shown.findIndex(({ key }) => key === focused) + 1 : 0);
    this.list.replaceChildren(...shown.slice(0, from).map((alert) => this.row(alert)));
    if (top) this.list.scrollTop = top; // asks for a layout
    if (focused) this.list.querySelector(`[data-key="${CSS.escape(focused)}"] > button`)?.focus({ preventScroll: true });
    const rest = (deadline) => {
      do {
        if (job !== this.job || from >= shown.length) return;
        this.list.append(...shown.slice(from, from + BATCH).map((alert) => this.row(alert)));
        from += BATCH;
      } while (deadline.timeRemaining() > 4);
      idle(rest);
    };
    idle(rest);
  }

  row(alert) {
    const open = this.open?.key === alert.key;
    const node = el(
      "div",
      { class: open ? "alert open" : "alert", "data-key": alert.key },
      el(
        "button",
        { "aria-expanded": String(open), onclick: () => this.choose(this.open?.key === alert.key ? null : alert) },
        severityIcon(alert.severity),
        el(
          "span",
          { class: "name" },
          alert.letter ? el("span", { class: `badge ${alert.letter.toLowerCase()}` }, alert.letter) : null,
          said(alert.what ?? alert.kind, { class: "cut" }),
          alert.state === "firing" ? el("span", { class: "firing" }, "firing") : null,
        ),
        el("span", { class: "steps" }, steps(alert)),
        el("span", { class: "sub cut" }, said(alert.forecast || alert.mechanism || "")),
      ),
    );
    if (open) this.fill(node, alert);
    return node;
  }

  choose(alert, reveal = false) {
    const before = this.open;
    this.open = alert;
    for (const changed of [before, alert]) {
      const old = changed && this.list.querySelector(`[data-key="${CSS.escape(changed.key)}"]`);
      if (!old) continue;
      const focused = old.contains(document.activeElement);
      const fresh = this.row(changed);
      old.replaceWith(fresh);
      if (focused) fresh.firstChild.focus({ preventScroll: true });
      if (reveal && changed === alert) fresh.scrollIntoView({ block: "nearest" });
    }
    this.actions.choose(alert);
  }

  async fill(node, alert) {
    const box = el("div", { class: "detail" }, el("p", { class: "quiet" }, "…"));
    node.append(box);
    try {
      box.replaceChildren(...detail(await this.actions.detail(alert)));
    } catch (error) {
      box.replaceChildren(el("p", { role: "alert" }, error.message));
    }
  }

  key(event) {
    const moves = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!moves) return;
    const buttons = [...this.list.querySelectorAll(".alert > button")];
    const next = buttons[buttons.indexOf(event.target.closest(".alert > button")) + moves];
    if (next) {
      next.focus();
      event.preventDefault();
    }
  }
}

const steps = ({ first_step: first, last_step: last }) =>
  first === last ? whole(first) : `${whole(first)}–${whole(last)}`;

function detail(alert) {
  const parts = [el("p", { class: "head" }, said(alert.headline))];
  const lines = [
    ["mechanism", alert.mechanism_in_words],
    ["forecast", alert.forecast],
    ["then", alert.then],
    ["phase", alert.phase],
    ["layer", alert.layer],
  ].filter(([, text]) => text);
  parts.push(el("dl", { class: "facts" }, lines.map(([label, text]) =>
    el("div", {}, el("dt", {}, label), el("dd", { class: "clip" }, said(text))))));
  if (alert.evidence?.length) {
    const heads = ["evidence", "value", "threshold", "baseline"];
    parts.push(
      el(
        "table",
        {},
        el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))),
        el("tbody", {}, alert.evidence.map(([label, value, threshold, baseline, meaning]) =>
          el("tr", { title: meaning }, [label, value, threshold, baseline].map((text) => el("td", {}, said(text)))))),
      ),
    );
  }
  if (alert.advice?.length) {
    parts.push(el("div", {}, el("h3", {}, "What to do"), el("ol", {}, alert.advice.map((text) => el("li", {}, said(text))))));
  }
  return parts;
}
