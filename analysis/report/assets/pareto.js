// The figure: a metric against what it costs. One model at a time: values of different models are not compared.
const COSTS = ["bits_per_weight", "bits_per_weight_model", "model_bytes", "quantize_s", "total_s", "evaluate_s",
  "peak_host_bytes", "peak_device_bytes"];
const OF_WEIGHTS = COSTS.slice(0, 3); // far larger for weights in full precision
const SPLIT = 0.9; // of the width: where the axis breaks before runs whose weights are in full precision
const LOG_BEYOND = 20; // ratio of largest to smallest value beyond which a linear axis hides what lies at its foot
const SAME_SIZE = 1e-5; // ratio of difference to size below which the ticks' six digits cannot tell sizes apart
const SYMBOLS = {
  s: "square", o: "circle", "^": "triangle-up", D: "diamond", v: "triangle-down", P: "cross", X: "x", p: "pentagon",
  "*": "star", h: "hexagon", "<": "triangle-left", ">": "triangle-right",
};
const GREY = "#8a8f98";
const OTHER = { colour: GREY, marker: "o" };
const FADED = 0.35; // opacity of what another run dominates
const SIZE = 11; // of a mark, in pixels
const TOGETHER = 4; // runs named at once where marks cover each other
const PAPER = { "--back": "#ffffff", "--text": "#000000", "--quiet": "#444444", "--grid": "#e5e5e5" };
const PAPER_SIZE = { width: 660, height: 400 }; // pixels of 1/96 inch: fits the width of A4 and letter
const pareto = { cost: COSTS[0], drawn: false, points: [], at: null, baseline: null, knee: null, hidden: new Set() };

function chartModel() {
  const evaluation = data.evaluations[state.evaluation];
  const counts = new Map();
  for (const run of state.runs) {
    if (!evaluation.at.has(run)) continue;
    const code = data.texts.model.codes[run];
    counts.set(code, (counts.get(code) || 0) + 1);
  }
  return [...counts].sort((a, b) => b[1] - a[1]).map((pair) => pair[0]);
}

/** A cost by the name it has in the list: a column, or "e" and the number of an evaluation. */
function costNamed(name) {
  const column = data.numbers[name];
  if (column) {
    const unit = { bits: "", bytes: ", bytes", s: ", seconds" }[column.unit];
    return { title: column.title, unit: column.unit, axis: column.title + unit, read: (run) => number(name, run), sign: 1, ofWeights: OF_WEIGHTS.includes(name) };
  }
  const evaluation = data.evaluations[Number(name.slice(1))];
  const read = (run) => (evaluation.at.has(run) ? evaluation.of(run).value : null);
  const title = evaluation.label + (evaluation.unit ? `, ${evaluation.unit}` : "");
  return { title, unit: "", axis: title, read, sign: -evaluation.better, ofWeights: false };
}

/** Runs that quantize inputs or the cache alone, and cost far more than those that quantize weights. */
function markBeyond(points, cost) {
  const full = (point) => text("weight_format", point.run) === null && number("bits", point.run) === null;
  const near = points.filter((point) => !full(point)).map((point) => point.x);
  const bound = cost.ofWeights && near.length ? 1.5 * near.reduce((a, b) => Math.max(a, b), 0) : Infinity;
  points.forEach((point) => { point.beyond = full(point) && point.x > bound; });
}

function gather(evaluation, model, cost) {
  const points = [];
  let baseline = null;
  const mine = (run) => data.texts.model.codes[run] === model && evaluation.at.has(run);
  for (const run of state.runs) {
    if (!mine(run) || data.baseline[run]) continue;
    const x = cost.read(run);
    if (x === null || x === undefined) continue;
    const found = evaluation.of(run);
    const loss = -evaluation.better * found.value;
    points.push({ x, y: found.value, loss: evaluation.better ? loss : 0, stderr: found.stderr, run, algo: text("algo", run) });
  }
  for (let run = 0; run < total && !baseline && !evaluation.againstFull; run += 1) {
    if (data.baseline[run] && mine(run)) baseline = { x: cost.read(run), y: evaluation.of(run).value, run };
  }
  markBeyond(points, cost);
  const front = evaluation.better ? onFront(points.map((point) => ({ x: cost.sign * point.x, loss: point.loss }))) : points.map(() => true);
  points.forEach((point, index) => { point.front = front[index]; });
  return { points: points.sort((a, b) => a.x - b.x || a.y - b.y), baseline };
}

