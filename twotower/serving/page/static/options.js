// The options of a list: sliders, conditions and what it is compared with.
// `onWait` is called at each change, `onChange` once no other has followed it for a moment.
import { make } from "./view.js";

const byId = (id) => document.getElementById(id);
const SLIDERS = ["k", "popularity", "diversity"];
const DEFAULTS = { k: "10", popularity: "0", diversity: "0" };

export function startOptions(onWait, onChange) {
  let columns = [];
  let timer = 0;
  const showSliders = () => {
    for (const name of SLIDERS) byId(`${name}-shown`).textContent = byId(name).value;
  };
  const changed = () => {
    showSliders();
    clearTimeout(timer);
    onWait();
    timer = setTimeout(onChange, 150);
  };

  function valueField(column) {
    const type = column.kind === "number" ? "number" : "text";
    const id = `values-${columns.indexOf(column)}`;
    const field = make("input", { type, step: "any", dir: "auto", autocomplete: "off", "aria-label": "Value" });
    if (column.kind === "number") field.placeholder = `${column.low} to ${column.high}`;
    else if (column.kind === "time") field.placeholder = "2025-01-31, or a number of items";
    else field.setAttribute("list", id);
    return field;
  }
  function addCondition() {
    const column = make("select", { "aria-label": "Column" }, ...columns.map(({ name }) => make("option", { text: name })));
    const operator = make("select", { "aria-label": "Operator" });
    const value = make("div", { class: "value" });
    const remove = make("button", { type: "button", class: "quiet", text: "×", "aria-label": "Remove the condition" });
    const row = make("div", { class: "condition" }, column, operator, value);
    const fill = () => {
      const chosen = columns[column.selectedIndex];
      operator.replaceChildren(...chosen.operators.map((name) => make("option", { text: name })));
      const field = valueField(chosen);
      field.addEventListener("input", changed);
      value.replaceChildren(field, remove);
      changed();
    };
    column.addEventListener("change", fill);
    operator.addEventListener("change", changed);
    remove.addEventListener("click", () => {
      row.remove();
      byId("add-condition").focus();
      changed();
    });
    // Most conditions ask for one of few values, such as a category.
    const usual = columns.findIndex(({ values = [], kind }) => kind !== "text" || (values.length > 1 && values.length < 40));
    column.selectedIndex = Math.max(usual, 0);
    byId("conditions").append(row);
    fill();
    column.focus();
  }
  function read(row) {
    const column = columns[row.querySelector("select").selectedIndex];
    const operator = row.querySelectorAll("select")[1].value;
    const text = row.querySelector("input").value.trim();
    if (!text) return null;
    const isNumber = column.kind === "number" || operator === "latest";
    if (column.kind === "flag") return [column.name, operator, text.toLowerCase() === "true"];
    return [column.name, operator, isNumber ? Number(text) : text];
  }

  for (const name of SLIDERS) byId(name).addEventListener("input", changed);
  byId("seen").addEventListener("change", changed);
  byId("beside").addEventListener("change", changed);
  byId("add-condition").addEventListener("click", addCondition);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("reset-options").addEventListener("click", () => {
    for (const name of SLIDERS) byId(name).value = DEFAULTS[name];
    byId("seen").checked = true;
    byId("beside").value = "";
    byId("conditions").replaceChildren();
    changed();
  });
  const wide = matchMedia("(min-width: 60rem)");
  const unfold = () => { byId("options").open = wide.matches; };
  wide.addEventListener("change", unfold);
  unfold();
  showSliders();

  return {
    // Tells what there is to choose from.
    offer(catalogue) {
      columns = catalogue.columns;
      const lists = columns.map((column, number) => make(
        "datalist", { id: `values-${number}` }, ...(column.values || []).map((value) => make("option", { value })),
      ));
      byId("options").append(...lists);
      const others = catalogue.versions.filter(({ model_version }) => model_version !== catalogue.model_version);
      byId("beside").append(...others.map(({ model_version, name }) => make(
        "option", { value: `version ${model_version}`, text: `version ${name} (${model_version})` },
      )));
      byId("add-condition").disabled = !columns.length;
      if (!catalogue.has_popularity) {
        byId("popularity").disabled = true;
        byId("popularity-help").textContent = "Needs an export with config.retrieval.popularity=True.";
      }
    },
    values() {
      const where = [...byId("conditions").children].map(read).filter(Boolean);
      return {
        k: Number(byId("k").value),
        popularity: Number(byId("popularity").value),
        diversity: Number(byId("diversity").value),
        seen: byId("seen").checked,
        beside: byId("beside").value,
        where,
      };
    },
  };
}
