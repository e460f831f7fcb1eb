// Requests to the server: the models it offers, and answers as streams.

// What is wrong, in words for the reader.
export class Refusal extends Error {}

const AGAIN = {
  401: () => "The server asks for an API key; enter it in the settings.",
  429: (said, seconds) => `The server is busy: ${said} Try again${seconds ? ` in ${seconds} s` : " in a moment"}.`,
  503: (said) => `The server does not answer now: ${said} Try again in a moment.`,
};

function sentence(text) {
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const said = sentence(body?.error?.message ?? `status ${response.status}`);
  const words = AGAIN[response.status] ?? ((text) => text);
  return new Refusal(words(said, response.headers.get("Retry-After")));
}

async function ask(path, key, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached; is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

// The entry of the served model in GET /v1/models.
export async function model(key) {
  const { data } = await (await ask("v1/models", key)).json();
  return data[0];
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n/);
    rest = parts.pop();
    yield* parts;
  }
}

// The chunks of a streamed answer. EventSource cannot POST, hence by hand: `data: CHUNK` lines up to `data: [DONE]`.
export async function* stream(path, body, key, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await ask(path, key, { method: "POST", headers, body: JSON.stringify(body), signal });
  try {
    for await (const line of lines(response.body)) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice("data:".length).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refusal(sentence(chunk.error.message));
      yield chunk;
    }
  } catch (error) {
    if (error instanceof TypeError) throw new Refusal("The connection to the server was lost.");
    throw error;
  }
  throw new Refusal("The server ended the answer early.");
}
