"use strict";
(() => {
  const table = document.getElementById("board");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const form = document.querySelector(".filters");
  const opened = new Map();

  const close = (row) => {
    const there = opened.get(row);
    if (!there) return;
    there.home.append(there.content);
    there.line.remove();
    opened.delete(row);
    const button = row.querySelector("button.open");
    button.setAttribute("aria-expanded", "false");
    button.firstElementChild.textContent = "+";
  };

  const open = (row) => {
    const button = row.querySelector("button.open");
    const home = document.getElementById(button.dataset.details);
    const content = home.querySelector(".inside");
    const line = document.createElement("tr");
    const cell = line.insertCell();
    line.className = "opened";
    cell.colSpan = row.cells.length;
    cell.append(content);
    row.after(line);
    opened.set(row, { home, content, line });
    button.setAttribute("aria-expanded", "true");
    button.firstElementChild.textContent = "\u2212";
    fit();
  };

  // The opened part stays as wide as what is seen of the table.
  const fit = () => {
    const width = table.parentElement.clientWidth;
    for (const { content } of opened.values()) content.style.width = width + "px";
    for (const content of document.querySelectorAll("details > .inside")) content.style.width = "";
  };

  const place = () => {
    for (const row of rows) {
      body.append(row);
      const there = opened.get(row);
      if (there) body.append(there.line);
    }
  };

  const sorted = (column, kind, ascending) => {
    const key = (row) => row.cells[column].dataset.v ?? "";
    rows.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = kind === "number" ? Number(x) - Number(y) : x.localeCompare(y, "en");
      return ascending ? order : -order;
    });
    place();
  };

  Array.from(table.tHead.rows[1].cells).forEach((head, column) => {
    const kind = head.dataset.sort;
    if (!kind) return;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const was = head.getAttribute("aria-sort");
      // Numbers are best high, ranks and names low.
      const first = kind === "number" && column > 0 ? "descending" : "ascending";
      const now = was === first ? (first === "ascending" ? "descending" : "ascending") : first;
      for (const other of table.tHead.rows[1].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", now);
      sorted(column, kind, now === "ascending");
    });
  });

  for (const row of rows) {
    const button = row.querySelector("button.open");
    button.hidden = false;
    button.addEventListener("click", () => (opened.has(row) ? close(row) : open(row)));
  }

  const filter = () => {
    const { kind, site, text } = form.elements;
    const wanted = text.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const sites = row.dataset.sites.split(" ").filter(Boolean);
      const fits =
        (!kind.value || row.dataset.kind === kind.value) &&
        (!site.value || (site.value === "-" ? !sites.length : sites.includes(site.value))) &&
        row.dataset.name.toLowerCase().includes(wanted);
      if (!fits) close(row);
      row.hidden = !fits;
      shown += fits;
    }
    form.querySelector("output").textContent = `${shown} of ${rows.length}`;
  };
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());

  // A link into the details shows them, wherever they are.
  const follow = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    for (const row of rows) if (opened.get(row)?.home === target) close(row);
    const around = target.closest("details");
    if (around) around.open = true;
    target.scrollIntoView();
  };
  addEventListener("hashchange", follow);
  addEventListener("resize", fit);
  if (location.hash) follow();
})();
