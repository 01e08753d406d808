"use strict";
// Tables: a click on a column's heading sorts by it, another the other way round.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows].at(-1).cells;
  const body = table.tBodies[0];
  for (const [column, head] of [...heads].entries()) {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.v;
      const numeric = [...body.rows].every((row) => key(row) !== "" && !isNaN(key(row)));
      const compare = numeric ? (a, b) => key(a) - key(b)
        : (a, b) => key(a).localeCompare(key(b), undefined, { numeric: true });
      body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * compare(a, b)));
    });
  }
}

// Layers: a link opens the one it leads to; paper shows them all.
const layers = document.querySelectorAll("details");
function openTarget() {
  const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) {
    target.open = true;
    target.scrollIntoView();
    target.firstElementChild.focus({ preventScroll: true });
  }
}
addEventListener("hashchange", openTarget);
for (const link of document.querySelectorAll('a[href^="#"]')) {
  link.addEventListener("click", () => setTimeout(openTarget));
}
openTarget();
for (const button of document.querySelectorAll("button[data-open]")) {
  button.addEventListener("click", () => {
    for (const layer of document.querySelectorAll("details.layer")) layer.open = button.dataset.open === "1";
  });
}
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...layers].filter((one) => !one.open);
  for (const one of closed) one.open = true;
});
addEventListener("afterprint", () => {
  for (const one of closed) one.open = false;
});
