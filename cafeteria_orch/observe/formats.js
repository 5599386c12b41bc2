"use strict";
// How values are written, and what puts them into the document: as text, never as markup, since some
// of it comes from clients.
const byId = id => document.getElementById(id);
const whole = new Intl.NumberFormat("en");
const rough = new Intl.NumberFormat("en", {maximumSignificantDigits: 2});
const short = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 3});

function node(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

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

const clock = seconds => new Date(seconds * 1000).toLocaleTimeString("en-GB");
const moment = seconds => {
  const then = new Date(seconds * 1000), today = new Date().toDateString() === then.toDateString();
  return (today ? "" : then.toLocaleDateString("sv") + " ") + clock(seconds);
};
function span(seconds) {
  return seconds < 3600 ? `${seconds / 60} min` : `${seconds / 3600} h`;
}
