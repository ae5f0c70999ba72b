// What stands below the results: tables and figures that do not move, and the list of contents.
function cellOf(tag, cell, attributes) {
  const text = [cell.text];
  const only = cell.runs && cell.runs.length === 1 && byId.has(cell.runs[0]) ? cell.runs[0] : null;
  const value = only === null ? text : [h("a", { href: `#run-${only}` }, text)];
  const many = cell.runs && cell.runs.length > 1 ? h("small", {}, cell.runs.filter((run) => byId.has(run)).map((run) => [" ", h("a", { href: `#run-${run}` }, `#${run}`)]).flat()) : null;
  const kinds = [cell.number ? "number" : "text", cell.state && cell.state !== "done" ? "absent" : "", cell.state === "failed" ? "bad" : ""];
  return h(
    tag, { class: kinds.filter(Boolean).join(" "), ...attributes, colspan: cell.span || null },
    cell.bold ? h("strong", {}, value) : value, cell.best ? "*" : "",
    cell.notes ? h("sup", {}, cell.notes) : null, cell.small ? h("small", { class: "below" }, cell.small) : null, many,
  );
}

function bodyRow(row, width) {
  if (row.group !== undefined) return h("tr", {}, h("th", { scope: "colgroup", colspan: width }, row.group));
  const labels = row.labels || 1;
  return h("tr", {}, row.cells.map((cell, index) => (index < labels ? cellOf("th", cell, { scope: "row" }) : cellOf("td", cell, {}))));
}

function drawnTable(table) {
  const width = table.head.length ? table.head[table.head.length - 1].reduce((sum, cell) => sum + (cell.span || 1), 0) : 1;
  const heads = table.head.map((line) => h("tr", {}, line.map((cell) => cellOf("th", cell, { scope: cell.span ? "colgroup" : "col" }))));
  const drawn = table.rows.length
    ? h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": table.title }, h("table", { class: "still" }, h("thead", {}, heads), h("tbody", {}, table.rows.map((row) => bodyRow(row, width)))))
    : null;
  const notes = table.notes.map((note) => h("p", { class: "caption" }, note.mark ? h("sup", {}, note.mark) : null, note.mark ? ` ${note.text}` : note.text));
  const figure = table.figure ? drawnFigure(table.figure) : null;
  return h("div", { class: "block" }, h("h3", {}, table.title), drawn, h("p", { class: "caption" }, table.caption), notes, figure);
}

const drawnFigure = (figure) => h(
  "figure", { class: "block" }, h("h3", {}, figure.title), h("img", { src: figure.source, alt: figure.title, loading: "lazy" }),
  h("figcaption", { class: "caption" }, figure.caption),
);

function drawSections() {
  const drawn = data.sections.map((section) => h(
    "section", { id: section.id, "aria-labelledby": `${section.id}-title` },
    h("h2", { id: `${section.id}-title` }, section.title), section.text.map((words) => h("p", {}, words)),
    section.tables.map(drawnTable), section.figures.map(drawnFigure),
  ));
  put(byName("sections"), drawn);
  const parts = [["front-title", "Accuracy against cost"], ["table-title", "Results"], ...data.sections.map((section) => [section.id, section.title])];
  put(byName("contents"), h("ul", {}, parts.map(([id, title]) => h("li", {}, h("a", { href: `#${id}` }, title)))));
}
