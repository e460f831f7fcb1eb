// The trace player, in one module with canvas.js. Its data are the changes of each step; `unpack` reconstructs complete steps.

const data = JSON.parse(document.getElementById("data").textContent);
const part = Object.fromEntries(
  "player run sample canvas prompt strip details counted note stage ramp colour"
    .split(" ").map((id) => [id, document.getElementById(id)]),
);
const state = { run: 0, sample: 0, colour: "commit_step", steps: [] };
const steps = stepper(part.stage, draw);

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

function wordOf(token) {
  return data.runs[state.run].words[token] ?? ` ${token}`;
}

function cellAt(now, place) {
  const open = now.tokens[place] === data.runs[state.run].mask;
  const guess = now.predicted.get(place);
  const kind = !open ? "written" : guess ? "predicted" : "open";
  const token = { written: now.tokens[place], predicted: guess?.token, open: null }[kind];
  const share = open ? guess?.share : now.probability[place];
  const draft = now.drafted.get(place);
  const verdict = draft === undefined ? null : draft === now.tokens[place] ? "accepted" : "rejected";
  return {
    kind,
    marks: verdict ? [verdict] : [],
    text: token === null ? null : wordOf(token),
    token,
    since: now.since[place],
    share: share == null ? null : share / 1000,
    struck: verdict === "rejected" ? wordOf(draft) : null,
    notes: verdict ? [`draft ${JSON.stringify(wordOf(draft))} ${verdict}`] : [],
  };
}

function drawCanvas(now) {
  [...part.canvas.children].forEach((element, place) => {
    const cell = cellAt(now, place);
    const colour = cell.kind === "written" ? colourOf(cell, data.ramps, state.colour, state.steps.length - 1) : null;
    drawCell(element, cell, place, colour);
  });
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

function draw(step) {
  const now = state.steps[step];
  drawCanvas(now);
  drawStrip(now, data.runs[state.run].samples[state.sample].prompt.length);
  tellFocused();
  return `step ${step + 1} of ${state.steps.length}, NFE ${now.nfe}`;
}

function tell(element) {
  const place = [...part.canvas.children].indexOf(element);
  if (place >= 0) part.details.textContent = describe(cellAt(state.steps[steps.at], place), place);
}

function tellFocused() {
  const focused = part.canvas.contains(document.activeElement) ? document.activeElement : null;
  part.details.textContent = focused ? "" : "Point at a token, or choose one with the arrow keys, to read about it.";
  if (focused) tell(focused);
}

function chooseSample(number) {
  const run = data.runs[state.run];
  const sample = run.samples[number];
  state.sample = number;
  state.steps = unpack(sample, run.mask);
  part.prompt.textContent = sample.prompt.map(wordOf).join("").replaceAll("⏎", "⏎\n");
  layOut(part.canvas, sample.length);
  fill(part.strip, sample.prompt.length + sample.length, "i");
  steps.start(sample.steps.length);
}

function chooseRun(number) {
  steps.stop();
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

function listen() {
  part.run.addEventListener("change", () => chooseRun(Number(part.run.value)));
  part.sample.addEventListener("change", () => chooseSample(Number(part.sample.value)));
  part.colour.addEventListener("change", (event) => {
    state.colour = event.target.value;
    drawRamp(part.ramp, data.ramps, state.colour);
    if (!part.stage.hidden) steps.redraw();
  });
  part.canvas.addEventListener("keydown", moveFocus);
  for (const kind of ["pointerover", "focusin", "click"]) {
    part.canvas.addEventListener(kind, (event) => tell(event.target.closest(".token")));
  }
  part.canvas.addEventListener("pointerleave", tellFocused);
  for (const link of document.querySelectorAll("[data-run]")) {
    link.addEventListener("click", () => chooseRun(Number(link.dataset.run)));
  }
  part.player.addEventListener("keydown", (event) => { if (!part.stage.hidden) steps.key(event); });
}

listRuns();
listen();
drawRamp(part.ramp, data.ramps, state.colour);
chooseRun(Math.max(0, data.runs.findIndex((run) => run.samples.length > 0)));
