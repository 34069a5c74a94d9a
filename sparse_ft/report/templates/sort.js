"use strict";
// A click on a column's title sorts the rows of its table by it, a second click the other way round.
for (const table of document.querySelectorAll("table")) {
  const titles = [...table.querySelectorAll("thead th")];
  titles.forEach((title, column) => title.firstElementChild.addEventListener("click", () => {
    const falling = title.getAttribute("aria-sort") === "ascending";
    titles.forEach(other => other.removeAttribute("aria-sort"));
    title.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const compare = (a, b) => {
      const [left, right] = [a.cells[column], b.cells[column]];
      return left.dataset.value === undefined
        ? left.textContent.localeCompare(right.textContent, undefined, { numeric: true })
        : left.dataset.value - right.dataset.value;
    };
    const rows = [...table.tBodies[0].rows].sort(compare);
    table.tBodies[0].append(...(falling ? rows.reverse() : rows));
  }));
}
