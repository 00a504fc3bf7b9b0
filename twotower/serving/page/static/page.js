// The page: who is recommended to, the lists, the map and the model.
import { ask, onToken, Refusal } from "./api.js";
import { startFinder } from "./finder.js";
import { modelPanels } from "./model.js";
import { startOptions } from "./options.js";
import {
  addButton, bones, card, directionOf, empty, facts, formatDay, formatNumber, formatScore, make, problem, titleButton, titleOf,
} from "./view.js";

const byId = (id) => document.getElementById(id);
const NEIGHBOURS = 12;
const MOST_EVENTS = 1000; // events of a request
const VERSION = "version "; // what a choice of a version begins with
const BESIDE = { popular: "The most popular", similar: "Like the last item", latest: "The newest" };

// `history` holds the items now, the latest first; `stored` those that the server has, and `events`
// their events, the latest last; `added` the ids of items that were added here, the latest last.
const NOBODY = { user: null, known: false, features: {}, history: [], stored: [], events: [], added: [] };
const state = { ...NOBODY, isEdited: false };
let catalogue = { title: "", columns: [], reads_history: true, users: 0, versions: [] };
let before = null; // ids of the last list of the same person -> their ranks
let pending = null;
const titles = new Map();

const nameOf = (item) => titleOf(item, catalogue.title);
const idOf = (item) => item.item_id;

function remember(items) {
  for (const item of items) titles.set(item.item_id, nameOf(item));
}

// Who is recommended to.

function showPerson() {
  const isVisitor = state.user === null;
  byId("who").replaceChildren(...(isVisitor ? ["A visitor"] : ["User ", make("bdi", { text: state.user })]));
  const said = Object.entries(state.features).map(([name, value]) => `${name} ${value}`);
  if (!isVisitor && !state.known) said.push("not known when the bundle was made");
  if (state.isEdited) said.push("with a history of your making");
  if (!state.isEdited && isVisitor) {
    said.push("Nothing is known yet. Find a user, or add items to a history and watch the list change.");
  }
  const isLost = state.isEdited && !catalogue.reads_history;
  if (isLost) said.push("this model reads no history: a known user's list changes by what is left out alone");
  byId("who-more").textContent = said.join(" · ");
  byId("restore").hidden = !state.isEdited || isVisitor;
  byId("forget").hidden = isVisitor && !state.history.length;
  byId("suggested").hidden = !isVisitor || state.history.length > 0 || !catalogue.users;
  const stored = new Set(state.stored.map(idOf));
  byId("past").hidden = !state.history.length;
  byId("past-heading").textContent = `History, the latest first (${state.history.length})`;
  byId("history").replaceChildren(...state.history.map((item, number) => pastCard(item, number, !stored.has(item.item_id))));
}

function pastCard(item, number, isAdded) {
  const meta = [item.event, item.timestamp ? formatDay(item.timestamp) : "", isAdded ? "added here" : ""];
  const label = `Remove from the history: ${nameOf(item)}`;
  return make(
    "li", { class: isAdded ? "added" : "", dir: directionOf(nameOf(item)), "data-item": item.item_id },
    titleButton(item, catalogue.title, openItem),
    make("p", { class: "meta", text: meta.filter(Boolean).join(" · ") }),
    make("button", { type: "button", class: "remove", text: "×", "aria-label": label, onclick: () => removePast(number) }),
  );
}

function setHistory(history) {
  state.history = history;
  const ids = history.map(idOf).join("\n");
  state.isEdited = ids !== state.stored.map(idOf).join("\n");
  showPerson();
  refresh();
}

function addPast(item) {
  const rest = state.history.filter((other) => other.item_id !== item.item_id);
  state.added.push(item.item_id);
  setHistory([{ item_id: item.item_id, display: item.display }, ...rest]);
  say(`Added to the history: ${nameOf(item)}`);
}

function removePast(number) {
  state.added = state.added.filter((id) => id !== state.history[number].item_id);
  setHistory(state.history.filter((_, other) => other !== number));
  const buttons = document.querySelectorAll("#history .remove");
  (buttons[Math.min(number, buttons.length - 1)] || byId("find")).focus();
}

function forget() {
  Object.assign(state, { ...NOBODY, added: [], isEdited: false });
  before = null;
  history.replaceState(null, "", location.pathname);
  showPerson();
  refresh();
}

async function openUser(user) {
  selectTab("lists");
  history.replaceState(null, "", `#user=${encodeURIComponent(user)}`);
  before = null;
  try {
    const profile = await ask("v1/user", { user_id: user });
    remember(profile.history);
    Object.assign(state, {
      user: profile.user_id, known: profile.known, features: profile.features,
      history: profile.history, stored: profile.history, events: profile.events, added: [], isEdited: false,
    });
    showPerson();
    refresh();
  } catch (refusal) {
    showProblem(refusal, () => openUser(user));
  }
}

