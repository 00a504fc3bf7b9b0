// The view of the model: what is served, how good it was measured to be, and its data.
import { figure, formatNumber, formatScore, make, table } from "./view.js";

const FIRST = ["recall", "ndcg", "hit_rate", "mrr", "map", "precision", "coverage", "novelty"];

function panel(heading, content, wide = false) {
  return make("section", { class: wide ? "panel wide" : "panel" }, make("h3", { text: heading }), content);
}

// Figures such as recall@10 as a table: a row for each metric, a column for each length of list.
function qualityTable(name, figures) {
  const metrics = new Map();
  const lengths = new Set();
  const others = [];
  for (const [key, value] of Object.entries(figures)) {
    if (typeof value !== "number") continue;
    const [metric, length] = key.split("@");
    if (length === undefined) {
      others.push([key.replaceAll("_", " "), value]);
      continue;
    }
    lengths.add(Number(length));
    if (!metrics.has(metric)) metrics.set(metric, new Map());
    metrics.get(metric).set(Number(length), value);
  }
  const place = (metric) => (FIRST.includes(metric) ? FIRST.indexOf(metric) : FIRST.length);
  const columns = [...lengths].sort((a, b) => a - b);
  const rows = [...metrics].sort(([a], [b]) => place(a) - place(b)).map(([metric, values]) => [
    metric.replaceAll("_", " "),
    ...columns.map((length) => (values.has(length) ? formatScore(values.get(length)) : "")),
  ]);
  const parts = [];
  if (rows.length) parts.push(table(["", ...columns.map((length) => `@${length}`)], rows, `Figures of ${name}`));
  if (others.length) {
    parts.push(make("dl", { class: "figures more" }, ...others.map(([key, value]) => figure(key, formatNumber(value), true))));
  }
  return make("div", {}, ...parts);
}

function dataTable(data) {
  // In the order of time, not of the alphabet.
  const order = ["train", "validation", "test"];
  const parts = Object.entries(data.rows || {});
  parts.sort(([one], [other]) => order.indexOf(one) - order.indexOf(other));
  const rows = parts.map(([part, count]) => {
    const times = data[part] || {};
    const day = (time) => (time ? String(time).slice(0, 10) : "");
    return [part, formatNumber(count), day(times.from), day(times.to)];
  });
  return table(["", "rows", "from", "to"], rows, "Rows of the log");
}

export function modelPanels(info, ready) {
  const made = [];
  const served = [
    figure("items", formatNumber(info.items)),
    figure("known users", formatNumber(info.users)),
    figure("changes since the export", formatNumber(info.changes)),
    figure("width of the vectors", formatNumber(info.dim)),
    figure("version", info.model_version, true),
    figure("exported", String(info.date).slice(0, 10), true),
    figure("index", info.index.replaceAll("_", " "), true),
    figure("status", ready.status, true),
  ];
  made.push(panel("What is served", make("dl", { class: "figures" }, ...served), true));
  if (ready.differences?.length) {
    const lines = ready.differences.slice(0, 10).map((text) => make("li", { text, dir: "auto" }));
    made.push(panel("Golden answers that differ", make("ol", { class: "problem" }, ...lines), true));
  }
  const parts = Object.entries(info.figures).filter(([, figures]) => figures && typeof figures === "object");
  for (const [name, figures] of parts) {
    made.push(panel(`Quality on the ${name} rows`, qualityTable(name, figures)));
  }
  if (!parts.length) {
    const text = "The bundle has no figures. Measure the run by twotower evaluate, and export it again.";
    made.push(panel("Quality", make("p", { class: "soft", text })));
  }
  if (info.data.rows) made.push(panel("Rows of the log", dataTable(info.data)));
  const links = [["v1/openapi.json", "The API as OpenAPI"], ["metrics", "Counters for Prometheus"]];
  const list = make("ul", {}, ...links.map(([href, text]) => make("li", {}, make("a", { href, text }))));
  made.push(panel("For programs", list));
  return make("div", { class: "panels" }, ...made);
}
