// The dial: a level by its name, or a number of safety neurons. Knows levels; knows no request.

import { byId, colour, make } from "./dom.js";

/** Returns `level()`, what the dial shows, as a request names it. `changed` is called with it. */
export function startDial(changed) {
  const slider = byId("dial-number"), names = byId("dial-names");
  let level = null, known = [];

  function set(value) {
    level = value;
    const named = known.find(({ id }) => id === value);
    for (const radio of names.querySelectorAll("input")) radio.checked = radio.value === value;
    const number = named ? named.num_safety : Number(value);
    slider.value = number;
    slider.setAttribute("aria-valuetext", named ? `${number}, as in ${value}` : String(number));
    byId("dial-output").textContent = named ? value : `number ${number}`;
    changed(value);
  }

  function offer(levels, numbers, value) {
    known = levels;
    const legend = names.querySelector("legend");
    names.replaceChildren(legend, ...levels.map(row));
    slider.disabled = !numbers;
    slider.min = numbers?.min ?? 0;
    slider.max = numbers?.max ?? 0;
    byId("dial-ticks").replaceChildren(...(numbers ? levels.map((one, index) => tick(one, index, numbers)) : []));
    set(value);
  }

  function row({ id, num_safety, num_utility }) {
    return make("label", {},
      make("input", { type: "radio", name: "level", value: id, change: () => set(id) }),
      make("span", {}, id),
      make("span", { class: "counts", title: "safety and utility neurons" }, `${num_safety} + ${num_utility}`));
  }

  slider.addEventListener("input", () => set(slider.value));
  return { level: () => level, offer };
}

function tick({ num_safety }, index, { min, max }) {
  const mark = colour(make("i"), index);
  if (num_safety < min || num_safety > max) mark.hidden = true;
  mark.style.left = `${(100 * (num_safety - min)) / Math.max(1, max - min)}%`;
  return mark;
}