// Lists.

function listing(options) {
  const request = { k: options.k };
  if (options.where.length) request.where = options.where;
  return request;
}

function mainRequest(options) {
  const request = { ...listing(options), exclude_seen: options.seen };
  if (options.popularity) request.popularity_weight = options.popularity;
  if (options.diversity) request.diversity = options.diversity;
  if (catalogue.reads_history) request.reasons = true;
  if (state.user !== null) request.user_id = state.user;
  if (state.isEdited) {
    const present = new Set(state.history.map(idOf));
    const removed = new Set(state.stored.map(idOf).filter((id) => !present.has(id)));
    const kept = state.events.filter((event) => !removed.has(event.item_id ?? event));
    request.history = [...kept, ...state.added].slice(-MOST_EVENTS);
  }
  return ["v1/retrieve", request];
}

function besideRequest(options) {
  const request = listing(options);
  const past = state.history.map(idOf);
  if (options.beside.startsWith(VERSION)) {
    const [path, main] = mainRequest(options);
    return [path, { ...main, model_version: options.beside.slice(VERSION.length) }];
  }
  if (options.seen) request.deny = past;
  if (options.beside !== "similar") return [`v1/${options.beside}`, request];
  if (!past.length) throw new Refusal(0, { detail: "There is no history yet.", cure: "Add an item to it." });
  return ["v1/similar_items", { ...request, item_id: past[0] }];
}

function nameOfVersion(value) {
  const chosen = catalogue.versions.find(({ model_version }) => VERSION + model_version === value);
  return `Version ${chosen ? chosen.name : value}`;
}

function listPanel(name, heading) {
  return make(
    "section", { class: "list", "aria-busy": "true", "data-list": name, "aria-labelledby": `heading-${name}` },
    make("header", {}, make("h2", { id: `heading-${name}`, text: heading }), make("p", { class: "soft about" })),
    make("div", { class: "body" }),
  );
}

// Keeps the panels that stay, so that nothing jumps while new lists are on their way.
function preparePanels(options) {
  const wanted = [["main", "Recommendations"]];
  if (options.beside) wanted.push(["beside", BESIDE[options.beside] || nameOfVersion(options.beside)]);
  const panels = wanted.map(([name, heading]) => {
    const panel = byId("lists").querySelector(`[data-list=${name}]`) || listPanel(name, heading);
    panel.querySelector("h2").textContent = heading;
    panel.setAttribute("aria-busy", "true");
    const body = panel.querySelector(".body");
    if (!body.querySelector(".card")) body.replaceChildren(make("ol", { class: "cards" }, ...bones(options.k)));
    return panel;
  });
  byId("lists").classList.toggle("two", panels.length > 1);
  const shown = [...byId("lists").children];
  // A panel that is taken out and put back loses the focus within it.
  if (shown.length !== panels.length || shown.some((panel, number) => panel !== panels[number])) {
    byId("lists").replaceChildren(...panels);
  }
  return panels;
}

// Where the focus stands in a list that is about to be replaced; null where it is elsewhere.
function placeOfFocus(body) {
  const element = document.activeElement;
  if (!body.contains(element)) return null;
  const kind = element.classList.contains("add") ? "add" : "name";
  return { kind, number: Math.max(0, [...body.querySelectorAll(`.${kind}`)].indexOf(element)) };
}

function fillPanel(panel, answer, moves, shared) {
  const { items } = answer;
  panel.setAttribute("aria-busy", "false");
  const scores = items.map((item) => item.score ?? 0);
  const least = Math.min(0, ...scores);
  const span = Math.max(...scores, 0) - least || 1;
  const cards = items.map((item, number) => card(item, {
    rank: number + 1, share: ((item.score ?? 0) - least) / span, moved: moves.get(item.item_id),
    shared: shared.has(item.item_id), column: catalogue.title, titles,
  }, openItem, addPast));
  const body = panel.querySelector(".body");
  const place = placeOfFocus(body);
  if (cards.length) body.replaceChildren(make("ol", { class: "cards" }, ...cards));
  else body.replaceChildren(empty("No item remains", answer.note || "Loosen the conditions, or show items of the history too."));
  if (place) (body.querySelectorAll(`.${place.kind}`)[place.number] || byId("results")).focus({ preventScroll: true });
  const count = `${items.length} item${items.length === 1 ? "" : "s"}`;
  const both = shared.size ? `${count}, ${shared.size} in both` : count;
  const note = cards.length ? answer.note : "";
  panel.querySelector(".about").textContent = [both, `version ${answer.model_version}`, note].filter(Boolean).join(" · ");
}

