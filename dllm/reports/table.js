"use strict";

// Tables that sort by the clicked column: numbers in descending order first, text in ascending order.

function sortValue(row, column) {
  const text = row.cells[column].dataset.value;
  const number = Number(text);
  return text === "" ? null : Number.isNaN(number) ? text : number;
}

function compare(one, other, direction) {
  // Missing values come last in both orders.
  if (one === null || other === null) return (one === null) - (other === null);
  const order = typeof one === "number" && typeof other === "number"
    ? one - other
    : String(one).localeCompare(String(other), "en", { numeric: true });
  return direction === "ascending" ? order : -order;
}

function nextDirection(header, rows, column) {
  const before = header.getAttribute("aria-sort");
  if (before) return before === "ascending" ? "descending" : "ascending";
  return rows.some((row) => typeof sortValue(row, column) === "number") ? "descending" : "ascending";
}

function sortTable(table, header) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const column = header.cellIndex;
  const direction = nextDirection(header, rows, column);
  rows.sort((one, other) => compare(sortValue(one, column), sortValue(other, column), direction));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", direction);
  body.append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const header of table.tHead.rows[0].cells) {
    header.querySelector("button").addEventListener("click", () => sortTable(table, header));
  }
}
