// The same prompt at several levels side by side, all of them at once.

import { answerBox, fill, sampling } from "./answer.js";
import { byId, colour, make } from "./dom.js";

export function startComparing({ model, say, refused }) {
  let running = null;

  byId("compare-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const content = byId("compare-prompt").value.trim();
    const levels = chosen();
    if (!content || running) return;
    if (!levels.length) return say("Choose at least one level.");
    const controller = (running = new AbortController());
    toggle(true);
    say(`Answering at ${levels.length} levels.`);
    const shown = levels.map(({ name, index }) => ({ name, ...answerBox(name), index }));
    byId("columns").replaceChildren(...shown.map(({ box, index }) => colour(box, index)));
    const body = { model: model(), messages: [{ role: "user", content }], ...sampling() };
    const answers = await Promise.all(shown.map((one) => fill(one, body, one.name, controller.signal, refused)));
    running = null;
    toggle(false);
    const whole = answers.filter((each) => each !== null);
    say(`${whole.length} of ${answers.length} answers are complete, ${new Set(whole).size} of them different.`);
  });
  byId("compare-stop").addEventListener("click", () => running?.abort());

  function toggle(isRunning) {
    byId("compare-send").disabled = isRunning;
    byId("compare-stop").disabled = !isRunning;
  }
}

/** Offer these levels, and one more as a number. */
export function offerLevels(levels, numbers) {
  const boxes = levels.map(({ id }, index) => make("label", {},
    make("input", { type: "checkbox", value: id, "data-index": index, checked: true }), id));
  if (numbers) {
    boxes.push(make("label", {}, "and the number", make("input", {
      type: "number", id: "compare-number", min: numbers.min, max: numbers.max, step: 1, placeholder: "none",
    })));
  }
  byId("compare-levels").replaceChildren(...boxes);
}

function chosen() {
  const boxes = byId("compare-levels").querySelectorAll("input:checked");
  const named = [...boxes].map((box) => ({ name: box.value, index: Number(box.dataset.index) }));
  const number = byId("compare-number")?.value;
  return number ? [...named, { name: String(Number(number)), index: 4 }] : named;
}
