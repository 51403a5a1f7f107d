// Elements, icons and numbers. Text reaches the page as text nodes only, so a layer called "<script>" is just that.

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

// Text from a run: shown literally, and isolated so that its direction does not change the text beside it.
export const said = (text, attributes = {}) => el("bdi", attributes, shorten(String(text)));

const LONGEST = 20000;
const shorten = (text) => (text.length > LONGEST ? text.slice(0, LONGEST) + "…" : text);

export const SEVERITIES = ["critical", "warning", "info"];
const SHAPES = {
  critical: "M7 1 13 7 7 13 1 7Z", // a diamond
  warning: "M7 1.5 13 12.5H1Z", // a triangle
  info: "M7 2a5 5 0 1 0 .01 0Z", // a circle
};

const icons = new Map();
export function severityIcon(severity) {
  if (!icons.has(severity)) icons.set(severity, drawnIcon(severity));
  return icons.get(severity).cloneNode(true); // of two thousand rows, each has one
}

function drawnIcon(severity) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("width", "14");
  svg.setAttribute("height", "14");
  svg.setAttribute("viewBox", "0 0 14 14");
  svg.setAttribute("class", SEVERITIES.includes(severity) ? severity : "quiet");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", severity);
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", SHAPES[severity] ?? SHAPES.info);
  path.setAttribute("fill", "currentColor");
  svg.append(path);
  return svg;
}

const grouped = new Intl.NumberFormat("en-US"); // made once: toLocaleString makes one a call, .2 ms each
export const whole = (step) => grouped.format(Math.round(step));

export function number(value, unit = "") {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value;
  if (unit === "fraction") return `${trim((100 * value).toPrecision(3))}%`;
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2).replace("e+", "e");
  return size >= 1000 ? whole(value) : trim(value.toPrecision(3));
}

const trim = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);

const colours = new Map();
export function colour(name) {
  if (!colours.has(name)) colours.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  return colours.get(name);
}
export const forgetColours = () => colours.clear(); // the theme has changed

export function ago(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} days ago`;
}
