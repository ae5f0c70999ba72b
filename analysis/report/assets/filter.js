// Which runs are shown: choices from lists, words that must occur, and conditions such as bits<4.5.
const FILTERS = ["model", "algo", "weight_format", "act_format", "kv_format", "calib", "dtype", "status"];
const state = { words: "", chosen: {}, runs: [], evaluation: 0, listeners: [] };

const haystacks = data.labels.map((label, run) => {
  const words = FILTERS.map((name) => text(name, run)).filter(Boolean);
  return [label, ...words, data.keys[run], `#${data.ids[run]}`, text("error", run) || ""].join(" ").toLowerCase();
});

const CONDITION = /^([a-z_]+)(<=|>=|<|>|=)(-?[\d.]+(?:e[-+]?\d+)?)$/i;
const COMPARE = {
  "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b, "=": (a, b) => a === b,
};

/** What a name in a condition means: a column, or a metric of the evaluation that is looked at first. */
function quantity(name) {
  if (name === "size") return (run) => number("model_bytes", run);
  if (data.numbers[name]) return (run) => number(name, run);
  const current = data.evaluations[state.evaluation];
  const found = current && current.metric === name ? current : data.evaluations.find((each) => each.metric === name);
  if (!found) return null;
  return (run) => (found.of(run) || {}).value;
}

function tests(words) {
  return words.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
    const parts = CONDITION.exec(word);
    const read = parts && quantity(parts[1]);
    if (!read) return (run) => haystacks[run].includes(word);
    const bound = Number(parts[3]);
    return (run) => {
      const value = read(run);
      return value !== null && value !== undefined && COMPARE[parts[2]](value, bound);
    };
  });
}

function applyFilter() {
  const conditions = tests(state.words);
  for (const [name, level] of Object.entries(state.chosen)) {
    if (level !== "") conditions.push((run) => data.texts[name].codes[run] === Number(level));
  }
  state.runs = [];
  for (let run = 0; run < total; run += 1) if (conditions.every((holds) => holds(run))) state.runs.push(run);
  byName("count").textContent = `${counted(state.runs.length, "run")} of ${total.toLocaleString("en")}`;
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