/** Text for the figure, which reads a little markup: shown as it is written, cut where no axis is that long. */
const literal = (words) => (words.length > 60 ? `${words.slice(0, 59)}…` : words).replace(/&/g, "&amp;").replace(/</g, "&lt;");

function describe(point) {
  const evaluation = data.evaluations[state.evaluation];
  const found = evaluation.of(point.run);
  const cost = costNamed(pareto.cost);
  const lines = [`${evaluation.label}: ${withError(found)}`];
  if (found.delta !== null && !evaluation.againstFull) {
    lines.push(`Δ from full precision: ${signed(found.delta, found.deltaStderr)}${found.deltaStderr ? ` ± ${brief(found.deltaStderr)}` : ""}`);
  }
  lines.push(`${cost.title}: ${inUnit(point.x, cost.unit)}`, `run #${data.ids[point.run]}, key ${data.keys[point.run].slice(0, 10)}`);
  return lines;
}

/** The method that a point's mark is of in the legend; null: one of the others. */
const groupOf = (point) => (data.marks[point.algo] ? point.algo : null);
const seriesOf = (group) => `algo ${group}`;

/** The series that a reader has switched off in the legend, those that are not drawn just now among them. */
function hiddenSeries() {
  for (const { legendgroup, visible } of byName("plot").data || []) {
    if (visible === "legendonly") pareto.hidden.add(legendgroup);
    else pareto.hidden.delete(legendgroup);
  }
  return pareto.hidden;
}

/** The points whose marks are to be seen. */
function shownPoints() {
  const hidden = hiddenSeries();
  return pareto.points.filter((point) => !hidden.has(seriesOf(groupOf(point))));
}

/** What is drawn, from back to front: dominated runs, the front's line, its runs, the knee. */
function traces(points, logarithmic, cost) {
  const names = [...new Set(points.map((point) => point.algo))].sort();
  const known = names.filter((name) => data.marks[name]);
  const groups = [...known, ...(known.length < names.length ? [null] : [])];
  const drawn = [];
  const marks = (group, front, beyond) => {
    const mine = points.filter((point) => point.front === front && point.beyond === beyond && groupOf(point) === group);
    if (!mine.length) return;
    const mark = group === null ? OTHER : data.marks[group];
    const spread = mine.map((point) => point.stderr || 0);
    drawn.push({
      type: "scatter", mode: "markers", name: group === null ? "others" : group, legendgroup: seriesOf(group), showlegend: false,
      hoverinfo: "none", opacity: front ? 1 : FADED, x: mine.map((point) => point.x), y: mine.map((point) => point.y),
      customdata: mine.map((point) => point.at), ...(beyond ? { xaxis: "x2" } : {}),
      marker: { color: mark.colour, symbol: SYMBOLS[mark.marker] || "circle", size: SIZE },
      error_y: {
        type: "data", visible: spread.some((each) => each > 0), symmetric: false, array: spread, color: mark.colour, thickness: 1, width: 3,
        arrayminus: logarithmic ? mine.map((point, index) => Math.min(spread[index], point.y / 2)) : spread,
      },
    });
  };
  const each = (front) => groups.forEach((group) => { marks(group, front, false); marks(group, front, true); });
  each(false);
  const front = points.filter((point) => point.front && !point.beyond);
  if (front.length > 1 && data.evaluations[state.evaluation].better) {
    drawn.push({
      type: "scatter", mode: "lines", name: "front", legendgroup: "front", hoverinfo: "skip", x: front.map((point) => point.x), y: front.map((point) => point.y),
      line: { shape: cost.sign > 0 ? "hv" : "vh", color: GREY, width: 1.5 }, legendrank: 2000,
    });
  }
  each(true);
  if (pareto.knee) {
    drawn.push({
      type: "scatter", mode: "markers+text", hoverinfo: "skip", showlegend: false, x: [pareto.knee.x], y: [pareto.knee.y], text: ["knee"],
      textposition: "top right", marker: { symbol: "circle-open", size: 2 * SIZE, color: pareto.ink("--text"), line: { width: 1 } },
    });
  }
  // Names in full colour, though all of a method's marks may be faded.
  const legend = groups.map((group) => {
    const mark = group === null ? OTHER : data.marks[group];
    return {
      type: "scatter", mode: "markers", name: group === null ? "others" : literal(group), legendgroup: seriesOf(group), hoverinfo: "skip",
      x: [null], y: [null], marker: { color: mark.colour, symbol: SYMBOLS[mark.marker] || "circle", size: SIZE },
    };
  });
  const hidden = hiddenSeries();
  return [...drawn, ...legend].map((trace) => (hidden.has(trace.legendgroup) ? { ...trace, visible: "legendonly" } : trace));
}

