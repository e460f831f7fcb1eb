// Drawing of a canvas and going through its steps: shared by the trace player of a report and the page of the server.
//
// A cell is what one position shows after one step:
//   kind    "written", "predicted", "open", "given" or "filled"
//   marks   further classes, such as "accepted" or "revoked"
//   text    the token's text, of the prediction at an open position; null where there is none
//   token   its number, or null
//   since   step that wrote it, from 0; null at open positions
//   share   its confidence, from 0 to 1; null if unknown
//   struck  text shown struck through after it, or null
//   notes   what else there is to say about it

const UNKNOWN = [136, 136, 136];

// Colour of a value from 0 to 1.
export function shade(ramp, share) {
  const place = Math.min(Math.max(share, 0), 1) * (ramp.length - 1);
  const low = Math.min(Math.floor(place), ramp.length - 2);
  return ramp[low].map((value, i) => Math.round(value + (ramp[low + 1][i] - value) * (place - low)));
}

// Relative luminance of WCAG 2.
function luminance(colour) {
  const [red, green, blue] = colour.map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

// Black or white on a colour, whichever has more contrast: at least 4.5 to 1.
function paint(element, colour) {
  element.style.backgroundColor = `rgb(${colour.join(", ")})`;
  element.style.color = luminance(colour) > 0.179 ? "#000" : "#fff";
}

// Colour of a written cell; `meaning` names a ramp, `last` is the last step.
export function colourOf(cell, ramps, meaning, last) {
  const share = meaning === "commit_step" ? cell.since / Math.max(1, last) : cell.share;
  return share === null ? UNKNOWN : shade(ramps[meaning], share);
}

function struckThrough(text) {
  const element = document.createElement("s");
  element.textContent = text;
  return element;
}

// `colour` is that of a written cell, null at others.
export function drawCell(element, cell, place, colour) {
  element.className = ["token", cell.kind, ...cell.marks].join(" ");
  element.replaceChildren((cell.text ?? "·").replaceAll("⏎", "⏎\n"));
  element.removeAttribute("style");
  element.setAttribute("aria-label", describe(cell, place));
  if (colour) paint(element, colour);
  if (cell.struck !== null) element.append(struckThrough(cell.struck));
}

// What a reader is told about a position.
export function describe(cell, place) {
  const share = cell.share === null ? "unknown" : `${(100 * cell.share).toFixed(1)}%`;
  const token = JSON.stringify(cell.text) + (cell.token === null ? "" : ` (token ${cell.token})`);
  const said = {
    written: `${token}, written in step ${cell.since + 1}, confidence ${share}`,
    predicted: `open; predicted ${token}, confidence ${share}`,
    open: "open; not predicted in this step",
    given: `${token}, given`,
    filled: "after the end of the text, not decoded",
  }[cell.kind];
  return [`Position ${place + 1}: ${said}`, ...cell.notes].join("; ");
}

export function fill(parent, count, tag) {
  parent.replaceChildren(...Array.from({ length: count }, () => document.createElement(tag)));
}

// The positions of a canvas as elements, one of which Tab reaches and arrow keys leave.
export function layOut(canvas, count) {
  fill(canvas, count, "span");
  [...canvas.children].forEach((element, place) => {
    element.tabIndex = place ? -1 : 0;
    element.setAttribute("role", "img");
    element.setAttribute("aria-roledescription", "token");
  });
}

// Arrow keys go from token to token.
export function moveFocus(event) {
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

// The legend of a ramp.
export function drawRamp(element, ramps, meaning) {
  const [low, high] = { commit_step: ["written first", "last"], confidence: ["unsure", "sure"] }[meaning];
  const colours = ramps[meaning].map((colour) => `rgb(${colour.join(", ")})`);
  const bar = document.createElement("i");
  bar.className = "ramp";
  bar.style.backgroundImage = `linear-gradient(to right, ${colours.join(", ")})`;
  element.replaceChildren(`${low} `, bar, ` ${high}`);
}

// Slider, buttons and play of `root`; `draw(step)` shows a step and returns what is said of it.
export function stepper(root, draw) {
  const slider = root.querySelector("input[type=range]");
  const toggle = root.querySelector(".play");
  const said = root.querySelector("output");
  let [at, last, timer] = [0, 0, null];

  // The slider tells its own value; while it plays, every step would be read out.
  function go(step, aloud = false) {
    said.setAttribute("aria-live", aloud ? "polite" : "off");
    at = Math.min(Math.max(step, 0), last);
    slider.value = at + 1;
    said.textContent = draw(at);
    slider.setAttribute("aria-valuetext", said.textContent);
  }

  function play(on) {
    clearInterval(timer);
    timer = on ? setInterval(advance, 350) : null;
    toggle.textContent = on ? "⏸ Pause" : "▶ Play";
    toggle.setAttribute("aria-label", on ? "Pause" : "Play");
  }

  function advance() {
    go(at + 1, at + 1 === last);
    if (at === last) play(false);
  }

  function start(count, step = 0) {
    play(false);
    last = count - 1;
    slider.max = count;
    go(step);
  }

  const targets = { first: () => 0, back: () => at - 1, next: () => at + 1, last: () => last };
  const moves = Object.fromEntries(Object.entries(targets).map(([name, target]) => [name, () => go(target(), true)]));
  slider.addEventListener("input", () => go(slider.value - 1));
  toggle.addEventListener("click", () => {
    if (timer === null && at === last) go(0);
    play(timer === null);
  });
  for (const button of root.querySelectorAll("[data-go]")) button.addEventListener("click", moves[button.dataset.go]);

  // Arrow keys, Home and End wherever the focus is, except where they mean something else.
  function key(event) {
    const move = { ArrowLeft: "back", ArrowRight: "next", Home: "first", End: "last" }[event.key];
    const own = event.target.matches("select, input, textarea") || event.ctrlKey || event.altKey || event.metaKey;
    if (!move || own) return;
    event.preventDefault();
    moves[move]();
  }

  return { start, go, key, stop: () => play(false), redraw: () => go(at), get at() { return at; } };
}
