// The server's API, with the key that the user entered. Knows HTTP and events; knows no element of the page.

const KEY = "neurontune.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What the server refused, in its own words; `status` 0: it could not be reached. */
export class ApiError extends Error {
  constructor(message, status = 0, code = "unreachable") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export async function getJson(path) {
  return (await send(path, {})).json();
}

/**
 * Ask for an answer and yield it piece by piece: first `{level, numSafety, numUtility}`, then `{text}` for
 * each new piece, then `{finish, usage}`. Throws ApiError; an aborted `signal` throws AbortError.
 */
export async function* chat(body, level, signal) {
  const response = await send("/v1/chat/completions", {
    method: "POST",
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    headers: { "Content-Type": "application/json", "X-Safety-Level": level },
    signal,
  });
  const [numSafety, numUtility] = response.headers.get("X-Safety-Neurons").split(",").map(Number);
  yield { level: response.headers.get("X-Safety-Level"), numSafety, numUtility };
  let finish = null, usage = null, isWhole = false;
  for await (const data of eventsOf(response.body)) {
    if (data === "[DONE]") {
      isWhole = true;
      continue;
    }
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message, response.status, event.error.code);
    usage = event.usage ?? usage;
    const choice = event.choices?.[0];
    finish = choice?.finish_reason ?? finish;
    if (choice?.delta?.content) yield { text: choice.delta.content };
  }
  if (!isWhole) throw new ApiError("The stream ended before the answer did.");
  yield { finish, usage };
}

async function send(path, options) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  try {
    const { message, code } = (await response.json()).error;
    return new ApiError(message, response.status, code);
  } catch {
    return new ApiError(`The server answered with status ${response.status}.`, response.status, "unknown");
  }
}

/** The data of each server-sent event; an event may arrive in pieces, and several in one piece. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice("data: ".length);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
