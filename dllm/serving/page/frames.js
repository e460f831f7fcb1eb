// The canvas after each step, from the events of a stream. A canvas is an array of cells (see canvas.js) and is never
// changed: each step gives a new one, which keeps the cells that stay as they are.

const OPEN = {
  kind: "open", marks: [], text: null, token: null, since: null, share: null, struck: null, notes: [],
};

// Before the first step; `given` are the tokens between the masks of an infilled text. `show` makes a text of a token's.
export function begin({ length, given }, show) {
  const cells = Array(length).fill(OPEN);
  for (const [place, piece] of given) cells[place] = { ...OPEN, kind: "given", text: show(piece) };
  return cells;
}

function wasThere(cell, step) {
  return `was ${JSON.stringify(cell.text)} until step ${step + 1}`;
}

// What stays of a cell that a step does not change: guesses last one step; what was revoked is shown until the position
// is written again, what was replaced for one step.
function aged(cell) {
  if (cell.kind === "predicted") return { ...cell, kind: "open", text: null, share: null };
  return cell.kind === "written" && cell.struck !== null ? { ...cell, struck: null } : cell;
}

function revoked(cell, step) {
  return { ...OPEN, marks: ["revoked"], struck: cell.text, notes: [...cell.notes, wasThere(cell, step)] };
}

function written(cell, text, share, step) {
  const replaced = cell.kind === "written" && cell.text !== text;
  const notes = replaced ? [...cell.notes, wasThere(cell, step)] : cell.notes;
  const struck = replaced ? cell.text : cell.struck === text ? null : cell.struck;
  return { ...OPEN, kind: "written", text, since: step, share, struck, notes, marks: notes.length ? ["revised"] : [] };
}

// The canvas after `step`, counted from 0.
export function follow(cells, event, step, show) {
  const next = cells.map(aged);
  for (const place of event.revoked) next[place] = revoked(cells[place], step);
  event.committed.forEach(([place, piece], index) => {
    next[place] = written(next[place], show(piece), event.confidence[index], step);
  });
  for (const [place, piece, share] of event.provisional) {
    if (next[place].kind === "open") next[place] = { ...next[place], kind: "predicted", text: show(piece), share };
  }
  for (const place of event.filled) next[place] = { ...OPEN, kind: "filled" };
  return next;
}
