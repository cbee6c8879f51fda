// The map: how many neurons of each layer the mask has, and how many are active at a level.

import { byId, make, table } from "./dom.js";

const KINDS = ["safety", "utility"];

export function showLayers({ level, neurons }) {
  if (!neurons) {
    byId("layers").replaceChildren();
    byId("layers-told").textContent = "This server's engine has no mask to show.";
    return;
  }
  const most = Math.max(1, ...KINDS.flatMap((kind) => neurons[kind].per_layer));
  const rows = neurons.safety.per_layer.map((_, layer) => [
    String(layer), ...KINDS.map((kind) => cell(kind, neurons[kind], layer, most)),
  ]);
  const shown = table(`Active neurons of each layer at ${level.id}`, ["Layer", "Safety", "Utility"], rows);
  shown.classList.add("layers");
  byId("layers").replaceChildren(shown);
  byId("layers-told").textContent = KINDS.map((kind) => told(kind, neurons[kind])).join(" ");
}

function cell(kind, set, layer, most) {
  const active = set.active_per_layer[layer], all = set.per_layer[layer];
  return make("div", { class: `cell ${kind}` },
    make("span", { class: "track", "aria-hidden": "true" }, bar(all, most), bar(active, most)),
    make("span", {}, `${active} of ${all}`));
}

function bar(count, most) {
  const made = make("i");
  made.style.width = `${(100 * count) / most}%`;
  return made;
}

function told(kind, { factors }) {
  if (!factors) return `There are no ${kind} neurons.`;
  return `Active ${kind} neurons are multiplied by ${factors.min.toFixed(2)} to ${factors.max.toFixed(2)}.`;
}
