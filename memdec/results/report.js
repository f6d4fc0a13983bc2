"use strict";
// Sorting of tables and the filter of claims; without this script the page only lacks these.
const MARK = { none: "↕", ascending: "↑", descending: "↓" };

function key(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.v ?? cell.textContent.trim();
  const number = Number.parseFloat(text.replace(/,/g, ""));
  return { text, number, empty: text === "" };
}

function compare(a, b) {
  if (a.empty || b.empty) return a.empty - b.empty;
  const numbers = !Number.isNaN(a.number) && !Number.isNaN(b.number);
  return numbers && a.number !== b.number ? a.number - b.number : a.text.localeCompare(b.text, "en", { numeric: true });
}

function sort(head) {
  const table = head.closest("table");
  const column = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const each of table.tHead.rows[0].cells) show(each, "none");
  show(head, down ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows].map((row) => ({ row, key: key(row, column) }));
  rows.sort((a, b) => (a.key.empty || b.key.empty || !down ? compare(a.key, b.key) : compare(b.key, a.key)));
  table.tBodies[0].append(...rows.map((each) => each.row));
  table.classList.add("sorted");
}

function show(head, order) {
  const mark = head.querySelector(".mark");
  if (!mark) return;
  head.setAttribute("aria-sort", order);
  mark.textContent = MARK[order];
}

for (const head of document.querySelectorAll("table.sortable thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "sort";
  button.append(...head.childNodes);
  const mark = document.createElement("span");
  mark.className = "mark";
  mark.setAttribute("aria-hidden", "true");
  button.insertBefore(mark, button.querySelector("small"));
  button.addEventListener("click", () => sort(head));
  head.append(button);
  show(head, "none");
}

const filters = document.querySelectorAll("#filter button");
for (const button of filters) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    for (const each of filters) each.setAttribute("aria-pressed", String(each === button && on));
    for (const row of document.querySelectorAll("#claims tbody tr")) {
      row.hidden = on && row.dataset.verdict !== button.dataset.verdict;
    }
  });
  button.disabled = false;
}

// What is folded is printed, too, except the numbers of charts.
addEventListener("beforeprint", () => {
  for (const each of document.querySelectorAll("details:not(.more)")) each.open = true;
});
