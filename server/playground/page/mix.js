// The levels that everybody's requests were given: since the server's start, and while this page looks on.

import { getJson } from "./api.js";
import { byId, colour, make, table } from "./dom.js";

const EVERY_SECONDS = 2, WINDOW_SECONDS = 60, CUSTOM = "custom";

/** Asks again and again while the page is visible. Returns a function that asks now. */
export function startMix(names) {
  let seen = [], timer = null;

  async function look() {
    clearTimeout(timer);
    const isOver = !document.hidden && (await ask());
    if (!isOver) timer = setTimeout(look, 1000 * EVERY_SECONDS);
  }

  /** Whether there is no sense in asking again until there is another key. */
  async function ask() {
    try {
      const mix = await getJson("/v1/level-mix");
      const now = performance.now() / 1000;
      const counts = Object.fromEntries(mix.data.map(({ id, num_requests }) => [id, num_requests]));
      if (seen.some((each) => Object.keys(each.counts).some((id) => each.counts[id] > (counts[id] ?? 0)))) seen = [];
      seen = [...seen.filter(({ at }) => now - at <= WINDOW_SECONDS), { at: now, counts }];
      show(mix, counts, seen[0].counts, names());
      return false;
    } catch (error) {
      byId("mix-told").textContent = error.status === 401 ? "Needs an API key." : error.message;
      return error.status === 401;
    }
  }

  document.addEventListener("visibilitychange", look);
  return look;
}

function show(mix, counts, before, names) {
  const order = [...names, ...Object.keys(counts).filter((id) => !names.includes(id))];
  const rows = order.map((id) => ({ id, count: counts[id] ?? 0, lately: (counts[id] ?? 0) - (before[id] ?? 0) }));
  byId("mix-bar").replaceChildren(...rows.filter(({ count }) => count).map(({ id, count }) => {
    const part = colour(make("i"), indexOf(id, names));
    part.style.flex = String(count);
    return part;
  }));
  byId("mix").replaceChildren(table("Requests by the level they were given", ["Level", "Last minute", "Since start"],
    rows.map(({ id, count, lately }) => [
      [colour(make("span", { class: "swatch", "aria-hidden": "true" }), indexOf(id, names)), id === CUSTOM ? "a number" : id],
      String(lately), String(count),
    ])));
  byId("mix-told").textContent = `${mix.num_running} running, ${mix.num_waiting} waiting.`;
}

const indexOf = (id, names) => (names.includes(id) ? names.indexOf(id) : 4);
