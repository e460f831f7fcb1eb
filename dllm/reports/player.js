"use strict";

// The trace player. Its data are the changes of each step; `unpack` reconstructs complete steps.

const data = JSON.parse(document.getElementById("data").textContent);
const part = Object.fromEntries(
  "run sample step status play canvas prompt strip details counted note stage ramp colour"
    .split(" ").map((id) => [id, document.getElementById(id)]),
);
const state = { run: 0, sample: 0, step: 0, colour: "commit_step", steps: [], timer: null };

// Display of one position after one step.
function unpack(sample, mask) {
  let tokens = Array(sample.length).fill(mask);
  let since = Array(sample.length).fill(null);
  let probability = Array(sample.length).fill(null);
  return sample.steps.map((each, step) => {
    tokens = tokens.slice();
    since = since.slice();
    probability = probability.slice();
    const predicted = new Map(each.predicted.map(([place, token, share]) => [place, { token, share }]));
    for (const [place, token] of each.written) {
      const guess = predicted.get(place);
      tokens[place] = token;
      since[place] = token === mask ? null : step;
      probability[place] = guess && guess.token === token ? guess.share : null;
    }
    return { tokens, since, probability, predicted, drafted: new Map(each.drafted), computed: each.computed, nfe: each.nfe };
  });
}

function cellAt(now, place, mask) {
  const token = now.tokens[place];
  const open = token === mask;
  const guess = now.predicted.get(place);
  const draft = now.drafted.has(place) ? now.drafted.get(place) : null;
  const accepted = draft !== null && draft === token;
  const rejected = draft !== null && !accepted;
  const kind = !open ? "written" : guess ? "predicted" : "open";
  const share = open ? (guess ? guess.share : null) : now.probability[place];
  return { token, kind, guess, draft, accepted, rejected, share, since: now.since[place] };
}

function shade(ramp, share) {
  const place = Math.min(Math.max(share, 0), 1) * (ramp.length - 1);
  const low = Math.min(Math.floor(place), ramp.length - 2);
  return ramp[low].map((value, i) => Math.round(value + (ramp[low + 1][i] - value) * (place - low)));
}

function paint(element, colour) {
  const bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140;
  element.style.backgroundColor = `rgb(${colour.join(", ")})`;
  element.style.color = bright ? "#000" : "#fff";
}

function colourOf(cell) {
  const last = Math.max(1, state.steps.length - 1);
  const share = state.colour === "commit_step" ? cell.since / last : cell.share === null ? null : cell.share / 1000;
  return share === null ? [136, 136, 136] : shade(data.ramps[state.colour], share);
}

function wordOf(token) {
  return data.runs[state.run].words[token] ?? ` ${token}`;
}

function drawCell(element, cell) {
  const shown = cell.kind === "written" ? cell.token : cell.kind === "predicted" ? cell.guess.token : null;
  const text = shown === null ? "·" : wordOf(shown);
  element.className = `token ${cell.kind}${cell.accepted ? " accepted" : ""}${cell.rejected ? " rejected" : ""}`;
  element.replaceChildren(text.replaceAll("⏎", "⏎\n"));
  element.removeAttribute("style");
  if (cell.kind === "written") paint(element, colourOf(cell));
  if (cell.rejected) element.append(struck(wordOf(cell.draft)));
}

function struck(text) {
  const element = document.createElement("s");
  element.textContent = text;
  return element;
}

function describe(cell, place) {
  const share = cell.share === null ? "unknown" : `${(cell.share / 10).toFixed(1)}%`;
  const quoted = (token) => JSON.stringify(wordOf(token));
  const said = {
    written: () => `${quoted(cell.token)} (token ${cell.token}), written in step ${cell.since + 1}, confidence ${share}`,
    predicted: () => `open; predicted ${quoted(cell.guess.token)}, confidence ${share}`,
    open: () => "open; not predicted in this step",
  }[cell.kind]();
  const draft = cell.draft === null ? "" : `; draft ${quoted(cell.draft)} ${cell.accepted ? "accepted" : "rejected"}`;
  return `Position ${place + 1}: ${said}${draft}`;
}

function fill(parent, count, tag) {
  parent.replaceChildren(...Array.from({ length: count }, () => document.createElement(tag)));
}

function drawCanvas(now) {
  const mask = data.runs[state.run].mask;
  [...part.canvas.children].forEach((element, place) => drawCell(element, cellAt(now, place, mask)));
}

function drawStrip(now, prompt) {
  const columns = [...part.strip.children];
  const computed = new Set(now.computed.flatMap(([from, to]) => Array.from({ length: to - from }, (_, i) => from + i)));
  columns.forEach((element, place) => {
    element.className = `column${place < prompt ? " prompt" : ""}${computed.has(place) ? " computed" : ""}`;
  });
  part.counted.textContent = `${computed.size} of ${columns.length} columns computed in this step`
    + (computed.size < columns.length ? ", the others read from the cache" : "");
  part.strip.setAttribute("aria-label", part.counted.textContent);
}

function draw() {
  const now = state.steps[state.step];
  const sample = data.runs[state.run].samples[state.sample];
  part.step.value = state.step + 1;
  part.status.textContent = `step ${state.step + 1} of ${state.steps.length}, NFE ${now.nfe}`;
  part.step.setAttribute("aria-valuetext", part.status.textContent);
  drawCanvas(now);
  drawStrip(now, sample.prompt.length);
  tellFocused();
}

