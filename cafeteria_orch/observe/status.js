"use strict";
// Asks the server again and again, and shows what it says.
const REFRESH = 2000, TIMEOUT = 5000, STALE = 10, MAX_HISTORY_AGE = 60;
const RANGES = {"10m": "10 min", "1h": "1 h", "24h": "24 h"};
let latest = null, heardAt = 0, past = null, pastAt = 0, timer = null;
let range = RANGES[location.hash.slice(1)] ? location.hash.slice(1) : "10m";

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
  // They are many, and come with the history.
  if ("agencies" in latest) showAgencies(latest.agencies);
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
  fill("connections", CONNECTION, connections.shown.map(row => ({...row, age: latest.time - row.connected_at})));
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

function showAgencies(agencies) {
  const table = byId("agencies");
  byId("agencies-section").hidden = !agencies;
  // There may be hundreds, and they change when the store is asked.
  if (!agencies || table.dataset.askedAt === String(agencies.asked_at)) return;
  table.dataset.askedAt = agencies.asked_at;
  const shown = agencies.shown || [];
  fill("agencies", AGENCY, [...shown].sort((one, other) => one.complete - other.complete));
  table.caption.textContent = (shown.length < agencies.count ?
    `The ${shown.length} of ${whole.format(agencies.count)} that were last seen` : "All agencies") +
    `, with their rows by table; the whole store, as of ${clock(agencies.asked_at)}. Those that are not complete come first, ` +
    "then those last seen";
  byId("agencies-note").textContent =
    !agencies.shown ? `At ${clock(agencies.asked_at)} the store did not answer within two seconds; ask it by cafeorch store status.` :
    shown.length ? "" : "The store is empty.";
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
