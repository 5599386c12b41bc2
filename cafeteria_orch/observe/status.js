"use strict";
// Some of the text comes from clients: it is inserted as text, never as markup.
const REFRESH = 2000, TIMEOUT = 5000, STALE = 10, MAX_HISTORY_AGE = 60;
const byId = id => document.getElementById(id);
const whole = new Intl.NumberFormat("en");
const rough = new Intl.NumberFormat("en", {maximumSignificantDigits: 2});
const short = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 3});
const RANGES = {"10m": "10 min", "1h": "1 h", "24h": "24 h"};
let latest = null, heardAt = 0, past = null, pastAt = 0, timer = null;
let range = RANGES[location.hash.slice(1)] ? location.hash.slice(1) : "10m";

function bytes(count) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (count < 1000) return `${count < 10 && unit !== "B" ? count.toFixed(1) : Math.round(count)} ${unit}`;
    count /= 1000;
  }
  return `${count.toFixed(1)} TB`;
}
function age(seconds) {
  seconds = Math.max(0, Math.round(seconds));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor(seconds % 3600 / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor(seconds % 86400 / 3600)} h`;
}
const rate = value => short.format(value);
const percent = value => `${short.format(100 * value)} %`;
function duration(seconds) {
  if (seconds === 0) return "0";
  if (seconds >= 10) return "≥ 10 s";
  const [factor, unit] = seconds < 0.001 ? [1e6, "µs"] : seconds < 1 ? [1e3, "ms"] : [1, "s"];
  return `${rough.format(seconds * factor)} ${unit}`;
}

// A column: its heading, a function that makes the cell of a row, and the cell's class. One that
// is optional is left out until a row has something in it.
const text = (head, of) => ({head, of});
const number = (head, of) => ({head, of: row => whole.format(of(row)), number: true, isEmpty: row => of(row) === 0});
const outcome = (head, of) => ({...number(head, of), isOptional: true});
const failure = (head, of) => ({...outcome(head, of), isFailure: true});
const known = value => value === null ? "–" : String(value);
const optional = (head, of) => ({head, of: row => known(of(row)), isOptional: true, isEmpty: row => of(row) === null});
const head = (title, of) => ({head: title, of, isHead: true});
const TABLE = [
  head("table", row => row.table),
  number("received", row => row.received),
  outcome("committed", row => row.committed),
  outcome("processed", row => row.processed),
  outcome("duplicate", row => row.duplicate),
  failure("rejected", row => row.rejected),
  failure("try again", row => row.try_again),
  failure("malformed", row => row.malformed),
  outcome("in progress", row => row.in_progress),
  number("rows", row => row.rows),
];
const COMPLETE = [
  head("table", row => row.table),
  {head: "complete", of: row => row.complete === row.senders ? "all" : `${row.complete} of ${row.senders}`,
   tag: row => row.complete === row.senders ? "good" : "warn"},
  number("senders", row => row.senders),
  number("batches", row => row.batches),
  number("rows", row => row.rows),
];
const CONNECTION = [
  head("ip", row => row.ip),
  optional("name", row => row.name),
  optional("agency", row => row.agency),
  optional("client", row => row.client && row.client.slice(0, 8)),
  optional("table", row => row.table),
  number("batches", row => row.batches),
  number("rows", row => row.rows),
  {head: "read", of: row => bytes(row.bytes), number: true},
  number("in progress", row => row.in_progress),
  {head: "age", of: row => age(latest.time - row.connected_at), number: true},
];
const isInStep = row => row.sync_state === "sync" || row.sync_state === "quorum";
const STANDBY = [
  head("standby", row => row.name),
  {head: "state", of: row => known(row.state), tag: row => row.state === "streaming" ? "good" : "warn"},
  text("awaited", row => row.sync_state === null ? "–" : `${isInStep(row) ? "yes" : "no"} (${row.sync_state})`),
  {head: "lag", of: row => row.lag_bytes === null ? "–" : bytes(row.lag_bytes), number: true},
  {head: "lag in time", of: row => row.lag_seconds === null ? "–" : `${row.lag_seconds.toFixed(3)} s`, number: true},
];
const LIMIT = [head("limit", row => row[0]), number("hits", row => row[1])];
const PROBLEM = [
  text("last", row => moment(row.time)),
  optional("first", row => row.count > 1 ? moment(row.first_time) : null),
  {...number("events", row => row.count), isOptional: true, isEmpty: row => row.count === 1},
  {head: "level", of: row => row.level, tag: row => row.level === "warn" ? "warn" : "bad"},
  {head: "message", of: row => row.text, className: "message"},
];

// A column that was shown once stays: it would come and go with what is in progress.
const shownColumns = new Set();
function fill(id, all, rows) {
  const table = byId(id);
  for (const column of all)
    if (!column.isOptional || rows.some(row => !column.isEmpty(row))) shownColumns.add(column);
  const columns = all.filter(column => shownColumns.has(column));
  if (!table.tHead.rows.length || table.tHead.rows[0].cells.length !== columns.length) {
    const line = document.createElement("tr");
    // On a phone the layout is not that of a table; screen readers still need one.
    table.setAttribute("role", "table");
    line.setAttribute("role", "row");
    for (const column of columns) {
      const cell = node("th", column.number ? "number" : "", column.head);
      cell.scope = "col";
      cell.setAttribute("role", "columnheader");
      line.append(cell);
    }
    table.tHead.replaceChildren(line);
  }
  const body = document.createElement("tbody");
  for (const row of rows) {
    const line = body.insertRow();
    line.setAttribute("role", "row");
    for (const column of columns) {
      const cell = node(column.isHead ? "th" : "td", column.className || (column.number ? "number" : ""));
      cell.setAttribute("role", column.isHead ? "rowheader" : "cell");
      if (column.isHead) cell.scope = "row"; else cell.dataset.label = column.head;
      if (column.isEmpty && column.isEmpty(row)) cell.classList.add("zero");
      else if (column.isFailure) cell.classList.add("failed");
      if (column.tag) cell.append(node("span", `tag ${column.tag(row)}`, column.of(row)));
      else cell.append(node("span", "", column.of(row)));
      line.append(cell);
    }
  }
  table.tBodies[0].replaceWith(body);
  table.hidden = !rows.length;
}

const QUANTILES = [["p50", ""], ["p95", "second"], ["p99", "third"]];
const times = (title, of) => ({
  title, format: duration, least: 0.001, summary: history => history.latency && Object.values(history.latency[of]),
  lines: QUANTILES.map(([name, className]) => ({column: `${of}_${name}`, name, className})),
});
const isKnown = column => past.points.some(point => point[past.columns.indexOf(column)] !== null);
const always = () => true;
const CHARTS = [
  [{title: "rows accepted", lines: [{column: "rows"}], format: rate, unit: "/s", least: 10}, always],
  [{title: "batches", format: rate, unit: "/s", least: 1, lines: [
    {column: "batches", name: "accepted"}, {column: "failed", name: "failed", className: "third"}]}, always],
  [{title: "bytes read", lines: [{column: "bytes"}], format: bytes, unit: "/s", least: 1000}, always],
  [times("batch time", "batch"), () => latest.store || isKnown("batch_p50")],
  [times("commit time", "commit"), () => latest.store],
  [{title: "processor, of one core", lines: [{column: "cpu"}], format: percent, least: 1}, always],
  [{title: "memory", lines: [{column: "resident_bytes"}], format: bytes, least: 1e6}, () => isKnown("resident_bytes")],
  [{title: "free disk", lines: [{column: "free_bytes"}], format: bytes, least: 1e6}, () => isKnown("free_bytes")],
].map(([spec, isShown]) => [new Chart(spec), isShown]);
byId("charts").append(...CHARTS.map(([chart]) => chart.element));

for (const [name, label] of Object.entries(RANGES)) {
  const choice = node("label"), input = node("input");
  Object.assign(input, {type: "radio", name: "range", value: name, checked: name === range});
  input.addEventListener("change", () => {
    range = name;
    history.replaceState(null, "", `#${name}`);
    refresh();
  });
  choice.append(input, label);
  byId("ranges").append(choice);
}

