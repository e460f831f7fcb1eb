// The page: a text goes to the server under one setting or two, and the answers are shown as they are decoded.

import { Refusal, model, stream } from "./api.js";
import { answerView, colours } from "./answer.js";
import { drawRamp } from "./canvas.js";
import { Conversation } from "./conversation.js";
import { hasMasks, infillField, preview, withMasks } from "./infill.js";
import ramps from "./ramps.js";
import { settingsPanel, title } from "./settings.js";
import { counted } from "./words.js";

const part = Object.fromEntries(
  [...document.querySelectorAll("[id]")].map((element) => [element.id.replace(/-(\w)/g, (_, c) => c.toUpperCase()), element]),
);
const state = { served: null, panels: [], views: [], conversation: new Conversation(), running: null };
const fields = { chat: part.prompt, infill: part.text };

const mode = () => part.mode.querySelector(":checked").value;
const compared = () => state.panels.slice(0, part.compare.checked ? 2 : 1);

function complain(message) {
  part.complaint.textContent = message;
}

// --- the model and its settings -----------------------------------------------------------------

async function load() {
  part.trouble.textContent = "";
  try {
    const entry = await model(part.key.value);
    offer(entry.id, entry.dllm);
  } catch (error) {
    part.about.textContent = "";
    part.trouble.textContent = error.message;
    if (state.served === null) part.trouble.append(again());
  }
}

function again() {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: "Try again" });
  button.addEventListener("click", load);
  return button;
}

function offer(id, served) {
  state.served = { id, ...served };
  state.panels = ["A", "B"].map((letter) => settingsPanel(letter, served));
  part.panels.replaceChildren(...state.panels.map((panel) => panel.element));
  if (matchMedia("(max-width: 56rem)").matches) state.panels.forEach((panel) => { panel.element.open = false; });
  part.about.textContent = `${id}, cache ${served.cache}, texts of up to ${served.max_length} tokens, ${served.slots} at once`;
  part.chatName.textContent = served.chat ? "Chat" : "Complete";
  part.mode.querySelector("[value=infill]").disabled = served.mask_token === null;
  document.title = `${id} – dllm`;
  part.send.disabled = false;
  suit();
}

// Show what the mode and the comparison need.
function suit() {
  const infill = mode() === "infill";
  part.infillInput.hidden = part.infillLog.hidden = !infill;
  part.chatInput.hidden = part.chatLog.hidden = part.promptHint.hidden = infill;
  part.composer.classList.toggle("stays", !infill);
  part.panels.classList.toggle("two", part.compare.checked);
  state.panels.forEach((panel, place) => {
    panel.suit(mode());
    panel.element.hidden = place >= compared().length;
  });
  complain("");
}

// --- requests -------------------------------------------------------------------------------------

function request(side, text, settings) {
  const { id, chat, mask_token } = state.served;
  const own = { model: id, stream: true, ...settings, dllm: { events: "steps", ...settings.dllm } };
  if (mode() === "infill") {
    return ["v1/completions", { ...own, prompt: withMasks(text, mask_token), dllm: { ...own.dllm, infill: true } }];
  }
  if (!chat) return ["v1/completions", { ...own, prompt: text }];
  return ["v1/chat/completions", { ...own, messages: state.conversation.messages(side, text) }];
}

async function receive(view, [path, body], signal) {
  try {
    let figures = null;
    for await (const chunk of stream(path, body, part.key.value, signal)) figures = view.take(chunk) ?? figures;
    if (!figures) throw new Refusal("The server ended the answer early.");
    view.finish(figures, body.dllm.infill);
    return `${counted(figures.tokens, "token")} in ${counted(figures.nfe, "forward")}`;
  } catch (error) {
    if (error.name === "AbortError") {
      view.stop();
      return "stopped";
    }
    view.fail(error.message);
    return "failed";
  }
}

function busy(controller) {
  state.running = controller;
  const [on, off] = controller ? [part.stop, part.send] : [part.send, part.stop];
  on.disabled = false;
  if (document.activeElement === off) on.focus();  // a button that is disabled would lose the focus
  off.disabled = true;
}

function ask(text) {
  const settings = compared().map((panel) => panel.read(mode()));
  const named = settings.map((each) => title(each, state.served.sampler));
  const titles = named.map((each, side) => (named.length > 1 ? `${"AB"[side]}: ${each}` : each));
  const requests = settings.map((each, side) => request(side, text, each));
  const views = titles.map((each) => answerView(each, state.served.eos_tokens ?? []));
  show(text, views);
  if (mode() === "chat") state.conversation.add(text, views);
  state.views.push(...views);
  return { titles, views, requests };
}

function show(text, views) {
  const turn = part.turnTemplate.content.firstElementChild.cloneNode(true);
  turn.querySelector(".asked").replaceChildren(...(mode() === "infill" ? preview(text) : [text]));
  turn.querySelector(".answers").append(...views.map((view) => view.element));
  (mode() === "infill" ? part.infillLog : part.chatLog).append(turn);
  turn.scrollIntoView({ block: "start" });
}

// Said aloud once, with the answers, which those who see them read elsewhere.
function tell(ends, texts) {
  part.status.replaceChildren(...ends.flatMap((end, side) => {
    const answer = Object.assign(document.createElement("span"), { className: "spoken", textContent: texts[side] });
    return [`${end} `, answer, " "];
  }));
}

async function send() {
  const field = fields[mode()];
  const text = field.value;
  if (state.running || part.send.disabled) return;
  complain("");
  try {
    if (!text.trim()) throw new Error("Write a text first.");
    if (mode() === "infill" && !hasMasks(text)) throw new Error("Put at least one mask into the text.");
    const { titles, views, requests } = ask(text);
    const controller = new AbortController();
    busy(controller);
    if (mode() === "chat") field.value = "";
    part.status.textContent = "Decoding…";
    const ends = await Promise.all(requests.map((each, side) => receive(views[side], each, controller.signal)));
    tell(ends.map((end, side) => `${titles[side]}: ${end}.`), views.map((view) => view.text));
  } catch (error) {
    complain(error.message);
  } finally {
    busy(null);
  }
}

function stop() {
  state.running?.abort();
  fields[mode()].focus();
}

function clear() {
  state.running?.abort();
  state.conversation = new Conversation();
  state.views = [];
  part.chatLog.replaceChildren();
  part.infillLog.replaceChildren();
  part.status.textContent = "";
  fields[mode()].focus();
}

// --- what the reader does ---------------------------------------------------------------------------

function sendByKey(event) {
  if (event.key !== "Enter" || event.isComposing || event.shiftKey) return;
  if (mode() === "infill" && !event.ctrlKey && !event.metaKey) return;
  event.preventDefault();
  send();
}

part.composer.addEventListener("submit", (event) => { event.preventDefault(); send(); });
part.composer.addEventListener("keydown", (event) => { if (event.target.matches("textarea")) sendByKey(event); });
part.stop.addEventListener("click", stop);
part.clear.addEventListener("click", clear);
part.mode.addEventListener("change", suit);
part.compare.addEventListener("change", suit);
part.key.value = sessionStorage.getItem("key") ?? "";
part.key.addEventListener("change", () => {
  sessionStorage.setItem("key", part.key.value);
  if (!state.served) load();
});
part.colour.addEventListener("change", (event) => {
  colours.meaning = event.target.value;
  drawRamp(part.ramp, ramps, colours.meaning);
  for (const view of state.views) view.recolour();
});
drawRamp(part.ramp, ramps, colours.meaning);
infillField(part);
load();
