"use strict";
// The shapes of the charts' markers, so that colour is never alone.
const ITEM_SHAPES = [
  (pen, x, y, r) => pen.arc(x, y, r, 0, 7),
  (pen, x, y, r) => pen.rect(x - r, y - r, 2 * r, 2 * r),
  (pen, x, y, r) => drawPolygon(pen, x, y, 1.3 * r, 3, -Math.PI / 2),
  (pen, x, y, r) => drawPolygon(pen, x, y, 1.3 * r, 4, 0),
  (pen, x, y, r) => drawPolygon(pen, x, y, 1.3 * r, 3, Math.PI / 2),
  (pen, x, y, r) => {
    pen.rect(x - r * 1.3, y - r * 0.4, r * 2.6, r * 0.8);
    pen.rect(x - r * 0.4, y - r * 1.3, r * 0.8, r * 2.6);
  },
  (pen, x, y, r) => drawPolygon(pen, x, y, 1.2 * r, 6, 0),
  (pen, x, y, r) => drawPolygon(pen, x, y, 1.2 * r, 5, -Math.PI / 2),
];
function drawPolygon(pen, x, y, r, corners, turn) {
  for (let corner = 0; corner < corners; corner++) {
    const angle = turn + (2 * Math.PI * corner) / corners;
    pen.lineTo(x + r * Math.cos(angle), y + r * Math.sin(angle));
  }
  pen.closePath();
}
// The colour of a group, or the variable `name` of the style sheet.
const groupColour = (group) => styleColour(`c${group % ITEM_SHAPES.length}`);
const styleColour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
function drawItemMarker(pen, group, x, y, radius) {
  pen.beginPath();
  ITEM_SHAPES[group % ITEM_SHAPES.length](pen, x, y, radius);
  pen.fill();
}

