// One answer on its way onto the page. Knows how an answer is asked for and shown; knows no conversation.

import { chat } from "./api.js";
import { byId, make } from "./dom.js";

const FINISHES = { length: ", cut at the longest answer" };

/** What the fields under "Sampling" ask for. */
export function sampling() {
  const longest = byId("max-tokens").value;
  return {
    temperature: Number(byId("temperature").value || 0),
    ...(longest && { max_tokens: Number(longest) }),
  };
}

/** An empty answer under a heading. */
export function answerBox(title) {
  const applied = make("span", { class: "applied" });
  const text = make("div", { class: "text" });
  const box = make("article", { class: "turn", "aria-busy": "true" }, make("h3", {}, title, " ", applied), text);
  return { box, applied, text, title };
}

/**
 * Stream an answer into `shown`. Returns its text, or null where it was stopped or failed: then the answer
 * says why. Busy until it ends, so that a screen reader reads it once and whole.
 */
export async function fill(shown, body, level, signal, onRefused) {
  const { box, applied, text, title } = shown;
  text.classList.add("going");
  let answer = "";
  try {
    for await (const part of chat(body, level, signal)) {
      if (part.level) applied.textContent = told(part, title);
      if (part.text) text.textContent = answer += part.text;
      if (part.usage) applied.textContent += `, ${part.usage.completion_tokens} tokens${FINISHES[part.finish] ?? ""}`;
    }
    return answer;
  } catch (error) {
    const isStopped = error.name === "AbortError";
    box.append(make("p", { class: isStopped ? "note" : "failed" }, isStopped ? "Stopped." : error.message));
    if (!isStopped) onRefused(error);
    return null;
  } finally {
    text.classList.remove("going");
    box.setAttribute("aria-busy", "false");
  }
}

function told({ level, numSafety, numUtility }, title) {
  const name = level === title || /^\d+$/.test(level) ? "" : `${level}: `;
  return `${name}${numSafety} safety and ${numUtility} utility neurons`;
}
