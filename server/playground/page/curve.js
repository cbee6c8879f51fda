// The safety-utility curve that the mask records: jailbreaks that succeed against borderline prompts refused.

import { byId, colour, make, makeSvg, percent, table } from "./dom.js";

const WIDTH = 340, HEIGHT = 250, LEFT = 40, RIGHT = 12, TOP = 10, BOTTOM = 40;
const METRICS = {
  asr: "jailbreaks that succeed", over_refusal: "borderline refused", benign_correct: "benign right",
};

/** `names` are the levels on offer, in the order of their colours; `level` is what the dial shows. */
export function showCurve({ evaluation, level }, names) {
  const isPlotted = ({ rates }) => rates.asr && rates.over_refusal;
  const levels = evaluation?.levels.filter(isPlotted) ?? [], tried = evaluation?.curve.filter(isPlotted) ?? [];
  if (!levels.length && !tried.length) {
    byId("curve").replaceChildren();
    byId("curve-told").textContent = "The mask records no evaluation of the levels that you may ask for.";
    return;
  }
  byId("curve").replaceChildren(plot(levels, tried, level, names), figures(levels));
  byId("curve-told").textContent = `Lower left is better. Rings are thresholds that were tried. Recorded in the mask${
    evaluation.prompts ? `: ${evaluation.prompts}` : ""}; the server has not measured it again.`;
}

function plot(levels, tried, level, names) {
  const all = [...levels, ...tried];
  const top = (metric) => Math.min(1, Math.ceil(10 * Math.max(0.1, ...all.map(({ rates }) => rates[metric].rate * 1.05))) / 10);
  const ends = { x: top("over_refusal"), y: top("asr") };
  const x = (share) => LEFT + (share / ends.x) * (WIDTH - LEFT - RIGHT);
  const y = (share) => HEIGHT - BOTTOM - (share / ends.y) * (HEIGHT - TOP - BOTTOM);
  const at = ({ rates }) => ({ cx: x(rates.over_refusal.rate), cy: y(rates.asr.rate) });
  const dots = levels.map((one) => colour(makeSvg("circle", { class: "named", r: 6, ...at(one) }), names.indexOf(one.id)));
  const here = all.find((one) => one.num_safety === level.num_safety && one.num_utility === level.num_utility);
  return makeSvg("svg", { class: "plot", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": spoken(levels) },
    ...axes(ends, x, y),
    ...tried.map((one) => makeSvg("circle", { class: "tried", r: 3, ...at(one) })),
    ...dots,
    ...(here ? [makeSvg("circle", { class: "chosen", r: 9.5, ...at(here) })] : []),
    ...labels(levels, at));
}

/** Names beside their dots, or below where the plot ends; moved down where two would overlap. */
function labels(levels, at) {
  const placed = [];
  return [...levels].sort((one, other) => at(one).cy - at(other).cy).map((one) => {
    const { cx, cy } = at(one), width = 6.2 * one.id.length;
    const isBeside = cx + 14 + width < WIDTH;
    const left = isBeside ? cx + 14 : Math.max(LEFT, Math.min(cx - width / 2, WIDTH - width));
    let height = cy + (isBeside ? 4 : 20);
    const overlaps = (other) => Math.abs(other.height - height) < 12 && left < other.left + other.width && other.left < left + width;
    while (placed.some(overlaps)) height += 3;
    placed.push({ left, height, width });
    return makeSvg("text", { class: "name", x: left, y: height }, one.id);
  });
}

function axes(ends, x, y) {
  const parts = [];
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    const [across, up] = [share * ends.x, share * ends.y];
    parts.push(makeSvg("line", { class: "grid", x1: x(across), x2: x(across), y1: y(0), y2: y(ends.y) }));
    parts.push(makeSvg("line", { class: "grid", x1: x(0), x2: x(ends.x), y1: y(up), y2: y(up) }));
    parts.push(makeSvg("text", { x: x(across), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, whole(across)));
    parts.push(makeSvg("text", { x: LEFT - 6, y: y(up) + 4, "text-anchor": "end" }, whole(up)));
  }
  parts.push(makeSvg("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, "borderline prompts refused, %"));
  const middle = (TOP + HEIGHT - BOTTOM) / 2;
  parts.push(makeSvg("text", { x: 9, y: middle, "text-anchor": "middle", transform: `rotate(-90 9 ${middle})` }, "jailbreaks that succeed, %"));
  return parts;
}

const whole = (share) => String(Math.round(1000 * share) / 10);

const spoken = (levels) => `Levels by borderline prompts refused and jailbreaks that succeed. ${levels.map(
  ({ id, rates }) => `${id}: ${percent(rates.over_refusal.rate)} refused, ${percent(rates.asr.rate)} succeed`).join("; ")}.`;

function figures(levels) {
  const rows = levels.map(({ id, rates }) => [id, ...Object.keys(METRICS).map((name) => (rates[name] ? percent(rates[name].rate) : "not recorded"))]);
  return make("details", { class: "figures" }, make("summary", {}, "As a table"),
    table("Recorded rates of each level", ["Level", ...Object.values(METRICS)], rows));
}