function movesOf(items) {
  const moves = new Map();
  if (before) {
    items.forEach((item, rank) => {
      const last = before.get(item.item_id);
      moves.set(item.item_id, last === undefined ? "new" : last - rank);
    });
  }
  return moves;
}

// What is on its way answers options that no longer hold.
function awaitLists() {
  pending?.abort();
  for (const panel of byId("lists").children) panel.setAttribute("aria-busy", "true");
}

async function refresh() {
  pending?.abort();
  const current = new AbortController();
  pending = current;
  const options = controls.values();
  const panels = preparePanels(options);
  const requests = [mainRequest, ...(options.beside ? [besideRequest] : [])];
  const answers = await Promise.allSettled(requests.map(async (request) => ask(...request(options), current.signal)));
  if (current.signal.aborted) return;
  const lists = answers.map(({ value }) => value?.items || []);
  lists.forEach(remember);
  const [main, beside = []] = lists.map((items) => items.map(idOf));
  const shared = new Set(main.filter((id) => beside.includes(id)));
  answers.forEach(({ value, reason }, number) => {
    const panel = panels[number];
    if (value) {
      fillPanel(panel, value, number ? new Map() : movesOf(value.items), shared);
      return;
    }
    panel.setAttribute("aria-busy", "false");
    panel.querySelector(".about").textContent = "";
    panel.querySelector(".body").replaceChildren(problem(reason, refresh));
  });
  if (answers[0].value) {
    before = new Map(main.map((id, rank) => [id, rank]));
    say(`${main.length} recommendations${state.user === null ? "" : ` for user ${state.user}`}.`);
  }
}

function say(text) {
  byId("said").textContent = text;
}

// One item and its neighbours.

const trail = []; // items that were opened on the way to the present one

async function openItem(item, isBack = false) {
  const dialog = byId("item");
  if (!dialog.open) {
    trail.length = 0;
    dialog.showModal();
  } else if (!isBack) trail.push(openItem.current);
  openItem.current = item;
  byId("item-back").hidden = !trail.length;
  const rows = make("ol", { class: "rows" }, ...bones(4));
  const heading = make("h2", { id: "item-title", text: nameOf(item), dir: "auto", tabindex: "-1" });
  const add = make("button", { type: "button", class: "strong", text: "Add to the history", onclick: () => { addPast(item); dialog.close(); } });
  const label = make("p", { class: "soft" }, "Item ", make("bdi", { text: item.item_id }));
  byId("item-body").replaceChildren(
    heading, label, facts(item, catalogue.title, 40) || make("span"), make("p", { class: "buttons" }, add),
    make("h3", { text: "Nearest neighbours" }), rows,
  );
  heading.focus();
  dialog.scrollTop = 0;
  try {
    const answer = await ask("v1/similar_items", { item_id: item.item_id, k: NEIGHBOURS });
    if (openItem.current !== item) return;
    remember(answer.items);
    rows.replaceChildren(...answer.items.map((near) => make(
      "li", { dir: directionOf(nameOf(near)), "data-item": near.item_id },
      titleButton(near, catalogue.title, (next) => openItem(next), ""),
      make("span", { class: "score", text: formatScore(near.score ?? 0), title: "Cosine" }),
      addButton(near, catalogue.title, addPast),
    )));
    if (!answer.items.length) rows.replaceWith(empty("No neighbours", "There is no other item."));
  } catch (refusal) {
    rows.replaceWith(problem(refusal, () => openItem(item, true)));
  }
}

// The map.

let isMapShown = false;

