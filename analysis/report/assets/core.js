// The data, the document and numbers in words. Text goes into the page as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const total = data.ids.length;
const byId = new Map(data.ids.map((id, index) => [id, index]));

/** An element: attributes by name, "on…" are listeners, children are elements or text. */
function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const byName = (name) => document.getElementById(name);
const put = (element, ...children) => element.replaceChildren(...children.flat().filter((child) => child));

function text(name, run) {
  const column = data.texts[name];
  const code = column.codes[run];
  return code < 0 ? null : column.levels[code];
}

const number = (name, run) => data.numbers[name].values[run];

/** Six significant digits, without an exponent where that can be read. */
function plain(value) {
  if (value === null || value === undefined) return "";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e7 || size < 1e-4) return value.toExponential(3);
  if (Number.isInteger(value)) return String(value);
  return String(Number(value.toPrecision(size >= 1e5 ? 7 : 6)));
}

/** A value to the digits that its standard error leaves it, at most six. */
function measured(value, stderr) {
  if (value === null || value === undefined) return "";
  if (!stderr || Math.abs(value) >= 1e6 || Math.abs(value) < 1e-4) return plain(value);
  const digits = Math.min(6, Math.max(0, 1 - Math.floor(Math.log10(stderr))));
  return value.toFixed(digits);
}

const brief = (value) => (value === null || value === undefined ? "" : String(Number(value.toPrecision(2))));

/** A difference; without a standard error to four digits, as many as are worth reading. */
function signed(value, stderr) {
  const words = stderr ? measured(value, stderr) : plain(Number(value.toPrecision(4)));
  return (value > 0 ? "+" : "") + words.replace("-", "−");
}

function inUnit(value, unit) {
  if (value === null || value === undefined) return "";
  if (unit === "bytes") {
    for (const [size, name] of [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
      if (value >= size) return `${(value / size).toPrecision(3)} ${name}`;
    }
    return `${value} B`;
  }
  if (unit === "s") {
    if (value >= 5400) return `${(value / 3600).toFixed(1)} h`;
    if (value >= 120) return `${(value / 60).toFixed(1)} min`;
    return `${value >= 10 ? value.toFixed(1) : Number(value.toPrecision(2))} s`;
  }
  if (unit === "bits") return String(Number(value.toFixed(4)));
  return plain(value);
}

/** Each evaluation's numbers of a run: {value, stderr, n, delta, deltaStderr, noise}, or undefined. */
for (const evaluation of data.evaluations) {
  evaluation.at = new Map(evaluation.run.map((run, index) => [run, index]));
  evaluation.of = (run) => {
    const index = evaluation.at.get(run);
    if (index === undefined) return undefined;
    const found = {};
    for (const name of ["value", "stderr", "n", "delta", "deltaStderr", "noise", "best"]) found[name] = evaluation[name][index];
    return found;
  };
  evaluation.arrow = { 1: " ↑", 0: "", [-1]: " ↓" }[evaluation.better];
  evaluation.title = evaluation.label + (evaluation.unit ? `, ${evaluation.unit}` : "") + evaluation.arrow;
}

function withError(found) {
  if (!found) return "";
  return measured(found.value, found.stderr) + (found.stderr ? ` ± ${brief(found.stderr)}` : "");
}

const star = (found) => (found && found.best ? h("strong", { title: "best of its model, or tied" }, "*") : "");
const link = (run) => `#run-${data.ids[run]}`;
const counted = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function download(name, type, content) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function choice(label, values, chosen, change, attributes) {
  const options = values.map(([value, words]) => h("option", { value, selected: value === chosen }, words));
  const select = h("select", { onchange: (event) => change(event.target.value), ...attributes }, options);
  return h("label", { class: attributes && attributes["data-wide"] ? "wide" : null }, label, select);
}
