// Maps of a run's layers: a row per module, a column per block, colour by value.
const RAMP = ["#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725"]; // viridis
const MOST_CELLS = 6000;

function mapsOf(run) {
  const found = data.layers.runs[run] || {};
  return Object.entries(found).map(([name, packed]) => {
    const bytes = Uint8Array.from(atob(packed.values), (character) => character.charCodeAt(0));
    const values = Array.from(new Float32Array(bytes.buffer));
    const modules = packed.modules.map((module) => data.layers.modules[module]);
    return merged({ name, title: data.layers.titles[name], blocks: packed.blocks, modules, values });
  });
}

/** Experts of a mixture in one row, the largest value of each block, where single ones would be too many. */
function merged(map) {
  if (map.modules.length * map.blocks.length <= MOST_CELLS) return map;
  const width = map.blocks.length;
  const rows = new Map();
  map.modules.forEach((module, line) => {
    const name = module.replace(/\.\d+(?=\.|$)/g, ".*");
    const row = rows.get(name) || new Array(width).fill(NaN);
    for (let block = 0; block < width; block += 1) {
      const value = map.values[line * width + block];
      if (!(row[block] >= value)) row[block] = value;
    }
    rows.set(name, row);
  });
  return { ...map, modules: [...rows.keys()], values: [...rows.values()].flat(), note: "Experts in one row: the largest of each block." };
}

function rampColour(share) {
  const at = Math.max(0, Math.min(1, share)) * (RAMP.length - 1);
  const low = Math.min(RAMP.length - 2, Math.floor(at));
  const mix = [1, 3, 5].map((start) => {
    const [a, b] = [RAMP[low], RAMP[low + 1]].map((hex) => parseInt(hex.slice(start, start + 2), 16));
    return Math.round(a + (b - a) * (at - low));
  });
  return `rgb(${mix.join(",")})`;
}

/** The scale that several maps of one name share; logarithmic where all values are positive and differ by much. */
function scaleOf(maps) {
  const known = maps.flatMap((map) => map.values).filter((value) => Number.isFinite(value));
  let [low, high] = [Infinity, -Infinity];
  for (const value of known) { low = Math.min(low, value); high = Math.max(high, value); }
  const logarithmic = low > 0 && high > 5 * low;
  const place = logarithmic ? Math.log : (value) => value;
  const share = (value) => (high > low ? (place(value) - place(low)) / (place(high) - place(low)) : 0.5);
  return { low, high, share, logarithmic };
}

const rounded = (value) => String(Number(value.toPrecision(3)));

function drawMap(map, scale) {
  const readout = h("p", { class: "readout", "aria-live": "polite" });
  const width = map.blocks.length;
  const say = (line, column) => {
    const value = map.values[line * width + column];
    const words = Number.isFinite(value) ? plain(value) : "not recorded";
    readout.textContent = `block ${map.blocks[column]} ${map.modules[line]}: ${words}`;
  };
  const rows = map.modules.map((module, line) => h("tr", {}, h("th", { scope: "row" }, module.replace(/\.weight$/, "") || "block"), map.blocks.map((block, column) => {
    const value = map.values[line * width + column];
    const known = Number.isFinite(value);
    const cell = h("td", { class: known ? null : "none", tabindex: line || column ? "-1" : "0", "data-cell": `${line},${column}`, "aria-label": `block ${block} ${module}: ${known ? plain(value) : "none"}` });
    if (known) cell.style.backgroundColor = rampColour(scale.share(value));
    return cell;
  })));
  const every = Math.ceil(width / 40);
  const heads = map.blocks.map((block, column) => h("th", { scope: "col" }, column % every ? "" : String(block)));
  const grid = h("table", { class: "map" }, h("thead", {}, h("tr", {}, h("th", {}, "block"), heads)), h("tbody", {}, rows));
  const at = (event) => (event.target.dataset.cell || "").split(",").map(Number);
  const look = (event) => { const [line, column] = at(event); if (column >= 0) say(line, column); };
  grid.addEventListener("mouseover", look);
  grid.addEventListener("focusin", look);
  grid.addEventListener("click", look);
  grid.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    const [line, column] = at(event);
    const next = step && grid.querySelector(`[data-cell="${line + step[0]},${column + step[1]}"]`);
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    event.preventDefault();
  });
  const ramp = h("span", { class: "ramp", role: "img", "aria-label": "colour scale" });
  ramp.style.background = `linear-gradient(to right, ${RAMP.join(",")})`;
  const legend = h("p", { class: "caption" }, rounded(scale.low), " ", ramp, ` ${rounded(scale.high)}${scale.logarithmic ? ", logarithmic" : ""}. ${map.note || ""}`);
  return [h("div", { class: "scroll" }, grid), legend, readout];
}