function keyOf(label, group) {
  const sign = make("canvas", { width: "28", height: "28", "aria-hidden": "true" });
  const pen = sign.getContext("2d");
  const draw = () => {
    pen.clearRect(0, 0, 28, 28);
    pen.fillStyle = groupColour(group);
    drawItemMarker(pen, group, 14, 14, 9);
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  return make("li", {}, sign, make("span", { text: label, dir: "auto" }));
}

async function showMap() {
  if (isMapShown) return;
  isMapShown = true;
  byId("map-error")?.remove();
  try {
    const map = await ask("v1/map");
    if (!map.item_ids.length || !map.count) {
      byId("map-body").replaceChildren(empty("No map", "A map needs two items."));
      return;
    }
    const sample = map.item_ids.length < map.items;
    const share = Math.round(100 * (map.shares[0] + map.shares[1]));
    byId("map-about").textContent = `Near items are recommended to the same people. ${
      sample ? `A sample: ${formatNumber(map.item_ids.length)} of ${formatNumber(map.items)} items` : `All ${formatNumber(map.items)} items`
    }, coloured by ${map.column}. A flat picture shows ${share} % of all differences.`;
    byId("map-key").replaceChildren(...map.labels.map(keyOf));
    const open = byId("map-open");
    let chosen = map.item_ids[0];
    open.hidden = false;
    open.addEventListener("click", async () => {
      const item = { item_id: chosen, display: { [catalogue.title || "id"]: titles.get(chosen) } };
      const found = await ask("v1/search_items", { text: chosen, k: 1 }).catch(() => ({ items: [] }));
      openItem(found.items[0]?.item_id === chosen ? found.items[0] : item);
    });
    map.item_ids.forEach((id, number) => titles.set(id, map.titles[number]));
    showItemMap(map, (number) => { chosen = map.item_ids[number]; });
  } catch (refusal) {
    isMapShown = false;
    byId("map-about").after(make("div", { id: "map-error" }, problem(refusal, showMap)));
  }
}

// The model.

async function showModel() {
  try {
    const [info, ready] = await Promise.all([ask("v1/info"), ask("readyz")]);
    byId("model").replaceChildren(modelPanels(info, ready));
  } catch (refusal) {
    byId("model").replaceChildren(problem(refusal, showModel));
  }
}

// Views.

const VIEWS = { lists: () => {}, map: showMap, model: showModel };

function selectTab(name, isFocused = false) {
  for (const view of Object.keys(VIEWS)) {
    const isChosen = view === name;
    const tab = byId(`tab-${view}`);
    tab.setAttribute("aria-selected", String(isChosen));
    tab.tabIndex = isChosen ? 0 : -1;
    byId(`view-${view}`).hidden = !isChosen;
    if (isChosen && isFocused) tab.focus();
  }
  document.querySelector(".skip").hidden = name !== "lists";
  VIEWS[name]();
}

function startTabs() {
  const names = Object.keys(VIEWS);
  names.forEach((name, number) => {
    const tab = byId(`tab-${name}`);
    tab.addEventListener("click", () => selectTab(name));
    tab.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1 };
      if (event.key in steps) selectTab(names.at((number + steps[event.key]) % names.length), true);
      else if (event.key === "Home") selectTab(names[0], true);
      else if (event.key === "End") selectTab(names.at(-1), true);
    });
  });
}

function startDialogs() {
  byId("item-close").addEventListener("click", () => byId("item").close());
  byId("item-back").addEventListener("click", () => openItem(trail.pop(), true));
  // A press beside the dialog closes it.
  byId("item").addEventListener("click", (event) => { if (event.target === byId("item")) byId("item").close(); });
  let asking = null;
  onToken((refusal) => {
    const dialog = byId("token");
    if (refusal) byId("token-why").textContent = refusal;
    asking ??= new Promise((use) => {
      dialog.showModal();
      byId("token-form").addEventListener("submit", (event) => {
        event.preventDefault();
        const text = byId("token-text").value;
        byId("token-text").value = "";
        asking = null;
        dialog.close();
        use(text);
      }, { once: true });
    });
    return asking;
  });
  byId("token").addEventListener("cancel", (event) => event.preventDefault());
}

function showProblem(refusal, onRetry) {
  byId("lists").replaceChildren(problem(refusal, onRetry));
}

let isBegun = false;
let healthTimer = 0;

async function watchHealth() {
  const health = byId("health");
  let state = "bad";
  let text = "Not connected";
  try {
    const { status } = await ask("readyz");
    state = status === "ok" ? "ok" : "wait";
    text = status === "ok" ? "Ready" : `Not ready: ${status}`;
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
  }
  // Said anew only when it changes, or a screen reader would repeat it.
  if (health.textContent !== text) health.textContent = text;
  health.dataset.state = state;
  if (state === "ok" && !isBegun) begin();
  else if (state === "bad" && !isBegun) showProblem(new Refusal(0, { detail: "The server does not answer." }), watchHealth);
  clearTimeout(healthTimer);
  healthTimer = setTimeout(watchHealth, state === "ok" ? 15_000 : 1_500);
}

const controls = startOptions(awaitLists, refresh);

async function begin() {
  isBegun = true;
  try {
    catalogue = await ask("v1/catalogue");
    controls.offer(catalogue);
    const { users } = await ask("v1/search_users", { text: "", k: 6 });
    byId("suggested-users").replaceChildren(...users.map((user) => make(
      "button", { type: "button", onclick: () => openUser(user.user_id) },
      make("bdi", { text: user.user_id }), " ", make("small", { text: `${user.events} items` }),
    )));
  } catch (refusal) {
    isBegun = false;
    showProblem(refusal, begin);
    return;
  }
  const user = new URLSearchParams(location.hash.slice(1)).get("user");
  if (user) openUser(user);
  else {
    showPerson();
    refresh();
  }
}

startTabs();
startDialogs();
startFinder(() => catalogue.title, openUser, (item) => openItem(item));
byId("restore").addEventListener("click", () => { before = null; state.added = []; setHistory(state.stored); });
byId("forget").addEventListener("click", forget);
preparePanels(controls.values());
watchHealth();