/** The axis of what stands behind the break, its costs written out. */
function behindBreak(points, cost, axis) {
  const costs = [...new Set(points.filter((point) => point.beyond).map((point) => point.x))].sort((a, b) => a - b);
  if (!costs.length) return null;
  const room = Math.max(costs[costs.length - 1] - costs[0], 1) * 0.5;
  return axis("", {
    domain: [SPLIT + 0.02, 1], anchor: "y", range: [costs[0] - room, costs[costs.length - 1] + room], tickvals: costs,
    ticktext: costs.map((value) => inUnit(value, cost.unit)), fixedrange: true,
  });
}

function layout(xTitle, yTitle, cost, logarithmic, paper) {
  const axis = (title, more) => ({
    title: { text: literal(title), standoff: 8 }, gridcolor: pareto.ink("--grid"), tickfont: { color: pareto.ink("--quiet") },
    zeroline: false, automargin: true, ...more,
  });
  const line = pareto.baseline && {
    type: "line", xref: "paper", x0: 0, x1: 1, y0: pareto.baseline.y, y1: pareto.baseline.y,
    line: { color: pareto.ink("--text"), width: 1, dash: "dash" },
  };
  const price = pareto.baseline && pareto.baseline.x ? `${inUnit(pareto.baseline.x, cost.unit)} ${cost.unit === "bits" ? "bits" : ""}`.trim() : "";
  const words = pareto.baseline && {
    xref: "paper", x: 0, xanchor: "left", yanchor: "bottom", showarrow: false, text: `full precision ${plain(pareto.baseline.y)}${price ? `, ${price} ▸` : ""}`,
    y: logarithmic ? Math.log10(pareto.baseline.y) : pareto.baseline.y,
  };
  const behind = behindBreak(pareto.points, cost, axis);
  const near = pareto.points.filter((point) => !point.beyond).map((point) => point.x);
  const [least, most] = [near.reduce((a, b) => Math.min(a, b), Infinity), near.reduce((a, b) => Math.max(a, b), -Infinity)];
  const xLog = !behind && least > 0 && most > LOG_BEYOND * least;
  const same = cost.unit === "bytes" && most - least < SAME_SIZE * most;
  const gap = behind && { type: "line", xref: "paper", yref: "paper", x0: SPLIT, x1: SPLIT, y0: 0, y1: 1, line: { color: pareto.ink("--quiet"), width: 1, dash: "dot" } };
  const cut = behind && { xref: "paper", yref: "paper", x: SPLIT, y: 0, xanchor: "center", yanchor: "middle", showarrow: false, text: "//" };
  return {
    font: { family: "system-ui, sans-serif", size: 12, color: pareto.ink("--text") },
    paper_bgcolor: pareto.ink("--back"), plot_bgcolor: pareto.ink("--back"), margin: { l: 50, r: 12, t: 30, b: 40 },
    xaxis: axis(xTitle, {
      ...(cost.unit === "bytes" ? { tickformat: "~s", ticksuffix: "B" } : {}), ...(behind ? { domain: [0, SPLIT - 0.02] } : {}),
      ...(same ? { tickvals: [least], ticktext: [inUnit(least, cost.unit)] } : {}),
      ...(xLog ? { type: "log", dtick: most > 1000 * least ? 1 : "D2", tickformat: "~g" } : {}),
    }),
    ...(behind ? { xaxis2: behind } : {}),
    yaxis: axis(yTitle, logarithmic ? { type: "log", dtick: "D2", tickformat: "~g" } : {}),
    shapes: [line, gap].filter(Boolean), annotations: [words, cut].filter(Boolean),
    legend: { orientation: "h", x: 0, yref: "container", y: 1, yanchor: "top" }, showlegend: true,
    hovermode: "closest", hoverdistance: SIZE,
    dragmode: window.matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
    ...(paper ? PAPER_SIZE : { autosize: true }),
  };
}

// Nothing of the library's own bar, and no address: one of its buttons sends the figure to its makers.
const CONFIG = { displayModeBar: false, displaylogo: false, showSendToCloud: false, plotlyServerURL: "", responsive: true };

