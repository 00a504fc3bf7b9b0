// The field that finds users and items while somebody types: a combobox with a list of both.
import { ask } from "./api.js";
import { directionOf, make, titleOf } from "./view.js";

const WAIT = 120; // milliseconds after the last letter

export function startFinder(title, onUser, onItem) {
  const field = document.getElementById("find");
  const list = document.getElementById("found");
  let options = []; // [element, function] of each
  let active = -1;
  let timer = 0;
  let current = null;

  function close() {
    current?.abort();
    clearTimeout(timer);
    list.hidden = true;
    field.setAttribute("aria-expanded", "false");
    field.removeAttribute("aria-activedescendant");
    active = -1;
  }
  function mark(next) {
    if (!options.length) return;
    options[active]?.[0].setAttribute("aria-selected", "false");
    active = (next + options.length) % options.length;
    const [element] = options[active];
    element.setAttribute("aria-selected", "true");
    element.scrollIntoView({ block: "nearest" });
    field.setAttribute("aria-activedescendant", element.id);
  }
  function choose(number) {
    const [, act] = options[number];
    close();
    field.value = "";
    act();
  }
  function option(text, more, act) {
    const number = options.length;
    const element = make(
      "div",
      { role: "option", id: `found-${number}`, "aria-selected": "false", dir: directionOf(text) },
      make("span", { text }),
      more ? make("small", { text: more }) : null,
    );
    // Before the field loses its focus, which closes the list.
    element.addEventListener("pointerdown", (event) => event.preventDefault());
    element.addEventListener("click", () => choose(number));
    options.push([element, act]);
    return element;
  }
  function group(name, members) {
    if (!members.length) return [];
    const label = make("div", { class: "group", text: name, role: "presentation" });
    return [make("div", { role: "group", "aria-label": name }, label, ...members)];
  }
  function show(users, items) {
    options = [];
    active = -1;
    const people = users.map((user) => option(user.user_id, `${user.events} items`, () => onUser(user.user_id)));
    const things = items.map((item) => option(titleOf(item, title()), item.item_id, () => onItem(item)));
    const parts = [...group("Users", people), ...group("Items", things)];
    if (!parts.length) parts.push(make("div", { class: "none", text: "Nothing is called so." }));
    list.replaceChildren(...parts);
    list.hidden = false;
    field.setAttribute("aria-expanded", "true");
    field.removeAttribute("aria-activedescendant");
  }
  async function search() {
    const text = field.value.trim();
    current?.abort();
    current = new AbortController();
    try {
      const [users, items] = await Promise.all([
        ask("v1/search_users", { text, k: text ? 4 : 6 }, current.signal),
        ask("v1/search_items", { text, k: text ? 8 : 6 }, current.signal),
      ]);
      if (document.activeElement === field) show(users.users, items.items);
    } catch (error) {
      if (error.name === "AbortError") return;
      options = [];
      list.replaceChildren(make("div", { class: "none", text: error.message }));
      list.hidden = false;
    }
  }
  field.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(search, WAIT);
  });
  field.addEventListener("focus", search);
  field.addEventListener("blur", close);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (list.hidden) search();
      else mark(event.key === "ArrowDown" ? active + 1 : active < 0 ? -1 : active - 1);
    } else if (event.key === "Enter") {
      event.preventDefault();
      if (!list.hidden && options.length) choose(Math.max(active, 0));
    }
  });
}
