// Elements made of text, never of markup: what is shown comes from tasks, relays and chains.

export const by = (id) => document.getElementById(id);

/** An element with attributes and children; null children are left out. */
export function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes))
    if (key === "click") made.addEventListener("click", value);
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const SIGNS = { good: "✓", busy: "▶", warn: "!", bad: "✕" };

/** A state in words behind a sign: colour is never all that tells. */
export const state = (kind, words) => make("span", { class: `state ${kind}` }, `${SIGNS[kind]} ${words}`);

/** Rows into a table's body: each an array of text, an element, or {number: text}. */
export function fill(id, rows, none = "nothing yet") {
  const body = by(id).tBodies[0], columns = by(id).tHead.rows[0].cells.length;
  body.replaceChildren(...rows.map((row) => make("tr", {}, ...row.map(cell))));
  if (!rows.length) body.append(make("tr", {}, make("td", { colspan: columns, class: "note" }, none)));
}

function cell(value) {
  if (value instanceof Node) return make("td", {}, value);
  if (value !== null && typeof value === "object") return make("td", { class: "number" }, value.number);
  return make("td", {}, value ?? "");
}

/** Pairs of words and values for a `dl`; a value that is null is left out. */
export const pairs = (found) => found.filter(([, value]) => value !== null && value !== undefined)
  .map(([word, value]) => make("div", {}, make("dt", {}, word), make("dd", {}, value)));

// --- values as people read them ------------------------------------------------------------------

/** Wei, as text or number, in CNX. */
export const cnx = (wei) => Number(BigInt(wei)) / 1e18;
export const money = (wei, digits = 4) => cnx(wei).toLocaleString(undefined, { maximumFractionDigits: digits });

const GB = 1e9;
export const bytes = (count) => count >= GB ? `${(count / GB).toFixed(1)} GB` : `${(count / 1e6).toFixed(0)} MB`;

/** A stretch of time, in the unit that fits. */
export function span(seconds) {
  if (seconds < 0.1) return `${(seconds * 1000).toFixed(0)} ms`;
  if (seconds < 90) return `${seconds.toFixed(1)} s`;
  if (seconds < 5400) return `${(seconds / 60).toFixed(0)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${(seconds / 86400).toFixed(0)} d`;
}

export const clock = (at) => new Date(at * 1000).toLocaleTimeString();
export const date = (at) => new Date(at * 1000).toLocaleString();
export const short = (hash) => hash && hash.length > 14 ? `${hash.slice(0, 10)}…` : hash ?? "";