function drawChart(paper = false) {
  hideTip();
  Object.assign(pareto, { drawn: false, points: [], at: null, baseline: null, knee: null, ink: paper ? (name) => PAPER[name] : colour });
  const evaluation = data.evaluations[state.evaluation];
  const models = evaluation ? chartModel() : [];
  const cost = costNamed(pareto.cost);
  const { points, baseline } = models.length ? gather(evaluation, models[0], cost) : { points: [], baseline: null };
  byName("chart").hidden = !points.length;
  if (!points.length) {
    byName("caption").textContent = evaluation
      ? "Nothing to draw: none of these runs has both this measurement and this cost."
      : "Nothing to draw: no run has been measured yet.";
    return drawFront([]);
  }
  const values = evaluation.againstFull || !baseline ? points.map((p) => p.y) : [...points.map((p) => p.y), baseline.y];
  const logarithmic = evaluation.better < 0 && Math.min(...values) > 0 && Math.max(...values) > LOG_BEYOND * Math.min(...values);
  const front = points.filter((point) => point.front);
  const bending = front.filter((point) => !point.beyond).map((point) => ({ x: cost.sign * point.x, loss: point.loss, point }));
  const bend = evaluation.better ? kneeOf(bending.sort((a, b) => a.x - b.x || b.loss - a.loss), logarithmic) : null;
  const knee = bend && bend.point;
  points.forEach((point, at) => { point.at = at; });
  Object.assign(pareto, { points, baseline, knee });
  const model = data.texts.model.levels[models[0]];
  const yTitle = `${evaluation.quantity}, ${evaluation.task}${evaluation.unit ? `, ${evaluation.unit}` : ""}`;
  const better = evaluation.better ? ` (better${evaluation.arrow})` : "";
  const plot = byName("plot");
  Plotly.react(plot, traces(points, logarithmic, cost), layout(`${cost.axis} (better ${cost.sign > 0 ? "←" : "→"})`, yTitle + better, cost, logarithmic, paper), CONFIG);
  if (!pareto.listens) {
    plot.on("plotly_hover", (event) => showTip(pareto.points[event.points[0].customdata]));
    plot.on("plotly_unhover", hideTip);
    plot.on("plotly_click", (event) => {
      const point = pareto.points[event.points[0].customdata];
      if (point) location.hash = link(point.run);
    });
  }
  Object.assign(pareto, { drawn: true, listens: true });
  const counts = [...new Set(points.map((point) => evaluation.of(point.run).n))].sort((a, b) => a - b);
  const many = counts.length > 2 ? `${counts[0]} to ${counts[counts.length - 1]}` : counts.join(" or ");
  const others = models.length > 1 ? ` Of ${models.length} models the one with most of these runs; choose one above.` : "";
  byName("caption").textContent = `${model}, ${evaluation.task}: ${evaluation.quantity} by protocol ${evaluation.protocol}, `
    + `${many} ${evaluation.items}, bars ±1 standard error, ${counted(points.length, "run")}.${evaluation.better ? " Faded: dominated." : ""}`
    + `${points.some((point) => point.beyond) ? " Behind the break of the axis: weights in full precision." : ""}${others}`;
  byName("plot").setAttribute("aria-label", `${yTitle} against ${cost.title}${evaluation.better ? `; ${front.length} of ${points.length} runs on the front` : ""}`);
  return drawFront(evaluation.better ? front : []);
}

