// The results: one row per run, columns to choose, sorted by any of them, a page at a time.
const PAGE = 100;
const PRINTED = 1000;
const table = { sort: null, descending: false, page: 0, size: PAGE, shown: new Set() };

function columns() {
  const found = [{ id: "label", title: "run", value: (run) => data.labels[run], cell: labelCell }];
  for (const name of ["status", "model", "algo", "weight_format", "act_format", "kv_format"]) found.push(textColumn(name));
  data.evaluations.forEach((evaluation, index) => {
    found.push({
      id: `e${index}`, title: evaluation.title, number: true,
      value: (run) => (evaluation.of(run) || {}).value,
      cell: (run) => {
        const at = evaluation.of(run);
        return at ? [measured(at.value, at.stderr), at.stderr ? h("small", {}, ` ± ${brief(at.stderr)}`) : "", star(at)] : [""];
      },
      stderr: (run) => (evaluation.of(run) || {}).stderr,
    });
    if (evaluation.againstFull || !evaluation.delta.some((each) => each !== null)) return;
    found.push({
      id: `d${index}`, title: `Δ ${evaluation.title}`, number: true,
      value: (run) => (evaluation.of(run) || {}).delta,
      cell: (run) => {
        const at = evaluation.of(run);
        if (!at || at.delta === null) return [""];
        return [signed(at.delta, at.deltaStderr), at.deltaStderr ? h("small", {}, ` ± ${brief(at.deltaStderr)}`) : ""];
      },
      stderr: (run) => (evaluation.of(run) || {}).deltaStderr,
    });
  });
  for (const [name, column] of Object.entries(data.numbers)) {
    const cell = (run) => [inUnit(number(name, run), column.unit)];
    found.push({ id: name, title: column.title, number: true, value: (run) => number(name, run), cell });
  }
  for (const name of ["calib", "dtype", "device", "source", "finished"]) found.push(textColumn(name));
  found.push({ ...textColumn("error"), cell: (run) => [shortened(text("error", run) || "")] }); // all of it is on the run's page
  return found.filter((column) => !column.text || data.texts[column.id].levels.length > 0);
}

const shortened = (words) => (words.length > 90 ? `${words.slice(0, 90)}…` : words);

const textColumn = (name) => (
  { id: name, text: true, title: data.texts[name].title, value: (run) => text(name, run), cell: (run) => [text(name, run)] }
);

function labelCell(run) {
  const status = text("status", run);
  const trouble = status === "done" ? null : h("small", { class: "bad" }, ` ${status}`);
  return [h("a", { href: link(run) }, data.labels[run]), h("small", {}, ` #${data.ids[run]}`), trouble];
}

/** At first: what differs and what was found; less of it on a narrow screen. */
function usualColumns(all) {
  const narrow = window.matchMedia("(max-width: 40rem)").matches;
  const shown = new Set(["label", "bits_per_weight"]);
  const common = (evaluation, index) => index === 0 || evaluation.run.length >= total / 5;
  data.evaluations.slice(0, narrow ? 1 : 3).forEach((evaluation, index) => {
    if (common(evaluation, index)) for (const kind of "ed") shown.add(kind + index);
  });
  if (!narrow) for (const name of ["model_bytes", "quantize_s", "peak_host_bytes"]) shown.add(name);
  if (data.texts.error.levels.length && !narrow) shown.add("error");
  return new Set(all.filter((column) => shown.has(column.id)).map((column) => column.id));
}

const order = new Intl.Collator("en", { numeric: true });

function sorted(runs) {
  const column = allColumns.find((each) => each.id === table.sort);
  if (!column) return runs;
  const sign = table.descending ? -1 : 1;
  const known = [];
  const unknown = [];
  for (const run of runs) {
    const value = column.value(run);
    (value === null || value === undefined ? unknown : known).push([value, run]);
  }
  if (column.number) known.sort((a, b) => sign * (a[0] - b[0]) || a[1] - b[1]);
  else known.sort((a, b) => sign * order.compare(a[0], b[0]) || a[1] - b[1]);
  return [...known, ...unknown].map((pair) => pair[1]); // what is not known comes last either way
}

const allColumns = columns();

