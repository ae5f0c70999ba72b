// Which runs are shown: choices from lists, words that must occur, and conditions such as bits<4.5.
const FILTERS = ["model", "algo", "weight_format", "act_format", "kv_format", "calib", "dtype", "status"];
const state = { words: "", chosen: {}, runs: [], evaluation: 0, listeners: [] };

/** In lower case, without spaces around what compares: "bits < 4" is one word. */
const tight = (words) => words.toLowerCase().replace(/\s*([<>=]+)\s*/g, "$1");

const haystacks = data.labels.map((label, run) => {
  const words = FILTERS.map((name) => text(name, run)).filter(Boolean);
  return tight([label, ...words, data.keys[run], `#${data.ids[run]}`, text("error", run) || ""].join(" "));
});

const CONDITION = /^([^<>=]+)(<=|>=|<|>|=)([^<>=]+)$/;
const THOUSANDS = /^-?\d{1,3}(,\d{3})+(\.|$)/;
const COMPARE = {
  "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b, "=": (a, b) => a === b,
};

/** What a name in a condition means: a column, or a metric of the evaluation that is looked at first. */
function quantity(name) {
  if (name === "size") return (run) => number("model_bytes", run);
  if (Object.hasOwn(data.numbers, name)) return (run) => number(name, run);
  const current = data.evaluations[state.evaluation];
  const found = current && current.metric === name ? current : data.evaluations.find((each) => each.metric === name);
  if (!found) return null;
  return (run) => (found.of(run) || {}).value;
}

/** The test of a run that a word such as bits<4.5 is, or null. */
function condition(word) {
  const [, name, sign, words] = CONDITION.exec(word) || [];
  const read = name && quantity(name);
  const bound = read ? Number(THOUSANDS.test(words) ? words.replaceAll(",", "") : words) : NaN;
  if (Number.isNaN(bound)) return null;
  return (run) => {
    const value = read(run);
    return value !== null && value !== undefined && COMPARE[sign](value, bound);
  };
}

/** The tests that the words of a search are, and those words that compare but are neither a condition nor anywhere. */
function tests(words) {
  const [found, unknown] = [[], []];
  for (const word of tight(words).split(/\s+/).filter(Boolean)) {
    const holds = condition(word);
    if (!holds && /[<>=]/.test(word) && !haystacks.some((each) => each.includes(word))) unknown.push(word);
    else found.push(holds || ((run) => haystacks[run].includes(word)));
  }
  return [found, unknown];
}

/** What is wrong with these words; of the metrics that only add detail the names are not worth the room. */
function complaint(unknown) {
  if (!unknown.length) return "";
  const metrics = data.evaluations.filter((evaluation) => evaluation.headline).map((evaluation) => evaluation.metric);
  const names = [...new Set(["size", ...Object.keys(data.numbers), ...metrics])].join(", ");
  const kind = unknown.length > 1 ? "are no conditions" : "is no condition";
  return `; ${unknown.map((word) => `"${word}"`).join(", ")} ${kind} such as bits<4.5 (on ${names})`;
}

function applyFilter() {
  const [conditions, unknown] = tests(state.words);
  for (const [name, level] of Object.entries(state.chosen)) {
    if (level !== "") conditions.push((run) => data.texts[name].codes[run] === Number(level));
  }
  state.runs = [];
  for (let run = 0; run < total; run += 1) if (conditions.every((holds) => holds(run))) state.runs.push(run);
  byName("count").textContent = `${counted(state.runs.length, "run")} of ${total.toLocaleString("en")}${complaint(unknown)}`;
  for (const listener of state.listeners) listener();
}

function drawFilters() {
  const form = byName("filters");
  let waiting;
  const search = h("input", {
    type: "search", id: "search", autocomplete: "off", placeholder: "gptq g128 bits<4.5 ppl<20",
    oninput: (event) => {
      state.words = event.target.value;
      clearTimeout(waiting);
      waiting = setTimeout(applyFilter, 120);
    },
  });
  const lists = FILTERS.filter((name) => data.texts[name].levels.length > 1).map((name) => {
    const column = data.texts[name];
    const levels = column.levels.map((level, code) => [String(code), level]);
    const change = (value) => { state.chosen[name] = value; applyFilter(); };
    return choice(column.title, [["", "all"], ...levels], "", change, { "data-filter": name });
  });
  const clear = h("button", { type: "reset" }, "Clear");
  form.addEventListener("reset", () => { state.words = ""; state.chosen = {}; applyFilter(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  put(form, h("label", { class: "wide" }, "Search: words, and conditions such as bits<4.5", search), lists, clear);
}