function figure(label, value, detail, className) {
  const box = node("div"), figures = node("dd", className || "", value);
  if (detail) figures.append(node("small", "", detail));
  box.append(node("dt", "", label), figures);
  return box;
}
const STATES = {ready: "good", starting: "warn", draining: "warn", refusing: "bad"};
const STATE_TEXTS = {
  ready: "ready", starting: "starting", draining: "draining: it is stopping", refusing: "the store refuses batches",
};
const REASONS = {
  starting: "The server is starting: it takes no batches yet.",
  draining: "The server is stopping: it finishes the batches in progress and takes no new connections.",
};

function showHistory() {
  for (const [chart, isShown] of CHARTS) {
    chart.fill(past);
    chart.element.hidden = !isShown();
  }
  byId("rates-note").textContent = past.points.length ? "" : "The first point comes after five seconds.";
}

function show() {
  const {tables, connections, completeness, problems, store, database} = latest;
  const server = database && database.server, standbys = server ? server.standbys : [];
  byId("about").textContent = `${latest.node} · version ${latest.version} · up ${age(latest.time - latest.started_at)} · as of ${clock(latest.time)}`;
  const longest = past && past.latency ? past.latency.batch.p95 : null;
  const sum = name => tables.reduce((sum, row) => sum + row[name], 0);
  byId("figures").replaceChildren(
    figure("connections", whole.format(connections.open), `of ${short.format(connections.accepted)} accepted`),
    figure("batches", short.format(sum("committed") + sum("processed")), `+ ${short.format(sum("duplicate"))} duplicates`),
    figure("rows", short.format(sum("rows")), "accepted"),
    figure("failed", short.format(sum("failed")), `of ${short.format(sum("received"))}`, sum("failed") ? "failed" : ""),
    figure("in progress", whole.format(sum("in_progress")), bytes(latest.in_flight_bytes)),
    figure("batch time", longest === null ? "–" : duration(longest), `p95 of ${RANGES[past ? past.range : range]}`),
    figure("read", bytes(latest.received_bytes), "from clients"),
    ...(store && store.file === null ? [figure("store", server ? server.version : "–", "PostgreSQL")]
      : store ? [figure("store", bytes(store.file), `+ ${bytes(store.wal)} WAL`)] : [figure("store", "none")]),
  );
  fill("tables", TABLE, tables);
  byId("complete-section").hidden = !store;
  const complete = completeness && completeness.tables;
  fill("complete", COMPLETE, Object.entries(complete || {}).map(([table, totals]) => ({table, ...totals})));
  byId("complete").caption.textContent = completeness ?
    `The whole store, as of ${clock(completeness.asked_at)}; a table is complete when all its senders have said so` : "";
  byId("complete-note").textContent =
    !completeness ? "Waiting for the store." :
    !complete ? `At ${clock(completeness.asked_at)} the store did not answer within two seconds; query its view ingest_status.` :
    Object.keys(complete).length ? "" : "The store is empty.";
  byId("database-section").hidden = !database || database.kind !== "postgresql";
  byId("database-about").textContent = server ?
    `PostgreSQL ${server.version} at ${server.host}:${server.port}, ${server.is_primary ? "the primary" : "a standby"}; ` +
    (server.is_synchronous ? "a commit waits for a standby" : "commits wait for no standby") : "";
  fill("standbys", STANDBY, standbys);
  byId("standbys").caption.textContent = server ?
    `Its standbys, as of ${clock(database.asked_at)}; lag: what is not on a standby's disk yet` : "Its standbys";
  byId("database-note").textContent =
    !database || database.asked_at === null ? "Waiting for the database." :
    !server ? `At ${clock(database.asked_at)} the database's server did not answer.` :
    standbys.some(row => row.state === null) ? "The rest is not shown to the server's user: GRANT pg_monitor." :
    server.is_synchronous && !standbys.some(isInStep) ? "No standby that commits wait for is there: nothing is acknowledged." :
    standbys.length ? "" : "No standbys.";
  fill("connections", CONNECTION, connections.shown);
  byId("connections").caption.textContent = connections.shown.length < connections.open ?
    `The ${connections.shown.length} of ${connections.open} that sent most` : "All open connections; those that sent most come first";
  byId("connections-note").textContent = connections.open ? "" : "No connections.";
  const limits = Object.entries(latest.limits);
  byId("limits-section").hidden = !limits.length;
  fill("limits", LIMIT, limits);
  fill("problems", PROBLEM, problems);
  byId("problems").caption.textContent = "By their kinds, the last first, with the text of the last event; the log has all";
  byId("problems-help").hidden = !problems.length;
  byId("problems-note").textContent = problems.length ? "" : "None since the start.";
}

