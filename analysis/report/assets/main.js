// The overview, and which of the pages is shown.
function drawOverview() {
  const measuredRuns = new Set(data.evaluations.flatMap((evaluation) => evaluation.run)).size;
  const statuses = data.texts.status.levels.map((level, code) => [data.texts.status.codes.filter((each) => each === code).length, level]);
  const tiles = [
    [total, total === 1 ? "run" : "runs"], ...statuses.filter(([, level]) => level !== "done"), [measuredRuns, "measured"],
    [data.texts.model.levels.length, data.texts.model.levels.length === 1 ? "model" : "models"],
    [data.texts.algo.levels.filter((name) => name !== "none").length, "algorithms"], [data.evaluations.length, "metrics"],
  ];
  put(byName("overview"), h("ul", {}, tiles.map(([count, words]) => h("li", {}, h("strong", {}, count.toLocaleString("en")), h("span", {}, words)))), notes());
  byName("origin").textContent = `${data.store}, ${data.made}`;
}

/** What a reader has to know before comparing rows. */
function notes() {
  const found = [];
  if (!total) found.push("The database holds no runs yet.");
  const commits = new Set(data.environments.map((environment) => environment.git_commit));
  if (commits.size > 1) found.push(`The rows come from ${commits.size} versions of the code.`);
  if (data.environments.some((environment) => environment.git_dirty)) found.push("Some rows were made with uncommitted changes.");
  if (data.environments.length > 1) found.push(`They come from ${data.environments.length} environments: do not compare seconds and memory across them.`);
  const failed = Object.keys(data.failures).length;
  if (failed) found.push(`${counted(failed, "finished run")} lack a measurement that failed; each run's page says why.`);
  if (data.superseded) found.push(`${counted(data.superseded, "attempt")} superseded by later ones: not shown.`);
  if (data.layers.left_out) found.push(`To keep the file small, ${counted(data.layers.left_out, "older run")} come without maps of layers.`);
  return found.length ? h("p", { class: "caption" }, found.join(" ")) : null;
}

let returnTo = 0;

function route() {
  const parts = /^#run-(\d+)(?:-(\d+))?$/.exec(location.hash);
  const run = parts ? byId.get(Number(parts[1])) : undefined;
  const other = parts && parts[2] ? byId.get(Number(parts[2])) : undefined;
  const wasList = !byName("list").hidden;
  if (run === undefined) {
    byName("run").hidden = true;
    byName("list").hidden = false;
    document.title = "qbench report";
    if (!wasList) {
      window.scrollTo(0, returnTo);
      resizeChart();
    }
    return;
  }
  if (wasList) returnTo = window.scrollY;
  const choosing = document.activeElement === byName("beside");
  drawRun(run, other === undefined ? null : other);
  byName("list").hidden = true;
  byName("run").hidden = false;
  document.title = `${data.labels[run]} · qbench report`;
  if (choosing) {
    byName("beside").focus(); // arrow keys go on from what they chose
    return;
  }
  window.scrollTo(0, 0);
  byName("run").focus({ preventScroll: true });
}

drawOverview();
drawFilters();
startChart();
startTable();
drawSections();
applyFilter();
window.addEventListener("hashchange", route);
route();
document.documentElement.dataset.ready = "yes";
