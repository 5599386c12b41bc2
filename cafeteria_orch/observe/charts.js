"use strict";
// Charts over time. They are made once, and filled again and again: what is pointed at stays so.
const SVG = "http://www.w3.org/2000/svg", WIDTH = 400, HEIGHT = 100;

function drawn(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value) + 1e-9);
  return [1, 2, 5, 10].find(step => step * power >= value * (1 - 1e-9)) * power;
}

// A title, the format of values and their unit, the least value at the top of the axis, and lines:
// each has a column of the history, a name if there are several, and a class. What `summary` returns
// stands in the place of the newest values.
class Chart {
  static all = [];
  static pointed = null;

  constructor({title, lines, format, unit = "", least, summary = () => null}) {
    Object.assign(this, {title, lines, format, unit, least, summary, points: []});
    this.element = node("figure");
    this.caption = node("figcaption");
    this.top = node("span");
    this.middle = node("span");
    this.begin = node("span");
    this.half = node("span");
    this.image = drawn("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": true});
    this.cursor = node("div", "cursor");
    this.readout = node("div", "readout");
    this.plot = node("div", "plot");
    this.plot.tabIndex = 0;
    // Arrow keys choose a point, and its values are read aloud.
    for (const [name, value] of Object.entries({role: "slider", "aria-readonly": true, "aria-valuemin": 0}))
      this.plot.setAttribute(name, value);
    const frame = node("div", "frame"), y = node("div", "y"), x = node("div", "x");
    y.append(this.top, this.middle, node("span", "", format(0)));
    x.append(this.begin, this.half, node("span", "", "now"));
    this.plot.append(this.image, this.cursor, this.readout);
    frame.append(y, this.plot, x);
    this.element.append(this.caption, frame);
    this.listen();
    Chart.all.push(this);
    Chart.mark();
  }

  listen() {
    const point = event => {
      const {left, width} = this.plot.getBoundingClientRect();
      this.point(this.end - this.seconds * (1 - (event.clientX - left) / width));
    };
    this.plot.addEventListener("pointermove", point);
    this.plot.addEventListener("pointerdown", point);
    // A finger leaves when it is lifted: what it has touched stays until the next touch elsewhere.
    this.plot.addEventListener("pointerleave", event => {
      if (event.pointerType === "mouse") Chart.release();
    });
    this.plot.addEventListener("focus", () => { if (!Chart.pointed) this.point(this.end); });
    // The next chart may be touched before this one loses the focus.
    this.plot.addEventListener("blur", () => { if (Chart.pointed && Chart.pointed.chart === this) Chart.release(); });
    this.plot.addEventListener("keydown", event => {
      const last = this.points.length - 1, now = Math.max(0, this.index);
      const index = {ArrowLeft: now - 1, ArrowRight: now + 1, ArrowDown: now - 1, ArrowUp: now + 1,
        PageDown: now - 10, PageUp: now + 10, Home: 0, End: last}[event.key];
      if (event.key === "Escape") Chart.release();
      if (index === undefined || last < 0) return;
      event.preventDefault();
      this.point(this.points[Math.min(last, Math.max(0, index))].time);
    });
  }

  fill(history) {
    const at = this.lines.map(line => history.columns.indexOf(line.column));
    const newest = history.points.length ? history.points[history.points.length - 1][0] : 0;
    this.end = newest;
    this.seconds = history.seconds;
    this.points = history.points.filter(point => point[0] >= newest - history.seconds)
      .map(point => ({time: point[0], values: at.map(index => point[index])}));
    const top = ceiling(Math.max(this.least, ...this.points.flatMap(point => point.values)));
    this.top.textContent = this.format(top);
    this.middle.textContent = this.format(top / 2);
    this.begin.textContent = `${span(history.seconds)} ago`;
    this.half.textContent = span(history.seconds / 2);
    this.scale = value => HEIGHT * (1 - value / top);
    this.draw();
    this.describe(history);
    Chart.mark();
  }

  place(time) {
    return WIDTH * (1 - (this.end - time) / this.seconds);
  }

  draw() {
    const lines = [0, HEIGHT / 2, HEIGHT].map(y =>
      drawn("line", {class: "grid", x1: 0, x2: WIDTH, y1: y, y2: y, "vector-effect": "non-scaling-stroke"}));
    const paths = this.lines.map((line, index) => {
      let path = "", wasKnown = false;
      for (const {time, values} of this.points) {
        const value = values[index], isKnown = value !== null;
        if (isKnown) path += `${wasKnown ? "L" : "M"}${this.place(time).toFixed(1)} ${this.scale(value).toFixed(1)}${wasKnown ? "" : "h0"}`;
        wasKnown = isKnown;
      }
      return drawn("path", {class: `line ${line.className || ""}`, d: path, "vector-effect": "non-scaling-stroke"});
    });
    const areas = [];
    if (this.lines.length === 1 && this.points.length > 1) {
      const known = this.points.filter(point => point.values[0] !== null);
      const line = known.map(({time, values}) => `${this.place(time).toFixed(1)},${this.scale(values[0]).toFixed(1)}`);
      if (known.length) areas.push(drawn("polygon", {class: "area", points:
        `${this.place(known[0].time)},${HEIGHT} ${line.join(" ")} ${this.place(known[known.length - 1].time)},${HEIGHT}`}));
    }
    this.image.replaceChildren(...lines, ...areas, ...paths.reverse());
  }

  describe(history) {
    const last = this.points.length ? this.points[this.points.length - 1].values : this.lines.map(() => null);
    const values = this.summary(history) || last;
    const shown = node("div");
    this.lines.forEach((line, index) => {
      const entry = node("span");
      if (this.lines.length > 1) entry.append(node("span", `key ${line.className || ""}`, line.name), " ");
      entry.append(node("b", "", this.text(values[index])));
      shown.append(entry);
    });
    this.caption.replaceChildren(this.title, shown);
    this.plot.setAttribute("aria-label", `${this.title}, the last ${span(history.seconds)}`);
    this.plot.setAttribute("aria-valuemax", Math.max(0, this.points.length - 1));
  }

  text(value) {
    return value === null || value === undefined ? "–" : `${this.format(value)}${this.unit}`;
  }

  point(time) {
    Chart.pointed = {chart: this, time};
    Chart.mark();
  }

  get index() {
    if (!this.points.length) return -1;
    const time = Chart.pointed && Chart.pointed.chart === this ? Chart.pointed.time : this.end;
    return this.points.reduce((best, point, index) =>
      Math.abs(point.time - time) < Math.abs(this.points[best].time - time) ? index : best, 0);
  }

  mark() {
    const index = this.index, isPointed = Chart.pointed !== null && Chart.pointed.chart === this && index >= 0;
    this.cursor.hidden = this.readout.hidden = !isPointed;
    if (index < 0) return;
    const {time, values} = this.points[index];
    const lines = this.lines.map((line, index) =>
      `${this.lines.length > 1 ? `${line.name} ` : ""}${this.text(values[index])}`);
    this.plot.setAttribute("aria-valuenow", index);
    this.plot.setAttribute("aria-valuetext", `${moment(time)}: ${lines.join(", ")}`);
    if (!isPointed) return;
    const share = 100 * this.place(time) / WIDTH;
    this.cursor.style.left = this.readout.style.left = `${share}%`;
    // It stays inside of the plot, whatever its width is.
    this.readout.style.transform = `translateX(-${share}%)`;
    this.readout.replaceChildren(node("b", "", moment(time)), ...lines.map(line => node("span", "", line)));
  }

  static mark() {
    for (const chart of Chart.all) chart.mark();
  }

  static release() {
    Chart.pointed = null;
    Chart.mark();
  }
}