function judge() {
  const silence = (performance.now() - heardAt) / 1000, isStale = latest !== null && silence > STALE;
  const state = byId("state"), banner = byId("banner");
  const say = (reason, remedy) => {
    byId("banner-reason").textContent = reason;
    byId("banner-remedy").textContent = remedy;
  };
  const lost = "Check that its process runs (systemctl status cafeorch), and the network up to it.";
  if (latest === null) {
    state.textContent = "loading";
    banner.hidden = silence < STALE;
    say("The server does not answer.", lost);
    return;
  }
  state.className = isStale ? "bad" : STATES[latest.state] || "warn";
  state.textContent = isStale ? "no answer" : STATE_TEXTS[latest.state] || latest.state;
  banner.className = isStale || latest.state === "refusing" ? "bad" : "warn";
  banner.hidden = !isStale && latest.reason === null;
  if (isStale) say(`The server has not answered for ${age(silence)}. The figures are from ${clock(latest.time)}.`, lost);
  else say(REASONS[latest.state] || latest.reason || "", latest.remedy || "");
  document.title = `${isStale ? "no answer" : latest.state} – ${latest.node} – cafeteria_orch`;
}

async function refresh() {
  const abort = new AbortController(), timeout = setTimeout(() => abort.abort(), TIMEOUT);
  // The history is long, and asked for only when it can have a new point.
  const isOld = past === null || past.range !== range ||
    performance.now() - pastAt >= 1000 * Math.min(past.interval, MAX_HISTORY_AGE);
  try {
    const response = await fetch(`status.json?range=${isOld ? range : "none"}`, {cache: "no-store", signal: abort.signal});
    if (!response.ok) throw new Error(String(response.status));
    latest = await response.json();
    heardAt = performance.now();
    if (latest.history && latest.history.range === range) {
      past = latest.history;
      pastAt = heardAt;
      showHistory();
    }
    show();
  } catch (error) {
    console.warn(error);
  }
  clearTimeout(timeout);
  judge();
  // Whoever has chosen another range meanwhile has asked twice: one of the two goes on.
  clearTimeout(timer);
  timer = setTimeout(refresh, REFRESH);
}
setInterval(judge, 1000);
refresh();
