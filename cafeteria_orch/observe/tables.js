"use strict";
// The tables: their columns, and how rows are put into them.
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
  outcome("in progress", row => row.in_progress),
  {head: "age", of: row => age(row.age), number: true},
];
const TABLE_NAMES = ["menu_items", "stores", "transaction_items", "transactions", "users"];
const notComplete = row => Object.keys(row.tables).filter(name => !row.tables[name].complete);
const AGENCY = [
  head("agency", row => row.agency === null ? "unknown" : String(row.agency)),
  text("last seen", row => moment(row.last_seen)),
  {head: "complete", of: row => row.complete ? "all" : notComplete(row).length ? `not ${notComplete(row).join(", ")}` : "nothing sent",
   tag: row => row.complete ? "good" : "warn", className: "wide"},
  failure("failed", row => row.failed),
  number("connections", row => row.connections),
  ...TABLE_NAMES.map(name => ({
    head: name.replace("_", " "), number: true, isOptional: true, isEmpty: row => !row.tables[name],
    of: row => row.tables[name] ? short.format(row.tables[name].rows) : "–",
  })),
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
      if (column.isEmpty && column.isEmpty(row)) cell.classList.add("zero", ...(column.isOptional ? ["optional"] : []));
      else if (column.isFailure) cell.classList.add("failed");
      if (column.tag) cell.append(node("span", `tag ${column.tag(row)}`, column.of(row)));
      else cell.append(node("span", "", column.of(row)));
      line.append(cell);
    }
  }
  table.tBodies[0].replaceWith(body);
  table.hidden = !rows.length;
}
