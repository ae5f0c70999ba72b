// The page of one run, or of two side by side.
const OFFERED = 500; // runs to choose from: a longer list is slow to open

function facts(pairs) {
  const rows = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value)));
  return rows.length ? h("table", { class: "facts" }, h("tbody", {}, rows)) : h("p", { class: "quiet" }, "nothing stored");
}

function measurements(run) {
  const heads = ["measurement", "value", "Δ from full precision", "noise of Δ", "n"]
    .map((words, index) => h("th", { scope: "col", class: index ? "number" : null }, words));
  const rows = data.evaluations.filter((evaluation) => evaluation.at.has(run)).map((evaluation) => {
    const found = evaluation.of(run);
    const shown = evaluation.againstFull ? null : found.delta;
    const delta = shown === null ? "" : signed(shown, found.deltaStderr) + (found.deltaStderr ? ` ± ${brief(found.deltaStderr)}` : "");
    return h("tr", {}, h("td", { class: "text" }, evaluation.title),
      ...[withError(found), delta, brief(found.noise), String(found.n)].map((words) => h("td", { class: "number" }, words)));
  });
  if (!rows.length) return h("p", { class: "quiet" }, "No measurement is stored for this run.");
  return h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows)));
}

const pairsOf = (numbers) => numbers.map((index) => data.pairs[index]);

function provenance(run) {
  const environment = data.environments[data.environment[run]];
  const dirty = { true: " with uncommitted changes", false: "", null: "" }[String(environment.git_dirty)];
  const versions = Object.entries(environment.versions || {}).map(([name, version]) => `${name} ${version}`).join(", ");
  return facts([
    ["key", data.keys[run]], ["status", text("status", run)], ["attempts at this key", String(data.attempts[run])],
    ["started", text("created", run)], ["finished", text("finished", run)], ["code", environment.git_commit ? environment.git_commit + dirty : "outside a checkout"],
    ["machine", `${environment.platform}, ${environment.cpu}, ${counted(environment.threads, "thread")}`],
    ["GPU", environment.gpu], ["driver", environment.driver], ["versions", versions],
    ["fingerprint of the codes", text("codes_sha256", run)],
    ...(data.artifacts[run] || []).map((each) => [`artifact (${each.kind})`, `${each.path}, ${inUnit(each.bytes, "bytes")}${each.sha256 ? `, ${each.sha256}` : ""}`]),
  ]);
}

function settings(run, other) {
  const pairs = pairsOf(data.specs[run]);
  if (other === null) {
    return h("details", {}, h("summary", {}, `All ${pairs.length} settings`), facts(pairs));
  }
  const theirs = new Map(pairsOf(data.specs[other]));
  const mine = new Map(pairs);
  const paths = [...new Set([...mine.keys(), ...theirs.keys()])].filter((path) => mine.get(path) !== theirs.get(path));
  const rows = paths.map((path) => h("tr", {}, h("th", { scope: "row" }, path), ...[mine, theirs].map((side) => h("td", { class: "text" }, side.has(path) ? side.get(path) : "–"))));
  return rows.length ? h("div", { class: "scroll" }, h("table", {}, h("tbody", {}, rows))) : h("p", {}, "The settings are the same.");
}

function troubles(run) {
  const found = [];
  if (text("error", run)) found.push(h("h3", {}, "Error"), h("p", { class: "bad" }, text("error", run)));
  if (text("trace", run)) found.push(h("details", {}, h("summary", {}, "Trace"), h("pre", {}, text("trace", run))));
  for (const failure of data.failures[run] || []) {
    found.push(h("h3", {}, `Failed measurement: ${failure.task}, ${failure.protocol}`), h("p", { class: "bad" }, `${failure.error_type}: ${failure.message}`),
      h("details", {}, h("summary", {}, "Trace"), h("pre", {}, failure.trace)));
  }
  return found;
}

function costs(run) {
  const numbers = Object.entries(data.numbers).map(([name, column]) => [column.title, inUnit(number(name, run), column.unit)]);
  const texts = ["model", "algo", "weight_format", "act_format", "kv_format", "calib", "dtype", "device", "source"].map((name) => [data.texts[name].title, text(name, run)]);
  return h("div", { class: "pair" }, h("section", {}, facts(texts)), h("section", {}, facts(numbers)));
}

function layerMaps(run, other) {
  const sides = (other === null ? [run] : [run, other]).map((side) => [side, mapsOf(side)]);
  const names = [...new Set(sides.flatMap(([, maps]) => maps.map((map) => map.name)))];
  if (!names.length) return [h("p", { class: "quiet" }, data.layers.left_out ? "No layer metrics in this file (the newest runs have them)." : "No layer metrics are stored for this run.")];
  return names.flatMap((name) => {
    const drawn = sides.map(([side, maps]) => [side, maps.find((map) => map.name === name)]).filter(([, map]) => map);
    const scale = scaleOf(drawn.map(([, map]) => map));
    const maps = other === null
      ? drawMap(drawn[0][1], scale)
      : [h("div", { class: "pair" }, drawn.map(([side, map]) => h("section", {}, h("p", { class: "caption" }, data.labels[side]), drawMap(map, scale))))];
    return [h("h3", {}, drawn[0][1].title), ...maps];
  });
}

function besides(run, other) {
  const near = [...Array(total).keys()].filter((each) => each !== run && data.texts.model.codes[each] === data.texts.model.codes[run]);
  const offered = near.slice(-OFFERED);
  const cut = offered.length < near.length ? ` (the newest ${OFFERED} of ${near.length.toLocaleString("en")} runs of this model)` : "";
  if (other !== null && !offered.includes(other)) offered.push(other);
  const options = [["", "nothing"], ...offered.map((each) => [String(data.ids[each]), `${data.labels[each]} #${data.ids[each]}`])];
  // In the place of the address before: going back need not pass all that arrow keys went through.
  const go = (id) => location.replace(link(run) + (id ? `-${id}` : ""));
  return choice(`Beside${cut}`, options, other === null ? "" : String(data.ids[other]), go, { "data-wide": true, id: "beside" });
}

function drawRun(run, other) {
  const sides = other === null ? [run] : [run, other];
  const each = (draw) => (other === null ? draw(run) : h("div", { class: "pair" }, sides.map((side) => h("section", {}, h("p", { class: "caption" }, data.labels[side]), draw(side)))));
  put(
    byName("run"),
    h("p", { class: "screen" }, h("a", { href: "#list" }, "← All runs")),
    h("h1", {}, other === null ? data.labels[run] : `${data.labels[run]} beside ${data.labels[other]}`),
    h("p", { class: "caption" }, sides.map((side) => `run #${data.ids[side]}`).join(", ")),
    h("div", { class: "controls" }, besides(run, other)),
    ...sides.flatMap(troubles),
    h("h2", {}, "Measurements"), each(measurements),
    h("h2", {}, "What it is and what it cost"), each(costs),
    h("h2", {}, "Layers"), ...layerMaps(run, other).filter(Boolean),
    h("h2", {}, "Provenance"), each(provenance),
    h("h2", {}, other === null ? "Settings" : "Settings that differ"), settings(run, other),
    h("h2", {}, "Seconds of each phase"), each((side) => facts(pairsOf(data.phases[side]).map(([name, value]) => [name, plain(Number(value))]))),
  );
}
