// The chat: a conversation, each answer at the level that the dial shows when it is asked for.

import { answerBox, fill, sampling } from "./answer.js";
import { byId, make } from "./dom.js";

export function startConversation({ model, level, say, refused }) {
  const form = byId("chat-form"), prompt = byId("prompt"), log = byId("log");
  let messages = [], running = null;

  async function ask(content) {
    const mine = make("article", { class: "turn mine" }, make("h3", {}, "You"), make("div", { class: "text" }, content));
    const shown = answerBox("Model");
    byId("log-empty").hidden = true;
    log.append(mine, shown.box);
    log.scrollTop = log.scrollHeight;
    const following = new MutationObserver(() => (log.scrollTop = log.scrollHeight));
    following.observe(shown.text, { childList: true, characterData: true, subtree: true });
    const controller = (running = new AbortController());
    toggle(true);
    say("Answering.");
    const asked = [...messages, { role: "user", content }];
    const answer = await fill(shown, { model: model(), messages: asked, ...sampling() }, level(), controller.signal, refused);
    following.disconnect();
    log.scrollTop = log.scrollHeight;
    if (running !== controller) return; // another conversation has begun
    if (answer) messages = [...asked, { role: "assistant", content: answer }];
    // A question without an answer is no part of the conversation: it goes back to where it was written.
    else if (!prompt.value) prompt.value = content;
    running = null;
    toggle(false);
    say(answer === null ? "There is no whole answer." : "The answer is complete.");
  }

  function toggle(isRunning) {
    byId("send").disabled = isRunning;
    byId("stop").disabled = !isRunning;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const content = prompt.value.trim();
    if (!content || running) return;
    prompt.value = "";
    prompt.focus();
    ask(content);
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  byId("stop").addEventListener("click", () => {
    running?.abort();
    prompt.focus();
  });
  byId("new-chat").addEventListener("click", () => {
    running?.abort();
    running = null;
    messages = [];
    for (const turn of log.querySelectorAll(".turn")) turn.remove();
    byId("log-empty").hidden = false;
    toggle(false);
    say("A new conversation.");
    prompt.focus();
  });
}
