// One answer: its canvas, which fills while it is decoded and can be gone through afterwards, and its figures.

import { colourOf, describe, drawCell, layOut, moveFocus, stepper } from "./canvas.js";
import { begin, follow } from "./frames.js";
import ramps from "./ramps.js";
import { counted, legible } from "./words.js";

const HINT = "Point at a token, or choose one with the arrow keys, to read about it.";
// Meaning of the colours, on the whole page.
export const colours = { meaning: "commit_step" };

function figures(told, firstText) {
  return [
    `NFE ${told.nfe}`,
    counted(told.tokens, "token"),
    `${told.tokens_per_forward.toFixed(2)} tokens per forward`,
    `${told.tokens_per_second.toFixed(1)} tokens/s`,
    firstText === null ? null : `first text after ${firstText.toFixed(2)} s`,
    `sampler ${told.sampler}`,
    `cache ${told.cache}`,
  ].filter((each) => each !== null);
}

// The view of an answer under a title; `ends` are the tokens that end a text.
export function answerView(title, ends) {
  const element = document.getElementById("answer-template").content.firstElementChild.cloneNode(true);
  const part = Object.fromEntries(
    ["canvas", "details", "figures", "problem", "stepper", "text"].map((name) => [name, element.querySelector(`.${name}`)]),
  );
  const steps = stepper(part.stepper, draw);
  const show = (piece) => legible(piece, ends);
  const started = performance.now();
  const frames = [];  // the canvas after each step
  const forwards = [];  // so far, after each step
  let first = [];  // the canvas before them
  let text = "";
  let firstText = null;
  let end = Infinity;  // position of the end of the text
  const drawn = [];
  let said = [];
  let pending = null;

  const shown = () => (part.stepper.hidden ? frames.at(-1) ?? first : frames[steps.at]);

  // Positions after the end are marked from the step in which the end is known.
  function cellAt(cells, place) {
    const cell = cells[place];
    if (place < end || cells[end - 1]?.kind !== "written" || cell.kind === "filled") return cell;
    return { ...cell, marks: [...cell.marks, "beyond"], notes: [...cell.notes, "after the end of the text"] };
  }

  function drawCells(cells) {
    const elements = part.canvas.children;
    cells.forEach((each, place) => {
      const cell = cellAt(cells, place);
      const colour = each.kind === "written" ? colourOf(each, ramps, colours.meaning, frames.length - 1) : null;
      const look = `${colour} ${cell.marks}`;
      if (drawn[place]?.cell === each && drawn[place].look === look) return;
      drawn[place] = { cell: each, look };
      drawCell(elements[place], cell, place, colour);
    });
  }

  function draw(step) {
    drawCells(frames[step]);
    tellFocused();
    return `step ${step + 1} of ${frames.length}, NFE ${forwards[step]}`;
  }

  // At most once for each image of the screen.
  function drawSoon() {
    pending ??= requestAnimationFrame(() => { pending = null; drawCells(shown()); });
  }

  function tell(target) {
    const place = [...part.canvas.children].indexOf(target);
    if (place >= 0) part.details.textContent = describe(cellAt(shown(), place), place);
  }

  function tellFocused() {
    part.details.textContent = HINT;
    if (part.canvas.contains(document.activeElement)) tell(document.activeElement);
  }

  function say(words) {
    said = words;
    part.figures.replaceChildren(...words.flatMap((each) => {
      const span = document.createElement("span");
      span.textContent = each;
      return [span, " "];
    }));
  }

  // From here on the steps can be gone through.
  function settle() {
    cancelAnimationFrame(pending);
    element.removeAttribute("aria-busy");
    if (frames.length === 0) return;
    part.stepper.hidden = false;
    steps.start(frames.length, frames.length - 1);
  }

  element.querySelector("h3").textContent = title;
  element.setAttribute("aria-label", title);
  element.setAttribute("aria-busy", "true");
  part.canvas.setAttribute("aria-label", `Canvas of ${title}; arrow keys go from token to token`);
  part.canvas.addEventListener("keydown", moveFocus);
  for (const kind of ["pointerover", "focusin", "click"]) {
    part.canvas.addEventListener(kind, (event) => tell(event.target.closest(".token")));
  }
  part.canvas.addEventListener("pointerleave", tellFocused);
  element.addEventListener("keydown", (event) => { if (!part.stepper.hidden) steps.key(event); });

  return {
    element,
    get text() { return text; },
    recolour() { if (first.length) drawCells(shown()); },

    // What a chunk of the stream tells.
    take(chunk) {
      const told = chunk.dllm ?? {};
      const choice = chunk.choices?.[0];
      const delta = choice?.delta?.content ?? choice?.text ?? "";
      if (told.begin) {
        first = begin(told.begin, show);
        layOut(part.canvas, first.length);
      }
      if (told.committed) {
        frames.push(follow(frames.at(-1) ?? first, told, frames.length, show));
        forwards.push(told.nfe);
        say([`NFE ${told.nfe}`, `${told.masked} masked`]);
      }
      if (delta) {
        firstText ??= (performance.now() - started) / 1000;
        text += delta;
        part.text.textContent = text;
      }
      // A policy that revises may have changed what was final: then the whole text comes at the end.
      if (told.text !== undefined) text = part.text.textContent = told.text;
      if (first.length) drawSoon();
      return choice?.finish_reason ? { ...told, nfe: told.nfe[0] } : null;
    },

    // The answer is complete; `told` are its figures.
    finish(told, infill) {
      if (!infill && told.tokens < first.length) end = told.tokens;
      say(figures(told, firstText));
      settle();
    },

    fail(message) {
      part.problem.textContent = message;
      settle();
    },

    stop() {
      say([...said, "stopped"]);
      settle();
    },
  };
}
