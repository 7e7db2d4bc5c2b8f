(() => {
  "use strict";
  const root = document.documentElement;
  const remembered = (value) => {
    // A page opened from a file may have no storage: then the choice holds until it is closed.
    try {
      if (value) localStorage.setItem("theme", value);
      return localStorage.getItem("theme");
    } catch {
      return value;
    }
  };
  const chosen = remembered();
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    remembered(root.dataset.theme);
  });

  const key = (row, column, numeric) => {
    const cell = row.cells[column];
    const text = cell.dataset.sort ?? cell.textContent.trim();
    return numeric ? Number(text) : text.toLocaleLowerCase();
  };
  const sort = (heading) => {
    const table = heading.closest("table");
    const column = heading.cellIndex;
    const numeric = heading.dataset.kind === "number";
    const before = heading.getAttribute("aria-sort");
    const rising = before ? before !== "ascending" : !numeric; // Numbers: the largest first.
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row, index) => ({ row, index, key: key(row, column, numeric) }));
    rows.sort((a, b) => {
      const order = numeric ? a.key - b.key : a.key.localeCompare(b.key, undefined, { numeric: true });
      return (rising ? order : -order) || a.index - b.index;
    });
    body.append(...rows.map((entry) => entry.row));
  };
  for (const button of document.querySelectorAll("thead th button")) {
    button.addEventListener("click", () => sort(button.closest("th")));
  }

  for (const input of document.querySelectorAll("input[data-filter]")) {
    const table = document.getElementById(input.dataset.filter);
    input.addEventListener("input", () => {
      const words = input.value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLocaleLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
    });
  }
})();
