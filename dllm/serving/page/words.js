// Words and numbers as they are shown.

export function counted(number, name) {
  return `${number} ${name}${number === 1 ? "" : "s"}`;
}

// A token's text: never empty, nothing invisible; one of `ends` ends a text.
export function legible(piece, ends) {
  if (ends.includes(piece)) return "∎";
  return piece.replaceAll("\n", "⏎").replace(/\p{C}/gu, "�") || "▯";
}