// Draws `data` into the elements map-sheet, map-canvas and so on of a page. `onChoose`, where it is
// given, is called with the number of each item that somebody chooses.
function showItemMap(data, onChoose = () => {}) {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const places = new Uint16Array(bytes(data.places).buffer); // x and y of each item, 0 to 65535
  const groups = bytes(data.groups); // number of the category of each item
  const nearest = new Uint16Array(bytes(data.nearest).buffer); // `data.count` items for each item
  const titles = data.titles;
  const sheet = document.getElementById("map-sheet");
  const canvas = document.getElementById("map-canvas");
  const pen = canvas.getContext("2d");
  const chosenText = document.getElementById("map-chosen");
  const list = document.getElementById("map-nearest");
  const search = document.getElementById("map-search");
  // Width and height of all items, in shares of the map.
  const extent = [0, 1].map((axis) => {
    let low = 65535;
    let high = 0;
    for (let at = axis; at < places.length; at += 2) {
      low = Math.min(low, places[at]);
      high = Math.max(high, places[at]);
    }
    return Math.max(high - low, 655) / 65535;
  });
  // A page that leaves the height to the map gets the one that the items fill.
  sheet.style.aspectRatio = Math.min(2, Math.max(0.8, extent[0] / extent[1]));
  const whole = () => {
    const [wide, high] = [canvas.clientWidth, canvas.clientHeight];
    const fits = Math.min(wide / extent[0], high / extent[1]) / Math.min(wide, high);
    return { x: 0.5, y: 0.5, zoom: 0.92 * (fits || 1) };
  };
  let view = whole(); // middle of what is seen, in shares of the map, and how often it is enlarged
  let isWhole = true; // until somebody moves: then a frame of another size keeps what is seen
  let chosen = -1;
  let waiting = false;

  const size = () => Math.min(canvas.clientWidth, canvas.clientHeight) * view.zoom;
  const screenX = (item) => (places[2 * item] / 65535 - view.x) * size() + canvas.clientWidth / 2;
  const screenY = (item) => (view.y - places[2 * item + 1] / 65535) * size() + canvas.clientHeight / 2;

  function draw() {
    waiting = false;
    if (isWhole) view = whole();
    const scale = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * scale);
    canvas.height = Math.round(canvas.clientHeight * scale);
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    const radius = Math.min(7, 2.2 * Math.sqrt(view.zoom));
    for (let group = data.labels.length - 1; group >= 0; group--) {
      pen.fillStyle = groupColour(group);
      for (let item = 0; item < titles.length; item++) {
        if (groups[item] !== group) continue;
        const x = screenX(item);
        const y = screenY(item);
        if (x < -9 || y < -9 || x > canvas.clientWidth + 9 || y > canvas.clientHeight + 9) continue;
        drawItemMarker(pen, group, x, y, radius);
      }
    }
    if (chosen >= 0) {
      pen.strokeStyle = styleColour("ink");
      for (const item of [chosen, ...neighbours(chosen)]) {
        pen.lineWidth = item === chosen ? 3 : 1.25;
        pen.beginPath();
        pen.arc(screenX(item), screenY(item), radius + (item === chosen ? 6 : 4), 0, 7);
        pen.stroke();
      }
    }
    sheet.dataset.view = [view.x, view.y, view.zoom].map((n) => n.toFixed(4)).join(" ");
  }
  function redraw() {
    if (!waiting) { waiting = true; requestAnimationFrame(draw); }
  }
  const neighbours = (item) => nearest.subarray(item * data.count, (item + 1) * data.count);

  function button(item) {
    const made = document.createElement("button");
    made.type = "button";
    made.dir = "auto";
    made.textContent = titles[item];
    made.addEventListener("click", () => pick(item, true));
    return made;
  }
  function choose(item, move) {
    chosen = item;
    chosenText.textContent = titles[item];
    list.replaceChildren(...Array.from(neighbours(item), (near) => {
      const row = document.createElement("li");
      row.append(button(near));
      return row;
    }));
    if (move) {
      isWhole = false;
      view.x = places[2 * item] / 65535;
      view.y = places[2 * item + 1] / 65535;
      view.zoom = Math.max(view.zoom, 4);
      sheet.focus({ preventScroll: true });
    }
    redraw();
  }
  function pick(item, move) {
    choose(item, move);
    onChoose(item);
  }
  function itemAt(x, y, reach) {
    let best = -1;
    let least = reach * reach;
    for (let item = 0; item < titles.length; item++) {
      const far = (screenX(item) - x) ** 2 + (screenY(item) - y) ** 2;
      if (far < least) { least = far; best = item; }
    }
    return best;
  }
  function enlarge(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
    const zoom = Math.min(200, Math.max(0.5, view.zoom * factor));
    const shift = (1 / view.zoom - 1 / zoom) / Math.min(canvas.clientWidth, canvas.clientHeight);
    isWhole = false;
    view.x += (x - canvas.clientWidth / 2) * shift;
    view.y -= (y - canvas.clientHeight / 2) * shift;
    view.zoom = zoom;
    redraw();
  }
  function shift(x, y) {
    isWhole = false;
    view.x -= x / size();
    view.y += y / size();
    redraw();
  }

  const KEYS = {
    ArrowLeft: () => shift(48, 0),
    ArrowRight: () => shift(-48, 0),
    ArrowUp: () => shift(0, 48),
    ArrowDown: () => shift(0, -48),
    "+": () => enlarge(1.4),
    "=": () => enlarge(1.4),
    "-": () => enlarge(1 / 1.4),
    0: () => { isWhole = true; redraw(); },
    Enter: () => {
      const item = itemAt(canvas.clientWidth / 2, canvas.clientHeight / 2, Infinity);
      if (item >= 0) pick(item, false);
    },
  };
  sheet.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  sheet.addEventListener("wheel", (event) => {
    // A page that is scrolled past the map is not caught by it.
    if (!event.ctrlKey && document.activeElement !== sheet) return;
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    enlarge(Math.exp(-event.deltaY / 400), event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });

  const fingers = new Map();
  let moved = 0;
  const spread = () => {
    const [a, b] = [...fingers.values()];
    return Math.hypot(a.x - b.x, a.y - b.y);
  };
  sheet.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    sheet.setPointerCapture(event.pointerId);
    moved = fingers.size > 1 ? 99 : 0;
  });
  sheet.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const wide = fingers.size === 2 ? spread() : 0;
    const x = event.clientX - before.x;
    const y = event.clientY - before.y;
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    moved += Math.abs(x) + Math.abs(y);
    if (fingers.size === 2) enlarge(spread() / Math.max(wide, 1));
    else shift(x, y);
  });
  const release = (event) => {
    if (!fingers.delete(event.pointerId) || event.type === "pointercancel" || moved > 5) return;
    const box = canvas.getBoundingClientRect();
    const item = itemAt(event.clientX - box.left, event.clientY - box.top, 24);
    if (item >= 0) pick(item, false);
  };
  sheet.addEventListener("pointerup", release);
  sheet.addEventListener("pointercancel", release);

  document.getElementById("map-in").addEventListener("click", () => enlarge(1.6));
  document.getElementById("map-out").addEventListener("click", () => enlarge(1 / 1.6));
  document.getElementById("map-whole").addEventListener("click", KEYS[0]);
  search.addEventListener("input", () => {
    const wanted = search.value.trim().toLowerCase();
    const found = [];
    for (let item = 0; wanted && item < titles.length && found.length < 8; item++) {
      if (titles[item].toLowerCase().includes(wanted)) found.push(item);
    }
    chosenText.textContent = wanted ? `${found.length === 8 ? "The first 8" : found.length} found` : "";
    list.replaceChildren(...found.map((item) => {
      const row = document.createElement("li");
      row.append(button(item));
      return row;
    }));
  });
  new ResizeObserver(redraw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  choose(0, false);
}