function sortBy(id) {
  table.descending = table.sort === id ? !table.descending : false;
  table.sort = id;
  table.page = 0;
  drawTable();
  byName("table").querySelector(`[data-sort="${CSS.escape(id)}"]`).focus();
}

function drawTable() {
  const shown = allColumns.filter((column) => table.shown.has(column.id));
  const heads = shown.map((column) => {
    const direction = table.sort !== column.id ? null : table.descending ? "descending" : "ascending";
    const button = h("button", { type: "button", "data-sort": column.id, onclick: () => sortBy(column.id) }, column.title);
    return h("th", { scope: "col", class: column.number ? "number" : null, "aria-sort": direction }, button);
  });
  const runs = sorted(state.runs);
  const pages = Math.max(1, Math.ceil(runs.length / table.size));
  table.page = Math.min(table.page, pages - 1);
  const first = table.page * table.size;
  const rows = runs.slice(first, first + table.size).map((run) => h("tr", {}, shown.map((column, index) => {
    const kind = column.number ? "number" : "text";
    const failed = column.id === "error" || (column.id === "status" && text("status", run) !== "done");
    const attributes = { class: failed ? `${kind} bad` : kind, scope: index ? null : "row" };
    return h(index ? "td" : "th", attributes, column.cell(run));
  })));
  if (!rows.length) rows.push(h("tr", {}, h("td", { colspan: shown.length }, total ? "No run matches." : "No runs yet.")));
  put(byName("table"), h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows)));
  byName("marked").hidden = !data.evaluations.some((evaluation, index) => table.shown.has(`e${index}`) && evaluation.best.includes(1));
  drawPages(runs.length, pages, first);
}

function drawPages(count, pages, first) {
  const go = (step) => () => {
    table.page += step;
    drawTable();
    byName("table").scrollIntoView();
    const { firstChild: back, lastChild: next } = byName("pages"); // new ones: the focus stays on the one pressed
    const [pressed, other] = step < 0 ? [back, next] : [next, back];
    (pressed.disabled ? other : pressed).focus({ preventScroll: true });
  };
  const words = `${count ? first + 1 : 0}–${Math.min(first + table.size, count)} of ${count.toLocaleString("en")}`;
  put(
    byName("pages"),
    h("button", { type: "button", disabled: table.page === 0, onclick: go(-1) }, "← Back"),
    h("span", {}, words),
    h("button", { type: "button", disabled: table.page >= pages - 1, onclick: go(1) }, "Next →"),
  );
}

function saveRows() {
  const quoted = (value) => {
    // A leading = + - @ would be a formula to a spreadsheet; numbers are not text and keep their sign.
    if (value === null || value === undefined) return "";
    const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const shown = allColumns.filter((column) => table.shown.has(column.id));
  const names = ["id", "key", ...shown.flatMap((column) => (column.stderr ? [column.title, `${column.title} stderr`] : [column.title]))];
  const lines = sorted(state.runs).map((run) => [
    data.ids[run], data.keys[run],
    ...shown.flatMap((column) => (column.stderr ? [column.value(run), column.stderr(run)] : [column.value(run)])),
  ]);
  download("results.csv", "text/csv", [names, ...lines].map((line) => line.map(quoted).join(",")).join("\n"));
}

function startTable() {
  table.shown = usualColumns(allColumns);
  const boxes = allColumns.slice(1).map((column) => h("label", {}, h("input", {
    type: "checkbox", checked: table.shown.has(column.id), "data-column": column.id,
    onchange: (event) => {
      if (event.target.checked) table.shown.add(column.id);
      else table.shown.delete(column.id);
      drawTable();
    },
  }), column.title));
  put(
    byName("table-controls"),
    h("button", { type: "button", onclick: saveRows }, "Save as CSV"),
    h("details", { class: "columns" }, h("summary", {}, "Columns"), h("div", {}, boxes)),
  );
  state.listeners.push(() => { table.page = 0; drawTable(); });
  window.addEventListener("beforeprint", () => { table.size = PRINTED; table.page = 0; drawTable(); });
  window.addEventListener("afterprint", () => { table.size = PAGE; drawTable(); });
}