function drawRamp() {
  const [low, high] = { commit_step: ["written first", "last"], confidence: ["unsure", "sure"] }[state.colour];
  const colours = data.ramps[state.colour].map((colour) => `rgb(${colour.join(", ")})`);
  const bar = document.createElement("i");
  bar.className = "ramp";
  bar.style.backgroundImage = `linear-gradient(to right, ${colours.join(", ")})`;
  part.ramp.replaceChildren(`${low} `, bar, ` ${high}`);
}

function tell(element) {
  const place = [...part.canvas.children].indexOf(element);
  if (place >= 0) {
    part.details.textContent = describe(cellAt(state.steps[state.step], place, data.runs[state.run].mask), place);
  }
}

function tellFocused() {
  const focused = part.canvas.contains(document.activeElement) ? document.activeElement : null;
  part.details.textContent = focused ? "" : "Point at a token, or choose one with the arrow keys, to read about it.";
  if (focused) tell(focused);
}

function go(step) {
  state.step = Math.min(Math.max(step, 0), state.steps.length - 1);
  draw();
}

const moves = {
  first: () => go(0), back: () => go(state.step - 1), next: () => go(state.step + 1), last: () => go(Infinity),
};

function play(on) {
  clearInterval(state.timer);
  state.timer = on ? setInterval(advance, 350) : null;
  part.play.textContent = on ? "⏸ Pause" : "▶ Play";
  part.play.setAttribute("aria-pressed", String(on));
}

function advance() {
  moves.next();
  if (state.step === state.steps.length - 1) play(false);
}

function togglePlay() {
  if (state.timer === null && state.step === state.steps.length - 1) go(0);
  play(state.timer === null);
}

function chooseSample(number) {
  const run = data.runs[state.run];
  const sample = run.samples[number];
  state.sample = number;
  state.steps = unpack(sample, run.mask);
  part.step.max = state.steps.length;
  part.prompt.textContent = sample.prompt.map(wordOf).join("").replaceAll("⏎", "⏎\n");
  fill(part.canvas, sample.length, "span");
  [...part.canvas.children].forEach((element, place) => { element.tabIndex = place ? -1 : 0; });
  fill(part.strip, sample.prompt.length + sample.length, "i");
  go(0);
}

function chooseRun(number) {
  play(false);
  const run = data.runs[number];
  const before = data.runs[state.run].samples[state.sample]?.id;
  state.run = number;
  part.run.value = number;
  part.sample.replaceChildren(...run.samples.map((sample, place) => new Option(sample.id, place)));
  part.sample.disabled = run.samples.length === 0;
  part.stage.hidden = run.samples.length === 0;
  part.note.hidden = !run.note;
  part.note.textContent = run.note ?? "";
  if (run.samples.length === 0) return;
  // The same sample as before, so that runs can be compared.
  const same = Math.max(0, run.samples.findIndex((sample) => sample.id === before));
  part.sample.value = same;
  chooseSample(same);
}

function listRuns() {
  const groups = new Map();
  data.runs.forEach((run, number) => {
    if (!groups.has(run.group)) groups.set(run.group, Object.assign(document.createElement("optgroup"), { label: run.group }));
    groups.get(run.group).append(new Option(run.label + (run.samples.length ? "" : " (no trace here)"), number));
  });
  part.run.replaceChildren(...groups.values());
}

function moveFocus(event) {
  const turn = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  if (!turn) return;
  event.preventDefault();
  event.stopPropagation();
  const next = turn < 0 ? event.target.previousElementSibling : event.target.nextElementSibling;
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function stepByKey(event) {
  const move = { ArrowLeft: "back", ArrowRight: "next", Home: "first", End: "last" }[event.key];
  const own = event.target.matches("select, input") || event.ctrlKey || event.altKey || event.metaKey;
  if (!move || own || part.stage.hidden) return;
  event.preventDefault();
  moves[move]();
}

function listen() {
  part.run.addEventListener("change", () => chooseRun(Number(part.run.value)));
  part.sample.addEventListener("change", () => chooseSample(Number(part.sample.value)));
  part.step.addEventListener("input", () => go(part.step.value - 1));
  part.play.addEventListener("click", togglePlay);
  part.colour.addEventListener("change", (event) => { state.colour = event.target.value; drawRamp(); draw(); });
  part.canvas.addEventListener("keydown", moveFocus);
  for (const kind of ["pointerover", "focusin", "click"]) {
    part.canvas.addEventListener(kind, (event) => tell(event.target.closest(".token")));
  }
  part.canvas.addEventListener("pointerleave", tellFocused);
  for (const button of document.querySelectorAll("[data-go]")) button.addEventListener("click", moves[button.dataset.go]);
  for (const link of document.querySelectorAll("[data-run]")) {
    link.addEventListener("click", () => chooseRun(Number(link.dataset.run)));
  }
  document.getElementById("player").addEventListener("keydown", stepByKey);
}

listRuns();
listen();
drawRamp();
chooseRun(Math.max(0, data.runs.findIndex((run) => run.samples.length > 0)));
