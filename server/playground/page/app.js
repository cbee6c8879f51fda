// The one place where the page's parts are joined: what is served, the key, the dial and what it changes.

import { getJson, key } from "./api.js";
import { offerLevels, startComparing } from "./compare.js";
import { startConversation } from "./conversation.js";
import { showCurve } from "./curve.js";
import { startDial } from "./dial.js";
import { byId, make } from "./dom.js";
import { showLayers } from "./layers.js";
import { startMix } from "./mix.js";
import { startTabs } from "./tabs.js";

let model = "", names = [], numShown = 0;

const say = (text) => (byId("status").textContent = text);
const dial = startDial((level) => showMask(level));
const look = startMix(() => names);

/** Say what went wrong; where a key is missing or wrong, ask for one. */
function refused(error) {
  byId("problem").textContent = error.message;
  if (error.status === 401) showKeyForm(true);
}

function showKeyForm(isShown) {
  byId("key-form").hidden = !isShown;
  byId("key-button").setAttribute("aria-expanded", isShown);
  if (isShown) byId("key").focus();
}

/** Ask what there is for this key. */
async function load() {
  try {
    const [levels, models] = await Promise.all([getJson("/v1/safety-levels"), getJson("/v1/models")]);
    const mask = await getJson("/v1/mask");
    byId("problem").textContent = "";
    model = models.data[0]?.id ?? "";
    names = levels.data.map(({ id }) => id);
    byId("served").replaceChildren(...(model ? [make("strong", {}, model), ", mask "] : ["No model for this key; mask "]),
      make("code", {}, levels.mask.slice(0, 12)), levels.floor ? `, your floor is ${levels.floor}` : "");
    offerLevels(levels.data, mask.numbers);
    dial.offer(levels.data, mask.numbers, levels.default);
    return true;
  } catch (error) {
    byId("served").textContent = "Nothing is known of the server yet.";
    refused(error);
    return false;
  }
}

async function showMask(level) {
  const turn = ++numShown;
  try {
    const mask = await getJson(`/v1/mask?safety_level=${encodeURIComponent(level)}`);
    if (turn !== numShown) return; // the dial has moved on
    const { num_safety, num_utility } = mask.level;
    byId("dial-told").textContent = `${num_safety} safety and ${num_utility} utility neurons are active.`;
    showLayers(mask);
    showCurve(mask, names);
  } catch (error) {
    if (turn === numShown) refused(error);
  }
}

byId("key-button").addEventListener("click", () => showKeyForm(byId("key-form").hidden));
byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const value = byId("key").value.trim();
  if (!/^[\x21-\x7e]*$/.test(value)) return refused(new Error("An API key is visible ASCII characters without spaces."));
  key.set(value);
  if (!(await load())) return;
  byId("key").value = "";
  showKeyForm(false);
  byId("key-button").focus();
  say("The key is in use.");
  look();
});
byId("key-forget").addEventListener("click", () => {
  key.set("");
  byId("key").value = "";
  say("The key is forgotten.");
  load();
});

startTabs(document.querySelector("[role=tablist]"));
startConversation({ model: () => model, level: dial.level, say, refused });
startComparing({ model: () => model, say, refused });
load().then(look);