/** What `first` is, and the runs whose marks it covers, beside its mark. */
function showTip(first) {
  if (!first) return;
  const { xaxis: usual, xaxis2, yaxis } = byName("plot")._fullLayout;
  const axisOf = (point) => (point.beyond ? xaxis2 : usual);
  const place = (point) => [axisOf(point)._offset + axisOf(point).d2p(point.x), yaxis._offset + yaxis.d2p(point.y)];
  const [x, y] = place(first);
  const xaxis = axisOf(first);
  const away = (point) => Math.hypot(place(point)[0] - x, place(point)[1] - y);
  const covered = shownPoints().filter((point) => point !== first && away(point) < SIZE / 2).sort((a, b) => b.front - a.front || away(a) - away(b));
  const shown = [first, ...covered.slice(0, TOGETHER - 1)];
  const more = covered.length - shown.length + 1;
  const tip = byName("tip");
  put(tip, shown.map((point) => h("p", {}, h("strong", {}, data.labels[point.run]), describe(point).map((line) => h("span", {}, line)))),
    more > 0 ? h("p", {}, `and ${counted(more, "other run")} here`) : null);
  tip.hidden = false;
  byName("chart").classList.add("over");
  byName("ring").hidden = x < xaxis._offset || x > xaxis._offset + xaxis._length || y < yaxis._offset || y > yaxis._offset + yaxis._length;
  const { clientWidth, clientHeight } = byName("chart");
  const left = x > clientWidth / 2 ? x - tip.offsetWidth - 14 : x + 14;
  tip.style.left = `${Math.max(0, Math.min(left, clientWidth - tip.offsetWidth))}px`;
  tip.style.top = `${Math.max(0, Math.min(y - tip.offsetHeight / 2, clientHeight - tip.offsetHeight))}px`;
  Object.assign(byName("ring").style, { left: `${x}px`, top: `${y}px` });
}

function hideTip() {
  byName("tip").hidden = byName("ring").hidden = true;
  byName("chart").classList.remove("over");
}

function drawFront(front) {
  const evaluation = data.evaluations[state.evaluation];
  const cost = costNamed(pareto.cost);
  byName("front-list").hidden = !front.length;
  if (!front.length) return;
  const rows = front.map((point) => h("tr", {},
    h("td", {}, h("a", { href: link(point.run) }, data.labels[point.run]), point === pareto.knee ? " (knee)" : ""),
    h("td", { class: "number" }, inUnit(point.x, cost.unit)), h("td", { class: "number" }, withError(evaluation.of(point.run)))));
  const heads = ["run", cost.title, evaluation.title].map((words, index) => h("th", { scope: "col", class: index ? "number" : null }, words));
  put(byName("front-list").querySelector("div"), h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows)));
}

const standing = (point) => (data.evaluations[state.evaluation].better ? [point.front ? "on the front" : "dominated"] : []);

/** Show a point's mark as if the pointer were on it, and say it; none where there is no point. */
function showPoint(point) {
  pareto.at = point;
  if (point) showTip(point);
  else hideTip();
  byName("spoken").textContent = point ? [data.labels[point.run], ...describe(point), ...standing(point)].join("; ") : "";
}

function keys(event) {
  const shown = shownPoints();
  const count = shown.length;
  const at = shown.indexOf(pareto.at);
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!count) return;
  if (step) showPoint(shown[at < 0 ? (step > 0 ? 0 : count - 1) : (at + step + count) % count]);
  else if (event.key === "Home") showPoint(shown[0]);
  else if (event.key === "End") showPoint(shown[count - 1]);
  else if (event.key === "Escape") showPoint(null);
  else if (event.key === "Enter" && at >= 0) location.hash = link(shown[at].run);
  else return;
  event.preventDefault();
}

function startChart() {
  const evaluations = data.evaluations.map((evaluation, index) => [index, evaluation.title]);
  const costs = COSTS.filter((name) => data.numbers[name].values.some((value) => value !== null));
  const measures = data.evaluations.map((evaluation, index) => [`e${index}`, evaluation.title]).filter((_, index) => data.evaluations[index].headline);
  if (!costs.includes(pareto.cost) && costs.length) [pareto.cost] = costs;
  const measure = (value) => { state.evaluation = Number(value); applyFilter(); };
  const save = () => { if (pareto.drawn) Plotly.downloadImage(byName("plot"), { format: "png", filename: "pareto", scale: 2 }); };
  put(
    byName("axes"),
    choice("Measurement", evaluations, 0, measure, { id: "evaluation", "data-wide": true }),
    choice("Cost", [...costs.map((name) => [name, data.numbers[name].title]), ...measures], pareto.cost, (name) => { pareto.cost = name; drawChart(); }, { id: "cost" }),
    h("button", { type: "button", onclick: save }, "Save as PNG"),
  );
  byName("chart").addEventListener("keydown", keys);
  byName("chart").addEventListener("blur", () => { if (pareto.at) showPoint(null); });
  state.listeners.push(() => drawChart());
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawChart());
  window.addEventListener("beforeprint", () => drawChart(true));
  window.addEventListener("afterprint", () => { drawChart(); resizeChart(); });
}

/** After the list was out of sight, when no size could be known. */
function resizeChart() {
  if (pareto.drawn) Plotly.Plots.resize(byName("plot"));
}
