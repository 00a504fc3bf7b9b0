// The parts of the page as elements. Texts of data are set as text, never read as HTML.
const RIGHT_TO_LEFT = /^[^\p{L}]*[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/u;
const SHORT = new Intl.NumberFormat("en", { maximumFractionDigits: 3 });
const DAY = new Intl.DateTimeFormat("en", { dateStyle: "medium" });

// Returns an element; properties `class`, `text` and `on*` are set as such, others as attributes.
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const directionOf = (text) => (RIGHT_TO_LEFT.test(text) ? "rtl" : "ltr");
export const formatNumber = (value) => SHORT.format(value);
// Scores of one list have equally many digits.
export const formatScore = (value) => (Number.isInteger(value) ? formatNumber(value) : value.toFixed(3));
export const formatDay = (seconds) => DAY.format(new Date(seconds * 1000));

export function formatValue(value) {
  if (Array.isArray(value)) return value.map(formatValue).join(", ");
  if (typeof value === "number") return formatNumber(value);
  if (value !== null && typeof value === "object") return JSON.stringify(value);
  return String(value);
}

export function titleOf(item, column) {
  const title = column && item.display[column];
  return title ? String(title) : item.item_id;
}

function isShown(value) {
  return value !== null && value !== undefined && value !== "" && !(Array.isArray(value) && !value.length);
}

// Returns the display columns of an item but for its title; `most` of them.
export function facts(item, column, most = 4) {
  const pairs = Object.entries(item.display).filter(([name, value]) => name !== column && isShown(value));
  if (!pairs.length) return null;
  return make("dl", { class: "facts" }, ...pairs.slice(0, most).map(([name, value]) => make(
    "div", {},
    make("dt", { text: name }),
    make("dd", { text: formatValue(value), dir: "auto" }),
  )));
}

export function titleButton(item, column, onOpen, lines = "clamp") {
  const title = titleOf(item, column);
  const text = make("span", { class: lines, text: title, dir: "auto" });
  return make("button", { type: "button", class: "name", title, onclick: () => onOpen(item) }, text);
}

export function addButton(item, column, onAdd) {
  const label = `Add to the history: ${titleOf(item, column)}`;
  const properties = { type: "button", class: "add", "aria-label": label, title: "Add to the history" };
  return make("button", { ...properties, text: "+", onclick: () => onAdd(item) });
}

function reasonOf(item, titles) {
  const reason = item.reason;
  if (!reason) return null;
  const title = titles.get(reason.item_id) || reason.item_id;
  return make(
    "dl", { class: "facts" },
    make("div", {}, make("dt", { text: "because of" }), make("dd", { text: title, dir: "auto", class: "reason" })),
    reason.event ? make("div", {}, make("dt", { text: "event" }), make("dd", { text: reason.event })) : null,
  );
}

function movedBadge(moved) {
  if (!moved) return null;
  if (moved === "new") return make("span", { class: "moved new", text: "new here" });
  const up = moved > 0;
  const label = `${up ? "Up" : "Down"} ${Math.abs(moved)}`;
  const properties = { class: up ? "moved up" : "moved", "aria-label": label, role: "img" };
  return make("span", { ...properties, text: `${up ? "▲" : "▼"} ${Math.abs(moved)}` });
}

// Returns the card of an item. `about` has rank, share of the bar, moved, shared, column, titles.
export function card(item, about, onOpen, onAdd) {
  const bar = make("span");
  bar.style.setProperty("--share", `${Math.round(100 * about.share)}%`);
  const score = item.score === null ? "" : formatScore(item.score);
  return make(
    "li",
    {
      class: about.shared ? "card shared" : "card",
      dir: directionOf(titleOf(item, about.column)), "data-item": item.item_id,
    },
    make(
      "div", { class: "title" },
      make("span", { class: "rank", text: about.rank }),
      titleButton(item, about.column, onOpen),
      addButton(item, about.column, onAdd),
    ),
    facts(item, about.column) || make("span"),
    reasonOf(item, about.titles) || make("span"),
    make(
      "div", { class: "foot" },
      make("span", { class: "source", "data-source": item.source, text: item.source }),
      make("span", { class: "score", text: score, title: "Score" }),
      make("span", { class: "meter", "aria-hidden": "true" }, bar),
      about.shared ? make("span", { class: "soft", text: "in both" }) : null,
      movedBadge(about.moved),
    ),
  );
}

// Cards without content, which keep the place of those to come.
export function bones(count) {
  return Array.from({ length: count }, () => make(
    "li", { class: "card wait", "aria-hidden": "true" },
    make("span", { class: "bone" }), make("span", { class: "bone" }), make("span"), make("span"),
  ));
}

export function empty(heading, text) {
  return make("div", { class: "empty" }, make("strong", { text: heading }), make("span", { text }));
}

export function problem(refusal, onRetry) {
  return make(
    "div", { class: "problem", role: "alert" },
    make("strong", { text: refusal.status === 0 ? "No answer" : "Refused" }),
    make("p", { text: [refusal.message, refusal.cure].filter(Boolean).join(" "), dir: "auto" }),
    make("button", { type: "button", text: "Try again", onclick: onRetry }),
  );
}

// A figure with its name.
export function figure(name, value, small = false) {
  return make("div", {}, make("dt", { text: name }), make("dd", { text: value, class: small ? "small" : "" }));
}

export function table(header, rows, label) {
  const head = make("tr", {}, ...header.map((name) => make("th", { text: name, scope: "col" })));
  const body = rows.map(([name, ...cells]) => make(
    "tr", {}, make("th", { text: name, scope: "row" }), ...cells.map((text) => make("td", { text })),
  ));
  const made = make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
  // A table that is wider than the window is moved by keys too.
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, made);
}
