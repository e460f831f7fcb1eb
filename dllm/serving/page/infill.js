// The text with masks: as it is written, as it is shown, and as it is sent.

import { counted } from "./words.js";

const MASK = "▢";
const HOLES = /(?:▢|_{3,})+/g;

// The same text with the model's own mask for each one that was written.
export function withMasks(text, token) {
  return text.replace(HOLES, (hole) => token.repeat(hole.length));
}

function chip(hole) {
  const element = document.createElement("span");
  element.className = "hole";
  element.textContent = MASK.repeat(hole.length);
  return element;
}

// The text with its holes marked, as nodes.
export function preview(text) {
  const holes = text.match(HOLES) ?? [];
  return text.split(HOLES).flatMap((words, place) => (place < holes.length ? [words, chip(holes[place])] : [words]));
}

function said(holes) {
  const masks = holes.reduce((sum, hole) => sum + hole.length, 0);
  return `${counted(masks, "mask")} in ${counted(holes.length, "hole")}`;
}

// The field to write in; `part` are its elements.
export function infillField(part) {
  function show() {
    const words = said(part.text.value.match(HOLES) ?? []);
    if (part.holes.textContent !== words) part.holes.textContent = words;  // said aloud only when it changes
    part.preview.replaceChildren(...preview(part.text.value));
  }

  function insert() {
    const masks = MASK.repeat(Math.max(1, Math.min(part.count.valueAsNumber || 1, 1024)));
    part.text.setRangeText(masks, part.text.selectionStart, part.text.selectionEnd, "end");
    part.text.focus();
    show();
  }

  part.text.addEventListener("input", show);
  part.insert.addEventListener("click", insert);
  show();
}

export function hasMasks(text) {
  return text.search(HOLES) >= 0;
}
